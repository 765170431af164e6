//! nf_tables rule sets as values with a text form: exactly the listing of the `nft` tool (`spec/dataplane.md` 22), so that
//! a rule set can be compared, printed and reloaded. Only the expressions that our own tables use are modelled.

use super::net::Family;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// A whole table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// `ip` or `ip6`.
    pub family: Family,
    /// Name, `aws-cni`.
    pub name: String,
    /// Comment of the table (kernels before 5.10 drop it).
    pub comment: Option<String>,
    /// Chains, jump targets before the chains that jump to them.
    pub chains: Vec<Chain>,
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Name.
    pub name: String,
    /// Where it is hooked in; absent for a chain that is only jumped to.
    pub base: Option<Base>,
    /// Rules in order.
    pub rules: Vec<Rule>,
}

/// Where a base chain stands. The policy is always accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// `filter` or `nat`.
    pub kind: ChainKind,
    /// Hook.
    pub hook: Hook,
    /// Priority; lower ones run first.
    pub priority: i32,
}

/// Type of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainKind {
    /// Sees every packet.
    Filter,
    /// Sees the first packet of a connection.
    Nat,
}

/// Netfilter hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// A chain of any table, as far as it matters to those who only look at what others have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnyChain {
    /// `ip`, `ip6`, `inet` or another family's number.
    pub family: String,
    /// Name of the table.
    pub table: String,
    /// Name of the chain.
    pub name: String,
    /// Where it is hooked in, if it is a base chain of a hook that we know.
    pub hook: Option<Hook>,
    /// What it does to packets that nothing in it is for. Of other hooks than `forward` only its policy is told.
    pub forward: Forward,
}

/// What a chain at the hook `forward` does to packets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forward {
    /// Its policy is drop.
    pub drops: bool,
    /// Whether the first rule for whatever has come as far accepts it, or drops or rejects it; the policy has nothing to say then.
    pub accepts: Option<bool>,
    /// Before that a rule may let packets pass: it accepts some, or leads to another chain.
    pub spares: bool,
    /// Before that all packets are accepted that come by such links, and that leave by such: names, with `*` for all that begin so.
    pub links: [Vec<String>; 2],
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Matches and statements in order.
    pub exprs: Vec<Expr>,
    /// Comment.
    pub comment: Option<String>,
}

/// A table of somebody else's, as far as it shows whose its parts are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outline {
    /// `ip` or `ip6`.
    pub family: Family,
    /// Name.
    pub table: String,
    /// Names of its chains.
    pub chains: Vec<String>,
    /// Its rules in order.
    pub rules: Vec<RuleOutline>,
}

/// A rule of somebody else's, in outline.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleOutline {
    /// The chain that it stands in.
    pub chain: String,
    /// The kernel's number for it, unique in its table.
    pub handle: u64,
    /// Chains that it jumps or goes to by its verdict.
    pub leads_to: Vec<String>,
    /// Comment, of nft or of iptables.
    pub comment: Option<String>,
}

/// What is to go from a table, which itself stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    /// `ip` or `ip6`.
    pub family: Family,
    /// Name.
    pub table: String,
    /// Rules: chain and handle.
    pub rules: Vec<(String, u64)>,
    /// Chains, with all that is in them.
    pub chains: Vec<String>,
}

/// How a SNAT picks the source port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnatPorts {
    /// Keep it if possible.
    Keep,
    /// `random`.
    Random,
    /// `fully-random`.
    FullyRandom,
}

/// One match or statement; the `nft` text is in the comment (`spec/dataplane.md` 24.2).
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the nft text")]
pub enum Expr {
    /// `iifname "eth0"`; with `prefix`, `iifname "eni*"`.
    IifName { name: String, prefix: bool, negate: bool },
    /// `oifname != "vlan*"`.
    OifName { name: String, prefix: bool, negate: bool },
    /// `ip daddr 10.0.0.0/8`, `ip6 daddr …`; prefix length 0 matches everything and has no text.
    Daddr { net: IpNet, negate: bool },
    /// `ip saddr …`.
    Saddr { net: IpNet, negate: bool },
    /// `fib daddr type local`, with `iif`: `fib daddr . iif type local`; `negate`: `!=`.
    FibDaddrLocal { iif: bool, negate: bool },
    /// `fib saddr type local`; `negate`: `!=`.
    FibSaddrLocal { negate: bool },
    /// `meta skuid != 4294967295`, which is no user's number: what a socket on this machine sends.
    FromSocket,
    /// `ct state new`.
    CtStateNew,
    /// `ct mark & mask == value`.
    CtMark { mask: u32, value: u32 },
    /// `meta mark & mask == value`.
    MetaMark { mask: u32, value: u32 },
    /// `ct mark set ct mark | bits`.
    CtMarkSet { bits: u32 },
    /// `meta mark set meta mark | bits`.
    MetaMarkSet { bits: u32 },
    /// `meta mark set meta mark & ~bits`.
    MetaMarkClear { bits: u32 },
    /// `counter`; the counts as the kernel reported them, 0 when sent.
    Counter { packets: u64, bytes: u64 },
    /// `return`.
    Return,
    /// `accept`.
    Accept,
    /// `jump chain`.
    Jump(String),
    /// `snat to 10.20.11.162 fully-random`.
    Snat { to: IpAddr, ports: SnatPorts },
    /// `reject` (port unreachable).
    Reject,
    /// An expression of the kernel's that this type does not model; never sent, always a difference.
    Foreign(String),
}

