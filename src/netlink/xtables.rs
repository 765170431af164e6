//! Tables of `iptables-legacy`: which chains a table has, and what becomes of what is forwarded. Read only: such a table can be replaced but as a whole, racing with
//! everybody else who does (`spec/dataplane.md` 25.2; structures from `linux/netfilter_ipv4/ip_tables.h`).

use crate::error::{Context, Error, Result};
use crate::model::net::Family;
use crate::model::nft::Forward;
use crate::sys;

/// IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES, the same for IPv6.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
/// Size of `struct ipt_getinfo`, and where the size of all entries stands in it.
const INFO: usize = 84;
const INFO_SIZE: usize = 80;
/// Where it has the hooks that the table is called at, a bit each, and for each hook where its chain begins and where the entry of its
/// policy.
const INFO_HOOKS: usize = 32;
const INFO_CHAINS: usize = 36;
const INFO_POLICIES: usize = 56;
/// NF_INET_FORWARD.
const FORWARD: usize = 2;
/// Verdicts of the standard target: NF_DROP and NF_ACCEPT, turned negative as all of them are, and XT_RETURN.
const DROP: i32 = -1;
const ACCEPT: i32 = -2;
const RETURN: i32 = -5;
/// Where the entries begin in `struct ipt_get_entries`.
const ENTRIES: usize = 40;
/// XT_TABLE_MAXNAMELEN.
const NAME: usize = 32;
/// Where `struct ipt_entry` has the offset of the target, and behind it that of the next entry; in `struct ip6t_entry`
/// (`linux/netfilter_ipv6/ip6_tables.h`) the selectors before it are longer.
const OFFSETS: usize = 88;
const OFFSETS_V6: usize = 140;
/// Bytes of the selectors, without a mark of netfilter's caches behind them and what fills up; and of an entry without its matches.
const SELECTORS: usize = 84;
const SELECTORS_V6: usize = 136;
const HEAD: usize = 112;
const HEAD_V6: usize = 168;
/// Where among the selectors the names of links stand, and how long one is (IFNAMSIZ).
const NAMES: usize = 16;
const NAMES_V6: usize = 64;
const NAME_SIZE: usize = 16;
/// Bytes of the head of a match, as of a target: its length, its name, its revision.
const MATCH: usize = 32;
/// A larger table is not looked at: the kernel gives it out only in one piece.
const BYTES_MAX: usize = 32 << 20;

/// Names of the user's chains in a table, in the calling thread's namespace. None if nobody uses the table.
pub fn chains(family: Family, table: &str) -> Result<Vec<String>> {
    let table = read(family, table)?;
    Ok(table.map(|table| chain_names(&table.entries, table.offsets)).unwrap_or_default())
}

/// What chain FORWARD of table `filter` does to packets that are forwarded, in the calling thread's namespace.
pub fn forward(family: Family) -> Result<Forward> {
    let table = read(family, "filter")?;
    Ok(table.map(|table| judged(&table)).unwrap_or_default())
}

/// A table as the kernel gives it out.
struct Raw {
    info: Vec<u8>,
    entries: Vec<u8>,
    /// Where an entry of its family has the offset of its target.
    offsets: usize,
}

/// None if nobody uses the table: opening it would make it, with its hooks.
fn read(family: Family, table: &str) -> Result<Option<Raw>> {
    let v6 = family == Family::V6;
    let (names, level, offsets) = if v6 {
        ("/proc/thread-self/net/ip6_tables_names", libc::IPPROTO_IPV6, OFFSETS_V6)
    } else {
        ("/proc/thread-self/net/ip_tables_names", libc::IPPROTO_IP, OFFSETS)
    };
    // The tables that somebody has opened, a line each. Without the file the kernel has no such tables at all.
    let names = std::fs::read_to_string(names).unwrap_or_default();
    if !names.lines().any(|name| name == table) {
        return Ok(None);
    }
    let what = || format!("read table {table} of iptables-legacy");
    let socket = sys::raw_socket(v6).with_context(what)?;
    let mut info = name_field(table, INFO);
    let length = sys::get_option(&socket, level, GET_INFO, &mut info).with_context(what)?;
    info.truncate(length);
    let size = word(&info, INFO_SIZE).and_then(|size| usize::try_from(size).ok());
    let size = size.filter(|size| *size <= BYTES_MAX).ok_or_else(|| Error::new("it is too large").context(what()))?;
    let mut buffer = name_field(table, ENTRIES + size);
    buffer[NAME..NAME + 4].copy_from_slice(&u32::try_from(size)?.to_ne_bytes());
    let length = sys::get_option(&socket, level, GET_ENTRIES, &mut buffer).with_context(what)?;
    Ok(Some(Raw { info, entries: buffer.get(ENTRIES..length).unwrap_or_default().to_vec(), offsets }))
}

