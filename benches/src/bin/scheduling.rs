//! What the scheduler does for those who are served, on servers of its own: see each part.

use std::{error::Error, path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};
use serde_json::{Map, Value, json};
use tidemill_benches::scheduling::{Bench, Part, Size};

/// Prefix cache, chunking, fairness, admission and priorities, measured at the client.
#[derive(Parser)]
struct Args {
    /// Model folder, or `builtin`.
    #[arg(long, default_value = "builtin")]
    model: String,
    /// Where the servers compute: `auto`, `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Parts to run; all by default.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Rounds in which the servers of a part take turns.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds for which a server is loaded in one round.
    #[arg(long, default_value_t = 2.0)]
    window: f64,
    /// Tokens of the longest prompt, at most; the model may take less.
    #[arg(long, default_value_t = 4096)]
    longest_prompt: usize,
    /// Offered loads as multiples of the measured capacity.
    #[arg(long, value_delimiter = ',', default_value = "0.5,1,1.5,2,3")]
    loads: Vec<f64>,
    /// Write the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let args = Args::parse();
    let window = Duration::try_from_secs_f64(args.window)?;
    let size = Size { rounds: args.rounds, window, longest_prompt: args.longest_prompt, loads: args.loads };
    let binary = std::env::current_exe()?.with_file_name("tidemill");
    let bench = Bench::new(binary, args.model.clone(), args.device.clone(), size);
    let parts = if args.only.is_empty() { Part::value_variants().to_vec() } else { args.only };
    let mut figures = Map::new();
    for part in parts {
        let name = part.to_possible_value().ok_or("every part has a name")?.get_name().replace('-', "_");
        figures.insert(name, part.run(&bench).await?);
        println!();
    }
    if let Some(path) = args.json {
        let all = json!({
            "model": args.model, "device": args.device, "rounds": args.rounds, "window_seconds": args.window,
            "parts": Value::Object(figures),
        });
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}
