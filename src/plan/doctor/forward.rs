//! What drops packets that are to be forwarded: rules and policies of others (`spec/operations.md` 13.3). None of them is ours to change,
//! and a firewall may let pods pass before it drops the rest.

use super::environment::Facts;
use super::{Finding, Severity};
use crate::model::naming::VLAN_PREFIX;
use crate::model::net::Family;
use crate::model::nft::{AnyChain, Forward, Hook};
use crate::model::settings::Settings;

pub(super) fn barred(settings: &Settings, facts: &Facts, found: &mut Vec<Finding>) {
    // Names of pods' links, which the host's ends of their veths begin with.
    let strict = settings.pod_eni && settings.pod_security_groups_strict();
    let links = [Some(settings.veth_prefix.as_str()), strict.then_some(VLAN_PREFIX)];
    let links = links.into_iter().flatten().collect::<Vec<_>>();
    for AnyChain { family, table, name, forward, .. } in
        facts.chains.iter().filter(|chain| chain.hook == Some(Hook::Forward))
    {
        let pass = |link: &&str| {
            ["iifname", "oifname"]
                .map(|side| format!("nft insert rule {family} {table} {name} {side} '\"{link}*\"' accept"))
        };
        let remedies =
            Remedies { policy: format!("nft chain {family} {table} {name} '{{ policy accept; }}'"), pass: &pass };
        judge(&format!("chain {family} {table} {name}"), "drop", forward, &links, &remedies, found);
    }
    for (family, forward) in &facts.legacy_forward {
        let tool = if *family == Family::V6 { "ip6tables-legacy" } else { "iptables-legacy" };
        let pass = |link: &&str| ["-i", "-o"].map(|side| format!("{tool} -I FORWARD {side} {link}+ -j ACCEPT"));
        let remedies = Remedies { policy: format!("{tool} -P FORWARD ACCEPT"), pass: &pass };
        judge(&format!("{tool}: chain FORWARD of table filter"), "DROP", forward, &links, &remedies, found);
    }
}

/// Commands: one that sets the policy, and two that let pass what comes and goes by links of a name.
struct Remedies<'a> {
    policy: String,
    pass: &'a dyn Fn(&&str) -> [String; 2],
}

/// One chain. It fails pods if it holds nothing else; what rules before it let through is known only of links.
fn judge(
    chain: &str,
    drop: &str,
    forward: &Forward,
    links: &[&str],
    remedies: &Remedies<'_>,
    found: &mut Vec<Finding>,
) {
    let passes = |link: &&str| forward.links.iter().all(|names| names.iter().any(|name| covers(name, link)));
    let bars = forward.accepts == Some(false);
    let by_policy = forward.drops && forward.accepts.is_none();
    if !(by_policy || bars) || links.iter().all(passes) {
        return;
    }
    let what = if bars { "ends with a rule against everything".into() } else { format!("has policy {drop}") };
    let mut finding = Finding::new("forward-drop", "", format!("{chain} {what}"));
    if forward.spares {
        finding.severity = Severity::Warn;
        finding.breaks = "traffic between pods and to other nodes may be dropped";
        finding.seen.push_str("; whether a rule before lets all traffic of pods pass is not known");
    }
    let pass = links.iter().filter(|link| !passes(link)).flat_map(|link| (remedies.pass)(link)).collect::<Vec<_>>();
    let sole = by_policy && !forward.spares;
    found.push(finding.mended_by(if sole { remedies.policy.clone() } else { pass.join("; ") }));
}

