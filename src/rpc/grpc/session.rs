//! gRPC on one HTTP/2 connection of a server, without I/O: bytes in, calls and bytes out.

use super::{
    CONTENT_TYPE, Call, Code, Reply, Status, find, frame_message, is_grpc, parse_timeout, percent_encode,
    unframe_message,
};
use crate::clock;
use crate::model::map::Map;
use crate::rpc::h2::{Conn, Event, Fault, Role, code};
use crate::rpc::hpack::{self, Field};
use crate::rpc::proto;
use std::time::Instant;

/// gRPC on an HTTP/2 connection, without I/O.
pub(super) struct Session {
    pub(super) conn: Conn,
    methods: &'static [&'static str],
    accepted: Map<u32, Accepted>,
    /// Streams that the peer gave up after their calls were handed out, until somebody takes notice.
    pub(super) given_up: Vec<u32>,
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
    pub(super) fn new(methods: &'static [&'static str]) -> Self {
        Session { conn: Conn::new(Role::Server), methods, accepted: Map::new(), given_up: Vec::new() }
    }

    /// The next complete request in what was received.
    pub(super) fn next_call(&mut self) -> std::result::Result<Option<(u32, Call)>, Fault> {
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
                Event::Reset { stream, .. } => {
                    if self.accepted.remove(&stream).is_none() {
                        self.given_up.push(stream);
                    }
                }
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

    pub(super) fn answer(&mut self, stream: u32, reply: Reply) {
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
