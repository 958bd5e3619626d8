//! An unbounded channel over shuttle that ends as those of the engine do: messages that are there when the last sender goes are still received,
//! and those that are there when the receiver goes are dropped at once, with whatever they would answer to.

use std::{collections::VecDeque, sync::Arc};

use shuttle::sync::{Condvar, Mutex};

#[derive(Debug)]
struct State<T> {
    messages: VecDeque<T>,
    senders: usize,
    has_receiver: bool,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
pub struct Sender<T>(Arc<Shared<T>>);

#[derive(Debug)]
pub struct Receiver<T>(Arc<Shared<T>>);

/// The channel is closed.
#[derive(Debug)]
pub struct Closed;

pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
    let state = State { messages: VecDeque::new(), senders: 1, has_receiver: true };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
    (Sender(shared.clone()), Receiver(shared))
}

impl<T> Sender<T> {
    pub fn send(&self, message: T) -> Result<(), Closed> {
        let mut state = self.0.state.lock().unwrap();
        if !state.has_receiver {
            // What the message would answer to is told after the lock is gone.
            drop(state);
            drop(message);
            return Err(Closed);
        }
        state.messages.push_back(message);
        self.0.changed.notify_one();
        Ok(())
    }
}

impl<T> Receiver<T> {
    pub fn recv(&self) -> Result<T, Closed> {
        let mut state = self.0.state.lock().unwrap();
        loop {
            match state.messages.pop_front() {
                Some(message) => return Ok(message),
                None if state.senders == 0 => return Err(Closed),
                None => state = self.0.changed.wait(state).unwrap(),
            }
        }
    }

    pub fn try_recv(&self) -> Option<T> {
        self.0.state.lock().unwrap().messages.pop_front()
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.state.lock().unwrap().senders += 1;
        Self(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        self.0.state.lock().unwrap().senders -= 1;
        self.0.changed.notify_one();
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let mut state = self.0.state.lock().unwrap();
        state.has_receiver = false;
        let unheard = std::mem::take(&mut state.messages);
        drop(state);
        drop(unheard);
    }
}
