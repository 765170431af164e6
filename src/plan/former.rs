//! What an installation of the original leaves in tables that are not ours (`spec/dataplane.md` 25): what of it may be
//! removed, and what only an operator can.

use super::egress;
use crate::model::map::Set;
use crate::model::naming::NFT_TABLE;
use crate::model::net::Family;
use crate::model::nft::{Outline, Removal, RuleOutline, Table};
use crate::model::order::Gather as _;

/// Tables of `iptables-nft` that it writes to.
pub const TABLES: [(Family, &str); 5] =
    [(Family::V4, "nat"), (Family::V4, "mangle"), (Family::V4, "filter"), (Family::V6, "nat"), (Family::V6, "filter")];

/// Chains of its SNAT and connmark rules, nested ones of old versions too.
const CHAINS: [&str; 2] = ["AWS-SNAT-CHAIN-", "AWS-CONNMARK-CHAIN-"];
/// Chains of pods with an address of the other family, and the comment of every rule in them.
const EGRESS_CHAINS: [&str; 2] = ["CNI-E4-", "CNI-E6-"];
const EGRESS_COMMENT: &str = "name: \"aws-cni\" id: ";

/// Rules that stand in chains of others: table, chain, comment.
const RULES: [(&str, &str, &str); 5] = [
    ("nat", "PREROUTING", "AWS, CONNMARK"),
    ("nat", "PREROUTING", "AWS, outbound connections"),
    ("mangle", "PREROUTING", "AWS, primary ENI"),
    ("filter", "FORWARD", "Block Node Local Pod access via IPv4"),
    ("filter", "FORWARD", "Block Node Local Pod access via IPv6"),
];

/// What is to be removed from tables of others, now that `ours` do the same. Pods that were given an address of the other
/// family keep their chains until our own rules translate it.
pub fn leftovers(found: &[Outline], ours: &[Table]) -> Vec<Removal> {
    let removals = found.iter().map(|outline| {
        let translated = ours.iter().any(|table| {
            table.family == outline.family && table.chains.iter().any(|chain| chain.name == egress::SNAT_CHAIN)
        });
        let mut chains = outline.chains.clone();
        chains.retain(|chain| {
            outline.table == "nat"
                && (CHAINS.iter().any(|prefix| chain.starts_with(prefix))
                    || (translated && egress_chain(chain, &outline.rules)))
        });
        let gone = chains.iter().gather::<Set<_>>();
        let listed = |rule: &RuleOutline| {
            RULES.iter().any(|(table, chain, comment)| {
                outline.table == *table && rule.chain == *chain && rule.comment.as_deref() == Some(*comment)
            })
        };
        let rules = outline.rules.iter().filter(|rule| !gone.contains(&rule.chain));
        let rules = rules.filter(|rule| listed(rule) || rule.leads_to.iter().any(|chain| gone.contains(chain)));
        let rules = rules.map(|rule| (rule.chain.clone(), rule.handle)).collect();
        Removal { family: outline.family, table: outline.table.clone(), rules, chains }
    });
    removals.filter(|removal| !removal.rules.is_empty() || !removal.chains.is_empty()).collect()
}

fn egress_chain(chain: &str, rules: &[RuleOutline]) -> bool {
    let named = EGRESS_CHAINS.iter().filter_map(|prefix| chain.strip_prefix(prefix));
    let digits = |rest: &str| rest.len() == 21 && rest.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut inside = rules.iter().filter(|rule| rule.chain == chain).peekable();
    named.into_iter().any(digits)
        && inside.peek().is_some()
        && inside.all(|rule| rule.comment.as_deref().is_some_and(|comment| comment.starts_with(EGRESS_COMMENT)))
}

/// What a removal does, for logs.
pub fn text(removal: &Removal) -> String {
    let family = if removal.family == Family::V4 { "ip" } else { "ip6" };
    let rules = removal.rules.iter().map(|(chain, _)| chain.as_str()).gather::<Set<_>>();
    let list = |names: Vec<&str>| if names.is_empty() { "none".to_owned() } else { names.join(" ") };
    format!(
        "table {family} {}: chains {}; {} rules of chains {}",
        removal.table,
        list(removal.chains.iter().map(String::as_str).collect()),
        removal.rules.len(),
        list(rules.into_iter().collect())
    )
}

/// Of the chains of `iptables-legacy`, those of a former installation.
pub fn legacy_chains(mut chains: Vec<String>) -> Vec<String> {
    chains.retain(|chain| chain.starts_with("AWS-"));
    chains
}

