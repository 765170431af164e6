//! The server: a thread per connection, which reads a request, runs the handler and answers, one request after the other.
//!
//! At most [`BindOptions::connections`] are served. Go clients keep a channel open for as long as they live, so a further
//! connection takes the place of the one that has been idle longest (which gets a GOAWAY and reconnects when it needs to);
//! when all are busy it waits, and after [`BindOptions::read_timeout`] it is turned away with a GOAWAY.

use super::{CONTENT_TYPE, Code, Status, find, frame_message, is_grpc, parse_timeout, percent_encode, unframe_message};
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::map::Map;
use crate::rpc::h2::{Conn, Event, Fault, Role, code};
use crate::rpc::hpack::{self, Field};
use crate::rpc::proto;
use crate::rpc::stop::Stop;
use crate::sys;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One read of a connection.
const READ_SIZE: usize = 16_384;
/// Stack of a connection's thread; the handler runs on it.
const STACK_SIZE: usize = 256 * 1024;
/// The count of frames without effect starts anew after this long.
const FORGIVE_AFTER: Duration = Duration::from_secs(10);
/// Pause after accept failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a connection that is closed or turned away may take to be told so.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// A request, as the handler gets it.
#[derive(Clone, Debug)]
pub struct Call {
    /// One of [`BindOptions::methods`].
    pub method: &'static str,
    /// The encoded message.
    pub body: Vec<u8>,
    /// When the client stops waiting, on [`clock::instant`]'s clock; `None` when it waits for ever.
    pub deadline: Option<Instant>,
    /// Process id of the client, for the log.
    pub peer_pid: i32,
}

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct BindOptions {
    /// Permissions of the socket.
    pub mode: u32,
    /// Whether peers other than root and our own user are turned away.
    pub root_only: bool,
    /// Paths that are served; others are answered `UNIMPLEMENTED` as soon as their header stands.
    pub methods: &'static [&'static str],
    /// Connections served at once.
    pub connections: usize,
    /// How long a request, or the taking of an answer, may make no end once begun; also the wait for a free thread.
    pub read_timeout: Duration,
    /// How long the peer may take to take what is written.
    pub write_timeout: Duration,
    /// How long running calls may go on after the word to stop.
    pub stop_limit: Duration,
}

impl Default for BindOptions {
    /// As `design.md` 5 and 6 want it: 0600, root peers, 32 connections, 10 s, 5 s to stop.
    fn default() -> Self {
        BindOptions {
            mode: 0o600,
            root_only: true,
            methods: proto::path::ALL,
            connections: 32,
            read_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            stop_limit: Duration::from_secs(5),
        }
    }
}

/// A socket that is bound and listens.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
    options: BindOptions,
}

