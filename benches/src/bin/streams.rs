//! TTFT, inter-token latency and tokens/s at several numbers of concurrent streams, over real gRPC, beside the bound that
//! memory bandwidth sets: a decode step cannot be quicker than one reading of the weights.

use std::{error::Error, time::Duration};

use clap::Parser;
use serde_json::json;
use tidemill_benches::{
    aborts,
    load::{self, Wave, WaveTiming},
    server::ServerProcess,
    summary::{median, quantile},
};
use tidemill_kernels::cpu::probe;
use tidemill_proto::v1::{GetModelRequest, inference_client::InferenceClient};

/// Streams against a server: TTFT, inter-token latency, tokens/s, and the ratio to the bandwidth bound.
#[derive(Parser)]
struct Args {
    /// Model folder, or `builtin`.
    #[arg(long, default_value = "builtin")]
    model: String,
    /// Where the server computes: `auto`, `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Numbers of concurrent streams.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    streams: Vec<usize>,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 128)]
    prompt_tokens: usize,
    /// Tokens that each stream generates.
    #[arg(long, default_value_t = 128)]
    max_tokens: u32,
    /// Tokens of the prompt whose TTFT is the prefill figure; 0 leaves it out.
    #[arg(long, default_value_t = 512)]
    prefill_tokens: usize,
    /// Repetitions of each figure; medians are printed.
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Streams that are aborted after their first token, one after the other.
    #[arg(long, default_value_t = 0)]
    aborts: usize,
    /// Write the figures as JSON to this file.
    #[arg(long)]
    json: Option<std::path::PathBuf>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    // Before the server runs, so that nothing competes. It bounds the CPU alone.
    let bandwidth = probe::read_bandwidth(std::thread::available_parallelism()?.get())?;
    let server = ServerProcess::start(&["--model", &args.model, "--device", &args.device])?;
    let mut client = InferenceClient::connect(server.address.clone()).await?;
    let model = client.get_model(GetModelRequest {}).await?.into_inner();
    let on_cpu = model.device.starts_with("cpu");
    let bound = on_cpu.then(|| bandwidth / model.weight_bytes_per_step as f64);
    println!("{} on {}", model.served_model_name, model.device);
    println!(
        "{:.1} M parameters, {:.1} MB read per step",
        model.num_parameters as f64 / 1e6,
        model.weight_bytes_per_step as f64 / 1e6
    );
    if let Some(bound) = bound {
        println!("{:.1} GB/s read bandwidth bound one stream to {bound:.0} tok/s", bandwidth / 1e9);
    }
    println!(
        "prompts of {} tokens, {} generated, medians of {}\n",
        args.prompt_tokens, args.max_tokens, args.repeat
    );
    println!(
        "streams   TTFT p50   TTFT max   ITL p50   ITL p99   decode tok/s   of bound   with prompts tok/s"
    );
    let mut figures = Vec::new();
    let mut salt = 0;
    let mut wave = |streams, prompt_tokens, max_tokens| {
        salt += 1;
        Wave { streams, prompt_tokens, max_tokens, vocab_size: model.vocab_size, salt }
    };
    // One unmeasured wave: page faults and clocks.
    load::run(&client, &wave(1, args.prompt_tokens, args.max_tokens)).await?;
    for &streams in &args.streams {
        let mut runs = Vec::new();
        for _ in 0..args.repeat {
            runs.push(load::run(&client, &wave(streams, args.prompt_tokens, args.max_tokens)).await?);
        }
        figures.push(report(streams, &runs, bound));
    }
    let mut prefill = f64::NAN;
    if args.prefill_tokens > 0 {
        let mut rates = Vec::new();
        for _ in 0..args.repeat {
            let timing = load::run(&client, &wave(1, args.prefill_tokens, 1)).await?;
            rates.push(args.prefill_tokens as f64 / timing.streams[0].ttft.as_secs_f64());
        }
        prefill = median(&rates);
        println!("\nprefill of {} tokens: {prefill:.0} tok/s", args.prefill_tokens);
    }
    let mut receipts = Vec::new();
    for number in 0..args.aborts {
        let channel = tonic::transport::Endpoint::new(server.address.clone())?.connect().await?;
        receipts.push(aborts::one(channel, number, model.max_model_len - 64).await?);
    }
    let receipt_ms = quantile(&receipts, 0.5).as_secs_f64() * 1e3;
    if args.aborts > 0 {
        println!(
            "\nabort to receipt: {receipt_ms:.2} ms; {} streams aborted, all blocks came back",
            args.aborts
        );
    }
    if let Some(path) = args.json {
        let all = json!({
            "model": model.served_model_name, "device": model.device, "read_bandwidth_bytes_per_second": bandwidth,
            "weight_bytes_per_step": model.weight_bytes_per_step, "bound_tokens_per_second": bound,
            "prompt_tokens": args.prompt_tokens, "max_tokens": args.max_tokens, "repeat": args.repeat,
            "aborts": args.aborts, "abort_receipt_p50_ms": receipt_ms, "streams": figures, "prefill_tokens": args.prefill_tokens, "prefill_tokens_per_second": prefill,
        });
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}

fn report(streams: usize, runs: &[WaveTiming], bound: Option<f64>) -> serde_json::Value {
    let of_runs = |figure: &dyn Fn(&WaveTiming) -> f64| median(&runs.iter().map(figure).collect::<Vec<_>>());
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let ttfts = |run: &WaveTiming| run.streams.iter().map(|s| s.ttft).collect::<Vec<_>>();
    let gaps = |run: &WaveTiming| run.streams.iter().flat_map(|s| s.gaps.clone()).collect::<Vec<_>>();
    let ttft_p50 = of_runs(&|run| ms(quantile(&ttfts(run), 0.5)));
    let ttft_max = of_runs(&|run| ms(quantile(&ttfts(run), 1.0)));
    let itl_p50 = of_runs(&|run| ms(quantile(&gaps(run), 0.5)));
    let itl_p99 = of_runs(&|run| ms(quantile(&gaps(run), 0.99)));
    let decode = of_runs(&WaveTiming::decode_rate);
    let whole = of_runs(&WaveTiming::throughput);
    let of_bound = bound.map(|bound| decode / bound);
    let shown = of_bound.map_or_else(|| "-".into(), |share| format!("{share:.2}x"));
    println!(
        "{streams:7} {ttft_p50:8.1} ms {ttft_max:7.1} ms {itl_p50:6.2} ms {itl_p99:6.2} ms {decode:14.1} {shown:>10} {whole:20.1}"
    );
    json!({
        "streams": streams, "ttft_p50_ms": ttft_p50, "ttft_max_ms": ttft_max, "itl_p50_ms": itl_p50, "itl_p99_ms": itl_p99,
        "decode_tokens_per_second": decode, "tokens_per_second": whole, "of_bandwidth_bound": of_bound,
    })
}
