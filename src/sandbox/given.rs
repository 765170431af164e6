//! What `--set` gives: which variables there are, what they choose beside the daemons, and what of them is not tried here.

use super::egress::Way;
use crate::error::{Error, Result};
use crate::model::order;
use crate::model::settings::{Mode, Settings};
use std::cmp::Reverse;

/// Names that are shown for one that there is not.
const NEAR: usize = 3;

/// The installer writes these into the list of plugins, or acts on them itself. Here there is no installer: the sandbox calls our
/// plugins alone, with a configuration that it makes.
const OF_INSTALLER: [&str; 9] = [
    "ENABLE_BANDWIDTH_PLUGIN",
    "DISABLE_POD_V6",
    "ENIBOX_CNI_VERSION",
    "HOST_CNI_BIN_PATH",
    "HOST_CNI_CONFDIR_PATH",
    "AWS_VPC_K8S_PLUGIN_LOG_LEVEL",
    "AWS_VPC_K8S_PLUGIN_LOG_FILE",
    "AWS_VPC_K8S_EGRESS_V4_PLUGIN_LOG_FILE",
    "AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE",
];

/// Variables and their values; of several of one name the last counts.
pub type Given = [(String, String)];

/// `VAR=VALUE` of a variable that there is.
pub fn parse(text: &str) -> std::result::Result<(String, String), String> {
    let Some((name, value)) = text.split_once('=').filter(|(name, _)| !name.is_empty()) else {
        return Err("not VAR=VALUE".into());
    };
    if Settings::docs().any(|doc| doc.variable == name) {
        return Ok((name.to_owned(), value.to_owned()));
    }
    let near = near(name);
    let near = if near.is_empty() { String::new() } else { format!("; near it: {}", near.join(", ")) };
    Err(format!("there is no setting {name}{near}"))
}

// Those that begin and end like this one for at least half of it or of them, the likest first.
fn near(name: &str) -> Vec<&'static str> {
    let wrong = name.to_ascii_uppercase();
    let alike = |name: &str| {
        let (mine, other) = (wrong.bytes(), name.bytes());
        let ends = mine.clone().rev().zip(other.clone().rev()).take_while(|(a, b)| a == b).count();
        let begins = mine.zip(other).take_while(|(a, b)| a == b).count();
        (begins + ends).min(name.len()).min(wrong.len())
    };
    let least = |name: &str| name.len().min(wrong.len()).div_ceil(2).max(3);
    let mut names = Settings::docs().map(|doc| doc.variable).collect::<Vec<_>>();
    names.retain(|name| alike(name) >= least(name));
    order::sort_by_key(&mut names, |name| (Reverse(alike(name)), name.len().abs_diff(wrong.len())));
    names.truncate(NEAR);
    names
}

fn is_given(given: &Given, variable: &str) -> bool {
    given.iter().any(|(name, _)| name == variable)
}

/// The settings.
pub fn settings(given: &Given) -> Settings {
    Settings::parse(|name| value(given, name)).0
}

fn value(given: &Given, variable: &str) -> Option<String> {
    given.iter().rev().find(|(name, _)| name == variable).map(|(_, value)| value.clone())
}

/// The family that pods reach through their node, if somebody said that they should: by default that is on in IPv6 clusters,
/// and pods are chained through `egress-cni` only where it was asked for.
pub fn egress(given: &Given, settings: &Settings, asked: Option<Way>) -> Result<Option<Way>> {
    let (way, on) = match settings.mode_wished() {
        Mode::Ipv6Prefixes => (Way::V4, settings.v4_egress),
        _ => (Way::V6, settings.v6_egress),
    };
    match asked {
        Some(asked) if asked != way => {
            Err(Error::new("--egress is for the other family: v4 with --family ipv6, v6 with ipv4"))
        }
        Some(_) if !on => Err(Error::new(format!("--egress needs {}, which is set to off", way.setting()))),
        _ => Ok((on && is_given(given, way.setting())).then_some(way)),
    }
}

