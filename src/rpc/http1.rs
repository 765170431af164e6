//! A small HTTP/1.1 server for metrics, introspection and the endpoints of the sandbox: one thread per connection with a
//! cap, keep-alive, GET, PUT, POST and PATCH, bounded heads and bodies, a time-out on every read and write.
//!
//! Answers may be streams. No TLS, no chunked requests, no HTTP/1.0 keep-alive: its clients are Prometheus, `curl`, the AWS SDKs and ourselves on
//! one machine. It knows no path; what is served is the handler's.

use crate::clock;
use crate::error::{Context, Result};
use crate::model::map::Map;
use crate::sys;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; a further one is answered 503 and closed.
    pub connections: usize,
    /// Request line and headers, in bytes.
    pub head: usize,
    /// Body, in bytes.
    pub body: usize,
    /// Header lines.
    pub headers: usize,
    /// How long a connection may stay silent between two requests.
    pub idle: Duration,
    /// How long one request may take to arrive, and its answer to leave.
    pub transfer: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 64,
            head: 8 << 10,
            body: 1 << 20,
            headers: 64,
            idle: Duration::from_mins(1),
            transfer: Duration::from_secs(10),
        }
    }
}

/// The methods that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "HTTP's own names")]
pub enum Method {
    Get,
    Put,
    Post,
    Patch,
}

impl Method {
    /// As on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Post => "POST",
            Method::Patch => "PATCH",
        }
    }
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Method.
    pub method: Method,
    /// Path, as sent (not percent-decoded), without the query.
    pub path: String,
    /// What follows the `?`, as sent; empty without one.
    pub query: String,
    /// Headers in order; names in lower case, values trimmed.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
    /// Who asks, if by TCP.
    pub peer: Option<SocketAddr>,
}

impl Request {
    /// The first header of that name (lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// Headers besides `content-length` and `connection`, which are the server's.
    pub headers: Vec<(&'static str, String)>,
    /// Body.
    pub body: Vec<u8>,
}

impl Response {
    /// An answer with a content type.
    pub fn new(status: u16, content_type: &str, body: impl Into<Vec<u8>>) -> Response {
        Response { status, headers: vec![("content-type", content_type.to_owned())], body: body.into() }
    }

    /// Plain text.
    pub fn text(status: u16, body: impl Into<String>) -> Response {
        Response::new(status, "text/plain; charset=utf-8", body.into())
    }

    /// Adds a header.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Response {
        self.headers.push((name, value.into()));
        self
    }
}

/// A piece of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Send this.
    Bytes(Vec<u8>),
    /// There was nothing for a while. It is asked again, unless the peer has gone.
    Nothing,
    /// The stream ends well.
    End,
    /// The connection breaks.
    Cut,
}

/// Asked for the pieces of a stream, on the thread of the connection; it waits itself, a second or so at a time.
pub type Pieces = dyn FnMut() -> Piece + Send;

/// What a handler makes of a request.
pub enum Verdict {
    /// Answer it.
    Answer(Response),
    /// Answer it with a body that comes in pieces; that of the response is not sent.
    Stream(Response, Box<Pieces>),
    /// Close the connection without a word (the sandbox loses answers on purpose).
    HangUp,
}

impl From<Response> for Verdict {
    fn from(response: Response) -> Verdict {
        Verdict::Answer(response)
    }
}

/// Answers requests; called on the thread of the connection.
pub type Handler = dyn Fn(&Request) -> Verdict + Send + Sync;

struct Shared {
    stopping: AtomicBool,
    open: Mutex<Map<u64, TcpStream>>,
    limits: Limits,
    handler: Arc<Handler>,
}

impl Shared {
    fn open(&self) -> std::sync::MutexGuard<'_, Map<u64, TcpStream>> {
        // The map is whole after every statement, so a panic elsewhere does not spoil it.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A bound socket.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

impl Listener {
    /// Binds a unix socket for root alone. A socket that nobody listens on any more is replaced; anything else at the path
    /// is left alone and an error.
    pub fn unix(path: &Path) -> Result<Listener> {
        let what = || format!("listen on {}", path.display());
        if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            match sys::connect_unix(path, Duration::from_secs(1)) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).with_context(what)?;
                }
                _ => return Err(io::Error::from(ErrorKind::AddrInUse)).with_context(what),
            }
        }
        let listener = UnixListener::bind(path).with_context(what)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(what)?;
        Ok(Listener::Unix(listener))
    }

    // Streams of both kinds go by one type: reads, writes, time-outs and shutdown are the same calls for every stream
    // socket, and only these are made on it.
    fn accept(&self) -> io::Result<(TcpStream, Option<SocketAddr>)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok((stream, Some(peer)))
            }
            Listener::Unix(listener) => Ok((OwnedFd::from(listener.accept()?.0).into(), None)),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Unix(listener) => listener.as_fd(),
        }
    }
}

