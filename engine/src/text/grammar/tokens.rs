//! The model's tokens as llguidance sees them.

use std::sync::Arc;

use toktrie::{INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

use crate::{
    ids::TokenId,
    text::{TextModel, guard::caught, vocab::TokenKind},
};

/// A token of more bytes is never allowed: a path of the trie has room for 1,024.
const MAX_TOKEN_BYTES: usize = 1000;

/// Texts that show whether encoding is exact: what comes out has the bytes that went in. Tokenizers that put a space in front of a text are not.
const PROBES: [&str; 4] = ["{\"a\": [1, true], \"b\": \"x y\"}", " word", "word\n\n", "null"];

/// What grammars need to know of a model's vocabulary.
pub(super) struct Tokens {
    pub env: TokEnv,
    /// V.
    pub vocab: usize,
    /// Tokens that end a completion.
    pub eos: Arc<[TokenId]>,
    /// Encoding is exact, so what a grammar forces can be written in the tokens that the model would have chosen.
    pub is_exact: bool,
    /// Bits of the tokens that read at the start of a text as they do within it.
    pub at_start: Arc<[u32]>,
}

impl Tokens {
    /// Of a model whose completions end with these tokens.
    pub fn new(text: &TextModel, eos: &[TokenId]) -> Result<Self, String> {
        let vocab = text.vocab_size();
        let words: Vec<Vec<u8>> = (0..vocab as u32).map(|id| word(text, id, eos)).collect();
        let info = TokRxInfo::new(vocab as u32, INVALID_TOKEN);
        let ids: Vec<u32> = eos.iter().map(|id| id.0).filter(|&id| (id as usize) < vocab).collect();
        let trie = caught(|| {
            let trie = TokTrie::from(&info, &words);
            if ids.is_empty() { trie } else { trie.with_eos_tokens(&ids) }
        })?;
        let is_exact = PROBES.iter().all(|probe| encode(text, probe).is_some());
        let env = Arc::new(Env { text: text.clone(), trie, is_exact });
        let eos = ids.into_iter().map(TokenId).collect();
        Ok(Self { env, vocab, eos, is_exact, at_start: at_start(text) })
    }
}

/// The bytes of a token in the trie; none for one that is never allowed. Special tokens are marked by a byte that no text has.
fn word(text: &TextModel, id: u32, eos: &[TokenId]) -> Vec<u8> {
    const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    let bytes = text.table().bytes(id);
    let kind = text.table().kind(id);
    if kind == TokenKind::Absent || bytes.len() > MAX_TOKEN_BYTES || bytes.contains(&MARK) {
        Vec::new()
    } else if kind == TokenKind::Special || eos.contains(&TokenId(id)) {
        [&[MARK], bytes].concat()
    } else {
        bytes.to_vec()
    }
}

/// Bits of the tokens that lose nothing where a completion begins: decoders of the SentencePiece kind drop the first space.
fn at_start(text: &TextModel) -> Arc<[u32]> {
    let table = text.table();
    let stripped = |id: u32| {
        let bytes = table.bytes(id);
        let strips = table.strip_start.is_some_and(|(strip, count)| {
            count > 0 && bytes.starts_with(strip.encode_utf8(&mut [0; 4]).as_bytes())
        });
        strips || table.first_bytes(id) != bytes
    };
    let ids = 0..text.vocab_size() as u32;
    bits(text.vocab_size(), ids.filter(|&id| !stripped(id)))
}

/// One bit for each of these tokens.
pub(super) fn bits(vocab: usize, ids: impl Iterator<Item = u32>) -> Arc<[u32]> {
    let mut words = vec![0; vocab.div_ceil(32)];
    ids.for_each(|id| words[id as usize / 32] |= 1 << (id % 32));
    words.into()
}

/// A text's tokens, if their bytes are the text's.
fn encode(text: &TextModel, piece: &str) -> Option<Vec<u32>> {
    let ids = text.encode(piece, false).ok()?;
    let is_special = |id: &TokenId| text.table().kind(id.0) == TokenKind::Special;
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| text.token_bytes(id)).copied().collect();
    let is_exact = bytes == piece.as_bytes() && !ids.iter().any(is_special);
    is_exact.then(|| ids.into_iter().map(|id| id.0).collect())
}

struct Env {
    text: TextModel,
    trie: TokTrie,
    is_exact: bool,
}

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    /// The tokens in which the model's tokenizer writes this; the longest that fit, one after the other, where it cannot.
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.trie.tokenize_with_greedy_fallback(bytes, |piece| {
            encode(&self.text, piece).unwrap_or_else(|| self.trie.greedy_tokenize(piece.as_bytes()))
        })
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.is_exact
    }
}