/// What of the settings has no effect on a run, with the reason.
pub fn untried(given: &Given, settings: &Settings) -> Vec<String> {
    let mut untried = Vec::new();
    for variable in OF_INSTALLER.iter().filter(|variable| is_given(given, variable)) {
        untried.push(format!("{variable}: it is for the installer, and the sandbox calls the plugins without one"));
    }
    let (other, family) = match settings.mode_wished() {
        Mode::Ipv6Prefixes => (Way::V6, "IPv4"),
        _ => (Way::V4, "IPv6"),
    };
    if is_given(given, other.setting()) {
        untried.push(format!("{}: it is for clusters of {family}", other.setting()));
    }
    let (_, complaints) = Settings::parse(|name| value(given, name));
    untried.extend(complaints.iter().map(ToString::to_string));
    untried
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_there_is_not_is_refused_with_those_near_it() {
        fn check(text: &str, expected: &str) {
            let told = match parse(text) {
                Ok((name, value)) => format!("{name} is {value:?}"),
                Err(told) => told,
            };
            assert_eq!(told, expected, "{text}");
        }
        check("WARM_IP_TARGET=3", "WARM_IP_TARGET is \"3\"");
        check("WARM_IP_TARGET=", "WARM_IP_TARGET is \"\"");
        check("ADDITIONAL_ENI_TAGS={\"a\":\"b=c\"}", "ADDITIONAL_ENI_TAGS is \"{\\\"a\\\":\\\"b=c\\\"}\"");
        check("WARM_IP_TARGET", "not VAR=VALUE");
        check("=1", "not VAR=VALUE");
        check("NOSUCH=1", "there is no setting NOSUCH");
        check("WARM_IP_TARGETS=1", "there is no setting WARM_IP_TARGETS; near it: WARM_IP_TARGET");
        check(
            "WARM_TARGET=1",
            "there is no setting WARM_TARGET; near it: WARM_IP_TARGET, WARM_ENI_TARGET, WARM_PREFIX_TARGET",
        );
        for wrong in ["AWS_VPC_K8S_EXTERNALSNAT=1", "EXTERNALSNAT=1", "aws_vpc_k8s_cni_externalsnat=1"] {
            assert!(parse(wrong).unwrap_err().contains("near it: AWS_VPC_K8S_CNI_EXTERNALSNAT"), "{wrong}");
        }
    }

    fn given(texts: &[&str]) -> Vec<(String, String)> {
        texts.iter().map(|text| parse(text).unwrap()).collect()
    }

    #[test]
    fn the_settings_decide_on_the_egress_chain() {
        fn check(texts: &[&str], asked: Option<Way>, expected: std::result::Result<Option<Way>, &str>) {
            let given = given(texts);
            let way = egress(&given, &settings(&given), asked).map_err(|error| error.to_string());
            match (way, expected) {
                (Ok(way), Ok(expected)) => assert_eq!(way, expected, "{texts:?}"),
                (Err(told), Err(expected)) => assert!(told.contains(expected), "{texts:?}: {told}"),
                (way, expected) => panic!("{texts:?}: {way:?} instead of {expected:?}"),
            }
        }
        const V6: [&str; 2] = ["ENABLE_IPv6=true", "ENABLE_PREFIX_DELEGATION=true"];
        check(&[], None, Ok(None));
        check(&["ENABLE_V6_EGRESS=true"], None, Ok(Some(Way::V6)));
        check(&["ENABLE_V6_EGRESS=true", "ENABLE_V6_EGRESS=false"], None, Ok(None));
        check(&["ENABLE_V4_EGRESS=true"], None, Ok(None));
        check(&V6, None, Ok(None));
        check(&[V6[0], V6[1], "ENABLE_V4_EGRESS=true"], None, Ok(Some(Way::V4)));
        check(&[V6[0], V6[1], "ENABLE_V6_EGRESS=true"], None, Ok(None));
        check(&["ENABLE_V6_EGRESS=true"], Some(Way::V6), Ok(Some(Way::V6)));
        check(&["ENABLE_V6_EGRESS=false"], Some(Way::V6), Err("ENABLE_V6_EGRESS, which is set to off"));
        check(&["ENABLE_V4_EGRESS=true"], Some(Way::V4), Err("is for the other family"));
        check(&V6, Some(Way::V6), Err("is for the other family"));
    }

    #[test]
    fn what_has_no_effect_is_told() {
        fn check(text: &str, expected: &str) {
            let given = given(&[text]);
            let told = untried(&given, &settings(&given)).join("\n");
            assert!(told.contains(expected) && told.is_empty() == expected.is_empty(), "{text}: {told:?}");
        }
        check("WARM_IP_TARGET=3", "");
        check("ENABLE_BANDWIDTH_PLUGIN=true", "ENABLE_BANDWIDTH_PLUGIN: it is for the installer");
        check("ENABLE_V4_EGRESS=true", "ENABLE_V4_EGRESS: it is for clusters of IPv6");
        check("ENABLE_V6_EGRESS=true", "");
        check("ENABLE_POD_ENI=yes", "ENABLE_POD_ENI=\"yes\"");
        check("ENABLE_NFTABLES=true", "nf_tables is always used");
        assert!(OF_INSTALLER.iter().all(|name| parse(&format!("{name}=1")).is_ok()));
    }
}
