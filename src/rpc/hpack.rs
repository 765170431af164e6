//! HPACK, the header compression of HTTP/2 (RFC 7541).
//!
//! The encoder uses the static table and literals without indexing only: it keeps no state, so nothing that is sent can
//! get out of step. The decoder is complete, because Go and C++ peers index and Huffman-code headers from the first
//! request on. What it returns is bounded by the caller's limit and not by the size of the input, since a few bytes can
//! name a table entry of 4 KiB again and again. It must not do I/O.

use std::collections::VecDeque;
use std::fmt;

/// One header field; RFC 9113 8.2 leaves the validity of names and values to the layer above.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name, lower case in valid HTTP/2.
    pub name: Vec<u8>,
    /// Value, any bytes.
    pub value: Vec<u8>,
}

impl Field {
    /// Size for limits and the dynamic table (RFC 7541 4.1).
    fn size(&self) -> usize {
        self.name.len() + self.value.len() + ENTRY_OVERHEAD
    }
}

/// Added to each entry's size (RFC 7541 4.1).
const ENTRY_OVERHEAD: usize = 32;

/// Size of the dynamic table that we advertise by advertising nothing (RFC 9113 6.5.2).
pub const TABLE_LIMIT: usize = 4096;

/// Integers beyond this are refused: no string, index or table size of ours comes near.
const INTEGER_LIMIT: u32 = 1 << 24;

/// Why a header block is refused. Always the end of the connection (RFC 9113 4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HpackError {
    /// The block ends inside a field.
    Truncated,
    /// An integer is too large or coded in too many octets.
    Integer,
    /// Index zero, or one beyond both tables.
    Index,
    /// Bad padding, or the end-of-string symbol inside a string.
    Huffman,
    /// A table size update beyond the limit or behind a field.
    TableSize,
    /// The decoded list is larger than allowed.
    TooLarge,
}

impl fmt::Display for HpackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HpackError::Truncated => "header block truncated",
            HpackError::Integer => "header integer too large",
            HpackError::Index => "header index out of range",
            HpackError::Huffman => "header string badly huffman-coded",
            HpackError::TableSize => "header table size update not allowed",
            HpackError::TooLarge => "header list too large",
        })
    }
}

impl std::error::Error for HpackError {}

/// RFC 7541 appendix A.
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// Lengths in bits of the Huffman codes of the 256 octets and of end-of-string (RFC 7541 appendix B). The code is
/// canonical (equal lengths count up in symbol order), so the lengths are the whole code.
#[rustfmt::skip]
const CODE_LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];
const END_OF_STRING: u16 = 256;
const LONGEST_CODE: usize = 30;

/// The canonical code made decodable: for each length the first code, how many there are, and where their symbols start
/// in the list of symbols ordered by (length, symbol).
struct Huffman {
    first: [u32; LONGEST_CODE + 1],
    count: [u16; LONGEST_CODE + 1],
    start: [u16; LONGEST_CODE + 1],
    symbols: [u16; 257],
}

const HUFFMAN: Huffman = build_huffman();

const fn build_huffman() -> Huffman {
    let mut table = Huffman {
        first: [0; LONGEST_CODE + 1],
        count: [0; LONGEST_CODE + 1],
        start: [0; LONGEST_CODE + 1],
        symbols: [0; 257],
    };
    let (mut length, mut code, mut filled) = (1, 0u32, 0u16);
    while length <= LONGEST_CODE {
        code <<= 1;
        table.first[length] = code;
        table.start[length] = filled;
        let mut symbol = 0u16;
        while symbol <= END_OF_STRING {
            if CODE_LENGTHS[symbol as usize] as usize == length {
                table.symbols[filled as usize] = symbol;
                table.count[length] += 1;
                filled += 1;
                code += 1;
            }
            symbol += 1;
        }
        length += 1;
    }
    table
}

fn huffman_decode(coded: &[u8]) -> Result<Vec<u8>, HpackError> {
    static TABLE: Huffman = HUFFMAN;
    let mut text = Vec::with_capacity(coded.len() * 8 / 5);
    let (mut code, mut length) = (0u32, 0usize);
    for byte in coded {
        for bit in (0..8).rev() {
            code = code << 1 | u32::from(byte >> bit & 1);
            length += 1;
            if length > LONGEST_CODE {
                return Err(HpackError::Huffman);
            }
            // `code` counts from the first code of its length; below it, it is a prefix of nothing that ends here.
            let Some(offset) = code.checked_sub(TABLE.first[length]) else { continue };
            if offset < u32::from(TABLE.count[length]) {
                let at = usize::from(TABLE.start[length]) + offset as usize;
                match u8::try_from(TABLE.symbols[at]) {
                    Ok(octet) => text.push(octet),
                    Err(_) => return Err(HpackError::Huffman), // end-of-string must not be coded (RFC 7541 5.2)
                }
                (code, length) = (0, 0);
            }
        }
    }
    // What is left is padding: fewer than eight bits, all ones (RFC 7541 5.2).
    if length < 8 && code == (1 << length) - 1 { Ok(text) } else { Err(HpackError::Huffman) }
}

/// Decodes the header blocks of one direction of one connection, in order.
#[derive(Debug)]
pub struct Decoder {
    table: VecDeque<Field>, // newest first
    size: usize,
    limit: usize, // as the peer set it, at most TABLE_LIMIT
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder { table: VecDeque::new(), size: 0, limit: TABLE_LIMIT }
    }
}

impl Decoder {
    /// A decoder with an empty table of 4096 octets.
    pub fn new() -> Self {
        Decoder::default()
    }

