//! Quantiles.

use std::time::Duration;

/// The `q`-quantile (0 to 1) of some durations, nearest rank; zero when there are none.
pub fn quantile(durations: &[Duration], q: f64) -> Duration {
    let mut sorted = durations.to_vec();
    sorted.sort_unstable();
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// The median of some figures; NaN when there are none.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rank() {
        let ms = |n| Duration::from_millis(n);
        let all: Vec<_> = (1..=10).map(ms).collect();
        assert_eq!([0.0, 0.5, 0.95, 1.0].map(|q| quantile(&all, q)), [ms(1), ms(5), ms(10), ms(10)]);
        assert_eq!(quantile(&[], 0.5), Duration::ZERO);
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0, 2.0, 3.0])), (2.0, 2.5));
    }
}
