//! `tidemill run`: one prompt, streamed to stdout.

use std::{
    io::{self, IsTerminal, Read, Write},
    time::{Duration, Instant},
};

use tidemill_engine::{
    Generation, RequestError,
    output::{Finish, Output},
    request::{GenerateRequest, Prompt},
    text::chat::{ChatMessage, ChatPrompt},
};

use crate::{
    config::{PromptSource, RunConfig},
    exit::{Exit, Failure},
    loading,
    serve::Signals,
    terminal::printable,
};

/// Completes the prompt.
///
/// # Errors
/// Each with its exit code; a reader that closes our stdout is none.
pub async fn run(config: RunConfig) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let text = match config.prompt {
        PromptSource::Text(text) => text,
        PromptSource::Stdin => tokio::select! {
            text = tokio::task::spawn_blocking(read_stdin) => text.map_err(Failure::runtime)??,
            name = signals.next() => return Err(interrupted(name)),
        },
    };
    let started = Instant::now();
    let engine = tokio::select! {
        engine = loading::load(config.engine) => engine?,
        name = signals.next() => return Err(interrupted(name)),
    };
    let loaded = started.elapsed();
    let handle = engine.handle();
    if !config.raw && !handle.info().has_chat_template {
        return Err(Failure::usage(
            "this model has no chat template; use --raw, or give it one with --chat-template",
        ));
    }
    let prompt = if config.raw { Prompt::Text(text) } else { Prompt::Chat(conversation(text)) };
    let request = GenerateRequest { sampling: config.sampling, ..GenerateRequest::new(prompt) };
    let mut generation = handle.submit(handle.validate(request).map_err(explain)?)?;
    let started = Instant::now();
    let ended = tokio::select! {
        ended = print(&mut generation) => ended,
        // Dropping the generation aborts it.
        name = signals.next() => {
            drop(writeln!(io::stdout()));
            return Err(interrupted(name));
        }
    };
    if matches!(&ended, Err(failure) if failure.exit == Exit::DeviceLost) {
        // To give a lost device its memory back may take for ever.
        std::mem::forget(engine);
        return ended.map(drop);
    }
    if let Some(finish) = ended?.filter(|_| config.verbose) {
        report(&finish, loaded, started.elapsed());
    }
    Ok(())
}

fn interrupted(name: &str) -> Failure {
    Failure::new(Exit::Interrupted, format_args!("interrupted by {name}"))
}

/// The engine names fields of the wire; here they are options.
fn explain(error: RequestError) -> Failure {
    let RequestError::Invalid(violations) = error else { return error.into() };
    let lines = violations.iter().map(|violation| match violation.field.strip_prefix("sampling.") {
        Some(name) => format!("--{}: {}", name.replace('_', "-"), violation.message),
        None => violation.message.clone(),
    });
    Failure::usage(lines.collect::<Vec<_>>().join("; "))
}

fn read_stdin() -> Result<String, Failure> {
    let mut text = String::new();
    match io::stdin().lock().read_to_string(&mut text) {
        Ok(_) => Ok(text),
        Err(error) => Err(Failure::usage(format_args!("the prompt cannot be read from stdin: {error}"))),
    }
}

fn conversation(text: String) -> ChatPrompt {
    let message = ChatMessage::new("user", text);
    ChatPrompt::new(vec![message])
}

/// Streams the text to stdout. `None` when its reader went away first.
async fn print(generation: &mut Generation) -> Result<Option<Finish>, Failure> {
    let mut stdout = io::stdout();
    let terminal = stdout.is_terminal();
    let mut finish = None;
    while let Some(output) = generation.next().await {
        let output: Output = output?;
        let text = if terminal { printable(&output.text) } else { output.text.as_str().into() };
        finish = output.finish;
        let end = if finish.is_some() { "\n" } else { "" };
        match write!(stdout, "{text}{end}").and_then(|()| stdout.flush()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(None),
            Err(error) => return Err(Failure::runtime(format_args!("stdout: {error}"))),
        }
    }
    Ok(finish)
}

fn report(finish: &Finish, loaded: Duration, took: Duration) {
    let usage = &finish.usage;
    let first = usage.time_to_first_token;
    let decode = took.saturating_sub(first).as_secs_f64();
    let rate = usage.completion_tokens.saturating_sub(1) as f64 / decode.max(1e-9);
    // Nobody to tell when stderr is closed.
    drop(writeln!(
        io::stderr(),
        "{:?}; prompt {} tokens, answer {} tokens; loaded in {:.2} s, first token after {:.1} ms, then {rate:.0} tokens/s",
        finish.reason,
        usage.prompt_tokens,
        usage.completion_tokens,
        loaded.as_secs_f64(),
        first.as_secs_f64() * 1e3,
    ));
}
