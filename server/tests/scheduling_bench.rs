//! The benchmark of the scheduler runs, each part in its smallest form, against the real binary. Times mean nothing here.

#![allow(clippy::unwrap_used)]

use serde_json::Value;
use tidemill_benches::scheduling::{Bench, Part, Size};

async fn figures(part: Part) -> Value {
    let binary = env!("CARGO_BIN_EXE_tidemill").into();
    let bench = Bench::new(binary, "builtin".into(), "cpu".into(), Size::smallest());
    part.run(&bench).await.unwrap()
}

fn positive(row: &Value, names: &[&str]) {
    for name in names {
        assert!(row[name].as_f64().is_some_and(|figure| figure > 0.0), "{name} of {row}");
    }
}

#[tokio::test]
async fn warm_prefix() {
    let rows = figures(Part::WarmPrefix).await;
    let lengths: Vec<_> = rows.as_array().unwrap().iter().map(|row| row["prompt_tokens"].as_u64()).collect();
    assert_eq!(lengths, [Some(64), Some(128), Some(256)]);
    rows.as_array().unwrap().iter().for_each(|row| {
        positive(row, &["cold_ttft_ms", "warm_ttft_ms", "ratio", "cached_tokens"]);
    });
}

#[tokio::test]
async fn long_prompt() {
    let all = figures(Part::LongPrompt).await;
    positive(&all, &["quiet_itl_p50_ms", "target_itl_ms"]);
    assert_eq!(all["ways"].as_array().unwrap().len(), 3);
    for way in all["ways"].as_array().unwrap() {
        positive(way, &["itl_p50_ms", "itl_p99_ms", "long_ttft_p50_ms", "num_long_prompts"]);
    }
}

#[tokio::test]
async fn short_prompts() {
    let all = figures(Part::ShortPrompts).await;
    assert_eq!(all["thresholds"].as_array().unwrap().len(), 2);
    for row in all["thresholds"].as_array().unwrap() {
        positive(row, &["short_ttft_p50_ms", "long_ttft_p50_ms"]);
    }
}

#[tokio::test]
async fn tenants() {
    let cases = figures(Part::Tenants).await;
    let names: Vec<_> =
        cases.as_array().unwrap().iter().map(|case| case["policy"].as_str().unwrap()).collect();
    assert_eq!(names, ["fcfs", "fair", "fair, weights 1:3"]);
    for case in cases.as_array().unwrap() {
        let tokens: Vec<_> = case["tokens"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        assert!(tokens.iter().sum::<u64>() > 0 && tokens.len() == 2, "{case}");
        assert!((0.0..=1.0).contains(&case["share_of_b"].as_f64().unwrap()), "{case}");
    }
}

#[tokio::test]
async fn overload() {
    let all = figures(Part::Overload).await;
    positive(&all, &["capacity_requests_per_second", "ttft_limit_ms", "max_queue_time_ms"]);
    let queues = all["queues"].as_array().unwrap();
    assert_eq!(queues.iter().map(|queue| queue["loads"].as_array().unwrap().len()).sum::<usize>(), 4);
    for load in queues.iter().flat_map(|queue| queue["loads"].as_array().unwrap()) {
        positive(load, &["offered_per_second"]);
    }
    // Without a limit on the time in the queue the few requests of this test are all taken in.
    for load in queues.last().unwrap()["loads"].as_array().unwrap() {
        assert_eq!(load["refused"], 0, "{load}");
    }
}

#[tokio::test]
async fn urgent() {
    for row in figures(Part::Urgent).await.as_array().unwrap() {
        positive(row, &["urgent_ttft_p50_ms", "num_urgent"]);
    }
}
