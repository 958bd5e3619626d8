//! Goodput against offered load: requests that keep the limits on TTFT and mean ITL, per second.
//!
//! Open loop: requests arrive when a Poisson process says so, whatever became of those before, and times count from when a request
//! was due. A client that waits for answers would slow down with the server and hide its queue ("coordinated omission").

use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{
    Bench, Error, Served,
    client::{Seen, follow},
    crowd::{Crowd, Kind},
    ms,
};
use crate::summary::quantile;

/// Rows of the batch.
const ROWS: usize = 8;
/// Tokens of each prompt.
const PROMPT_TOKENS: usize = 64;
/// Tokens of each answer.
const MAX_TOKENS: u32 = 32;
/// Requests that arrive in this part of a window find a queue that is not what it will be, and do not count.
const WARM_UP: f64 = 0.25;

/// What a request must keep to count.
#[derive(Debug, Clone, Copy)]
struct Limits {
    ttft: Duration,
    mean_itl: Duration,
    /// `--max-queue-time` of the server that has it.
    queue_time: Duration,
}

impl Limits {
    fn keep(&self, seen: &Seen) -> bool {
        seen.ttft <= self.ttft && seen.mean_itl <= self.mean_itl
    }
}

/// What became of the requests of a load that count.
#[derive(Debug, Default)]
struct Fates {
    good: usize,
    late: usize,
    /// From when a request was due to its refusal, of those that were refused before they had waited for all of the queue time.
    refused: Vec<Duration>,
    /// Those that were let in, waited so long, and were refused then: the prediction of their wait had been too short.
    expired: usize,
    seconds: f64,
}

impl Fates {
    fn goodput(&self) -> f64 {
        self.good as f64 / self.seconds
    }
}

/// The requests per second that a full server answers, and what its streams see then.
async fn capacity(bench: &Bench, served: &Served) -> Result<(f64, Duration), Error> {
    let kind = Kind {
        size: 2 * ROWS,
        prompt_tokens: PROMPT_TOKENS,
        max_tokens: MAX_TOKENS,
        priority: 0,
        tenant: "",
    };
    let crowd = Crowd::start(bench, served, kind, 3 * ROWS).await?;
    crowd.take()?;
    let start = Instant::now();
    tokio::time::sleep(bench.size.window).await;
    let log = crowd.take()?;
    let itls: Vec<_> = log.answers.iter().map(|seen| seen.mean_itl).collect();
    if itls.is_empty() {
        return Err("nothing was answered in a window: make it longer".into());
    }
    Ok((log.answers.len() as f64 / start.elapsed().as_secs_f64(), quantile(&itls, 0.5)))
}

/// What became of a request.
#[derive(Debug)]
enum Fate {
    Good,
    Late,
    Refused(Duration),
    Expired,
}

fn judge(result: Result<Seen, Status>, due: Instant, limits: Limits) -> Result<Fate, Error> {
    match result {
        Ok(seen) if limits.keep(&seen) => Ok(Fate::Good),
        Ok(_) => Ok(Fate::Late),
        Err(status) if status.code() == Code::ResourceExhausted => {
            let hint = status.get_details_retry_info().and_then(|info| info.retry_delay);
            hint.ok_or_else(|| format!("a refusal says not when to retry: {status:?}"))?;
            let after = due.elapsed();
            Ok(if after < limits.queue_time { Fate::Refused(after) } else { Fate::Expired })
        }
        Err(status) => Err(status.into()),
    }
}

/// Offers `rate` requests per second for a window.
async fn offer(bench: &Bench, served: &Served, rate: f64, limits: Limits) -> Result<Fates, Error> {
    let mut rng = StdRng::seed_from_u64(rate.to_bits());
    let (start, window) = (Instant::now(), bench.size.window);
    let (mut tasks, mut at, mut counted) = (JoinSet::new(), 0.0, 0);
    loop {
        // Intervals of a Poisson process are exponential: the inverse of their distribution function.
        at -= (1.0 - rng.random::<f64>()).ln() / rate;
        let due = start + Duration::from_secs_f64(at);
        if due > start + window {
            break;
        }
        tokio::time::sleep_until(due.into()).await;
        let counts = at >= WARM_UP * window.as_secs_f64();
        counted += usize::from(counts);
        let (client, ask) = (served.client.clone(), bench.fresh(served, PROMPT_TOKENS, MAX_TOKENS));
        tasks.spawn(async move {
            let result = follow(&client, ask, due, |_| ()).await;
            (counts, judge(result, due, limits))
        });
    }
    // Whoever is not done by then has failed to keep the limits.
    let patience = limits.ttft + limits.mean_itl * MAX_TOKENS;
    let mut fates = Fates { seconds: (1.0 - WARM_UP) * window.as_secs_f64(), ..Fates::default() };
    let collect = async {
        while let Some(done) = tasks.join_next().await {
            let (counts, fate) = done?;
            match fate? {
                _ if !counts => {}
                Fate::Good => fates.good += 1,
                Fate::Late => fates.late += 1,
                Fate::Refused(after) => fates.refused.push(after),
                Fate::Expired => fates.expired += 1,
            }
        }
        Ok::<_, Error>(())
    };
    if let Ok(done) = tokio::time::timeout(patience, collect).await {
        done?;
    }
    drop(tasks);
    fates.late = counted - fates.good - fates.refused.len() - fates.expired;
    Ok(fates)
}

