//! The client: one connection, one call at a time. Nothing is sent before the first call, whose request goes out with the
//! preface in a single write.

use super::{
    CONTENT_TYPE, Code, Status, encode_timeout, find, frame_message, is_grpc, percent_decode, status_of_reset,
    unframe_message,
};
use crate::clock;
use crate::rpc::h2::{Conn, Event, Fault, Role, code};
use crate::rpc::hpack::{self, Field};
use crate::rpc::proto::Message;
use crate::sys;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// One read of the socket.
const READ_SIZE: usize = 16_384;

/// An interrupt that comes just before a wait begins does not end it, so that none is longer.
const WAIT_MAX: Duration = Duration::from_secs(1);

const CLOSED: &str = "connection closed by the server";

/// How long the cancellation of a call may take to be handed to the kernel.
const CANCEL_TIMEOUT: Duration = Duration::from_millis(1);

/// A connection to a gRPC server on a unix socket. It does not reconnect: after `UNAVAILABLE` make another.
pub struct Client {
    stream: UnixStream,
    conn: Conn,
    peer: String,
    authority: String,
    user_agent: String,
    broken: bool,
}

impl Client {
    /// Connects. The kernel answers at once unless the server's backlog is full; `timeout` bounds that. `UNAVAILABLE` with
    /// the path and the system's text when nobody listens.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Client, Status> {
        let socket = sys::connect_unix(path, timeout).map_err(|error| {
            let why = match error.kind() {
                ErrorKind::WouldBlock => format!("server takes no connection within {timeout:?}"),
                _ => error.to_string(),
            };
            Status::new(Code::UNAVAILABLE, format!("connect to {}: {why}", path.display()))
        })?;
        let peer = path.display().to_string();
        Ok(Client::over(socket, &peer, "localhost", concat!("enibox/", env!("CARGO_PKG_VERSION"))))
    }

    /// A connection over a stream socket that is connected already; `peer` names it in failures.
    pub fn over(socket: OwnedFd, peer: &str, authority: &str, user_agent: &str) -> Client {
        Client {
            // The standard library's type for any stream socket: what is done with it is the same for TCP.
            stream: UnixStream::from(socket),
            conn: Conn::new(Role::Client),
            peer: peer.to_owned(),
            authority: authority.to_owned(),
            user_agent: user_agent.to_owned(),
            broken: false,
        }
    }

    /// Sends the preface and waits for the server's, at most `timeout`: somebody is there and speaks HTTP/2. A call needs no
    /// such round trip.
    pub fn greet(&mut self, timeout: Duration) -> Result<(), Status> {
        let what = "greet";
        let until = clock::instant() + timeout.min(super::TIMEOUT_LIMIT);
        let mut buffer = [0; READ_SIZE];
        loop {
            // What comes now concerns no call.
            while self.conn.next_event().map_err(|fault| self.violated(what, &fault))?.is_some() {}
            self.flush(until).map_err(|error| self.failed(what, &error))?;
            if self.conn.greeted() {
                return Ok(());
            }
            self.receive(what, &mut buffer, until)?;
        }
    }

    /// Calls a method and waits for its reply, at most `deadline`, which the server is told. `DEADLINE_EXCEEDED` when the
    /// server is too slow or hangs, `UNAVAILABLE` when the connection is gone, else what the server says.
    pub fn call<Req: Message, Rep: Message>(
        &mut self,
        method: &str,
        request: &Req,
        deadline: Duration,
    ) -> Result<Rep, Status> {
        let reply = self.call_raw(method, &request.encode(), deadline)?;
        Rep::decode(&reply).map_err(|error| Status::new(Code::INTERNAL, format!("reply to {method}: {error}")))
    }

    /// [`Client::call`] with encoded messages.
    pub fn call_raw(&mut self, method: &str, request: &[u8], deadline: Duration) -> Result<Vec<u8>, Status> {
        let started = clock::instant();
        let until = started.checked_add(deadline).unwrap_or(started + super::TIMEOUT_LIMIT);
        let body = frame_message(request)?;
        if self.broken {
            return Err(self.gone("connection was lost earlier"));
        }
        let head = self.request_head(method, deadline);
        let Some(stream) = self.conn.request(&head, body) else {
            return Err(self.gone("server is going away"));
        };
        let result = self.exchange(method, stream, until);
        if result.as_ref().is_err_and(|status| status.code == Code::DEADLINE_EXCEEDED) && !self.broken {
            self.conn.reset(stream, code::CANCEL);
            self.flush(clock::instant() + CANCEL_TIMEOUT).ok(); // the next call finds out
        }
        result
    }

    fn exchange(&mut self, method: &str, stream: u32, until: Instant) -> Result<Vec<u8>, Status> {
        let mut buffer = [0; READ_SIZE];
        let mut sent = false;
        loop {
            while let Some(event) = self.conn.next_event().map_err(|fault| self.violated(method, &fault))? {
                match event {
                    Event::Complete { stream: of, head, body, trailers } if of == stream => {
                        return finish(&head, body, &trailers);
                    }
                    Event::TooLarge { stream: of } if of == stream => {
                        return Err(Status::new(Code::RESOURCE_EXHAUSTED, format!("reply to {method} is too large")));
                    }
                    Event::Reset { stream: of, code } if of == stream => return Err(status_of_reset(code)),
                    Event::GoAway { last_stream, .. } if last_stream < stream => {
                        return Err(self.gone("server is going away"));
                    }
                    _ => {} // of an earlier call that was given up
                }
            }
            match self.flush(until) {
                // A server that is stopping reads no acknowledgements any more, but the answer may be on its way.
                Err(error) if sent && error.kind() == ErrorKind::BrokenPipe => {
                    self.broken = true;
                    self.conn.out.clear();
                }
                result => result.map_err(|error| self.failed(method, &error))?,
            }
            sent = true;
            self.receive(method, &mut buffer, until)?;
        }
    }

    /// Waits for what the server sends.
    fn receive(&mut self, what: &str, buffer: &mut [u8], until: Instant) -> Result<(), Status> {
        let count = self.read(buffer, until).map_err(|error| self.failed(what, &error))?;
        if count == 0 {
            self.broken = true;
            return Err(self.gone(CLOSED));
        }
        self.conn.receive(&buffer[..count]);
        Ok(())
    }

    fn violated(&mut self, what: &str, fault: &Fault) -> Status {
        self.broken = true;
        Status::new(Code::INTERNAL, format!("call {what}: {fault}"))
    }

    fn read(&self, buffer: &mut [u8], until: Instant) -> std::io::Result<usize> {
        loop {
            self.stream.set_read_timeout(Some(time_left(until)?.min(WAIT_MAX)))?;
            if sys::interrupted() {
                return Err(ErrorKind::Interrupted.into());
            }
            match (&self.stream).read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted && !sys::interrupted() => {}
                // The kernel counts in ticks and may be back up to one too early too.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }

    fn flush(&mut self, until: Instant) -> std::io::Result<()> {
        let mut sent = 0;
        let result = loop {
            if sent == self.conn.out.len() {
                break Ok(());
            }
            if let Err(error) = time_left(until).and_then(|left| self.stream.set_write_timeout(Some(left))) {
                break Err(error);
            }
            match (&self.stream).write(&self.conn.out[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted && !sys::interrupted() => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => break Err(error),
            }
        };
        // What the kernel took is gone; the rest follows with the next call, so that no frame is torn.
        self.conn.out.drain(..sent);
        result
    }

    /// The status of a failed read or write.
    fn failed(&mut self, method: &str, error: &std::io::Error) -> Status {
        if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) {
            let text = format!("call {method} on {}: deadline exceeded", self.peer);
            return Status::new(Code::DEADLINE_EXCEEDED, text);
        }
        if error.kind() == ErrorKind::Interrupted {
            return Status::new(Code::CANCELLED, "context canceled");
        }
        self.broken = true;
        match error.kind() {
            // A process that ends before it has read all that was sent resets the connection instead of closing it.
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => self.gone(CLOSED),
            _ => self.gone(&error.to_string()),
        }
    }

    fn gone(&self, why: &str) -> Status {
        Status::new(Code::UNAVAILABLE, format!("{}: {why}", self.peer))
    }

    fn request_head(&self, method: &str, deadline: Duration) -> Vec<u8> {
        let mut head = Vec::with_capacity(160);
        hpack::encode(&mut head, ":method", "POST");
        hpack::encode(&mut head, ":scheme", "http");
        hpack::encode(&mut head, ":path", method);
        hpack::encode(&mut head, ":authority", &self.authority);
        hpack::encode(&mut head, "grpc-timeout", &encode_timeout(deadline));
        hpack::encode(&mut head, "content-type", CONTENT_TYPE);
        hpack::encode(&mut head, "te", "trailers");
        hpack::encode(&mut head, "user-agent", &self.user_agent);
        head
    }
}

/// Never zero, which would mean no time-out to the kernel.
fn time_left(until: Instant) -> std::io::Result<Duration> {
    let left = until.saturating_duration_since(clock::instant());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left.max(Duration::from_micros(1))) }
}

