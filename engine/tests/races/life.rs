//! Requests that are submitted, aborted, dropped, left unread, and cut off by the engine's end, all at once.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use shuttle::thread;

use crate::{
    channel::{Closed, Receiver, Sender, unbounded},
    error::{RequestError, StopReason},
    queue::{Queue, QueueSlot},
    stopped::Stopped,
    sync::{AtomicU64, interleave},
    unread::Unread,
};

/// Tokens that a request asks for.
const TOKENS: usize = 5;
/// Tokens that a stream may hold unread.
const MAX_UNREAD: usize = 2;
const MAX_QUEUED: usize = 2;

fn lost() -> StopReason {
    StopReason::DeviceLost("fell off the bus".into())
}

#[derive(Debug, PartialEq)]
enum Event {
    Token(usize),
    Finished,
    Aborted,
    Failed(RequestError),
}

enum Command {
    Submit(Submission),
    Abort { ticket: u64, was_open: Sender<bool> },
    Drop { ticket: u64 },
    Resume { ticket: u64 },
}

struct Submission {
    ticket: u64,
    slot: Option<QueueSlot>,
    unread: Arc<Unread>,
    events: Sender<Event>,
    tokens: usize,
    is_parked: bool,
}

/// As `EngineHandle`: what handles share.
struct Handle {
    commands: Sender<Command>,
    queue: Arc<Queue>,
    stopped: Arc<Stopped>,
    next_ticket: Arc<AtomicU64>,
}

impl Clone for Handle {
    fn clone(&self) -> Self {
        Self {
            commands: self.commands.clone(),
            queue: self.queue.clone(),
            stopped: self.stopped.clone(),
            next_ticket: self.next_ticket.clone(),
        }
    }
}

impl Handle {
    /// As `EngineHandle::submit`.
    fn submit(&self) -> Result<Stream, RequestError> {
        if let Some(reason) = self.stopped.get() {
            return Err(reason.error());
        }
        let slot = Some(self.queue.take(1)?);
        let ticket = self.next_ticket.fetch_add(1, Relaxed);
        let (events_tx, events) = unbounded();
        let unread = Arc::new(Unread::new(MAX_UNREAD));
        let stream = Stream { ticket, events, unread: unread.clone(), handle: self.clone(), is_over: false };
        let submission = Submission { ticket, slot, unread, events: events_tx, tokens: 0, is_parked: false };
        match self.commands.send(Command::Submit(submission)) {
            Ok(()) => Ok(stream),
            Err(Closed) => Err(self.stopped.reason().error()),
        }
    }

    /// As `EngineHandle::abort`: whether the request was open.
    fn abort(&self, ticket: u64) -> Result<bool, RequestError> {
        let (was_open, receipt) = unbounded();
        let sent = self.commands.send(Command::Abort { ticket, was_open });
        sent.and_then(|()| receipt.recv()).map_err(|Closed| self.stopped.reason().error())
    }
}

/// As `Generation`.
struct Stream {
    ticket: u64,
    events: Receiver<Event>,
    unread: Arc<Unread>,
    handle: Handle,
    is_over: bool,
}

impl Stream {
    fn next(&mut self) -> Event {
        let event =
            self.events.recv().unwrap_or_else(|Closed| Event::Failed(self.handle.stopped.reason().error()));
        match event {
            Event::Token(_) if self.unread.taken() => {
                let _ = self.handle.commands.send(Command::Resume { ticket: self.ticket });
            }
            Event::Token(_) => {}
            _ => self.is_over = true,
        }
        event
    }

    /// Reads to the end: every token once and in order, and then how it ended.
    fn read(mut self) -> (usize, Event) {
        for token in 0.. {
            match self.next() {
                Event::Token(index) => assert_eq!(index, token, "a token is missing, or came twice"),
                end => {
                    assert!(self.events.recv().is_err(), "something came after the end");
                    return (token, end);
                }
            }
        }
        unreachable!("a stream ends")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.is_over && !std::thread::panicking() {
            let _ = self.handle.commands.send(Command::Drop { ticket: self.ticket });
        }
    }
}

/// As the engine thread: commands, then a step of one token for whoever is not parked. The device is lost after so many turns.
fn run(commands: Receiver<Command>, stopped: &Stopped, turns: usize) {
    let mut open = BTreeMap::new();
    for _ in 0..turns {
        if open.values().all(|request: &Submission| request.is_parked) {
            match commands.recv() {
                Ok(command) => handle(&mut open, command),
                Err(Closed) => break,
            }
        }
        while let Some(command) = commands.try_recv() {
            handle(&mut open, command);
        }
        open.retain(|_, request| request.is_parked || step(request));
    }
    for request in open.into_values() {
        let _ = request.events.send(Event::Failed(lost().error()));
    }
    stopped.end(lost(), commands);
}