/// A running server. Dropping it closes the listener and every connection, and waits for the accepting thread.
pub struct Server {
    shared: Arc<Shared>,
    listener: Arc<Listener>,
    address: Option<SocketAddr>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves on a bound listener (bound in whatever network namespace it shall serve). `name` is that of the threads,
    /// at most 10 bytes.
    pub fn start(name: &'static str, listener: TcpListener, limits: Limits, handler: Arc<Handler>) -> Result<Server> {
        listener.set_nonblocking(false).context("set the listener blocking")?;
        Server::serve(name, Listener::Tcp(listener), limits, handler)
    }

    /// The same on a socket of either kind, which must be a blocking one.
    pub fn serve(name: &'static str, listener: Listener, limits: Limits, handler: Arc<Handler>) -> Result<Server> {
        let address = match &listener {
            Listener::Tcp(listener) => Some(listener.local_addr().context("read the listener's address")?),
            Listener::Unix(_) => None,
        };
        let listener = Arc::new(listener);
        let shared =
            Arc::new(Shared { stopping: AtomicBool::new(false), open: Mutex::new(Map::new()), limits, handler });
        let (for_thread, sharing) = (Arc::clone(&listener), Arc::clone(&shared));
        let accepting = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || accept_all(name, &for_thread, &sharing))
            .with_context(|| format!("start thread {name}"))?;
        Ok(Server { shared, listener, address, accepting: Some(accepting) })
    }

    /// Where it listens; nowhere (`0.0.0.0:0`) if not by TCP.
    pub fn address(&self) -> SocketAddr {
        self.address.unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the accept; a failure means that it is not blocked any more.
        let _ = sys::shutdown(&*self.listener);
        if let Some(thread) = self.accepting.take() {
            let _ = thread.join();
        }
        for stream in self.shared.open().values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept_all(name: &str, listener: &Listener, shared: &Arc<Shared>) {
    let mut next = 0_u64;
    while !shared.stopping.load(Ordering::SeqCst) {
        let (stream, peer) = match listener.accept() {
            Ok(pair) => pair,
            Err(_) if shared.stopping.load(Ordering::SeqCst) => return,
            Err(error) => {
                // A connection that died in the queue is nobody's fault; out of descriptors passes. Never spin.
                log::warn!("{name}: accept: {error}");
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        next += 1;
        let id = next;
        if let Err(error) = admit(name, id, stream, peer, shared) {
            log::warn!("{name}: connection from {peer:?}: {error}");
        }
    }
}

fn admit(name: &str, id: u64, mut stream: TcpStream, peer: Option<SocketAddr>, shared: &Arc<Shared>) -> Result<()> {
    stream.set_write_timeout(Some(shared.limits.transfer))?;
    {
        let mut open = shared.open();
        if open.len() >= shared.limits.connections {
            drop(open);
            stream.write_all(&render(&Response::text(503, "too many connections\n"), true))?;
            return Ok(());
        }
        open.insert(id, stream.try_clone()?);
    }
    let sharing = Arc::clone(shared);
    let started = std::thread::Builder::new().name(format!("{name}-{}", id % 10_000)).spawn(move || {
        let done = serve(Connection { stream, buffer: Vec::new() }, peer, &sharing);
        sharing.open().remove(&id);
        if let Err(error) = done {
            log::debug!("http connection from {peer:?}: {error}");
        }
    });
    started.map(drop).map_err(|error| {
        shared.open().remove(&id);
        error.into()
    })
}

struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>, // read but not consumed
}

impl Connection {
    // Reads more; false at the end of the stream.
    fn fill(&mut self, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(clock::instant());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.buffer.extend_from_slice(&chunk[..count]);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(error),
        }
    }
}

fn serve(mut connection: Connection, peer: Option<SocketAddr>, shared: &Shared) -> Result<()> {
    let limits = &shared.limits;
    loop {
        if connection.buffer.is_empty() {
            match connection.fill(clock::instant() + limits.idle) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        let deadline = clock::instant() + limits.transfer;
        let (request, close) = match receive(&mut connection, peer, limits, deadline) {
            Ok(Some(received)) => received,
            Ok(None) => return Ok(()),
            Err(Bad::Refused(status, reason)) => {
                let refusal = Response::text(status, format!("{reason}\n"));
                return Ok(connection.stream.write_all(&render(&refusal, true))?);
            }
            Err(Bad::Io(error)) => return Err(error.into()),
        };
        let close = close || shared.stopping.load(Ordering::SeqCst);
        match (shared.handler)(&request) {
            Verdict::Answer(response) => connection.stream.write_all(&render(&response, close))?,
            Verdict::Stream(response, mut pieces) => {
                if !stream(&mut connection.stream, &response, &mut pieces, shared)? {
                    return Ok(());
                }
            }
            Verdict::HangUp => return Ok(()),
        }
        if close {
            return Ok(());
        }
    }
}

// Sends a chunked body (RFC 9112 7.1); whether the connection can be used on.
fn stream(to: &mut TcpStream, response: &Response, pieces: &mut Pieces, shared: &Shared) -> Result<bool> {
    let mut head = head_of(response);
    head.push_str("transfer-encoding: chunked\r\n\r\n");
    to.write_all(head.as_bytes())?;
    while !shared.stopping.load(Ordering::SeqCst) {
        match pieces() {
            Piece::Bytes(bytes) if !bytes.is_empty() => {
                let chunk = [format!("{:x}\r\n", bytes.len()).as_bytes(), &bytes, b"\r\n"].concat();
                to.write_all(&chunk)?;
            }
            Piece::Nothing if gone(to)? => return Ok(false),
            Piece::Bytes(_) | Piece::Nothing => {} // an empty chunk would be the end
            Piece::End => {
                to.write_all(b"0\r\n\r\n")?;
                return Ok(true);
            }
            Piece::Cut => return Ok(false),
        }
    }
    Ok(false)
}

fn gone(stream: &TcpStream) -> io::Result<bool> {
    stream.set_nonblocking(true)?;
    let peeked = stream.peek(&mut [0]);
    stream.set_nonblocking(false)?;
    Ok(match peeked {
        Ok(count) => count == 0,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    })
}

#[derive(Debug)]
enum Bad {
    Refused(u16, &'static str),
    Io(io::Error),
}

impl From<io::Error> for Bad {
    fn from(error: io::Error) -> Bad {
        Bad::Io(error)
    }
}

// One request and whether the connection is to be closed after it; `None` when the peer went away before it began.
fn receive(
    connection: &mut Connection,
    peer: Option<SocketAddr>,
    limits: &Limits,
    deadline: Instant,
) -> Result<Option<(Request, bool)>, Bad> {
    let end = loop {
        if let Some(at) = connection.buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            if at > limits.head {
                return Err(Bad::Refused(431, "request head too large"));
            }
            break at;
        }
        if connection.buffer.len() > limits.head {
            return Err(Bad::Refused(431, "request head too large"));
        }
        if !connection.fill(deadline)? {
            return if connection.buffer.is_empty() { Ok(None) } else { Err(Bad::Refused(400, "incomplete request")) };
        }
    };
    let head = parse_head(&connection.buffer[..end], limits.headers)?;
    connection.buffer.drain(..end + 4);
    let length = head.length.unwrap_or(0);
    if length > limits.body {
        return Err(Bad::Refused(413, "body too large"));
    }
    if head.expects && connection.buffer.len() < length {
        connection.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    while connection.buffer.len() < length {
        if !connection.fill(deadline)? {
            return Err(Bad::Refused(400, "incomplete body"));
        }
    }
    let body = connection.buffer.drain(..length).collect();
    let Head { method, path, query, headers, close, .. } = head;
    Ok(Some((Request { method, path, query, headers, body, peer }, close)))
}

#[derive(Debug)]
struct Head {
    method: Method,
    path: String,
    query: String,
    headers: Vec<(String, String)>,
    length: Option<usize>,
    close: bool,
    expects: bool,
}

// RFC 9112 3 and 5, strictly: no folding, no white space before the colon, one consistent length.
fn parse_head(bytes: &[u8], most_headers: usize) -> Result<Head, Bad> {
    let bad = |reason| Bad::Refused(400, reason);
    let text = std::str::from_utf8(bytes).map_err(|_| bad("head is not text"))?;
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or("").split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(bad("malformed request line"));
    };
    let old = match version {
        "HTTP/1.1" => false,
        "HTTP/1.0" => true,
        _ => return Err(Bad::Refused(505, "only HTTP/1.1")),
    };
    let method = match method {
        "GET" => Method::Get,
        "PUT" => Method::Put,
        "POST" => Method::Post,
        "PATCH" => Method::Patch,
        _ => return Err(Bad::Refused(501, "method not implemented")),
    };
    if !target.starts_with('/') || target.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(bad("malformed target"));
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut head = Head {
        method,
        path: path.to_owned(),
        query: query.to_owned(),
        headers: Vec::new(),
        length: None,
        close: old,
        expects: false,
    };
    for line in lines {
        if head.headers.len() == most_headers {
            return Err(Bad::Refused(431, "too many headers"));
        }
        let (name, value) = line.split_once(':').ok_or(bad("malformed header"))?;
        let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if name.is_empty() || !name.bytes().all(token) || value.bytes().any(|b| b != b'\t' && b.is_ascii_control()) {
            return Err(bad("malformed header"));
        }
        head.note(name.to_ascii_lowercase(), value.trim_matches([' ', '\t']))?;
    }
    Ok(head)
}

impl Head {
    fn note(&mut self, name: String, value: &str) -> Result<(), Bad> {
        match name.as_str() {
            "content-length" => {
                let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
                let length = digits.then(|| value.parse().ok()).flatten().ok_or(Bad::Refused(400, "bad length"))?;
                if self.length.is_some_and(|before| before != length) {
                    return Err(Bad::Refused(400, "two lengths"));
                }
                self.length = Some(length);
            }
            "transfer-encoding" => return Err(Bad::Refused(501, "transfer codings are not implemented")),
            "connection" => {
                self.close |= value.split(',').any(|option| option.trim().eq_ignore_ascii_case("close"));
            }
            "expect" => self.expects = value.eq_ignore_ascii_case("100-continue"),
            _ => {}
        }
        self.headers.push((name, value.to_owned()));
        Ok(())
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        410 => "Gone",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Status",
    }
}

// Without the empty line at its end.
fn head_of(response: &Response) -> String {
    let mut head = format!("HTTP/1.1 {} {}\r\n", response.status, reason(response.status));
    for (name, value) in &response.headers {
        // A line break in a value would let it forge headers.
        let value: String = value.chars().filter(|c| !c.is_control()).collect();
        head.extend([*name, ": ", &value, "\r\n"]);
    }
    head
}

fn render(response: &Response, close: bool) -> Vec<u8> {
    let mut head = head_of(response);
    head.extend(["content-length: ", &response.body.len().to_string(), "\r\n"]);
    head.push_str(if close { "connection: close\r\n\r\n" } else { "\r\n" });
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(&response.body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(head: &str, expect: Result<(&str, &str, Option<usize>, bool), u16>) {
        let got = match parse_head(head.as_bytes(), 4) {
            Ok(head) => Ok((head.path, head.query, head.length, head.close)),
            Err(Bad::Refused(status, _)) => Err(status),
            Err(Bad::Io(error)) => panic!("{error}"),
        };
        let expect = expect.map(|(path, query, length, close)| (path.to_owned(), query.to_owned(), length, close));
        assert_eq!(got, expect, "{head:?}");
    }

    #[test]
    fn heads_are_parsed_strictly() {
        check("GET / HTTP/1.1", Ok(("/", "", None, false)));
        check("GET /a?b=c HTTP/1.1\r\nHost: x\r\nConnection: Keep, CLOSE", Ok(("/a", "b=c", None, true)));
        check("POST / HTTP/1.1\r\nContent-Length: 12", Ok(("/", "", Some(12), false)));
        check("PUT / HTTP/1.0", Ok(("/", "", None, true)));
        check("HEAD / HTTP/1.1", Err(501));
        check("GET / HTTP/2", Err(505));
        check("GET  / HTTP/1.1", Err(400));
        check("GET x HTTP/1.1", Err(400));
        check("GET / HTTP/1.1\r\nHost : x", Err(400));
        check("GET / HTTP/1.1\r\nHost: x\r\n folded", Err(400));
        check("GET / HTTP/1.1\r\nA: x\ny", Err(400));
        check("POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2", Err(400));
        check("POST / HTTP/1.1\r\nContent-Length: +1", Err(400));
        check("POST / HTTP/1.1\r\nContent-Length: 99999999999999999999", Err(400));
        check("POST / HTTP/1.1\r\nTransfer-Encoding: chunked", Err(501));
        check("GET / HTTP/1.1\r\na: 1\r\nb: 1\r\nc: 1\r\nd: 1\r\ne: 1", Err(431));
    }

    proptest::proptest! {
        #[test]
        fn hostile_heads_never_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = parse_head(&bytes, 4);
            let line = [b"GET /", bytes.as_slice(), b" HTTP/1.1\r\n", bytes.as_slice()].concat();
            if let Ok(head) = parse_head(&line, 4) {
                proptest::prop_assert!(head.headers.len() <= 4 && !head.path.contains(['\r', '\n', '?', ' ']));
            }
        }
    }

    fn server(limits: Limits) -> Server {
        server_at("127.0.0.1:0", limits)
    }

    fn server_at(address: &str, limits: Limits) -> Server {
        let handler: Arc<Handler> = Arc::new(|request: &Request| match request.path.as_str() {
            "/lost" => Verdict::HangUp,
            "/stream" | "/cut" => {
                let last = if request.path == "/cut" { Piece::Cut } else { Piece::End };
                let mut pieces = vec![last, Piece::Bytes(b"two".into()), Piece::Nothing, Piece::Bytes(b"one,".into())];
                Verdict::Stream(Response::text(200, ""), Box::new(move || pieces.pop().unwrap_or(Piece::Cut)))
            }
            path => {
                let text = format!("{} {path} {} {}", request.method.as_str(), request.query, request.body.len());
                Response::text(200, text).into()
            }
        });
        Server::start("test", TcpListener::bind(address).unwrap(), limits, handler).unwrap()
    }

    fn talk(server: &Server, send: &[u8]) -> String {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(send).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn keeps_a_connection_alive() {
        let server = server(Limits::default());
        let text = talk(&server, b"GET /a?x HTTP/1.1\r\n\r\nPOST /b HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc");
        assert!(text.contains("GET /a x 0") && text.ends_with("POST /b  3"), "{text}");
        assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 2);
    }

    #[test]
    fn streams_go_out_in_chunks() {
        let server = server(Limits::default());
        let body = "transfer-encoding: chunked\r\n\r\n4\r\none,\r\n3\r\ntwo\r\n";
        // The peer must not have gone, so its side stays open.
        let talk = |path: &str, more: &str| {
            let mut stream = TcpStream::connect(server.address()).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\n\r\n{more}").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };
        let whole = talk("/stream", "GET /b HTTP/1.1\r\nconnection: close\r\n\r\n");
        assert!(whole.contains(&format!("{body}0\r\n\r\nHTTP/1.1 200 OK")) && whole.ends_with("GET /b  0"), "{whole}");
        let cut = talk("/cut", "");
        assert!(cut.ends_with(body), "{cut}");
    }

    #[test]
    fn hangs_up_when_told() {
        assert_eq!(talk(&server(Limits::default()), b"GET /lost HTTP/1.1\r\n\r\n"), "");
    }

    #[test]
    fn bounds_hold() {
        let server = server(Limits { head: 100, body: 10, ..Limits::default() });
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(200));
        for (send, status) in [
            (long.as_bytes(), "431"),
            (b"POST / HTTP/1.1\r\ncontent-length: 11\r\n\r\n", "413"),
            (b"POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\nab", "400"),
            (b"GET / HT", "400"),
        ] {
            let text = talk(&server, send);
            assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{text}");
        }
    }

    #[test]
    fn a_full_server_says_so() {
        let server = server(Limits { connections: 1, ..Limits::default() });
        let mut first = TcpStream::connect(server.address()).unwrap();
        first.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        first.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(first.read(&mut [0; 512]).unwrap() > 0);
        let mut second = TcpStream::connect(server.address()).unwrap();
        second.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut text = String::new();
        second.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
    }

    #[test]
    fn a_slow_request_is_cut_off() {
        let server = server(Limits { transfer: Duration::from_millis(100), ..Limits::default() });
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n").unwrap();
        assert_eq!(stream.read(&mut [0; 64]).unwrap(), 0);
    }

    #[test]
    fn a_dropped_server_closes_everything() {
        // Where no other test listens, so that the port stays free.
        let server = server_at("127.0.0.6:0", Limits::default());
        let address = server.address();
        let mut idle = TcpStream::connect(address).unwrap();
        idle.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        idle.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(idle.read(&mut [0; 512]).unwrap() > 0);
        drop(server);
        assert_eq!(idle.read(&mut [0; 64]).unwrap(), 0);
        assert!(TcpStream::connect(address).is_err());
    }
}
