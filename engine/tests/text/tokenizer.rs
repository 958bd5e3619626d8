use serde_json::{Value, json};
use tidemill_engine::{
    error::{ErrorCode, LoadError, RequestError},
    ids::TokenId,
};

use crate::folder::{byte_fallback_decoder, demo, folder, load, sentencepiece, with_tokenizer};

#[test]
fn truncation_and_padding_of_the_file_are_off() {
    let model = with_tokenizer(&sentencepiece(byte_fallback_decoder())).unwrap();
    assert_eq!(model.encode("hello hello hello hello hello", false).unwrap().len(), 5);
    assert_eq!(model.encode("", false).unwrap(), []);
}

#[test]
fn the_post_processor_adds_the_start_token_once() {
    let model = with_tokenizer(&sentencepiece(byte_fallback_decoder())).unwrap();
    let with = model.encode("hello", true).unwrap();
    assert_eq!(with[0], TokenId(1));
    assert_eq!(with[1..], model.encode("hello", false).unwrap());
}

#[test]
fn ids_outside_of_the_vocabulary_are_refused_by_name() {
    let model = demo();
    let error = model.decode(&[TokenId(5), TokenId(2048)], true).unwrap_err();
    assert!(matches!(&error, RequestError::Invalid(list) if list[0].field == "token_ids"));
    assert!(error.to_string().contains("2048"));
    assert_eq!(model.vocab_size(), 2048);
    assert!(model.token_bytes(TokenId(u32::MAX)).is_empty());
}

fn load_error(change: impl FnOnce(&mut Value)) -> String {
    let mut tokenizer = sentencepiece(byte_fallback_decoder());
    change(&mut tokenizer);
    let error = with_tokenizer(&tokenizer).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    error
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let error = load_error(|t| t["model"]["vocab"]["toolarge"] = json!(400));
    assert!(error.contains("vocab_size is 400"), "{error}");
    let error = load_error(|t| t["added_tokens"][0]["id"] = json!(7));
    assert!(error.contains("<unk>") && error.contains("id 7"), "{error}");
    let error = load_error(|t| t["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([4000]));
    assert!(error.contains("4000"), "{error}");
}

#[test]
fn a_decoder_that_cannot_be_streamed_exactly_is_refused() {
    let ctc = json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true});
    let error = load_error(|t| t["decoder"] = ctc.clone());
    assert!(error.contains("CTC") && error.contains("ByteLevel"), "{error}");
    let error = load_error(|t| t["decoder"]["decoders"][3]["stop"] = json!(1));
    assert!(error.contains("Strip"), "{error}");
}

#[test]
fn a_missing_tokenizer_is_named() {
    let error = load(folder(&[]).path()).unwrap_err();
    assert!(matches!(&error, LoadError::Format { .. }));
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
}

#[test]
fn a_tokenizer_that_may_delete_text_has_no_bound() {
    let model = with_tokenizer(&sentencepiece(byte_fallback_decoder())).unwrap();
    assert_eq!(model.max_token_bytes(), Some("▁hello".len()));
    assert_eq!(model.min_tokens_for_bytes(0), 0);
    assert_eq!(model.min_tokens_for_bytes(17), 3);
    let unbounded = |change: fn(&mut Value)| {
        let mut tokenizer = sentencepiece(byte_fallback_decoder());
        change(&mut tokenizer);
        assert_eq!(with_tokenizer(&tokenizer).unwrap().min_tokens_for_bytes(1 << 30), 0);
    };
    unbounded(|t| t["normalizer"] = json!({"type": "NFC"}));
    unbounded(|t| t["normalizer"]["normalizers"][1]["content"] = json!(""));
    unbounded(|t| t["added_tokens"][1]["rstrip"] = json!(true));
    unbounded(|t| t["pre_tokenizer"] = json!({"type": "WhitespaceSplit"}));
    unbounded(|t| t["model"]["byte_fallback"] = json!(false));
}

/// Oniguruma gives up on a pattern that backtracks too long, and its binding panics.
#[test]
fn a_panic_in_the_tokenizer_ends_one_request() {
    let mut tokenizer = sentencepiece(byte_fallback_decoder());
    tokenizer["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "(?:a|aa|b)+c"},
        "behavior": "Isolated", "invert": false});
    let model = with_tokenizer(&tokenizer).unwrap();
    let error = model.encode(&"a".repeat(200), false).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Internal, "{error}");
    assert!(!model.encode("hello", false).unwrap().is_empty(), "the next request is served");
}
