//! Rule expressions of nf_tables: `model::nft::Expr` to the kernel's little programs and back (`spec/dataplane.md` 24.2,
//! numbers from `linux/netfilter/nf_tables.h`). Everything goes through register 1.
//!
//! Decoding never fails: what is not exactly one of ours becomes `Expr::Foreign` with the kernel's name for it, which is
//! always a difference. It also reads the shorter loads by which the nft tool compares prefixes of whole bytes.

use super::attr::{Attrs, Writer};
use crate::error::{Error, Result};
use crate::model::net::Family;
use crate::model::nft::{Expr, SnatPorts};
use ipnet::IpNet;
use std::net::IpAddr;

/// NFTA_LIST_ELEM, NFTA_EXPR_NAME, NFTA_EXPR_DATA.
const ELEM: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
/// NFTA_DATA_VALUE, NFTA_DATA_VERDICT.
const VALUE: u16 = 1;
const VERDICT: u16 = 2;
/// NFT_REG_VERDICT, NFT_REG_1.
const REG_VERDICT: u32 = 0;
const REG_1: u32 = 1;

const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_SKUID: u32 = 10;
/// The user that stands for none ((uid_t) -1).
const NO_USER: u32 = u32::MAX;
const CT_STATE: u32 = 0;
const CT_MARK: u32 = 3;
/// The bit of "new" in the connection's state.
const CT_STATE_NEW: u32 = 8;
const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const PAYLOAD_NETWORK: u32 = 1;
const FIB_ADDRTYPE: u32 = 3;
const FIB_SADDR: u32 = 1;
const FIB_DADDR: u32 = 2;
const FIB_IIF: u32 = 8;
/// RTN_LOCAL.
const TYPE_LOCAL: u32 = 2;
const NAT_SNAT: u32 = 0;
const NAT_MAP_IPS: u32 = 0x1;
const NAT_RANDOM: u32 = 0x4;
const NAT_FULLY_RANDOM: u32 = 0x10;
const REJECT_ICMP: u32 = 0;
const ACCEPT: i32 = 1;
const JUMP: i32 = libc::NFT_JUMP;
const RETURN: i32 = libc::NFT_RETURN;
/// IFNAMSIZ: interface names are compared with their padding.
const NAME_SIZE: usize = 16;

/// Port unreachable in ICMP and ICMPv6.
fn reject_code(family: Family) -> u8 {
    match family {
        Family::V4 => 3,
        Family::V6 => 4,
    }
}

/// Offset of the source address in the network header, and length of an address.
fn address_field(family: Family) -> (u32, usize) {
    match family {
        Family::V4 => (12, 4),
        Family::V6 => (8, 16),
    }
}

fn elem(writer: &mut Writer, name: &str, fill: impl FnOnce(&mut Writer)) {
    writer.nest_flagged(ELEM, |writer| {
        writer.text(EXPR_NAME, name);
        writer.nest_flagged(EXPR_DATA, fill);
    });
}

fn value(writer: &mut Writer, kind: u16, data: &[u8]) {
    writer.nest_flagged(kind, |writer| writer.bytes(VALUE, data));
}

/// `meta` and `ct` load a key into the register alike.
fn load(writer: &mut Writer, name: &str, key: u32) {
    elem(writer, name, |writer| {
        writer.u32_be(1u16, REG_1);
        writer.u32_be(2u16, key);
    });
}

/// `meta` and `ct` set a key from the register, with different attributes for it.
fn store(writer: &mut Writer, name: &str, key: u32) {
    elem(writer, name, |writer| {
        writer.u32_be(2u16, key);
        writer.u32_be(if name == "ct" { 4u16 } else { 3 }, REG_1);
    });
}

fn cmp(writer: &mut Writer, negate: bool, data: &[u8]) {
    elem(writer, "cmp", |writer| {
        writer.u32_be(1u16, REG_1);
        writer.u32_be(2u16, if negate { CMP_NEQ } else { CMP_EQ });
        value(writer, 3, data);
    });
}

fn bitwise(writer: &mut Writer, mask: &[u8], xor: &[u8]) {
    elem(writer, "bitwise", |writer| {
        writer.u32_be(1u16, REG_1);
        writer.u32_be(2u16, REG_1);
        writer.u32_be(3u16, u32::try_from(mask.len()).unwrap_or(0)); // 4 or 16
        value(writer, 4, mask);
        value(writer, 5, xor);
    });
}

