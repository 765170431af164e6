//! One HTTP/2 connection as a state machine (RFC 9113): bytes in, events and bytes out, no I/O and no clock.
//!
//! It serves unary calls only: a stream is one request body and one answer, each at most [`BODY_LIMIT`] long and kept
//! until it is complete. So client, server, tests and fuzzers share it, and every limit stands here. It must not know of
//! gRPC beyond that shape.

mod frame;

pub use frame::{FRAME_LIMIT, Fault, code};

use super::hpack::{Decoder, Field};
use crate::model::map::Map;
use frame::{Frame, fault, flag, kind, put_header, put_headers, put_number, put_settings, setting, unpad, violation};
use std::collections::VecDeque;

/// What a client sends first (RFC 9113 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Largest header block, coded as well as decoded.
pub const HEADER_LIMIT: usize = 65_536;
/// CONTINUATION frames of one header block; a block at its limit takes four of full size.
const CONTINUATION_LIMIT: u32 = 32;
/// Largest body of a request or an answer: 1 MiB and the prefix of a gRPC message.
pub const BODY_LIMIT: usize = 1 << 20 | 5;
/// Bytes of unfinished bodies that one connection may hold.
const BUFFER_LIMIT: usize = 4 << 20;
/// Open streams that we advertise.
const STREAM_LIMIT: usize = 16;
/// Open streams tolerated until the peer has acknowledged the above.
const EARLY_STREAM_LIMIT: usize = 128;
/// Frames other than data without a request being completed; [`Conn::forgive`] starts anew.
const CONTROL_LIMIT: u32 = 10_000;
/// Both directions' window until changed (RFC 9113 6.9.2).
const DEFAULT_WINDOW: i64 = 65_535;
const WINDOW_LIMIT: i64 = 0x7fff_ffff;
/// What a client allows an answer at once, so that the largest needs no credit.
const CLIENT_WINDOW: u32 = 1 << 20 | 0xffff;
/// Received bytes are credited back in steps of this size, at most a quarter of the window.
const CREDIT_STEP: u32 = 16_384;

/// Which end of the connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We open streams.
    Client,
    /// The peer does.
    Server,
}

/// What the peer did that concerns the layer above.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// To a server: the header of a request stands; [`Conn::head`] shows it. It may be answered at once.
    Opened {
        /// The stream.
        stream: u32,
    },
    /// A request (to a server) or an answer (to a client) is complete.
    Complete {
        /// The stream.
        stream: u32,
        /// Its header.
        head: Vec<Field>,
        /// Everything in DATA frames.
        body: Vec<u8>,
        /// The second header, empty if there was none.
        trailers: Vec<Field>,
    },
    /// The body exceeds a limit. A server answers; a client has nothing left to do.
    TooLarge {
        /// The stream.
        stream: u32,
    },
    /// The peer gave the stream up.
    Reset {
        /// The stream.
        stream: u32,
        /// One of [`code`].
        code: u32,
    },
    /// The peer takes no further streams.
    GoAway {
        /// The highest of our streams that it will still answer.
        last_stream: u32,
        /// One of [`code`].
        code: u32,
    },
}

#[derive(Debug)]
enum Tail {
    /// END_STREAM is on the last DATA frame.
    WithData,
    /// The coded trailers carry it.
    Trailers(Vec<u8>),
}

#[derive(Debug)]
struct Stream {
    head: Option<Vec<Field>>,
    body: Vec<u8>,
    receive_window: i64,
    credit: u32,
    remote_closed: bool,
    /// Nothing that still arrives is wanted: the request was answered or exceeded a limit.
    deaf: bool,
    send_window: i64,
    outgoing: Vec<u8>,
    sent: usize,
    tail: Option<Tail>,
}

struct HeaderBlock {
    stream: u32,
    end_stream: bool,
    block: Vec<u8>,
    continuations: u32,
}

/// The state of one connection.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own that the protocol asks for")]
pub struct Conn {
    role: Role,
    input: Vec<u8>,
    taken: usize, // of `input`
    /// Bytes for the peer; the caller sends and clears them.
    pub out: Vec<u8>,
    events: VecDeque<Event>,
    decoder: Decoder,
    preface_seen: bool,
    settings_seen: bool,
    settings_acked: bool,
    header_block: Option<HeaderBlock>,
    streams: Map<u32, Stream>,
    last_peer_stream: u32,
    next_stream: u32,
    send_window: i64,
    peer_initial_window: i64,
    receive_window: i64,
    credit: u32,
    control_frames: u32,
    going_away: bool,
}

