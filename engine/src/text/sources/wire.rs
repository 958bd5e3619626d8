//! The wire format of protocol buffers, as far as `tokenizer.model` needs it: fields of one message, in order, without copies.
//!
//! See the encoding chapter of the protocol buffers documentation. Everything is bounds-checked; nothing recurses.

/// The value of one field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    /// Integers, booleans and enums.
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    /// Strings, bytes and messages.
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    pub(super) fn bytes(self) -> Option<&'a [u8]> {
        if let Self::Bytes(bytes) = self { Some(bytes) } else { None }
    }

    pub(super) fn text(self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    pub(super) fn float(self) -> Option<f32> {
        if let Self::Fixed32(bits) = self { Some(f32::from_bits(bits)) } else { None }
    }

    pub(super) fn boolean(self) -> Option<bool> {
        if let Self::Varint(value) = self { Some(value != 0) } else { None }
    }

    /// Negative numbers travel as the 64 bits of their two's complement.
    pub(super) fn int(self) -> Option<i32> {
        if let Self::Varint(value) = self { i32::try_from(value.cast_signed()).ok() } else { None }
    }
}

/// The fields of one message. An item is `None` where the bytes are no message, and nothing follows it.
#[derive(Debug, Clone)]
pub(super) struct Message<'a> {
    rest: &'a [u8],
}

impl<'a> Message<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            let bits = u64::from(byte & 0x7F);
            // The tenth byte has room for one bit.
            if shift == 63 && bits > 1 {
                return None;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u32, Value<'a>)> {
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).ok().filter(|&number| number > 0)?;
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(u64::from_le_bytes(self.take(8)?.try_into().ok()?)),
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((number, value))
    }
}

impl<'a> Iterator for Message<'a> {
    type Item = Option<(u32, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.rest = &[];
        }
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_field_is_read() {
        let bytes =
            [0x08, 0x96, 0x01, 0x12, 2, b'h', b'i', 0x1D, 0, 0, 0x80, 0x3F, 0x21, 1, 0, 0, 0, 0, 0, 0, 0];
        let fields: Option<Vec<_>> = Message::new(&bytes).collect();
        let fields = fields.unwrap_or_default();
        assert_eq!(fields[0], (1, Value::Varint(150)));
        assert_eq!(fields[1].1.text(), Some("hi"));
        assert_eq!(fields[2].1.float(), Some(1.0));
        assert_eq!(fields[3], (4, Value::Fixed64(1)));
        let minus_one: Vec<u8> = [0x08].into_iter().chain([0xFF; 9]).chain([1]).collect();
        assert_eq!(Message::new(&minus_one).next().flatten().and_then(|(_, value)| value.int()), Some(-1));
    }

    #[test]
    fn what_is_cut_short_or_too_long_is_no_message() {
        for bytes in [
            &[0x08][..],
            &[0x12, 5, 1],
            &[0x0B],
            &[0x00, 1],
            &[0xFF; 11],
            &[0x12, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F],
        ] {
            assert!(Message::new(bytes).any(|field| field.is_none()), "{bytes:?}");
        }
    }
}
