//! Makes safetensors files, sound and unsound.

use serde_json::{Value, json};

/// A file from a header and data of this length, whether or not they agree. The data counts up from 0.
pub fn file(header: &Value, data_len: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..data_len).map(|i| i as u8));
    bytes
}

/// A header entry.
pub fn tensor(dtype: &str, shape: &[usize], start: usize, end: usize) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})
}

/// A sound file: name, type, shape and bytes per element of each tensor.
pub fn sound(tensors: &[(&str, &str, &[usize], usize)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, dtype, shape, size) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * size;
        header.insert((*name).to_owned(), tensor(dtype, shape, start, end));
    }
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    file(&header.into(), end)
}
