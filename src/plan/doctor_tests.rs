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
