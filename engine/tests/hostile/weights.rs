//! safetensors files and their index.

use serde_json::{Value, json};

use crate::rig::{CAP, Rig, flips, good, nested, truncations};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn header_end(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

fn header(bytes: &[u8]) -> Value {
    serde_json::from_slice(&bytes[8..header_end(bytes)]).unwrap()
}

/// The file with another header before the same data.
fn with_header(bytes: &[u8], header: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, &bytes[header_end(bytes)..]].concat()
}

/// The file after a change of its header.
fn changed(bytes: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut header = header(bytes);
    change(&mut header);
    with_header(bytes, header.to_string().as_bytes())
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let rig = Rig::new(&[good()]);
    let whole = rig.read(WEIGHTS);
    let refused = rig.refused(WEIGHTS, truncations(&whole, 200), |what| {
        rig.model(CAP, &what).map_err(|error| {
            assert!(error.contains(WEIGHTS), "{error}");
            error
        })
    });
    assert_eq!(refused, 200);
}

#[test]
fn a_bit_turned_in_the_header_is_refused_or_harmless() {
    let rig = Rig::new(&[good()]);
    let whole = rig.read(WEIGHTS);
    let end = header_end(&whole);
    let lengths = rig.refused(WEIGHTS, flips(&whole, 0..8, 64), |what| rig.model(CAP, &what));
    assert_eq!(lengths, 64, "a wrong length never fits the file");
    let refused = rig.refused(WEIGHTS, flips(&whole, 8..end, 1500), |what| rig.model(CAP, &what));
    // Metadata and the white space at the end may change.
    assert!(refused > 1300, "{refused} of 1500");
    assert_eq!(
        rig.refused(WEIGHTS, flips(&whole, end..whole.len(), 20), |what| rig.model(CAP, &what)),
        0,
        "data is data"
    );
}

#[test]
fn headers_that_lie_are_refused_by_name() {
    let rig = Rig::new(&[good()]);
    let whole = rig.read(WEIGHTS);
    let names: Vec<String> =
        header(&whole).as_object().unwrap().keys().filter(|key| *key != "__metadata__").cloned().collect();
    let (first, second) = (&names[0], &names[1]);
    let huge = u64::MAX / 2;
    let changes: Vec<(&str, Vec<u8>)> = vec![
        ("overlap", changed(&whole, |h| h[second]["data_offsets"] = h[first]["data_offsets"].clone())),
        (
            "a hole",
            changed(&whole, |h| {
                for name in &names {
                    for end in 0..2 {
                        let offset = h[name]["data_offsets"][end].as_u64().unwrap();
                        h[name]["data_offsets"][end] = (offset + 8 * u64::from(offset > 0)).into();
                    }
                }
            }),
        ),
        ("past the end", changed(&whole, |h| h[first]["data_offsets"][1] = huge.into())),
        ("backwards", changed(&whole, |h| h[first]["data_offsets"] = json!([8, 0]))),
        ("negative", changed(&whole, |h| h[first]["data_offsets"] = json!([-8, 0]))),
        ("a huge extent", changed(&whole, |h| h[first]["shape"] = json!([huge]))),
        (
            "extents whose product overflows",
            changed(&whole, |h| h[first]["shape"] = json!([1_u64 << 33, 1_u64 << 33])),
        ),
        ("extents of zero and huge", changed(&whole, |h| h[first]["shape"] = json!([0, huge, huge]))),
        ("many extents", changed(&whole, |h| h[first]["shape"] = json!(vec![1; 10_000]))),
        (
            "another shape",
            changed(&whole, |h| {
                let count: u64 =
                    h[first]["shape"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap()).product();
                h[first]["shape"] = json!([count, 1, 1]);
            }),
        ),
        ("another type of the same size", changed(&whole, |h| h[first]["dtype"] = "I16".into())),
        ("another type of another size", changed(&whole, |h| h[first]["dtype"] = "F32".into())),
        ("an unknown type", changed(&whole, |h| h[first]["dtype"] = "F7".into())),
        (
            "a name that is missing",
            changed(&whole, |h| {
                let tensor = h.as_object_mut().unwrap().remove(first).unwrap();
                h["other"] = tensor;
            }),
        ),
        ("a list", with_header(&whole, b"[]")),
        ("nothing", with_header(&whole, b"")),
        ("no JSON", with_header(&whole, &[0xFF; 64])),
        ("deep", with_header(&whole, nested(100_000).as_bytes())),
        ("deep within", with_header(&whole, format!("{{\"a\": {}}}", nested(100_000)).as_bytes())),
        ("empty", Vec::new()),
    ];
    for (what, bytes) in changes {
        rig.write(WEIGHTS, &bytes);
        let error = rig.model(CAP, &what).expect_err(what);
        assert!(error.contains(WEIGHTS), "{what}: {error}");
    }
}

