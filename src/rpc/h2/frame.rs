//! Frames: their numbers, how they are taken apart and written (RFC 9113 4, 6, 7).

use std::fmt;

/// Largest frame payload either side accepts: the protocol's minimum and default.
pub const FRAME_LIMIT: usize = 16_384;

/// Error codes (RFC 9113 7).
pub mod code {
    #![expect(missing_docs, reason = "the names are those of the RFC")]
    pub const NO_ERROR: u32 = 0;
    pub const PROTOCOL_ERROR: u32 = 1;
    pub const FLOW_CONTROL_ERROR: u32 = 3;
    pub const STREAM_CLOSED: u32 = 5;
    pub const FRAME_SIZE_ERROR: u32 = 6;
    pub const REFUSED_STREAM: u32 = 7;
    pub const CANCEL: u32 = 8;
    pub const COMPRESSION_ERROR: u32 = 9;
    pub const ENHANCE_YOUR_CALM: u32 = 11;
    pub const INADEQUATE_SECURITY: u32 = 12;
}

pub(super) mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PUSH_PROMISE: u8 = 5;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

pub(super) mod flag {
    pub const END_STREAM: u8 = 0x1;
    pub const ACK: u8 = 0x1;
    pub const END_HEADERS: u8 = 0x4;
    pub const PADDED: u8 = 0x8;
    pub const WITH_PRIORITY: u8 = 0x20;
}

pub(super) mod setting {
    pub const ENABLE_PUSH: u16 = 2;
    pub const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub const INITIAL_WINDOW_SIZE: u16 = 4;
    pub const MAX_FRAME_SIZE: u16 = 5;
    pub const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// Why the connection ends; the peer is told with GOAWAY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// One of [`code`].
    pub code: u32,
    /// What the peer did.
    pub text: &'static str,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (HTTP/2 error {})", self.text, self.code)
    }
}

impl std::error::Error for Fault {}

pub(super) fn fault<T>(code: u32, text: &'static str) -> Result<T, Fault> {
    Err(Fault { code, text })
}

pub(super) fn violation<T>(text: &'static str) -> Result<T, Fault> {
    fault(code::PROTOCOL_ERROR, text)
}

/// One frame as received.
pub(super) struct Frame<'a> {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: &'a [u8],
}

impl Frame<'_> {
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The payload as one number, for the kinds that consist of it.
    pub fn number(&self, text: &'static str) -> Result<u32, Fault> {
        let bytes = self.payload.try_into().map_err(|_| Fault { code: code::FRAME_SIZE_ERROR, text })?;
        Ok(u32::from_be_bytes(bytes))
    }
}

/// The payload without the padding that DATA and HEADERS may have.
pub(super) fn unpad(payload: &[u8], padded: bool) -> Result<&[u8], Fault> {
    if !padded {
        return Ok(payload);
    }
    let Some((padding, rest)) = payload.split_first() else {
        return fault(code::FRAME_SIZE_ERROR, "padded frame without its padding length");
    };
    match rest.len().checked_sub(usize::from(*padding)) {
        Some(length) => Ok(&rest[..length]),
        None => violation("padding longer than the frame"),
    }
}

pub(super) fn put_header(out: &mut Vec<u8>, length: usize, kind: u8, flags: u8, stream: u32) {
    let [.., l0, l1, l2] = length.to_be_bytes();
    out.extend_from_slice(&[l0, l1, l2, kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
}

/// A frame that consists of one number.
pub(super) fn put_number(out: &mut Vec<u8>, kind: u8, stream: u32, value: u32) {
    put_header(out, 4, kind, 0, stream);
    out.extend_from_slice(&value.to_be_bytes());
}

pub(super) fn put_settings(out: &mut Vec<u8>, settings: &[(u16, u32)]) {
    put_header(out, settings.len() * 6, kind::SETTINGS, 0, 0);
    for (name, value) in settings {
        out.extend_from_slice(&name.to_be_bytes());
        out.extend_from_slice(&value.to_be_bytes());
    }
}

/// A header block in as many frames as it takes.
pub(super) fn put_headers(out: &mut Vec<u8>, stream: u32, block: &[u8], end_stream: bool) {
    let mut frame_kind = kind::HEADERS;
    let mut flags = if end_stream { flag::END_STREAM } else { 0 };
    let mut rest = block;
    loop {
        let (piece, after) = rest.split_at(rest.len().min(FRAME_LIMIT));
        rest = after;
        if rest.is_empty() {
            flags |= flag::END_HEADERS;
        }
        put_header(out, piece.len(), frame_kind, flags, stream);
        out.extend_from_slice(piece);
        if rest.is_empty() {
            return;
        }
        (frame_kind, flags) = (kind::CONTINUATION, 0);
    }
}