impl Expr {
    /// A fresh counter.
    pub const COUNTER: Expr = Expr::Counter { packets: 0, bytes: 0 };
}

impl fmt::Display for ChainKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
        })
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        })
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The names the nft tool prints for priorities near the well-known ones.
        let named = match self.hook {
            Hook::Prerouting => [("raw", -300), ("mangle", -150), ("dstnat", -100), ("filter", 0)],
            Hook::Postrouting => [("raw", -300), ("mangle", -150), ("filter", 0), ("srcnat", 100)],
            Hook::Input | Hook::Forward | Hook::Output => {
                [("raw", -300), ("mangle", -150), ("filter", 0), ("security", 50)]
            }
        };
        let near = named.iter().map(|(name, at)| (name, self.priority - at)).find(|(_, off)| (-10..=10).contains(off));
        let priority = match near {
            Some((name, 0)) => (*name).to_owned(),
            Some((name, off)) if off > 0 => format!("{name} + {off}"),
            Some((name, off)) => format!("{name} - {}", -off),
            None => self.priority.to_string(),
        };
        write!(f, "type {} hook {} priority {priority}; policy accept;", self.kind, self.hook)
    }
}

fn op(negate: bool) -> &'static str {
    if negate { "!= " } else { "" }
}

fn star(prefix: bool) -> &'static str {
    if prefix { "*" } else { "" }
}

fn net_text(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.trunc().to_string() }
}

/// The tool takes marks for something like addresses, and prints a mask without holes from the top as a prefix length.
fn mark_text(mask: u32, value: u32) -> String {
    match mask.leading_ones() {
        0 => format!("& 0x{mask:08x} == 0x{value:08x}"),
        bits if mask.count_ones() == bits => format!("0x{value:08x}/{bits}"),
        _ => format!("& 0x{mask:08x} == 0x{value:08x}"),
    }
}

fn ip_word(net: &IpNet) -> &'static str {
    if net.addr().is_ipv4() { "ip" } else { "ip6" }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expr::IifName { name, prefix, negate } => write!(f, "iifname {}\"{name}{}\"", op(*negate), star(*prefix)),
            Expr::OifName { name, prefix, negate } => write!(f, "oifname {}\"{name}{}\"", op(*negate), star(*prefix)),
            Expr::Daddr { net, .. } | Expr::Saddr { net, .. } if net.prefix_len() == 0 => Ok(()),
            Expr::Daddr { net, negate } => write!(f, "{} daddr {}{}", ip_word(net), op(*negate), net_text(net)),
            Expr::Saddr { net, negate } => write!(f, "{} saddr {}{}", ip_word(net), op(*negate), net_text(net)),
            Expr::FibDaddrLocal { iif, negate } => {
                write!(f, "fib daddr {}type {}local", if *iif { ". iif " } else { "" }, op(*negate))
            }
            Expr::FibSaddrLocal { negate } => write!(f, "fib saddr type {}local", op(*negate)),
            Expr::FromSocket => f.write_str("meta skuid != 4294967295"),
            Expr::CtStateNew => f.write_str("ct state new"),
            Expr::CtMark { mask, value } => write!(f, "ct mark {}", mark_text(*mask, *value)),
            Expr::MetaMark { mask, value } => write!(f, "meta mark {}", mark_text(*mask, *value)),
            Expr::CtMarkSet { bits } => write!(f, "ct mark set ct mark | 0x{bits:08x}"),
            Expr::MetaMarkSet { bits } => write!(f, "meta mark set meta mark | 0x{bits:08x}"),
            Expr::MetaMarkClear { bits } => write!(f, "meta mark set meta mark & 0x{:08x}", !bits),
            Expr::Counter { packets: 0, bytes: 0 } => f.write_str("counter"),
            Expr::Counter { packets, bytes } => write!(f, "counter packets {packets} bytes {bytes}"),
            Expr::Return => f.write_str("return"),
            Expr::Accept => f.write_str("accept"),
            Expr::Jump(chain) => write!(f, "jump {chain}"),
            Expr::Snat { to, ports } => {
                write!(f, "snat to {to}")?;
                match ports {
                    SnatPorts::Keep => Ok(()),
                    SnatPorts::Random => f.write_str(" random"),
                    SnatPorts::FullyRandom => f.write_str(" fully-random"),
                }
            }
            Expr::Reject => f.write_str("reject"),
            Expr::Foreign(name) => write!(f, "<{name}>"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = self.exprs.iter().map(ToString::to_string).filter(|text| !text.is_empty()).collect::<Vec<_>>();
        if let Some(comment) = &self.comment {
            words.push(format!("comment \"{comment}\""));
        }
        f.write_str(&words.join(" "))
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\tchain {} {{", self.name)?;
        if let Some(base) = &self.base {
            writeln!(f, "\t\t{base}")?;
        }
        for rule in &self.rules {
            writeln!(f, "\t\t{rule}")?;
        }
        writeln!(f, "\t}}")
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        };
        writeln!(f, "table {family} {} {{", self.name)?;
        if let Some(comment) = &self.comment {
            writeln!(f, "\tcomment \"{comment}\"")?;
        }
        for (index, chain) in self.chains.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{chain}")?;
        }
        writeln!(f, "}}")
    }
}
