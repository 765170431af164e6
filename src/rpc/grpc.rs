//! Unary gRPC over HTTP/2 on a unix socket, blocking: the client of plugin and probe, the server of the daemon.
//!
//! What both share stands here: status, the text forms of status message and time-out, the prefix of a message ("gRPC over
//! HTTP2", PROTOCOL-HTTP2.md). No TLS, no compression, no streaming, no reconnecting.

mod client;
mod crew;
mod front;
mod server;
mod session;

pub use client::Client;
pub use server::{BindOptions, Call, Server};
pub use session::fuzz_h2_server;

use super::h2;
use super::hpack::Field;
use super::proto::DecodeError;
use std::fmt;
use std::time::Duration;

/// Largest message in either direction.
pub const MESSAGE_LIMIT: usize = 1 << 20;

/// Octets of a status message that are sent, once percent-encoded. Peers refuse large headers (Google's C core from 8 KiB
/// on) and with them the status itself.
const STATUS_TEXT_LIMIT: usize = 4096;

/// Longest time-out believed; it keeps sums of times in range.
const TIMEOUT_LIMIT: Duration = Duration::from_hours(24);

const CONTENT_TYPE: &str = "application/grpc";

/// A status code as it stands on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Code(pub u32);

impl Code {
    #![expect(missing_docs, reason = "the names are those of gRPC")]
    pub const OK: Code = Code(0);
    pub const CANCELLED: Code = Code(1);
    pub const UNKNOWN: Code = Code(2);
    pub const INVALID_ARGUMENT: Code = Code(3);
    pub const DEADLINE_EXCEEDED: Code = Code(4);
    pub const NOT_FOUND: Code = Code(5);
    pub const ALREADY_EXISTS: Code = Code(6);
    pub const PERMISSION_DENIED: Code = Code(7);
    pub const RESOURCE_EXHAUSTED: Code = Code(8);
    pub const FAILED_PRECONDITION: Code = Code(9);
    pub const ABORTED: Code = Code(10);
    pub const OUT_OF_RANGE: Code = Code(11);
    pub const UNIMPLEMENTED: Code = Code(12);
    pub const INTERNAL: Code = Code(13);
    pub const UNAVAILABLE: Code = Code(14);
    pub const DATA_LOSS: Code = Code(15);
    pub const UNAUTHENTICATED: Code = Code(16);
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 17] = [
            "OK",
            "CANCELLED",
            "UNKNOWN",
            "INVALID_ARGUMENT",
            "DEADLINE_EXCEEDED",
            "NOT_FOUND",
            "ALREADY_EXISTS",
            "PERMISSION_DENIED",
            "RESOURCE_EXHAUSTED",
            "FAILED_PRECONDITION",
            "ABORTED",
            "OUT_OF_RANGE",
            "UNIMPLEMENTED",
            "INTERNAL",
            "UNAVAILABLE",
            "DATA_LOSS",
            "UNAUTHENTICATED",
        ];
        match usize::try_from(self.0).ok().and_then(|code| NAMES.get(code)) {
            Some(name) => f.write_str(name),
            None => write!(f, "CODE_{}", self.0),
        }
    }
}

/// How a call ended, if not well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Never [`Code::OK`].
    pub code: Code,
    /// For people, except where `spec/plugin.md` matches a part of it.
    pub message: String,
}

