//! config.json and generation_config.json.

use serde_json::Value;
use tidemill_engine::model::{GenerationDefaults, ModelSpec};

use crate::rig::{CAP, Rig, flips, good, nested, truncations};

const CONFIG: &str = "config.json";

/// What may stand where a number, a name or anything else is expected; as text, for JSON has no NaN.
const VALUES: [&str; 19] = [
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775807",
    "4294967296",
    "-1",
    "-9223372036854775808",
    "0",
    "1e308",
    "1e309",
    "-1e-308",
    "0.5",
    "NaN",
    "Infinity",
    "null",
    "true",
    "\"x\"",
    "[]",
    "{}",
];

#[test]
fn every_field_takes_any_value_and_is_refused_by_name_or_read() {
    let rig = Rig::new(&[good()]);
    let whole: Value = serde_json::from_slice(&rig.read(CONFIG)).unwrap();
    let fields = whole.as_object().unwrap();
    let mut refused = 0;
    for field in fields.keys() {
        for value in VALUES {
            let mut config = whole.clone();
            config[field] = "@".into();
            rig.write(CONFIG, config.to_string().replace("\"@\"", value).as_bytes());
            let what = (field, value);
            if let Err(error) = rig.model(CAP, &what) {
                // The field, or the tensor that the field asks for and the file does not have.
                let named = error.contains(CONFIG) || error.contains("tensor \"");
                assert!(named, "{what:?}: {error}");
                refused += 1;
            }
        }
    }
    assert!(refused > fields.len() * 3, "{refused} of {}", fields.len() * VALUES.len());
}

#[test]
fn deep_broken_and_doubled_configs_are_refused() {
    let rig = Rig::new(&[good()]);
    let whole = rig.read(CONFIG);
    let text = String::from_utf8(whole.clone()).unwrap();
    for (what, config) in [
        ("deep", nested(1_000_000)),
        ("deep field", format!("{{\"rope_scaling\": {}}}", nested(1_000_000))),
        ("deep objects", "{\"a\":".repeat(100_000)),
        ("a list", "[]".to_owned()),
        ("nothing", String::new()),
        ("a number", "1".to_owned()),
        ("NUL", "\0".repeat(1000)),
        ("too large", " ".repeat((8 << 20) + 1)),
    ] {
        rig.write(CONFIG, config.as_bytes());
        let error = rig.model(CAP, &what).expect_err(what);
        assert!(error.contains(CONFIG), "{what}: {error}");
    }
    // The last of two counts, as in Python.
    let doubled = text.trim_end().trim_end_matches('}').to_owned() + ", \"hidden_size\": 1}";
    rig.write(CONFIG, doubled.as_bytes());
    rig.model(CAP, &"hidden_size twice").unwrap_err();
    rig.write(CONFIG, &whole);
    let refused =
        rig.refused(CONFIG, truncations(text.trim_end().as_bytes(), 200), |what| rig.model(CAP, &what));
    assert_eq!(refused, 200);
    rig.refused(CONFIG, flips(&whole, 0..whole.len(), 600), |what| rig.model(CAP, &what));
}

#[test]
fn sampling_defaults_are_refused_by_field() {
    let rig = Rig::new(&[good()]);
    let spec = ModelSpec::load(&rig.files().unwrap()).unwrap();
    for field in [
        "eos_token_id",
        "bos_token_id",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "max_new_tokens",
        "do_sample",
    ] {
        for value in VALUES {
            rig.write("generation_config.json", format!("{{\"{field}\": {value}}}").as_bytes());
            if let Err(error) = GenerationDefaults::load(&rig.files().unwrap(), &spec) {
                let error = error.to_string();
                assert!(error.contains("generation_config.json"), "{field} {value}: {error}");
                assert!(error.contains(field) || error.contains("JSON"), "{field} {value}: {error}");
            }
        }
    }
}
