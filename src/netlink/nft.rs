//! nf_tables: read one table, exchange it whole in one transaction (`spec/dataplane.md` 24).
//!
//! There is no way to change a table in place: the delete/add pair of [`commit`] is atomic, idempotent, and removes whatever
//! another version left in it.

use super::attr::{Attr, Attrs, Writer};
use super::socket::{DUMP_ATTEMPTS, DUMP_PAUSE, KernelError, Message, Request, Socket};
use super::{family_byte, nft_expr};
use crate::error::{Context, Error, Result};
use crate::model::net::Family;
use crate::model::nft::{AnyChain, Base, Chain, ChainKind, Expr, Forward, Hook, Rule, Table};
use neli::consts::nl::NlmF;

/// NFNL_SUBSYS_NFTABLES in the upper byte of the message type.
pub(super) const SUBSYSTEM: u16 = 10 << 8;
const NEW_TABLE: u16 = SUBSYSTEM;
const GET_TABLE: u16 = SUBSYSTEM | 1;
const DEL_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
pub(super) const GET_CHAIN: u16 = SUBSYSTEM | 4;
const NEW_RULE: u16 = SUBSYSTEM | 6;
pub(super) const GET_RULE: u16 = SUBSYSTEM | 7;
pub(super) const NEW_GEN: u16 = SUBSYSTEM | 15;
const GET_GEN: u16 = SUBSYSTEM | 16;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

/// Length of `struct nfgenmsg`.
pub(super) const HEADER: usize = 4;
/// NF_ACCEPT, the policy of all our chains.
const POLICY_ACCEPT: u32 = 1;
/// Longest comment, its NUL included (`NFTNL_UDATA_COMMENT_MAXLEN`).
const COMMENT_MAX: usize = 128;
/// How often a transaction is tried when the kernel asks for another try.
const COMMIT_ATTEMPTS: u32 = 5;
/// ERESTART, which the kernel sends although it is not for users: the generation changed under the transaction.
const ERESTART: i32 = 85;
/// What a rule of ours needs (`spec/dataplane.md` 23).
const MODULES: &str = "needs the kernel modules nf_tables, nft_ct, nft_fib with nft_fib_ipv4 and nft_fib_ipv6, nft_nat, \
                       nft_chain_nat, nft_reject_ipv4 and nft_reject_ipv6";

pub(super) fn header(family: u8, resource: u16) -> [u8; HEADER] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

pub(super) fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// Comments travel as user data: type 0, length, text with its NUL.
fn comment(writer: &mut Writer, kind: u16, text: Option<&String>) -> Result<()> {
    let Some(text) = text else { return Ok(()) };
    let length = u8::try_from(text.len() + 1).ok().filter(|length| usize::from(*length) <= COMMENT_MAX);
    let length = length.ok_or_else(|| Error::new(format!("the comment {text:?} is longer than 127 bytes")))?;
    writer.bytes(kind, &[&[0, length], text.as_bytes(), &[0]].concat());
    Ok(())
}

