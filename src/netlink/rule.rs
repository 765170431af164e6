//! Routing rules: `ip rule`. Encodings and wildcards are those of `spec/dataplane.md` 3, `spec/plugin.md` 13.6 and
//! `linux/fib_rules.h`.

use super::attr::{Attr, Attrs, Writer};
use super::socket::{CREATE, CREATE_EXCL, KernelError, Message, Request, Socket};
use super::{family_byte, family_of};
use crate::error::{Error, Result};
use crate::model::net::{Family, Rule};
use ipnet::IpNet;
use neli::consts::rtnl::{FrAct, Frattr, Rtm};
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Length of `struct fib_rule_hdr`.
const HEADER: usize = 12;
/// Header flags that say nothing about what the rule matches: FIB_RULE_PERMANENT, FIB_RULE_IIF_DETACHED (the interface is
/// away), FIB_RULE_OIF_DETACHED.
const HARMLESS_FLAGS: u32 = 0x1 | 0x8 | 0x10;
/// Those and FIB_RULE_UNRESOLVED: what the kernel alone says of a rule.
const STATE_FLAGS: u32 = HARMLESS_FLAGS | 0x4;
/// NLM_F_ECHO: whoever asks for a change is told of it like those who listen.
const ECHO: u16 = 0x8;
/// Times that [`delete_all`] deletes at most; more rules of one selector than this are somebody's mistake.
const DELETE_LIMIT: usize = 1000;

fn body(rule: &Rule, action: u8) -> Vec<u8> {
    let bits = |net: Option<IpNet>| net.map_or(0, |net| net.prefix_len());
    let short_table = u8::try_from(rule.table).unwrap_or(0);
    let header = [family_byte(rule.family), bits(rule.dst), bits(rule.src), 0, short_table, 0, 0, action, 0, 0, 0, 0];
    let mut writer = Writer::new(&header);
    if let Some(dst) = rule.dst {
        writer.ip(Frattr::Dst, dst.network());
    }
    if let Some(src) = rule.src {
        writer.ip(Frattr::Src, src.network());
    }
    writer.u32(Frattr::Priority, rule.priority);
    if let Some((mark, mask)) = rule.fwmark {
        writer.u32(Frattr::Fwmark, mark);
        writer.u32(Frattr::Fwmask, mask);
    }
    if let Some(iif) = &rule.iif {
        writer.text(Frattr::Iifname, iif);
    }
    if let Some(protocol) = rule.ipproto {
        writer.u8(Frattr::IpProto, protocol);
    }
    if rule.table > 255 {
        writer.u32(Frattr::Table, rule.table);
    }
    writer.finish()
}

/// `rule 512 to 10.0.1.5 lookup 254`.
fn words(rule: &Rule) -> String {
    let mut text = format!("rule {}", rule.priority);
    let net = |net: &IpNet| {
        if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
    };
    let mut word = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            write!(text, " {name} {value}").ok(); // writing to a string cannot fail
        }
    };
    word("from", rule.src.as_ref().map(net));
    word("to", rule.dst.as_ref().map(net));
    word("fwmark", rule.fwmark.map(|(mark, mask)| format!("{mark:#x}/{mask:#x}")));
    word("iif", rule.iif.clone());
    word("ipproto", rule.ipproto.map(|protocol| protocol.to_string()));
    word("lookup", (rule.table != 0).then(|| rule.table.to_string()));
    text
}

/// Adds the rule; EEXIST if one is there that differs at most in addresses or a TOS that this one does not ask for
/// (`rule_exists` in net/core/fib_rules.c). (The same selector with another table is another rule: both stay, the first added
/// wins.)
pub fn add(rule: &Rule) -> Request {
    Request::new(Rtm::Newrule, CREATE_EXCL, body(rule, FrAct::FrActToTbl.into()), format!("add {}", words(rule)))
}

/// Adds the rule behind all others of its priority, even if the same one is there.
pub fn add_beside(rule: &Rule) -> Request {
    let mut request = add(rule);
    request.flags = CREATE;
    request
}