fn handle(open: &mut BTreeMap<u64, Submission>, command: Command) {
    match command {
        Command::Submit(submission) => {
            let before = open.insert(submission.ticket, submission);
            assert!(before.is_none(), "a ticket was given out twice");
        }
        Command::Abort { ticket, was_open } => {
            let request = open.remove(&ticket);
            let _ = was_open.send(request.is_some());
            request.into_iter().for_each(|request| drop(request.events.send(Event::Aborted)));
        }
        Command::Drop { ticket } => drop(open.remove(&ticket)),
        Command::Resume { ticket } => {
            if let Some(request) = open.get_mut(&ticket).filter(|request| !request.unread.waits()) {
                request.is_parked = false;
            }
        }
    }
}

/// Delivers a token. False when it was the last.
fn step(request: &mut Submission) -> bool {
    request.slot = None;
    request.is_parked = request.unread.sent();
    let _ = request.events.send(Event::Token(request.tokens));
    request.tokens += 1;
    if request.tokens < TOKENS {
        return true;
    }
    let _ = request.events.send(Event::Finished);
    false
}

/// An engine that is lost after so many turns, and what `clients` do with it. In the end every place is free again.
fn with_engine(turns: usize, clients: Vec<Box<dyn FnOnce(Handle) + Send>>) {
    let (commands_tx, commands) = unbounded();
    let stopped = Arc::new(Stopped::default());
    let queue = Queue::new(MAX_QUEUED, None);
    let handle = Handle {
        commands: commands_tx,
        queue: queue.clone(),
        stopped: stopped.clone(),
        next_ticket: Arc::new(AtomicU64::new(0)),
    };
    let engine = thread::spawn(move || run(commands, &stopped, turns));
    let spawn = |client: Box<dyn FnOnce(Handle) + Send>| {
        let handle = handle.clone();
        thread::spawn(move || client(handle))
    };
    let clients: Vec<_> = clients.into_iter().map(spawn).collect();
    drop(handle);
    clients.into_iter().for_each(|client| client.join().unwrap());
    engine.join().unwrap();
    let places: Vec<_> = (0..MAX_QUEUED).map(|_| queue.take(1).expect("all places are free again")).collect();
    assert!(queue.take(1).is_err(), "more places than there are: {places:?}");
}

/// A refusal or an end by the engine's end carries its reason.
fn is_lost_or_full(error: &RequestError) -> bool {
    *error == lost().error() || matches!(error, RequestError::QueueFull { .. })
}

fn submit_and_read(handle: Handle) {
    match handle.submit().map(Stream::read) {
        Ok((tokens, Event::Finished)) => assert_eq!(tokens, TOKENS),
        Ok((_, Event::Failed(error))) => assert_eq!(error, lost().error()),
        Ok((_, end)) => panic!("{end:?}"),
        Err(error) => assert!(is_lost_or_full(&error), "{error:?}"),
    }
}

/// Reads nothing, or a part, and drops the stream.
fn submit_and_drop(handle: Handle) {
    for count in 0..2 {
        match handle.submit() {
            Ok(mut stream) => (0..count).for_each(|_| drop(stream.next())),
            Err(error) => assert!(is_lost_or_full(&error), "{error:?}"),
        }
    }
}

/// Aborts what somebody else reads.
fn submit_and_abort(handle: Handle) {
    let stream = match handle.submit() {
        Ok(stream) => stream,
        Err(error) => return assert!(is_lost_or_full(&error), "{error:?}"),
    };
    let ticket = stream.ticket;
    let reader = thread::spawn(move || stream.read());
    let receipt = handle.abort(ticket);
    let (tokens, end) = reader.join().unwrap();
    match (receipt, end) {
        (Ok(true), Event::Aborted) => assert!(tokens < TOKENS),
        // It came too late, or the engine was lost before it came or while its answer was on the way.
        (Ok(false) | Err(_), Event::Finished) => assert_eq!(tokens, TOKENS),
        (Err(told), Event::Failed(error)) => assert_eq!((told, error), (lost().error(), lost().error())),
        (receipt, end) => panic!("{receipt:?}, but {end:?}"),
    }
}

#[test]
fn every_stream_ends_once_and_every_place_comes_back_while_the_engine_lives() {
    interleave(|| with_engine(usize::MAX, vec![Box::new(submit_and_read), Box::new(submit_and_drop)]));
    interleave(|| with_engine(usize::MAX, vec![Box::new(submit_and_abort), Box::new(submit_and_drop)]));
}

#[test]
fn whoever_is_there_when_the_engine_is_lost_hears_why() {
    for turns in [0, 1, 3, 6] {
        interleave(move || with_engine(turns, vec![Box::new(submit_and_read), Box::new(submit_and_abort)]));
    }
}

#[test]
fn two_streams_that_are_read_as_quickly_as_they_are_written_both_end() {
    interleave(|| with_engine(usize::MAX, vec![Box::new(submit_and_read), Box::new(submit_and_read)]));
}
