//! `tokenizer.model`: a SentencePiece `ModelProto` (sentencepiece_model.proto of the SentencePiece project).

use super::wire::{Message, Value};

/// Longest accepted piece in bytes; those in use have a few dozen. Splits are tried at every character, so it bounds the work.
pub(super) const MAX_PIECE_BYTES: usize = 1024;

/// How texts become pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PieceModel {
    /// The most likely segmentation.
    Unigram,
    /// The best pair first.
    Bpe,
}

/// What a piece is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PieceType {
    /// Part of the text.
    Normal,
    /// Stands for what has no piece.
    Unknown,
    /// Stands for no text.
    Control,
    /// Always a token of its own where it stands in a text.
    UserDefined,
    /// In the vocabulary, never given.
    Unused,
    /// One byte of what has no piece.
    Byte,
}

/// One entry of the vocabulary; its place is its id.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Piece {
    /// Text, with "▁" for spaces.
    pub text: String,
    /// Logarithm of its probability, or its rank negated.
    pub score: f32,
    /// What it is for.
    pub kind: PieceType,
}

/// What is done to a text before it is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NormalizerSpec {
    /// Replacements: a double-array trie, and texts.
    pub charsmap: Vec<u8>,
    /// A space goes before the text.
    pub add_dummy_prefix: bool,
    /// Spaces at both ends go, and runs of them become one.
    pub remove_extra_whitespaces: bool,
    /// Spaces become "▁".
    pub escape_whitespaces: bool,
}

/// A whole model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SentencePieces {
    pub model: PieceModel,
    pub pieces: Vec<Piece>,
    pub normalizer: NormalizerSpec,
    /// Characters without a piece become those of their bytes.
    pub byte_fallback: bool,
    /// Id of what stands for anything else.
    pub unk_id: usize,
    /// Ids of the marks of beginning and end.
    pub bos_id: Option<usize>,
    pub eos_id: Option<usize>,
}

/// Whether the bytes may be such a model: its first field is a piece.
pub(super) fn looks_like(bytes: &[u8]) -> bool {
    matches!(Message::new(bytes).next(), Some(Some((1..=3, Value::Bytes(_)))))
}

impl SentencePieces {
    /// Reads the bytes of a file. The error says what is wrong.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Self {
            model: PieceModel::Unigram,
            pieces: Vec::new(),
            normalizer: NormalizerSpec {
                charsmap: Vec::new(),
                add_dummy_prefix: true,
                remove_extra_whitespaces: true,
                escape_whitespaces: true,
            },
            byte_fallback: false,
            unk_id: 0,
            bos_id: Some(1),
            eos_id: Some(2),
        };
        for field in Message::new(bytes) {
            let (number, value) = field.ok_or("not a SentencePiece model, or cut short")?;
            match number {
                1 => {
                    let id = model.pieces.len();
                    let piece =
                        value.bytes().and_then(piece).ok_or_else(|| format!("piece {id} cannot be read"))?;
                    model.pieces.push(piece);
                }
                2 => model.trainer(message(value, "trainer_spec")?)?,
                3 => model.normalizer.read(message(value, "normalizer_spec")?)?,
                _ => {}
            }
        }
        model.check()?;
        Ok(model)
    }

    fn trainer(&mut self, message: Message<'_>) -> Result<(), String> {
        for field in message {
            let (number, value) = field.ok_or("trainer_spec cannot be read")?;
            let wrong = || format!("trainer_spec: field {number} has a wrong type");
            let boolean = || value.boolean().ok_or_else(wrong);
            let id = || value.int().map(|id| usize::try_from(id).ok()).ok_or_else(wrong);
            match number {
                3 => {
                    self.model = match value.int() {
                        Some(1) => PieceModel::Unigram,
                        Some(2) => PieceModel::Bpe,
                        other => {
                            let kind = match other {
                                Some(3) => "words",
                                Some(4) => "characters",
                                _ => "an unknown kind",
                            };
                            return Err(format!(
                                "trainer_spec.model_type: a model of {kind} is not supported; unigram and BPE are"
                            ));
                        }
                    }
                }
                24 if boolean()? => {
                    return Err("trainer_spec.treat_whitespace_as_suffix is not supported".to_owned());
                }
                35 => self.byte_fallback = boolean()?,
                40 => self.unk_id = id()?.ok_or("trainer_spec.unk_id is negative")?,
                41 => self.bos_id = id()?,
                42 => self.eos_id = id()?,
                _ => {}
            }
        }
        Ok(())
    }

    /// # Errors
    /// What no tokenizer can be made of.
    pub(super) fn check(&self) -> Result<(), String> {
        if let Some(id) = self.pieces.iter().position(|piece| piece.text.is_empty()) {
            return Err(format!("piece {id} is empty"));
        }
        if let Some((id, piece)) = self.pieces.iter().enumerate().find(|(_, piece)| !piece.score.is_finite())
        {
            return Err(format!("piece {id} ({:?}) has the score {}", shown(&piece.text), piece.score));
        }
        if let Some(id) = self.pieces.iter().position(|piece| piece.text.len() > MAX_PIECE_BYTES) {
            return Err(format!("piece {id} is longer than {MAX_PIECE_BYTES} bytes"));
        }
        if self.pieces.get(self.unk_id).is_none_or(|piece| piece.kind != PieceType::Unknown) {
            return Err(format!("trainer_spec.unk_id is {}, which is no piece for the unknown", self.unk_id));
        }
        Ok(())
    }

    /// The piece with this id, where it is a mark.
    pub(super) fn control(&self, id: Option<usize>) -> Option<&str> {
        let piece = self.pieces.get(id?).filter(|piece| piece.kind == PieceType::Control)?;
        Some(&piece.text)
    }
}

impl NormalizerSpec {
    fn read(&mut self, message: Message<'_>) -> Result<(), String> {
        for field in message {
            let (number, value) = field.ok_or("normalizer_spec cannot be read")?;
            let wrong = || format!("normalizer_spec: field {number} has a wrong type");
            match number {
                2 => self.charsmap = value.bytes().ok_or_else(wrong)?.to_vec(),
                3 => self.add_dummy_prefix = value.boolean().ok_or_else(wrong)?,
                4 => self.remove_extra_whitespaces = value.boolean().ok_or_else(wrong)?,
                5 => self.escape_whitespaces = value.boolean().ok_or_else(wrong)?,
                _ => {}
            }
        }
        Ok(())
    }
}

fn message<'a>(value: Value<'a>, name: &str) -> Result<Message<'a>, String> {
    value.bytes().map(Message::new).ok_or_else(|| format!("{name} is no message"))
}

fn piece(bytes: &[u8]) -> Option<Piece> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: PieceType::Normal };
    for field in Message::new(bytes) {
        match field? {
            (1, value) => piece.text = value.text()?.to_owned(),
            (2, value) => piece.score = value.float()?,
            (3, value) => {
                piece.kind = match value.int()? {
                    1 => PieceType::Normal,
                    2 => PieceType::Unknown,
                    3 => PieceType::Control,
                    4 => PieceType::UserDefined,
                    5 => PieceType::Unused,
                    6 => PieceType::Byte,
                    _ => return None,
                }
            }
            _ => {}
        }
    }
    Some(piece)
}

/// The beginning of a text that may be long, for messages.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}
