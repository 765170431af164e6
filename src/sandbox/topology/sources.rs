//! The router's check of sources by a rule of nf_tables: `fib saddr . iif oif missing drop`, for IPv6 with `ip6 saddr !=
//! fe80::/10 ip6 saddr != ::` before it (`linux/netfilter/nf_tables.h`): a link-local source or none at all is neighbour
//! discovery, which stays on its link anyhow. For IPv4 the kernel has `rp_filter`, but that one also refuses the question for
//! a gateway's MAC that a node asks on a VLAN device, which has no address, with another address of the node's.

use crate::error::{Context, Result};
use crate::model::net::Family;
use crate::netlink::attr::Writer;
use crate::netlink::netns::Namespace;
use crate::netlink::nft;
use crate::netlink::socket::Socket;
use crate::sandbox::nodeport::{Part, compare, elem, request};

const TABLE: &str = "enibox-sandbox-router";
const CHAIN: &str = "sources";

/// Drops what comes from a source that is not routed to the link that it came by.
pub(super) fn check(namespace: &Namespace) -> Result<()> {
    let rule = |writer: &mut Writer| {
        source(writer);
        elem(writer, "bitwise", |writer| {
            writer.u32_be(1u16, 1);
            writer.u32_be(2u16, 1);
            writer.u32_be(3u16, 16);
            let mut mask = [0; 16];
            mask[..2].copy_from_slice(&[0xff, 0xc0]);
            writer.nest_flagged(4u16, |writer| writer.bytes(1u16, &mask));
            writer.nest_flagged(5u16, |writer| writer.bytes(1u16, &[0; 16]));
        });
        let mut link_local = [0; 16];
        link_local[..2].copy_from_slice(&[0xfe, 0x80]);
        compare(writer, true, &link_local);
        source(writer);
        compare(writer, true, &[0; 16]);
        drop_strays(writer);
    };
    let mut socket = Socket::netfilter_in(namespace)?;
    commit(&mut socket, Family::V4, drop_strays)?;
    commit(&mut socket, Family::V6, rule)
}

fn commit(socket: &mut Socket, family: Family, rule: impl Fn(&mut Writer)) -> Result<()> {
    let requests = vec![
        request(family, TABLE, &Part::Head, |_| ()),
        // prerouting, before connection tracking
        request(family, TABLE, &Part::Chain(CHAIN, 0, -300, "filter"), |_| ()),
        request(family, TABLE, &Part::Rule(CHAIN), rule),
    ];
    nft::transaction(socket, requests, &format!("commit table {TABLE}")).context("check sources")
}

// Drops what comes from a source that is routed elsewhere.
fn drop_strays(writer: &mut Writer) {
    elem(writer, "fib", |writer| {
        writer.u32_be(1u16, 1);
        writer.u32_be(2u16, 1); // NFT_FIB_RESULT_OIF
        writer.u32_be(3u16, 1 | 8 | 32); // NFTA_FIB_F_SADDR, _IIF, _PRESENT
    });
    compare(writer, false, &[0]);
    elem(writer, "immediate", |writer| {
        writer.u32_be(1u16, 0); // NFT_REG_VERDICT
        writer.nest_flagged(2u16, |writer| writer.nest_flagged(2u16, |writer| writer.u32_be(1u16, 0))); // drop
    });
}

// `ip6 saddr` into register 1.
fn source(writer: &mut Writer) {
    elem(writer, "payload", |writer| {
        writer.u32_be(1u16, 1);
        writer.u32_be(2u16, 1); // NFT_PAYLOAD_NETWORK_HEADER
        writer.u32_be(3u16, 8);
        writer.u32_be(4u16, 16);
    });
}