pub(super) fn read_comment(attr: &Attr<'_>) -> Option<String> {
    let mut rest = attr.value;
    while let [kind, length, tail @ ..] = rest {
        let (value, later) = tail.split_at_checked(usize::from(*length))?;
        if *kind == 0 {
            let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        rest = later;
    }
    None
}

fn table_request(
    kind: u16,
    flags: u16,
    family: Family,
    name: &str,
    verb: &str,
) -> (Writer, impl FnOnce(Writer) -> Request) {
    let mut writer = Writer::new(&header(family_byte(family), 0));
    writer.text(1u16, name);
    let what = format!("{verb} table {} {name}", word(family));
    (writer, move |writer: Writer| Request::new(kind, flags, writer.finish(), what))
}

fn new_table(family: Family, name: &str, text: Option<&String>) -> Result<Request> {
    let (mut writer, finish) = table_request(NEW_TABLE, NlmF::CREATE.bits(), family, name, "add");
    writer.u32_be(2u16, 0);
    comment(&mut writer, 6, text)?;
    Ok(finish(writer))
}

fn del_table(family: Family, name: &str) -> Request {
    let (writer, finish) = table_request(DEL_TABLE, 0, family, name, "delete");
    finish(writer)
}

fn new_chain(table: &Table, chain: &Chain) -> Request {
    let mut writer = Writer::new(&header(family_byte(table.family), 0));
    writer.text(1u16, &table.name);
    writer.text(3u16, &chain.name);
    if let Some(base) = &chain.base {
        writer.nest_flagged(4u16, |writer| {
            writer.u32_be(1u16, hook_number(base.hook));
            writer.u32_be(2u16, base.priority.cast_unsigned());
        });
        writer.u32_be(5u16, POLICY_ACCEPT);
        writer.text(7u16, &base.kind.to_string());
    }
    let what = format!("add chain {} {} {}", word(table.family), table.name, chain.name);
    Request::new(NEW_CHAIN, NlmF::CREATE.bits(), writer.finish(), what)
}

fn new_rule(table: &Table, chain: &Chain, rule: &Rule) -> Result<Request> {
    let what = format!("add rule {} {} {} {rule}", word(table.family), table.name, chain.name);
    let mut writer = Writer::new(&header(family_byte(table.family), 0));
    writer.text(1u16, &table.name);
    writer.text(2u16, &chain.name);
    let mut encoded = Ok(());
    writer.nest_flagged(4u16, |writer| {
        encoded = rule.exprs.iter().try_for_each(|expr| nft_expr::encode(writer, table.family, expr));
    });
    encoded.with_context(|| what.clone())?;
    comment(&mut writer, 7, rule.comment.as_ref()).with_context(|| what.clone())?;
    Ok(Request::new(NEW_RULE, (NlmF::CREATE | NlmF::APPEND).bits(), writer.finish(), what))
}

fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

fn hook_of(number: u32) -> Option<Hook> {
    [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting]
        .into_iter()
        .find(|hook| hook_number(*hook) == number)
}

/// Puts the table in place of whatever has its name, in one transaction: afterwards it is there whole, or nothing has
/// changed. Established connections keep translation and mark; counters start again. The error names the refused message.
pub fn commit(socket: &mut Socket, table: &Table) -> Result<()> {
    let mut requests = vec![
        new_table(table.family, &table.name, None)?,
        del_table(table.family, &table.name),
        new_table(table.family, &table.name, table.comment.as_ref())?,
    ];
    // All chains first, so that every jump has its target.
    requests.extend(table.chains.iter().map(|chain| new_chain(table, chain)));
    for chain in &table.chains {
        for rule in &chain.rules {
            requests.push(new_rule(table, chain, rule)?);
        }
    }
    transaction(socket, requests, &format!("commit table {} {}", word(table.family), table.name))
}

/// Deletes the table with all that is in it; that it is not there is no error.
pub fn delete(socket: &mut Socket, family: Family, name: &str) -> Result<()> {
    // "Add" never fails, so "delete" never does.
    let requests = vec![new_table(family, name, None)?, del_table(family, name)];
    transaction(socket, requests, &format!("commit the end of table {} {name}", word(family)))
}

/// Messages between those that begin and end a transaction; with a generation, one that only goes through if nothing has
/// changed since (`NFNL_BATCH_GENID`, which old kernels ignore).
fn framed(messages: Vec<Request>, generation: Option<u32>, what: &str) -> Vec<Request> {
    let frame = |kind, generation: Option<u32>| {
        let mut writer = Writer::new(&header(0, SUBSYSTEM >> 8));
        if let Some(generation) = generation {
            writer.u32_be(1u16, generation);
        }
        Request::new(kind, 0, writer.finish(), what.to_owned())
    };
    [vec![frame(BATCH_BEGIN, generation)], messages, vec![frame(BATCH_END, None)]].concat()
}

/// Carries out messages as one transaction unless the rule set is no longer that of `generation`, which is an error, as is
/// every refusal: nothing has changed then.
pub(super) fn transaction_at(socket: &mut Socket, messages: Vec<Request>, generation: u32, what: &str) -> Result<()> {
    match transact(socket, &framed(messages, Some(generation), what))? {
        None => Ok(()),
        Some(error) => Err(error.into()),
    }
}

/// Carries out messages as one transaction, repeated when the kernel asks for it; `what` names the whole.
pub fn transaction(socket: &mut Socket, messages: Vec<Request>, what: &str) -> Result<()> {
    let requests = framed(messages, None, what);
    persist(&mut || transact(socket, &requests))
}

fn persist(attempt: &mut dyn FnMut() -> Result<Option<KernelError>>) -> Result<()> {
    for number in 1.. {
        match attempt()? {
            None => return Ok(()),
            Some(error) if number < COMMIT_ATTEMPTS && matches!(error.errno, libc::EAGAIN | libc::EINTR | ERESTART) => {
                std::thread::sleep(DUMP_PAUSE);
            }
            Some(error) => return Err(explained(error).into()),
        }
    }
    Ok(())
}

/// A rule that the kernel does not understand mostly means that a module is missing.
fn explained(mut error: KernelError) -> KernelError {
    if matches!(error.errno, libc::ENOENT | libc::EOPNOTSUPP) && error.what.starts_with("add ") {
        error.text = Some(error.text.map_or_else(|| MODULES.to_owned(), |text| format!("{text}; {MODULES}")));
    }
    error
}

/// One attempt. The last message before the end asks for the acknowledgement, because older kernels send none for the end
/// itself. An error with the number of the begin message is that of the commit, and comes before the acknowledgements.
fn transact(socket: &mut Socket, requests: &[Request]) -> Result<Option<KernelError>> {
    let last = requests.len().saturating_sub(2);
    let what = || requests[0].what.clone();
    let size = requests.iter().map(|request| request.body.len() + 20).sum::<usize>();
    socket.allow_send(size * 2).with_context(what)?;
    // If everything is refused there is an error for every message.
    socket.allow_receive(requests.len() * 2048 + 64 * 1024).with_context(what)?;
    let first = socket.send(requests, last).with_context(what)?;
    let mut refusal = None;
    loop {
        let length = socket.receive().with_context(what)?;
        for (sequence, errno, text) in socket.verdicts(length) {
            let index = usize::try_from(sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
            let Some(request) = requests.get(index) else { continue };
            if errno != 0 && refusal.is_none() {
                refusal = Some(KernelError { errno, text, what: request.what.clone() });
            }
            if index == last || (index == 0 && errno != 0) {
                return Ok(refusal);
            }
        }
    }
}

/// The generation of the whole rule set, which every commit raises, whoever makes it. Equal numbers mean that nothing has
/// changed.
pub fn generation(socket: &mut Socket) -> Result<u32> {
    let request = Request::new(GET_GEN, 0, header(0, 0).to_vec(), "get the nf_tables generation".into());
    let answers = socket.ask(&request)?;
    let id = answers.iter().find_map(|body| Attrs::after(body, HEADER).find(1u16)?.u32_be());
    id.ok_or_else(|| Error::new("get the nf_tables generation: the answer has none"))
}

/// Reads one table; none if there is none of that name. What the model cannot say (a policy of drop, an unknown hook, a
/// dormant table) shows as a rule or chain with [`Expr::Foreign`], so that it is always a difference.
pub fn table(socket: &mut Socket, family: Family, name: &str) -> Result<Option<Table>> {
    for attempt in 0..DUMP_ATTEMPTS {
        if attempt > 1 {
            std::thread::sleep(DUMP_PAUSE);
        }
        // Three requests: the same generation before and after says that they saw one rule set.
        let before = generation(socket)?;
        let table = read_table(socket, family, name)?;
        if generation(socket)? == before {
            return Ok(table);
        }
    }
    Err(Error::new(format!("read table {} {name}: it changed during each of {DUMP_ATTEMPTS} attempts", word(family))))
}

fn read_table(socket: &mut Socket, family: Family, name: &str) -> Result<Option<Table>> {
    let (writer, finish) = table_request(GET_TABLE, 0, family, name, "get");
    let answers = match socket.ask(&finish(writer)) {
        Err(error) if error.find::<KernelError>().is_some_and(KernelError::not_found) => return Ok(None),
        other => other?,
    };
    let mut table = Table { family, name: name.to_owned(), comment: None, chains: Vec::new() };
    for attr in answers.iter().flat_map(|body| Attrs::after(body, HEADER)) {
        match attr.kind {
            2 if attr.u32_be().is_some_and(|flags| flags != 0) => table.chains.push(foreign_chain("table flags")),
            6 => table.comment = read_comment(&attr),
            _ => {}
        }
    }
    let chains = Request::new(GET_CHAIN, 0, header(family_byte(family), 0).to_vec(), "list chains".into());
    let chains = socket.dump(&chains, |message: &Message<'_>| decode_chain(message.body, family, name))?;
    table.chains.extend(chains);
    let mut writer = Writer::new(&header(family_byte(family), 0));
    writer.text(1u16, name);
    let rules = Request::new(GET_RULE, 0, writer.finish(), format!("list rules of table {} {name}", word(family)));
    for (chain, rule) in socket.dump(&rules, |message: &Message<'_>| decode_rule(message.body, family, name))? {
        if let Some(chain) = table.chains.iter_mut().find(|found| found.name == chain) {
            chain.rules.push(rule);
        }
    }
    Ok(Some(table))
}

/// Whether there is a chain of this name.
pub fn has_chain(socket: &mut Socket, family: Family, table: &str, chain: &str) -> Result<bool> {
    let mut writer = Writer::new(&header(family_byte(family), 0));
    writer.text(1u16, table);
    writer.text(3u16, chain);
    let what = format!("get chain {} {table} {chain}", word(family));
    match socket.ask(&Request::new(GET_CHAIN, 0, writer.finish(), what)) {
        Ok(answers) => Ok(!answers.is_empty()),
        Err(error) if error.find::<KernelError>().is_some_and(KernelError::not_found) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The chains of all tables of all families.
pub fn chains(socket: &mut Socket) -> Result<Vec<AnyChain>> {
    let request = Request::new(GET_CHAIN, 0, header(0, 0).to_vec(), "list chains".into());
    let found =
        socket.dump(&request, |message: &Message<'_>| Some((*message.body.first()?, any_chain(message.body)?)))?;
    let mut chains = Vec::new();
    for (family, mut chain) in found {
        if chain.hook == Some(Hook::Forward) {
            let mut writer = Writer::new(&header(family, 0));
            writer.text(1u16, &chain.table);
            writer.text(2u16, &chain.name);
            let list = Request::new(GET_RULE, 0, writer.finish(), format!("list rules of chain {}", chain.name));
            let (table, name) = (chain.table.clone(), chain.name.clone());
            let fates = socket.dump(&list, |message: &Message<'_>| fate(message.body, &table, &name))?;
            for fate in fates {
                note(&mut chain.forward, fate);
            }
        }
        chains.push(chain);
    }
    Ok(chains)
}

/// What becomes of packets that reach a rule.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// None of them goes on: the rule asks for nothing, and accepts or lets none through.
    All { accepted: bool },
    /// Those that come by such a link (0) or leave by it (1) are accepted.
    Link(usize, String),
    /// Some may be accepted, here or in another chain.
    Some,
    /// All go on to the next rule, unless they are dropped.
    None,
}

/// Notes the fate of packets at a chain's next rule, if any get as far.
fn note(forward: &mut Forward, fate: Fate) {
    if forward.accepts.is_some() {
        return;
    }
    match fate {
        Fate::All { accepted } => forward.accepts = Some(accepted),
        Fate::Link(side, name) => {
            forward.spares = true;
            forward.links[side].push(name);
        }
        Fate::Some => forward.spares = true,
        Fate::None => {}
    }
}

/// Expressions that only look at a packet.
const SELECTORS: &[&str] =
    &["meta", "payload", "cmp", "bitwise", "range", "ct", "fib", "exthdr", "limit", "socket", "rt"];

/// The fate of packets at a rule of this chain; none if it is of another one.
fn fate(body: &[u8], table: &str, chain: &str) -> Option<Fate> {
    let attrs = Attrs::after(body, HEADER);
    let text = |attrs: Attrs<'_>, kind: u16| attrs.clone().find(kind).map(|attr| attr.text()).unwrap_or_default();
    // Kernels that do not filter by chain list all.
    if text(attrs.clone(), 1) != table || text(attrs.clone(), 2) != chain {
        return None;
    }
    let list = attrs.find(4u16);
    let (mut asks, mut more, mut accepted, mut plain) = (false, false, None, true);
    for elem in list.iter().flat_map(Attr::nested) {
        let data = elem.nested().find(2u16);
        let inner = |kind: u16| data.and_then(|data| data.nested().find(kind));
        let called = |name: &str| inner(1).is_some_and(|attr| attr.text() == name);
        match text(elem.nested(), 1).as_str() {
            "counter" | "log" => {}
            "match" if called("comment") => {}
            "match" => (asks, plain) = (true, false),
            "reject" => accepted = Some(false),
            "target" if called("REJECT") => accepted = Some(false),
            "target" if called("LOG") || called("NFLOG") => {}
            // NFTA_IMMEDIATE_DATA, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE: NF_DROP is 0, NF_ACCEPT 1, others lead elsewhere.
            "immediate" => {
                let verdict = inner(2).and_then(|data| data.nested().find(2u16));
                match verdict.and_then(|verdict| verdict.nested().find(1u16)?.u32_be()) {
                    Some(code @ (0 | 1)) => accepted = Some(code == 1),
                    Some(_) => more = true,
                    None => {}
                }
            }
            // Without NFTA_LOOKUP_DREG it is a set, and no map to verdicts.
            "lookup" if inner(3).is_none() => asks = true,
            name if SELECTORS.contains(&name) => asks = true,
            _ => (asks, more) = (true, true),
        }
    }
    Some(match (asks, accepted) {
        _ if more => Fate::Some,
        (false, Some(accepted)) => Fate::All { accepted },
        (true, Some(true)) => list.filter(|_| plain).and_then(|list| by_link(list.value)).unwrap_or(Fate::Some),
        _ => Fate::None,
    })
}

/// Of a rule that accepts and asks for nothing but a link.
fn by_link(expressions: &[u8]) -> Option<Fate> {
    let mut exprs = nft_expr::decode(Family::V4, expressions);
    let silent = |name: &String| matches!(name.as_str(), "log" | "match");
    exprs.retain(|expr| !matches!(expr, Expr::Counter { .. }) && !matches!(expr, Expr::Foreign(name) if silent(name)));
    let named = |name: &str, prefix: bool| format!("{name}{}", if prefix { "*" } else { "" });
    match &exprs[..] {
        [Expr::IifName { name, prefix, negate: false }, Expr::Accept] => Some(Fate::Link(0, named(name, *prefix))),
        [Expr::OifName { name, prefix, negate: false }, Expr::Accept] => Some(Fate::Link(1, named(name, *prefix))),
        _ => None,
    }
}

fn any_chain(body: &[u8]) -> Option<AnyChain> {
    let attrs = Attrs::after(body, HEADER);
    let text = |kind: u16| attrs.clone().find(kind).map(|attr| attr.text());
    // Those of the families arp, netdev and bridge have the same numbers and see no IP packet that is forwarded.
    let hook = attrs.clone().find(4u16).filter(|_| matches!(body.first(), Some(1 | 2 | 10)));
    let hook = hook.and_then(|hook| hook.nested().find(1u16)?.u32_be()).and_then(hook_of);
    let policy = attrs.clone().find(5u16).and_then(|attr| attr.u32_be());
    Some(AnyChain {
        family: match *body.first()? {
            1 => "inet".into(),
            2 => "ip".into(),
            10 => "ip6".into(),
            other => other.to_string(),
        },
        table: text(1)?,
        name: text(3)?,
        hook,
        forward: Forward { drops: policy.is_some_and(|policy| policy != POLICY_ACCEPT), ..Forward::default() },
    })
}

fn foreign_rule(what: &str) -> Rule {
    Rule { exprs: vec![Expr::Foreign(what.to_owned())], comment: None }
}

fn foreign_chain(what: &str) -> Chain {
    Chain { name: format!("<{what}>"), base: None, rules: vec![foreign_rule(what)] }
}

/// Reads the body of an NFT_MSG_NEWCHAIN message of one table.
fn decode_chain(body: &[u8], family: Family, table: &str) -> Option<Chain> {
    let attrs = Attrs::after(body, HEADER);
    if *body.first()? != family_byte(family) || attrs.clone().find(1u16)?.text() != table {
        return None;
    }
    let mut chain = Chain { name: attrs.clone().find(3u16)?.text(), base: None, rules: Vec::new() };
    let Some(hook) = attrs.clone().find(4u16) else { return Some(chain) };
    let number = |kind: u16| hook.nested().find(kind).and_then(|attr| attr.u32_be());
    let kind = attrs.clone().find(7u16).map(|kind| kind.text()).unwrap_or_default();
    let kind = [ChainKind::Filter, ChainKind::Nat].into_iter().find(|known| known.to_string() == kind);
    match (kind, number(1).and_then(hook_of), number(2)) {
        (Some(kind), Some(hook), Some(priority)) => {
            chain.base = Some(Base { kind, hook, priority: priority.cast_signed() });
        }
        _ => chain.rules.push(foreign_rule("base chain of another type or hook")),
    }
    if attrs.find(5u16).and_then(|attr| attr.u32_be()).is_some_and(|policy| policy != POLICY_ACCEPT) {
        chain.rules.push(foreign_rule("policy drop"));
    }
    Some(chain)
}

/// Reads the body of an NFT_MSG_NEWRULE message of one table: the chain's name and the rule.
fn decode_rule(body: &[u8], family: Family, table: &str) -> Option<(String, Rule)> {
    let attrs = Attrs::after(body, HEADER);
    if *body.first()? != family_byte(family) || attrs.clone().find(1u16)?.text() != table {
        return None;
    }
    let chain = attrs.clone().find(2u16)?.text();
    let exprs = attrs.clone().find(4u16).map_or_else(Vec::new, |list| nft_expr::decode(family, list.value));
    Some((chain, Rule { exprs, comment: attrs.find(7u16).and_then(|attr| read_comment(&attr)) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn comments_round_trip_and_are_bounded() {
        let written = |text: &str| {
            let mut writer = Writer::new(&[]);
            comment(&mut writer, 7, Some(&text.to_owned()))?;
            Ok::<_, Error>(writer.finish())
        };
        for text in ["VPC CIDR", "", &"x".repeat(127)] {
            let bytes = written(text).unwrap();
            assert_eq!(read_comment(&Attrs::after(&bytes, 0).next().unwrap()).unwrap(), text);
        }
        assert!(written(&"x".repeat(128)).is_err());
        // Another kind of user data stands before it.
        assert_eq!(read_comment(&Attr { kind: 7, value: &[1, 2, 9, 9, 0, 3, b'o', b'k', 0] }).unwrap(), "ok");
        assert_eq!(read_comment(&Attr { kind: 7, value: &[1, 9, 9] }), None);
    }

    #[test]
    fn a_transaction_is_repeated_when_the_kernel_asks_for_it() {
        let check = |errnos: &[i32], tries: usize, well: bool| {
            let mut left = errnos.iter();
            let mut count = 0;
            let result = persist(&mut || {
                count += 1;
                Ok(left.next().map(|errno| KernelError { errno: *errno, text: None, what: "commit".into() }))
            });
            assert_eq!((count, result.is_ok()), (tries, well), "{errnos:?}: {result:?}");
        };
        check(&[], 1, true);
        check(&[libc::EAGAIN], 2, true);
        check(&[libc::EINTR, ERESTART, libc::EAGAIN], 4, true);
        check(&[libc::EAGAIN; 9], 5, false);
        check(&[libc::EPERM], 1, false);
        check(&[ERESTART, libc::ENOENT], 2, false);
    }

    #[test]
    fn a_refused_rule_names_the_modules() {
        let error = |errno, what: &str| explained(KernelError { errno, text: None, what: what.into() }).to_string();
        let text = error(libc::ENOENT, "add rule ip aws-cni snat fib daddr type local");
        assert!(text.contains("nft_fib") && text.starts_with("add rule ip aws-cni snat fib"), "{text}");
        assert!(!error(libc::EPERM, "add rule x").contains("nft_fib"));
        assert!(!error(libc::ENOENT, "commit table ip aws-cni").contains("nft_fib"));
    }

    #[test]
    fn hooks_are_those_of_ip_packets() {
        let check = |family: u8, number: u32, hook: Option<Hook>| {
            let mut writer = Writer::new(&header(family, 0));
            writer.text(1u16, "filter");
            writer.text(3u16, "FORWARD");
            writer.nest(4u16, |hook| {
                hook.bytes(1u16, &number.to_be_bytes());
                hook.bytes(2u16, &[0; 4]);
            });
            writer.bytes(5u16, &[0; 4]);
            let chain = any_chain(&writer.finish()).unwrap();
            assert_eq!((chain.hook, chain.forward.drops), (hook, true), "{family} {number}");
        };
        for family in [1, 2, 10] {
            check(family, 2, Some(Hook::Forward));
            check(family, 0, Some(Hook::Prerouting));
        }
        // arp, netdev (ingress is 0 there) and bridge.
        for family in [3, 5, 7] {
            check(family, 2, None);
            check(family, 0, None);
        }
    }

    #[test]
    fn what_becomes_of_packets_at_a_rule() {
        let named = |prefix, negate| Expr::IifName { name: "eni".into(), prefix, negate };
        let out = Expr::OifName { name: "eni".into(), prefix: true, negate: false };
        let drop = |writer: &mut Writer| {
            writer.nest(1u16, |elem| {
                elem.text(1u16, "immediate");
                elem.nest(2u16, |data| {
                    data.bytes(1u16, &[0; 4]);
                    data.nest(2u16, |data| data.nest(2u16, |verdict| verdict.bytes(1u16, &[0; 4])));
                });
            });
        };
        let check = |exprs: &[Expr], drops: bool, expected: Option<Fate>| {
            let mut writer = Writer::new(&header(2, 0));
            writer.text(1u16, "filter");
            writer.text(2u16, "FORWARD");
            writer.nest(4u16, |list| {
                for expr in exprs {
                    nft_expr::encode(list, Family::V4, expr).unwrap();
                }
                if drops {
                    drop(list);
                }
            });
            let body = writer.finish();
            assert_eq!(fate(&body, "filter", "FORWARD"), expected, "{exprs:?} {drops}");
            assert_eq!(fate(&body, "filter", "INPUT"), None);
            assert_eq!(fate(&body, "fw", "FORWARD"), None);
        };
        let by = |side| Some(Fate::Link(side, "eni*".into()));
        check(&[], true, Some(Fate::All { accepted: false }));
        check(&[Expr::COUNTER], true, Some(Fate::All { accepted: false }));
        check(&[Expr::Reject], false, Some(Fate::All { accepted: false }));
        check(&[Expr::COUNTER, Expr::Accept], false, Some(Fate::All { accepted: true }));
        check(&[Expr::COUNTER], false, Some(Fate::None));
        check(&[named(true, false)], true, Some(Fate::None));
        check(&[Expr::CtStateNew], true, Some(Fate::None));
        check(&[Expr::CtStateNew, Expr::Accept], false, Some(Fate::Some));
        check(&[Expr::Jump("DOCKER-USER".into())], false, Some(Fate::Some));
        check(&[Expr::Return], false, Some(Fate::Some));
        check(&[named(true, false), Expr::COUNTER, Expr::Accept], false, by(0));
        check(&[out.clone(), Expr::Accept], false, by(1));
        check(&[named(false, false), Expr::Accept], false, Some(Fate::Link(0, "eni".into())));
        check(&[named(true, true), Expr::Accept], false, Some(Fate::Some));
        check(&[named(true, false), out, Expr::Accept], false, Some(Fate::Some));
        check(&[named(true, false), Expr::CtStateNew, Expr::Accept], false, Some(Fate::Some));
    }

    #[test]
    fn the_first_rule_with_the_last_word_counts() {
        let all = |accepted| Fate::All { accepted };
        let mut forward = Forward::default();
        note(&mut forward, Fate::None);
        note(&mut forward, Fate::Link(1, "eni*".into()));
        note(&mut forward, all(false));
        let bars = Forward {
            accepts: Some(false),
            spares: true,
            links: [Vec::new(), vec!["eni*".into()]],
            ..Forward::default()
        };
        assert_eq!(forward, bars);
        note(&mut forward, all(true));
        note(&mut forward, Fate::Link(0, "eni*".into()));
        assert_eq!(forward, bars);
        let mut forward = Forward { drops: true, ..Forward::default() };
        note(&mut forward, all(true));
        note(&mut forward, Fate::Some);
        assert_eq!(forward, Forward { drops: true, accepts: Some(true), ..Forward::default() });
    }

    proptest! {
        #[test]
        fn hostile_bodies_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for family in [Family::V4, Family::V6] {
                decode_chain(&bytes, family, "");
                decode_rule(&bytes, family, "");
            }
            any_chain(&bytes);
            fate(&bytes, "", "");
            by_link(&bytes);
            read_comment(&Attr { kind: 7, value: &bytes });
        }
    }
}
