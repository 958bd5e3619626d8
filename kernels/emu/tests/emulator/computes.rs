//! Kernels without a fault: no complaint, and the results of a GPU.

use tidemill_kernels_emu::Schedule;

use crate::harness::{Call, call};

#[test]
fn a_correct_kernel_is_left_alone() {
    let reversed: Vec<i32> = call("reverse").input.into_iter().rev().collect();
    call("reverse").gives(&reversed);
}

#[test]
fn every_way_of_ordering_is_known_to_the_race_check() {
    let call = call("ordered_in_every_way");
    let at = |t: usize| call.input[t ^ 1] + (t ^ 1) as i32 + call.input[t ^ 32];
    let expected: Vec<i32> = (0..256).map(|t| at((t + 128) % 256) + 256).collect();
    for schedule in Schedule::many(8) {
        assert_eq!(call.run(schedule).as_deref(), Ok(expected.as_slice()), "{schedule:?}");
    }
}

#[test]
fn collectives_give_what_the_manual_says() {
    call("collectives").gives(&[0; 256]);
}

#[test]
fn atomics_of_all_blocks_add_up() {
    let mut call = call("atomics");
    (call.grid, call.outputs, call.n) = (64, 3, 99);
    for schedule in Schedule::all() {
        // The memory starts as all ones: -1.
        let [count, largest, wrapped] = call.run(schedule).unwrap()[..] else { panic!("three values") };
        assert_eq!((count, largest), (64 * 256 - 1, 64 * 256 - 1));
        assert_eq!(wrapped, (64 * 256 - 1) % 100);
    }
}

#[test]
fn bf16_rounds_to_nearest_even() {
    // Around every exponent: exact values, ties both ways, neighbours of ties; NaN, infinities, overflow, zeros, subnormals.
    let mut bits: Vec<u32> = Vec::new();
    for exponent in 0..=0xff_u32 {
        for mantissa in [
            0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1_7fff, 0x1_8000, 0x1_8001, 0x7f_7fff, 0x7f_8000,
            0x7f_ffff,
        ] {
            bits.extend([exponent << 23 | mantissa, 1 << 31 | exponent << 23 | mantissa]);
        }
    }
    let mut call = call("through_bf16");
    (call.n, call.outputs) = (bits.len() as i32, bits.len());
    call.input = bits.iter().map(|&b| b as i32).collect();
    let got = call.run(Schedule::default()).unwrap();
    for (&from, &to) in bits.iter().zip(&got) {
        let (from, to) = (f32::from_bits(from), f32::from_bits(to as u32));
        let want = nearest_bf16(from);
        assert!(
            to.to_bits() == want.to_bits() || (to.is_nan() && want.is_nan()),
            "{from:e}: {to:e}, not {want:e}"
        );
    }
}

/// The nearest value of eight significant bits, by search: of the two neighbours, the closer one, or the even one.
fn nearest_bf16(x: f32) -> f32 {
    if !x.is_finite() {
        return x;
    }
    let below = f32::from_bits(x.to_bits() & 0xffff_0000);
    let above = f32::from_bits((x.to_bits() & 0xffff_0000).wrapping_add(0x1_0000));
    // In f64 the distance to what would follow the largest finite value is finite too.
    let value =
        |v: f32, bits: u32| if v.is_finite() { f64::from(v) } else { f64::from(f32::from_bits(bits)) * 2.0 };
    let (low, high) = (f64::from(below), value(above, (x.to_bits() & 0x8000_0000) | 0x7f00_0000));
    let (to_low, to_high) = ((f64::from(x) - low).abs(), (high - f64::from(x)).abs());
    let low_is_even = below.to_bits() >> 16 & 1 == 0;
    if to_low < to_high || (to_low == to_high && low_is_even) { below } else { above }
}

#[test]
fn ldmatrix_and_mma_multiply() {
    // Small integers are exact in bf16, and so are their products in f32.
    let a = |i: usize, k: usize| ((i * 7 + k * 3) % 15) as f32 - 7.0;
    let b = |k: usize, j: usize| ((k * 5 + j * 11) % 13) as f32 - 6.0;
    let left = (0..256).map(|i| a(i / 16, i % 16));
    let right = (0..128).map(|i| b(i / 8, i % 8));
    let mut call = call("matrix_product");
    (call.block, call.outputs) = (32, 128);
    call.input = left.chain(right).map(|v| v.to_bits() as i32).collect();
    let product = |i: usize, j: usize| (0..16).map(|k| a(i, k) * b(k, j)).sum::<f32>();
    let expected: Vec<i32> = (0..128).map(|n| product(n / 8, n % 8).to_bits() as i32).collect();
    call.gives(&expected);
}

/// Phases and conflicts of one warp whose accesses are `stride` bytes apart.
fn conflicts(name: &'static str, stride: i32) -> (u64, u64) {
    let call = Call { block: 32, shared_bytes: 32 * 1024, n: stride, ..call(name) };
    let mut all = Schedule::all().map(|schedule| {
        let (_, stats) = call.run_with_stats(schedule).unwrap();
        (stats.ldmatrix_phases + stats.shared_phases, stats.ldmatrix_conflicts + stats.shared_conflicts)
    });
    all.sort_unstable();
    assert_eq!(all[0], all[3], "{name}: the same under every schedule");
    all[0]
}

#[test]
fn bank_conflicts_are_counted_exactly() {
    // Eight lanes a phase: neighbours side by side, then every 2nd, 4th, 8th 16-byte column, then padded rows.
    for name in ["strided_matrix_rows", "strided_stores16", "strided_loads16"] {
        assert_eq!(conflicts(name, 16), (4, 0), "{name}");
        assert_eq!(conflicts(name, 32), (4, 4), "{name}");
        assert_eq!(conflicts(name, 64), (4, 12), "{name}");
        assert_eq!(conflicts(name, 128), (4, 28), "{name}");
        assert_eq!(conflicts(name, 144), (4, 0), "{name}");
    }
    assert_eq!(conflicts("strided_loads16", 0), (4, 0), "one word for all");
    assert_eq!(conflicts("strided_stores4", 4), (1, 0));
    assert_eq!(conflicts("strided_stores4", 8), (1, 1));
    assert_eq!(conflicts("strided_stores4", 128), (1, 31));
    assert_eq!(conflicts("strided_stores4", 132), (1, 0));
    // Of 32 lanes, 21 load once and 10 of them twice: two instructions. 128 bytes apart, all in one bank each time.
    assert_eq!(conflicts("uneven_loads4", 128), (2, 20 + 9));
}
