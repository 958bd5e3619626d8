//! Aborts through the wire: how long until a stream that is being decoded has given everything back.

use std::time::{Duration, Instant};

use tidemill_proto::v1::{
    AbortRequest, AbortStage, FinishReason, GenerateRequest, GetStatsRequest, OutputOptions, SamplingParams,
    TokenIds, control_client::ControlClient, generate_request::Prompt, inference_client::InferenceClient,
};
use tonic::{Status, transport::Channel};

/// Waits for the pool at most so long.
const PATIENCE: Duration = Duration::from_secs(5);

/// Starts a stream that would go on for `max_tokens` tokens, aborts it after its first token, and returns the time from sending the
/// abort to its receipt.
///
/// # Errors
/// Any status; or DATA_LOSS when the receipt says that nothing was freed, the stream does not end as aborted, or blocks stay
/// owned although nothing runs.
pub async fn one(channel: Channel, number: usize, max_tokens: u32) -> Result<Duration, Status> {
    let request_id = format!("aborted-{number}");
    let request = GenerateRequest {
        request_id: request_id.clone(),
        prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![3; 32] })),
        sampling: Some(SamplingParams {
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        output: Some(OutputOptions { token_ids_only: true, include_special_tokens: false }),
        ..GenerateRequest::default()
    };
    let mut messages = InferenceClient::new(channel.clone()).generate(request).await?.into_inner();
    while messages.message().await?.is_some_and(|message| message.token_ids.is_empty()) {}
    let mut control = ControlClient::new(channel);
    let sent = Instant::now();
    let receipt = control.abort(AbortRequest { request_id }).await?.into_inner();
    let took = sent.elapsed();
    if receipt.stage() != AbortStage::Decode || receipt.blocks_freed == 0 || receipt.rows_freed != 1 {
        return Err(Status::data_loss(format!("the receipt of an abort during decode says {receipt:?}")));
    }
    let mut aborted = false;
    while let Some(message) = messages.message().await? {
        aborted |= message.finish_reason() == FinishReason::Abort;
    }
    if !aborted {
        return Err(Status::data_loss("an aborted stream did not end as aborted"));
    }
    while let Some(stats) = control.get_stats(GetStatsRequest {}).await?.into_inner().stats {
        if stats.kv_blocks_owned == 0 && stats.num_requests_running == 0 {
            return Ok(took);
        }
        if sent.elapsed() > PATIENCE {
            return Err(Status::data_loss(format!("blocks stay owned after an abort: {stats:?}")));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Err(Status::data_loss("the server gave no statistics"))
}