/// Where a part of chain FORWARD begins among the entries.
fn place(table: &Raw, parts: usize) -> Option<usize> {
    let hooks = word(&table.info, INFO_HOOKS)?;
    let at = word(&table.info, parts + 4 * FORWARD).filter(|_| hooks >> FORWARD & 1 == 1)?;
    usize::try_from(at).ok()
}

// The standard target has no name, and its verdict behind its head.
fn verdict(target: &[u8]) -> Option<i32> {
    word(target, MATCH).map(u32::cast_signed)
}

fn drops(table: &Raw) -> bool {
    let policy = || {
        let entry = table.entries.get(place(table, INFO_POLICIES)?..)?;
        verdict(entry.get(half(entry, table.offsets)?..)?)
    };
    policy() == Some(DROP)
}

fn judged(table: &Raw) -> Forward {
    let mut forward = Forward { drops: drops(table), ..Forward::default() };
    // One that is cut off is taken as far as it goes.
    rules(table, &mut forward);
    forward
}

/// The rules of chain FORWARD before the policy, up to one that has the last word. Chains that rules lead to are not followed.
fn rules(table: &Raw, forward: &mut Forward) -> Option<()> {
    let (begin, end) = (place(table, INFO_CHAINS)?, place(table, INFO_POLICIES)?);
    let mut entries = table.entries.get(begin..end)?;
    while !entries.is_empty() {
        let target = half(entries, table.offsets)?;
        let next = half(entries, table.offsets + 2)?;
        let entry = entries.get(..next)?;
        let fate = (text(entry, target + 2, 29)?, verdict(entry.get(target..)?));
        let drops = matches!(fate, (b"REJECT", _) | (b"", Some(DROP)));
        let all = asks_nothing(entry, target, table.offsets);
        match fate {
            _ if all && drops => {
                forward.accepts = Some(false);
                return Some(());
            }
            (b"", Some(ACCEPT)) if all => {
                forward.accepts = Some(true);
                return Some(());
            }
            // On to the policy.
            (b"", Some(RETURN)) if all => return Some(()),
            (b"LOG" | b"NFLOG", _) => {}
            (b"", Some(ACCEPT)) => {
                forward.spares = true;
                if let Some((side, name)) = link(entry, target, table.offsets) {
                    forward.links[side].push(name);
                }
            }
            _ => forward.spares |= !drops,
        }
        // It leads on: an entry is longer than its own head.
        entries = entries.get(next..).filter(|_| next > table.offsets)?;
    }
    Some(())
}

/// The link that an entry asks for, if it asks for nothing else: whether packets come by it (0) or leave by it (1), and its name, with
/// `*` if only its beginning counts.
fn link(entry: &[u8], target: usize, offsets: usize) -> Option<(usize, String)> {
    let (length, names) = if offsets == OFFSETS_V6 { (SELECTORS_V6, NAMES_V6) } else { (SELECTORS, NAMES) };
    let selectors = entry.get(..length).filter(|_| only_comments(entry, target, offsets))?;
    let one = |side: usize| {
        // The names of both sides stand before their masks.
        let (name, mask) = (names + side * NAME_SIZE, names + (2 + side) * NAME_SIZE);
        let own = |at: usize| (name..name + NAME_SIZE).contains(&at) || (mask..mask + NAME_SIZE).contains(&at);
        let others = selectors.iter().enumerate().any(|(at, byte)| !own(at) && *byte != 0);
        let asked = selectors.get(mask..mask + NAME_SIZE)?.iter().take_while(|byte| **byte == u8::MAX).count();
        let text = std::str::from_utf8(selectors.get(name..name + asked)?).ok()?;
        let text = text.strip_suffix('\0').map_or_else(|| format!("{text}*"), str::to_owned);
        (!others && asked > 0).then_some((side, text))
    };
    one(0).or_else(|| one(1))
}

/// Whether an entry is for every packet: no selector is set, and none of its matches is more than a comment.
fn asks_nothing(entry: &[u8], target: usize, offsets: usize) -> bool {
    let selectors = if offsets == OFFSETS_V6 { SELECTORS_V6 } else { SELECTORS };
    let none = entry.get(..selectors).is_some_and(|selectors| selectors.iter().all(|byte| *byte == 0));
    none && only_comments(entry, target, offsets)
}

fn only_comments(entry: &[u8], target: usize, offsets: usize) -> bool {
    let mut at = if offsets == OFFSETS_V6 { HEAD_V6 } else { HEAD };
    while at < target {
        let length = half(entry, at).filter(|length| *length >= MATCH);
        match (length, text(entry, at + 2, 29)) {
            (Some(length), Some(b"comment")) => at += length,
            _ => return false,
        }
    }
    at == target
}

