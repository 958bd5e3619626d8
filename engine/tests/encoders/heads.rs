//! Modules behind the pooling, with weights in folders of their own.

use std::{collections::BTreeMap, fs, path::Path};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill_engine::{
    ErrorCode,
    ids::TokenId,
    request::{EmbedRequest, Prompt, ScoreInput, ScoreRequest},
};

use crate::rig::{copy, difference, fixture, goldens, result, start};

/// The folder of a fixture with these modules behind its pooling.
fn with(modules: &[&str]) -> TempDir {
    let dir = copy(&fixture("qwen3_embed"));
    let text = fs::read_to_string(dir.path().join("modules.json")).unwrap();
    let mut list: Vec<Value> = serde_json::from_str(&text).unwrap();
    list.truncate(2);
    for (at, kind) in modules.iter().enumerate() {
        let path = format!("{}_{kind}", at + 2);
        list.push(json!({"path": path, "type": format!("sentence_transformers.models.{kind}")}));
    }
    fs::write(dir.path().join("modules.json"), Value::from(list).to_string()).unwrap();
    dir
}

fn write(folder: &Path, config: &Value, tensors: &[(&str, Vec<usize>, Vec<f32>)]) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, values)| values.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views: BTreeMap<&str, TensorView<'_>> = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (*name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()))
        .collect();
    fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Twice every second value, with a bias of 1.
fn write_dense(folder: &Path) {
    let weight = (0..32 * 64).map(|i| if i % 64 == 2 * (i / 64) { 2.0 } else { 0.0 }).collect();
    let config = json!({
        "in_features": 64, "out_features": 32, "bias": true, "activation_function": "torch.nn.modules.linear.Identity",
    });
    write(
        folder,
        &config,
        &[("linear.weight", vec![32, 64], weight), ("linear.bias", vec![32], vec![1.0; 32])],
    );
}

#[test]
fn a_dense_module_and_what_follows_it_are_computed() {
    let golden = &goldens("qwen3_embed")[1];
    let plain = with(&[]);
    let states = result(&start(plain.path(), 128).unwrap().handle(), golden);
    let dir = with(&["Dense", "Normalize"]);
    write_dense(&dir.path().join("2_Dense"));
    let engine = start(dir.path(), 128).unwrap();
    assert_eq!(engine.handle().info().embedding.dimensions, 32);
    let dense: Vec<f32> = states.chunks_exact(2).map(|pair| 2.0 * pair[0] + 1.0).collect();
    let norm = dense.iter().map(|x| x * x).sum::<f32>().sqrt();
    let expected: Vec<f32> = dense.iter().map(|x| x / norm).collect();
    assert!(difference(&result(&engine.handle(), golden), &expected) < 1e-6);
    let cut = EmbedRequest {
        dimensions: Some(5),
        normalize: Some(false),
        ..EmbedRequest::new(Prompt::TokenIds(golden.ids.clone()))
    };
    let handle = engine.handle();
    let cut = handle.submit_embed(handle.validate_embed(cut).unwrap()).unwrap().wait_blocking().unwrap();
    assert!(difference(&cut.values, &dense[..5]) < 1e-5);
}

