//! `/v1/models`.

use axum::response::Response;
use serde_json::{Value, json};

use crate::http::{ApiError, App, Call, json_response};

/// The model that is served.
pub async fn list(app: App, _: &mut Call) -> Result<Response, ApiError> {
    Ok(json_response(&json!({"object": "list", "data": [card(&app)?]})))
}

/// One model by its name.
pub async fn retrieve(app: App, call: &mut Call) -> Result<Response, ApiError> {
    let card = card(&app)?;
    let asked = call.path_param.as_deref().unwrap_or_default();
    if card["id"] != asked {
        let error = ApiError::not_found(format!(
            "model {asked:?} is not served here; this server has {}",
            card["id"]
        ));
        return Err(ApiError { code: Some("model_not_found"), ..error });
    }
    Ok(json_response(&card))
}

fn card(app: &App) -> Result<Value, ApiError> {
    let model = app.model()?;
    Ok(json!({
        "id": model.served_model_name,
        "object": "model",
        "created": model.created,
        "owned_by": "tidemill",
        "max_model_len": model.max_model_len,
    }))
}
