//! Netlink attributes (`struct nlattr`, RFC 3549 2.2.1 and `linux/netlink.h`): length and type of two bytes each in host
//! order, the value, padding to four bytes.
//!
//! The writer nests by closures; the reader is bounds-checked, borrows, and ends at the first attribute that does not fit:
//! what it reads comes from outside and must never make it panic.

use crate::model::net::Mac;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// NLA_F_NESTED: the value is a list of attributes.
const NESTED: u16 = 0x8000;
/// NLA_TYPE_MASK: the type without NLA_F_NESTED and NLA_F_NET_BYTEORDER.
const TYPE_MASK: u16 = 0x3fff;
const HEADER: usize = 4;

fn aligned(length: usize) -> usize {
    (length + 3) & !3
}

/// A message body under construction: the fixed header of the family, then attributes.
#[derive(Debug)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// Starts with the fixed header (`ifinfomsg`, `rtmsg`, `nfgenmsg`, …), padded to four bytes.
    pub fn new(header: &[u8]) -> Writer {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(header);
        bytes.resize(aligned(bytes.len()), 0);
        Writer(bytes)
    }

    /// The finished body.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }

    fn filled(&mut self, kind: u16, fill: impl FnOnce(&mut Writer)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; HEADER]);
        fill(self);
        let length = self.0.len() - start;
        // What is written is made by us and bounded far below (names of 15 bytes, comments of 128, rules of a dozen
        // expressions), so this states an invariant.
        let field = u16::try_from(length).expect("an attribute is shorter than 64 KiB");
        self.0[start..start + 2].copy_from_slice(&field.to_ne_bytes());
        self.0[start + 2..start + HEADER].copy_from_slice(&kind.to_ne_bytes());
        self.0.resize(aligned(self.0.len()), 0);
    }

    /// Raw bytes as the value.
    pub fn bytes(&mut self, kind: impl Into<u16>, value: &[u8]) {
        self.filled(kind.into(), |writer| writer.0.extend_from_slice(value));
    }

    /// Bytes without an attribute around them, padded: the fixed header inside some nests.
    pub fn raw(&mut self, value: &[u8]) {
        self.0.extend_from_slice(value);
        self.0.resize(aligned(self.0.len()), 0);
    }

    /// A nest as rtnetlink has them, without NLA_F_NESTED.
    pub fn nest(&mut self, kind: impl Into<u16>, fill: impl FnOnce(&mut Writer)) {
        self.filled(kind.into(), fill);
    }

    /// A nest as netfilter demands them, with NLA_F_NESTED.
    pub fn nest_flagged(&mut self, kind: impl Into<u16>, fill: impl FnOnce(&mut Writer)) {
        self.filled(kind.into() | NESTED, fill);
    }

    /// A byte.
    pub fn u8(&mut self, kind: impl Into<u16>, value: u8) {
        self.bytes(kind, &[value]);
    }

    /// 16 bits in host order.
    pub fn u16(&mut self, kind: impl Into<u16>, value: u16) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    /// 32 bits in host order.
    pub fn u32(&mut self, kind: impl Into<u16>, value: u32) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    /// 32 bits in network order.
    pub fn u32_be(&mut self, kind: impl Into<u16>, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// 64 bits in network order.
    pub fn u64_be(&mut self, kind: impl Into<u16>, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// Text with the NUL that the kernel wants behind it.
    pub fn text(&mut self, kind: impl Into<u16>, value: &str) {
        self.filled(kind.into(), |writer| {
            writer.0.extend_from_slice(value.as_bytes());
            writer.0.push(0);
        });
    }

    /// An IP address, 4 or 16 bytes.
    pub fn ip(&mut self, kind: impl Into<u16>, value: IpAddr) {
        match value {
            IpAddr::V4(value) => self.bytes(kind, &value.octets()),
            IpAddr::V6(value) => self.bytes(kind, &value.octets()),
        }
    }
}

/// One attribute read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr<'a> {
    /// Type without the flag bits.
    pub kind: u16,
    /// Value without padding.
    pub value: &'a [u8],
}

impl<'a> Attr<'a> {
    /// A byte.
    pub fn u8(&self) -> Option<u8> {
        self.value.first().copied()
    }

    fn array<const N: usize>(&self) -> Option<[u8; N]> {
        self.value.get(..N)?.try_into().ok()
    }

    /// 16 bits in host order.
    pub fn u16(&self) -> Option<u16> {
        self.array().map(u16::from_ne_bytes)
    }