impl Server {
    /// Binds `path`. The parent directory is made (0755) if need be and whatever stands at the path is replaced. The
    /// socket gets its permissions inside a private directory and is then moved into place, so there is no moment in which
    /// it is there with others.
    pub fn bind(path: &Path, options: BindOptions) -> Result<Server> {
        let what = || format!("bind {}", path.display());
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).with_context(what)?;
        // The name is short because a socket's path has at most 107 bytes. The process id keeps two servers apart; what
        // bears ours was left by a dead process.
        let private = parent.join(format!(".s{}", std::process::id()));
        let make = || -> std::io::Result<(UnixListener, (u64, u64))> {
            if private.exists() {
                fs::remove_dir_all(&private)?;
            }
            fs::DirBuilder::new().mode(0o700).create(&private)?;
            let made = private.join("s");
            let listener = UnixListener::bind(&made)?;
            fs::set_permissions(&made, fs::Permissions::from_mode(options.mode))?;
            let metadata = fs::symlink_metadata(&made)?;
            if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
                fs::remove_dir(path)?; // a container runtime makes one for a mount whose source is missing
            }
            fs::rename(&made, path)?;
            Ok((listener, (metadata.dev(), metadata.ino())))
        };
        let made = make();
        fs::remove_dir_all(&private).ok(); // empty, or left-overs of a failure that is being reported
        let (listener, inode) = made.with_context(what)?;
        Ok(Server { listener, path: path.to_owned(), inode, options })
    }

    /// Serves until `stop`: then the socket goes, running calls may finish within [`BindOptions::stop_limit`], and every
    /// client is told with GOAWAY. The handler runs on the connection's thread; while it does, further requests of that
    /// connection wait.
    pub fn serve<H>(self, handler: H, stop: &Stop) -> Result<()>
    where
        H: Fn(&Call) -> std::result::Result<Vec<u8>, Status> + Send + Sync + 'static,
    {
        let handler = Arc::new(handler);
        let registry = Arc::new(Registry::default());
        let listener = self.listener.try_clone().context("serve rpc")?;
        let connections = Arc::clone(&registry);
        stop.on_stop(move || {
            sys::shutdown(&listener).ok(); // cannot fail on a listening socket; accept fails with EINVAL
            connections.stop();
        });
        let result = self.accept_loop(&handler, &registry, stop);
        self.remove_socket();
        registry.stop();
        let left = registry.wait_until_empty(self.options.stop_limit);
        if left > 0 {
            log::warn!("rpc: {left} calls still running after {:?} are abandoned", self.options.stop_limit);
        }
        result
    }

    fn accept_loop<H>(&self, handler: &Arc<H>, registry: &Arc<Registry>, stop: &Stop) -> Result<()>
    where
        H: Fn(&Call) -> std::result::Result<Vec<u8>, Status> + Send + Sync + 'static,
    {
        loop {
            let stream = match self.listener.accept() {
                _ if stop.is_stopped() => return Ok(()),
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::InvalidInput => {
                    return Err(Error::from(error).context("accept rpc connection"));
                }
                Err(error) => {
                    if !matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) {
                        log::warn!("rpc: accept connection: {error}");
                        std::thread::sleep(ACCEPT_PAUSE);
                    }
                    continue;
                }
            };
            if let Err(error) = self.admit(stream, handler, registry) {
                log::warn!("rpc: connection refused: {error}");
            }
        }
    }

    fn admit<H>(&self, stream: UnixStream, handler: &Arc<H>, registry: &Arc<Registry>) -> Result<()>
    where
        H: Fn(&Call) -> std::result::Result<Vec<u8>, Status> + Send + Sync + 'static,
    {
        let (uid, pid) = sys::peer_credentials(&stream).context("read peer credentials")?;
        if self.options.root_only && uid != 0 && uid != sys::effective_uid() {
            return Err(Error::new(format!("process {pid} runs as user {uid}")));
        }
        stream.set_write_timeout(Some(self.options.write_timeout))?;
        let stream = Arc::new(stream);
        let limits = (self.options.connections, self.options.read_timeout);
        let Some(slot) = Registry::enter(registry, &stream, limits) else {
            let mut farewell = Conn::new(Role::Server);
            farewell.go_away(code::NO_ERROR);
            stream.set_write_timeout(Some(FAREWELL_TIMEOUT))?;
            (&*stream).write_all(&farewell.out)?;
            return Err(Error::new(format!("process {pid}: all {} threads are busy", self.options.connections)));
        };
        let handler = Arc::clone(handler);
        let mut connection = Connection {
            session: Session::new(self.options.methods),
            stream,
            slot,
            peer_pid: pid,
            read_timeout: self.options.read_timeout,
            write_timeout: self.options.write_timeout,
        };
        std::thread::Builder::new()
            .name(format!("rpc-{}", connection.slot.number))
            .stack_size(STACK_SIZE)
            .spawn(move || connection.run(&*handler))
            .map(drop)
            .context("start thread")
    }

    /// Removes the socket unless another server has put its own there.
    fn remove_socket(&self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("rpc: remove {}: {error}", self.path.display());
        }
    }
}

/// Who is connected.
#[derive(Default)]
struct Registry {
    state: Mutex<RegistryState>,
    changed: Condvar,
}

