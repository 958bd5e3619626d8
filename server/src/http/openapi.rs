//! `/openapi.json`: made from the table of routes, so that it cannot forget one.

use axum::{http::Method, response::Response};
use schemars::{SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{
    ApiError, App, Call, Family, json_response,
    routes::{Access, Route, table},
};

/// The OpenAPI document.
pub async fn document(app: App, _: &mut Call) -> Result<Response, ApiError> {
    Ok(json_response(&describe(!app.keys.is_empty())))
}

/// All routes and what they take; `keyed` says whether the server wants keys.
pub fn describe(keyed: bool) -> Value {
    let settings = SchemaSettings::openapi3().with(|settings| settings.inline_subschemas = true);
    let mut schemas = settings.into_generator();
    let mut paths: Map<String, Value> = Map::new();
    for route in table() {
        let path = paths.entry(route.path.clone()).or_insert_with(|| json!({}));
        path[route.method.as_str().to_lowercase()] = operation(&route, &mut schemas, keyed);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Tidemill",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "An LLM inference engine: OpenAI, Anthropic and model-server styles over one engine.",
        },
        "paths": paths,
        "components": {"securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }},
    })
}

fn operation(route: &Route, schemas: &mut SchemaGenerator, keyed: bool) -> Value {
    let mut operation = json!({ "summary": route.summary, "responses": responses(route, keyed) });
    let parameters: Vec<Value> = route.path.split('/').filter_map(parameter).collect();
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if route.method == Method::POST && !route.request.is_empty() {
        let schema = merged(route.request.iter().map(|part| Value::from(part(schemas))));
        operation["requestBody"] =
            json!({ "required": true, "content": {"application/json": {"schema": schema}} });
    }
    if keyed && route.access == Access::Key {
        operation["security"] = json!([{"bearer": []}, {"apiKey": []}]);
    }
    operation
}

fn parameter(segment: &str) -> Option<Value> {
    let name = segment.strip_prefix('{')?.strip_suffix('}')?;
    Some(json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}))
}

/// Parts of one object as one schema.
fn merged(parts: impl Iterator<Item = Value>) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for part in parts {
        properties.extend(part["properties"].as_object().cloned().unwrap_or_default());
        required.extend(part["required"].as_array().cloned().unwrap_or_default());
    }
    let mut schema = json!({"type": "object", "properties": properties});
    if !required.is_empty() {
        schema["required"] = required.into();
    }
    schema
}

fn responses(route: &Route, keyed: bool) -> Value {
    let good: Map<String, Value> = route.answers.iter().map(|kind| ((*kind).to_owned(), json!({}))).collect();
    let mut responses = json!({ "200": {"description": "The answer.", "content": good} });
    let mut failures = vec![("503", "Loading, draining or stopped.")];
    if route.checks || !route.request.is_empty() {
        failures.push(("400", "The request is wrong; the message says what is accepted."));
    }
    if !route.request.is_empty() {
        failures.extend([
            ("409", "A live request has this id."),
            ("413", "The body is too large."),
            ("415", "The body is not JSON."),
            ("429", "Overloaded; `retry-after` says when to try again."),
            ("504", "The deadline passed."),
            ("499", "Somebody aborted it."),
        ]);
    }
    failures.push(("404", "There is no such thing."));
    if keyed && route.access == Access::Key {
        failures.push(("401", "No key, or a wrong one."));
    }
    for (status, description) in failures {
        let schema = error_schema(route.family);
        responses[status] =
            json!({"description": description, "content": {"application/json": {"schema": schema}}});
    }
    responses
}

fn error_schema(family: Family) -> Value {
    match family {
        Family::OpenAi => json!({"type": "object", "required": ["error"], "properties": {"error": {
            "type": "object", "required": ["message", "type"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
        }}}),
        Family::Anthropic => json!({"type": "object", "required": ["type", "error"], "properties": {
            "type": {"const": "error"},
            "error": {"type": "object", "required": ["type", "message"]},
        }}),
        // Probes say how things stand, and no more.
        Family::Plain => json!({"type": "object"}),
    }
}
