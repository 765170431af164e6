//! Unicast routes: `ip route`. Encodings and wildcards are those of `spec/dataplane.md` 3 and `spec/plugin.md` 13.6.
//!
//! Those that let nothing through are listed beside them, because they can stand in place of ours. Routes of other types
//! (local, broadcast, …), cached ones and those with several next hops, or one that [`Route`] cannot say, are not listed: they are
//! never ours.

use super::attr::{Attr, Attrs, Writer};
use super::socket::{CREATE_EXCL, CREATE_REPLACE, KernelError, Message, Request, Socket};
use super::{family_byte, family_of};
use crate::error::Result;
use crate::model::net::{Barrier, Family, Route, Scope, TABLE_MAIN};
use ipnet::IpNet;
use neli::consts::rtnl::{Rta, Rtm, Rtn, Rtprot};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Length of `struct rtmsg`.
const HEADER: usize = 12;
/// RTM_F_CLONED: a cached copy.
const CLONED: u32 = 0x200;
/// RTA_VIA: a gateway of another family. A next hop that is an object of its own (RTA_NH_ID) comes with what it is made of.
const VIA: u16 = 18;
/// RTA_ENCAP_TYPE and RTA_ENCAP: packets go inside others.
const ENCAP_TYPE: u16 = 21;
const ENCAP: u16 = 22;

fn scope_byte(scope: Scope) -> u8 {
    match scope {
        Scope::Universe => 0,
        Scope::Link => 253,
        Scope::Host => 254,
    }
}

fn body(route: &Route, protocol: u8, kind: u8) -> Vec<u8> {
    // Tables up to 255 stand in the header, larger ones only in RTA_TABLE.
    let short_table = u8::try_from(route.table).unwrap_or(0);
    let header = [
        family_byte(Family::of(route.dst.addr())),
        route.dst.prefix_len(),
        0,
        0,
        short_table,
        protocol,
        scope_byte(route.scope),
        kind,
        0,
        0,
        0,
        0,
    ];
    let mut writer = Writer::new(&header);
    if route.dst.prefix_len() > 0 {
        writer.ip(Rta::Dst, route.dst.network());
    }
    if let Some(gateway) = route.gateway {
        writer.ip(Rta::Gateway, gateway);
    }
    writer.u32(Rta::Oif, route.dev);
    if route.table > 255 {
        writer.u32(Rta::Table, route.table);
    }
    if let Some(source) = route.prefsrc {
        writer.ip(Rta::Prefsrc, source);
    }
    if route.metric != 0 {
        writer.u32(Rta::Priority, route.metric);
    }
    writer.finish()
}

fn created(route: &Route, flags: u16, verb: &str) -> Request {
    let body = body(route, Rtprot::Boot.into(), Rtn::Unicast.into());
    Request::new(Rtm::Newroute, flags, body, format!("{verb} route {route}"))
}

/// Adds a route of protocol boot; EEXIST if one with the same destination, table and metric is there.
pub fn add(route: &Route) -> Request {
    created(route, CREATE_EXCL, "add")
}

/// Adds a route or puts it in place of the one with the same destination, table and metric.
pub fn replace(route: &Route) -> Request {
    created(route, CREATE_REPLACE, "replace")
}

/// Deletes a route; ESRCH if there is none. Protocol and type are wildcards, and so are an absent gateway or source, a link
/// of index 0 and a metric of 0; the scope counts.
pub fn delete(route: &Route) -> Request {
    Request::new(Rtm::Delroute, 0, body(route, 0, 0), format!("delete route {route}"))
}

/// Deletes a route that lets nothing through; ESRCH if there is none.
pub fn delete_barrier(barrier: &Barrier) -> Request {
    let Barrier { kind, table, dst, dev, metric } = *barrier;
    let route = Route { table, dst, gateway: None, dev, scope: Scope::Universe, prefsrc: None, metric };
    let mut body = body(&route, 0, kind);
    // RT_SCOPE_NOWHERE stands for any.
    body[6] = 255;
    Request::new(Rtm::Delroute, 0, body, format!("delete route {barrier}"))
}

/// The unicast routes of one family, of one table or of all, in the order of the kernel's lookup as far as it tells.
pub fn list(socket: &mut Socket, family: Family, table: Option<u32>) -> Result<Vec<Route>> {
    Ok(list_all(socket, family, table)?.0)
}

enum Entry {
    Route(Route),
    Barrier(Barrier),
}

/// The same, and those that let nothing through.
pub fn list_all(socket: &mut Socket, family: Family, table: Option<u32>) -> Result<(Vec<Route>, Vec<Barrier>)> {
    let mut header = [0; HEADER];
    header[0] = family_byte(family);
    let mut writer = Writer::new(&header);
    if let Some(table) = table {
        writer.u32(Rta::Table, table);
    }
    let what = table.map_or_else(|| "list routes".to_owned(), |table| format!("list routes of table {table}"));
    let request = Request::new(Rtm::Getroute, 0, writer.finish(), what);
    let listed = |dst: IpNet, of: u32| Family::of(dst.addr()) == family && table.is_none_or(|table| table == of);
    // A list that is interrupted begins anew, so nothing of it may be kept here.
    let found = socket.dump(&request, |message: &Message<'_>| match decode_barrier(message.body) {
        Some(barrier) => listed(barrier.dst, barrier.table).then_some(Entry::Barrier(barrier)),
        None => decode(message.body).filter(|route| listed(route.dst, route.table)).map(Entry::Route),
    });
    let found = match found {
        // The kernel says ENOENT for a table that never had a route.
        Err(error) if table.is_some() && error.find::<KernelError>().is_some_and(KernelError::not_found) => Vec::new(),
        other => other?,
    };
    let (mut routes, mut barriers) = (Vec::with_capacity(found.len()), Vec::new());
    for entry in found {
        match entry {
            Entry::Route(route) => routes.push(route),
            Entry::Barrier(barrier) => barriers.push(barrier),
        }
    }
    Ok((routes, barriers))
}

