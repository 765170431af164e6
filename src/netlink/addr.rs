//! Addresses on links: `ip address`. Encodings are those of `spec/plugin.md` 13.6 and `linux/if_addr.h`.

use super::attr::{Attrs, Writer};
use super::socket::{CREATE_EXCL, Message, Request, Socket};
use super::{family_byte, family_of};
use crate::error::Result;
use crate::model::net::{Address, Family};
use crate::model::order;
use ipnet::{IpNet, Ipv4Net};
use neli::consts::rtnl::{Ifa, Rtm};

/// Length of `struct ifaddrmsg`.
const HEADER: usize = 8;
/// IFA_F_NODAD: usable at once (IPv6).
const NODAD: u32 = 0x02;
/// IFA_F_NOPREFIXROUTE: no connected route.
const NOPREFIXROUTE: u32 = 0x200;

/// RT_SCOPE_LINK.
const SCOPE_LINK: u8 = 253;

fn body(address: &Address, broadcast: bool) -> Vec<u8> {
    let family = family_byte(Family::of(address.addr.addr()));
    let flags = if address.no_prefix_route { NOPREFIXROUTE } else { 0 } | if address.no_dad { NODAD } else { 0 };
    let mut header = [family, address.addr.prefix_len(), 0, 0, 0, 0, 0, 0];
    header[4..].copy_from_slice(&address.dev.to_ne_bytes());
    let mut writer = Writer::new(&header);
    writer.ip(Ifa::Local, address.addr.addr());
    writer.ip(Ifa::Address, address.addr.addr());
    if broadcast
        && let IpNet::V4(net) = address.addr
        && net.prefix_len() < 31
    {
        writer.ip(Ifa::Broadcast, Ipv4Net::broadcast(&net).into());
    }
    if flags != 0 {
        // The header has only eight bits for flags.
        writer.u32(Ifa::Flags, flags);
    }
    writer.finish()
}

/// Adds the address, scope global, with the broadcast address for IPv4 prefixes shorter than 31; EEXIST if it is there.
pub fn add(address: &Address) -> Request {
    Request::new(Rtm::Newaddr, CREATE_EXCL, body(address, true), format!("add address {address}"))
}

/// The same with scope link: the kernel does not choose it as the source of what leaves by other links.
pub fn add_for_link(address: &Address) -> Request {
    let mut request = add(address);
    request.body[3] = SCOPE_LINK;
    request
}

/// Deletes the address; EADDRNOTAVAIL if it is not there. Deleting the last address of a link flushes all routes through
/// that link, in every table.
pub fn delete(address: &Address) -> Request {
    let plain = Address { no_prefix_route: false, no_dad: false, ..*address };
    Request::new(Rtm::Deladdr, 0, body(&plain, false), format!("delete address {plain}"))
}

/// [`delete`] for an IPv4 address that has a peer, by which the kernel knows it; none if there is no such address.
pub fn delete_beside_peer(socket: &mut Socket, address: &Address) -> Result<Option<Request>> {
    let mut header = [0; HEADER];
    header[0] = family_byte(Family::of(address.addr.addr()));
    let request = Request::new(Rtm::Getaddr, 0, header.to_vec(), "list addresses".into());
    let peers = socket.dump(&request, |message: &Message<'_>| {
        let found = decode(message.body).filter(|found| (found.dev, found.addr) == (address.dev, address.addr));
        found.and_then(|_| Attrs::after(message.body, HEADER).find(Ifa::Address)?.ip())
    })?;
    let peer = peers.into_iter().find(|peer| *peer != address.addr.addr());
    Ok(peer.map(|peer| {
        let mut writer = Writer::new(&delete(address).body[..HEADER]);
        writer.ip(Ifa::Local, address.addr.addr());
        writer.ip(Ifa::Address, peer);
        Request::new(Rtm::Deladdr, 0, writer.finish(), format!("delete address {address} peer {peer}"))
    }))
}

/// The addresses of the socket's namespace, of one family or of both.
pub fn list(socket: &mut Socket, family: Option<Family>) -> Result<Vec<Address>> {
    let mut header = [0; HEADER];
    header[0] = family.map_or(0, family_byte);
    let request = Request::new(Rtm::Getaddr, 0, header.to_vec(), "list addresses".into());
    let listed = |address: &Address| family.is_none_or(|family| family == Family::of(address.addr.addr()));
    let mut addresses = socket.dump(&request, |message: &Message<'_>| decode(message.body).filter(listed))?;
    order::sort(&mut addresses);
    Ok(addresses)
}

fn flags(body: &[u8]) -> u32 {
    let short = body.get(2).copied().map_or(0, u32::from);
    Attrs::after(body, HEADER).find(Ifa::Flags).and_then(|attr| attr.u32()).unwrap_or(short)
}

/// Reads the body of an RTM_NEWADDR or RTM_DELADDR message; none if it is malformed or of another family.
pub fn decode(body: &[u8]) -> Option<Address> {
    let header: [u8; HEADER] = body.get(..HEADER)?.try_into().ok()?;
    let family = family_of(header[0])?;
    // IPv4 has the address itself in IFA_LOCAL and the peer's in IFA_ADDRESS; IPv6 mostly has IFA_ADDRESS alone.
    let attrs = Attrs::after(body, HEADER);
    let addr = attrs.clone().find(Ifa::Local).or_else(|| attrs.find(Ifa::Address))?.ip()?;
    if Family::of(addr) != family {
        return None;
    }
    let flags = flags(body);
    Some(Address {
        dev: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
        addr: IpNet::new(addr, header[1]).ok()?,
        no_prefix_route: flags & NOPREFIXROUTE != 0,
        no_dad: flags & NODAD != 0,
    })
}
