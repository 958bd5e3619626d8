//! Thoughts before an answer: free between their marks, cut off by a budget; the form of the answer begins behind them.

use std::sync::Arc;

use super::tokens::bits;
use crate::{
    constraint::{Advance, Allowed, Constraint},
    ids::TokenId,
    request::limits,
    structured::Thinking,
    text::TextModel,
};

/// Bytes of white space that may stand between a mark and the end of a prompt.
const MAX_SPACE: usize = 64;

/// Where a completion begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opening {
    /// Within thoughts: the prompt ends with the mark that begins them.
    Open,
    /// Behind them: the prompt ends with the mark that ends them.
    Closed,
    /// The completion may begin with thoughts.
    Unknown,
}

impl Opening {
    pub fn is_open(self) -> bool {
        self == Self::Open
    }
}

/// The marks of one model's thoughts.
#[derive(Debug)]
pub(super) struct Marks {
    text: TextModel,
    start: Vec<u8>,
    end: Vec<u8>,
    start_ids: Vec<TokenId>,
    end_ids: Vec<TokenId>,
    /// By the bytes of `end` that have come: tokens that neither end the completion nor reach beyond `end` with more than white space,
    /// so that an answer of a certain form can begin where `end` does end.
    within: Vec<Arc<[u32]>>,
}

/// What has come of a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// Its first bytes, so many.
    Part(usize),
    /// All of it; so many bytes of the token come behind.
    All { behind: usize },
}

impl Marks {
    pub fn new(thinking: &Thinking, text: &TextModel, eos: &[TokenId]) -> Result<Self, String> {
        let start_ids = ids("start", &thinking.start, text)?;
        let end_ids = ids("end", &thinking.end, text)?;
        let mut marks = Self {
            text: text.clone(),
            start: thinking.start.clone().into_bytes(),
            end: thinking.end.clone().into_bytes(),
            start_ids,
            end_ids,
            within: Vec::new(),
        };
        marks.within = (0..marks.end.len()).map(|came| marks.free(came, eos)).collect();
        Ok(marks)
    }

    /// Where a completion of this prompt begins.
    pub fn opening(&self, text: &TextModel, prompt: &[TokenId]) -> Opening {
        let enough = self.start.len().max(self.end.len()) + MAX_SPACE;
        let mut first = prompt.len();
        let mut bytes = 0;
        while first > 0 && bytes < enough {
            first -= 1;
            bytes += text.token_bytes(prompt[first]).len();
        }
        let tail: Vec<u8> = prompt[first..].iter().flat_map(|&id| text.token_bytes(id)).copied().collect();
        let tail = tail.trim_ascii_end();
        if tail.ends_with(self.start.trim_ascii_end()) {
            Opening::Open
        } else if tail.ends_with(self.end.trim_ascii_end()) {
            Opening::Closed
        } else {
            Opening::Unknown
        }
    }

    /// The tokens that may come when so many bytes of the end have come.
    fn free(&self, came: usize, eos: &[TokenId]) -> Arc<[u32]> {
        let vocab = self.text.vocab_size();
        let allowed = |id: &u32| {
            let token = self.text.token_bytes(TokenId(*id));
            let overshoots = match self.find(came, token) {
                Found::Part(_) => false,
                Found::All { behind } => !token[token.len() - behind..].trim_ascii().is_empty(),
            };
            !overshoots && !eos.contains(&TokenId(*id))
        };
        bits(vocab, (0..vocab as u32).filter(allowed))
    }

    /// Looks for the end in a token, when so many bytes of it have come.
    fn find(&self, came: usize, token: &[u8]) -> Found {
        let mut came = came;
        for (at, byte) in token.iter().enumerate() {
            // The longest beginning of the mark with which the text ends now.
            while self.end[came] != *byte && came > 0 {
                came = (0..came)
                    .rev()
                    .find(|&less| self.end[came - less..came] == self.end[..less])
                    .unwrap_or(0);
            }
            came += usize::from(self.end[came] == *byte);
            if came == self.end.len() {
                return Found::All { behind: token.len() - at - 1 };
            }
        }
        Found::Part(came)
    }

    fn only(&self, token: TokenId) -> Allowed {
        Allowed::Among(bits(self.text.vocab_size(), std::iter::once(token.0)))
    }
}

/// The tokens of a mark.
fn ids(which: &str, mark: &str, text: &TextModel) -> Result<Vec<TokenId>, String> {
    if mark.trim().is_empty() || mark.len() > limits::MAX_THINKING_MARK_BYTES {
        let most = limits::MAX_THINKING_MARK_BYTES;
        return Err(format!("its {which} has {} bytes; give a text of 1 to {most}", mark.len()));
    }
    let ids = text.encode(mark, false).map_err(|error| error.to_string())?;
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| text.token_bytes(id)).copied().collect();
    match bytes.trim_ascii() == mark.as_bytes().trim_ascii() {
        true => Ok(ids),
        false => Err(format!("its {which}, {mark:?}, cannot be written in this model's tokens")),
    }
}