impl Conn {
    /// A fresh connection whose first bytes already stand in `out`.
    pub fn new(role: Role) -> Self {
        let mut conn = Conn {
            role,
            input: Vec::new(),
            taken: 0,
            out: Vec::new(),
            events: VecDeque::new(),
            decoder: Decoder::new(),
            preface_seen: role == Role::Client,
            settings_seen: false,
            settings_acked: false,
            header_block: None,
            streams: Map::new(),
            last_peer_stream: 0,
            next_stream: 1,
            send_window: DEFAULT_WINDOW,
            peer_initial_window: DEFAULT_WINDOW,
            receive_window: DEFAULT_WINDOW,
            credit: 0,
            control_frames: 0,
            going_away: false,
        };
        match role {
            Role::Client => {
                conn.out.extend_from_slice(PREFACE);
                put_settings(
                    &mut conn.out,
                    &[(setting::ENABLE_PUSH, 0), (setting::INITIAL_WINDOW_SIZE, CLIENT_WINDOW)],
                );
                put_number(&mut conn.out, kind::WINDOW_UPDATE, 0, CLIENT_WINDOW);
                conn.receive_window += i64::from(CLIENT_WINDOW);
            }
            Role::Server => put_settings(
                &mut conn.out,
                &[
                    (setting::MAX_CONCURRENT_STREAMS, u32::try_from(STREAM_LIMIT).unwrap_or(u32::MAX)),
                    (setting::MAX_HEADER_LIST_SIZE, u32::try_from(HEADER_LIMIT).unwrap_or(u32::MAX)),
                ],
            ),
        }
        conn
    }

