//! `/v1/responses`: answers that are kept, gone on from, and made in the background.

mod draft;
mod fields;
mod input;
mod store;
mod stored;

use std::{panic::AssertUnwindSafe, sync::Arc};

use axum::response::Response;
use futures_util::{FutureExt, stream};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tidemill_engine::{
    request::{GenerateRequest, Prompt},
    text::chat::ChatPrompt,
};
use tokio_util::sync::CancellationToken;

use self::{
    draft::{Draft, Events, Style},
    input::{Conversation, Origin},
    store::{Context, Key, State},
};
use crate::{
    client::CallError,
    clock::since_1970,
    http::{
        ApiError, App, Call,
        answer::{Answer, asking},
        fields::{SamplingFields, part},
        json_response, sse,
    },
};

pub use fields::ResponseFields;
pub use store::Store;
pub use stored::{cancel, delete, input_items, retrieve};

/// What this route calls otherwise than the engine and chats do.
const NAMES: [(&str, &str); 8] = [
    ("prompt.chat", "input"),
    ("max_tokens", "max_output_tokens"),
    ("messages", "input"),
    ("response_format", "text.format"),
    ("logprobs", "top_logprobs"),
    ("thinking", "thinking_token_budget"),
    (".function.name", ".name"),
    (".function.parameters", ".parameters"),
];

/// Answers an input.
pub async fn create(app: App, call: &mut Call) -> Result<Response, ApiError> {
    respond(app, call).await.map_err(|error| error.renamed(&NAMES))
}

async fn respond(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let body: Value = call.json().await?;
    let fields: ResponseFields = part(&body)?;
    let mut sampling: SamplingFields = part(&body)?;
    fields.refuse_unsupported()?;
    sampling.check_single("/v1/chat/completions")?;
    let card = app.model_named(fields.model.as_deref()).await?;
    let request_id = sampling.request_id.take();
    let mut request = GenerateRequest::new(Prompt::Text(String::new()));
    if let Some(most) = fields.max_output_tokens {
        sampling.max_completion_tokens = Some(most);
    }
    sampling.apply(&mut request)?;
    request.model = fields.model.clone();
    request.sampling.logprobs = fields.logprobs();
    if let Some(form) = fields.form()
        && request.structured.replace(form).is_some()
    {
        return Err(ApiError::invalid("text.format", "the answer can have one form only"));
    }
    call.stamp(&mut request, request_id)?;
    let id = format!("resp_{}", call.id);
    let context = context(&app, call, &fields)?;
    request.prompt = Prompt::Chat(prompt(&fields, &context)?);
    let given = fields.tools.as_deref().unwrap_or_default();
    let tools = fields::tools(given, fields.tool_choice.as_ref(), fields.parallel_tool_calls)?;
    let ask = asking::ask(&card, request, tools, fields.thinking_token_budget)?;
    let answer = Answer::start(&app.engine, ask).await?;
    let style = Style { logprobs: fields.logprobs(), thoughts: fields.thoughts() };
    let draft = Draft::new(id.clone(), echo(&body), card, style);
    let key = Key { credential: call.credential.0.clone(), id };
    if fields.background == Some(true) {
        return Ok(in_background(app, key, context, (answer, draft)));
    }
    let keep = (fields.store != Some(false)).then(|| Keep { app, key, context });
    if fields.stream == Some(true) {
        Ok(streamed(answer, draft, keep))
    } else {
        whole(answer, draft, keep).await
    }
}

/// The items that the answer answers.
fn context(app: &App, call: &Call, fields: &ResponseFields) -> Result<Context, ApiError> {
    let mut items = match &fields.previous_response_id {
        None => Vec::new(),
        Some(id) => previous(app, call, id)?,
    };
    let own = items.len();
    let input = input::items(fields.input.clone(), call.id.as_str())?;
    items.extend(input.into_iter().map(Arc::new));
    Ok(Context { items, own })
}

fn previous(app: &App, call: &Call, id: &str) -> Result<Vec<Arc<Value>>, ApiError> {
    let field = "previous_response_id";
    let key = Key { credential: call.credential.0.clone(), id: id.to_owned() };
    match app.responses.conversation(&key) {
        Some(Some(items)) => Ok(items),
        Some(None) => Err(ApiError::invalid(field, format!("{id:?} is still being made; wait for its end"))),
        None => {
            let message = format!("there is no response {id:?}: it was not stored, or not kept this long");
            Err(ApiError { code: Some("previous_response_not_found"), ..ApiError::invalid(field, message) })
        }
    }
}