/// Deletes the first rule that [`Rule::deletes`] says; ENOENT if there is none.
pub fn delete(rule: &Rule) -> Request {
    Request::new(Rtm::Delrule, 0, body(rule, FrAct::FrActToTbl.into()), format!("delete {}", words(rule)))
}

/// The same; the answer is the body of the message that tells of it.
pub fn delete_told(rule: &Rule) -> Request {
    let mut request = delete(rule);
    request.flags = ECHO;
    request
}

/// Adds a rule that the kernel has told of, behind all others of its priority and as it was, whatever [`Rule`] can say of it.
fn restore(told: &[u8]) -> Request {
    let mut body = told.to_vec();
    if let Some(flags) = body.get_mut(8..HEADER) {
        let kept = u32::from_ne_bytes([flags[0], flags[1], flags[2], flags[3]]) & !STATE_FLAGS;
        flags.copy_from_slice(&kept.to_ne_bytes());
    }
    Request::new(Rtm::Newrule, CREATE, body, "put back a rule of somebody else".into())
}

/// Deletes every rule that matches, with the wildcards of [`delete`], and that is `ours`. One that the kernel takes in its place
/// is put back within the same moment, behind the others of its priority: looking first would be a list of all rules.
pub fn delete_all(socket: &mut Socket, rule: &Rule, ours: Ours<'_>) -> Result<()> {
    let told = match socket.ask(&delete_told(rule)) {
        Ok(told) => told,
        Err(error) if error.find::<KernelError>().is_some_and(KernelError::not_found) => return Ok(()),
        Err(error) => return Err(error),
    };
    delete_rest(socket, rule, ours, told)
}

/// Which rules [`delete_all`] is to delete.
pub type Ours<'a> = &'a dyn Fn(&Rule) -> bool;

/// Goes on after the answer to [`delete_told`] of `rule` as [`delete_all`] does.
pub fn delete_rest(socket: &mut Socket, rule: &Rule, ours: Ours<'_>, told: Vec<Vec<u8>>) -> Result<()> {
    let (request, mut told) = (delete_told(rule), told);
    for _ in 0..DELETE_LIMIT {
        let wrong = told.iter().filter(|body| !decode(body).is_some_and(|gone| ours(&gone)));
        let wrong = wrong.map(|body| restore(body)).collect::<Vec<_>>();
        if !wrong.is_empty() {
            socket.run(&wrong)?;
            let there = list(socket, rule.family)?;
            if !there.iter().any(|there| rule.deletes(there) && ours(there)) {
                return Ok(());
            }
        }
        told = match socket.ask(&request) {
            Ok(told) => told,
            Err(error) if error.find::<KernelError>().is_some_and(KernelError::not_found) => return Ok(()),
            Err(error) => return Err(error),
        };
    }
    Err(Error::new(format!("{}: still there after {DELETE_LIMIT} times", request.what)))
}

/// The rules of one family, in the order in which the kernel asks them. (`dump_rules` in net/core/fib_rules.c counts its
/// way and never flags an interruption.) A kernel without IPv6, or with `ipv6.disable=1`, has none of that family.
pub fn list(socket: &mut Socket, family: Family) -> Result<Vec<Rule>> {
    let group = match family {
        Family::V4 => libc::RTNLGRP_IPV4_RULE,
        Family::V6 => libc::RTNLGRP_IPV6_RULE,
    };
    or_none(socket.dump_watched(group, &request(family_byte(family)), of_family(family)))
}

/// The same for a namespace with few rules that hardly anybody changes, as a pod's: as long as they come in one part they are
/// listed once, and nothing is watched.
pub fn list_few(socket: &mut Socket, family: Family) -> Result<Vec<Rule>> {
    match or_none(socket.dump_in_one(&request(family_byte(family)), of_family(family)))? {
        Some(rules) => Ok(rules),
        None => list(socket, family),
    }
}

