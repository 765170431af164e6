//! The router's check of IPv6 sources. For IPv4 the kernel has `rp_filter`; for IPv6 a rule of nf_tables must do it:
//! `ip6 saddr != fe80::/10 ip6 saddr != :: fib saddr . iif oif missing drop` (`linux/netfilter/nf_tables.h`). A link-local
//! source or none at all is neighbour discovery, which stays on its link anyhow.

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
    };
    let requests = vec![
        request(Family::V6, TABLE, &Part::Head, |_| ()),
        // prerouting, before connection tracking
        request(Family::V6, TABLE, &Part::Chain(CHAIN, 0, -300, "filter"), |_| ()),
        request(Family::V6, TABLE, &Part::Rule(CHAIN), rule),
    ];
    nft::transaction(&mut Socket::netfilter_in(namespace)?, requests, &format!("commit table {TABLE}"))
        .context("check IPv6 sources")
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
