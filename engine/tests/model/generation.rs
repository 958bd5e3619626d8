use std::path::Path;

use tidemill_engine::{
    error::LoadError,
    ids::TokenId,
    model::{GenerationDefaults, ModelFiles, ModelSource, ModelSpec},
};

fn spec() -> ModelSpec {
    ModelSpec::load(&ModelFiles::open(&ModelSource::Builtin).unwrap()).unwrap()
}

fn read(json: &str) -> Result<GenerationDefaults, LoadError> {
    GenerationDefaults::from_json(Path::new("generation_config.json"), json.as_bytes(), &spec())
}

#[test]
fn end_tokens_of_both_files_count() {
    let files = ModelFiles::open(&ModelSource::Builtin).unwrap();
    let defaults = GenerationDefaults::load(&files, &spec()).unwrap();
    assert_eq!(defaults.eos, [TokenId(2042), TokenId(2040)]);
    assert_eq!(defaults.bos, Some(TokenId(2040)));
    assert_eq!((defaults.temperature, defaults.top_p, defaults.max_new_tokens), (Some(0.7), Some(0.9), None));
    assert_eq!(read(r#"{"eos_token_id": 7}"#).unwrap().eos, [TokenId(2042), TokenId(7)]);
}

#[test]
fn fields_hold_without_do_sample_and_an_explicit_false_is_greedy() {
    let fields = r#""temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0, "repetition_penalty": 1.05, "max_new_tokens": 256"#;
    let defaults = read(&format!("{{{fields}}}")).unwrap();
    assert_eq!((defaults.temperature, defaults.top_p, defaults.top_k), (Some(0.6), Some(0.9), Some(20)));
    assert_eq!(
        (defaults.min_p, defaults.repetition_penalty, defaults.max_new_tokens),
        (Some(0.0), Some(1.05), Some(256))
    );
    assert_eq!(read(&format!(r#"{{"do_sample": true, {fields}}}"#)).unwrap().temperature, Some(0.6));
    let greedy = read(&format!(r#"{{"do_sample": false, {fields}}}"#)).unwrap();
    assert_eq!((greedy.temperature, greedy.top_p, greedy.do_sample), (Some(0.0), Some(0.9), Some(false)));
}

#[test]
fn values_out_of_range_name_their_field() {
    for (field, value) in [
        ("temperature", "-0.1"),
        ("temperature", "\"hot\""),
        ("temperature", "1e999"),
        ("top_p", "0"),
        ("top_p", "1.5"),
        ("top_k", "-1"),
        ("top_k", "2.5"),
        ("min_p", "1.1"),
        ("repetition_penalty", "0"),
        ("max_new_tokens", "0"),
        ("do_sample", "\"no\""),
        ("eos_token_id", "2048"),
        ("eos_token_id", "[1, -1]"),
        ("bos_token_id", "true"),
    ] {
        let error = read(&format!("{{\"{field}\": {value}}}")).unwrap_err().to_string();
        let named = error.contains(&format!("`{field}`")) || error.contains("not valid JSON");
        assert!(named && error.contains("generation_config.json"), "{field} {value}: {error}");
    }
    assert!(read("[]").unwrap_err().to_string().contains("expected a JSON object"));
}
