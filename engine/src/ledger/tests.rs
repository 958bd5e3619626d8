// The ledger itself is told the time; only its tests need a beginning.
use std::{sync::Arc, time::Instant as Clock};

use async_channel::Receiver;

use super::*;
use crate::{
    error::ErrorCode,
    ids::{TenantId, TokenId},
    output::MatchedStop,
    queue::Queue,
    stats::Histogram,
    unread::Unread,
};

const MS: Duration = Duration::from_millis(1);
const TICKET: Ticket = Ticket(7);

/// A ledger, one queue, and the beginning of time.
struct Rig {
    ledger: Ledger,
    queue: Arc<Queue>,
    start: Instant,
}

/// What a client has of its request.
struct Client {
    events: Receiver<Event>,
    unread: Arc<Unread>,
}

impl Client {
    fn take(&self) -> Vec<Event> {
        std::iter::from_fn(|| self.events.try_recv().ok()).collect()
    }
}

impl Rig {
    fn new() -> Self {
        Self { ledger: Ledger::default(), queue: Queue::new(1, None), start: Clock::now() }
    }

    fn at(&self, ms: u32) -> Instant {
        self.start + ms * MS
    }

    /// Opens a request that was submitted in the beginning, with sequences from ten times its ticket on. Its stream holds two tokens.
    fn open(&mut self, ticket: Ticket, completions: u64, limits: [Option<u32>; 2]) -> Client {
        let (sender, events) = async_channel::unbounded();
        let unread = Arc::new(Unread::new(2));
        let [deadline, queue_limit] = limits.map(|limit| limit.map(|ms| self.at(ms)));
        let opening = Opening {
            ticket,
            id: name(ticket),
            events: sender,
            unread: unread.clone(),
            seqs: (0..completions).map(|index| seq(ticket, index)).collect(),
            prompt_tokens: 5,
            priority: 3,
            tenant: TenantId::new("t"),
            trace_parent: None,
            submitted: self.start,
            deadline,
            queue_limit,
            slot: self.queue.take(1).expect("tests give their places back"),
        };
        let now = self.at(1);
        self.ledger.open(opening, now);
        Client { events, unread }
    }

    fn token(&mut self, seq: SeqId, finish: Option<FinishReason>, ms: u32) -> Delivered {
        let finish = finish.map(|reason| (reason, Some(MatchedStop::Text("end".into()))));
        let delivery = Delivery { seq, token: TokenId(ms), logprobs: None, finish, num_preemptions: 1 };
        let now = self.at(ms);
        self.ledger.token(delivery, now)
    }

    fn life(&self) -> Vec<Life> {
        let (explanation, _) = self.ledger.explain(&name(TICKET)).unwrap();
        explanation.life.iter().map(|event| event.what).collect()
    }
}

fn name(ticket: Ticket) -> RequestId {
    RequestId::new(ticket.0.to_string())
}

fn seq(ticket: Ticket, index: u64) -> SeqId {
    SeqId(ticket.0 * 10 + index)
}

/// How many values there were.
fn count_of(histogram: &Histogram) -> u64 {
    histogram.counts.iter().sum()
}

