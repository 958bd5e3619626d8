//! Sizes in bytes as people write them.

use std::{fmt, str::FromStr};

/// A number of bytes: `1048576`, `1024KiB`, `1MiB`, `0.5 GiB`, `2GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub usize);

/// Suffixes and what they stand for; IEC and SI.
const UNITS: [(&str, f64); 9] = [
    ("B", 1.0),
    ("KIB", 1024.0),
    ("MIB", 1048576.0),
    ("GIB", 1073741824.0),
    ("TIB", 1099511627776.0),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (&text[..digits], text[digits..].trim().to_ascii_uppercase());
        let wrong = || "write bytes, or a number with KiB, MiB, GiB, KB, MB or GB, such as 4GiB".to_owned();
        if unit.is_empty() {
            return number.parse().map(Self).map_err(|_| wrong());
        }
        let factor = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?.1;
        let bytes = number.parse::<f64>().map_err(|_| wrong())? * factor;
        // 2^53: beyond it f64 has no exact integers, and no machine has the memory.
        if bytes < 9_007_199_254_740_992.0 { Ok(Self(bytes as usize)) } else { Err(wrong()) }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_systems_and_nonsense_is_refused() {
        let good =
            [("4096", 4096), ("1MiB", 1 << 20), ("0.5 gib", 1 << 29), ("2GB", 2_000_000_000), ("7b", 7)];
        for (text, bytes) in good {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "1.5", "1 parsec", "1e30", "99999999999999TiB", "NaN", "1.2.3MiB", "é"]
        {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }
}
