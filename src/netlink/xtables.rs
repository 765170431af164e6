//! Tables of `iptables-legacy`: which chains a table has, and whether it drops what is forwarded. Read only: such a table can be replaced but as a whole, racing with
//! everybody else who does (`spec/dataplane.md` 25.2; structures from `linux/netfilter_ipv4/ip_tables.h`).

use crate::error::{Context, Error, Result};
use crate::model::net::Family;
use crate::sys;

/// IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES, the same for IPv6.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
/// Size of `struct ipt_getinfo`, and where the size of all entries stands in it.
const INFO: usize = 84;
const INFO_SIZE: usize = 80;
/// Where it has the hooks that the table is called at, a bit each, and for each hook where the entry of its policy begins.
const INFO_HOOKS: usize = 32;
const INFO_POLICIES: usize = 56;
/// NF_INET_FORWARD.
const FORWARD: usize = 2;
/// The verdict of a policy that drops: NF_DROP, turned negative as all of them are.
const DROP: i32 = -1;
/// Where the entries begin in `struct ipt_get_entries`.
const ENTRIES: usize = 40;
/// XT_TABLE_MAXNAMELEN.
const NAME: usize = 32;
/// Where `struct ipt_entry` has the offset of the target, and behind it that of the next entry; in `struct ip6t_entry`
/// (`linux/netfilter_ipv6/ip6_tables.h`) the selectors before it are longer.
const OFFSETS: usize = 88;
const OFFSETS_V6: usize = 140;
/// A larger table is not looked at: the kernel gives it out only in one piece.
const BYTES_MAX: usize = 32 << 20;

/// Names of the user's chains in a table, in the calling thread's namespace. None if nobody uses the table.
pub fn chains(family: Family, table: &str) -> Result<Vec<String>> {
    let table = read(family, table)?;
    Ok(table.map(|table| chain_names(&table.entries, table.offsets)).unwrap_or_default())
}

/// Whether the policy of chain FORWARD of table `filter` drops, in the calling thread's namespace.
pub fn forward_drops(family: Family) -> Result<bool> {
    Ok(read(family, "filter")?.is_some_and(|table| drops(&table)))
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

fn drops(table: &Raw) -> bool {
    let policy = || {
        let hooks = word(&table.info, INFO_HOOKS)?;
        let at = word(&table.info, INFO_POLICIES + 4 * FORWARD).filter(|_| hooks >> FORWARD & 1 == 1)?;
        let entry = table.entries.get(usize::try_from(at).ok()?..)?;
        // Behind the target's head, which names none: the standard target.
        word(entry, half(entry, table.offsets)? + 32).map(u32::cast_signed)
    };
    policy() == Some(DROP)
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

    #[test]
    fn the_policy_of_forward_is_read() {
        let mut info = vec![0; INFO];
        info[INFO_HOOKS..INFO_HOOKS + 4].copy_from_slice(&0b1110u32.to_ne_bytes());
        info[INFO_POLICIES + 8..INFO_POLICIES + 12].copy_from_slice(&176u32.to_ne_bytes());
        for (verdict, expected) in [(-1i32, true), (-2, false)] {
            let mut policy = entry("", "");
            policy[144..148].copy_from_slice(&verdict.to_ne_bytes());
            let entries = [entry("", ""), policy].concat();
            let mut table = Raw { info: info.clone(), entries, offsets: OFFSETS };
            assert_eq!(drops(&table), expected);
            table.entries.truncate(200);
            assert!(!drops(&table), "cut off");
            table.info[INFO_HOOKS] = 0;
            assert!(!drops(&table), "not called when packets are forwarded");
        }
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
            drops(&Raw { info: bytes.clone(), entries: bytes, offsets: OFFSETS });
        }
    }
}
