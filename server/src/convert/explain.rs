//! Why a request waits, and its life, for the wire.

use tidemill_engine::{
    explain::{Explanation, Life, LifeEvent, RequestState},
    output::FinishReason,
    scheduler::WaitReason,
};
use tidemill_proto::v1::{self, life_event, wait_reason};

use super::{code, code_name};

/// An explanation.
pub fn explain_response(explanation: &Explanation) -> v1::ExplainResponse {
    let state = match explanation.state {
        RequestState::Queued => v1::RequestState::Queued,
        RequestState::Prefill => v1::RequestState::Prefill,
        RequestState::Decode => v1::RequestState::Decode,
        RequestState::Preempted => v1::RequestState::Preempted,
        RequestState::Parked => v1::RequestState::Parked,
        RequestState::Ended => v1::RequestState::Ended,
    };
    v1::ExplainResponse {
        request_id: explanation.id.as_str().to_owned(),
        state: state.into(),
        waits_for: explanation.waits_for.map(wait_reason),
        ahead: explanation.ahead as u32,
        predicted_wait_seconds: explanation.predicted_wait.map(|wait| wait.as_secs_f64()),
        priority: explanation.priority,
        tenant: explanation.tenant.as_str().to_owned(),
        prompt_tokens: explanation.prompt_tokens as u32,
        cached_tokens: explanation.cached_tokens as u32,
        completion_tokens: explanation.completion_tokens as u32,
        kv_blocks: explanation.kv_blocks as u32,
        num_preemptions: explanation.num_preemptions as u32,
        life: explanation.life.iter().map(life_event).collect(),
        events_left_out: explanation.events_left_out as u32,
    }
}

fn wait_reason(reason: WaitReason) -> v1::WaitReason {
    use wait_reason::{Adapter, Blocks, Budget, Fairness, Prompt, Reader, Reason, Rows, Turn};
    let (text, reason) = match reason {
        WaitReason::Rows { max_num_seqs } => (
            format!("all {max_num_seqs} rows of the batch are taken"),
            Reason::Rows(Rows { max_num_seqs: max_num_seqs as u32 }),
        ),
        WaitReason::Blocks { needed, available } => (
            format!("its prompt needs {needed} KV blocks and {available} could be had"),
            Reason::Blocks(Blocks { needed: needed as u32, available: available as u32 }),
        ),
        WaitReason::Budget { max_num_batched_tokens } => (
            format!("the step's tokens, at most {max_num_batched_tokens}, went to others"),
            Reason::Budget(Budget { max_num_batched_tokens: max_num_batched_tokens as u32 }),
        ),
        WaitReason::Adapter { max_loras } => (
            format!("the batch has rows of {max_loras} other adapters, as many as it may"),
            Reason::Adapter(Adapter { max_loras: max_loras as u32 }),
        ),
        WaitReason::Turn { ahead } => {
            (format!("its turn comes after {ahead} others"), Reason::Turn(Turn { ahead: ahead as u32 }))
        }
        WaitReason::Fairness { surplus } => (
            format!("its tenant has been given {surplus} tokens of service more than others that wait"),
            Reason::Fairness(Fairness { surplus }),
        ),
        WaitReason::Prompt => {
            ("another of its completions reads the prompt".to_owned(), Reason::Prompt(Prompt {}))
        }
        WaitReason::Reader => ("its client does not read the stream".to_owned(), Reason::Reader(Reader {})),
    };
    v1::WaitReason { text, reason: Some(reason) }
}

fn life_event(event: &LifeEvent) -> v1::LifeEvent {
    use life_event::{
        Admitted, Chunk, Dropped, Failed, FirstToken, Parked, Preempted, Queued, Resumed, Unparked, What,
    };
    let what = match event.what {
        Life::Queued => What::Queued(Queued {}),
        Life::Admitted { cached_tokens } => What::Admitted(Admitted { cached_tokens: cached_tokens as u32 }),
        Life::Chunk { tokens, computed } => {
            What::Chunk(Chunk { tokens: tokens as u32, computed: computed as u32 })
        }
        Life::FirstToken => What::FirstToken(FirstToken {}),
        Life::Preempted => What::Preempted(Preempted {}),
        Life::Resumed { cached_tokens } => What::Resumed(Resumed { cached_tokens: cached_tokens as u32 }),
        Life::Parked => What::Parked(Parked {}),
        Life::Unparked => What::Unparked(Unparked {}),
        Life::Finished(reason) => What::Finished(finish_reason(reason).into()),
        Life::Failed(error) => What::Failed(Failed { status: code_name(code(error)).to_owned() }),
        Life::Dropped => What::Dropped(Dropped {}),
    };
    v1::LifeEvent { seconds: event.at.as_secs_f64(), index: event.index, what: Some(what) }
}

/// Why a completion ended, for the log.
pub fn finish_reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort => "abort",
    }
}

/// Why a completion ended.
pub fn finish_reason(reason: FinishReason) -> v1::FinishReason {
    match reason {
        FinishReason::Stop => v1::FinishReason::Stop,
        FinishReason::Length => v1::FinishReason::Length,
        FinishReason::Abort => v1::FinishReason::Abort,
    }
}