fn request(family: u8) -> Request {
    let mut header = [0; HEADER];
    header[0] = family;
    Request::new(Rtm::Getrule, 0, header.to_vec(), "list rules".into())
}

fn of_family(family: Family) -> impl FnMut(&Message<'_>) -> Option<Rule> {
    move |message| decode(message.body).filter(|rule| rule.family == family)
}

/// EAFNOSUPPORT is the answer for a family that has no rules here (`fib_nl_dumprule` in net/core/fib_rules.c); addresses, routes
/// and neighbours of such a family are empty lists already.
fn or_none<T: Default>(listed: Result<T>) -> Result<T> {
    match listed {
        Err(error) if error.find::<KernelError>().is_some_and(|error| error.errno == libc::EAFNOSUPPORT) => {
            Ok(T::default())
        }
        outcome => outcome,
    }
}

/// Reads the body of an RTM_NEWRULE or RTM_DELRULE message; none if it is malformed or of another family. What [`Rule`]
/// cannot say makes it `foreign`.
pub fn decode(body: &[u8]) -> Option<Rule> {
    let header: [u8; HEADER] = body.get(..HEADER)?.try_into().ok()?;
    let family = family_of(header[0])?;
    let flags = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
    let mut rule = Rule::any(family, 0, u32::from(header[4]));
    rule.foreign = header[3] != 0 || header[7] != u8::from(FrAct::FrActToTbl) || flags & !HARMLESS_FLAGS != 0;
    let any = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let net = |attr: &Attr<'_>, bits: u8| IpNet::new(attr.ip().filter(|ip| Family::of(*ip) == family)?, bits).ok();
    // A prefix of length 0 comes without an address and matches everything, as does none.
    let (mut src, mut dst) = (IpNet::new(any, header[2]).ok()?, IpNet::new(any, header[1]).ok()?);
    let (mut mark, mut mask) = (None, None);
    for attr in Attrs::after(body, HEADER) {
        match Frattr::from(attr.kind) {
            Frattr::Dst => dst = net(&attr, header[1])?,
            Frattr::Src => src = net(&attr, header[2])?,
            Frattr::Priority => rule.priority = attr.u32()?,
            Frattr::Fwmark => mark = attr.u32(),
            Frattr::Fwmask => mask = attr.u32(),
            Frattr::Iifname => rule.iif = Some(attr.text()),
            Frattr::IpProto => rule.ipproto = attr.u8(),
            Frattr::Table => rule.table = attr.u32()?,
            // -1 is "do not suppress" and always sent; who added the rule does not change what it does.
            Frattr::SuppressPrefixlen | Frattr::SuppressIfgroup if attr.u32() == Some(u32::MAX) => {}
            Frattr::Protocol | Frattr::Pad | Frattr::Unspec => {}
            _ => rule.foreign = true,
        }
    }
    rule.src = Some(src).filter(|net| net.prefix_len() > 0);
    rule.dst = Some(dst).filter(|net| net.prefix_len() > 0);
    rule.fwmark = match (mark.unwrap_or(0), mask.unwrap_or(0)) {
        (0, 0) => None,
        pair => Some(pair),
    };
    Some(rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_without_rules_has_an_empty_list() {
        // DECnet, which no kernel has any more, is asked for as IPv6 is where that is switched off.
        const DECNET: u8 = 12;
        let body = || {
            crate::sys::unshare_netns().unwrap();
            let mut socket = Socket::route().unwrap();
            let any = |message: &Message<'_>| decode(message.body);
            let watched = socket.dump_watched(libc::RTNLGRP_IPV6_RULE, &request(DECNET), any);
            assert_eq!(or_none(watched).unwrap(), []);
            assert_eq!(or_none(socket.dump_in_one(&request(DECNET), any)).unwrap(), None);
            // The socket goes on as before.
            assert_eq!(list(&mut socket, Family::V4).unwrap().len(), 3);
            assert_eq!(list_few(&mut socket, Family::V4).unwrap().len(), 3);
        };
        std::thread::spawn(body).join().unwrap();
    }
}