#[test]
fn modules_that_do_not_fit_are_errors_that_name_file_and_field() {
    let refused = |change: fn(&Path)| {
        let dir = with(&["Dense"]);
        write_dense(&dir.path().join("2_Dense"));
        change(&dir.path().join("2_Dense"));
        start(dir.path(), 128).map(drop).unwrap_err().to_string()
    };
    let gone = refused(|folder| fs::remove_file(folder.join("model.safetensors")).unwrap());
    assert!(gone.contains("2_Dense/model.safetensors") && gone.contains("missing"), "{gone}");
    let wide = refused(|folder| {
        let config = json!({"in_features": 65, "out_features": 32});
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
    });
    assert!(wide.contains("in_features") && wide.contains("64"), "{wide}");
    let narrow = refused(|folder| {
        let config = json!({"in_features": 64, "out_features": 31});
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
    });
    assert!(narrow.contains("linear.weight") && narrow.contains("[31, 64]"), "{narrow}");
    let cut = refused(|folder| {
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        fs::write(folder.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    });
    assert!(cut.contains("2_Dense/model.safetensors"), "{cut}");
}

#[test]
fn a_head_that_gives_no_numbers_ends_its_request_in_an_error() {
    let dir = with(&["Dense"]);
    write_dense(&dir.path().join("2_Dense"));
    let config = json!({"in_features": 64, "out_features": 1, "activation_function": "torch.nn.Identity"});
    let tensors = [("linear.weight", vec![1, 64], vec![f32::MAX; 64]), ("linear.bias", vec![1], vec![0.0])];
    write(&dir.path().join("2_Dense"), &config, &tensors);
    let engine = start(dir.path(), 128).unwrap();
    let handle = engine.handle();
    let request = EmbedRequest::new(Prompt::TokenIds(goldens("qwen3_embed")[0].ids.clone()));
    let error =
        handle.submit_embed(handle.validate_embed(request).unwrap()).unwrap().wait_blocking().unwrap_err();
    assert_eq!(error.code(), ErrorCode::Internal, "{error}");
}

#[test]
fn prompts_limits_and_cutting_are_the_folders() {
    let dir = copy(&fixture("qwen3_embed"));
    let prompts = json!({"prompts": {"query": "ask: ", "document": ""}, "default_prompt_name": "query"});
    fs::write(dir.path().join("config_sentence_transformers.json"), prompts.to_string()).unwrap();
    fs::write(
        dir.path().join("sentence_bert_config.json"),
        r#"{"max_seq_length": 20, "do_lower_case": true}"#,
    )
    .unwrap();
    let engine = start(dir.path(), 128).unwrap();
    let handle = engine.handle();
    let prompt = |text: &str, name: Option<&str>, cut: Option<i32>| {
        let request = EmbedRequest {
            prompt_name: name.map(Into::into),
            truncate_prompt_tokens: cut,
            ..EmbedRequest::new(Prompt::Text(text.into()))
        };
        handle.validate_embed(request).map(|valid| valid.prompt().to_vec())
    };
    // The tokenizer is the built-in model's, whose ids this model may lack: what counts is which text was encoded.
    let encoded = |text: &str| handle.text().encode(text, true).unwrap();
    assert_eq!(prompt("The SEA", None, None).unwrap(), encoded("ask: the sea"));
    assert_eq!(prompt("The SEA", Some("query"), None).unwrap(), encoded("ask: the sea"));
    for name in ["document", ""] {
        assert_eq!(prompt("The SEA", Some(name), None).unwrap(), encoded("the sea"));
    }
    let unknown = prompt("x", Some("passage"), None).unwrap_err().to_string();
    assert!(unknown.contains("document, query"), "{unknown}");
    let long = "tide ".repeat(40);
    let error = prompt(&long, None, None).unwrap_err().to_string();
    assert!(error.contains("20") && error.contains("truncate_prompt_tokens"), "{error}");
    assert_eq!(prompt(&long, Some(""), Some(-1)).unwrap(), encoded(&long)[..20]);
    assert_eq!(prompt(&long, Some(""), Some(7)).unwrap(), encoded(&long)[..7]);
    for cut in [0, -2, 21] {
        let error = prompt(&long, None, Some(cut)).unwrap_err().to_string();
        assert!(error.contains("truncate_prompt_tokens"), "{cut}: {error}");
    }
    let named = EmbedRequest {
        prompt_name: Some("query".into()),
        ..EmbedRequest::new(Prompt::TokenIds(vec![TokenId(5)]))
    };
    assert_eq!(handle.validate_embed(named).unwrap_err().code(), ErrorCode::InvalidArgument);
}

#[test]
fn a_question_is_written_as_the_rerankers_were_trained() {
    let engine = start(&fixture("qwen3_rerank"), 512).unwrap();
    let handle = engine.handle();
    let request = |query: &str, document: &str, instruction: Option<&str>| ScoreRequest {
        instruction: instruction.map(Into::into),
        ..ScoreRequest::new(ScoreInput::Pair { query: query.into(), document: document.into() })
    };
    let text = |request| {
        let valid = handle.validate_score(request).unwrap();
        handle.text().decode(valid.prompt(), true).unwrap()
    };
    let expected = |instruction: &str, document: &str| {
        format!(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. Note \
             that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n<Query>: why\n\
             <Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
    };
    assert_eq!(text(request("why", "because", Some("Say."))), expected("Say.", "because"));
    let default = "Given a web search query, retrieve relevant passages that answer the query";
    assert_eq!(text(request("why", "because", None)), expected(default, "because"));
    // What is cut is the document, not the frame.
    let long = "because ".repeat(200);
    let cut = ScoreRequest { truncate_prompt_tokens: Some(-1), ..request("why", &long, Some("Say.")) };
    let valid = handle.validate_score(cut).unwrap();
    let cut = handle.text().decode(valid.prompt(), true).unwrap();
    assert_eq!(valid.prompt().len(), 256);
    assert!(cut.contains("because because") && cut.ends_with("</think>\n\n"), "{cut}");
    let error = handle.validate_score(request("why", &long, None)).unwrap_err().to_string();
    assert!(error.contains("at most 256"), "{error}");
    for (request, field) in [
        (request("", "because", None), "query"),
        (request("why", "", None), "document"),
        (request("why", "because", Some(&"i".repeat(5000))), "instruction"),
    ] {
        let error = handle.validate_score(request).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}