    /// The fields of a complete header block. Their sizes (RFC 7541 4.1) may add up to `limit` octets. After an error the
    /// decoder is out of step with the peer and the connection must end.
    pub fn decode(&mut self, block: &[u8], limit: usize) -> Result<Vec<Field>, HpackError> {
        let mut input = Input { rest: block };
        let (mut fields, mut total) = (Vec::new(), 0);
        while let Some(first) = input.rest.first().copied() {
            let field = if first & 0x80 != 0 {
                let index = input.integer(7)?;
                self.entry(index)?
            } else if first & 0xe0 == 0x20 {
                let size = input.integer(5)?;
                if !fields.is_empty() || size > TABLE_LIMIT {
                    return Err(HpackError::TableSize);
                }
                self.limit = size;
                self.evict(0);
                continue;
            } else {
                // 01: with indexing. 0000: without. 0001: never indexed; the same thing to a receiver.
                let indexed = first & 0x40 != 0;
                let index = input.integer(if indexed { 6 } else { 4 })?;
                let name = if index == 0 { input.string()? } else { self.entry(index)?.name };
                let field = Field { name, value: input.string()? };
                if indexed {
                    self.insert(field.clone());
                }
                field
            };
            total += field.size();
            if total > limit {
                return Err(HpackError::TooLarge);
            }
            fields.push(field);
        }
        Ok(fields)
    }

    fn entry(&self, index: usize) -> Result<Field, HpackError> {
        let index = index.checked_sub(1).ok_or(HpackError::Index)?;
        if let Some((name, value)) = STATIC.get(index) {
            return Ok(Field { name: name.as_bytes().to_vec(), value: value.as_bytes().to_vec() });
        }
        self.table.get(index - STATIC.len()).cloned().ok_or(HpackError::Index)
    }

    fn insert(&mut self, field: Field) {
        let size = field.size();
        self.evict(size);
        // An entry larger than the table empties it and is not stored; that is no error (RFC 7541 4.4).
        if size <= self.limit {
            self.size += size;
            self.table.push_front(field);
        }
    }

    /// Drops the oldest entries until `room` more octets fit.
    fn evict(&mut self, room: usize) {
        while self.size + room > self.limit {
            let Some(oldest) = self.table.pop_back() else { break };
            self.size -= oldest.size();
        }
    }
}

struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    fn octet(&mut self) -> Result<u8, HpackError> {
        let (first, rest) = self.rest.split_first().ok_or(HpackError::Truncated)?;
        self.rest = rest;
        Ok(*first)
    }

    /// An integer whose first octet has `prefix` bits for it (RFC 7541 5.1).
    fn integer(&mut self, prefix: u32) -> Result<usize, HpackError> {
        let mask = (1u32 << prefix) - 1;
        let mut value = u32::from(self.octet()?) & mask;
        if value == mask {
            let mut shift = 0;
            loop {
                let octet = self.octet()?;
                value += u32::from(octet & 0x7f) << shift;
                if value > INTEGER_LIMIT {
                    return Err(HpackError::Integer);
                }
                if octet & 0x80 == 0 {
                    break;
                }
                shift += 7;
                if shift > 21 {
                    return Err(HpackError::Integer);
                }
            }
        }
        Ok(value as usize)
    }

    fn string(&mut self) -> Result<Vec<u8>, HpackError> {
        let huffman = self.rest.first().ok_or(HpackError::Truncated)? & 0x80 != 0;
        let length = self.integer(7)?;
        let (text, rest): (&'a [u8], _) = self.rest.split_at_checked(length).ok_or(HpackError::Truncated)?;
        self.rest = rest;
        if huffman { huffman_decode(text) } else { Ok(text.to_vec()) }
    }
}

/// Appends one field: an index of the static table if it stands there, else a literal without indexing.
pub fn encode(out: &mut Vec<u8>, name: &str, value: &str) {
    let mut named = 0;
    for (at, (known, known_value)) in STATIC.iter().enumerate() {
        if *known == name {
            if *known_value == value {
                return encode_integer(out, 0x80, 7, at + 1);
            }
            if named == 0 {
                named = at + 1;
            }
        }
    }
    encode_integer(out, 0, 4, named);
    if named == 0 {
        encode_integer(out, 0, 7, name.len());
        out.extend_from_slice(name.as_bytes());
    }
    encode_integer(out, 0, 7, value.len());
    out.extend_from_slice(value.as_bytes());
}

fn encode_integer(out: &mut Vec<u8>, pattern: u8, prefix: u32, value: usize) {
    let mask = (1usize << prefix) - 1;
    if value < mask {
        out.push(pattern | low_octet(value));
        return;
    }
    out.push(pattern | low_octet(mask));
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(low_octet(rest & 0x7f) | 0x80);
        rest >>= 7;
    }
    out.push(low_octet(rest));
}

fn low_octet(value: usize) -> u8 {
    u8::try_from(value & 0xff).unwrap_or(u8::MAX)
}

/// Decodes foreign bytes as a sequence of header blocks, each led by its length in one octet. For fuzzing: whatever comes
/// out, the table keeps its bound.
#[doc(hidden)]
pub fn fuzz_hpack(bytes: &[u8]) {
    const LIMIT: usize = 8192;
    let mut decoder = Decoder::new();
    let mut rest = bytes;
    while let Some((length, tail)) = rest.split_first() {
        let (block, tail) = tail.split_at(usize::from(*length).min(tail.len()));
        rest = tail;
        let Ok(fields) = decoder.decode(block, LIMIT) else { return };
        assert!(fields.iter().map(Field::size).sum::<usize>() <= LIMIT, "the list limit holds");
        assert!(decoder.size <= decoder.limit && decoder.limit <= TABLE_LIMIT, "the table limit holds");
        assert_eq!(decoder.size, decoder.table.iter().map(Field::size).sum::<usize>(), "the table size is exact");
    }
}

#[cfg(test)]
#[path = "hpack_tests.rs"]
mod tests;