#[derive(Default)]
struct RegistryState {
    open: Map<usize, Open>,
    turn: u64, // counts up; orders the idle by age
    stopped: bool,
}

struct Open {
    stream: Arc<UnixStream>,
    idle_since: Option<u64>,
    leaving: bool,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, RegistryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection: a free one, else that of the one idle longest, else the first that gets free in time.
    fn enter(registry: &Arc<Registry>, stream: &Arc<UnixStream>, (limit, timeout): (usize, Duration)) -> Option<Slot> {
        let full = |state: &mut RegistryState| {
            if state.open.len() >= limit && !state.stopped && !state.open.values().any(|open| open.leaving) {
                let idle = state.open.values_mut().filter(|open| open.idle_since.is_some());
                if let Some(oldest) = idle.min_by_key(|open| open.idle_since) {
                    oldest.leave();
                }
            }
            state.open.len() >= limit && !state.stopped
        };
        let until = clock::instant() + timeout;
        let mut state = registry.lock();
        while full(&mut state) {
            let left = until.saturating_duration_since(clock::instant());
            if left.is_zero() {
                return None;
            }
            state = registry.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.stopped {
            return None;
        }
        let number = (0..limit).find(|number| !state.open.contains_key(number))?;
        state.open.insert(number, Open { stream: Arc::clone(stream), idle_since: None, leaving: false });
        drop(state);
        Some(Slot { registry: Arc::clone(registry), number })
    }

    fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        state.open.values_mut().for_each(Open::leave);
        self.changed.notify_all();
    }

    /// Waits for the connections to end; those that do not are cut off. Returns how many.
    fn wait_until_empty(&self, limit: Duration) -> usize {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), limit, |state| !state.open.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        for open in state.open.values() {
            open.stream.shutdown(Shutdown::Both).ok(); // it may be closed by now
        }
        state.open.len()
    }
}

impl Open {
    /// Ends the connection when nothing is under way on it. One that waits for a request is woken; what the peer has sent
    /// by then is still read and answered. One that serves a request is not touched: a peer whose acknowledgements meet a
    /// closed end takes its answer for lost.
    fn leave(&mut self) {
        self.leaving = true;
        if self.idle_since.is_some() {
            self.stream.shutdown(Shutdown::Read).ok(); // it may be closed by now
        }
    }
}

/// A connection's place in the registry.
struct Slot {
    registry: Arc<Registry>,
    number: usize,
}

impl Slot {
    /// Whether the connection is to end instead.
    fn set_idle(&self, idle: bool) -> bool {
        let mut state = self.registry.lock();
        state.turn += 1;
        let turn = state.turn;
        let mut leaving = state.stopped;
        if let Some(open) = state.open.get_mut(&self.number) {
            open.idle_since = idle.then_some(turn);
            leaving |= open.leaving;
        }
        // Somebody may be waiting for a place.
        if idle {
            self.registry.changed.notify_all();
        }
        idle && leaving
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.registry.lock().open.remove(&self.number);
        self.registry.changed.notify_all();
    }
}

struct Connection {
    session: Session,
    stream: Arc<UnixStream>,
    slot: Slot,
    peer_pid: i32,
    read_timeout: Duration,
    write_timeout: Duration,
}

impl Connection {
    fn run<H>(&mut self, handler: &H)
    where
        H: Fn(&Call) -> std::result::Result<Vec<u8>, Status>,
    {
        if let Err(error) = self.serve(handler) {
            log::debug!("rpc: connection of process {}: {error}", self.peer_pid);
        }
        self.session.conn.go_away(code::NO_ERROR); // no-op if it was said already
        let timeout = FAREWELL_TIMEOUT.min(self.write_timeout);
        if self.stream.set_write_timeout(Some(timeout)).is_ok() {
            self.flush(timeout).ok(); // the peer may be gone, which is why we are here
        }
    }

