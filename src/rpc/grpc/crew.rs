//! The threads that run calls: at most so many, started when they are needed, gone when nothing has come for a while.
//!
//! Calls wait in one bounded line. Those that may take long, because the core lets them wait for an address, have only a
//! part of the threads: whoever wants to give an address back is not held up by those who wait for one.

use super::{Call, Code, Reply, Status};
use crate::clock;
use crate::error::Result;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Stack of a thread; the handler runs on it.
const STACK_SIZE: usize = 256 * 1024;
/// A thread that has had nothing to do for so long ends: an idle node has none.
const IDLE_LIMIT: Duration = Duration::from_secs(2);
/// Bytes of calls in the line; real ones have a few hundred each.
const LINE_BYTES_MAX: usize = 8 << 20;

/// What answers calls.
pub(super) type Handler = dyn Fn(&Call) -> Reply + Send + Sync;

/// Which call of which peer.
pub(super) type Ticket = (u64, u32);

/// How many, and who is slow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) threads: usize,
    pub(super) line: usize,
    pub(super) slow: &'static [&'static str],
}

impl Limits {
    /// Threads that slow calls may have: three of four.
    fn slow_threads(&self) -> usize {
        (self.threads - self.threads / 4).max(1)
    }
}

#[derive(Default)]
struct State {
    line: VecDeque<(Ticket, Call)>,
    done: Vec<(Ticket, Reply)>,
    threads: usize,
    idle: usize,
    slow: usize,
    running: usize,
    closed: bool,
    started: usize,
}

/// The line and its threads.
pub(super) struct Crew {
    state: Mutex<State>,
    work: Condvar,
    handler: Box<Handler>,
    limits: Limits,
    /// Wakes whoever waits for answers.
    bell: UnixStream,
}

impl Crew {
    /// No thread yet. What is returned beside can be read when an answer is there or [`Crew::ring`] was called.
    pub(super) fn new(handler: Box<Handler>, limits: Limits) -> Result<(Arc<Crew>, UnixStream)> {
        let (bell, heard) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        heard.set_nonblocking(true)?;
        let crew = Crew { state: Mutex::default(), work: Condvar::new(), handler, limits, bell };
        Ok((Arc::new(crew), heard))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes whoever polls.
    pub(super) fn ring(&self) {
        // A bell that takes no more has rung and was not heard yet.
        (&self.bell).write_all(&[0]).ok();
    }

    /// Takes the rings off, to be called by whoever polls.
    pub(super) fn hush(heard: &UnixStream) {
        let mut rings = [0; 64];
        while (&*heard).read(&mut rings).is_ok_and(|count| count == rings.len()) {}
    }

    /// Answers at once, on the calling thread.
    pub(super) fn answer(&self, call: &Call) -> Reply {
        let expired = call.deadline.is_some_and(|deadline| deadline <= clock::instant());
        if expired {
            return Err(Status::new(Code::DEADLINE_EXCEEDED, "deadline passed before the call was taken up"));
        }
        (self.handler)(call)
    }

    /// Puts a call into the line; why not, if it is full.
    pub(super) fn put(self: &Arc<Self>, ticket: Ticket, call: Call) -> std::result::Result<(), Status> {
        let mut state = self.lock();
        let bytes: usize = state.line.iter().map(|(_, waiting)| waiting.body.len()).sum();
        let busy = state.line.len() >= self.limits.line + self.limits.threads.saturating_sub(state.running);
        if busy || bytes + call.body.len() > LINE_BYTES_MAX {
            return Err(Status::new(Code::UNAVAILABLE, "too many calls wait already"));
        }
        state.line.push_back((ticket, call));
        if state.idle < state.line.len() && state.threads < self.limits.threads {
            state.threads += 1;
            state.started += 1;
            let (crew, name) = (Arc::clone(self), format!("rpc-{}", state.started % 100));
            drop(state);
            let started = std::thread::Builder::new().name(name).stack_size(STACK_SIZE).spawn(move || crew.work());
            if let Err(error) = started {
                state = self.lock();
                state.threads -= 1;
                if state.threads == 0 {
                    state.line.retain(|(waiting, _)| *waiting != ticket);
                    return Err(Status::new(Code::UNAVAILABLE, format!("start thread: {error}")));
                }
            }
        }
        self.work.notify_one();
        Ok(())
    }

    /// Takes a call out of the line; one that runs goes on, and nobody hears of it.
    pub(super) fn forget(&self, ticket: Ticket) {
        self.lock().line.retain(|(waiting, _)| *waiting != ticket);
    }

    /// The answers since the last time.
    pub(super) fn take_done(&self) -> Vec<(Ticket, Reply)> {
        std::mem::take(&mut self.lock().done)
    }

    /// Lets the threads end once the line is empty.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            let may_be_slow = state.slow < self.limits.slow_threads();
            let next = state.line.iter().position(|(_, call)| may_be_slow || !self.is_slow(call));
            if let Some((ticket, call)) = next.and_then(|at| state.line.remove(at)) {
                let slow = usize::from(self.is_slow(&call));
                state.slow += slow;
                state.running += 1;
                drop(state);
                let reply = self.answer(&call);
                state = self.lock();
                state.slow -= slow;
                state.running -= 1;
                state.done.push((ticket, reply));
                let first = state.done.len() == 1;
                drop(state);
                if first {
                    self.ring();
                }
                state = self.lock();
                continue;
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let (back, waited) = self.work.wait_timeout(state, IDLE_LIMIT).unwrap_or_else(PoisonError::into_inner);
            state = back;
            state.idle -= 1;
            if waited.timed_out() && state.line.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }

    fn is_slow(&self, call: &Call) -> bool {
        self.limits.slow.contains(&call.method)
    }
}
