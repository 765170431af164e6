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
use std::net::SocketAddrV4;

const TABLE: &str = "enibox-sandbox-nodeport";
const CHAIN: &str = "nodeports";

const SUBSYSTEM: u16 = 10 << 8; // NFNL_SUBSYS_NFTABLES
const NEW_TABLE: u16 = SUBSYSTEM;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const CREATE: u16 = 0x400; // NLM_F_CREATE
const APPEND: u16 = 0x800; // NLM_F_APPEND

/// `struct nfgenmsg` for IPv4.
const HEADER: [u8; 4] = [2, 0, 0, 0];

fn elem(writer: &mut Writer, name: &str, fill: impl FnOnce(&mut Writer)) {
    writer.nest_flagged(1u16, |writer| {
        writer.text(1u16, name);
        writer.nest_flagged(2u16, fill);
    });
}

fn equals(writer: &mut Writer, data: &[u8]) {
    elem(writer, "cmp", |writer| {
        writer.u32_be(1u16, 1); // NFT_REG_1
        writer.u32_be(2u16, 0); // NFT_CMP_EQ
        writer.nest_flagged(3u16, |writer| writer.bytes(1u16, data));
    });
}

fn immediate(writer: &mut Writer, register: u32, data: &[u8]) {
    elem(writer, "immediate", |writer| {
        writer.u32_be(1u16, register);
        writer.nest_flagged(2u16, |writer| writer.bytes(1u16, data));
    });
}

fn request(kind: u16, flags: u16, what: &str, fill: impl FnOnce(&mut Writer)) -> Request {
    let mut writer = Writer::new(&HEADER);
    writer.text(1u16, TABLE);
    fill(&mut writer);
    Request::new(kind, flags, writer.finish(), format!("add {what} of table ip {TABLE}"))
}

// `meta l4proto P th dport N fib daddr type local dnat to A:P`
fn rule(proto: u8, port: u16, to: SocketAddrV4) -> Result<Request> {
    let mut fib = Ok(());
    let request = request(NEW_RULE, CREATE | APPEND, "a rule", |writer| {
        writer.text(2u16, CHAIN);
        writer.nest_flagged(4u16, |writer| {
            elem(writer, "meta", |writer| {
                writer.u32_be(1u16, 1);
                writer.u32_be(2u16, 16); // NFT_META_L4PROTO
            });
            equals(writer, &[proto]);
            elem(writer, "payload", |writer| {
                writer.u32_be(1u16, 1);
                writer.u32_be(2u16, 2); // NFT_PAYLOAD_TRANSPORT_HEADER
                writer.u32_be(3u16, 2);
                writer.u32_be(4u16, 2);
            });
            equals(writer, &port.to_be_bytes());
            fib = nft_expr::encode(writer, Family::V4, &Expr::FibDaddrLocal { iif: false, negate: false });
            immediate(writer, 1, &to.ip().octets());
            immediate(writer, 2, &to.port().to_be_bytes());
            elem(writer, "nat", |writer| {
                writer.u32_be(1u16, 1); // NFT_NAT_DNAT
                writer.u32_be(2u16, 2); // AF_INET
                writer.u32_be(3u16, 1);
                writer.u32_be(5u16, 2);
            });
        });
    });
    fib.map(|()| request)
}

/// Makes node ports in a namespace: each port leads to its target, over TCP and UDP.
pub fn open(namespace: &Namespace, ports: &[(u16, SocketAddrV4)]) -> Result<()> {
    let mut requests = vec![
        request(NEW_TABLE, CREATE, "the head", |writer| writer.u32_be(2u16, 0)),
        request(NEW_CHAIN, CREATE, "the chain", |writer| {
            writer.text(3u16, CHAIN);
            writer.nest_flagged(4u16, |writer| {
                writer.u32_be(1u16, 0); // prerouting
                writer.u32_be(2u16, (-100_i32).cast_unsigned()); // dstnat
            });
            writer.u32_be(5u16, 1); // accept
            writer.text(7u16, "nat");
        }),
    ];
    for (port, to) in ports {
        for proto in [6, 17] {
            requests.push(rule(proto, *port, *to)?);
        }
    }
    let mut socket = Socket::netfilter_in(namespace)?;
    nft::transaction(&mut socket, requests, &format!("commit table ip {TABLE}")).context("open node ports")
}

/// Takes them away again.
pub fn close(namespace: &Namespace) -> Result<()> {
    nft::delete(&mut Socket::netfilter_in(namespace)?, Family::V4, TABLE).context("close node ports")
}
