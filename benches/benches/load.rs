//! How fast mapped weights are paged in, by one thread and by those that loading uses: a byte of each page is touched, no more.
//!
//!     cargo bench -p tidemill-benches --bench load [-- GIGABYTES]
//!
//! A file of that size (default 1) is written to the folder for temporary files and read through a new map each time. What was just written is in the
//! page cache, so this measures the *warm* case: page faults alone. Its GB/s are of mapped bytes, and no bandwidth of memory or disk. Emptying the cache takes root; for the cold case run
//! `sync; echo 3 > /proc/sys/vm/drop_caches` before `tidemill serve` and read its line "read the weights".

use std::{fs::File, hint::black_box, io::Write, time::Instant};

use tidemill_engine::model::{Checkpoint, prefetch::Prefetch};

const TENSOR_BYTES: usize = 64 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gigabytes = std::env::args().skip(1).find_map(|argument| argument.parse::<f64>().ok()).unwrap_or(1.0);
    let count = ((gigabytes * 1e9) as usize / TENSOR_BYTES).max(1);
    let path = std::env::temp_dir().join(format!("tidemill-bench-load-{}.safetensors", std::process::id()));
    let written = write(&path, count);
    let measured = written.and_then(|()| measure(&path));
    // Whether or not there was something to write.
    let _ = std::fs::remove_file(&path);
    measured
}

fn write(path: &std::path::Path, count: usize) -> Result<(), Box<dyn std::error::Error>> {
    let entry = |number: usize| {
        let (start, end) = (number * TENSOR_BYTES, (number + 1) * TENSOR_BYTES);
        let shape = [TENSOR_BYTES / 2];
        (
            format!("t{number}"),
            serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}),
        )
    };
    let header = serde_json::Value::Object((0..count).map(entry).collect()).to_string();
    let mut file = File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let data: Vec<u8> = (0..TENSOR_BYTES).map(|i| ((i * 31) >> 3) as u8).collect();
    (0..count).try_for_each(|_| file.write_all(&data))?;
    Ok(())
}

fn measure(path: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    let slices = |checkpoint: &Checkpoint| -> Result<Vec<_>, tidemill_engine::LoadError> {
        let names: Vec<String> = checkpoint.tensor_names().map(str::to_owned).collect();
        names.iter().map(|name| Ok(checkpoint.tensor(name, &[TENSOR_BYTES / 2])?.data)).collect()
    };
    for round in 1..=3 {
        let checkpoint = Checkpoint::open_path(path)?;
        let total = checkpoint.total_bytes();
        let all = slices(&checkpoint)?;
        let started = Instant::now();
        for slice in &all {
            slice.iter().step_by(4096).for_each(|byte| {
                black_box(*byte);
            });
        }
        let alone = started.elapsed().as_secs_f64();
        drop((all, checkpoint));
        let checkpoint = Checkpoint::open_path(path)?;
        let loaded = Prefetch::start(slices(&checkpoint)?, total).finish(|_, _| ());
        println!(
            "round {round}: {:.2} GB mapped; paged in by one thread at {:.2} GB/s, by prefetch at {:.2} GB/s ({:.3} s), page cache warm",
            total as f64 / 1e9,
            total as f64 / 1e9 / alone,
            loaded.rate(),
            loaded.time.as_secs_f64(),
        );
    }
    Ok(())
}
