//! The GGUF format, versions 2 and 3 (`docs/gguf.md` of ggml): metadata, then descriptions of tensors, then their bytes, aligned.
//!
//! The file is hostile input. Every count is compared with what is left of the file before anything is reserved for it, so no number in it makes
//! memory grow beyond a small multiple of its length.

use std::{collections::BTreeMap, ops::Range};

use bytes::Bytes;

/// How the file starts.
pub(in crate::model) const MAGIC: &[u8] = b"GGUF";

const DEFAULT_ALIGNMENT: u64 = 32;

/// Tensors have at most so many axes.
const MAX_AXES: u32 = 4;

/// A metadata value.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Integers(Vec<i64>),
    Bools(Vec<bool>),
}

/// A tensor's place.
#[derive(Debug, Clone)]
pub(super) struct Info {
    /// Slowest first: the reverse of the file's order.
    pub shape: Vec<usize>,
    /// GGML's number of the type.
    pub kind: u32,
    /// First byte in the file.
    pub start: usize,
}

/// A file's head.
#[derive(Debug, Default)]
pub(super) struct Head {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, Info>,
}

/// Reads the head.
///
/// # Errors
/// What is wrong, in words.
pub(super) fn read(file: &Bytes) -> Result<Head, String> {
    let mut r = Reader { bytes: file, at: 0 };
    if r.take(4)? != MAGIC {
        return Err("does not start with \"GGUF\"".into());
    }
    match r.u32()? {
        2 | 3 => {}
        1 => return Err("is of version 1 of GGUF; supported: 2 and 3; convert the model again".into()),
        v if v.swap_bytes() <= 3 => return Err("is big-endian, which is not supported".into()),
        v => return Err(format!("is of version {v} of GGUF; supported: 2 and 3")),
    }
    let (tensors, pairs) = (r.u64()?, r.u64()?);
    // A name's length, a type and a value; a name's length, axes, type and offset.
    r.enough("metadata values", pairs, 8 + 4 + 1)?;
    r.enough("tensors", tensors, 8 + 4 + 4 + 8)?;
    let mut head = Head::default();
    for _ in 0..pairs {
        let key = r.text()?;
        let kind = r.u32()?;
        let value = r.value(kind).map_err(|detail| format!("metadata {key:?} {detail}"))?;
        if head.metadata.insert(key.clone(), value).is_some() {
            return Err(format!("has metadata {key:?} twice"));
        }
    }
    let mut offsets = Vec::new();
    for _ in 0..tensors {
        let name = r.text()?;
        let (info, offset) = r.info().map_err(|detail| format!("tensor {name:?} {detail}"))?;
        offsets.push((name, info, offset));
    }
    let alignment = match head.metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
        Some(other) => return Err(format!("metadata \"general.alignment\" is {other:?}, no power of two")),
    };
    let data = (r.at as u64).next_multiple_of(alignment);
    for (name, mut info, offset) in offsets {
        let start = data.checked_add(offset).filter(|_| offset.is_multiple_of(alignment));
        info.start = start.and_then(|start| usize::try_from(start).ok()).ok_or_else(|| {
            format!("tensor {name:?} lies at {offset}, which is not aligned to {alignment}")
        })?;
        if head.tensors.insert(name.clone(), info).is_some() {
            return Err(format!("has tensor {name:?} twice"));
        }
    }
    Ok(head)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("is cut short at byte {}", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// Checks that `count` things of at least `each` bytes may follow.
    fn enough(&self, what: &str, count: u64, each: u64) -> Result<(), String> {
        let left = (self.bytes.len() - self.at) as u64;
        match count.checked_mul(each) {
            Some(bytes) if bytes <= left => Ok(()),
            _ => Err(format!("says that {count} {what} follow, but {left} bytes are left")),
        }
    }

    fn text(&mut self) -> Result<String, String> {
        let length = self.u64()?;
        self.enough("bytes of text", length, 1)?;
        let bytes = self.take(length as usize)?;
        String::from_utf8(bytes.to_vec())
            .map_err(|_| format!("holds text that is not UTF-8 before byte {}", self.at))
    }

    fn value(&mut self, kind: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>()?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 => return self.values(),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("has type {other}, which there is not")),
        })
    }

    fn values(&mut self) -> Result<Value, String> {
        let (kind, count) = (self.u32()?, self.u64()?);
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err("is a list of lists, which no model needs".into()),
            other => return Err(format!("is a list of type {other}, which there is not")),
        };
        self.enough("list items", count, size)?;
        let count = count as usize;
        let mut each = || self.value(kind);
        Ok(match kind {
            8 => {
                let texts = (0..count).map(|_| self.text());
                Value::Texts(texts.collect::<Result<_, _>>()?)
            }
            7 => {
                let bools = (0..count).map(|_| Ok(matches!(each()?, Value::Bool(true))));
                Value::Bools(bools.collect::<Result<_, String>>()?)
            }
            6 | 12 => {
                let floats =
                    (0..count).map(|_| Ok(if let Value::Float(x) = each()? { x as f32 } else { 0.0 }));
                Value::Floats(floats.collect::<Result<_, String>>()?)
            }
            _ => {
                let integers = (0..count).map(|_| match each()? {
                    Value::Unsigned(n) => i64::try_from(n).map_err(|_| format!("has the item {n}")),
                    Value::Signed(n) => Ok(n),
                    _ => Ok(0),
                });
                Value::Integers(integers.collect::<Result<_, _>>()?)
            }
        })
    }

    /// A tensor's description, and its offset from the first tensor.
    fn info(&mut self) -> Result<(Info, u64), String> {
        let axes = self.u32()?;
        if !(1..=MAX_AXES).contains(&axes) {
            return Err(format!("has {axes} axes; supported: 1 to {MAX_AXES}"));
        }
        let mut shape = Vec::with_capacity(axes as usize);
        for _ in 0..axes {
            let extent = self.u64()?;
            // No real extent comes near; products of four fit 128 bits.
            if extent == 0 || extent > 1 << 31 {
                return Err(format!("has an extent of {extent}"));
            }
            shape.push(extent as usize);
        }
        shape.reverse();
        Ok((Info { shape, kind: self.u32()?, start: 0 }, self.u64()?))
    }
}

/// Bytes `start..start + length` of a file of `size` bytes.
pub(super) fn extent(start: usize, length: u128, size: usize) -> Option<Range<usize>> {
    let end = usize::try_from(length).ok().and_then(|length| start.checked_add(length))?;
    (end <= size).then_some(start..end)
}