/// Turns a complete answer into the message or the status.
fn finish(head: &[Field], body: Vec<u8>, trailers: &[Field]) -> Result<Vec<u8>, Status> {
    // An answer without a message has its status in the only header ("Trailers-Only").
    let grpc_status = find(trailers, "grpc-status").or_else(|| find(head, "grpc-status"));
    let Some(grpc_status) = grpc_status else {
        return Err(status_of_http(head));
    };
    let code = std::str::from_utf8(grpc_status).ok().and_then(|text| text.parse().ok()).unwrap_or(Code::UNKNOWN.0);
    if code == 0 {
        return unframe_message(body);
    }
    let message = find(trailers, "grpc-message").or_else(|| find(head, "grpc-message")).unwrap_or_default();
    Err(Status::new(Code(code), percent_decode(message)))
}

/// The answer is not of gRPC: the status follows from that of HTTP (gRPC's "HTTP to gRPC status code mapping").
fn status_of_http(head: &[Field]) -> Status {
    let http = find(head, ":status").unwrap_or_default();
    let code = match http {
        b"200" if is_grpc(find(head, "content-type")) => {
            return Status::new(Code::INTERNAL, "server sent no grpc-status");
        }
        b"400" => Code::INTERNAL,
        b"401" => Code::UNAUTHENTICATED,
        b"403" => Code::PERMISSION_DENIED,
        b"404" => Code::UNIMPLEMENTED,
        b"429" | b"502" | b"503" | b"504" => Code::UNAVAILABLE,
        _ => Code::UNKNOWN,
    };
    Status::new(code, format!("server answered HTTP status {}", String::from_utf8_lossy(http)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::proto::Empty;

    fn fields(list: &[(&str, &str)]) -> Vec<Field> {
        list.iter().map(|(name, value)| Field { name: (*name).into(), value: (*value).into() }).collect()
    }

    #[test]
    fn answers_become_messages_or_statuses() {
        let check = |head: &[(&str, &str)], body: &[u8], trailers: &[(&str, &str)], expected: Result<&[u8], Status>| {
            let got = finish(&fields(head), body.to_vec(), &fields(trailers));
            assert_eq!(got, expected.map(<[u8]>::to_vec), "{head:?} {trailers:?}");
        };
        let ok = [(":status", "200"), ("content-type", "application/grpc")];
        let message = [0, 0, 0, 0, 1, 9];
        check(&ok, &message, &[("grpc-status", "0")], Ok(&[9]));
        check(&ok, &message, &[("grpc-status", "5")], Err(Status::new(Code::NOT_FOUND, "")));
        let status = Status::new(Code::UNKNOWN, "a%b");
        check(&[(":status", "200"), ("grpc-status", "2"), ("grpc-message", "a%25b")], b"", &[], Err(status));
        check(&ok, &message, &[], Err(Status::new(Code::INTERNAL, "server sent no grpc-status")));
        check(&ok, b"", &[("grpc-status", "0")], Err(Status::new(Code::INTERNAL, "no message where one is due")));
        check(&ok, b"", &[("grpc-status", "many")], Err(Status::new(Code::UNKNOWN, "")));
        for (http, code) in [
            ("503", Code::UNAVAILABLE),
            ("404", Code::UNIMPLEMENTED),
            ("403", Code::PERMISSION_DENIED),
            ("418", Code::UNKNOWN),
            ("200", Code::UNKNOWN),
        ] {
            let text = format!("server answered HTTP status {http}");
            check(&[(":status", http), ("content-type", "text/plain")], b"", &[], Err(Status::new(code, text)));
        }
    }

    // Whether it has read the call or not, which the kernel tells by different errors.
    #[test]
    fn a_server_that_ends_has_closed_the_connection() {
        let folder = std::env::temp_dir().join(format!("enibox-client-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let socket = folder.join("s.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for reads in [false, true] {
            let mut client = Client::connect(&socket, Duration::from_secs(20)).unwrap();
            let (mut end, _) = listener.accept().unwrap();
            let status = std::thread::scope(|scope| {
                let call =
                    scope.spawn(|| client.call::<_, Empty>("/a/b", &Empty {}, Duration::from_secs(20)).unwrap_err());
                let mut some = vec![0; if reads { 10_000 } else { 1 }];
                assert!(end.read(&mut some).unwrap() > 0);
                drop(end);
                call.join().unwrap()
            });
            assert_eq!(status.code, Code::UNAVAILABLE, "{status}");
            assert!(status.message.ends_with(CLOSED), "{status}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
