//! Tables of `iptables-legacy`: which chains a table has. Read only: such a table can be replaced but as a whole, racing with
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

/// Names of the user's chains in a table, in the calling thread's namespace. None if nobody uses the table: opening it would
/// make it, with its hooks.
pub fn chains(family: Family, table: &str) -> Result<Vec<String>> {
    let v6 = family == Family::V6;
    let (names, level, offsets) = if v6 {
        ("/proc/thread-self/net/ip6_tables_names", libc::IPPROTO_IPV6, OFFSETS_V6)
    } else {
        ("/proc/thread-self/net/ip_tables_names", libc::IPPROTO_IP, OFFSETS)
    };
    // The tables that somebody has opened, a line each. Without the file the kernel has no such tables at all.
    let names = std::fs::read_to_string(names).unwrap_or_default();
    if !names.lines().any(|name| name == table) {
        return Ok(Vec::new());
    }
    let what = || format!("read table {table} of iptables-legacy");
    let socket = sys::raw_socket(v6).with_context(what)?;
    let mut buffer = name_field(table, INFO);
    let length = sys::get_option(&socket, level, GET_INFO, &mut buffer).with_context(what)?;
    let size = buffer.get(..length).and_then(|info| word(info, INFO_SIZE)).and_then(|size| usize::try_from(size).ok());
    let size = size.filter(|size| *size <= BYTES_MAX).ok_or_else(|| Error::new("it is too large").context(what()))?;
    let mut buffer = name_field(table, ENTRIES + size);
    buffer[NAME..NAME + 4].copy_from_slice(&u32::try_from(size)?.to_ne_bytes());
    let length = sys::get_option(&socket, level, GET_ENTRIES, &mut buffer).with_context(what)?;
    Ok(chain_names(buffer.get(ENTRIES..length).unwrap_or_default(), offsets))
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

    proptest! {
        #[test]
        fn hostile_tables_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), next in 0u16..300) {
            let mut bytes = bytes;
            if bytes.len() > 92 {
                bytes[OFFSETS + 2..OFFSETS + 4].copy_from_slice(&next.to_ne_bytes());
            }
            chain_names(&bytes, OFFSETS);
            chain_names(&bytes, OFFSETS_V6);
        }
    }
}
