//! No field of a configuration is silently ignored: whatever matters to the reference moves our logits, or is refused.
//!
//! `mutations.json` lists the changes; `scripts/make_goldens.py --check-mutations` makes the same ones to the reference.

use std::path::Path;

use serde_json::{Map, Value};
use tidemill_engine::model::{files::ModelSource, spec::ModelSpec};
use tidemill_kernels::cpu::{Compute, Isa};

use crate::{
    DENSE, EXPERTS, F32_TOLERANCE, TINY,
    reference::{Golden, Model, fixture, max_difference},
};

fn object(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// What a change makes of a value; `None` where it does not apply.
fn changed(change: &Map<String, Value>, value: &Value) -> Option<Value> {
    let (kind, operand) = change.iter().next().unwrap();
    let is_whole = value.is_u64();
    let number = |x: f64| if is_whole { Value::from(x as u64) } else { Value::from(x) };
    match kind.as_str() {
        "set" => (value != operand).then(|| operand.clone()),
        "not" => value.as_bool().map(|flag| Value::from(!flag)),
        "times" => Some(number(value.as_f64()? * operand.as_f64()?)),
        "plus" => Some(number(value.as_f64()? + operand.as_f64()?)),
        "flip" => {
            let other = |entry: &Value| match entry.as_str() {
                Some("sliding_attention") => Value::from("full_attention"),
                Some(_) => Value::from("sliding_attention"),
                None => Value::from(1 - entry.as_u64().unwrap()),
            };
            Some(value.as_array()?.iter().map(other).collect())
        }
        other => panic!("unknown change {other:?}"),
    }
}

/// The configuration with one field changed; `None` where it does not apply.
fn mutate(
    config: &Map<String, Value>,
    field: &str,
    change: &Map<String, Value>,
) -> Option<Map<String, Value>> {
    let mut config = config.clone();
    let mut is_changed = false;
    let mut apply = |holder: &mut Map<String, Value>, key: &str| {
        if let Some(value) =
            holder.get(key).filter(|value| !value.is_null()).and_then(|value| changed(change, value))
        {
            holder.insert(key.to_owned(), value);
            is_changed = true;
        }
    };
    let Some(key) = field.strip_prefix("rope.") else {
        apply(&mut config, field);
        return is_changed.then_some(config);
    };
    for name in ["rope_parameters", "rope_scaling"] {
        let Some(Value::Object(rope)) = config.get_mut(name) else { continue };
        if rope.values().any(Value::is_object) {
            rope.values_mut().filter_map(Value::as_object_mut).for_each(|nested| apply(nested, key));
        } else {
            apply(rope, key);
        }
    }
    is_changed.then_some(config)
}

/// By how much the logits of all prompts differ from the golden ones; `None`: refused.
fn difference(name: &str, config: Map<String, Value>) -> Option<f32> {
    let golden = Golden::load(name);
    let bytes = Value::Object(config).to_string();
    let spec = ModelSpec::from_json(Path::new("config.json"), bytes.as_bytes()).ok()?;
    let mut worst = 0.0_f32;
    for i in 0..golden.prompts() {
        let prompt = &golden.ids[&format!("input_ids.{i}")];
        let expected = &golden.floats[&format!("logits.{i}")];
        let source = ModelSource::Dir(fixture(name));
        let tokens = prompt.len() + golden.ids[&format!("greedy_ids.{i}")].len();
        let mut model =
            Model::with_spec(&source, spec.clone(), (Compute::F32, Isa::detect()), tokens).ok()?;
        let logits = model.run(0, prompt);
        let got = logits[logits.len() - expected.len() / model.vocab..].concat();
        worst = worst.max(max_difference(&got, expected));
    }
    Some(worst)
}

#[test]
fn every_field_that_matters_moves_the_output_or_is_refused() {
    let list = object(&fixture("mutations.json"));
    let mutations: Vec<(&str, &Map<String, Value>)> = list["mutations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| (m["field"].as_str().unwrap(), m["change"].as_object().unwrap()))
        .collect();
    let (mut tried, mut unnoticed) = (0, Vec::new());
    for name in TINY.into_iter().chain(DENSE.map(|(name, _)| name)).chain(EXPERTS) {
        let config = object(&fixture(name).join("config.json"));
        let same = difference(name, config.clone()).expect(name);
        assert!(same <= F32_TOLERANCE, "{name}: unchanged, logits differ by {same}");
        let neutral = list["neutral"].get(name).and_then(Value::as_array).cloned().unwrap_or_default();
        for (field, change) in &mutations {
            let Some(changed) = mutate(&config, field, change) else { continue };
            tried += 1;
            let moved = difference(name, changed).map(|difference| difference > F32_TOLERANCE);
            // What does not move the reference must not move us.
            let is_neutral = neutral.iter().any(|neutral| neutral == field);
            if moved == Some(is_neutral) {
                unnoticed.push(format!("{name}: {field} {change:?}"));
            }
        }
    }
    assert!(tried > 300, "only {tried} changes were tried");
    assert!(unnoticed.is_empty(), "{unnoticed:#?}");
}
