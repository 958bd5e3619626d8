//! From a SentencePiece model to a tokenizer that gives the same pieces.

use std::collections::{HashMap, HashSet};

use serde_json::json;

use super::{
    added::{AddedToken, FolderTokens},
    definition::{Definition, Model, Vocab, template},
    normalize::{Normalizer, Prefix, SPACE},
    proto::{Piece, PieceModel, PieceType, SentencePieces, shown},
};
use crate::error::LoadError;

/// Classes of tokenizers whose texts begin with the start token unless the folder says otherwise.
const STARTS_TEXTS: [&str; 8] =
    ["llama", "codellama", "mistral", "mixtral", "gemma", "cohere", "phi3", "baichuan"];

/// How far the score of a piece that is never given lies below all others.
const NEVER: f64 = 200.0;

/// A tokenizer in the making.
pub(super) struct Converted {
    /// As `tokenizer.json`.
    pub json: Vec<u8>,
    /// Done to texts before the tokenizer sees them.
    pub normalizer: Normalizer,
}

/// Builds the tokenizer. `model_type` is that of config.json; `fail` makes an error that names the file.
pub(super) fn convert(
    model: &SentencePieces,
    folder: &FolderTokens,
    model_type: Option<&str>,
    fail: impl Fn(String) -> LoadError,
) -> Result<Converted, LoadError> {
    let pieces = arrange(model, folder, model_type);
    let ids = ids(&pieces).map_err(&fail)?;
    let base = pieces.iter().zip(0..).filter_map(|(piece, id)| added_token(piece, id)).collect();
    let added = folder.merge(base, |content| ids.get(content).copied())?;
    let id_of = |content: &str| {
        let added = || added.iter().find(|token| token.content == content).map(|token| token.id);
        ids.get(content).copied().or_else(added)
    };
    let role = |role: &str, id| {
        folder.role(role).or(model.control(id)).and_then(|token| Some((token, id_of(token)?)))
    };
    let (bos, eos) = (role("bos_token", model.bos_id), role("eos_token", model.eos_id));
    let fairseq = is_fairseq(folder, model_type);
    let add_bos = fairseq || folder.add_bos.unwrap_or_else(|| starts_texts(folder, model_type));
    let add_eos = fairseq || folder.add_eos.unwrap_or(false);
    if (add_bos && bos.is_none()) || (add_eos && eos.is_none()) {
        return Err(fail(
            "tokenizer_config.json asks for a start or end token, which the vocabulary does not have"
                .to_owned(),
        ));
    }
    let before: Vec<_> = bos.filter(|_| add_bos).into_iter().collect();
    let after: Vec<_> = eos.filter(|_| add_eos).into_iter().collect();
    let prefix = match (folder.add_prefix_space.unwrap_or(model.normalizer.add_dummy_prefix), folder.legacy) {
        (false, _) => Prefix::Never,
        (true, Some(true)) => Prefix::Always,
        (true, _) => Prefix::First,
    };
    let definition = Definition {
        version: "1.0",
        added_tokens: &added,
        normalizer: None,
        pre_tokenizer: None,
        post_processor: template(&before, &after),
        decoder: decoder(model, prefix),
        model: tokenizer_model(model, &pieces, &ids),
    };
    let json = serde_json::to_vec(&definition).map_err(|error| fail(error.to_string()))?;
    let normalizer = Normalizer::new(&model.normalizer, prefix, added).map_err(fail)?;
    Ok(Converted { json, normalizer })
}

/// Whether a name of a class or type is of this family.
fn is_family(folder: &FolderTokens, model_type: Option<&str>, families: &[&str]) -> bool {
    let name = folder.class.as_deref().or(model_type).unwrap_or_default().to_lowercase();
    families.iter().any(|family| name.starts_with(family))
}

fn starts_texts(folder: &FolderTokens, model_type: Option<&str>) -> bool {
    is_family(folder, model_type, &STARTS_TEXTS)
}

/// XLM-R numbers its pieces as fairseq did: four special tokens of its own come first, and the mask is last.
fn is_fairseq(folder: &FolderTokens, model_type: Option<&str>) -> bool {
    is_family(folder, model_type, &["xlmroberta", "xlm-roberta"])
}

fn arrange<'a>(
    model: &'a SentencePieces,
    folder: &FolderTokens,
    model_type: Option<&str>,
) -> std::borrow::Cow<'a, [Piece]> {
    if !is_fairseq(folder, model_type) {
        return (&model.pieces).into();
    }
    let special = |text: &str, kind| Piece { text: text.to_owned(), score: 0.0, kind };
    let mut pieces = vec![
        special("<s>", PieceType::Control),
        special("<pad>", PieceType::Control),
        special("</s>", PieceType::Control),
        special("<unk>", PieceType::Unknown),
    ];
    pieces.extend(model.pieces.iter().skip(3).cloned());
    pieces.push(special("<mask>", PieceType::Control));
    pieces.into()
}