#[test]
fn a_tensor_that_stands_twice_is_refused_or_counts_once() {
    let rig = Rig::new(&[good()]);
    let whole = rig.read(WEIGHTS);
    let text = header(&whole).to_string();
    let twice = format!("{},{}", &text[..text.len() - 1], &text[1..]);
    rig.write(WEIGHTS, &with_header(&whole, twice.as_bytes()));
    // Either way it ends, and with what the file has.
    let _ = rig.model(CAP, &"every key twice");
}

#[test]
fn a_header_of_a_hundred_megabytes_costs_no_more_than_a_bound() {
    let rig = Rig::new(&[good()]);
    let whole = rig.read(WEIGHTS);
    let text = header(&whole).to_string();
    // White space up to the size that the format allows.
    let padded = format!("{text}{}", " ".repeat(100_000_000 - text.len()));
    rig.write(WEIGHTS, &with_header(&whole, padded.as_bytes()));
    let _ = rig.model(CAP, &"100 MB of white space");
    rig.write(WEIGHTS, &with_header(&whole, format!("{padded} ").as_bytes()));
    rig.model(CAP, &"a byte more").unwrap_err();
    // Entries of tensors without elements, as many as there is room for.
    let mut many = String::with_capacity(100_000_000);
    many.push('{');
    for number in 0.. {
        let entry = format!("\"{number:x}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}},");
        if many.len() + entry.len() > 100_000_000 {
            break;
        }
        many.push_str(&entry);
    }
    many.pop();
    many.push('}');
    let length = (many.len() as u64).to_le_bytes();
    rig.write(WEIGHTS, &[&length[..], many.as_bytes()].concat());
    drop(many);
    let error = rig.model(1536 << 20, &"100 MB of empty tensors").unwrap_err();
    assert!(error.contains(WEIGHTS), "{error}");
}

#[test]
fn an_index_leads_nowhere_but_to_shards_beside_it() {
    let sharded = good().with_file_name("llama_linear");
    let rig = Rig::new(&[sharded]);
    let whole: Value = serde_json::from_slice(&rig.read(INDEX)).unwrap();
    let tensor = whole["weight_map"].as_object().unwrap().keys().next().unwrap().clone();
    rig.write("outside.safetensors", b"");
    for shard in [
        "../model-00001-of-00003.safetensors",
        "/etc/passwd",
        "/etc/passwd.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        ".hidden.safetensors",
        "..",
        "",
        "C:x.safetensors",
        "model.bin",
        "missing.safetensors",
        "outside.safetensors",
        "config.json",
    ] {
        let mut index = whole.clone();
        index["weight_map"][&tensor] = shard.into();
        rig.write(INDEX, index.to_string().as_bytes());
        let error = rig.model(CAP, &shard).expect_err(shard);
        assert!(error.contains(&tensor) || error.contains("outside.safetensors"), "{shard:?}: {error}");
    }
    for (what, index) in [
        ("deep", nested(100_000)),
        ("deep map", format!("{{\"weight_map\": {}}}", nested(100_000))),
        ("a list", "{\"weight_map\": []}".to_owned()),
        ("numbers", "{\"weight_map\": {\"a\": 1}}".to_owned()),
        ("nothing", "{}".to_owned()),
        ("empty", "{\"weight_map\": {}}".to_owned()),
        (
            "the same key twice",
            format!(
                "{{\"weight_map\": {{\"{tensor}\": \"x.safetensors\", \"{tensor}\": \"y.safetensors\"}}}}"
            ),
        ),
    ] {
        rig.write(INDEX, index.as_bytes());
        let error = rig.model(CAP, &what).expect_err(what);
        assert!(error.contains(INDEX) || error.contains("safetensors"), "{what}: {error}");
    }
    let text = whole.to_string();
    rig.write(INDEX, text.as_bytes());
    let refused = rig.refused(INDEX, truncations(text.as_bytes(), 100), |what| rig.model(CAP, &what));
    assert_eq!(refused, 100);
}