    fn serve<H>(&mut self, handler: &H) -> Result<()>
    where
        H: Fn(&Call) -> std::result::Result<Vec<u8>, Status>,
    {
        let mut buffer = vec![0; READ_SIZE];
        let mut begun = clock::instant(); // of the request that is under way
        let mut forgiven = begun;
        let mut silent = true; // the peer has sent nothing yet
        loop {
            while let Some((stream, mut call)) = self.session.next_call()? {
                call.peer_pid = self.peer_pid;
                // A foreign client may wait for our SETTINGS before it believes in the connection, and the handler may
                // take long.
                self.flush(self.write_timeout)?;
                let expired = call.deadline.is_some_and(|deadline| deadline <= clock::instant());
                let reply = if expired {
                    Err(Status::new(Code::DEADLINE_EXCEEDED, "deadline passed before the call was taken up"))
                } else {
                    handler(&call)
                };
                self.session.answer(stream, reply);
                self.flush(self.write_timeout)?;
                begun = clock::instant();
            }
            self.flush(self.write_timeout)?;
            let idle = self.session.conn.idle();
            let left = if idle {
                None
            } else {
                let left = (begun + self.read_timeout).saturating_duration_since(clock::instant());
                if left.is_zero() {
                    return Err(Error::new(format!("nothing complete within {:?}", self.read_timeout)));
                }
                Some(left)
            };
            self.stream.set_read_timeout(left)?;
            if self.slot.set_idle(idle || silent) {
                return Ok(());
            }
            let count = match (&*self.stream).read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => continue,
                Err(error) => return Err(error.into()),
            };
            self.slot.set_idle(false);
            silent = false;
            let now = clock::instant();
            if idle {
                begun = now;
            }
            if now.saturating_duration_since(forgiven) > FORGIVE_AFTER {
                forgiven = now;
                self.session.conn.forgive();
            }
            self.session.conn.receive(&buffer[..count]);
        }
    }

    fn flush(&mut self, timeout: Duration) -> Result<()> {
        let out = &mut self.session.conn.out;
        if out.is_empty() {
            return Ok(());
        }
        let until = clock::instant() + timeout;
        let mut rest = out.as_slice();
        while !rest.is_empty() {
            // A peer that takes a little now and then gets no more time than one that takes nothing.
            if clock::instant() > until {
                return Err(Error::new(format!("answer not taken within {timeout:?}")));
            }
            match (&*self.stream).write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    out.clear(); // a torn frame cannot be mended
                    return Err(error.into());
                }
            }
        }
        out.clear();
        if out.capacity() > READ_SIZE {
            out.shrink_to(READ_SIZE);
        }
        Ok(())
    }
}

/// gRPC on an HTTP/2 connection, without I/O.
struct Session {
    conn: Conn,
    methods: &'static [&'static str],
    accepted: Map<u32, Accepted>,
}

/// A request whose header is good and whose body may be on its way.
struct Accepted {
    method: &'static str,
    deadline: Option<Instant>,
}

/// What to do with a request after its header.
enum Verdict {
    Accept(Accepted),
    Refuse(Status),
    Http(&'static str),
    Malformed,
}

impl Session {
    fn new(methods: &'static [&'static str]) -> Self {
        Session { conn: Conn::new(Role::Server), methods, accepted: Map::new() }
    }

    /// The next complete request in what was received.
    fn next_call(&mut self) -> std::result::Result<Option<(u32, Call)>, Fault> {
        while let Some(event) = self.conn.next_event()? {
            match event {
                Event::Opened { stream } => self.opened(stream),
                Event::Complete { stream, body, .. } => {
                    let Some(accepted) = self.accepted.remove(&stream) else { continue };
                    match unframe_message(body) {
                        Ok(body) => {
                            let Accepted { method, deadline } = accepted;
                            return Ok(Some((stream, Call { method, body, deadline, peer_pid: 0 })));
                        }
                        Err(status) => self.answer(stream, Err(status)),
                    }
                }
                Event::TooLarge { stream } => {
                    self.accepted.remove(&stream);
                    let text = format!("message larger than {}", super::MESSAGE_LIMIT);
                    self.answer(stream, Err(Status::new(Code::RESOURCE_EXHAUSTED, text)));
                }
                Event::Reset { stream, .. } => drop(self.accepted.remove(&stream)),
                Event::GoAway { .. } => {} // it will close when it has its answers
            }
        }
        Ok(None)
    }

