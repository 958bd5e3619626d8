//! What the demonstration asks: prompts from what the built-in model does well.

use tidemill_proto::v1::{
    ChatMessage, ChatPrompt, GenerateRequest, SamplingParams, generate_request::Prompt as WirePrompt,
};

/// One stream of the demonstration.
#[derive(Debug, Clone, Copy)]
pub struct Prompt {
    /// Its name on the screen, and its request id.
    pub label: &'static str,
    /// What the user says.
    pub question: &'static str,
    /// Tools that the model may call.
    pub tools_json: &'static str,
    /// It would go on for as long as the context lasts, and is aborted on the way.
    pub endless: bool,
}

const fn chat(label: &'static str, question: &'static str) -> Prompt {
    Prompt { label, question, tools_json: "", endless: false }
}

/// All streams.
pub const PROMPTS: [Prompt; 7] = [
    chat("story", "Tell me a story about a fox and a lantern."),
    Prompt { endless: true, ..chat("endless", "Tell me a story about a bear and a map.") },
    chat("dragon", "Write a short story about Mia and a dragon."),
    chat("cache", "What is a KV cache?"),
    chat("prefill", "What is prefill?"),
    chat("json", "Give me JSON with the name Rosa and the age 31."),
    Prompt { tools_json: WEATHER, ..chat("tool", "What is the weather in Paris?") },
];

const WEATHER: &str = r#"[{"type": "function", "function": {"name": "get_weather", "description": "Get the weather for a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]"#;

impl Prompt {
    /// The request on the wire.
    pub fn request(self) -> GenerateRequest {
        let message =
            ChatMessage { role: "user".into(), content: self.question.into(), ..ChatMessage::default() };
        GenerateRequest {
            request_id: self.label.into(),
            prompt: Some(WirePrompt::Chat(ChatPrompt {
                messages: vec![message],
                tools_json: self.tools_json.into(),
                ..ChatPrompt::default()
            })),
            sampling: Some(SamplingParams {
                temperature: Some(0.0),
                max_tokens: Some(if self.endless { 900 } else { 200 }),
                ignore_eos: self.endless,
                ..SamplingParams::default()
            }),
            ..GenerateRequest::default()
        }
    }
}