    /// Takes bytes of the peer. Call [`Conn::next_event`] until it has none before the next call, which bounds the buffer.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.input.drain(..self.taken);
        self.taken = 0;
        self.input.extend_from_slice(bytes);
    }

    /// The next event in what was received. On a fault GOAWAY stands in `out`; send it and close.
    pub fn next_event(&mut self) -> Result<Option<Event>, Fault> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.step() {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(fault) => {
                    self.go_away(fault.code);
                    return Err(fault);
                }
            }
        }
    }

    /// The header of an open stream.
    pub fn head(&self, stream: u32) -> Option<&[Field]> {
        self.streams.get(&stream)?.head.as_deref()
    }

    /// Whether nothing is under way, so that the connection may rest or be closed without harm.
    pub fn idle(&self) -> bool {
        self.settings_seen && self.streams.is_empty() && self.header_block.is_none() && self.taken == self.input.len()
    }

    /// Whether the peer has begun as HTTP/2 wants it.
    pub fn greeted(&self) -> bool {
        self.settings_seen
    }

    /// Bytes that are kept until more comes.
    pub fn held(&self) -> usize {
        let bodies: usize = self.streams.values().map(|open| open.body.len()).sum();
        let block = self.header_block.as_ref().map_or(0, |pending| pending.block.len());
        self.input.len() - self.taken + block + bodies
    }

    /// Starts the count of frames without effect anew; to be called when some time has passed.
    pub fn forgive(&mut self) {
        self.control_frames = 0;
    }

    /// Opens a stream with a request. `None` when the peer takes no more or the stream numbers are used up.
    pub fn request(&mut self, head: &[u8], body: Vec<u8>) -> Option<u32> {
        let stream = self.next_stream;
        if self.going_away || i64::from(stream) > WINDOW_LIMIT {
            return None;
        }
        self.next_stream += 2;
        put_headers(&mut self.out, stream, head, false);
        let mut open = self.open_stream(None);
        open.outgoing = body;
        open.tail = Some(Tail::WithData);
        self.streams.insert(stream, open);
        self.pump(stream);
        Some(stream)
    }

    /// Answers a request: header, body, trailers (coded). No-op if the peer has given the stream up.
    pub fn respond(&mut self, stream: u32, head: &[u8], body: Vec<u8>, trailers: Vec<u8>) {
        let Some(open) = self.streams.get_mut(&stream).filter(|open| open.tail.is_none()) else { return };
        open.deaf = true;
        open.body = Vec::new();
        open.outgoing = body;
        open.tail = Some(Tail::Trailers(trailers));
        put_headers(&mut self.out, stream, head, false);
        self.pump(stream);
    }

    /// Answers a request with a single header.
    pub fn respond_head(&mut self, stream: u32, head: &[u8]) {
        let Some(open) = self.streams.get(&stream).filter(|open| open.tail.is_none()) else { return };
        let remote_closed = open.remote_closed;
        put_headers(&mut self.out, stream, head, true);
        self.streams.remove(&stream);
        if !remote_closed {
            // The answer is complete without the rest of the request (RFC 9113 8.1).
            put_number(&mut self.out, kind::RST_STREAM, stream, code::NO_ERROR);
        }
    }

    /// Gives a stream up.
    pub fn reset(&mut self, stream: u32, code: u32) {
        if self.streams.remove(&stream).is_some() {
            put_number(&mut self.out, kind::RST_STREAM, stream, code);
        }
    }

    /// Tells the peer that no further stream will be taken.
    pub fn go_away(&mut self, code: u32) {
        if !self.going_away || code != code::NO_ERROR {
            self.going_away = true;
            put_header(&mut self.out, 8, kind::GOAWAY, 0, 0);
            self.out.extend_from_slice(&self.last_peer_stream.to_be_bytes());
            self.out.extend_from_slice(&code.to_be_bytes());
        }
    }

    /// Handles one frame, if there is one.
    fn step(&mut self) -> Result<bool, Fault> {
        if !self.preface_seen {
            let start = &self.input[..self.input.len().min(PREFACE.len())];
            if !PREFACE.starts_with(start) {
                return violation("not an HTTP/2 preface");
            }
            if start.len() < PREFACE.len() {
                return Ok(false);
            }
            self.preface_seen = true;
            self.taken = PREFACE.len();
        }
        let rest = &self.input[self.taken..];
        let Some((header, rest)) = rest.split_first_chunk::<9>() else { return Ok(false) };
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = *header;
        let length = usize::from(l0) << 16 | usize::from(l1) << 8 | usize::from(l2);
        if length > FRAME_LIMIT {
            return fault(code::FRAME_SIZE_ERROR, "frame larger than 16 KiB");
        }
        let Some(payload) = rest.get(..length) else { return Ok(false) };
        let payload = payload.to_vec();
        self.taken += 9 + length;
        let stream = u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]);
        self.frame(&Frame { kind, flags, stream, payload: &payload })?;
        Ok(true)
    }

    fn frame(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        if !self.settings_seen && (frame.kind != kind::SETTINGS || frame.has(flag::ACK)) {
            return violation("first frame is not SETTINGS");
        }
        if self.header_block.is_some() != (frame.kind == kind::CONTINUATION) {
            return violation("header block interrupted, or continued without a start");
        }
        if frame.kind != kind::DATA || frame.payload.is_empty() {
            self.control_frames += 1;
            if self.control_frames > CONTROL_LIMIT {
                return fault(code::ENHANCE_YOUR_CALM, "too many frames without a request");
            }
        }
        match frame.kind {
            kind::DATA => self.data(frame),
            kind::HEADERS => self.headers(frame),
            kind::PRIORITY if frame.stream == 0 => violation("PRIORITY on stream 0"),
            kind::PRIORITY if frame.payload.len() != 5 => fault(code::FRAME_SIZE_ERROR, "PRIORITY of wrong size"),
            kind::RST_STREAM => self.rst_stream(frame),
            kind::SETTINGS => self.settings(frame),
            kind::PUSH_PROMISE => violation("PUSH_PROMISE"),
            kind::PING => self.ping(frame),
            kind::GOAWAY => self.goaway(frame),
            kind::WINDOW_UPDATE => self.window_update(frame),
            kind::CONTINUATION => self.continuation(frame),
            _ => Ok(()), // PRIORITY has no meaning any more; unknown kinds are ignored (RFC 9113 5.5)
        }
    }

    /// Whether a stream was never opened by either side.
    fn is_unopened(&self, stream: u32) -> bool {
        match self.role {
            Role::Client => stream.is_multiple_of(2) || stream >= self.next_stream,
            Role::Server => stream.is_multiple_of(2) || stream > self.last_peer_stream,
        }
    }

    fn data(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        if self.is_unopened(frame.stream) {
            return violation("DATA on a stream that is not open");
        }
        let length = u32::try_from(frame.payload.len()).unwrap_or(u32::MAX);
        self.receive_window -= i64::from(length);
        if self.receive_window < 0 {
            return fault(code::FLOW_CONTROL_ERROR, "more DATA than the connection's window");
        }
        self.credit += length;
        if self.credit >= CREDIT_STEP {
            self.receive_window += i64::from(self.credit);
            put_number(&mut self.out, kind::WINDOW_UPDATE, 0, self.credit);
            self.credit = 0;
        }
        let data = unpad(frame.payload, frame.has(flag::PADDED))?;
        let buffered: usize = self.streams.values().map(|open| open.body.len()).sum();
        let role = self.role;
        let Some(open) = self.streams.get_mut(&frame.stream) else {
            // We have given it up and the peer may not know yet.
            return Ok(());
        };
        if open.remote_closed {
            self.reset(frame.stream, code::STREAM_CLOSED);
            self.events.push_back(Event::Reset { stream: frame.stream, code: code::STREAM_CLOSED });
            return Ok(());
        }
        if role == Role::Client && open.head.is_none() {
            return violation("DATA before the header");
        }
        open.receive_window -= i64::from(length);
        if open.receive_window < 0 {
            return fault(code::FLOW_CONTROL_ERROR, "more DATA than the stream's window");
        }
        let end = frame.has(flag::END_STREAM);
        if !open.deaf {
            if open.body.len() + data.len() > BODY_LIMIT || buffered + data.len() > BUFFER_LIMIT {
                return self.too_large(frame.stream, end);
            }
            open.body.extend_from_slice(data);
            open.credit += length;
            if open.credit >= CREDIT_STEP && !end {
                let credit = std::mem::take(&mut open.credit);
                open.receive_window += i64::from(credit);
                put_number(&mut self.out, kind::WINDOW_UPDATE, frame.stream, credit);
            }
        }
        if end {
            self.remote_end(frame.stream, Vec::new());
        }
        Ok(())
    }

    #[expect(clippy::unnecessary_wraps, reason = "stands in the place of a result")]
    fn too_large(&mut self, stream: u32, end: bool) -> Result<(), Fault> {
        if let Some(open) = self.streams.get_mut(&stream) {
            open.body = Vec::new();
            open.deaf = true;
            open.remote_closed = end;
        }
        if self.role == Role::Client {
            self.reset(stream, code::CANCEL);
        }
        self.events.push_back(Event::TooLarge { stream });
        Ok(())
    }

    /// The peer has sent all of a stream.
    fn remote_end(&mut self, stream: u32, trailers: Vec<Field>) {
        let Some(open) = self.streams.get_mut(&stream) else { return };
        open.remote_closed = true;
        if open.deaf {
            return;
        }
        self.control_frames = 0;
        let head = open.head.take().unwrap_or_default();
        let body = std::mem::take(&mut open.body);
        if self.role == Role::Client {
            let unsent = open.tail.is_some();
            self.streams.remove(&stream);
            if unsent {
                put_number(&mut self.out, kind::RST_STREAM, stream, code::CANCEL);
            }
        }
        self.events.push_back(Event::Complete { stream, head, body, trailers });
    }

    fn headers(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        if frame.stream.is_multiple_of(2) || (self.role == Role::Client && frame.stream >= self.next_stream) {
            return violation("HEADERS on a stream that the peer may not open");
        }
        let mut block = unpad(frame.payload, frame.has(flag::PADDED))?;
        if frame.has(flag::WITH_PRIORITY) {
            block =
                block.get(5..).ok_or(Fault { code: code::FRAME_SIZE_ERROR, text: "HEADERS without its priority" })?;
        }
        let end_stream = frame.has(flag::END_STREAM);
        if frame.has(flag::END_HEADERS) {
            return self.header_list(frame.stream, end_stream, block);
        }
        self.header_block =
            Some(HeaderBlock { stream: frame.stream, end_stream, block: block.to_vec(), continuations: 0 });
        Ok(())
    }

    fn continuation(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        let Some(mut pending) = self.header_block.take().filter(|pending| pending.stream == frame.stream) else {
            return violation("CONTINUATION on another stream");
        };
        pending.continuations += 1;
        if pending.continuations > CONTINUATION_LIMIT || pending.block.len() + frame.payload.len() > HEADER_LIMIT {
            return fault(code::ENHANCE_YOUR_CALM, "header block larger than 64 KiB or in too many pieces");
        }
        pending.block.extend_from_slice(frame.payload);
        if frame.has(flag::END_HEADERS) {
            return self.header_list(pending.stream, pending.end_stream, &pending.block);
        }
        self.header_block = Some(pending);
        Ok(())
    }

    /// A header block is complete. It is decoded even if nobody wants it, for the decoder's table must stay in step.
    fn header_list(&mut self, stream: u32, end_stream: bool, block: &[u8]) -> Result<(), Fault> {
        let fields = self
            .decoder
            .decode(block, HEADER_LIMIT)
            .map_err(|_| Fault { code: code::COMPRESSION_ERROR, text: "header block malformed or too large" })?;
        if let Some(open) = self.streams.get_mut(&stream) {
            if open.remote_closed {
                self.reset(stream, code::STREAM_CLOSED);
                self.events.push_back(Event::Reset { stream, code: code::STREAM_CLOSED });
                return Ok(());
            }
            if self.role == Role::Client && open.head.is_none() {
                let informational = fields.iter().any(|f| f.name == b":status" && f.value.starts_with(b"1"));
                if !informational {
                    open.head = Some(fields);
                }
                if end_stream {
                    self.remote_end(stream, Vec::new());
                }
                return Ok(());
            }
            if !end_stream {
                return violation("trailers that do not end the stream");
            }
            self.remote_end(stream, fields);
            return Ok(());
        }
        if !self.is_unopened(stream) {
            return Ok(()); // we have given it up and the peer may not know yet
        }
        self.last_peer_stream = stream;
        let limit = if self.settings_acked { STREAM_LIMIT } else { EARLY_STREAM_LIMIT };
        if self.going_away || self.streams.len() >= limit {
            put_number(&mut self.out, kind::RST_STREAM, stream, code::REFUSED_STREAM);
            return Ok(());
        }
        let open = self.open_stream(Some(fields));
        self.streams.insert(stream, open);
        self.events.push_back(Event::Opened { stream });
        if end_stream {
            self.end_after_opening(stream);
        }
        Ok(())
    }

    /// A request that consists of its header: the header is kept, so that [`Event::Opened`] can show it.
    fn end_after_opening(&mut self, stream: u32) {
        let head = self.head(stream).map(<[Field]>::to_vec).unwrap_or_default();
        self.remote_end(stream, Vec::new());
        if let Some(open) = self.streams.get_mut(&stream) {
            open.head = Some(head);
        }
    }

    fn open_stream(&self, head: Option<Vec<Field>>) -> Stream {
        Stream {
            head,
            body: Vec::new(),
            receive_window: if self.role == Role::Client { i64::from(CLIENT_WINDOW) } else { DEFAULT_WINDOW },
            credit: 0,
            remote_closed: false,
            deaf: false,
            send_window: self.peer_initial_window,
            outgoing: Vec::new(),
            sent: 0,
            tail: None,
        }
    }

    fn rst_stream(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        let code = frame.number("RST_STREAM of wrong size")?;
        if self.is_unopened(frame.stream) {
            return violation("RST_STREAM on a stream that is not open");
        }
        if self.streams.remove(&frame.stream).is_some() {
            self.events.push_back(Event::Reset { stream: frame.stream, code });
        }
        Ok(())
    }

    fn settings(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        if frame.stream != 0 {
            return violation("SETTINGS on a stream");
        }
        if frame.has(flag::ACK) {
            self.settings_acked = true;
            return if frame.payload.is_empty() {
                Ok(())
            } else {
                fault(code::FRAME_SIZE_ERROR, "SETTINGS acknowledgement with a payload")
            };
        }
        let (settings, []) = frame.payload.as_chunks::<6>() else {
            return fault(code::FRAME_SIZE_ERROR, "SETTINGS of wrong size");
        };
        for [i0, i1, v0, v1, v2, v3] in settings.iter().copied() {
            let value = u32::from_be_bytes([v0, v1, v2, v3]);
            match u16::from_be_bytes([i0, i1]) {
                setting::INITIAL_WINDOW_SIZE => self.set_initial_window(value)?,
                setting::ENABLE_PUSH if value > 1 || (value == 1 && self.role == Role::Client) => {
                    return violation("ENABLE_PUSH out of range");
                }
                setting::MAX_FRAME_SIZE if !(16_384..=16_777_215).contains(&value) => {
                    return violation("MAX_FRAME_SIZE out of range");
                }
                // We never send larger frames, never index, and open one stream at a time.
                _ => {}
            }
        }
        self.settings_seen = true;
        put_header(&mut self.out, 0, kind::SETTINGS, flag::ACK, 0);
        self.pump_all();
        Ok(())
    }

    fn set_initial_window(&mut self, value: u32) -> Result<(), Fault> {
        let value = i64::from(value);
        let change = value - self.peer_initial_window;
        self.peer_initial_window = value;
        for open in self.streams.values_mut() {
            open.send_window += change;
            if open.send_window > WINDOW_LIMIT {
                return fault(code::FLOW_CONTROL_ERROR, "window of a stream too large");
            }
        }
        if value > WINDOW_LIMIT { fault(code::FLOW_CONTROL_ERROR, "initial window too large") } else { Ok(()) }
    }

    fn ping(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        if frame.stream != 0 {
            return violation("PING on a stream");
        }
        if frame.payload.len() != 8 {
            return fault(code::FRAME_SIZE_ERROR, "PING of wrong size");
        }
        if !frame.has(flag::ACK) {
            put_header(&mut self.out, 8, kind::PING, flag::ACK, 0);
            self.out.extend_from_slice(frame.payload);
        }
        Ok(())
    }

    fn goaway(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        if frame.stream != 0 {
            return violation("GOAWAY on a stream");
        }
        let Some(([l0, l1, l2, l3, c0, c1, c2, c3], _)) = frame.payload.split_first_chunk::<8>() else {
            return fault(code::FRAME_SIZE_ERROR, "GOAWAY of wrong size");
        };
        let last_stream = u32::from_be_bytes([l0 & 0x7f, *l1, *l2, *l3]);
        if self.role == Role::Client {
            self.going_away = true;
        }
        self.events.push_back(Event::GoAway { last_stream, code: u32::from_be_bytes([*c0, *c1, *c2, *c3]) });
        Ok(())
    }

    fn window_update(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        let increment = i64::from(frame.number("WINDOW_UPDATE of wrong size")? & 0x7fff_ffff);
        if increment == 0 {
            return violation("WINDOW_UPDATE of zero");
        }
        if frame.stream == 0 {
            self.send_window += increment;
            if self.send_window > WINDOW_LIMIT {
                return fault(code::FLOW_CONTROL_ERROR, "window of the connection too large");
            }
            self.pump_all();
            return Ok(());
        }
        if self.is_unopened(frame.stream) {
            return violation("WINDOW_UPDATE on a stream that is not open");
        }
        if let Some(open) = self.streams.get_mut(&frame.stream) {
            open.send_window += increment;
            if open.send_window > WINDOW_LIMIT {
                return fault(code::FLOW_CONTROL_ERROR, "window of a stream too large");
            }
            self.pump(frame.stream);
        }
        Ok(())
    }

    fn pump_all(&mut self) {
        let waiting: Vec<u32> =
            self.streams.iter().filter(|(_, open)| open.tail.is_some()).map(|(stream, _)| *stream).collect();
        for stream in waiting {
            self.pump(stream);
        }
    }

    /// Moves as much of a stream's body into `out` as the windows allow, and its end after it.
    fn pump(&mut self, stream: u32) {
        let Some(mut open) = self.streams.remove(&stream) else { return };
        while open.sent < open.outgoing.len() {
            let window = usize::try_from(open.send_window.min(self.send_window)).unwrap_or(0);
            let size = window.min(FRAME_LIMIT).min(open.outgoing.len() - open.sent);
            if size == 0 {
                self.streams.insert(stream, open);
                return;
            }
            let last = open.sent + size == open.outgoing.len() && matches!(open.tail, Some(Tail::WithData));
            put_header(&mut self.out, size, kind::DATA, if last { flag::END_STREAM } else { 0 }, stream);
            self.out.extend_from_slice(&open.outgoing[open.sent..open.sent + size]);
            open.sent += size;
            let sent = i64::try_from(size).unwrap_or(WINDOW_LIMIT);
            open.send_window -= sent;
            self.send_window -= sent;
        }
        if open.outgoing.is_empty() && matches!(open.tail, Some(Tail::WithData)) {
            put_header(&mut self.out, 0, kind::DATA, flag::END_STREAM, stream);
        }
        open.outgoing = Vec::new();
        open.sent = 0;
        match open.tail.take() {
            Some(Tail::Trailers(trailers)) => {
                put_headers(&mut self.out, stream, &trailers, true);
                if !open.remote_closed {
                    put_number(&mut self.out, kind::RST_STREAM, stream, code::NO_ERROR);
                }
            }
            Some(Tail::WithData) | None => drop(self.streams.insert(stream, open)),
        }
    }
}

#[cfg(test)]
#[path = "h2_tests.rs"]
mod tests;
