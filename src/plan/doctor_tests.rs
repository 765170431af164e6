use super::*;
use crate::plan::host::What;

#[test]
fn every_step_of_the_plan_has_its_texts() {
    for what in [
        What::PrimaryMtu,
        What::MarkRule,
        What::LocalRule,
        What::ServiceRule,
        What::EniMtu,
        What::EniLink,
        What::EniAddress,
        What::EniRoute,
        What::EniRule,
        What::ToPodRule,
        What::FromPodRule,
        What::BranchLink,
        What::BranchRoute,
        What::BranchRule,
        What::GatewayRule,
        What::PodRoute,
        What::PodLink,
        What::PodMac,
        What::PodMtu,
        What::GonePod,
        What::Sysctl,
        What::Ruleset,
    ] {
        let finding = Finding::new(what.name(), "", "");
        assert!(finding.mendable && !finding.breaks.is_empty(), "{}", what.name());
    }
    for name in ["imds-silent", "daemon-silent", "settings", "unknown", "pod-unseen", "stray-rule", "former-rules"] {
        assert!(!Finding::new(name, "", "").breaks.is_empty(), "{name}");
    }
    let names: Vec<_> = texts::names().collect();
    assert!(names.iter().all(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-' || b.is_ascii_digit())));
    assert_eq!(names.iter().collect::<Set<_>>().len(), names.len(), "none twice");
}

#[test]
fn what_the_instance_may_not_have_is_told_of_its_counters() {
    let facts = environment::Facts {
        counters: vec![
            ("eth0".into(), "bw_in_allowance_exceeded".into(), 0),
            ("eth0".into(), "conntrack_allowance_exceeded".into(), 7),
            ("eth0".into(), "conntrack_allowance_available".into(), 90),
            ("eth0".into(), "queue_0_tx_cnt".into(), 12),
        ],
        ..environment::Facts::default()
    };
    let settings = crate::model::settings::Settings::parse(|_| None).0;
    let found = environment::findings(None, &Observation::default(), &settings, &facts);
    let found: Vec<_> = found.iter().map(|finding| (finding.name, finding.seen.as_str())).collect();
    assert_eq!(found, [("allowance-exceeded", "eth0: conntrack_allowance_exceeded 7")]);
}