/// How a completion may think.
#[derive(Debug, Clone, Copy)]
pub(super) struct HowToThink {
    /// Tokens of thought at most.
    pub budget: Option<u32>,
    /// Where it begins.
    pub opening: Opening,
    /// A mark is written without asking the model.
    pub jump_ahead: bool,
}

/// A completion that may think before it answers.
#[derive(Debug)]
pub(super) struct Thoughts {
    marks: Arc<Marks>,
    budget: Option<usize>,
    /// The form of the answer, in its first state until the answer begins.
    form: Option<Box<dyn Constraint>>,
    stage: Stage,
    jump_ahead: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// These bytes came, and may be the beginning of the start mark.
    Opening {
        came: Vec<u8>,
    },
    /// The start mark is being written; this token of it is next.
    Start {
        at: usize,
    },
    /// So many bytes of the end mark have come, and so many tokens of thought.
    Thinking {
        came: usize,
        tokens: usize,
    },
    /// The end mark is being written; this token of it is next.
    End {
        at: usize,
    },
    Answer,
}

impl Thoughts {
    pub fn new(marks: Arc<Marks>, how: HowToThink, form: Option<Box<dyn Constraint>>) -> Self {
        let stage = match how.opening {
            Opening::Open => Stage::Thinking { came: 0, tokens: 0 },
            Opening::Closed => Stage::Answer,
            Opening::Unknown => Stage::Opening { came: Vec::new() },
        };
        let budget = how.budget.map(|budget| budget as usize);
        let mut thoughts = Self { marks, budget, form, stage, jump_ahead: how.jump_ahead };
        thoughts.spend();
        thoughts
    }

    /// As a constraint; none where every token is free whatever comes.
    pub fn constraint(self) -> Option<Box<dyn Constraint>> {
        match (&self.form, &self.stage) {
            (_, Stage::Answer) => self.form,
            (None, _) if self.budget.is_none() => None,
            _ => Some(Box::new(self)),
        }
    }

    /// Begins to write the end mark once the budget is spent.
    fn spend(&mut self) {
        if let Stage::Thinking { tokens, .. } = self.stage
            && self.budget.is_some_and(|budget| tokens >= budget)
        {
            self.stage = Stage::End { at: 0 };
        }
    }

    /// What may come next.
    fn allowed(&self) -> Allowed {
        let free = |tokens| Allowed::Any(tokens);
        match (&self.stage, &self.form) {
            (Stage::Opening { .. }, Some(form)) => match form.first() {
                Allowed::Any(_) => free(1),
                Allowed::Among(mask) => {
                    let start = self.marks.start_ids[0].0;
                    let mut mask = mask.to_vec();
                    mask[start as usize / 32] |= 1 << (start % 32);
                    Allowed::Among(mask.into())
                }
            },
            // The mark takes a token at least.
            (Stage::Opening { .. }, None) => free(self.budget.unwrap_or(0).saturating_add(1)),
            (Stage::Start { at }, _) => self.marks.only(self.marks.start_ids[*at]),
            (Stage::Thinking { came, .. }, Some(_)) => Allowed::Among(self.marks.within[*came].clone()),
            (Stage::Thinking { tokens, .. }, None) => {
                free(self.budget.map_or(usize::MAX, |most| most - tokens))
            }
            (Stage::End { at }, _) => self.marks.only(self.marks.end_ids[*at]),
            (Stage::Answer, Some(form)) => form.first(),
            (Stage::Answer, None) => free(usize::MAX),
        }
    }

    /// Takes a token in that is not part of an answer; false when it is the first of one.
    fn take(&mut self, token: TokenId) -> bool {
        let bytes = self.marks.text.token_bytes(token);
        let thinking = Stage::Thinking { came: 0, tokens: 0 };
        self.stage = match &mut self.stage {
            Stage::Opening { came } => match &self.form {
                Some(form) => match self.marks.start_ids.as_slice() {
                    [only] if *only == token => thinking,
                    // Where the form allows what the mark begins with, it is the form's.
                    [first, _, ..] if *first == token && !allows(&form.first(), token) => {
                        Stage::Start { at: 1 }
                    }
                    _ => {
                        self.stage = Stage::Answer;
                        return false;
                    }
                },
                None => {
                    came.extend_from_slice(bytes);
                    let (text, start) = (came.trim_ascii_start(), self.marks.start.as_slice());
                    match (text.starts_with(start), start.starts_with(text)) {
                        (true, _) => thinking,
                        (false, true) => return true,
                        (false, false) => Stage::Answer,
                    }
                }
            },
            Stage::Start { at } if *at + 1 < self.marks.start_ids.len() => Stage::Start { at: *at + 1 },
            Stage::Start { .. } => thinking,
            Stage::Thinking { came, tokens } => match self.marks.find(*came, bytes) {
                Found::Part(came) => Stage::Thinking { came, tokens: *tokens + 1 },
                Found::All { .. } => Stage::Answer,
            },
            Stage::End { at } if *at + 1 < self.marks.end_ids.len() => Stage::End { at: *at + 1 },
            Stage::End { .. } => Stage::Answer,
            Stage::Answer => return self.form.is_none(),
        };
        self.spend();
        true
    }

