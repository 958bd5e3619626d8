//! Log-probabilities in OpenAI's two shapes.

use serde::Serialize;
use serde_json::{Map, Value, json};
use tidemill_engine::{ids::TokenId, output::TokenLogprobs};

use crate::client::ModelCard;

/// One token and what is said about it (chat).
#[derive(Debug, Serialize)]
pub struct ChatLogprob {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
    top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, Serialize)]
struct TopLogprob {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

/// The number with as few digits as tell it from its neighbours: whichever way it is written into JSON, it looks the same.
fn shortest(logprob: f32) -> f64 {
    logprob.to_string().parse().unwrap_or(f64::from(logprob))
}

fn text(card: &ModelCard, id: TokenId) -> String {
    String::from_utf8_lossy(card.tokens.bytes(id)).into_owned()
}

/// Tokens as chat answers have them.
pub fn chat(card: &ModelCard, logprobs: &[TokenLogprobs], top: u32) -> Vec<ChatLogprob> {
    let one = |entry: &TokenLogprobs| ChatLogprob {
        token: text(card, entry.token),
        logprob: shortest(entry.logprob),
        bytes: card.tokens.bytes(entry.token).to_vec(),
        top_logprobs: entry
            .top
            .iter()
            .take(top as usize)
            .map(|&(id, logprob)| TopLogprob {
                token: text(card, id),
                logprob: shortest(logprob),
                bytes: card.tokens.bytes(id).to_vec(),
            })
            .collect(),
    };
    logprobs.iter().map(one).collect()
}

/// Tokens as completions have them: parallel lists that grow.
#[derive(Debug, Default, Serialize)]
pub struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f64>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

impl CompletionLogprobs {
    /// A token of which nothing is said: the prompt's first.
    pub fn push_bare(&mut self, card: &ModelCard, id: TokenId, offset: &mut usize) {
        self.push_token(text(card, id), None, None, offset);
    }

    /// A token with its `top` most likely alternatives; `offset` counts characters of the text.
    pub fn push(&mut self, card: &ModelCard, entry: &TokenLogprobs, top: u32, offset: &mut usize) {
        let mut best: Map<String, Value> = Map::new();
        for &(id, logprob) in entry.top.iter().take(top as usize) {
            best.insert(text(card, id), json!(shortest(logprob)));
        }
        // The token itself is always among them, as in the original.
        best.entry(text(card, entry.token)).or_insert_with(|| json!(shortest(entry.logprob)));
        self.push_token(text(card, entry.token), Some(shortest(entry.logprob)), Some(best), offset);
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Goes on with what is said of later tokens.
    pub fn append(&mut self, mut more: Self) {
        self.text_offset.append(&mut more.text_offset);
        self.token_logprobs.append(&mut more.token_logprobs);
        self.tokens.append(&mut more.tokens);
        self.top_logprobs.append(&mut more.top_logprobs);
    }

    fn push_token(
        &mut self,
        token: String,
        logprob: Option<f64>,
        top: Option<Map<String, Value>>,
        offset: &mut usize,
    ) {
        self.text_offset.push(*offset);
        *offset += token.chars().count();
        self.tokens.push(token);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
    }
}

/// vLLM's `prompt_logprobs`: one map per prompt token, null for the first.
pub fn prompt(card: &ModelCard, logprobs: &[TokenLogprobs]) -> Vec<Value> {
    let mut list = vec![Value::Null];
    for entry in logprobs {
        let mut map = Map::new();
        for (rank, &(id, logprob)) in (1..).zip(&entry.top) {
            map.insert(
                id.to_string(),
                json!({"logprob": shortest(logprob), "rank": rank, "decoded_token": text(card, id)}),
            );
        }
        map.entry(entry.token.to_string()).or_insert_with(|| {
            json!({"logprob": shortest(entry.logprob), "rank": entry.rank, "decoded_token": text(card, entry.token)})
        });
        list.push(Value::Object(map));
    }
    list
}
