//! Neighbour entries: `ip neighbour`. Encodings are those of `spec/plugin.md` 13.6 and `linux/neighbour.h`.

use super::attr::{Attrs, Writer};
use super::socket::{CREATE_EXCL, CREATE_REPLACE, Message, Request, Socket};
use super::{family_byte, family_of};
use crate::error::Result;
use crate::model::net::{Family, Neighbour};
use crate::model::order;
use crate::sys::{self, Test};
use neli::consts::rtnl::{Nda, Rtm};
use std::net::IpAddr;

/// Length of `struct ndmsg`.
const HEADER: usize = 12;
/// NUD_PERMANENT.
const PERMANENT: u16 = 0x80;
/// NUD_NOARP.
const NOARP: u16 = 0x40;

fn body(neighbour: &Neighbour) -> Vec<u8> {
    let state = if neighbour.permanent { PERMANENT } else { 0 } | if neighbour.noarp { NOARP } else { 0 };
    let mut header = [0; HEADER];
    header[0] = family_byte(Family::of(neighbour.addr));
    header[4..8].copy_from_slice(&neighbour.dev.to_ne_bytes());
    header[8..10].copy_from_slice(&state.to_ne_bytes());
    let mut writer = Writer::new(&header);
    writer.ip(Nda::Dst, neighbour.addr);
    if let Some(mac) = neighbour.mac {
        writer.bytes(Nda::Lladdr, &mac.0);
    }
    writer.finish()
}

fn request(kind: Rtm, flags: u16, verb: &str, neighbour: &Neighbour) -> Request {
    let mac = neighbour.mac.map(|mac| format!(" lladdr {mac}")).unwrap_or_default();
    let what = format!("{verb} neighbour {}{mac} dev if{}", neighbour.addr, neighbour.dev);
    Request::new(kind, flags, body(neighbour), what)
}

/// Adds an entry; EEXIST if there is one for the address on that link.
pub fn add(neighbour: &Neighbour) -> Request {
    request(Rtm::Newneigh, CREATE_EXCL, "add", neighbour)
}

/// Adds an entry or changes the one that is there.
pub fn replace(neighbour: &Neighbour) -> Request {
    request(Rtm::Newneigh, CREATE_REPLACE, "replace", neighbour)
}

/// Deletes the entry of an address on a link; ENOENT if there is none.
pub fn delete(dev: u32, addr: IpAddr) -> Request {
    request(Rtm::Delneigh, 0, "delete", &Neighbour { dev, addr, mac: None, permanent: false, noarp: false })
}

/// The entries of the socket's namespace, of one family or of both; those of links that need none (NUD_NOARP) included.
pub fn list(socket: &mut Socket, family: Option<Family>) -> Result<Vec<Neighbour>> {
    let mut header = [0; HEADER];
    header[0] = family.map_or(0, family_byte);
    let request = Request::new(Rtm::Getneigh, 0, header.to_vec(), "list neighbours".into());
    let listed = |entry: &Neighbour| family.is_none_or(|family| family == Family::of(entry.addr));
    let mut entries = socket.dump(&request, |message: &Message<'_>| decode(message.body).filter(listed))?;
    order::sort(&mut entries);
    Ok(entries)
}

/// Those entries of both families for which the kernel asks nobody. Those of groups are left out, which it makes itself without
/// asking, several for each link.
pub fn list_static(socket: &mut Socket) -> Result<Vec<Neighbour>> {
    let request = Request::new(Rtm::Getneigh, 0, vec![0; HEADER], "list neighbours".into());
    socket.dump(&request, |message: &Message<'_>| decode(message.body).filter(is_static))
}

/// Whether the kernel asks nobody: somebody has told it, or the link knows no questions, as `lo`.
pub fn is_static(entry: &Neighbour) -> bool {
    (entry.permanent || entry.noarp) && !entry.addr.is_multicast()
}

/// What a socket that hears of neighbours lets through of them: new entries and changed ones of IPv4 and IPv6 for which the kernel
/// asks nobody ([`is_static`]). All the others, every step of every ARP entry and all of bridges, never reach the queue and wake
/// nobody. Whatever is not about neighbours passes. For notifications, which come one in a datagram: the program reads
/// the first message alone, `struct nlmsghdr` (`linux/netlink.h`) and behind it `struct ndmsg` (`linux/neighbour.h`).
///
/// Bytes are compared, since longer loads would turn them round; type and state are of the host's order, so their lower bytes stand
/// first or last. (The types of NETLINK_ROUTE are below 256.)
pub(super) fn filter() -> [sys::Instruction; 11] {
    const LAST: u32 = if cfg!(target_endian = "big") { 1 } else { 0 };
    let [newneigh, getneigh] = [Rtm::Newneigh, Rtm::Getneigh].map(|kind| u32::from(u16::from(kind)));
    let byte = |at: u32| sys::Instruction::load_byte(at);
    let test = sys::Instruction::test;
    let end = sys::Instruction::end;
    [
        byte(4 + LAST),
        test(Test::AtLeast, newneigh, 0, 7),
        test(Test::Above, getneigh, 6, 0),
        test(Test::Above, newneigh, 6, 0),
        byte(16),
        test(Test::Equal, libc::AF_INET.cast_unsigned(), 1, 0),
        test(Test::Equal, libc::AF_INET6.cast_unsigned(), 0, 3),
        byte(24 + LAST),
        test(Test::Any, u32::from(PERMANENT | NOARP), 0, 1),
        end(true),
        end(false),
    ]
}

/// Reads the body of an RTM_NEWNEIGH or RTM_DELNEIGH message; none if it is malformed or of another family.
pub fn decode(body: &[u8]) -> Option<Neighbour> {
    let header: [u8; HEADER] = body.get(..HEADER)?.try_into().ok()?;
    let family = family_of(header[0])?;
    let attrs = Attrs::after(body, HEADER);
    let state = u16::from_ne_bytes([header[8], header[9]]);
    let addr = attrs.clone().find(Nda::Dst)?.ip().filter(|addr| Family::of(*addr) == family)?;
    Some(Neighbour {
        dev: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
        addr,
        mac: attrs.find(Nda::Lladdr).and_then(|attr| attr.mac()),
        permanent: state & PERMANENT != 0,
        noarp: state & NOARP != 0,
    })
}
