use super::*;
use crate::model::limits;
use proptest::prelude::*;

fn parse(pairs: &[(&str, &str)]) -> (Settings, Vec<Complaint>) {
    Settings::parse(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
}

#[test]
fn every_default_is_understood() {
    let set: Vec<(&str, &str)> = Settings::docs().map(|doc| (doc.variable, doc.default)).collect();
    let usual: Vec<(&str, &str)> = set.into_iter().filter(|(_, default)| !default.is_empty()).collect();
    let (settings, complaints) = parse(&usual);
    assert_eq!(complaints, vec![]);
    assert_eq!(settings, Settings::default());
}

#[test]
fn no_variable_is_named_twice() {
    let mut seen = crate::model::map::Set::new();
    for doc in Settings::docs() {
        assert!(seen.insert(doc.variable), "{}", doc.variable);
        assert!(doc.help.ends_with('.'), "{}: {:?}", doc.variable, doc.help);
    }
    assert_eq!(Settings::docs().filter(|doc| doc.not_yet).count(), NOT_YET.len(), "one of NOT_YET is in no row");
}

#[test]
fn defaults() {
    let settings = Settings::default();
    assert!(settings.enable_ipv4 && !settings.enable_ipv6);
    assert_eq!((settings.warm_eni_target, settings.warm_ip_target, settings.minimum_ip_target), (1, 0, 0));
    assert_eq!((settings.max_eni, settings.ip_cooldown_s, settings.http_timeout_s), (None, 30, 10));
    assert_eq!((settings.eni_mtu, settings.pod_mtu, settings.connmark), (9001, 9001, 0x80));
    assert_eq!((settings.veth_prefix.as_str(), settings.snat_ports), ("eni", SnatPorts::FullyRandom));
    assert!(settings.subnet_discovery && settings.manage_untagged_eni && settings.node_port && settings.v4_egress);
    assert_eq!(settings.backing_store, "/var/run/aws-node/ipam.json");
    assert_eq!(settings.network_policy_mode, None);
    assert!(settings.inherited.get("AWS_REGION").is_none());
    assert_eq!(settings.check(), Ok(()));
}

/// One variable: its text, the effective value, and whether it is complained of (`f` for fatal).
#[test]
fn texts() {
    #[track_caller]
    fn check(variable: &str, text: &str, effective: Option<&str>, complaint: &str) {
        let (settings, complaints) = parse(&[(variable, text)]);
        let line = settings.effective().find(|line| line.variable == variable);
        assert_eq!(line.and_then(|line| line.value).as_deref(), effective, "{variable}={text:?}");
        let got: String = complaints.iter().map(|c| if c.fatal { 'f' } else { 'c' }).collect();
        assert_eq!(got, complaint, "{variable}={text:?}: {complaints:?}");
        assert!(complaints.iter().all(|c| c.variable == variable));
    }
    let booleans =
        [("1", true), ("t", true), ("T", true), ("TRUE", true), ("true", true), ("True", true), ("tRuE", true)];
    for (text, value) in booleans.into_iter().chain([("0", false), ("f", false), ("FALSE", false), (" false\n", false)])
    {
        check("ENABLE_SUBNET_DISCOVERY", text, Some(&value.to_string()), "");
    }
    check("ENABLE_SUBNET_DISCOVERY", "", Some("true"), "");
    check("ENABLE_SUBNET_DISCOVERY", "no", Some("true"), "c");
    check("ENABLE_POD_ENI", "yes", Some("false"), "c");
    check("WARM_ENI_TARGET", "0", Some("0"), "");
    check("WARM_ENI_TARGET", "+3", Some("3"), "");
    check("WARM_ENI_TARGET", "-1", Some("1"), "c");
    check("WARM_ENI_TARGET", "two", Some("1"), "c");
    check("WARM_ENI_TARGET", "1_0", Some("1"), "c");
    check("WARM_IP_TARGET", "99999999999999999999", Some("1000000"), "c");
    check("WARM_IP_TARGET", "-99999999999999999999", Some("0"), "c");
    check("WARM_IP_TARGET", " 5 ", Some("5"), "");
    check("MAX_ENI", "4", Some("4"), "");
    check("MAX_ENI", "0", None, "");
    check("MAX_ENI", "-1", None, "");
    check("MAX_ENI", "x", None, "c");
    check("HTTP_TIMEOUT", "9", Some("10"), "c");
    check("HTTP_TIMEOUT", "60", Some("60"), "");
    check("IP_COOLDOWN_PERIOD", "0", Some("0"), "");
    check("IP_COOLDOWN_PERIOD", "-1", Some("30"), "f");
    check("IP_COOLDOWN_PERIOD", "", Some("30"), "f");
    check("AWS_VPC_ENI_MTU", "575", Some("9001"), "f");
    check("AWS_VPC_ENI_MTU", "9002", Some("9001"), "f");
    check("AWS_VPC_ENI_MTU", "576", Some("576"), "");
    check("POD_MTU", "1500", Some("1500"), "");
    check("AWS_VPC_K8S_CNI_CONNMARK", "0200", Some("0x80"), "");
    check("AWS_VPC_K8S_CNI_CONNMARK", "256", Some("0x100"), "");
    check("AWS_VPC_K8S_CNI_CONNMARK", "0X4_00", Some("0x400"), "");
    check("AWS_VPC_K8S_CNI_CONNMARK", "0b100", Some("0x4"), "");
    for bad in ["0", "-1", "0x100000000", "0x", "++1", "08", "mark"] {
        check("AWS_VPC_K8S_CNI_CONNMARK", bad, Some("0x80"), "c");
    }
    check("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "hashrandom", Some("hashrandom"), "");
    check("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "none", Some("none"), "");
    check("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "PRNG", Some("prng"), "c");
    check(
        "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS",
        "10.1.2.3/16, 10.0.0.0/8,10.0.0.0/8",
        Some("10.1.0.0/16,10.0.0.0/8,10.0.0.0/8"),
        "",
    );
    check("AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS", "10.0.0.0/33,::/0,,1.2.3.0/24", Some("1.2.3.0/24"), "ccc");
    check("AWS_EXTERNAL_SERVICE_CIDRS", "", None, "");
    check("ENIBOX_KEEP_HOST_SOURCE", "", Some("false"), "");
    check("ENIBOX_KEEP_HOST_SOURCE", "1", Some("true"), "");
    check("ADDITIONAL_ENI_TAGS", r#"{"a":"1","b":"2"}"#, Some(r#"{"a":"1","b":"2"}"#), "");
    check("ADDITIONAL_ENI_TAGS", r#"{"a":1,"b":"2"}"#, Some("{}"), "c");
    check("ADDITIONAL_ENI_TAGS", r#"{"node.k8s.amazonaws.com/x":"1","b":"2"}"#, Some(r#"{"b":"2"}"#), "c");
    check("AWS_VPC_K8S_CNI_VETHPREFIX", "", Some("eni"), "");
    check("AWS_VPC_K8S_PLUGIN_LOG_FILE", "", Some(""), "");
    check("NETWORK_POLICY_ENFORCING_MODE", "Strict", Some("Strict"), "");
    check("NETWORK_POLICY_ENFORCING_MODE", "", Some(""), "");
    check("CLUSTER_NAME", "", None, "");
    check("AWS_SECRET_ACCESS_KEY", "s3cret", Some("(set, not shown)"), "");
    check("HTTPS_PROXY", "http://me:pass@proxy:3128", Some("http://(hidden)@proxy:3128"), "");
    check("ENABLE_NFTABLES", "true", None, "c");
    check("AWS_PROFILE", "dev", None, "c");
}

#[test]
fn a_family_is_chosen_or_ipv4_is() {
    #[track_caller]
    fn check(pairs: &[(&str, &str)], expected: (bool, bool)) {
        let (settings, _) = parse(pairs);
        assert_eq!((settings.enable_ipv4, settings.enable_ipv6), expected, "{pairs:?}");
    }
    check(&[], (true, false));
    check(&[("ENABLE_IPv4", "")], (true, false));
    check(&[("ENABLE_IPv4", "yes")], (true, false));
    check(&[("ENABLE_IPv4", "true")], (true, false));
    check(&[("ENABLE_IPv6", "true")], (false, true));
    check(&[("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "true")], (false, true));
    check(&[("ENABLE_IPv4", "true"), ("ENABLE_IPv6", "true")], (true, true));
    check(&[("ENABLE_IPv4", "false")], (false, false));
    check(&[("ENABLE_IPv6", "false")], (true, false));
}

#[test]
fn the_pod_mtu_follows_the_eni_mtu() {
    assert_eq!(parse(&[("AWS_VPC_ENI_MTU", "1500")]).0.pod_mtu, 1500);
    assert_eq!(parse(&[("AWS_VPC_ENI_MTU", "1500"), ("POD_MTU", "1400")]).0.pod_mtu, 1400);
}

#[test]
fn combinations_that_stop_the_start() {
    #[track_caller]
    fn check(pairs: &[(&str, &str)], expected: &str) {
        let got = parse(pairs).0.check();
        match expected {
            "" => assert_eq!(got, Ok(()), "{pairs:?}"),
            part => assert!(got.as_ref().is_err_and(|what| what.contains(part)), "{pairs:?}: {got:?}"),
        }
    }
    const PD: (&str, &str) = ("ENABLE_PREFIX_DELEGATION", "true");
    const V6: (&str, &str) = ("ENABLE_IPv6", "true");
    check(&[V6, ("ENABLE_IPv4", "true")], "exclude each other");
    check(&[("ENABLE_IPv4", "false")], "must be true");
    check(&[V6], "needs ENABLE_PREFIX_DELEGATION");
    check(&[V6, PD], "");
    check(&[V6, PD, ("AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG", "true")], "CUSTOM_NETWORK_CFG");
    check(&[V6, PD, ("AWS_VPC_ENI_MTU", "1279")], "1280");
    check(&[V6, PD, ("POD_MTU", "1279")], "POD_MTU");
    check(&[("AWS_VPC_ENI_MTU", "1279")], "");
    check(&[PD], "above 0");
    check(&[PD, ("WARM_PREFIX_TARGET", "abc")], "above 0");
    check(&[PD, ("WARM_PREFIX_TARGET", "+3")], "");
    check(&[PD, ("MINIMUM_IP_TARGET", "1")], "");
    check(&[("AWS_VPC_K8S_PLUGIN_LOG_FILE", "STDOUT")], "PLUGIN_LOG_FILE");
    check(&[("AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE", "stdout")], "EGRESS_V6");
    check(&[("AWS_VPC_K8S_CNI_VETHPREFIX", "enix")], "");
    check(&[("AWS_VPC_K8S_CNI_VETHPREFIX", "enixx")], "4 bytes");
    check(&[("AWS_VPC_K8S_CNI_VETHPREFIX", "vlan")], "vlan");
    check(&[("ENABLE_POD_ENI", "true"), ("POD_SECURITY_GROUP_ENFORCING_MODE", "Strict")], "strict or standard");
    check(&[("POD_SECURITY_GROUP_ENFORCING_MODE", "Strict")], "");
    check(&[("NETWORK_POLICY_ENFORCING_MODE", "STANDARD")], "");
    check(&[("NETWORK_POLICY_ENFORCING_MODE", "")], "none, strict or standard");
    check(&[("NETWORK_POLICY_ENFORCING_MODE", "on")], "none, strict or standard");
}

#[test]
fn the_instance_has_a_say() {
    #[track_caller]
    fn check(pairs: &[(&str, &str)], instance: &str, expected: Result<(Mode, &[u32], usize), &str>) {
        let limits = limits::of(instance).unwrap_or_else(|| panic!("{instance} is unknown"));
        match (parse(pairs).0.validate(&limits), expected) {
            (Ok(valid), Ok((mode, enis, warnings))) => {
                assert_eq!((valid.mode, &valid.enis_per_card[..], valid.warnings.len()), (mode, enis, warnings));
            }
            (Err(what), Err(part)) if what.contains(part) => {}
            (got, expected) => panic!("{pairs:?} on {instance}: {got:?} instead of {expected:?}"),
        }
    }
    let prefixes = [("ENABLE_PREFIX_DELEGATION", "true"), ("WARM_PREFIX_TARGET", "1")];
    let ipv6 = [("ENABLE_PREFIX_DELEGATION", "true"), ("ENABLE_IPv6", "true")];
    check(&[], "m5.large", Ok((Mode::Ipv4Addresses, &[3], 0)));
    check(&[("MAX_ENI", "2")], "m5.large", Ok((Mode::Ipv4Addresses, &[2], 0)));
    check(&[("MAX_ENI", "9")], "c6in.32xlarge", Ok((Mode::Ipv4Addresses, &[8, 8], 0)));
    check(&prefixes, "m5.large", Ok((Mode::Ipv4Prefixes, &[3], 0)));
    check(&prefixes, "m4.large", Ok((Mode::Ipv4Addresses, &[2], 1)));
    check(&prefixes, "c5.metal", Ok((Mode::Ipv4Prefixes, &[15], 0)));
    check(&ipv6, "m5.large", Ok((Mode::Ipv6Prefixes, &[3], 0)));
    check(&ipv6, "m4.large", Err("Nitro"));
    check(&[("ENABLE_IPv4", "false")], "m5.large", Err("must be true"));
    let both = [("AWS_VPC_K8S_CNI_VETHPREFIX", "ens"), ("ENABLE_BANDWIDTH_PLUGIN", "true")];
    for (mode, warnings) in [("strict", 2), ("Standard", 2), ("None", 0)] {
        let pairs = [&both[..], &[("NETWORK_POLICY_ENFORCING_MODE", mode)]].concat();
        check(&pairs, "m5.large", Ok((Mode::Ipv4Addresses, &[3], warnings)));
    }
    check(&both, "m5.large", Ok((Mode::Ipv4Addresses, &[3], 0)));
}

#[test]
fn secrets_stay_inside() {
    let (settings, complaints) = parse(&[("AWS_SECRET_ACCESS_KEY", "s3cret"), ("HTTPS_PROXY", "http://u:s3cret@h:1")]);
    assert_eq!(settings.inherited.get("AWS_SECRET_ACCESS_KEY"), Some("s3cret"));
    let lines: Vec<String> = settings.effective().map(|line| line.to_string()).collect();
    for text in [format!("{settings:?}"), lines.join("\n"), format!("{complaints:?}")] {
        assert!(!text.contains("s3cret"), "{text}");
    }
}

proptest! {
    /// What is printed as effective means the same when it is set, whatever had been set at first.
    #[test]
    fn the_effective_configuration_is_stable(values in proptest::collection::btree_map(0..60_usize, "[ 0-9a-zA-Z/:,{}\"+-]{0,12}|true|false|-?[0-9]{1,20}|10\\.[0-9]{1,3}\\.0\\.0/[0-9]{1,2}", 0..12)) {
        let names: Vec<&str> = Settings::docs().filter(|doc| !doc.group.contains("SDK")).map(|doc| doc.variable).collect();
        let (settings, complaints) = Settings::parse(|name| {
            values.iter().find(|(index, _)| names.get(**index) == Some(&name)).map(|(_, value)| value.clone())
        });
        prop_assert!(complaints.iter().all(|complaint| complaint.value.len() <= COMPLAINT_BYTES_MAX));
        let lines: Map<&str, String> =
            settings.effective().filter_map(|line| Some((line.variable, line.value?))).collect();
        let (again, complaints) = Settings::parse(|name| lines.get(name).cloned());
        prop_assert_eq!(&again, &settings);
        prop_assert_eq!(complaints, vec![]);
    }
}