    /// The token to which there is no alternative, if there is one.
    fn forced(&self) -> Option<TokenId> {
        match self.stage {
            Stage::Start { at } => Some(self.marks.start_ids[at]),
            Stage::End { at } => Some(self.marks.end_ids[at]),
            _ => None,
        }
    }
}

fn allows(allowed: &Allowed, token: TokenId) -> bool {
    allowed.mask().is_none_or(|mask| mask[token.0 as usize / 32] >> (token.0 % 32) & 1 == 1)
}

impl Constraint for Thoughts {
    fn first(&self) -> Allowed {
        self.allowed()
    }

    fn advance(&mut self, token: TokenId, room: usize) -> Result<Advance, String> {
        if !self.take(token) {
            // The answer goes on by itself.
            return match &mut self.form {
                Some(form) => form.advance(token, room),
                None => Ok(Advance { forced: Vec::new(), then: Some(Allowed::Any(usize::MAX)) }),
            };
        }
        let mut forced = Vec::new();
        while self.jump_ahead && forced.len() < room {
            let Some(next) = self.forced() else { break };
            self.take(next);
            forced.push(next);
        }
        Ok(Advance { forced, then: Some(self.allowed()) })
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Self {
            marks: self.marks.clone(),
            budget: self.budget,
            form: self.form.clone(),
            stage: self.stage.clone(),
            jump_ahead: self.jump_ahead,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::model::{
        files::{ModelFiles, ModelSource},
        spec::ModelSpec,
    };

    fn marks(start: &str, end: &str) -> Marks {
        let files = ModelFiles::open(&ModelSource::Builtin).unwrap();
        let text = TextModel::load(&files, &ModelSpec::load(&files).unwrap()).unwrap();
        let thinking = Thinking { start: start.into(), end: end.into(), budget: None };
        Marks::new(&thinking, &text, &[]).unwrap()
    }

    #[test]
    fn a_mark_is_found_however_it_is_cut() {
        for (end, text) in
            [("</think>", "a <</think>rest"), ("aab", "aaab"), ("abab", "aabaabab"), ("xx", "xx")]
        {
            let marks = marks("<think>", end);
            let at = text.find(end).unwrap() + end.len();
            for cut in 0..=text.len() {
                let (first, second) = text.as_bytes().split_at(cut);
                let found = match marks.find(0, first) {
                    Found::Part(came) => marks.find(came, second),
                    all => all,
                };
                let seen = if cut >= at { cut - at } else { text.len() - at };
                assert_eq!(found, Found::All { behind: seen }, "{end:?} in {text:?}, cut at {cut}");
            }
            assert_eq!(marks.find(0, &text.as_bytes()[..at - 1]), Found::Part(end.len() - 1));
        }
    }

    #[test]
    fn the_end_of_a_prompt_says_where_its_completion_begins() {
        let marks = marks("<tool_call>", "</tool_call>");
        let opening = |text: &str| marks.opening(&marks.text, &marks.text.encode(text, false).unwrap());
        assert_eq!(opening("Hello <tool_call>\n"), Opening::Open);
        assert_eq!(opening("<tool_call>"), Opening::Open);
        assert_eq!(opening("<tool_call>\n\n</tool_call>\n\n"), Opening::Closed);
        assert_eq!(opening("what does <tool_call> mean?"), Opening::Unknown);
        assert_eq!(opening(""), Opening::Unknown);
    }

    #[test]
    fn no_token_reaches_from_thoughts_into_an_answer() {
        let marks = marks("(", ",");
        // " ," and the like may come; what goes on behind the comma may not.
        for id in (0..marks.text.vocab_size() as u32).map(TokenId) {
            let token = marks.text.token_bytes(id);
            let behind = token.iter().position(|&byte| byte == b',').map_or(&[][..], |at| &token[at + 1..]);
            let allowed = marks.within[0][id.0 as usize / 32] >> (id.0 % 32) & 1 == 1;
            assert_eq!(allowed, behind.trim_ascii().is_empty(), "{:?}", String::from_utf8_lossy(token));
        }
    }
}