fn prompt(fields: &ResponseFields, context: &Context) -> Result<ChatPrompt, ApiError> {
    let mut conversation = Conversation::new(fields.instructions.as_deref());
    let (before, own) = context.items.split_at(context.own);
    conversation.extend(before.iter().map(|item| &**item), Origin::Stored)?;
    conversation.extend(own.iter().map(|item| &**item), Origin::Input)?;
    let mut template_kwargs = Map::new();
    if let Some(effort) = fields.reasoning.as_ref().and_then(|reasoning| reasoning.effort.as_deref()) {
        template_kwargs.insert("reasoning_effort".to_owned(), effort.into());
        if effort == "none" {
            template_kwargs.insert("enable_thinking".to_owned(), false.into());
        }
    }
    Ok(ChatPrompt { template_kwargs, ..ChatPrompt::new(conversation.messages()) })
}

/// What was asked, as responses repeat it.
fn echo(body: &Value) -> Map<String, Value> {
    let defaults = json!({
        "background": false,
        "instructions": null,
        "max_output_tokens": null,
        "max_tool_calls": null,
        "metadata": {},
        "parallel_tool_calls": true,
        "previous_response_id": null,
        "prompt_cache_key": null,
        "reasoning": {"effort": null, "summary": null},
        "safety_identifier": null,
        "store": true,
        "temperature": null,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": null,
        "truncation": "disabled",
        "user": null,
    });
    let Value::Object(mut echo) = defaults else { unreachable!("an object was written") };
    for (name, value) in &mut echo {
        match (value, &body[name.as_str()]) {
            (_, Value::Null) => {}
            // Fields that were not given keep their defaults.
            (Value::Object(default), Value::Object(given)) => {
                default.extend(given.iter().map(|(name, value)| (name.clone(), value.clone())));
            }
            (value, given) => *value = given.clone(),
        }
    }
    echo.insert("created_at".to_owned(), since_1970().as_secs().into());
    echo.insert("service_tier".to_owned(), "default".into());
    echo
}

/// Where a response is kept when it is over.
struct Keep {
    app: App,
    key: Key,
    context: Context,
}

impl Keep {
    fn keep(self, draft: &Draft) {
        self.app.responses.insert(self.key, self.context, State::Done(Arc::new(draft.json())));
    }
}

/// What is new, as the draft takes it. Every answer ends with a step that says so, or with an error.
async fn next(answer: &mut Answer) -> Result<crate::http::answer::Step, CallError> {
    answer.next().await.unwrap_or_else(|| Err(CallError::internal("an answer ended without an end")))
}

async fn whole(mut answer: Answer, mut draft: Draft, keep: Option<Keep>) -> Result<Response, ApiError> {
    while !draft.is_over() {
        draft.step(next(&mut answer).await?, &mut Events::off());
    }
    let response = json_response(&draft.json());
    if let Some(keep) = keep {
        keep.keep(&draft);
    }
    Ok(response)
}

/// A response under way to a client.
struct Streaming {
    answer: Answer,
    draft: Draft,
    events: Events,
    keep: Option<Keep>,
}

fn streamed(answer: Answer, draft: Draft, keep: Option<Keep>) -> Response {
    let mut events = Events::on();
    // Clients see at once that they were taken.
    draft.begin(&mut events);
    let state = Streaming { answer, draft, events, keep };
    sse::response(stream::unfold((Some(state), true), |(state, first)| async move {
        let mut state = state?;
        if !first {
            match next(&mut state.answer).await {
                Ok(step) => state.draft.step(step, &mut state.events),
                Err(error) => state.draft.fail(error, &mut state.events),
            }
        }
        let written = state.events.take();
        if !state.draft.is_over() {
            return Some((written, (Some(state), false)));
        }
        // Before its last event is sent: who has read that can fetch the response.
        if let Some(keep) = state.keep.take() {
            keep.keep(&state.draft);
        }
        Some((written, (None, false)))
    }))
}

fn in_background(app: App, key: Key, context: Context, (answer, draft): (Answer, Draft)) -> Response {
    let response = json_response(&draft.json());
    let stopping = CancellationToken::new();
    let draft = Arc::new(Mutex::new(draft));
    let state = State::Running(draft.clone(), stopping.clone().drop_guard());
    app.responses.insert(key.clone(), context, state);
    tokio::spawn(async move {
        let ended = tokio::select! {
            // Nobody can ask for it any more: it was deleted, cancelled or pushed out.
            () = stopping.cancelled() => return,
            ended = AssertUnwindSafe(finish(answer, &draft)).catch_unwind() => ended,
        };
        if ended.is_err() {
            draft
                .lock()
                .fail(CallError::internal("a response in the background panicked"), &mut Events::off());
        }
        app.responses.finish(&key);
    });
    response
}

async fn finish(mut answer: Answer, draft: &Mutex<Draft>) {
    loop {
        let step = next(&mut answer).await;
        let mut draft = draft.lock();
        match step {
            Ok(step) => draft.step(step, &mut Events::off()),
            Err(error) => draft.fail(error, &mut Events::off()),
        }
        if draft.is_over() {
            return;
        }
    }
}
