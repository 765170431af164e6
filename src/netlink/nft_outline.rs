//! Tables of others in outline: which chains and rules there are, where the rules lead and what their comments say. Enough
//! to tell what a former installation has left (`spec/dataplane.md` 25.1) and to remove it, and nothing else, by handles.
//!
//! A comment of `iptables-nft` is an expression of its own, a `match` of that name, one of the nft tool is user data.

use super::attr::{Attr, Attrs};
use super::nft::{self, GET_CHAIN, GET_RULE, HEADER, SUBSYSTEM, header, read_comment, word};
use super::socket::{Message, Request, Socket};
use super::{attr::Writer, family_byte};
use crate::error::Result;
use crate::model::net::Family;
use crate::model::nft::{Outline, Removal, RuleOutline};

const DEL_CHAIN: u16 = SUBSYSTEM | 5;
const DEL_RULE: u16 = SUBSYSTEM | 8;

/// The tables of these names, as far as there are any, and the generation of the rule set that they are of.
pub fn outlines(socket: &mut Socket, wanted: &[(Family, &str)]) -> Result<(u32, Vec<Outline>)> {
    let generation = nft::generation(socket)?;
    let mut found: Vec<Outline> = Vec::new();
    for family in [Family::V4, Family::V6] {
        let list = Request::new(GET_CHAIN, 0, header(family_byte(family), 0).to_vec(), "list chains".into());
        for (table, chain) in socket.dump(&list, |message: &Message<'_>| chain_name(message.body, family))? {
            if !wanted.contains(&(family, table.as_str())) {
                continue;
            }
            match found.iter_mut().find(|outline| outline.family == family && outline.table == table) {
                Some(outline) => outline.chains.push(chain),
                None => found.push(Outline { family, table, chains: vec![chain], rules: Vec::new() }),
            }
        }
    }
    for outline in &mut found {
        outline.rules = rules(socket, outline.family, &outline.table, None)?;
    }
    Ok((generation, found))
}

// The rules of a table or of one of its chains.
fn rules(socket: &mut Socket, family: Family, table: &str, chain: Option<&str>) -> Result<Vec<RuleOutline>> {
    let mut writer = Writer::new(&header(family_byte(family), 0));
    writer.text(1u16, table);
    if let Some(chain) = chain {
        writer.text(2u16, chain);
    }
    let list = Request::new(GET_RULE, 0, writer.finish(), format!("list rules of table {} {table}", word(family)));
    socket.dump(&list, |message: &Message<'_>| rule(message.body, family, table))
}

/// What removes the chain `chain` of a table with the rules of the chain `base` that lead to it, and the generation that this
/// is of; none if there is no such chain. Costs one small request where there is none.
pub fn chain(
    socket: &mut Socket,
    family: Family,
    table: &str,
    chain: &str,
    base: &str,
) -> Result<Option<(u32, Removal)>> {
    if !nft::has_chain(socket, family, table, chain)? {
        return Ok(None);
    }
    let generation = nft::generation(socket)?;
    // Kernels that do not filter by chain list all.
    let mut found = rules(socket, family, table, Some(base))?;
    found.retain(|rule| rule.chain == base && rule.leads_to.iter().any(|target| target == chain));
    let rules = found.into_iter().map(|rule| (rule.chain, rule.handle)).collect();
    let (table, chains) = (table.to_owned(), vec![chain.to_owned()]);
    Ok(Some((generation, Removal { family, table, rules, chains })))
}

/// Removes all this in one transaction, if the rule set is still that of `generation`: a handle may mean another rule in a
/// table that was made anew. Any refusal means that nothing was removed.
pub fn remove(socket: &mut Socket, removals: &[Removal], generation: u32) -> Result<()> {
    let mut requests = Vec::new();
    for removal in removals {
        let start = || {
            let mut writer = Writer::new(&header(family_byte(removal.family), 0));
            writer.text(1u16, &removal.table);
            writer
        };
        let mut push = |kind, verb: &str, chain: &str, writer: Writer| {
            let what = format!("{verb} {chain} of table {} {}", word(removal.family), removal.table);
            requests.push(Request::new(kind, 0, writer.finish(), what));
        };
        for (chain, handle) in &removal.rules {
            let mut writer = start();
            writer.text(2u16, chain);
            writer.u64_be(3u16, *handle);
            push(DEL_RULE, "delete a rule in chain", chain, writer);
        }
        // Chains may lead to each other: all are emptied before the first one goes.
        for chain in &removal.chains {
            let mut writer = start();
            writer.text(2u16, chain);
            push(DEL_RULE, "flush chain", chain, writer);
        }
        for chain in &removal.chains {
            let mut writer = start();
            writer.text(3u16, chain);
            push(DEL_CHAIN, "delete chain", chain, writer);
        }
    }
    if requests.is_empty() { Ok(()) } else { nft::transaction_at(socket, requests, generation, "commit the removal") }
}

fn chain_name(body: &[u8], family: Family) -> Option<(String, String)> {
    let attrs = Attrs::after(body, HEADER);
    let ours = *body.first()? == family_byte(family);
    ours.then_some((attrs.clone().find(1u16)?.text(), attrs.find(3u16)?.text()))
}

fn rule(body: &[u8], family: Family, table: &str) -> Option<RuleOutline> {
    let attrs = Attrs::after(body, HEADER);
    if *body.first()? != family_byte(family) || attrs.clone().find(1u16)?.text() != table {
        return None;
    }
    let (chain, handle) = (attrs.clone().find(2u16)?.text(), attrs.clone().find(3u16)?.u64_be()?);
    let mut outline = RuleOutline { chain, handle, ..RuleOutline::default() };
    for elem in attrs.clone().find(4u16).iter().flat_map(Attr::nested) {
        let Some(data) = elem.nested().find(2u16) else { continue };
        match elem.nested().find(1u16).map(|name| name.text()).as_deref() {
            Some("immediate") => outline.leads_to.extend(target(data.nested())),
            Some("match") if data.nested().find(1u16).is_some_and(|name| name.text() == "comment") => {
                outline.comment = data.nested().find(3u16).map(|info| info.text());
            }
            _ => {}
        }
    }
    if let Some(data) = attrs.find(7u16) {
        outline.comment = read_comment(&data).or(outline.comment);
    }
    Some(outline)
}

/// The chain of the verdict of an immediate expression. Only jump and goto name one.
fn target(immediate: Attrs<'_>) -> Option<String> {
    let verdict = immediate.find(2u16)?.nested().find(2u16)?;
    verdict.nested().find(2u16).map(|chain| chain.text())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hostile_bodies_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for family in [Family::V4, Family::V6] {
                chain_name(&bytes, family);
                rule(&bytes, family, "");
            }
        }
    }
}