/// Index and token of each.
fn tokens(events: &[Event]) -> Vec<(u32, u32)> {
    let token = |event: &Event| match event {
        Event::Token { index, token, .. } => Some((*index, token.0)),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

#[test]
fn a_request_ends_with_its_last_completion_and_its_usage_says_what_it_took() {
    let mut rig = Rig::new();
    let client = rig.open(TICKET, 2, [None, None]);
    assert_eq!((rig.ledger.num_open(), rig.ledger.is_empty()), (1, false));
    assert_eq!((rig.ledger.tickets(), rig.ledger.find(&name(TICKET))), (vec![TICKET], Some(TICKET)));
    assert_eq!(rig.ledger.id(TICKET), Some(&name(TICKET)));
    assert!(rig.ledger.admitted(seq(TICKET, 0), 4, rig.at(10)));
    assert!(!rig.ledger.admitted(seq(TICKET, 1), 3, rig.at(20)), "the first one counts");
    assert_eq!(rig.token(seq(TICKET, 0), None, 30), Delivered::Open);
    client.unread.taken();
    assert_eq!(rig.token(seq(TICKET, 1), Some(FinishReason::Length), 50), Delivered::Open);
    client.unread.taken();
    assert_eq!(rig.ledger.live_seqs(TICKET), [seq(TICKET, 0)]);
    assert_eq!((rig.ledger.seq(TICKET, 0), rig.ledger.seq(TICKET, 1)), (Some(seq(TICKET, 0)), None));
    assert_eq!(rig.ledger.ticket_of(seq(TICKET, 1)), None);
    assert_eq!(rig.ledger.ticket_of(seq(TICKET, 0)), Some(TICKET));
    assert_eq!(rig.ledger.completion_tokens(TICKET), 2);
    assert_eq!(rig.ledger.age(TICKET, rig.at(60)), 60 * MS);
    assert_eq!(rig.token(seq(TICKET, 0), Some(FinishReason::Stop), 70), Delivered::Over);
    assert_eq!(rig.token(seq(TICKET, 0), None, 80), Delivered::Open, "too late, and told to nobody");
    let events = client.take();
    assert_eq!(tokens(&events), [(0, 30), (1, 50), (0, 70)]);
    let Some(Event::Token { finish: Some(finish), .. }) = events.last() else { panic!("{events:?}") };
    let usage = &finish.usage;
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (5, 4, 2));
    assert_eq!((usage.queue_time, usage.time_to_first_token), (10 * MS, 30 * MS));
    assert_eq!((usage.num_preemptions, finish.matched_stop.is_some()), (1, true));
    assert!(client.events.is_closed() && rig.ledger.is_empty());
    assert_eq!((rig.ledger.ended(&name(TICKET)), rig.ledger.find(&name(TICKET))), (Some(3), None));
}

#[test]
fn distributions_count_each_stage_of_each_request_once() {
    let mut rig = Rig::new();
    let _client = rig.open(TICKET, 2, [None, None]);
    rig.ledger.admitted(seq(TICKET, 0), 0, rig.at(10));
    for (index, finish, ms) in
        [(0, None, 30), (1, None, 40), (0, None, 45), (1, Some(FinishReason::Stop), 50)]
    {
        rig.token(seq(TICKET, index), finish, ms);
    }
    rig.token(seq(TICKET, 0), Some(FinishReason::Length), 90);
    let seconds = |ms: f64| ms / 1000.0;
    let histograms = &rig.ledger.histograms;
    for (histogram, count, sum) in [
        (&histograms.request_queue_time, 1, seconds(10.0)),
        (&histograms.time_to_first_token, 1, seconds(30.0)),
        (&histograms.request_prefill_time, 1, seconds(20.0)),
        (&histograms.inter_token_latency, 3, seconds(15.0 + 10.0 + 45.0)),
        (&histograms.request_decode_time, 1, seconds(60.0)),
        (&histograms.e2e_request_latency, 1, seconds(90.0)),
    ] {
        assert_eq!(count_of(histogram), count);
        assert!((histogram.sum - sum).abs() < 1e-9, "{} s, {sum} s expected", histogram.sum);
    }
}

#[test]
fn an_embedding_is_the_end_of_its_request_and_has_no_token() {
    let mut rig = Rig::new();
    let client = rig.open(TICKET, 1, [Some(100), Some(50)]);
    rig.ledger.admitted(seq(TICKET, 0), 3, rig.at(10));
    let mut embedding = |ms| {
        let embedding = Embedded { seq: seq(TICKET, 0), values: vec![0.5, 2.0], num_preemptions: 2 };
        let now = rig.start + ms * MS;
        rig.ledger.embedding(embedding, now)
    };
    assert_eq!([embedding(40), embedding(50)], [true, false], "the second is told to nobody");
    let events = client.take();
    let [Event::Embedding { values, usage }] = &events[..] else { panic!("{events:?}") };
    assert_eq!(values, &[0.5, 2.0]);
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (5, 3, 0));
    assert_eq!(usage.num_preemptions, 2);
    assert!(client.events.is_closed() && rig.ledger.is_empty() && rig.ledger.next_timer().is_none());
    assert_eq!(rig.life().last(), Some(&Life::Finished(FinishReason::Stop)));
    let histograms = &rig.ledger.histograms;
    let counts = [&histograms.request_prefill_time, &histograms.e2e_request_latency].map(count_of);
    assert_eq!(counts, [1, 1]);
    let none = [&histograms.time_to_first_token, &histograms.request_decode_time].map(count_of);
    assert_eq!(none, [0, 0]);
}

