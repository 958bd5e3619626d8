//! Compiling: on a thread of its own with a large stack, within limits of size and time.

use std::{
    fmt,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use llguidance::{Matcher, ParserFactory};
use parking_lot::{Condvar, Mutex};

use super::{cache::Refusal, matcher::Grammar, source, tokens::Tokens};
use crate::{
    request::limits,
    structured::Structured,
    text::guard::{NoResult, within},
};

/// Bytes of an error's text that a client is told.
const MAX_ERROR_BYTES: usize = 400;

/// Compiles grammars for one vocabulary.
pub(super) struct Compiler {
    shared: Arc<Shared>,
    gate: Arc<Gate>,
}

/// What every compilation reads.
struct Shared {
    factory: ParserFactory,
    tokens: Arc<Tokens>,
}

impl Compiler {
    pub fn new(tokens: Tokens) -> Result<Self, String> {
        let factory = ParserFactory::new_simple(&tokens.env);
        let mut factory = factory.map_err(|error| error.to_string())?;
        factory.quiet();
        let within = factory.limits_mut();
        // Of what a client can make us spend, time per token first: the engine's thread waits for it.
        within.step_lexer_fuel = 100_000;
        within.step_max_items = 50_000;
        within.initial_lexer_fuel = 1_000_000;
        within.max_lexer_states = 50_000;
        within.max_grammar_size = 200_000;
        within.verbose_errors = false;
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let gate = Arc::new(Gate::new(cores.div_ceil(2)));
        Ok(Self { shared: Arc::new(Shared { factory, tokens: Arc::new(tokens) }), gate })
    }

    /// Compiles a form that [`source::check`] let through.
    pub fn compile(&self, structured: &Structured) -> Result<Grammar, Refusal> {
        let until = Instant::now() + limits::STRUCTURED_COMPILE_TIME;
        let Some(pass) = self.gate.enter(until) else {
            return Err(Refusal::Busy);
        };
        let (shared, structured) = (self.shared.clone(), structured.clone());
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let compiled = within(left, "grammar-compiler", move || {
            // One that takes too long keeps its place until it is done.
            let _pass = pass;
            shared.compile(&structured)
        });
        match compiled {
            Ok(compiled) => compiled.map_err(Refusal::Final),
            Err(NoResult::TooLong) => {
                let seconds = limits::STRUCTURED_COMPILE_TIME.as_secs();
                Err(Refusal::Final(format!("takes longer than {seconds} s to compile; make it simpler")))
            }
            Err(NoResult::Failed(error)) => {
                tracing::warn!(error, "the grammar compiler failed");
                Err(Refusal::Final("the compiler cannot take this; make it simpler".into()))
            }
        }
    }
}

impl Shared {
    fn compile(&self, structured: &Structured) -> Result<Grammar, String> {
        let grammar = source::grammar(structured)?;
        let parser = self.factory.create_parser(grammar).map_err(|error| told(&format!("{error:#}")))?;
        Grammar::new(Matcher::new(Ok(parser)), self.tokens.clone())
    }
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler").field("vocab", &self.shared.tokens.vocab).finish_non_exhaustive()
    }
}

/// What a client is told of llguidance's errors: not the states and traces that follow.
pub(super) fn told(error: &str) -> String {
    let said = error.split("\n<").next().unwrap_or(error).trim();
    if said.starts_with("panic") {
        tracing::warn!(error, "the grammar compiler panicked");
        return "the compiler cannot take this; make it simpler".into();
    }
    let mut end = said.len().min(MAX_ERROR_BYTES);
    while !said.is_char_boundary(end) {
        end -= 1;
    }
    said[..end].into()
}

/// Lets a number of compilations in at a time.
struct Gate {
    free: Mutex<usize>,
    left: Condvar,
}

impl Gate {
    fn new(places: usize) -> Self {
        Self { free: Mutex::new(places), left: Condvar::new() }
    }

    /// Waits for a place until then.
    fn enter(self: &Arc<Self>, until: Instant) -> Option<Pass> {
        let mut free = self.free.lock();
        while *free == 0 {
            if self.left.wait_until(&mut free, until).timed_out() && *free == 0 {
                return None;
            }
        }
        *free -= 1;
        Some(Pass(self.clone()))
    }
}

/// A place, given back when it is dropped.
struct Pass(Arc<Gate>);

impl Drop for Pass {
    fn drop(&mut self) {
        *self.0.free.lock() += 1;
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_lets_so_many_in_and_waits_no_longer_than_it_may() {
        let gate = Arc::new(Gate::new(1));
        let soon = || Instant::now() + Duration::from_millis(20);
        let pass = gate.enter(soon());
        assert!(pass.is_some() && gate.enter(soon()).is_none());
        drop(pass);
        assert!(gate.enter(soon()).is_some());
    }

    #[test]
    fn clients_are_told_what_was_wrong_and_nothing_else() {
        assert_eq!(told("no such rule\n<state>\nsecret"), "no such rule");
        assert!(told("panic: index out of bounds\n<backtrace>").contains("simpler"));
        assert_eq!(told(&"ä".repeat(1000)).len(), MAX_ERROR_BYTES);
    }
}
