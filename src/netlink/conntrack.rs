//! Connection tracking: forget the connections of an address (`linux/netfilter/nfnetlink_conntrack.h`), so that the next
//! owner of the address does not inherit translations and marks.

use super::attr::{Attrs, Writer};
use super::socket::{Message, Request, Socket};
use super::{family_byte, nft};
use crate::error::Result;
use crate::model::net::Family;
use std::net::IpAddr;

/// NFNL_SUBSYS_CTNETLINK in the upper byte of the message type.
const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;

const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
/// CTA_TUPLE_IP inside a tuple; inside it 1 to 4 are the addresses, IPv4 and IPv6, source and destination.
const TUPLE_IP: u16 = 1;

/// Deletes every tracked connection that has the address in one of its two tuples; how many there were. One that ends by
/// itself meanwhile is no error. `socket` is a netfilter socket.
pub fn delete_all(socket: &mut Socket, addr: IpAddr) -> Result<usize> {
    let family = Family::of(addr);
    let header = [family_byte(family), 0, 0, 0];
    let list = Request::new(GET, 0, header.to_vec(), format!("list connections of {addr}"));
    let requests = socket.dump(&list, |message: &Message<'_>| delete_request(message.body, header, addr))?;
    socket.run(&requests)?;
    Ok(requests.len())
}

/// The request that deletes the connection in the body of a dump message, if it involves `addr`.
fn delete_request(body: &[u8], header: [u8; nft::HEADER], addr: IpAddr) -> Option<Request> {
    let attrs = Attrs::after(body, nft::HEADER);
    let tuple = |kind: u16| attrs.clone().find(kind);
    let involved = [TUPLE_ORIGINAL, TUPLE_REPLY]
        .into_iter()
        .filter_map(tuple)
        .any(|tuple| tuple.nested().find(TUPLE_IP).is_some_and(|ips| ips.nested().any(|attr| attr.ip() == Some(addr))));
    if !involved {
        return None;
    }
    let mut writer = Writer::new(&header);
    writer.nest_flagged(TUPLE_ORIGINAL, |writer| writer.raw(tuple(TUPLE_ORIGINAL).map_or(&[], |tuple| tuple.value)));
    // With its id, so that a new connection with the same tuple is left alone.
    for kind in [ID, ZONE] {
        if let Some(attr) = tuple(kind) {
            writer.bytes(kind, attr.value);
        }
    }
    Some(Request::new(DELETE, 0, writer.finish(), format!("delete connection of {addr}")).or_not_found())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hostile_bodies_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            delete_request(&bytes, [2, 0, 0, 0], IpAddr::from([10, 0, 0, 1]));
        }
    }
}
