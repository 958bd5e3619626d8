//! Responses that are there already: looked at, listed, cancelled, deleted.

use axum::response::Response;
use serde_json::{Value, json};
use tidemill_engine::ids::RequestId;

use super::store::Key;
use crate::http::{ApiError, App, Call, json_response};

/// Items of a list where the client does not say how many.
const DEFAULT_LIMIT: usize = 20;
/// Most items of a list.
const MAX_LIMIT: usize = 100;

fn key(call: &Call) -> Key {
    Key { credential: call.credential.0.clone(), id: call.path_param.clone().unwrap_or_default() }
}

fn not_found(key: &Key) -> ApiError {
    let message = format!("there is no response {:?}: it was not stored, or not kept this long", key.id);
    ApiError::not_found(message)
}

/// A response as it stands.
pub async fn retrieve(app: App, call: &mut Call) -> Result<Response, ApiError> {
    if call.query("stream") == Some("true") {
        let message =
            "a stored response cannot be streamed; ask without `stream` until its status is not in_progress";
        return Err(ApiError::invalid("stream", message));
    }
    let key = key(call);
    let response = app.responses.response(&key).ok_or_else(|| not_found(&key))?;
    Ok(json_response(&*response))
}

/// Ends a response in the background; answers when its blocks are free.
pub async fn cancel(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let key = key(call);
    let response = app.responses.response(&key).ok_or_else(|| not_found(&key))?;
    if response["background"] != true {
        let message =
            "only a response with `background: true` can be cancelled; end others by closing the connection";
        return Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, message));
    }
    let (response, making) = app.responses.cancel(&key).ok_or_else(|| not_found(&key))?;
    if let Some(making) = making {
        let id = RequestId::new(key.id.strip_prefix("resp_").unwrap_or(&key.id));
        // Dropping what makes it ends the request too; the receipt says that it has ended.
        if let Err(error) = app.engine.abort(id).await {
            tracing::debug!(?error, "no receipt for a cancelled response");
        }
        drop(making);
    }
    Ok(json_response(&*response))
}

/// Forgets a response.
pub async fn delete(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let key = key(call);
    if !app.responses.remove(&key) {
        return Err(not_found(&key));
    }
    Ok(json_response(&json!({"id": key.id, "object": "response", "deleted": true})))
}

/// The items that a response was given, without those of the responses before it.
pub async fn input_items(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let key = key(call);
    let mut items = app.responses.own_items(&key).ok_or_else(|| not_found(&key))?;
    let limit = match call.query("limit").map(str::parse) {
        None => DEFAULT_LIMIT,
        Some(Ok(limit)) if (1..=MAX_LIMIT).contains(&limit) => limit,
        Some(_) => {
            return Err(ApiError::invalid("limit", format!("must be a number from 1 to {MAX_LIMIT}")));
        }
    };
    match call.query("order") {
        // The newest first, as in the original.
        None | Some("desc") => items.reverse(),
        Some("asc") => {}
        Some(_) => return Err(ApiError::invalid("order", "must be asc or desc")),
    }
    if let Some(after) = call.query("after") {
        let Some(at) = items.iter().position(|item| item["id"] == after) else {
            return Err(ApiError::invalid("after", "is the id of no item of this response"));
        };
        items.drain(..=at);
    }
    let has_more = items.len() > limit;
    items.truncate(limit);
    let id = |item: Option<&std::sync::Arc<Value>>| item.map(|item| item["id"].clone());
    Ok(json_response(&json!({
        "object": "list",
        "first_id": id(items.first()),
        "last_id": id(items.last()),
        "has_more": has_more,
        "data": items.iter().map(|item| &**item).collect::<Vec<&Value>>(),
    })))
}
