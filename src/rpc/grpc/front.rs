//! The server's first thread: it owns the listening socket and every connection, reads and writes them as they get ready,
//! and blocks nowhere but in `poll`.
//!
//! In each round every connection gets one read, so that none of them, however loud, holds up the others. A peer that
//! neither ends what it has begun nor takes what it has asked for is cut off in time; one that rests may stay until its
//! place is wanted.

use super::Reply;
use super::crew::{Crew, Ticket};
use super::server::{BindOptions, Call};
use super::session::Session;
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::map::{Map, Set};
use crate::rpc::h2::code;
use crate::rpc::stop::Stop;
use crate::sys;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One read of a connection.
const READ_SIZE: usize = 16_384;
/// Connections that are accepted in one round.
const ACCEPT_MAX: usize = 64;
/// Calls of one connection that wait or run. More than the streams that are offered, of which a client may not know yet when
/// it begins, and a third of the line.
const CALLS_MAX: usize = 64;
/// A peer that does not take what is written is not read from while so much waits for it.
const UNSENT_MAX: usize = 64 << 10;
/// Bytes of unfinished requests that all connections together may hold. A single one that holds little is never the cause.
const HELD_MAX: usize = 16 << 20;
const HELD_FREE: usize = 64 << 10;
/// The count of frames without effect starts anew after this long.
const FORGIVE_AFTER: Duration = Duration::from_secs(10);
/// Pause after accept failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a connection that is closed may take to be told so.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

struct Peer {
    session: Session,
    stream: UnixStream,
    pid: i32,
    /// Streams whose calls wait or run.
    calls: Set<u32>,
    /// When it came, began a request, or had its last answer: whichever was last.
    begun: Instant,
    forgiven: Instant,
    /// Since when there is something that it has not taken.
    unsent: Option<Instant>,
    /// It sends nothing any more.
    ended: bool,
    /// It is to go when nothing is under way.
    leaving: bool,
    /// It is being told so, until then.
    farewell: Option<Instant>,
}

impl Peer {
    /// Nothing is under way.
    fn rests(&self) -> bool {
        self.calls.is_empty() && self.session.conn.idle() && self.session.conn.out.is_empty()
    }

    fn reads(&self) -> bool {
        !self.ended && self.farewell.is_none() && self.session.conn.out.len() < UNSENT_MAX
    }

    /// When it has to have made progress.
    fn limit(&self, options: &BindOptions) -> Option<Instant> {
        if self.farewell.is_some() {
            return self.farewell;
        }
        let unfinished = self.calls.is_empty() && !self.session.conn.idle();
        let read = unfinished.then(|| self.begun + options.read_timeout);
        let write = self.unsent.map(|since| since + options.write_timeout);
        read.into_iter().chain(write).min()
    }

