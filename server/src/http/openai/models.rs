//! `/v1/models`.

use axum::response::Response;
use serde_json::{Value, json};
use tidemill_engine::AdapterInfo;

use crate::{
    client::ModelCard,
    http::{ApiError, App, Call, json_response},
};

/// The model that is served, and its adapters.
pub async fn list(app: App, _: &mut Call) -> Result<Response, ApiError> {
    Ok(json_response(&json!({"object": "list", "data": cards(&app).await?})))
}

/// One model by its name.
pub async fn retrieve(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let cards = cards(&app).await?;
    let asked = call.path_param.as_deref().unwrap_or_default();
    match cards.iter().find(|card| card["id"] == asked) {
        Some(card) => Ok(json_response(card)),
        None => {
            let error = ApiError::not_found(format!(
                "model {asked:?} is not served here; this server has {}",
                cards[0]["id"]
            ));
            Err(ApiError { code: Some("model_not_found"), ..error })
        }
    }
}

/// The model first, then its adapters by name.
async fn cards(app: &App) -> Result<Vec<Value>, ApiError> {
    let model = app.model()?;
    let adapters = app.engine.adapters().await?;
    let card = json!({
        "id": model.served_model_name,
        "object": "model",
        "created": model.created,
        "owned_by": "tidemill",
        "max_model_len": model.max_model_len,
    });
    Ok(std::iter::once(card).chain(adapters.iter().map(|adapter| adapter_card(&model, adapter))).collect())
}

fn adapter_card(model: &ModelCard, adapter: &AdapterInfo) -> Value {
    json!({
        "id": adapter.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tidemill",
        "root": adapter.path,
        "parent": model.served_model_name,
        "max_model_len": model.max_model_len,
    })
}
