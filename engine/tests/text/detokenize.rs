use std::str::FromStr;

use proptest::prelude::*;
use serde_json::Value;
use tidemill_engine::{ids::TokenId, text::TextModel};
use tokenizers::Tokenizer;

use crate::folder::{byte_fallback_decoder, demo, metaspace_decoder, sentencepiece, with_tokenizer};

fn ids(numbers: &[u32]) -> Vec<TokenId> {
    numbers.iter().copied().map(TokenId).collect()
}

/// Streams the ids and checks after each that the text so far is a prefix of the decoded sequence, short by at most one
/// incomplete character. Returns all of the text.
fn stream(model: &TextModel, ids: &[TokenId], include_special: bool) -> String {
    let mut detokenizer = model.detokenizer(include_special);
    let mut text = String::new();
    for (i, &id) in ids.iter().enumerate() {
        text += &detokenizer.push(id);
        let whole = model.decode(&ids[..=i], include_special).unwrap();
        let rest = whole.strip_prefix(text.as_str()).expect("the stream departs from the whole");
        assert!(rest.chars().all(|c| c == '\u{FFFD}') && rest.chars().count() <= 3, "held back {rest:?}");
    }
    text += &detokenizer.finish();
    assert_eq!(detokenizer.finish(), "", "finish is idempotent");
    assert_eq!(text, model.decode(ids, include_special).unwrap());
    text
}

fn demo_reference() -> Tokenizer {
    Tokenizer::from_str(include_str!("../../assets/demo/tokenizer.json")).unwrap()
}

fn reference(tokenizer: &Value) -> Tokenizer {
    let mut tokenizer = Tokenizer::from_str(&tokenizer.to_string()).unwrap();
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).unwrap();
    tokenizer
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any ids, those of single bytes (0 to 255) often, so that characters are split and invalid.
    #[test]
    fn deltas_make_the_decoded_text(
        numbers in prop::collection::vec(prop_oneof![0u32..256, 0u32..256, 0u32..2048], 0..40),
        special: bool,
    ) {
        let text = stream(&DEMO.0, &ids(&numbers), special);
        prop_assert_eq!(text, DEMO.1.decode(&numbers, !special).unwrap());
    }

    #[test]
    fn real_text_comes_back(text in "(\\PC|[ 😀中é\n]){0,40}") {
        let tokens = DEMO.0.encode(&text, false).unwrap();
        prop_assert_eq!(&stream(&DEMO.0, &tokens, true), &text);
        prop_assert!(DEMO.0.min_tokens_for_bytes(text.len()) <= tokens.len());
    }

    #[test]
    fn sentencepiece_deltas_make_the_decoded_text(
        numbers in prop::collection::vec(0u32..300, 0..40),
        special: bool,
    ) {
        stream(&LLAMA.0, &ids(&numbers), special);
        let text = stream(&METASPACE.0, &ids(&numbers), special);
        prop_assert_eq!(text, METASPACE.1.decode(&numbers, !special).unwrap());
    }

    #[test]
    fn sentencepiece_text_comes_back(text in "[ a-z.😀中é\n]{0,30}") {
        let tokens = LLAMA.0.encode(&text, true).unwrap();
        let numbers: Vec<u32> = tokens.iter().map(|id| id.0).collect();
        prop_assert_eq!(&stream(&LLAMA.0, &tokens, false), &text);
        prop_assert_eq!(LLAMA.1.decode(&numbers, true).unwrap(), text.clone());
        prop_assert!(LLAMA.0.min_tokens_for_bytes(text.len()) <= tokens.len());
    }
}

type Pair = (TextModel, Tokenizer);

static DEMO: std::sync::LazyLock<Pair> = std::sync::LazyLock::new(|| (demo(), demo_reference()));
static LLAMA: std::sync::LazyLock<Pair> = std::sync::LazyLock::new(|| pair(&byte_fallback_decoder()));
static METASPACE: std::sync::LazyLock<Pair> = std::sync::LazyLock::new(|| pair(&metaspace_decoder()));

fn pair(decoder: &Value) -> Pair {
    let tokenizer = sentencepiece(decoder.clone());
    (with_tokenizer(&tokenizer).unwrap(), reference(&tokenizer))
}

#[test]
fn a_split_emoji_is_held_back_until_it_is_whole() {
    let model = demo();
    let tokens = model.encode("😀", false).unwrap();
    assert!(tokens.len() > 1, "the demo vocabulary has learnt this emoji; take another");
    let mut detokenizer = model.detokenizer(false);
    let deltas: Vec<String> = tokens.iter().map(|&id| detokenizer.push(id)).collect();
    assert_eq!(deltas.last().unwrap(), "😀");
    assert!(deltas[..deltas.len() - 1].iter().all(String::is_empty), "{deltas:?}");
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn an_invalid_byte_run_counts_replacement_characters_as_the_decoder_does() {
    let (model, reference) = &*LLAMA;
    let byte = |byte: u32| byte + 3;
    for run in [vec![0xE4, 0xB8], vec![0xFF, 0xFE], vec![0xF0, 0x9F, 0x98], vec![0x80]] {
        let numbers: Vec<u32> = run.into_iter().map(byte).collect();
        assert_eq!(stream(model, &ids(&numbers), false), reference.decode(&numbers, true).unwrap());
    }
    // The one known difference: valid characters of a run that goes wrong later are kept, for they have been sent.
    let mixed: Vec<u32> = [0xE4, 0xB8, 0xAD, 0xFF].into_iter().map(byte).collect();
    assert_eq!(stream(model, &ids(&mixed), false), "中\u{FFFD}");
}

#[test]
fn the_leading_space_is_stripped_once() {
    let (model, reference) = &*LLAMA;
    let hello = TokenId(reference.token_to_id("▁hello").unwrap());
    let mut detokenizer = model.detokenizer(false);
    // A special token in front neither shows nor counts.
    let text: Vec<String> = [TokenId(1), hello, hello].into_iter().map(|id| detokenizer.push(id)).collect();
    assert_eq!(text, ["", "hello", " hello"]);
}

#[test]
fn special_tokens_show_only_when_asked_for() {
    let model = demo();
    let tokens = model.encode("<|im_start|>user\nHi<|im_end|><tool_call>", false).unwrap();
    assert_eq!(stream(&model, &tokens, true), "<|im_start|>user\nHi<|im_end|><tool_call>");
    assert_eq!(stream(&model, &tokens, false), "user\nHi<tool_call>");
}

#[test]
fn tokens_without_a_decoder_are_words() {
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
    });
    let model = with_tokenizer(&tokenizer).unwrap();
    let tokens = model.encode("b  a zzz b", true).unwrap();
    assert_eq!(stream(&model, &tokens, true), "b a [UNK] b");
    assert_eq!(
        model.min_tokens_for_bytes(1 << 20),
        0,
        "white space costs nothing here, so there is no bound"
    );
}