/// Whether a name with `*` at its end, if any, is that of all links that begin so.
fn covers(name: &str, link: &str) -> bool {
    name.strip_suffix('*').is_some_and(|begin| link.starts_with(begin))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::doctor::environment::findings;
    use crate::plan::host::Observation;

    #[test]
    fn chains_that_drop_what_is_forwarded() {
        let check = |pod_eni: bool, forward: Forward, wanted: Option<(Severity, &str, &str)>| {
            let settings = Settings::parse(|name| (name == "ENABLE_POD_ENI" && pod_eni).then(|| "true".into())).0;
            let mut facts = Facts::default();
            let find = |facts: &Facts| {
                let found = findings(None, &Observation::default(), &settings, facts);
                let found = found.into_iter().filter(|finding| finding.name == "forward-drop");
                found.map(|finding| (finding.severity, finding.seen, finding.remedy)).collect::<Vec<_>>()
            };
            let [family, table, name] = ["inet", "fw", "fwd"].map(str::to_owned);
            facts.chains.push(AnyChain { family, table, name, hook: Some(Hook::Forward), forward: forward.clone() });
            let told = wanted.map(|(severity, seen, remedy)| (severity, seen.to_owned(), remedy.to_owned()));
            assert_eq!(find(&facts), told.into_iter().collect::<Vec<_>>(), "{forward:?}");
            facts.chains[0].hook = Some(Hook::Input);
            assert_eq!(find(&facts), []);
            facts.legacy_forward.push((Family::V6, forward));
            assert_eq!(
                find(&facts).iter().map(|found| found.0).collect::<Vec<_>>(),
                wanted.map_or(vec![], |told| vec![told.0])
            );
        };
        let none = Forward::default;
        let by = |coming: &[&str], leaving: &[&str]| Forward {
            spares: true,
            links: [coming, leaving].map(|names| names.iter().map(|name| (*name).to_owned()).collect()),
            ..none()
        };
        let (policy, bars) =
            ("chain inet fw fwd has policy drop", "chain inet fw fwd ends with a rule against everything");
        let [policy_maybe, bars_maybe] = [policy, bars]
            .map(|text| format!("{text}; whether a rule before lets all traffic of pods pass is not known"));
        let pass = |link: &str| {
            ["iifname", "oifname"]
                .map(|side| format!("nft insert rule inet fw fwd {side} '\"{link}*\"' accept"))
                .join("; ")
        };
        let (pods, both) = (pass("eni"), [pass("eni"), pass("vlan")].join("; "));
        let accept = "nft chain inet fw fwd '{ policy accept; }'";
        check(false, none(), None);
        check(false, Forward { spares: true, ..none() }, None);
        check(false, Forward { drops: true, ..none() }, Some((Severity::Fail, policy, accept)));
        check(false, Forward { accepts: Some(false), ..none() }, Some((Severity::Fail, bars, &pods)));
        check(false, Forward { drops: true, accepts: Some(false), ..none() }, Some((Severity::Fail, bars, &pods)));
        check(false, Forward { drops: true, spares: true, ..none() }, Some((Severity::Warn, &policy_maybe, &pods)));
        check(
            false,
            Forward { accepts: Some(false), spares: true, ..none() },
            Some((Severity::Warn, &bars_maybe, &pods)),
        );
        check(false, Forward { drops: true, accepts: Some(true), ..none() }, None);
        // What comes from pods and what goes to them.
        check(false, Forward { drops: true, ..by(&["eni*"], &["docker0", "eni*"]) }, None);
        check(false, Forward { accepts: Some(false), ..by(&["en*"], &["eni*"]) }, None);
        check(
            false,
            Forward { accepts: Some(false), ..by(&["eni*"], &[]) },
            Some((Severity::Warn, &bars_maybe, &pods)),
        );
        check(
            false,
            Forward { accepts: Some(false), ..by(&["eni"], &["eni0*"]) },
            Some((Severity::Warn, &bars_maybe, &pods)),
        );
        // Pods with branch ENIs have links of another name.
        check(true, Forward { accepts: Some(false), ..none() }, Some((Severity::Fail, bars, &both)));
        check(
            true,
            Forward { accepts: Some(false), ..by(&["eni*"], &["eni*"]) },
            Some((Severity::Warn, &bars_maybe, &pass("vlan"))),
        );
        check(true, Forward { accepts: Some(false), ..by(&["eni*", "vlan*"], &["vlan*", "eni*"]) }, None);
    }
}
