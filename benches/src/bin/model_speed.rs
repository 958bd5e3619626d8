//! The speed of whole models with random weights beside the limits of the machine, and what the engine's loop adds.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use serde_json::json;
use tidemill_benches::speed::{
    Error,
    cuda::CudaMachine,
    machine::{CpuMachine, Machine, Place},
    model::{self, Options},
    table::Table,
};

/// Times prefill and decode of models of real size with random weights, on the device and through the engine.
#[derive(Parser)]
struct Args {
    /// Where: cuda:N or cpu.
    #[arg(long, default_value = "cuda:0")]
    device: Place,
    /// Only these models: mistral-7b, llama-3.1-8b, qwen3-0.6b.
    #[arg(long, value_delimiter = ',')]
    models: Vec<String>,
    /// Only cases whose names contain this.
    #[arg(long, default_value = "")]
    only: String,
    /// Sequences that decode together.
    #[arg(long, value_delimiter = ',')]
    batches: Option<Vec<usize>>,
    /// TFLOP/s of the best matrix product known of this machine, for example cuBLAS's; ours counts if it is better.
    #[arg(long)]
    peak_tflops: Option<f64>,
    /// Tiny models: only shows that every case runs.
    #[arg(long)]
    tiny: bool,
    /// Write the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let ran = match args.device {
        Place::Cuda(ordinal) => CudaMachine::open(ordinal).and_then(|machine| run(&machine, &args)),
        Place::Cpu => run(&CpuMachine, &args),
    };
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run<M: Machine>(machine: &M, args: &Args) -> Result<(), Error> {
    println!("{}", machine.name());
    let mut options = if args.tiny { Options::tiny() } else { Options::full() };
    options.only.clone_from(&args.only);
    if let Some(batches) = &args.batches {
        options.batches.clone_from(batches);
    }
    if !args.models.is_empty() {
        options.shapes.retain(|shape| args.models.iter().any(|name| name == shape.name));
    }
    let mut table = Table::new(json!({
        "benchmark": "model speed", "device": machine.name(), "meaningful": machine.is_real() && !args.tiny,
    }));
    let ran = model::limits(machine, args.peak_tflops.map(|peak| peak * 1e12), &mut table)
        .and_then(|limits| model::run(machine, &options, limits, &mut table));
    // What was measured before an error is worth keeping.
    table.finish(args.json.as_deref()).and(ran)
}
