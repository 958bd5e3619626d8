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

use tidemill_kernels_emu::{EmuDriver, Schedule, Site};

use crate::{attention, latent, linear, moe, norm, paged::Bed, quantized, rope_kv_write, sampling};

/// Random schedules that are tried after the four of every test.
const MORE_SCHEDULES: u64 = 8;

/// Runs a kernel on a small input that comes to all of its barriers, and returns what it computed.
type Sample = fn(&Bed) -> Vec<f32>;

/// One line per kernel file (or per variant of one).
const SAMPLES: &[(&str, Sample)] = &[
    ("attention, 64", |bed| attention::sample(bed, 64)),
    ("attention, 192", |bed| attention::sample(bed, 192)),
    ("layernorm", |bed| norm::sample(&bed.device, true)),
    ("latent", latent::sample),
    ("linear", |bed| linear::sample(&bed.device)),
    ("linear, quantised", |bed| quantized::sample(&bed.device)),
    ("moe", moe::sample),
    ("rmsnorm", |bed| norm::sample(&bed.device, false)),
    ("rope_kv_write", rope_kv_write::sample),
    ("sampling", sampling::sample_of_choices),
];

/// A barrier that nothing here can miss.
struct Undetected {
    /// The only sample that cannot miss it, if others can.
    sample: Option<&'static str>,
    /// The file's name.
    file: &'static str,
    /// What stands on its line.
    text: &'static str,
    /// Why it is needed, and why its absence does not show.
    reason: &'static str,
}

const NOTHING_IN_FLIGHT: &str = "the groups still in flight are empty: nothing is fetched beyond the end";

const UNDETECTED: &[Undetected] = &[
    Undetected {
        sample: None,
        file: "attention_items.cuh",
        text: "cp_async_wait<0>();",
        reason: NOTHING_IN_FLIGHT,
    },
    Undetected {
        sample: Some("attention, 64"),
        file: "attention_items.cuh",
        text: "__syncwarp();  // every lane is done with the item before",
        reason: "up to D = 128 an item's last piece is not where the next one's first go, but beyond it may be",
    },
    Undetected {
        sample: None,
        file: "linear_skinny.cuh",
        text: "cp_async_wait<0>();",
        reason: NOTHING_IN_FLIGHT,
    },
    Undetected {
        sample: None,
        file: "linear_tiled.cuh",
        text: "cp_async_wait<0>();",
        reason: NOTHING_IN_FLIGHT,
    },
];

#[test]
fn every_barrier_and_wait_is_missed_when_it_is_gone() {
    if option_env!("TIDEMILL_EMU_SANITIZE").is_some() {
        return;
    }
    let mut failures = Vec::new();
    let mut met = BTreeSet::new();
    for &(name, sample) in SAMPLES {
        let expected = bits(name, &run(Schedule::default(), None, sample).0);
        let mut sites = BTreeSet::new();
        for schedule in Schedule::many(MORE_SCHEDULES) {
            // What differs by itself would let every fault pass for found.
            let (values, met) = run(schedule, None, sample);
            assert_eq!(bits(name, &values), expected, "{name} under {schedule:?}");
            sites.extend(met);
        }
        assert!(!sites.is_empty(), "{name} has no barrier, and need not stand here");
        for site in sites {
            let known = undetected(name, &site);
            met.extend(known);
            // Of those that are known, it is only to be seen that they still are what their entry says.
            let more = if known.is_some() { 0 } else { MORE_SCHEDULES };
            let found = Schedule::many(more).into_iter().any(|schedule| {
                run(schedule, Some(&site), sample).0.is_none_or(|got| bits_of(&got) != expected)
            });
            match (found, known) {
                (false, None) => failures.push(format!("{name}: nobody misses {site}")),
                (true, Some(known)) => {
                    failures.push(format!("{name}: {site} is found, though: {}", UNDETECTED[known].reason))
                }
                _ => {}
            }
        }
    }
    assert_eq!(met.len(), UNDETECTED.len(), "a barrier that is listed as undetected is gone");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Runs a sample with one site turned off; its values, or nothing if anything complained, and the sites that it came to.
fn run(schedule: Schedule, skip: Option<&Site>, sample: Sample) -> (Option<Vec<f32>>, Vec<Site>) {
    let driver = Arc::new(EmuDriver::new(schedule));
    driver.skip_site(skip.cloned());
    let bed = Bed::over(driver.clone());
    let values = catch_unwind(AssertUnwindSafe(|| sample(&bed))).ok();
    (values, driver.sites())
}

fn bits(name: &str, values: &Option<Vec<f32>>) -> Vec<u32> {
    bits_of(values.as_ref().unwrap_or_else(|| panic!("{name} fails with all its barriers")))
}

fn bits_of(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The entry of [`UNDETECTED`] for a site that a sample comes to.
fn undetected(sample: &str, site: &Site) -> Option<usize> {
    // Paths are relative to the folder of the emulator's build script.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("emu").join(&site.file);
    let source = fs::read_to_string(path).unwrap();
    let line = source.lines().nth(site.line as usize - 1).unwrap();
    UNDETECTED.iter().position(|known| {
        known.sample.is_none_or(|only| only == sample)
            && Path::new(&site.file).file_name().is_some_and(|name| name == known.file)
            && line.contains(known.text)
    })
}