/// `key & mask == value`, in host order like everything about marks.
fn masked_cmp(writer: &mut Writer, name: &str, key: u32, mask: u32, negate: bool, data: u32) {
    load(writer, name, key);
    bitwise(writer, &mask.to_ne_bytes(), &[0; 4]);
    cmp(writer, negate, &data.to_ne_bytes());
}

/// `key = key & mask ^ xor`.
fn masked_set(writer: &mut Writer, name: &str, key: u32, mask: u32, xor: u32) {
    load(writer, name, key);
    bitwise(writer, &mask.to_ne_bytes(), &xor.to_ne_bytes());
    store(writer, name, key);
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

fn name_match(writer: &mut Writer, key: u32, name: &str, prefix: bool, negate: bool) -> Result<()> {
    if name.is_empty() || name.len() >= NAME_SIZE || name.contains('\0') {
        return Err(Error::new(format!("{name:?} is no interface name of 1 to 15 bytes")));
    }
    let mut data = name.as_bytes().to_vec();
    if !prefix {
        data.resize(NAME_SIZE, 0);
    }
    load(writer, "meta", key);
    cmp(writer, negate, &data);
    Ok(())
}

fn fib_match(writer: &mut Writer, flags: u32, negate: bool) {
    elem(writer, "fib", |writer| {
        writer.u32_be(1u16, REG_1);
        writer.u32_be(2u16, FIB_ADDRTYPE);
        writer.u32_be(3u16, flags);
    });
    cmp(writer, negate, &TYPE_LOCAL.to_ne_bytes());
}

fn address_match(writer: &mut Writer, family: Family, source: bool, net: &IpNet, negate: bool) -> Result<()> {
    if Family::of(net.addr()) != family {
        return Err(Error::new(format!("{net} does not belong into a table of the other family")));
    }
    if net.prefix_len() == 0 {
        return if negate { Err(Error::new(format!("\"not {net}\" matches nothing"))) } else { Ok(()) };
    }
    let (source_offset, length) = address_field(family);
    let length_word = u32::try_from(length).unwrap_or(0); // 4 or 16
    elem(writer, "payload", |writer| {
        writer.u32_be(1u16, REG_1);
        writer.u32_be(2u16, PAYLOAD_NETWORK);
        writer.u32_be(3u16, if source { source_offset } else { source_offset + length_word });
        writer.u32_be(4u16, length_word);
    });
    if net.prefix_len() < net.max_prefix_len() {
        bitwise(writer, &octets(net.netmask()), &vec![0; length]);
    }
    cmp(writer, negate, &octets(net.network()));
    Ok(())
}

fn verdict(writer: &mut Writer, code: i32, chain: Option<&str>) {
    elem(writer, "immediate", |writer| {
        writer.u32_be(1u16, REG_VERDICT);
        writer.nest_flagged(2u16, |writer| {
            writer.nest_flagged(VERDICT, |writer| {
                writer.u32_be(1u16, code.cast_unsigned());
                if let Some(chain) = chain {
                    writer.text(2u16, chain);
                }
            });
        });
    });
}

fn snat(writer: &mut Writer, family: Family, to: IpAddr, ports: SnatPorts) -> Result<()> {
    if Family::of(to) != family {
        return Err(Error::new(format!("snat to {to} does not belong into a table of the other family")));
    }
    elem(writer, "immediate", |writer| {
        writer.u32_be(1u16, REG_1);
        value(writer, 2, &octets(to));
    });
    elem(writer, "nat", |writer| {
        writer.u32_be(1u16, NAT_SNAT);
        writer.u32_be(2u16, u32::from(super::family_byte(family)));
        writer.u32_be(3u16, REG_1);
        match ports {
            SnatPorts::Keep => {}
            SnatPorts::Random => writer.u32_be(7u16, NAT_RANDOM),
            SnatPorts::FullyRandom => writer.u32_be(7u16, NAT_FULLY_RANDOM),
        }
    });
    Ok(())
}

/// Writes one match or statement of a table of `family` as list elements. An error is a value that cannot be sent: an
/// address of the other family, a name too long, or `Foreign`.
pub fn encode(writer: &mut Writer, family: Family, expr: &Expr) -> Result<()> {
    match expr {
        Expr::IifName { name, prefix, negate } => name_match(writer, META_IIFNAME, name, *prefix, *negate)?,
        Expr::OifName { name, prefix, negate } => name_match(writer, META_OIFNAME, name, *prefix, *negate)?,
        Expr::Daddr { net, negate } => address_match(writer, family, false, net, *negate)?,
        Expr::Saddr { net, negate } => address_match(writer, family, true, net, *negate)?,
        Expr::FibDaddrLocal { iif, negate } => {
            fib_match(writer, if *iif { FIB_DADDR | FIB_IIF } else { FIB_DADDR }, *negate);
        }
        Expr::FibSaddrLocal { negate } => fib_match(writer, FIB_SADDR, *negate),
        Expr::FromSocket => {
            load(writer, "meta", META_SKUID);
            cmp(writer, true, &NO_USER.to_ne_bytes());
        }
        Expr::CtStateNew => masked_cmp(writer, "ct", CT_STATE, CT_STATE_NEW, true, 0),
        Expr::CtMark { mask, value } => masked_cmp(writer, "ct", CT_MARK, *mask, false, *value),
        Expr::MetaMark { mask, value } => masked_cmp(writer, "meta", META_MARK, *mask, false, *value),
        Expr::CtMarkSet { bits } => masked_set(writer, "ct", CT_MARK, !bits, *bits),
        Expr::MetaMarkSet { bits } => masked_set(writer, "meta", META_MARK, !bits, *bits),
        Expr::MetaMarkClear { bits } => masked_set(writer, "meta", META_MARK, !bits, 0),
        Expr::Counter { packets, bytes } => elem(writer, "counter", |writer| {
            writer.u64_be(1u16, *bytes);
            writer.u64_be(2u16, *packets);
        }),
        Expr::Return => verdict(writer, RETURN, None),
        Expr::Accept => verdict(writer, ACCEPT, None),
        Expr::Jump(chain) => verdict(writer, JUMP, Some(chain)),
        Expr::Snat { to, ports } => snat(writer, family, *to, *ports)?,
        Expr::Reject => elem(writer, "reject", |writer| {
            writer.u32_be(1u16, REJECT_ICMP);
            writer.u8(2u16, reject_code(family));
        }),
        Expr::Foreign(name) => return Err(Error::new(format!("the foreign expression <{name}> cannot be sent"))),
    }
    Ok(())
}

/// One kernel expression as far as we know it.
#[derive(Debug)]
enum Raw<'a> {
    Load { name: &'static str, key: u32 },
    Store { name: &'static str, key: u32 },
    Payload { offset: u32, length: usize },
    Fib { flags: u32 },
    Bitwise { mask: &'a [u8], xor: &'a [u8] },
    Cmp { negate: bool, data: &'a [u8] },
    Counter { packets: u64, bytes: u64 },
    Immediate(&'a [u8]),
    Verdict { code: i32, chain: String },
    Snat { family: u32, flags: u32 },
    Reject { code: u8 },
    Other(String),
}

impl Raw<'_> {
    /// What to call it where it makes no sense to us.
    fn name(&self) -> String {
        match self {
            Raw::Load { name, .. } | Raw::Store { name, .. } => (*name).to_owned(),
            Raw::Payload { .. } => "payload".into(),
            Raw::Fib { .. } => "fib".into(),
            Raw::Bitwise { .. } => "bitwise".into(),
            Raw::Cmp { .. } => "cmp".into(),
            Raw::Counter { .. } => "counter".into(),
            Raw::Immediate(_) => "immediate".into(),
            Raw::Verdict { code: 0, .. } => "drop".into(),
            Raw::Verdict { code: libc::NFT_GOTO, chain } => format!("goto {chain}"),
            Raw::Verdict { code, .. } => format!("verdict {code}"),
            Raw::Snat { .. } => "nat".into(),
            Raw::Reject { .. } => "reject".into(),
            Raw::Other(name) => name.clone(),
        }
    }
}

/// The attributes of one expression by number; only those below 8 matter, and a higher one makes it unknown.
fn numbered(attrs: Attrs<'_>) -> Option<[Option<super::attr::Attr<'_>>; 8]> {
    let mut found = [None; 8];
    for attr in attrs {
        *found.get_mut(usize::from(attr.kind))? = Some(attr);
    }
    Some(found)
}

fn raw<'a>(name: &str, attrs: Attrs<'a>) -> Option<Raw<'a>> {
    let found = numbered(attrs)?;
    let word = |number: usize| found[number].and_then(|attr| attr.u32_be());
    let register = |number: usize| word(number) == Some(REG_1);
    let only = |numbers: &[usize]| (1..8).all(|number| found[number].is_none() || numbers.contains(&number));
    let data = |number: usize| found[number]?.nested().find(VALUE).map(|attr| attr.value);
    match name {
        "meta" if only(&[1, 2]) && register(1) => Some(Raw::Load { name: "meta", key: word(2)? }),
        "meta" if only(&[2, 3]) && register(3) => Some(Raw::Store { name: "meta", key: word(2)? }),
        "ct" if only(&[1, 2]) && register(1) => Some(Raw::Load { name: "ct", key: word(2)? }),
        "ct" if only(&[2, 4]) && register(4) => Some(Raw::Store { name: "ct", key: word(2)? }),
        "payload" if only(&[1, 2, 3, 4]) && register(1) && word(2) == Some(PAYLOAD_NETWORK) => {
            Some(Raw::Payload { offset: word(3)?, length: usize::try_from(word(4)?).ok()? })
        }
        "fib" if only(&[1, 2, 3]) && register(1) && word(2) == Some(FIB_ADDRTYPE) => Some(Raw::Fib { flags: word(3)? }),
        // Attribute 6 is the kind of operation, 0 (mask and xor) since kernels know others.
        "bitwise" if only(&[1, 2, 3, 4, 5, 6]) && register(1) && register(2) && word(6).unwrap_or(0) == 0 => {
            let (mask, xor) = (data(4)?, data(5)?);
            (mask.len() == xor.len()).then_some(Raw::Bitwise { mask, xor })
        }
        "cmp" if register(1) => match word(2)? {
            CMP_EQ => Some(Raw::Cmp { negate: false, data: data(3)? }),
            CMP_NEQ => Some(Raw::Cmp { negate: true, data: data(3)? }),
            _ => None,
        },
        "counter" => Some(Raw::Counter { bytes: found[1]?.u64_be()?, packets: found[2]?.u64_be()? }),
        "immediate" if register(1) => Some(Raw::Immediate(data(2)?)),
        "immediate" if word(1) == Some(REG_VERDICT) => {
            let verdict = found[2]?.nested().find(VERDICT)?.nested();
            let chain = verdict.clone().find(2u16).map(|attr| attr.text()).unwrap_or_default();
            Some(Raw::Verdict { code: verdict.find(1u16)?.u32_be()?.cast_signed(), chain })
        }
        "nat"
            if only(&[1, 2, 3, 4, 7])
                && word(1) == Some(NAT_SNAT)
                && register(3)
                && word(4).is_none_or(|r| r == REG_1) =>
        {
            Some(Raw::Snat { family: word(2)?, flags: word(7).unwrap_or(0) })
        }
        "reject" if word(1) == Some(REJECT_ICMP) => Some(Raw::Reject { code: found[2]?.u8()? }),
        _ => None,
    }
}

fn host_word(data: &[u8]) -> Option<u32> {
    data.try_into().ok().map(u32::from_ne_bytes)
}

fn interface(data: &[u8]) -> Option<(String, bool)> {
    let name = data.split(|byte| *byte == 0).next().unwrap_or_default();
    let padding = &data[name.len()..];
    let exact = data.len() == NAME_SIZE;
    let padded = if exact { !padding.is_empty() && padding.iter().all(|byte| *byte == 0) } else { padding.is_empty() };
    let name = std::str::from_utf8(name).ok().filter(|name| !name.is_empty())?;
    (padded && data.len() <= NAME_SIZE).then(|| (name.to_owned(), !exact))
}

/// The network that a load of the first `length` bytes of an address is compared with.
fn network(family: Family, length: usize, mask: Option<&[u8]>, data: &[u8]) -> Option<IpNet> {
    let full = address_field(family).1;
    if length == 0 || length > full || data.len() != length || mask.is_some_and(|mask| mask.len() != length) {
        return None;
    }
    let mut bits = [0u8; 16];
    let mut addr = [0u8; 16];
    addr[..length].copy_from_slice(data);
    bits[..length].copy_from_slice(mask.unwrap_or(&[0xff; 16][..length]));
    let prefix = u128::from_be_bytes(bits).leading_ones();
    if u128::from_be_bytes(bits).count_ones() != prefix || prefix == 0 {
        return None; // holes in the mask, or no mask at all
    }
    let addr = match family {
        Family::V4 => IpAddr::from(<[u8; 4]>::try_from(&addr[..4]).ok()?),
        Family::V6 => IpAddr::from(addr),
    };
    let net = IpNet::new(addr, u8::try_from(prefix).ok()?).ok()?;
    (net.trunc() == net).then_some(net)
}

fn address(family: Family, offset: u32, net: Option<IpNet>, negate: bool) -> Option<Expr> {
    let (source, length) = address_field(family);
    let net = net?;
    match offset.checked_sub(source)? {
        0 => Some(Expr::Saddr { net, negate }),
        distance if usize::try_from(distance) == Ok(length) => Some(Expr::Daddr { net, negate }),
        _ => None,
    }
}

fn mark_cmp(name: &str, key: u32, mask: u32, negate: bool, value: u32) -> Option<Expr> {
    match (name, key, negate) {
        ("ct", CT_STATE, true) if mask == CT_STATE_NEW && value == 0 => Some(Expr::CtStateNew),
        ("ct", CT_MARK, false) => Some(Expr::CtMark { mask, value }),
        ("meta", META_MARK, false) => Some(Expr::MetaMark { mask, value }),
        ("meta", META_SKUID, true) if mask == u32::MAX && value == NO_USER => Some(Expr::FromSocket),
        _ => None,
    }
}

fn mark_set(name: &str, key: u32, mask: u32, xor: u32) -> Option<Expr> {
    match (name, key) {
        ("ct", CT_MARK) if xor == !mask => Some(Expr::CtMarkSet { bits: xor }),
        ("meta", META_MARK) if xor == !mask => Some(Expr::MetaMarkSet { bits: xor }),
        ("meta", META_MARK) if xor == 0 => Some(Expr::MetaMarkClear { bits: !mask }),
        _ => None,
    }
}

/// The expression that a list of raw ones begins with, and how many it is made of.
fn first(family: Family, raws: &[Raw<'_>]) -> Option<(Expr, usize)> {
    let zero = |data: &[u8]| data.iter().all(|byte| *byte == 0);
    let expr = match raws {
        [Raw::Load { name: "meta", key: META_IIFNAME }, Raw::Cmp { negate, data }, ..] => {
            let (name, prefix) = interface(data)?;
            (Expr::IifName { name, prefix, negate: *negate }, 2)
        }
        [Raw::Load { name: "meta", key: META_OIFNAME }, Raw::Cmp { negate, data }, ..] => {
            let (name, prefix) = interface(data)?;
            (Expr::OifName { name, prefix, negate: *negate }, 2)
        }
        [Raw::Load { name, key }, Raw::Bitwise { mask, xor }, Raw::Cmp { negate, data }, ..] if zero(xor) => {
            (mark_cmp(name, *key, host_word(mask)?, *negate, host_word(data)?)?, 3)
        }
        [Raw::Load { name, key }, Raw::Cmp { negate, data }, ..] => {
            (mark_cmp(name, *key, u32::MAX, *negate, host_word(data)?)?, 2)
        }
        [Raw::Load { name, key }, Raw::Bitwise { mask, xor }, Raw::Store { name: to, key: into }, ..]
            if (name, key) == (to, into) =>
        {
            (mark_set(name, *key, host_word(mask)?, host_word(xor)?)?, 3)
        }
        [Raw::Payload { offset, length }, Raw::Bitwise { mask, xor }, Raw::Cmp { negate, data }, ..] if zero(xor) => {
            (address(family, *offset, network(family, *length, Some(mask), data), *negate)?, 3)
        }
        [Raw::Payload { offset, length }, Raw::Cmp { negate, data }, ..] => {
            (address(family, *offset, network(family, *length, None, data), *negate)?, 2)
        }
        [Raw::Fib { flags }, Raw::Cmp { negate, data }, ..] if host_word(data) == Some(TYPE_LOCAL) => {
            let negate = *negate;
            let expr = match *flags {
                FIB_SADDR => Expr::FibSaddrLocal { negate },
                FIB_DADDR => Expr::FibDaddrLocal { iif: false, negate },
                flags if flags == FIB_DADDR | FIB_IIF => Expr::FibDaddrLocal { iif: true, negate },
                _ => return None,
            };
            (expr, 2)
        }
        [Raw::Counter { packets, bytes }, ..] => (Expr::Counter { packets: *packets, bytes: *bytes }, 1),
        [Raw::Verdict { code: RETURN, .. }, ..] => (Expr::Return, 1),
        [Raw::Verdict { code: ACCEPT, .. }, ..] => (Expr::Accept, 1),
        [Raw::Verdict { code: JUMP, chain }, ..] => (Expr::Jump(chain.clone()), 1),
        [Raw::Immediate(data), Raw::Snat { family: word, flags }, ..]
            if *word == u32::from(super::family_byte(family)) =>
        {
            let to = match family {
                Family::V4 => IpAddr::from(<[u8; 4]>::try_from(*data).ok()?),
                Family::V6 => IpAddr::from(<[u8; 16]>::try_from(*data).ok()?),
            };
            let ports = match flags & !NAT_MAP_IPS {
                0 => SnatPorts::Keep,
                NAT_RANDOM => SnatPorts::Random,
                NAT_FULLY_RANDOM => SnatPorts::FullyRandom,
                _ => return None,
            };
            (Expr::Snat { to, ports }, 2)
        }
        [Raw::Reject { code }, ..] if *code == reject_code(family) => (Expr::Reject, 1),
        _ => return None,
    };
    Some(expr)
}

/// Reads the value of NFTA_RULE_EXPRESSIONS of a rule in a table of `family`.
pub fn decode(family: Family, expressions: &[u8]) -> Vec<Expr> {
    let raws = Attrs::after(expressions, 0)
        .map(|elem| {
            let name = elem.nested().find(EXPR_NAME).map(|name| name.text()).unwrap_or_default();
            let data = elem.nested().find(EXPR_DATA).map_or(Attrs::after(&[], 0), |data| data.nested());
            raw(&name, data).unwrap_or(Raw::Other(name))
        })
        .collect::<Vec<_>>();
    let mut exprs = Vec::new();
    let mut rest = &raws[..];
    while let Some(head) = rest.first() {
        let (expr, count) = first(family, rest).unwrap_or_else(|| (Expr::Foreign(head.name()), 1));
        exprs.push(expr);
        rest = rest.get(count..).unwrap_or_default();
    }
    exprs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(family: Family, expr: &Expr) -> Result<Vec<u8>> {
        let mut writer = Writer::new(&[]);
        encode(&mut writer, family, expr)?;
        Ok(writer.finish())
    }

    fn name() -> impl Strategy<Value = String> {
        "[a-z][a-z0-9.]{0,14}"
    }

    fn net(family: Family) -> impl Strategy<Value = IpNet> {
        let longest = if family == Family::V4 { 32 } else { 128 };
        (any::<[u8; 16]>(), 1u8..=longest).prop_map(move |(bytes, prefix)| {
            let addr = match family {
                Family::V4 => IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]),
                Family::V6 => IpAddr::from(bytes),
            };
            IpNet::new(addr, prefix).unwrap().trunc()
        })
    }

    fn expr(family: Family) -> impl Strategy<Value = Expr> {
        let flag = any::<bool>;
        // No bits at all would be the same program for "set" and "clear".
        let bits = || 1u32..;
        prop_oneof![
            (name(), flag(), flag()).prop_map(|(name, prefix, negate)| Expr::IifName { name, prefix, negate }),
            (name(), flag(), flag()).prop_map(|(name, prefix, negate)| Expr::OifName { name, prefix, negate }),
            (net(family), flag()).prop_map(|(net, negate)| Expr::Daddr { net, negate }),
            (net(family), flag()).prop_map(|(net, negate)| Expr::Saddr { net, negate }),
            (flag(), flag()).prop_map(|(iif, negate)| Expr::FibDaddrLocal { iif, negate }),
            flag().prop_map(|negate| Expr::FibSaddrLocal { negate }),
            Just(Expr::FromSocket),
            Just(Expr::CtStateNew),
            (any::<u32>(), any::<u32>()).prop_map(|(mask, value)| Expr::CtMark { mask, value }),
            (any::<u32>(), any::<u32>()).prop_map(|(mask, value)| Expr::MetaMark { mask, value }),
            bits().prop_map(|bits| Expr::CtMarkSet { bits }),
            bits().prop_map(|bits| Expr::MetaMarkSet { bits }),
            bits().prop_map(|bits| Expr::MetaMarkClear { bits }),
            (any::<u64>(), any::<u64>()).prop_map(|(packets, bytes)| Expr::Counter { packets, bytes }),
            Just(Expr::Return),
            Just(Expr::Accept),
            name().prop_map(Expr::Jump),
            (net(family), 0..3usize).prop_map(|(net, ports)| Expr::Snat {
                to: net.addr(),
                ports: [SnatPorts::Keep, SnatPorts::Random, SnatPorts::FullyRandom][ports],
            }),
            Just(Expr::Reject),
        ]
    }

    fn rule() -> impl Strategy<Value = (Family, Vec<Expr>)> {
        prop_oneof![Just(Family::V4), Just(Family::V6)]
            .prop_flat_map(|family| (Just(family), proptest::collection::vec(expr(family), 0..8)))
    }

    proptest! {
        #[test]
        fn rules_round_trip((family, exprs) in rule()) {
            let mut writer = Writer::new(&[]);
            for expr in &exprs {
                encode(&mut writer, family, expr).unwrap();
            }
            prop_assert_eq!(decode(family, &writer.finish()), exprs);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            decode(Family::V4, &bytes);
            decode(Family::V6, &bytes);
        }

        #[test]
        fn damaged_rules_never_panic((family, exprs) in rule(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut writer = Writer::new(&[]);
            for expr in &exprs {
                encode(&mut writer, family, expr).unwrap();
            }
            let mut bytes = writer.finish();
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
                bytes.truncate(bytes.len() - usize::from(byte) % 4);
            }
            decode(family, &bytes);
        }
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        let check = |family, expr: Expr, expected: &str| {
            assert_eq!(encoded(family, &expr).unwrap_err().to_string(), expected);
        };
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        check(Family::V4, Expr::Foreign("log".into()), "the foreign expression <log> cannot be sent");
        check(
            Family::V6,
            Expr::Daddr { net: net("10.0.0.0/8"), negate: false },
            "10.0.0.0/8 does not belong into a table of the other family",
        );
        check(Family::V4, Expr::Daddr { net: net("0.0.0.0/0"), negate: true }, "\"not 0.0.0.0/0\" matches nothing");
        let name = "a-name-of-sixteen".to_owned();
        check(
            Family::V4,
            Expr::IifName { name, prefix: true, negate: false },
            "\"a-name-of-sixteen\" is no interface name of 1 to 15 bytes",
        );
        check(
            Family::V4,
            Expr::Snat { to: "fd00::1".parse().unwrap(), ports: SnatPorts::Keep },
            "snat to fd00::1 does not belong into a table of the other family",
        );
        let everything = Expr::Daddr { net: net("0.0.0.0/0"), negate: false };
        assert_eq!(encoded(Family::V4, &everything).unwrap(), [0u8; 0]);
    }

    #[test]
    fn short_loads_of_the_nft_tool_are_prefixes() {
        let mut writer = Writer::new(&[]);
        elem(&mut writer, "payload", |writer| {
            for (number, word) in [(1u16, REG_1), (2, PAYLOAD_NETWORK), (3, 16), (4, 2)] {
                writer.u32_be(number, word);
            }
        });
        cmp(&mut writer, true, &[10, 20]);
        let expected = Expr::Daddr { net: "10.20.0.0/16".parse().unwrap(), negate: true };
        assert_eq!(decode(Family::V4, &writer.finish()), [expected]);
    }

    #[test]
    fn strangers_are_named() {
        let foreign = |fill: &dyn Fn(&mut Writer)| {
            let mut writer = Writer::new(&[]);
            fill(&mut writer);
            decode(Family::V4, &writer.finish())
        };
        let name = |name: &str| Expr::Foreign(name.into());
        assert_eq!(foreign(&|writer| elem(writer, "log", |_| {})), [name("log")]);
        assert_eq!(foreign(&|writer| verdict(writer, 0, None)), [name("drop")]);
        assert_eq!(foreign(&|writer| verdict(writer, libc::NFT_GOTO, Some("x"))), [name("goto x")]);
        assert_eq!(foreign(&|writer| load(writer, "meta", 4)), [name("meta")]);
        let holes = |writer: &mut Writer| {
            elem(writer, "payload", |writer| {
                for (number, word) in [(1u16, REG_1), (2, PAYLOAD_NETWORK), (3, 16), (4, 4)] {
                    writer.u32_be(number, word);
                }
            });
            bitwise(writer, &[255, 0, 255, 0], &[0; 4]);
            cmp(writer, false, &[10, 0, 0, 0]);
        };
        assert_eq!(foreign(&holes), [name("payload"), name("bitwise"), name("cmp")]);
    }
}