/// Waits until nothing of the load before is left.
async fn settle(bench: &Bench, served: &Served) -> Result<(), Error> {
    // It is served after all that came before it and was not aborted.
    let mut tries = 0;
    while let Err(status) = super::client::answer(&served.client, bench.fresh(served, 16, 1)).await {
        tries += 1;
        if status.code() != Code::ResourceExhausted || tries > 100 {
            return Err(status.into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// One server over all loads.
struct Server {
    name: &'static str,
    served: Served,
    fates: Vec<Fates>,
}

/// With a limit on the time in the queue and without.
pub async fn run(bench: &Bench) -> Result<Value, Error> {
    let rows = ROWS.to_string();
    let rows = ["--max-num-seqs", rows.as_str()];
    let unlimited = bench.serve(&rows).await?;
    let (capacity, mean_itl) = capacity(bench, &unlimited).await?;
    // By Little's law a request is in the batch for so long.
    let in_batch = Duration::from_secs_f64(ROWS as f64 / capacity);
    let limits = Limits { ttft: in_batch * 4, mean_itl: mean_itl * 4, queue_time: in_batch * 2 };
    let seconds = format!("{:.4}", limits.queue_time.as_secs_f64());
    let limited = bench.serve(&[&rows[..], &["--max-queue-time", &seconds]].concat()).await?;
    let mut servers = [
        Server { name: "limited", served: limited, fates: Vec::new() },
        Server { name: "no limit", served: unlimited, fates: Vec::new() },
    ];
    for &load in &bench.size.loads {
        for server in &mut servers {
            settle(bench, &server.served).await?;
            server.fates.push(offer(bench, &server.served, load * capacity, limits).await?);
        }
    }
    println!(
        "overload: {capacity:.1} requests/s at most; good is a TTFT within {:.0} ms and a mean ITL within {:.1} ms; \
         --max-queue-time {seconds}",
        ms(limits.ttft),
        ms(limits.mean_itl),
    );
    println!(
        "  queue      load   offered/s   good/s   of peak   late   refused   after p50   p99 ms   expired"
    );
    let reports: Vec<Value> = servers.iter().map(|server| server.report(&bench.size.loads)).collect();
    Ok(json!({
        "capacity_requests_per_second": capacity, "ttft_limit_ms": ms(limits.ttft),
        "mean_itl_limit_ms": ms(limits.mean_itl), "max_queue_time_ms": ms(limits.queue_time), "queues": reports,
    }))
}

impl Server {
    fn report(&self, loads: &[f64]) -> Value {
        let peak = self.fates.iter().map(Fates::goodput).fold(0.0, f64::max);
        let mut rows = Vec::new();
        for (load, fates) in loads.iter().zip(&self.fates) {
            let refused = fates.refused.len();
            let offered = (fates.good + fates.late + refused + fates.expired) as f64 / fates.seconds;
            let (good, of_peak) = (fates.goodput(), fates.goodput() / peak);
            let [p50, p99] = [0.5, 0.99].map(|q| ms(quantile(&fates.refused, q)));
            println!(
                "  {:8} {load:5.2}x {offered:10.1} {good:8.1} {of_peak:9.2} {:6} {refused:9} {p50:11.2} {p99:8.2} {:9}",
                self.name, fates.late, fates.expired
            );
            rows.push(json!({
                "load": load, "offered_per_second": offered, "good_per_second": good, "of_peak": of_peak,
                "late": fates.late, "refused": refused, "expired": fates.expired, "refusal_p50_ms": p50, "refusal_p99_ms": p99,
            }));
        }
        json!({ "queue": self.name, "loads": rows })
    }
}
