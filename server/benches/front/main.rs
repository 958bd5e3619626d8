//! What the network fronts cost: CPU time of the server per token over HTTP and over gRPC, and how many tokens a second it sends.
//!
//! A simulated engine gives every row of its batch a token per step, at a set rate or as fast as it can, to 256 streams. It runs with the real
//! servers in a process of its own, so that its CPU time is its own; the load comes from this process over loopback. The same streams, read
//! within the server's process and sent nowhere, are what the engine itself costs: the rest is the front.
//!
//! `cargo bench -p tidemill --bench front -- --rate 110000 --rate 0 --runs 3`; on machines with more cores, under `taskset -c 0,1`.

#![allow(missing_docs)]

mod load;
mod simulated;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use load::{Load, Protocol};

/// Streams at once.
pub const STREAMS: usize = 256;
/// Tokens of an answer; then the stream asks again.
pub const TOKENS: u32 = 900;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Parser)]
struct Args {
    /// Tokens a second that the engine gives; 0 gives what it can. May be given several times.
    #[arg(long, default_values_t = [110_000, 0])]
    rate: Vec<u64>,
    /// Measurements of each.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Seconds of a measurement.
    #[arg(long, default_value_t = 5.0)]
    window: f64,
    /// Only these: alone, grpc, chat, completions, predict.
    #[arg(long)]
    only: Vec<String>,
    /// The role of the process that is measured.
    #[arg(long, hide = true)]
    serve: bool,
    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.serve {
        return simulated::serve(args.rate[0]);
    }
    println!("{STREAMS} streams, answers of {TOKENS} tokens, windows of {} s\n", args.window);
    println!(
        "| engine gives | front | tokens/s | server CPU µs/token | of it user | over the engine alone µs/token |"
    );
    println!("|---|---|---|---|---|---|");
    for &rate in &args.rate {
        let mut rows: Vec<(Protocol, Vec<Measured>)> = Vec::new();
        for protocol in Protocol::ALL {
            if args.only.is_empty() || args.only.iter().any(|name| name == protocol.name()) {
                rows.push((protocol, Vec::new()));
            }
        }
        // Fronts take turns, so that a bad minute of the machine hits all of them.
        for _ in 0..args.runs {
            for (protocol, runs) in &mut rows {
                runs.push(measure(rate, *protocol, args.window)?);
            }
        }
        let alone = rows.iter().find(|row| row.0 == Protocol::Alone).map(|row| median(&row.1, Measured::cpu));
        for (protocol, runs) in &rows {
            let cpu = median(runs, Measured::cpu);
            let gives = if rate == 0 { "what it can".to_owned() } else { format!("{rate}/s") };
            let over =
                alone.filter(|_| *protocol != Protocol::Alone).map(|alone| format!("{:.2}", cpu - alone));
            println!(
                "| {gives} | {} | {:.0} | {cpu:.2} | {:.2} | {} |",
                protocol.name(),
                median(runs, Measured::rate),
                median(runs, Measured::user),
                over.unwrap_or_default(),
            );
        }
    }
    Ok(())
}

/// A window.
struct Measured {
    tokens: u64,
    seconds: f64,
    /// CPU seconds of the server in user mode and in the kernel.
    cpu: [f64; 2],
}

impl Measured {
    fn rate(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    fn cpu(&self) -> f64 {
        (self.cpu[0] + self.cpu[1]) * 1e6 / self.tokens as f64
    }

    fn user(&self) -> f64 {
        self.cpu[0] * 1e6 / self.tokens as f64
    }
}

fn median(runs: &[Measured], of: impl Fn(&Measured) -> f64) -> f64 {
    let mut values: Vec<f64> = runs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn measure(rate: u64, protocol: Protocol, window: f64) -> Result<Measured> {
    let mut server = Server::start(rate)?;
    let load = match protocol {
        Protocol::Alone => {
            server.ask("alone")?;
            None
        }
        _ => Some(Load::start(protocol, server.addresses)?),
    };
    // Until all streams run and memory is warm.
    thread::sleep(Duration::from_secs(2));
    let mut reading = || -> Result<(u64, [f64; 2])> {
        let tokens = match &load {
            Some(load) => load.tokens()?,
            None => server.ask("count")?.parse()?,
        };
        Ok((tokens, cpu(server.child.id())?))
    };
    let (started, before) = (Instant::now(), reading()?);
    thread::sleep(Duration::from_secs_f64(window));
    let (seconds, after) = (started.elapsed().as_secs_f64(), reading()?);
    let cpu = [after.1[0] - before.1[0], after.1[1] - before.1[1]];
    Ok(Measured { tokens: after.0 - before.0, seconds, cpu })
}

/// The process that is measured.
struct Server {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// gRPC, HTTP.
    addresses: [SocketAddr; 2],
}

impl Server {
    fn start(rate: u64) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--serve", "--rate", &rate.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let questions = child.stdin.take().ok_or("has a stdin")?;
        let mut answers = BufReader::new(child.stdout.take().ok_or("has a stdout")?);
        let mut line = String::new();
        answers.read_line(&mut line)?;
        let (grpc, http) = line.trim().split_once(' ').ok_or("says where it listens")?;
        let addresses = [grpc.parse()?, http.parse()?];
        Ok(Self { child, questions, answers, addresses })
    }

    fn ask(&mut self, question: &str) -> Result<String> {
        writeln!(self.questions, "{question}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing of it is needed any more.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// CPU seconds of a process so far, in user mode and in the kernel (proc(5), fields 14 and 15 of `stat`).
fn cpu(process: u32) -> Result<[f64; 2]> {
    /// `sysconf(_SC_CLK_TCK)` on every Linux of today.
    const TICKS: f64 = 100.0;
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let after_name = stat.rsplit_once(')').ok_or("has a name")?.1;
    let mut fields = after_name.split_whitespace().skip(11);
    let mut next = || -> Result<f64> { Ok(fields.next().ok_or("has times")?.parse::<f64>()? / TICKS) };
    Ok([next()?, next()?])
}