/// The commands that take a former installation out of `iptables-legacy`, in order, on a node with this prefix of host
/// veths, this mark, this name of the primary ENI's link, and these chains.
pub fn legacy_commands(prefix: &str, mark: u32, primary: &str, chains: &[String]) -> Vec<String> {
    let (nat, mangle) = ("iptables-legacy -t nat", "iptables-legacy -t mangle");
    let here = |name: &str| chains.iter().any(|chain| chain == name);
    let mut commands = Vec::new();
    if here("AWS-SNAT-CHAIN-0") {
        commands.push(format!("{nat} -D POSTROUTING -m comment --comment \"AWS SNAT CHAIN\" -j AWS-SNAT-CHAIN-0"));
    }
    if here("AWS-CONNMARK-CHAIN-0") {
        // Old versions look at new connections alone.
        let outbound = format!("{nat} -D PREROUTING -i {prefix}+ -m comment --comment \"AWS, outbound connections\"");
        let leads = "-j AWS-CONNMARK-CHAIN-0";
        commands.push(format!("{outbound} -m state --state NEW {leads} 2> /dev/null || {outbound} {leads}"));
        commands.push(format!(
            "{nat} -D PREROUTING -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --restore-mark --mask {mark:#x}"
        ));
    }
    // Chains of old versions lead to each other: all are emptied before the first one goes.
    commands.extend(chains.iter().map(|chain| format!("{nat} -F {chain}")));
    commands.extend(chains.iter().map(|chain| format!("{nat} -X {chain}")));
    let primary_eni = "-m comment --comment \"AWS, primary ENI\"";
    commands.push(format!(
        "{mangle} -D PREROUTING -i {primary} {primary_eni} -m addrtype --dst-type LOCAL --limit-iface-in -j CONNMARK \
         --set-xmark {mark:#x}/{mark:#x}"
    ));
    for from in [prefix, "vlan"] {
        commands.push(format!(
            "{mangle} -D PREROUTING -i {from}+ {primary_eni} -j CONNMARK --restore-mark --mask {mark:#x}"
        ));
    }
    commands
}

/// What an operator should know about rules in `iptables-legacy`, as one text of several lines.
pub fn legacy_warning(commands: &[String]) -> String {
    format!(
        "rules of a former installation are in iptables-legacy. They do no harm now, but are never updated: a new CIDR of the \
         VPC is still translated by them, and AWS_VPC_K8S_CNI_EXTERNALSNAT=true does not take effect. They go with a reboot, \
         or with these commands (the table {NFT_TABLE} of nf_tables does their work):\n  {}",
        commands.join("\n  ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::nft::Chain;

    fn rule(chain: &str, handle: u64, leads_to: &str, comment: &str) -> RuleOutline {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        RuleOutline {
            chain: chain.into(),
            handle,
            leads_to: some(leads_to).into_iter().collect(),
            comment: some(comment),
        }
    }

    fn check(table: &str, rules: &[RuleOutline], ours: &[Table], expected: Option<(&[u64], &[&str])>) {
        let chains = rules.iter().map(|rule| rule.chain.clone()).collect::<Set<_>>().into_iter().collect();
        let outline = Outline { family: Family::V4, table: table.into(), chains, rules: rules.to_vec() };
        let found = leftovers(&[outline], ours);
        let found = found.first().map(|removal| {
            (removal.rules.iter().map(|(_, handle)| *handle).collect::<Vec<_>>(), removal.chains.clone())
        });
        let expected =
            expected.map(|(rules, chains)| (rules.to_vec(), chains.iter().map(ToString::to_string).collect()));
        assert_eq!(found, expected, "{table} {rules:?}");
    }

    #[test]
    fn only_what_is_certain_goes() {
        let snat = rule("POSTROUTING", 7, "AWS-SNAT-CHAIN-0", "AWS SNAT CHAIN");
        let inside = rule("AWS-SNAT-CHAIN-0", 8, "AWS-SNAT-CHAIN-1", "");
        let nested = rule("AWS-SNAT-CHAIN-1", 9, "", "");
        let kube = rule("POSTROUTING", 6, "KUBE-POSTROUTING", "kubernetes postrouting rules");
        let both: &[&str] = &["AWS-SNAT-CHAIN-0", "AWS-SNAT-CHAIN-1"];
        check("nat", &[kube.clone(), snat, inside, nested], &[], Some((&[7], both)));
        check("nat", &[kube], &[], None);
        check("nat", &[rule("PREROUTING", 3, "", "AWS, CONNMARK")], &[], Some((&[3], &[])));
        check("nat", &[rule("PREROUTING", 3, "", "AWS, CONNMARK of mine")], &[], None);
        check("mangle", &[rule("PREROUTING", 4, "", "AWS, primary ENI")], &[], Some((&[4], &[])));
        check("mangle", &[rule("OUTPUT", 4, "", "AWS, primary ENI")], &[], None);
        check("filter", &[rule("AWS-SNAT-CHAIN-0", 4, "", "")], &[], None);
        let block = rule("FORWARD", 5, "", "Block Node Local Pod access via IPv4");
        check("filter", &[block], &[], Some((&[5], &[])));
    }

    #[test]
    fn chains_of_pods_go_when_our_rules_do_their_work() {
        let chain = "CNI-E4-5740307710ebfd5fb24f5";
        let name = "name: \"aws-cni\" id: \"containerId-123\"";
        let rules = [rule(chain, 1, "", name), rule("POSTROUTING", 2, chain, name)];
        let egress = Chain { name: "egress-postrouting".into(), base: None, rules: Vec::new() };
        let ours = Table { family: Family::V4, name: NFT_TABLE.into(), comment: None, chains: vec![egress] };
        check("nat", &rules, &[], None);
        check("nat", &rules, std::slice::from_ref(&ours), Some((&[2], &[chain])));
        check("nat", &[rule(chain, 1, "", "of another plugin")], std::slice::from_ref(&ours), None);
        check("nat", &[rule("CNI-E4-short", 1, "", name)], &[ours], None);
    }
}
