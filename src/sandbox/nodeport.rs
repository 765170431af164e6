//! A node port as kube-proxy would make it: a table of its own with DNAT rules. The rules are not among those that the
//! product's model of nf_tables knows, so they are written here, as `nft` would send them (`linux/netfilter/nf_tables.h`).

use crate::error::{Context, Result};
use crate::model::net::Family;
use crate::model::nft::Expr;
use crate::netlink::attr::Writer;
use crate::netlink::netns::Namespace;
use crate::netlink::nft;
use crate::netlink::nft_expr;
use crate::netlink::socket::{Request, Socket};
use std::net::{IpAddr, SocketAddr};

const TABLE: &str = "enibox-sandbox-nodeport";
const CHAIN: &str = "nodeports";

const SUBSYSTEM: u16 = 10 << 8; // NFNL_SUBSYS_NFTABLES
const NEW_TABLE: u16 = SUBSYSTEM;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const CREATE: u16 = 0x400; // NLM_F_CREATE
const APPEND: u16 = 0x800; // NLM_F_APPEND

/// One expression of a rule.
pub(super) fn elem(writer: &mut Writer, name: &str, fill: impl FnOnce(&mut Writer)) {
    writer.nest_flagged(1u16, |writer| {
        writer.text(1u16, name);
        writer.nest_flagged(2u16, fill);
    });
}

/// Register 1 has this value, or has not.
pub(super) fn compare(writer: &mut Writer, negate: bool, data: &[u8]) {
    elem(writer, "cmp", |writer| {
        writer.u32_be(1u16, 1); // NFT_REG_1
        writer.u32_be(2u16, u32::from(negate)); // NFT_CMP_EQ or NFT_CMP_NEQ
        writer.nest_flagged(3u16, |writer| writer.bytes(1u16, data));
    });
}

fn immediate(writer: &mut Writer, register: u32, data: &[u8]) {
    elem(writer, "immediate", |writer| {
        writer.u32_be(1u16, register);
        writer.nest_flagged(2u16, |writer| writer.bytes(1u16, data));
    });
}

/// What of the sandbox's own tables is made.
pub(super) enum Part<'a> {
    /// The table.
    Head,
    /// A base chain: name, hook, priority, type.
    Chain(&'a str, u32, i32, &'a str),
    /// A rule at the end of a chain.
    Rule(&'a str),
}

/// A message that makes a part of a table; `fill` writes a rule's expressions.
pub(super) fn request(family: Family, table: &str, part: &Part<'_>, fill: impl FnOnce(&mut Writer)) -> Request {
    let mut writer = Writer::new(&[protocol(family), 0, 0, 0]); // struct nfgenmsg
    writer.text(1u16, table);
    let (kind, flags) = match part {
        Part::Head => {
            writer.u32_be(2u16, 0);
            (NEW_TABLE, CREATE)
        }
        Part::Chain(name, hook, priority, kind) => {
            writer.text(3u16, name);
            writer.nest_flagged(4u16, |writer| {
                writer.u32_be(1u16, *hook);
                writer.u32_be(2u16, priority.cast_unsigned());
            });
            writer.u32_be(5u16, 1); // accept
            writer.text(7u16, kind);
            (NEW_CHAIN, CREATE)
        }
        Part::Rule(chain) => {
            writer.text(2u16, chain);
            writer.nest_flagged(4u16, fill);
            (NEW_RULE, CREATE | APPEND)
        }
    };
    Request::new(kind, flags, writer.finish(), format!("add a part of table {table}"))
}

// NFPROTO_IPV4 and NFPROTO_IPV6, which are the numbers of the address families.
fn protocol(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

// `meta l4proto P th dport N fib daddr type local dnat to A:P`
fn rule(proto: u8, port: u16, to: SocketAddr) -> Result<Request> {
    let mut fib = Ok(());
    let family = Family::of(to.ip());
    let request = request(family, TABLE, &Part::Rule(CHAIN), |writer| {
        elem(writer, "meta", |writer| {
            writer.u32_be(1u16, 1);
            writer.u32_be(2u16, 16); // NFT_META_L4PROTO
        });
        compare(writer, false, &[proto]);
        elem(writer, "payload", |writer| {
            writer.u32_be(1u16, 1);
            writer.u32_be(2u16, 2); // NFT_PAYLOAD_TRANSPORT_HEADER
            writer.u32_be(3u16, 2);
            writer.u32_be(4u16, 2);
        });
        compare(writer, false, &port.to_be_bytes());
        fib = nft_expr::encode(writer, family, &Expr::FibDaddrLocal { iif: false, negate: false });
        match to.ip() {
            IpAddr::V4(v4) => immediate(writer, 1, &v4.octets()),
            IpAddr::V6(v6) => immediate(writer, 1, &v6.octets()),
        }
        immediate(writer, 2, &to.port().to_be_bytes());
        elem(writer, "nat", |writer| {
            writer.u32_be(1u16, 1); // NFT_NAT_DNAT
            writer.u32_be(2u16, protocol(family).into());
            writer.u32_be(3u16, 1);
            writer.u32_be(5u16, 2);
        });
    });
    fib.map(|()| request)
}

/// Makes node ports of one family in a namespace: each port leads to its target, over TCP and UDP.
pub fn open(namespace: &Namespace, ports: &[(u16, SocketAddr)]) -> Result<()> {
    let Some(family) = ports.first().map(|(_, to)| Family::of(to.ip())) else { return Ok(()) };
    let mut requests = vec![
        request(family, TABLE, &Part::Head, |_| ()),
        // prerouting, dstnat
        request(family, TABLE, &Part::Chain(CHAIN, 0, -100, "nat"), |_| ()),
    ];
    for (port, to) in ports {
        for proto in [6, 17] {
            requests.push(rule(proto, *port, *to)?);
        }
    }
    let mut socket = Socket::netfilter_in(namespace)?;
    nft::transaction(&mut socket, requests, &format!("commit table {TABLE}")).context("open node ports")
}

/// Takes them away again.
pub fn close(namespace: &Namespace) -> Result<()> {
    let mut socket = Socket::netfilter_in(namespace)?;
    for family in [Family::V4, Family::V6] {
        nft::delete(&mut socket, family, TABLE).context("close node ports")?;
    }
    Ok(())
}
