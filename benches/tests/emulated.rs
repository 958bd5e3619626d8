//! Every case of the benchmarks at tiny shapes, on the emulator: they run, cost what their formulas say and report no failure. Times
//! mean nothing here.

#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tidemill_benches::speed::{
    cuda::CudaMachine,
    kernels,
    limits::Limits,
    machine::Machine,
    model,
    shapes::{Options, Shapes},
    table::Table,
};
use tidemill_kernels_emu::{EmuDriver, Schedule};

fn machine() -> CudaMachine {
    CudaMachine::over(Arc::new(EmuDriver::new(Schedule::default())), false).unwrap()
}

fn names(results: &Value) -> BTreeSet<String> {
    results.as_array().unwrap().iter().map(|result| result["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn kernels_are_all_measured() {
    let options =
        Options { shapes: Shapes::tiny(), only: String::new(), budget: Duration::ZERO, peak_flops: None };
    let mut table = Table::new(json!({}));
    kernels::run(&machine(), &options, &mut table).unwrap();
    let results = &table.to_json()["results"];
    assert_eq!(table.num_failed(), 0, "{results:#}");
    let names = names(results);
    for case in ["gemm", "qkv", "o ", "gate_up", "down", "lm_head", "attention decode", "attention prefill"] {
        assert!(names.iter().any(|name| name.starts_with(case)), "no case {case}: {names:?}");
    }
    for case in ["gate_up int4", "down mxfp4", "gate_up fp8", "down int8"] {
        assert!(names.iter().any(|name| name.starts_with(case)), "no case {case}: {names:?}");
    }
    for case in ["rmsnorm", "embedding", "rope + kv write", "sample greedy", "sample top-k top-p", "experts"]
    {
        assert!(names.iter().any(|name| name.starts_with(case)), "no case {case}: {names:?}");
    }
    assert_eq!(table.num_measured(), results.as_array().unwrap().len(), "none is skipped: {results:#}");
}

#[test]
fn models_are_measured_alone_and_through_the_engine() {
    let mut options = model::Options::tiny();
    options.shapes.truncate(1);
    let machine = machine();
    let limits = Limits { bandwidth: 1e9, flops: 1e9 };
    let mut table = Table::new(json!({ "device": machine.name() }));
    model::run(&machine, &options, limits, &mut table).unwrap();
    let results = table.to_json()["results"].clone();
    assert_eq!(table.num_failed(), 0, "{results:#}");
    let found = names(&results);
    let expected = ["prefill 1k", "decode 1", "decode 3", "engine 1", "engine 3"];
    assert_eq!(found, expected.iter().map(|case| format!("mistral-7b {case}")).collect());
    // A decode step reads every weight but the embedding once: 2 layers and the head of the tiny shape, in bf16 at 1 GB/s.
    let (h, i, q, kv, v) = (64.0, 96.0, 128.0, 64.0, 512.0);
    let weights = 2.0 * ((q + 2.0 * kv) * h + h * q + 3.0 * i * h) + v * h;
    let (kv_bytes, pairs) = (2.0 * 2.0 * 2.0 * kv * 24.0, 4.0 * 24.0 * 2.0 * q);
    let products = f64::max(2.0 * weights, 2.0 * weights) / 1e9;
    let floor = products + f64::max(kv_bytes, pairs) / 1e9;
    let decode = results.as_array().unwrap().iter().find(|r| r["name"] == "mistral-7b decode 1").unwrap();
    let got = decode["floor_seconds"].as_f64().unwrap();
    assert!((got / floor - 1.0).abs() < 1e-9, "floor {got}, expected {floor}");
}
