//! The table of all routes: the router, the OpenAPI document and the test that tries every door are made from it.

use axum::{
    Router,
    http::Method,
    routing::{MethodFilter, MethodRouter},
};
use futures_util::future::BoxFuture;
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::{
    ApiError, App, Call, Family, anthropic, door, engine_routes, fields::SamplingFields, live, openai,
    openapi, ops, page, predict,
};

/// Serves one request.
pub type Handler = for<'a> fn(App, &'a mut Call) -> BoxFuture<'a, Result<axum::response::Response, ApiError>>;

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody: probes.
    Open,
    /// Holders of a key, where the server has keys.
    Key,
}

/// One route.
#[derive(Debug, Clone)]
pub struct Route {
    /// Its method.
    pub method: Method,
    /// Its path; `{name}` stands for one segment.
    pub path: String,
    /// Whose conventions its errors follow.
    pub family: Family,
    /// Who may use it.
    pub access: Access,
    /// What it does, in a few words.
    pub summary: &'static str,
    /// The JSON that it takes; several are parts of one object.
    pub request: Vec<fn(&mut SchemaGenerator) -> Schema>,
    /// Media types of its answers.
    pub answers: &'static [&'static str],
    /// Whether it answers 400 although it takes no body: for query parameters, or for the state of what it names.
    pub checks: bool,
    handler: Handler,
}

const RERANKS: &str = "Documents by how well they answer a query.";
const SCORES: &str = "How well texts answer queries.";
const JSON: &[&str] = &["application/json"];
const JSON_OR_EVENTS: &[&str] = &["application/json", "text/event-stream"];

impl Route {
    fn new(method: Method, path: &str, family: Family, summary: &'static str, handler: Handler) -> Self {
        let (path, request, answers) = (path.to_owned(), Vec::new(), JSON);
        let access = Access::Key;
        Self { method, path, family, access, summary, request, answers, checks: false, handler }
    }

    fn open(mut self) -> Self {
        self.access = Access::Open;
        self
    }

    fn checks(mut self) -> Self {
        self.checks = true;
        self
    }

    fn takes<T: JsonSchema>(mut self) -> Self {
        self.request.push(SchemaGenerator::subschema_for::<T>);
        self
    }

    fn answers(mut self, types: &'static [&'static str]) -> Self {
        self.answers = types;
        self
    }
}

/// Writes a handler into the table.
macro_rules! handler {
    ($function:path) => {
        |app, call| Box::pin($function(app, call))
    };
}