fn name_field(table: &str, length: usize) -> Vec<u8> {
    let mut bytes = table.as_bytes().to_vec();
    bytes.truncate(NAME - 1);
    bytes.resize(length.max(NAME), 0);
    bytes
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    bytes.get(at..at + 2)?.try_into().ok().map(|half| usize::from(u16::from_ne_bytes(half)))
}

fn text(bytes: &[u8], at: usize, length: usize) -> Option<&[u8]> {
    bytes.get(at..at + length)?.split(|byte| *byte == 0).next()
}

/// A user's chain begins with an entry whose target is called ERROR and has the chain's name as its data; so does the end
/// of the table, under the name ERROR.
fn chain_names(mut entries: &[u8], offsets: usize) -> Vec<String> {
    let mut names = Vec::new();
    while let (Some(target), Some(next)) = (half(entries, offsets), half(entries, offsets + 2)) {
        if text(entries, target + 2, 29) == Some(b"ERROR")
            && let Some(name) = text(entries, target + 32, 30)
            && name != b"ERROR"
        {
            names.push(String::from_utf8_lossy(name).into_owned());
        }
        match entries.get(next..) {
            Some(rest) if next > offsets => entries = rest,
            _ => break,
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(target: &str, data: &str) -> Vec<u8> {
        let mut bytes = vec![0; 112 + 64];
        let length = u16::try_from(bytes.len()).unwrap();
        bytes[OFFSETS..OFFSETS + 2].copy_from_slice(&112u16.to_ne_bytes());
        bytes[OFFSETS + 2..OFFSETS + 4].copy_from_slice(&length.to_ne_bytes());
        bytes[114..114 + target.len()].copy_from_slice(target.as_bytes());
        bytes[144..144 + data.len()].copy_from_slice(data.as_bytes());
        bytes
    }

    #[test]
    fn chains_are_found_among_rules() {
        let table = [entry("", ""), entry("ERROR", "AWS-SNAT-CHAIN-0"), entry("SNAT", "x"), entry("ERROR", "ERROR")];
        assert_eq!(chain_names(&table.concat(), OFFSETS), ["AWS-SNAT-CHAIN-0"]);
        assert_eq!(chain_names(&table.concat()[..300], OFFSETS), Vec::<String>::new(), "cut off");
        assert_eq!(chain_names(&[0; 200], OFFSETS), Vec::<String>::new(), "an entry that leads to itself");
    }

    /// A table whose chain FORWARD begins behind one entry and has these, the last one as its policy.
    fn table(rules: &[Vec<u8>]) -> Raw {
        let before = entry("", "");
        let mut info = vec![0; INFO];
        let policy = before.len() + rules.iter().rev().skip(1).map(Vec::len).sum::<usize>();
        let mut set = |at: usize, value: usize| {
            info[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_ne_bytes());
        };
        set(INFO_HOOKS, 0b1110);
        set(INFO_CHAINS + 8, before.len());
        set(INFO_POLICIES + 8, policy);
        Raw { info, entries: [before, rules.concat()].concat(), offsets: OFFSETS }
    }

    fn standard(verdict: i32) -> Vec<u8> {
        let mut rule = entry("", "");
        rule[144..148].copy_from_slice(&verdict.to_ne_bytes());
        rule
    }

    /// With a match before the target.
    fn matching(mut rule: Vec<u8>, name: &str) -> Vec<u8> {
        let mut found = vec![0; 40];
        found[..2].copy_from_slice(&40u16.to_ne_bytes());
        found[2..2 + name.len()].copy_from_slice(name.as_bytes());
        rule.splice(112..112, found);
        rule[88..92].copy_from_slice(&[152u16.to_ne_bytes(), 216u16.to_ne_bytes()].concat());
        rule
    }

    #[test]
    fn the_policy_of_forward_is_read() {
        for (verdict, expected) in [(DROP, true), (ACCEPT, false)] {
            let mut table = table(&[standard(verdict)]);
            assert_eq!(drops(&table), expected);
            assert_eq!(judged(&table), Forward { drops: expected, ..Forward::default() }, "the policy is no rule");
            table.entries.truncate(200);
            assert!(!drops(&table), "cut off");
            table.info[INFO_HOOKS] = 0;
            assert!(!drops(&table), "not called when packets are forwarded");
        }
    }

    #[test]
    fn a_rule_against_everything_is_found() {
        let selecting = |at: usize, mut rule: Vec<u8>| {
            rule[at] = 1;
            rule
        };
        let by = |side: usize, name: &str, asked: usize, mut rule: Vec<u8>| {
            let (name_at, mask) = (NAMES + side * 16, NAMES + (2 + side) * 16);
            rule[name_at..name_at + name.len()].copy_from_slice(name.as_bytes());
            rule[mask..mask + asked].fill(0xff);
            rule
        };
        let (reject, drop, accept) = (|| entry("REJECT", ""), || standard(DROP), || standard(ACCEPT));
        let check = |rules: &[Vec<u8>], expected: &str| {
            let found = table(&[rules, &[standard(ACCEPT)]].concat());
            let forward = judged(&found);
            let said = [(Some(false), "bars"), (Some(true), "accepts")]
                .map(|(accepts, name)| (forward.accepts == accepts, name));
            let said = said.into_iter().chain([(forward.spares, "spares")]);
            let said = said.filter(|said| said.0).map(|said| said.1.to_owned());
            let links = forward.links.iter().zip(["in", "out"]).filter(|(names, _)| !names.is_empty());
            let links = links.map(|(names, side)| format!("{side} {}", names.join(" ")));
            assert_eq!(said.chain(links).collect::<Vec<_>>().join(", "), expected, "{rules:?}");
            for length in 0..found.entries.len() {
                let entries = found.entries[..length].to_vec();
                judged(&Raw { info: found.info.clone(), entries, offsets: OFFSETS });
            }
        };
        check(&[], "");
        check(&[reject()], "bars");
        check(&[drop()], "bars");
        check(&[entry("LOG", ""), drop()], "bars"); // only notes
        check(&[standard(7), drop()], "bars, spares"); // a chain of users
        check(&[matching(reject(), "comment")], "bars");
        check(&[matching(reject(), "conntrack")], "");
        check(&[selecting(0, drop()), selecting(83, reject())], ""); // an address, an inverted flag
        check(&[selecting(0, accept()), drop()], "bars, spares");
        check(&[selecting(0, drop()), drop()], "bars");
        check(&[accept(), drop()], "accepts");
        check(&[standard(RETURN), drop()], "");
        check(&[matching(accept(), "conntrack"), drop()], "bars, spares");
        check(&[by(0, "eni+", 3, accept()), by(1, "eni+", 3, accept()), drop()], "bars, spares, in eni*, out eni*");
        check(&[matching(by(0, "eni+", 3, accept()), "comment"), drop()], "bars, spares, in eni*");
        check(&[matching(by(0, "eni+", 3, accept()), "conntrack"), drop()], "bars, spares");
        check(&[by(0, "eni+", 3, selecting(0, accept())), drop()], "bars, spares");
        check(&[by(0, "eni+", 3, selecting(83, accept())), drop()], "bars, spares"); // all but those
        check(&[by(0, "docker0", 8, accept()), drop()], "bars, spares, in docker0");
        check(&[by(0, "eni+", 3, by(1, "eth0", 5, accept())), drop()], "bars, spares");
        check(&[drop(), by(0, "eni+", 3, accept())], "bars");
    }

    proptest! {
        #[test]
        fn hostile_tables_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), next in 0u16..300) {
            let mut bytes = bytes;
            if bytes.len() > 92 {
                bytes[OFFSETS + 2..OFFSETS + 4].copy_from_slice(&next.to_ne_bytes());
            }
            chain_names(&bytes, OFFSETS);
            chain_names(&bytes, OFFSETS_V6);
            for offsets in [OFFSETS, OFFSETS_V6] {
                let hostile = Raw { info: bytes.clone(), entries: bytes.clone(), offsets };
                judged(&hostile);
            }
        }

        // Places, lengths and names that fit together so far that what stands behind them is read.
        #[test]
        fn almost_whole_tables_never_panic(
            rules in proptest::collection::vec((0u16..400, 0u16..400, 0usize..4, 0u16..60), 0..6),
            begin in 0u32..800,
            end in 0u32..1200,
        ) {
            let entries = rules.iter().flat_map(|(target, next, name, length)| {
                let mut rule = matching(entry(["", "REJECT", "DNAT", "ERROR"][*name], ""), "comment");
                rule[88..92].copy_from_slice(&[target.to_ne_bytes(), next.to_ne_bytes()].concat());
                rule[112..114].copy_from_slice(&length.to_ne_bytes());
                rule
            });
            let mut hostile = table(&[standard(DROP)]);
            hostile.entries = entries.collect();
            hostile.info[INFO_CHAINS + 8..INFO_CHAINS + 12].copy_from_slice(&begin.to_ne_bytes());
            hostile.info[INFO_POLICIES + 8..INFO_POLICIES + 12].copy_from_slice(&end.to_ne_bytes());
            judged(&hostile);
            hostile.offsets = OFFSETS_V6;
            judged(&hostile);
        }
    }
}