#[test]
fn an_abort_ends_every_completion_that_is_left_and_counts_in_no_latency() {
    let mut rig = Rig::new();
    let client = rig.open(TICKET, 3, [Some(100), Some(50)]);
    rig.token(seq(TICKET, 1), Some(FinishReason::Stop), 20);
    rig.ledger.abort(TICKET, rig.at(30));
    rig.ledger.abort(TICKET, rig.at(31));
    let events = client.take();
    let ended: Vec<_> = events[1..]
        .iter()
        .map(|event| match event {
            Event::Finished { index, finish } => (*index, finish.reason, finish.usage.completion_tokens),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(ended, [(0, FinishReason::Abort, 0), (2, FinishReason::Abort, 0)]);
    let histograms = &rig.ledger.histograms;
    assert_eq!(
        (count_of(&histograms.e2e_request_latency), count_of(&histograms.request_decode_time)),
        (0, 0)
    );
    assert_eq!((rig.ledger.next_timer(), rig.ledger.due(rig.at(1000)).len()), (None, 0), "no timer is left");
    assert!(!rig.ledger.finish((TICKET, 0), FinishReason::Stop, rig.at(40)), "it is over");
    assert!(client.take().is_empty());
}

#[test]
fn one_completion_is_finished_once_and_only_if_it_is_there() {
    let mut rig = Rig::new();
    let client = rig.open(TICKET, 2, [None, None]);
    assert!(!rig.ledger.finish((TICKET, 2), FinishReason::Stop, rig.at(5)));
    assert!(!rig.ledger.finish((TICKET, 1), FinishReason::Stop, rig.at(6)));
    assert!(!rig.ledger.finish((TICKET, 1), FinishReason::Stop, rig.at(7)));
    assert_eq!(client.take().len(), 1);
    assert!(rig.ledger.finish((TICKET, 0), FinishReason::Stop, rig.at(8)));
    assert_eq!((client.take().len(), rig.ledger.is_empty()), (1, true));
}

#[test]
fn a_failure_is_told_and_a_dropped_stream_is_not() {
    let mut rig = Rig::new();
    let failed = rig.open(TICKET, 1, [None, None]);
    rig.ledger.fail(TICKET, RequestError::Draining, rig.at(20));
    rig.ledger.fail(TICKET, RequestError::Draining, rig.at(21));
    assert_eq!(failed.take(), [Event::Failed(RequestError::Draining)]);
    assert_eq!(rig.life(), [Life::Queued, Life::Failed(ErrorCode::Unavailable)]);
    let dropped = rig.open(TICKET, 1, [None, None]);
    assert!(rig.ledger.discard(TICKET, rig.at(30)));
    assert!(!rig.ledger.discard(TICKET, rig.at(31)));
    assert!(dropped.take().is_empty() && dropped.events.is_closed());
    assert_eq!(rig.life(), [Life::Queued, Life::Dropped], "the later of the two of this name");
    assert_eq!((rig.ledger.ticket_of(seq(TICKET, 0)), rig.ledger.lives_lost()), (None, 0));
}

#[test]
fn the_place_in_the_queue_is_free_once_there_is_a_row_or_an_end() {
    let mut rig = Rig::new();
    let client = rig.open(TICKET, 1, [None, Some(50)]);
    assert!(rig.queue.take(1).is_err());
    assert_eq!(rig.ledger.next_timer(), Some(rig.at(50)));
    rig.ledger.admitted(seq(TICKET, 0), 0, rig.at(10));
    assert!(rig.queue.take(1).is_ok());
    assert_eq!(rig.ledger.next_timer(), None, "it does not wait for a row any more");
    rig.ledger.prompt_logprobs(seq(TICKET, 0), Vec::new());
    assert_eq!(client.take(), [Event::PromptLogprobs(Vec::new())]);
    rig.ledger.note(seq(TICKET, 0), Life::Preempted, rig.at(12));
    assert_eq!(rig.life(), [Life::Queued, Life::Admitted { cached_tokens: 0 }, Life::Preempted]);
    let [one, two] = [Ticket(8), Ticket(9)];
    rig.open(one, 2, [None, None]);
    rig.ledger.finish((one, 0), FinishReason::Stop, rig.at(20));
    rig.open(two, 1, [None, None]);
    rig.ledger.fail(two, RequestError::Draining, rig.at(21));
    assert!(rig.queue.take(1).is_ok());
}

#[test]
fn timers_come_due_in_their_order() {
    let mut rig = Rig::new();
    let _clients = {
        let first = rig.open(TICKET, 1, [Some(100), None]);
        rig.ledger.admitted(seq(TICKET, 0), 0, rig.at(2));
        (first, rig.open(Ticket(8), 1, [Some(90), Some(40)]))
    };
    assert_eq!(rig.ledger.next_timer(), Some(rig.at(40)));
    assert!(rig.ledger.due(rig.at(39)).is_empty());
    assert_eq!(rig.ledger.due(rig.at(40)), [(Ticket(8), Timer::Queue)]);
    rig.ledger.park(TICKET, rig.at(50), Some(rig.at(95)));
    let all = [
        (Ticket(8), Timer::Queue),
        (Ticket(8), Timer::Deadline),
        (TICKET, Timer::Reader),
        (TICKET, Timer::Deadline),
    ];
    assert_eq!(rig.ledger.due(rig.at(100)), all);
}

#[test]
fn a_request_is_parked_while_its_stream_is_full_and_goes_on_when_it_is_read() {
    let mut rig = Rig::new();
    let client = rig.open(TICKET, 1, [None, None]);
    assert!(!rig.ledger.unpark(TICKET, rig.at(2)), "it is not parked");
    assert_eq!(rig.token(seq(TICKET, 0), None, 10), Delivered::Open);
    assert_eq!(rig.token(seq(TICKET, 0), None, 20), Delivered::Unread(TICKET));
    assert!(!rig.ledger.reads_on(TICKET, Some(rig.at(99))), "it is not parked yet");
    assert!(rig.ledger.park(TICKET, rig.at(20), Some(rig.at(80))));
    assert!(!rig.ledger.park(TICKET, rig.at(25), Some(rig.at(85))), "twice is once, from the later on");
    assert_eq!(rig.ledger.parked_since(TICKET), Some(rig.at(25)));
    assert_eq!(rig.ledger.next_timer(), Some(rig.at(85)));
    assert_eq!(rig.ledger.explain(&name(TICKET)).unwrap().0.state, RequestState::Parked);
    assert!(!rig.ledger.unpark(TICKET, rig.at(30)), "its reader is behind");
    assert!(!rig.ledger.reads_on(TICKET, Some(rig.at(90))), "nothing was read");
    assert_eq!(rig.token(seq(TICKET, 0), None, 31), Delivered::Open, "it was in flight");
    assert!(!client.unread.taken());
    assert!(!rig.ledger.reads_on(TICKET, Some(rig.at(90))), "as many as were there");
    assert!(client.unread.taken());
    assert!(rig.ledger.reads_on(TICKET, Some(rig.at(95))));
    assert_eq!(rig.ledger.next_timer(), Some(rig.at(95)));
    assert!(rig.ledger.unpark(TICKET, rig.at(40)));
    assert_eq!((rig.ledger.next_timer(), rig.ledger.parked_since(TICKET)), (None, None));
    assert_eq!(rig.life()[2..], [Life::Parked, Life::Unparked]);
    let before = count_of(&rig.ledger.histograms.inter_token_latency);
    rig.token(seq(TICKET, 0), None, 50);
    let after = count_of(&rig.ledger.histograms.inter_token_latency);
    assert_eq!(after, before, "what its client let itself wait for is no latency of ours");
}