/// All routes.
pub fn table() -> Vec<Route> {
    use Family::{Anthropic, OpenAi, Plain};
    let get = |path, family, summary, handler| Route::new(Method::GET, path, family, summary, handler);
    let post = |path, family, summary, handler| Route::new(Method::POST, path, family, summary, handler);
    let mut routes = vec![
        post("/v1/chat/completions", OpenAi, "An answer to a conversation.", handler!(openai::chat::create))
            .takes::<openai::chat::ChatFields>()
            .takes::<SamplingFields>()
            .answers(JSON_OR_EVENTS),
        post("/v1/completions", OpenAi, "A text that goes on.", handler!(openai::completions::create))
            .takes::<openai::completions::CompletionFields>()
            .takes::<SamplingFields>()
            .answers(JSON_OR_EVENTS),
        post("/v1/embeddings", OpenAi, "Embeddings of texts.", handler!(openai::embeddings::create))
            .takes::<openai::embeddings::EmbeddingFields>(),
        post("/v1/rerank", OpenAi, RERANKS, handler!(openai::rerank::create))
            .takes::<openai::rerank::RerankFields>()
            .takes::<openai::score::ScoreOptions>(),
        post("/v1/score", OpenAi, SCORES, handler!(openai::score::create))
            .takes::<openai::score::ScoreFields>()
            .takes::<openai::score::ScoreOptions>(),
        post("/v1/messages", Anthropic, "An answer to a conversation.", handler!(anthropic::create))
            .takes::<SamplingFields>()
            .takes::<anthropic::PromptFields>()
            .takes::<anthropic::MessageFields>()
            .answers(JSON_OR_EVENTS),
        post(
            "/v1/messages/count_tokens",
            Anthropic,
            "The tokens of a conversation.",
            handler!(anthropic::count_tokens),
        )
        .takes::<anthropic::PromptFields>(),
        get(
            "/v1/models",
            OpenAi,
            "The model that is served, and its adapters.",
            handler!(openai::models::list),
        ),
        get("/v1/models/{id}", OpenAi, "One model.", handler!(openai::models::retrieve)),
        post("/v1/load_lora_adapter", OpenAi, "Loads an adapter.", handler!(openai::lora::load))
            .takes::<openai::lora::LoadLoraFields>()
            .answers(&["text/plain"]),
        post("/v1/unload_lora_adapter", OpenAi, "Unloads an adapter.", handler!(openai::lora::unload))
            .takes::<openai::lora::UnloadLoraFields>()
            .answers(&["text/plain"]),
    ];
    routes.extend(responses());
    let aliases: Vec<Route> = routes.iter().map(environment_alias).collect();
    routes.extend(aliases);
    // As vLLM has them; the second is Cohere's.
    for path in ["/rerank", "/v2/rerank"] {
        routes.push(
            post(path, OpenAi, RERANKS, handler!(openai::rerank::create))
                .takes::<openai::rerank::RerankFields>()
                .takes::<openai::score::ScoreOptions>(),
        );
    }
    routes.push(
        post("/score", OpenAi, SCORES, handler!(openai::score::create))
            .takes::<openai::score::ScoreFields>()
            .takes::<openai::score::ScoreOptions>(),
    );
    for path in ["/predict", "/production/predict"] {
        routes.push(
            post(path, Plain, "Text for a prompt or a conversation.", handler!(predict::predict))
                .takes::<predict::PredictFields>()
                .takes::<SamplingFields>()
                .answers(&["application/json", "text/plain"]),
        );
    }
    routes.extend([
        post("/tokenize", Plain, "Text as token ids.", handler!(engine_routes::tokenize))
            .takes::<engine_routes::TokenizeRequest>(),
        post("/detokenize", Plain, "Token ids as text.", handler!(engine_routes::detokenize))
            .takes::<engine_routes::DetokenizeRequest>(),
        post("/abort", Plain, "Ends a request and says what was freed.", handler!(engine_routes::abort))
            .takes::<engine_routes::AbortRequest>(),
        get("/health", Plain, "Whether the engine lives.", handler!(ops::health)).open(),
        get("/ready", Plain, "Whether requests are served.", handler!(ops::ready)).open(),
        get("/metrics", Plain, "Prometheus metrics.", handler!(ops::metrics))
            .answers(&["application/openmetrics-text"]),
        get("/openapi.json", Plain, "This document.", handler!(openapi::document)),
        get("/live", Plain, "The engine at work, as events without end.", handler!(live::watch))
            .answers(&["text/event-stream"]),
    ]);
    routes.extend(page::ASSETS.iter().map(|asset| {
        let what = "The live page, or a part of it.";
        get(asset.path, Plain, what, asset.handler).open().answers(asset.content_types)
    }));
    routes
}

fn responses() -> [Route; 5] {
    use openai::responses;
    let route = |method, path, summary, handler| Route::new(method, path, Family::OpenAi, summary, handler);
    let (create, one) = ("/v1/responses", "/v1/responses/{id}");
    let (cancel, items) = ("/v1/responses/{id}/cancel", "/v1/responses/{id}/input_items");
    [
        route(Method::POST, create, "An answer that is kept.", handler!(responses::create))
            .takes::<SamplingFields>()
            .takes::<responses::ResponseFields>()
            .answers(JSON_OR_EVENTS),
        route(Method::GET, one, "A kept answer.", handler!(responses::retrieve)).checks(),
        route(Method::DELETE, one, "Forgets a kept answer.", handler!(responses::delete)),
        route(Method::POST, cancel, "Ends an answer in the background.", handler!(responses::cancel))
            .checks(),
        route(Method::GET, items, "What a kept answer answered.", handler!(responses::input_items)).checks(),
    ]
}

/// Truss names deployments by environment and passes what follows `sync/` on.
fn environment_alias(route: &Route) -> Route {
    Route { path: format!("/environments/{{env}}/sync{}", route.path), ..route.clone() }
}

/// A router over the table.
pub fn router(app: App) -> Router {
    let mut router = Router::new();
    for route in table() {
        let (path, app) = (route.path.clone(), app.clone());
        let filter = MethodFilter::try_from(route.method.clone())
            .unwrap_or_else(|error| unreachable!("the table holds plain methods: {error}"));
        let (family, run) = (route.family, route.handler);
        let serve = move |request| door::serve(app.clone(), family, run, request);
        router = router.route(&path, MethodRouter::new().on(filter, serve));
    }
    router.method_not_allowed_fallback(door::method_not_allowed).fallback(door::not_found)
}