    /// 16 bits in network order.
    pub fn u16_be(&self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// 32 bits in host order.
    pub fn u32(&self) -> Option<u32> {
        self.array().map(u32::from_ne_bytes)
    }

    /// 32 bits in network order.
    pub fn u32_be(&self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// 64 bits in network order.
    pub fn u64_be(&self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// Text up to its NUL; bytes that are no UTF-8 (the kernel allows any in a link's name) become U+FFFD.
    pub fn text(&self) -> String {
        let end = self.value.iter().position(|byte| *byte == 0).unwrap_or(self.value.len());
        String::from_utf8_lossy(&self.value[..end]).into_owned()
    }

    /// An IP address, told by its length.
    pub fn ip(&self) -> Option<IpAddr> {
        match self.value.len() {
            4 => self.array::<4>().map(|octets| Ipv4Addr::from(octets).into()),
            16 => self.array::<16>().map(|octets| Ipv6Addr::from(octets).into()),
            _ => None,
        }
    }

    /// A hardware address, if it has six bytes.
    pub fn mac(&self) -> Option<Mac> {
        <[u8; 6]>::try_from(self.value).ok().map(Mac)
    }

    /// The attributes inside.
    pub fn nested(&self) -> Attrs<'a> {
        Attrs(self.value)
    }
}

/// The attributes of a message body or of a nest, in order. Ends at the first one that is malformed.
#[derive(Clone, Debug)]
pub struct Attrs<'a>(&'a [u8]);

impl<'a> Attrs<'a> {
    /// The attributes behind a fixed header of `header` bytes; none if the body is shorter.
    pub fn after(body: &'a [u8], header: usize) -> Attrs<'a> {
        Attrs(body.get(aligned(header)..).unwrap_or_default())
    }

    /// The first attribute of this type.
    pub fn find(mut self, kind: impl Into<u16>) -> Option<Attr<'a>> {
        let kind = kind.into();
        self.by_ref().find(|attr| attr.kind == kind)
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = Attr<'a>;

    fn next(&mut self) -> Option<Attr<'a>> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..HEADER)?.try_into().ok()?) & TYPE_MASK;
        let Some(value) = self.0.get(HEADER..length) else {
            self.0 = &[];
            return None;
        };
        self.0 = self.0.get(aligned(length)..).unwrap_or_default();
        Some(Attr { kind, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layout_is_that_of_the_kernel() {
        let mut writer = Writer::new(&[7]);
        writer.u8(1u16, 0xaa);
        writer.nest_flagged(2u16, |writer| writer.text(3u16, "ab"));
        let length = |n: u16| n.to_ne_bytes();
        let mut expected = vec![7, 0, 0, 0];
        expected.extend([&length(5)[..], &length(1), &[0xaa, 0, 0, 0]].concat());
        expected.extend([&length(12)[..], &length(0x8002), &length(7), &length(3), b"ab\0\0"].concat());
        assert_eq!(writer.finish(), expected);
    }

    #[test]
    fn values_come_back() {
        let mut writer = Writer::new(&[]);
        writer.u16(1u16, 0x1234);
        writer.u32(2u16, 0x1234_5678);
        writer.u32_be(3u16, 9);
        writer.u64_be(4u16, 1 << 40);
        writer.ip(5u16, "fd00::1".parse().unwrap());
        writer.text(6u16, "eth0");
        writer.bytes(7u16, &[2, 0, 0, 0, 0, 1]);
        writer.nest(8u16, |writer| writer.u8(9u16, 5));
        let body = writer.finish();
        let find = |kind: u16| Attrs::after(&body, 0).find(kind).unwrap();
        assert_eq!(find(1).u16(), Some(0x1234));
        assert_eq!(find(2).u32(), Some(0x1234_5678));
        assert_eq!((find(3).u32_be(), find(3).value), (Some(9), &[0, 0, 0, 9][..]));
        assert_eq!(find(4).u64_be(), Some(1 << 40));
        assert_eq!(find(5).ip(), Some("fd00::1".parse().unwrap()));
        assert_eq!(find(6).text(), "eth0");
        assert_eq!(find(7).mac().unwrap().to_string(), "02:00:00:00:00:01");
        assert_eq!(find(8).nested().find(9u16).unwrap().u8(), Some(5));
        assert_eq!(find(1).u64_be(), None, "too short");
    }

    #[test]
    fn malformed_attributes_end_the_list() {
        let check = |bytes: &[u8], count: usize| assert_eq!(Attrs::after(bytes, 0).count(), count, "{bytes:?}");
        let word = |length: u16, kind: u16| [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        check(&[], 0);
        check(&[4], 0);
        check(&word(0, 1), 0);
        check(&word(3, 1), 0);
        check(&word(4, 1), 1);
        check(&word(5, 1), 0);
        check(&[word(4, 1), word(9, 1), vec![0; 4]].concat(), 1);
        assert_eq!(Attrs::after(&[0; 3], 16).count(), 0);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), header in 0usize..64) {
            fn walk(attrs: Attrs<'_>, depth: usize) {
                for attr in attrs {
                    let _ = (attr.u8(), attr.u16(), attr.u32(), attr.u64_be(), attr.text(), attr.ip(), attr.mac());
                    if depth < 8 {
                        walk(attr.nested(), depth + 1);
                    }
                }
            }
            walk(Attrs::after(&bytes, header), 0);
        }

        #[test]
        fn lists_round_trip(list in proptest::collection::vec((0u16..0x3fff, proptest::collection::vec(any::<u8>(), 0..40)), 0..12)) {
            let mut writer = Writer::new(&[]);
            for (kind, value) in &list {
                writer.bytes(*kind, value);
            }
            let body = writer.finish();
            let read = Attrs::after(&body, 0).map(|attr| (attr.kind, attr.value.to_vec())).collect::<Vec<_>>();
            prop_assert_eq!(read, list);
        }
    }
}