    fn opened(&mut self, stream: u32) {
        match judge(self.conn.head(stream).unwrap_or_default(), self.methods) {
            Verdict::Accept(accepted) => drop(self.accepted.insert(stream, accepted)),
            Verdict::Refuse(status) => self.answer(stream, Err(status)),
            Verdict::Http(status) => {
                let mut head = Vec::new();
                hpack::encode(&mut head, ":status", status);
                self.conn.respond_head(stream, &head);
            }
            Verdict::Malformed => self.conn.reset(stream, code::PROTOCOL_ERROR),
        }
    }

    fn answer(&mut self, stream: u32, reply: std::result::Result<Vec<u8>, Status>) {
        let mut head = Vec::with_capacity(32);
        hpack::encode(&mut head, ":status", "200");
        hpack::encode(&mut head, "content-type", CONTENT_TYPE);
        match reply.and_then(|message| frame_message(&message)) {
            Ok(body) => {
                let mut trailers = Vec::with_capacity(16);
                hpack::encode(&mut trailers, "grpc-status", "0");
                self.conn.respond(stream, &head, body, trailers);
            }
            Err(status) => {
                hpack::encode(&mut head, "grpc-status", &status.code.0.to_string());
                if !status.message.is_empty() {
                    hpack::encode(&mut head, "grpc-message", &percent_encode(&status.message));
                }
                self.conn.respond_head(stream, &head);
            }
        }
    }
}

/// Whether a request's header is well-formed (RFC 9113 8.2, 8.3) and one of gRPC for a method that is served.
fn judge(head: &[Field], methods: &'static [&'static str]) -> Verdict {
    let mut regular = false;
    for (at, field) in head.iter().enumerate() {
        let pseudo = field.name.starts_with(b":");
        let twice = pseudo && head[..at].iter().any(|before| before.name == field.name);
        if field.name.is_empty() || field.name.iter().any(u8::is_ascii_uppercase) || (pseudo && regular) || twice {
            return Verdict::Malformed;
        }
        regular |= !pseudo;
    }
    let (Some(http_method), Some(path)) = (find(head, ":method"), find(head, ":path")) else {
        return Verdict::Malformed;
    };
    if http_method != b"POST" {
        return Verdict::Http("405");
    }
    if !is_grpc(find(head, "content-type")) {
        return Verdict::Http("415");
    }
    let Some(method) = methods.iter().find(|method| method.as_bytes() == path) else {
        let text = format!("unknown method {}", String::from_utf8_lossy(path));
        return Verdict::Refuse(Status::new(Code::UNIMPLEMENTED, text));
    };
    let deadline = match find(head, "grpc-timeout").map(parse_timeout) {
        None => None,
        Some(Some(timeout)) => Some(clock::instant() + timeout),
        Some(None) => return Verdict::Refuse(Status::new(Code::INTERNAL, "malformed grpc-timeout")),
    };
    Verdict::Accept(Accepted { method, deadline })
}

/// Feeds foreign bytes to a server's connection, as they are and behind a valid start, in pieces whose size the first byte
/// gives. For fuzzing: it must come to an end without panic, and what it has to say must stay in proportion.
#[doc(hidden)]
pub fn fuzz_h2_server(bytes: &[u8]) {
    const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let piece = usize::from(bytes.first().copied().unwrap_or(0)) + 1;
    for start in [&[][..], &[crate::rpc::h2::PREFACE, &EMPTY_SETTINGS].concat()] {
        let mut session = Session::new(proto::path::ALL);
        session.conn.receive(start);
        'connection: for piece in bytes.chunks(piece) {
            loop {
                match session.next_call() {
                    Ok(Some((stream, call))) => session.answer(stream, Ok(call.body)),
                    Ok(None) => break,
                    Err(_) => break 'connection,
                }
            }
            session.conn.receive(piece);
            session.conn.out.clear();
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