impl Status {
    /// A failure.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Status { code, message: message.into() }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

impl std::error::Error for Status {}

impl From<DecodeError> for Status {
    /// As in other implementations, what cannot be decoded is an internal error.
    fn from(error: DecodeError) -> Self {
        Status::new(Code::INTERNAL, error.to_string())
    }
}

impl From<crate::error::Error> for Status {
    /// A failure without a code of its own is `UNKNOWN` with its text (`spec/ipamd.md` 10.1).
    fn from(error: crate::error::Error) -> Self {
        Status::new(Code::UNKNOWN, error.to_string())
    }
}

/// Percent-encodes a status message: printable ASCII but `%` stays.
fn percent_encode(message: &str) -> String {
    let mut out = String::with_capacity(message.len());
    for character in message.chars() {
        let before = out.len();
        if matches!(character, ' '..='~') && character != '%' {
            out.push(character);
        } else {
            for byte in character.encode_utf8(&mut [0; 4]).bytes() {
                out.push('%');
                for nibble in [byte >> 4, byte & 15] {
                    out.push(char::from_digit(nibble.into(), 16).map_or('0', |digit| digit.to_ascii_uppercase()));
                }
            }
        }
        if out.len() > STATUS_TEXT_LIMIT {
            out.truncate(before); // at a whole character
            break;
        }
    }
    out
}

/// The reverse. Invalid sequences stay as they are, as the protocol asks.
fn percent_decode(text: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if let (b'%', [high, low, after @ ..]) = (first, after)
            && let (Some(high), Some(low)) = (char::from(*high).to_digit(16), char::from(*low).to_digit(16))
            && let Ok(byte) = u8::try_from(high << 4 | low)
        {
            bytes.push(byte);
            rest = after;
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `grpc-timeout`: at most eight digits and a unit, in the finest unit that holds it, rounded up, never zero.
fn encode_timeout(timeout: Duration) -> String {
    const DIGITS: u128 = 99_999_999;
    for (unit, nanos) in [("n", 1u128), ("u", 1_000), ("m", 1_000_000), ("S", 1_000_000_000)] {
        let value = timeout.as_nanos().max(1).div_ceil(nanos);
        if value <= DIGITS {
            return format!("{value}{unit}");
        }
    }
    format!("{DIGITS}S") // three years
}

fn parse_timeout(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value = digits.iter().fold(0u64, |value, digit| value * 10 + u64::from(digit - b'0'));
    let timeout = match unit {
        b'H' => Duration::from_secs(value * 3600),
        b'M' => Duration::from_secs(value * 60),
        b'S' => Duration::from_secs(value),
        b'm' => Duration::from_millis(value),
        b'u' => Duration::from_micros(value),
        b'n' => Duration::from_nanos(value),
        _ => return None,
    };
    Some(timeout.min(TIMEOUT_LIMIT))
}

/// What comes of a call.
type Reply = std::result::Result<Vec<u8>, Status>;

/// Puts the five-octet prefix before a message.
fn frame_message(message: &[u8]) -> Result<Vec<u8>, Status> {
    let length = u32::try_from(message.len()).ok().filter(|_| message.len() <= MESSAGE_LIMIT);
    let Some(length) = length else {
        let text = format!("message of {} bytes is larger than {MESSAGE_LIMIT}", message.len());
        return Err(Status::new(Code::RESOURCE_EXHAUSTED, text));
    };
    let mut framed = Vec::with_capacity(5 + message.len());
    framed.push(0);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    Ok(framed)
}

/// Takes the prefix off the one message that a unary body must be.
fn unframe_message(mut body: Vec<u8>) -> Result<Vec<u8>, Status> {
    let Some((&[flag, l0, l1, l2, l3], message)) = body.split_first_chunk::<5>() else {
        return Err(Status::new(Code::INTERNAL, "no message where one is due"));
    };
    if flag != 0 {
        return Err(Status::new(Code::UNIMPLEMENTED, "compressed messages are not supported"));
    }
    if usize::try_from(u32::from_be_bytes([l0, l1, l2, l3])).ok() != Some(message.len()) {
        return Err(Status::new(Code::INTERNAL, "not exactly one message where one is due"));
    }
    body.drain(..5);
    Ok(body)
}

fn find<'a>(fields: &'a [Field], name: &str) -> Option<&'a [u8]> {
    fields.iter().find(|field| field.name == name.as_bytes()).map(|field| field.value.as_slice())
}

fn is_grpc(content_type: Option<&[u8]>) -> bool {
    content_type.is_some_and(|value| match value.strip_prefix(CONTENT_TYPE.as_bytes()) {
        Some([]) => true,
        Some([next, ..]) => matches!(next, b'+' | b';'),
        None => false,
    })
}

/// What a reset stream means to the caller (PROTOCOL-HTTP2.md, "Errors").
fn status_of_reset(code: u32) -> Status {
    let status = match code {
        h2::code::REFUSED_STREAM => Code::UNAVAILABLE,
        h2::code::CANCEL => Code::CANCELLED,
        h2::code::ENHANCE_YOUR_CALM => Code::RESOURCE_EXHAUSTED,
        h2::code::INADEQUATE_SECURITY => Code::PERMISSION_DENIED,
        _ => Code::INTERNAL,
    };
    Status::new(status, format!("stream reset by the server (HTTP/2 error {code})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_messages_survive_percent_encoding() {
        let check = |message: &str, encoded: &str| {
            assert_eq!(percent_encode(message), encoded);
            assert_eq!(percent_decode(encoded.as_bytes()), message);
        };
        check("", "");
        check("datastore: unknown pod", "datastore: unknown pod");
        check("100%", "100%25");
        check("a\nb\t\u{7f}", "a%0Ab%09%7F");
        check("Grüße ☃", "Gr%C3%BC%C3%9Fe %E2%98%83");
        for (odd, text) in
            [("%", "%"), ("%4", "%4"), ("%zz", "%zz"), ("%c3%bc", "ü"), ("%+1", "%+1"), ("%ff", "\u{fffd}")]
        {
            assert_eq!(percent_decode(odd.as_bytes()), text);
        }
    }

    #[test]
    fn long_status_messages_are_cut_at_a_character() {
        let encoded = percent_encode(&"☃".repeat(1000));
        assert_eq!(encoded.len(), STATUS_TEXT_LIMIT / 9 * 9);
        assert_eq!(percent_decode(encoded.as_bytes()), "☃".repeat(STATUS_TEXT_LIMIT / 9));
    }

    #[test]
    fn timeouts_use_the_finest_unit_that_fits() {
        let check = |timeout: Duration, text: &str| {
            assert_eq!(encode_timeout(timeout), text);
            assert_eq!(parse_timeout(text.as_bytes()), Some(timeout.max(Duration::from_nanos(1))));
        };
        check(Duration::ZERO, "1n");
        check(Duration::from_millis(99), "99000000n");
        check(Duration::from_mins(1), "60000000u");
        check(Duration::from_mins(2), "120000m");
        check(Duration::from_hours(24), "86400000m");
        assert_eq!(encode_timeout(Duration::from_nanos(100_000_000_001)), "100001m");
        assert_eq!(encode_timeout(Duration::MAX), "99999999S");
        for (text, timeout) in [
            ("2M", Some(Duration::from_mins(2))),
            ("1H", Some(Duration::from_hours(1))),
            ("99999999H", Some(TIMEOUT_LIMIT)),
            ("", None),
            ("S", None),
            ("1", None),
            ("1s", None),
            ("-1S", None),
            ("123456789n", None),
        ] {
            assert_eq!(parse_timeout(text.as_bytes()), timeout, "{text}");
        }
    }

    #[test]
    fn a_body_is_exactly_one_message() {
        assert_eq!(frame_message(b"ab").unwrap(), [0, 0, 0, 0, 2, b'a', b'b']);
        assert_eq!(frame_message(&vec![0; MESSAGE_LIMIT + 1]).unwrap_err().code, Code::RESOURCE_EXHAUSTED);
        let check = |body: &[u8], expected: Result<&[u8], Code>| {
            let got = unframe_message(body.to_vec()).map_err(|status| status.code);
            assert_eq!(got.as_deref(), expected.as_ref().map(|bytes| *bytes));
        };
        check(&[0, 0, 0, 0, 0], Ok(b""));
        check(&[0, 0, 0, 0, 1, 7], Ok(&[7]));
        check(&[], Err(Code::INTERNAL));
        check(&[0, 0, 0, 0], Err(Code::INTERNAL));
        check(&[0, 0, 0, 0, 2, 7], Err(Code::INTERNAL));
        check(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0], Err(Code::INTERNAL));
        check(&[1, 0, 0, 0, 1, 7], Err(Code::UNIMPLEMENTED));
    }

    #[test]
    fn content_types_of_grpc() {
        for (value, expected) in [
            (Some("application/grpc"), true),
            (Some("application/grpc+proto"), true),
            (Some("application/grpc;x=y"), true),
            (Some("application/grpc-web"), false),
            (Some("text/html"), false),
            (None, false),
        ] {
            assert_eq!(is_grpc(value.map(str::as_bytes)), expected, "{value:?}");
        }
    }

    #[test]
    fn a_status_shows_its_message_first() {
        assert_eq!(Status::new(Code::NOT_FOUND, "no such pod").to_string(), "no such pod (NOT_FOUND)");
        assert_eq!(Status::new(Code(99), "x").to_string(), "x (CODE_99)");
    }
}
