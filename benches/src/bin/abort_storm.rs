//! What a storm of aborts costs the streams that live through it: their inter-token latency in calm and in storm, in turn.

use std::{
    error::Error,
    time::{Duration, Instant},
};

use clap::Parser;
use tidemill_benches::{
    server::{ServerProcess, cpu_time},
    storm::{Receipts, Storm, Survivor},
    summary::{median, quantile},
};
use tidemill_proto::v1::{GetStatsRequest, control_client::ControlClient};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Endpoint};

/// Rows beside the survivors': for aborts in decode in a storm, and for streams that nobody measures in calm, so that the
/// batch is the same.
const OTHER_ROWS: usize = 2;

/// Survivors' inter-token latency with and without a storm of aborts.
#[derive(Parser)]
struct Args {
    /// Model folder, or `builtin`.
    #[arg(long, default_value = "builtin")]
    model: String,
    /// Where the server computes: `auto`, `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "auto")]
    device: String,
    /// CPU threads of the server's model; 0 leaves it to the server.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Aborts per second.
    #[arg(long, default_value_t = 5000)]
    rate: u32,
    /// Streams that decode meanwhile.
    #[arg(long, default_value_t = 4)]
    survivors: usize,
    /// Tokens of each of their turns.
    #[arg(long, default_value_t = 900)]
    max_tokens: u32,
    /// Seconds of each calm and of each storm.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Calms and storms, in turn.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Log level of the server: it writes a line for every RPC at `info`.
    #[arg(long, default_value = "info")]
    log_level: String,
}

/// A calm or a storm.
struct Weather {
    receipts: Receipts,
    gaps: Vec<Duration>,
    /// Cores that the server and this process kept busy.
    server_cores: f64,
    client_cores: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let rows = (args.survivors + OTHER_ROWS).to_string();
    let threads = args.threads.to_string();
    let mut options = vec!["--model", &args.model, "--device", &args.device, "--max-num-seqs", &rows];
    options.extend(["--max-num-queued-reqs", "100000", "--log-level", &args.log_level]);
    if args.threads > 0 {
        options.extend(["--threads", &threads]);
    }
    let server = ServerProcess::start(&options)?;
    // Survivors have a thread of their own, so that their clock does not wait for the storm's client.
    let (calm, storm) = (runtime()?, runtime()?);
    let mut all = Vec::new();
    for number in 0..args.survivors + OTHER_ROWS {
        let prompt = vec![3, 3 + number as u32];
        let survivor =
            async { Survivor::new(connect(&server.address).await?, prompt, args.max_tokens).await };
        all.push(calm.block_on(survivor)?);
    }
    println!("{} streams, {} aborts/s asked, {} s each\n", args.survivors, args.rate, args.seconds);
    println!(
        "           aborts/s   to free p50      p99   receipt p50      p99   ITL p50      p99   cores: server  client"
    );
    let (mut calms, mut storms) = (Vec::new(), Vec::new());
    for round in 0..args.rounds {
        let weather = pass(&args, &server, &calm, None, all.clone())?;
        calms.push(report("calm", &weather));
        let rain = (&storm, format!("storm-{round}"));
        let weather = pass(&args, &server, &calm, Some(rain), all[..args.survivors].to_vec())?;
        storms.push(report("storm", &weather));
    }
    let ratio = |at: usize| {
        let of = |figures: &[[f64; 2]]| median(&figures.iter().map(|f| f[at]).collect::<Vec<_>>());
        of(&storms) / of(&calms)
    };
    println!("\nITL in storm over ITL in calm: {:.2} at p50, {:.2} at p99", ratio(0), ratio(1));
    calm.block_on(nothing_is_left(&server.address))
}

fn runtime() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

async fn connect(address: &str) -> Result<Channel, tonic::Status> {
    let endpoint =
        Endpoint::new(address.to_owned()).map_err(|error| tonic::Status::internal(error.to_string()))?;
    endpoint.connect().await.map_err(|error| tonic::Status::unavailable(error.to_string()))
}

/// One calm, or one storm by `storm`, with these streams in it; the first of them are measured.
fn pass(
    args: &Args,
    server: &ServerProcess,
    calm: &Runtime,
    storm: Option<(&Runtime, String)>,
    streams: Vec<Survivor>,
) -> Result<Weather, Box<dyn Error>> {
    let duration = Duration::from_secs_f64(args.seconds);
    let busy = || -> std::io::Result<_> { Ok((cpu_time(server.id())?, cpu_time(std::process::id())?)) };
    let (start, before) = (Instant::now(), busy()?);
    let end = start + duration;
    let (gaps, receipts) = std::thread::scope(|scope| {
        let living = scope.spawn(|| {
            calm.block_on(async {
                let tasks: Vec<_> = streams
                    .into_iter()
                    .map(|s| tokio::spawn(async move { s.live_until(end).await }))
                    .collect();
                let mut gaps = Vec::new();
                for task in tasks {
                    let of_stream =
                        task.await.map_err(|error| tonic::Status::internal(error.to_string()))??;
                    gaps.push(of_stream);
                }
                Ok::<_, tonic::Status>(gaps)
            })
        });
        let receipts = match storm {
            None => Ok(Receipts::default()),
            Some((runtime, name)) => runtime.block_on(async {
                let storm = Storm { name, rate: args.rate, duration };
                storm.run(connect(&server.address).await?).await
            }),
        };
        (living.join(), receipts)
    });
    let gaps = gaps.map_err(|_| "the survivors' thread panicked")??;
    let (wall, after) = (start.elapsed().as_secs_f64(), busy()?);
    Ok(Weather {
        receipts: receipts?,
        gaps: gaps.into_iter().take(args.survivors).flatten().collect(),
        server_cores: (after.0 - before.0).as_secs_f64() / wall,
        client_cores: (after.1 - before.1).as_secs_f64() / wall,
    })
}

/// Prints a line; returns the inter-token latency at p50 and p99 in milliseconds.
fn report(name: &str, weather: &Weather) -> [f64; 2] {
    let ms = |durations: &[Duration], q| quantile(durations, q).as_secs_f64() * 1e3;
    let (free, trips) = (&weather.receipts.to_free, &weather.receipts.round_trips);
    let itl = [0.5, 0.99].map(|q| ms(&weather.gaps, q));
    let rate = if trips.is_empty() { 0.0 } else { weather.receipts.rate() };
    println!(
        "{name:8} {rate:10.0} {:10.3} ms {:5.3} ms {:10.2} ms {:5.2} ms {:6.2} ms {:5.2} ms {:15.2} {:7.2}",
        ms(free, 0.5),
        ms(free, 0.99),
        ms(trips, 0.5),
        ms(trips, 0.99),
        itl[0],
        itl[1],
        weather.server_cores,
        weather.client_cores,
    );
    itl
}

/// Waits until the server holds nothing for anybody.
async fn nothing_is_left(address: &str) -> Result<(), Box<dyn Error>> {
    let mut control = ControlClient::new(connect(address).await?);
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let stats = control.get_stats(GetStatsRequest {}).await?.into_inner().stats.ok_or("no statistics")?;
        if stats.kv_blocks_owned == 0 && stats.num_requests_running + stats.num_requests_waiting == 0 {
            println!("nothing is left behind: {} requests were aborted", stats.requests_aborted_total);
            return Ok(());
        }
        if Instant::now() > end {
            return Err(format!("something is left behind: {stats:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
