//! The speed of single kernels beside the limits of the machine.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use serde_json::json;
use tidemill_benches::speed::{
    Error,
    cuda::CudaMachine,
    kernels,
    machine::{CpuMachine, Machine, Place},
    shapes::{Options, Shapes},
    table::Table,
};

/// Times every kernel at Mistral-7B's shapes: bytes and operations per second, and the fraction of the machine's floor.
#[derive(Parser)]
struct Args {
    /// Where: cuda:N or cpu.
    #[arg(long, default_value = "cuda:0")]
    device: Place,
    /// Only cases whose names contain this.
    #[arg(long, default_value = "")]
    only: String,
    /// Milliseconds spent on the repetitions of each case.
    #[arg(long, default_value_t = 300)]
    budget_ms: u64,
    /// TFLOP/s of the best matrix product known of this machine, for example cuBLAS's; ours counts if it is better.
    #[arg(long)]
    peak_tflops: Option<f64>,
    /// Tiny shapes: only shows that every case runs.
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
    let mut table = Table::new(json!({
        "benchmark": "kernels", "device": machine.name(), "meaningful": machine.is_real() && !args.tiny,
    }));
    let options = Options {
        shapes: if args.tiny { Shapes::tiny() } else { Shapes::full() },
        only: args.only.clone(),
        budget: Duration::from_millis(args.budget_ms),
        peak_flops: args.peak_tflops.map(|peak| peak * 1e12),
    };
    let ran = kernels::run(machine, &options, &mut table);
    // What was measured before an error is worth keeping.
    table.finish(args.json.as_deref()).and(ran)
}
