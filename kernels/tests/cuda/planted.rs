//! A barrier or a wait that is missing in one of our own kernels is found: each is turned off in turn, and the tests' means (four
//! schedules and more random ones, the race check, the comparison of results) must notice. Not under a sanitizer, which would end
//! the process at the first fault.

use std::{
    collections::BTreeSet,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
};

use tidemill_kernels::cuda::Device;
use tidemill_kernels_emu::{EmuDriver, Schedule, Site};

use crate::{layernorm, linear, rmsnorm};

/// Random schedules that are tried after the four of every test.
const MORE_SCHEDULES: u64 = 8;

/// Runs a kernel on a small input that comes to all of its barriers, and returns what it computed.
type Sample = fn(&Device) -> Vec<f32>;

/// One line per kernel file (or per variant of one).
const SAMPLES: &[(&str, Sample)] =
    &[("layernorm", layernorm::sample), ("linear", linear::sample), ("rmsnorm", rmsnorm::sample)];

/// A barrier that nothing here can miss.
struct Undetected {
    /// The file's name.
    file: &'static str,
    /// What stands on its line.
    text: &'static str,
    /// Why it is needed, and why its absence does not show.
    reason: &'static str,
}

const UNDETECTED: &[Undetected] = &[
    Undetected {
        file: "linear_skinny.cu",
        text: "cp_async_wait<0>();",
        reason: "the groups still in flight are empty: nothing is fetched beyond the end",
    },
    Undetected {
        file: "linear_tiled.cu",
        text: "cp_async_wait<0>();",
        reason: "the groups still in flight are empty: nothing is fetched beyond the end",
    },
];

#[test]
fn every_barrier_and_wait_is_missed_when_it_is_gone() {
    if option_env!("TIDEMILL_EMU_SANITIZE").is_some() {
        return;
    }
    let mut failures = Vec::new();
    let mut met = 0;
    for &(name, sample) in SAMPLES {
        let expected = bits(name, &run(Schedule::default(), None, sample).0);
        let sites: BTreeSet<Site> =
            Schedule::all().into_iter().flat_map(|schedule| run(schedule, None, sample).1).collect();
        assert!(!sites.is_empty(), "{name} has no barrier, and need not stand here");
        for site in sites {
            let found = Schedule::many(MORE_SCHEDULES).into_iter().any(|schedule| {
                run(schedule, Some(&site), sample).0.is_none_or(|got| bits_of(&got) != expected)
            });
            let known = undetected(&site);
            met += usize::from(known.is_some());
            match (found, known) {
                (false, None) => failures.push(format!("{name}: nobody misses {site}")),
                (true, Some(known)) => {
                    failures.push(format!("{name}: {site} is found, though: {}", known.reason))
                }
                _ => {}
            }
        }
    }
    assert!(met >= UNDETECTED.len(), "a barrier that is listed as undetected is gone");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Runs a sample with one site turned off; its values, or nothing if anything complained, and the sites that it came to.
fn run(schedule: Schedule, skip: Option<&Site>, sample: Sample) -> (Option<Vec<f32>>, Vec<Site>) {
    let driver = Arc::new(EmuDriver::new(schedule));
    driver.skip_site(skip.cloned());
    let device = Device::new(driver.clone());
    let values = catch_unwind(AssertUnwindSafe(|| sample(&device))).ok();
    (values, driver.sites())
}

fn bits(name: &str, values: &Option<Vec<f32>>) -> Vec<u32> {
    bits_of(values.as_ref().unwrap_or_else(|| panic!("{name} fails with all its barriers")))
}

fn bits_of(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn undetected(site: &Site) -> Option<&'static Undetected> {
    // Paths are relative to the folder of the emulator's build script.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("emu").join(&site.file);
    let source = fs::read_to_string(path).unwrap();
    let line = source.lines().nth(site.line as usize - 1).unwrap();
    UNDETECTED.iter().find(|known| site.file.ends_with(known.file) && line.contains(known.text))
}