/// Reads the body of an RTM_NEWROUTE or RTM_DELROUTE message; none if it is malformed or not a plain unicast route.
pub fn decode(body: &[u8]) -> Option<Route> {
    decode_told(body).filter(|route| route.dev != 0)
}

/// The same, and a route of several ways, or by a next hop of another family or in another packet, with 0 for its link: it may
/// have taken the place of a plain one.
pub fn decode_told(body: &[u8]) -> Option<Route> {
    decode_as(body, |kind| kind == u8::from(Rtn::Unicast))
}

/// The same of a route that lets nothing through.
pub fn decode_barrier(body: &[u8]) -> Option<Barrier> {
    let kind = *body.get(7)?;
    let Route { table, dst, dev, metric, .. } = decode_as(body, |kind| matches!(kind, 6..=9))?;
    Some(Barrier { kind, table, dst, dev, metric })
}

// A link of index 0 where the message names none.
fn decode_as(body: &[u8], wanted: fn(u8) -> bool) -> Option<Route> {
    let header: [u8; HEADER] = body.get(..HEADER)?.try_into().ok()?;
    let family = family_of(header[0])?;
    let flags = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
    let scope = match header[6] {
        0 => Scope::Universe,
        253 => Scope::Link,
        254 => Scope::Host,
        _ => return None,
    };
    // A source prefix (header[2]) or a type of service (header[3]) makes it something that this type cannot say.
    if !wanted(header[7]) || flags & CLONED != 0 || header[2] != 0 || header[3] != 0 {
        return None;
    }
    let any = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let (mut dst, mut dev, mut table) = (any, 0, u32::from(header[4]));
    let (mut gateway, mut prefsrc, mut metric, mut odd) = (None, None, 0, false);
    for attr in Attrs::after(body, HEADER) {
        match Rta::from(attr.kind) {
            Rta::Dst => dst = attr.ip()?,
            Rta::Oif => dev = attr.u32()?,
            Rta::Gateway => gateway = attr.ip(),
            Rta::Table => table = attr.u32()?,
            Rta::Prefsrc => prefsrc = attr.ip(),
            Rta::Priority => metric = attr.u32()?,
            _ => odd |= matches!(attr.kind, VIA | ENCAP_TYPE | ENCAP),
        }
    }
    // It leads elsewhere than its link says.
    if odd {
        dev = 0;
    }
    if Family::of(dst) != family {
        return None;
    }
    let dst = IpNet::new(dst, header[1]).ok()?;
    Some(Route { table, dst, gateway, dev, scope, prefsrc, metric })
}

/// The route that a packet to `to` would take in the socket's namespace, if there is one: `ip route get`. With `mark`,
/// `from` and `iif` (index) for packets that are forwarded.
pub fn lookup(socket: &mut Socket, to: IpAddr, from: Option<IpAddr>, iif: u32, mark: u32) -> Result<Option<Route>> {
    Ok(find(socket, to, from, iif, mark)?.iter().find_map(|body| decode_lookup(body, to)))
}

/// The kernel's answers to a look-up; none without a route.
fn find(socket: &mut Socket, to: IpAddr, from: Option<IpAddr>, iif: u32, mark: u32) -> Result<Vec<Vec<u8>>> {
    let bits = if to.is_ipv4() { 32 } else { 128 };
    let mut header = [0; HEADER];
    header[0] = family_byte(Family::of(to));
    header[1] = bits;
    header[2] = if from.is_some() { bits } else { 0 };
    let mut writer = Writer::new(&header);
    writer.ip(Rta::Dst, to);
    if let Some(from) = from {
        writer.ip(Rta::Src, from);
    }
    if iif != 0 {
        writer.u32(Rta::Iif, iif);
    }
    if mark != 0 {
        writer.u32(Rta::Mark, mark);
    }
    let request = Request::new(Rtm::Getroute, 0, writer.finish(), format!("look up the route to {to}"));
    match socket.ask(&request) {
        Err(error) if error.find::<KernelError>().is_some_and(|e| e.not_found() || e.errno == libc::ENETUNREACH) => {
            Ok(Vec::new())
        }
        outcome => outcome,
    }
}

/// Whether packets to `to` are delivered inside the socket's namespace. For an IPv6 address of a link that begins some time
/// after it was added, duplicate detection or not: a work item of the kernel's makes the entry in the table `local`.
pub fn is_local(socket: &mut Socket, to: IpAddr) -> Result<bool> {
    Ok(find(socket, to, None, 0, 0)?.iter().any(|body| body.get(7) == Some(&Rtn::Local.into())))
}

/// An answer to a look-up is marked as cloned and echoes the source: only the way is read.
fn decode_lookup(body: &[u8], to: IpAddr) -> Option<Route> {
    let header: [u8; HEADER] = body.get(..HEADER)?.try_into().ok()?;
    let find = |kind: Rta| Attrs::after(body, HEADER).find(kind);
    Some(Route {
        table: find(Rta::Table).and_then(|attr| attr.u32()).unwrap_or(TABLE_MAIN),
        dst: IpNet::from(to),
        gateway: find(Rta::Gateway).and_then(|attr: Attr<'_>| attr.ip()),
        dev: find(Rta::Oif)?.u32()?,
        scope: if header[6] == 253 { Scope::Link } else { Scope::Universe },
        prefsrc: find(Rta::Prefsrc).and_then(|attr| attr.ip()),
        metric: 0,
    })
}