    /// Reads once; whether something came.
    fn read(&mut self, buffer: &mut [u8], now: Instant) -> Result<bool> {
        match (&self.stream).read(buffer) {
            Ok(0) => {
                self.ended = true;
                Ok(false)
            }
            Ok(count) => {
                if self.calls.is_empty() && self.session.conn.idle() {
                    self.begun = now;
                }
                if now.saturating_duration_since(self.forgiven) > FORGIVE_AFTER {
                    self.forgiven = now;
                    self.session.conn.forgive();
                }
                self.session.conn.receive(&buffer[..count]);
                Ok(true)
            }
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes what the peer takes.
    fn flush(&mut self, now: Instant) -> Result<()> {
        let out = &mut self.session.conn.out;
        let mut sent = 0;
        while sent < out.len() {
            match (&self.stream).write(&out[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        out.drain(..sent);
        if out.is_empty() {
            self.unsent = None;
            out.shrink_to(READ_SIZE);
        } else {
            // A peer that takes a little now and then gets no more time than one that takes nothing.
            self.unsent.get_or_insert(now);
        }
        Ok(())
    }
}

/// All that is connected.
pub(super) struct Front<'a> {
    listener: Option<UnixListener>,
    options: &'a BindOptions,
    crew: &'a Arc<Crew>,
    bell: UnixStream,
    peers: Map<u64, Peer>,
    last: u64,
    accept_after: Option<Instant>,
    buffer: Vec<u8>,
}

impl<'a> Front<'a> {
    pub(super) fn new(
        listener: UnixListener,
        options: &'a BindOptions,
        crew: &'a Arc<Crew>,
        bell: UnixStream,
    ) -> Result<Front<'a>> {
        listener.set_nonblocking(true).context("serve rpc")?;
        Ok(Front {
            listener: Some(listener),
            options,
            crew,
            bell,
            peers: Map::new(),
            last: 0,
            accept_after: None,
            buffer: vec![0; READ_SIZE],
        })
    }

    /// Serves until the word to stop.
    pub(super) fn serve(&mut self, stop: &Stop) -> Result<()> {
        while !stop.is_stopped() {
            self.round(None)?;
        }
        Ok(())
    }

    /// Takes nobody on any more and lets everybody finish; how many did not in time.
    pub(super) fn finish(&mut self) -> usize {
        self.listener = None;
        let until = clock::instant() + self.options.stop_limit;
        for id in self.peers.keys().copied().collect::<Vec<_>>() {
            self.leave(id);
        }
        while !self.peers.is_empty() && clock::instant() < until {
            if self.round(Some(until)).is_err() {
                break; // it cannot wait; the end is near in any case
            }
        }
        self.peers.values().filter(|peer| !peer.calls.is_empty()).count()
    }

    /// Waits until something can be done, at most until `until`, and does it.
    fn round(&mut self, until: Option<Instant>) -> Result<()> {
        let now = clock::instant();
        if self.accept_after.is_some_and(|after| after <= now) {
            self.accept_after = None;
        }
        let listener = self.listener.as_ref().filter(|_| self.accept_after.is_none() && !self.is_full());
        let limits = self.peers.values().filter_map(|peer| peer.limit(self.options));
        let next = limits.chain(until).chain(self.accept_after).min();
        let mut wanted = vec![sys::Wanted { fd: self.bell.as_fd(), read: true, write: false }];
        wanted.extend(listener.map(|listener| sys::Wanted { fd: listener.as_fd(), read: true, write: false }));
        let others = wanted.len();
        for peer in self.peers.values() {
            let write = !peer.session.conn.out.is_empty();
            wanted.push(sys::Wanted { fd: peer.stream.as_fd(), read: peer.reads(), write });
        }
        let ready = sys::poll(&wanted, next.map(|next| next.saturating_duration_since(now))).context("wait for rpc")?;
        let ids: Vec<u64> = self.peers.keys().copied().collect();
        if ready[0].read {
            Crew::hush(&self.bell);
            for (ticket, reply) in self.crew.take_done() {
                self.deliver(ticket, reply);
            }
        }
        let now = clock::instant();
        for (id, ready) in ids.into_iter().zip(&ready[others..]) {
            self.look_after(id, *ready, now);
        }
        if others > 1 && ready[1].read {
            self.accept();
        }
        Ok(())
    }

    /// One connection's part of a round.
    fn look_after(&mut self, id: u64, ready: sys::Ready, now: Instant) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if ready.gone {
            return self.remove(id, "gone");
        }
        if peer.limit(self.options).is_some_and(|limit| limit <= now) {
            if peer.farewell.is_none() && peer.unsent.is_none() {
                return self.part(id, code::NO_ERROR, "nothing complete in time");
            }
            return self.remove(id, "answer not taken in time");
        }
        if ready.read && peer.reads() {
            if let Err(error) = peer.read(&mut self.buffer, now) {
                return self.remove(id, &error.to_string());
            }
            let held = peer.session.conn.held();
            if held > HELD_FREE && self.peers.values().map(|peer| peer.session.conn.held()).sum::<usize>() > HELD_MAX {
                return self.part(id, code::ENHANCE_YOUR_CALM, "too much is held for unfinished requests");
            }
        }
        if ready.read || ready.write {
            self.settle(id);
        }
    }

    /// Takes up what has come and sends what is to be sent.
    fn settle(&mut self, id: u64) {
        loop {
            let Some(peer) = self.peers.get_mut(&id) else { return };
            if peer.farewell.is_some() {
                break; // what it says now is not heard any more
            }
            let next = peer.session.next_call();
            for stream in std::mem::take(&mut peer.session.given_up) {
                if peer.calls.remove(&stream) {
                    self.crew.forget((id, stream));
                }
            }
            match next {
                Ok(Some((stream, call))) => self.take_up(id, stream, call),
                Ok(None) => break,
                Err(fault) => return self.part(id, fault.code, fault.text),
            }
        }
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if let Err(error) = peer.flush(clock::instant()) {
            return self.remove(id, &error.to_string());
        }
        if peer.farewell.is_some() {
            if peer.session.conn.out.is_empty() {
                self.peers.remove(&id);
            }
        } else if peer.ended && peer.calls.is_empty() && peer.session.conn.out.is_empty() {
            self.remove(id, "closed"); // what it has not finished it never will
        } else if peer.leaving && peer.rests() {
            self.part(id, code::NO_ERROR, "asked to leave");
        }
    }

    fn take_up(&mut self, id: u64, stream: u32, mut call: Call) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        call.peer_pid = peer.pid;
        let reply = if self.options.instant.contains(&call.method) {
            self.crew.answer(&call)
        } else if peer.calls.len() >= CALLS_MAX {
            return peer.session.conn.reset(stream, code::REFUSED_STREAM); // it was not run and may be tried again
        } else {
            match self.crew.put((id, stream), call) {
                Ok(()) => {
                    peer.calls.insert(stream);
                    return;
                }
                Err(status) => Err(status),
            }
        };
        peer.begun = clock::instant();
        peer.session.answer(stream, reply);
    }

    fn deliver(&mut self, (id, stream): Ticket, reply: Reply) {
        // The peer may be gone by now, or have given the call up.
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if peer.calls.remove(&stream) {
            peer.begun = clock::instant();
            peer.session.answer(stream, reply);
            self.settle(id);
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPT_MAX {
            if self.is_full() {
                return;
            }
            let accepted = match &self.listener {
                Some(listener) => listener.accept(),
                None => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    self.make_room();
                    if let Err(error) = self.admit(stream) {
                        log::warn!("rpc: connection refused: {error}");
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    log::warn!("rpc: accept connection: {error}");
                    self.accept_after = Some(clock::instant() + ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    fn admit(&mut self, stream: UnixStream) -> Result<()> {
        let (uid, pid) = sys::peer_credentials(&stream).context("read peer credentials")?;
        if self.options.root_only && uid != 0 && uid != sys::effective_uid() {
            return Err(Error::new(format!("process {pid} runs as user {uid}")));
        }
        stream.set_nonblocking(true)?;
        let now = clock::instant();
        let session = Session::new(self.options.methods);
        self.last += 1;
        let peer = Peer {
            session,
            stream,
            pid,
            calls: Set::new(),
            begun: now,
            forgiven: now,
            unsent: None,
            ended: false,
            leaving: false,
            farewell: None,
        };
        self.peers.insert(self.last, peer);
        // Foreign clients wait for our SETTINGS before they believe in the connection.
        self.settle(self.last);
        Ok(())
    }

    /// Whether every place is taken by somebody who waits for an answer.
    fn is_full(&self) -> bool {
        self.peers.len() >= self.options.connections && !self.peers.values().any(|peer| peer.calls.is_empty())
    }

    /// Makes a place for a further connection, if need be that of the one without a call for longest. One that turns out to
    /// have just asked for something stays, and then there is one more than there should be.
    fn make_room(&mut self) {
        while self.peers.len() >= self.options.connections {
            let without = self.peers.iter().filter(|(_, peer)| peer.calls.is_empty());
            let Some((&id, peer)) = without.min_by_key(|(_, peer)| peer.begun) else { return };
            if peer.leaving {
                self.remove(id, "its place is wanted");
            } else {
                self.leave(id);
            }
        }
    }

    /// Asks a peer to go. What it has sent by now is still read and answered.
    fn leave(&mut self, id: u64) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.leaving = true;
        if peer.reads()
            && let Err(error) = peer.read(&mut self.buffer, clock::instant())
        {
            return self.remove(id, &error.to_string());
        }
        self.settle(id);
    }

    /// Ends a connection with a word to the peer.
    fn part(&mut self, id: u64, code: u32, why: &str) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        log::debug!("rpc: connection of process {} ends: {why}", peer.pid);
        for stream in std::mem::take(&mut peer.calls) {
            self.crew.forget((id, stream));
        }
        peer.session.conn.go_away(code); // no-op if it was said already
        peer.farewell = Some(clock::instant() + FAREWELL_TIMEOUT.min(self.options.write_timeout));
        let told = peer.flush(clock::instant());
        if told.is_err() || peer.session.conn.out.is_empty() {
            self.peers.remove(&id);
        }
    }

    /// Ends a connection without one.
    fn remove(&mut self, id: u64, why: &str) {
        let Some(peer) = self.peers.remove(&id) else { return };
        log::debug!("rpc: connection of process {} ends: {why}", peer.pid);
        for stream in peer.calls {
            self.crew.forget((id, stream));
        }
    }
}