fn ids(pieces: &[Piece]) -> Result<HashMap<&str, u32>, String> {
    let mut ids = HashMap::with_capacity(pieces.len());
    for (piece, id) in pieces.iter().zip(0_u32..) {
        if let Some(other) = ids.insert(piece.text.as_str(), id) {
            return Err(format!("pieces {other} and {id} are both {:?}", shown(&piece.text)));
        }
    }
    Ok(ids)
}

fn added_token(piece: &Piece, id: u32) -> Option<AddedToken> {
    let special = match piece.kind {
        PieceType::Control | PieceType::Unknown => true,
        PieceType::UserDefined => false,
        PieceType::Normal | PieceType::Unused | PieceType::Byte => return None,
    };
    Some(AddedToken::new(id, &piece.text, special))
}

fn decoder(model: &SentencePieces, prefix: Prefix) -> serde_json::Value {
    let mut steps = vec![json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "})];
    if model.byte_fallback {
        steps.push(json!({"type": "ByteFallback"}));
    }
    steps.push(json!({"type": "Fuse"}));
    // Where runs of spaces are removed, all that stand at the beginning are.
    let start = if model.normalizer.remove_extra_whitespaces { u32::MAX } else { 1 };
    if prefix != Prefix::Never {
        steps.push(json!({"type": "Strip", "content": " ", "start": start, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

fn tokenizer_model<'a>(
    model: &SentencePieces,
    pieces: &'a [Piece],
    ids: &HashMap<&'a str, u32>,
) -> Model<'a> {
    let unknown = pieces.iter().position(|piece| piece.kind == PieceType::Unknown);
    match model.model {
        PieceModel::Unigram => Model::Unigram {
            vocab: scores(pieces),
            unk_id: unknown.unwrap_or_default(),
            byte_fallback: model.byte_fallback,
        },
        PieceModel::Bpe => Model::Bpe {
            vocab: Vocab(pieces.iter().map(|piece| piece.text.as_str()).zip(0..).collect()),
            merges: merges(pieces, ids),
            unk_token: unknown.map(|id| pieces[id].text.as_str()),
            fuse_unk: true,
            byte_fallback: model.byte_fallback,
            ignore_merges: false,
        },
    }
}

fn is_text(piece: &Piece) -> bool {
    matches!(piece.kind, PieceType::Normal | PieceType::UserDefined)
}

/// The score of each piece. The library would take a byte's or an unused piece's name for text; so unlikely it never is.
fn scores(pieces: &[Piece]) -> Vec<(&str, f64)> {
    let text = pieces.iter().filter(|piece| is_text(piece)).map(|piece| f64::from(piece.score));
    let never = text.fold(0.0, f64::min) - NEVER;
    pieces
        .iter()
        .map(|piece| (piece.text.as_str(), if is_text(piece) { piece.score.into() } else { never }))
        .collect()
}

/// SentencePiece joins the two neighbours whose joint piece scores best; so every split of a piece is a merge of its rank.
fn merges<'a>(pieces: &'a [Piece], ids: &HashMap<&'a str, u32>) -> Vec<(&'a str, &'a str)> {
    let text: HashSet<&str> =
        pieces.iter().filter(|piece| is_text(piece)).map(|piece| piece.text.as_str()).collect();
    let mut merges = Vec::new();
    for piece in pieces.iter().filter(|piece| piece.kind == PieceType::Normal) {
        let splits = piece.text.char_indices().skip(1).map(|(at, _)| piece.text.split_at(at));
        let parts = splits.filter(|(left, right)| text.contains(left) && text.contains(right));
        let mut local: Vec<_> = parts.map(|(left, right)| (piece.score, left, right)).collect();
        local.sort_by_key(|(_, left, right)| (ids[left], ids[right]));
        merges.append(&mut local);
    }
    // The longer left part first, as one who reads from the left would have it.
    let order = |(score, left, right): &(f32, &str, &str)| {
        (-score, usize::MAX - left.len(), usize::MAX - right.len())
    };
    merges.sort_by(|a, b| {
        let ((x, i, j), (y, k, l)) = (order(a), order(b));
        x.total_cmp(&y).then(i.cmp(&k)).then(j.cmp(&l))
    });
    merges.into_iter().map(|(_, left, right)| (left, right)).collect()
}
