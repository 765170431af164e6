//! Where the services of AWS are: partitions, dual-stack and FIPS names, overrides by environment (`spec/aws.md` 6.2);
//! and how long and how often they are asked (2).

use std::time::Duration;

/// Most attempts that may be asked for.
const ATTEMPTS_LIMIT: u32 = 20;
/// Longest time-out of an attempt that may be asked for, in seconds.
const TIMEOUT_LIMIT_S: u64 = 3600;

/// Suffixes by partition: prefix of the region, suffix, dual-stack suffix. The first match counts, so that longer
/// prefixes stand first; the last one is for every region that is not named.
const PARTITIONS: [(&str, &str, &str); 8] = [
    ("us-gov-", "amazonaws.com", "api.aws"),
    ("us-isof-", "csp.hci.ic.gov", "api.aws.hci.ic.gov"),
    ("us-isob-", "sc2s.sgov.gov", "api.aws.scloud"),
    ("us-iso-", "c2s.ic.gov", "api.aws.ic.gov"),
    ("eu-isoe-", "cloud.adc-e.uk", "api.cloud-aws.adc-e.uk"),
    ("eusc-", "amazonaws.eu", "api.amazonwebservices.eu"),
    ("cn-", "amazonaws.com.cn", "api.amazonwebservices.com.cn"),
    ("", "amazonaws.com", "api.aws"),
];

/// Which of a service's names is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Variant {
    /// The name that has IPv6 addresses too.
    pub dual_stack: bool,
    /// The name with FIPS-validated cryptography.
    pub fips: bool,
}

/// A boolean as Go's `strconv.ParseBool` reads it (`spec/aws.md` 2); anything else is the default, and logged.
pub(super) fn flag(lookup: &impl Fn(&str) -> Option<String>, name: &str, default: bool) -> bool {
    match lookup(name).as_deref() {
        None | Some("") => default,
        Some("1" | "t" | "T" | "TRUE" | "true" | "True") => true,
        Some("0" | "f" | "F" | "FALSE" | "false" | "False") => false,
        Some(other) => {
            log::warn!("{name}: {other:?} is no boolean, taking {default}");
            default
        }
    }
}

fn number(lookup: &impl Fn(&str) -> Option<String>, name: &str) -> Option<u64> {
    lookup(name)?.trim().parse().ok()
}

/// Limit of one HTTP attempt, body included: `HTTP_TIMEOUT`, at least and usually 10 s.
pub(super) fn http_timeout(lookup: &impl Fn(&str) -> Option<String>) -> Duration {
    Duration::from_secs(number(lookup, "HTTP_TIMEOUT").unwrap_or(0).clamp(10, TIMEOUT_LIMIT_S))
}

/// Attempts per call, the first included: `AWS_MAX_ATTEMPTS`, usually 3.
pub(super) fn max_attempts(lookup: &impl Fn(&str) -> Option<String>) -> u32 {
    let asked = number(lookup, "AWS_MAX_ATTEMPTS").filter(|n| *n > 0).unwrap_or(3);
    u32::try_from(asked).map_or(ATTEMPTS_LIMIT, |n| n.min(ATTEMPTS_LIMIT))
}

/// The URL of a service (`ec2`, `sts`) in a region.
pub fn url(service: &str, region: &str, variant: Variant) -> String {
    let (prefix, plain, dual) =
        PARTITIONS.into_iter().find(|(prefix, ..)| region.starts_with(prefix)).unwrap_or(PARTITIONS[7]);
    let suffix = if variant.dual_stack { dual } else { plain };
    // GovCloud's plain names are the validated ones.
    let fips = if variant.fips && (prefix != "us-gov-" || variant.dual_stack) { "-fips" } else { "" };
    format!("https://{service}{fips}.{region}.{suffix}")
}

/// The URL of a service by the environment: `own` (if there is such a variable), then `AWS_ENDPOINT_URL_<SERVICE>` and
/// `AWS_ENDPOINT_URL` unless these are to be ignored, then the computed one.
pub fn from_env(lookup: &impl Fn(&str) -> Option<String>, service: &str, own: Option<&str>, region: &str) -> String {
    let set = |name: &str| lookup(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
    if let Some(url) = own.and_then(set) {
        return url;
    }
    if !flag(lookup, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", false) {
        let specific = format!("AWS_ENDPOINT_URL_{}", service.to_ascii_uppercase());
        if let Some(url) = set(&specific).or_else(|| set("AWS_ENDPOINT_URL")) {
            return url;
        }
    }
    let variant = Variant {
        dual_stack: flag(lookup, "AWS_USE_DUALSTACK_ENDPOINT", false),
        fips: flag(lookup, "AWS_USE_FIPS_ENDPOINT", false),
    };
    url(service, region, variant)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_partition_has_its_names() {
        let check = |service, region, dual_stack, fips, expected: &str| {
            assert_eq!(url(service, region, Variant { dual_stack, fips }), expected);
        };
        check("ec2", "eu-west-1", false, false, "https://ec2.eu-west-1.amazonaws.com");
        check("sts", "mx-central-1", false, false, "https://sts.mx-central-1.amazonaws.com");
        check("ec2", "xx-new-1", false, false, "https://ec2.xx-new-1.amazonaws.com");
        check("ec2", "eu-west-1", true, false, "https://ec2.eu-west-1.api.aws");
        check("ec2", "us-east-1", false, true, "https://ec2-fips.us-east-1.amazonaws.com");
        check("sts", "us-east-1", true, true, "https://sts-fips.us-east-1.api.aws");
        check("ec2", "cn-north-1", false, false, "https://ec2.cn-north-1.amazonaws.com.cn");
        check("ec2", "cn-north-1", true, false, "https://ec2.cn-north-1.api.amazonwebservices.com.cn");
        check("ec2", "us-gov-west-1", false, true, "https://ec2.us-gov-west-1.amazonaws.com");
        check("ec2", "us-gov-west-1", true, true, "https://ec2-fips.us-gov-west-1.api.aws");
        check("ec2", "us-iso-east-1", false, false, "https://ec2.us-iso-east-1.c2s.ic.gov");
        check("ec2", "us-isob-east-1", true, false, "https://ec2.us-isob-east-1.api.aws.scloud");
        check("ec2", "us-isof-south-1", false, false, "https://ec2.us-isof-south-1.csp.hci.ic.gov");
        check("ec2", "eu-isoe-west-1", false, false, "https://ec2.eu-isoe-west-1.cloud.adc-e.uk");
        check("ec2", "eusc-de-east-1", false, false, "https://ec2.eusc-de-east-1.amazonaws.eu");
    }

    #[test]
    fn overrides_have_an_order() {
        let check = |variables: &[(&str, &str)], expected: &str| {
            let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
            assert_eq!(from_env(&lookup, "ec2", Some("AWS_EC2_ENDPOINT"), "eu-west-1"), expected);
        };
        check(&[], "https://ec2.eu-west-1.amazonaws.com");
        check(&[("AWS_ENDPOINT_URL", "http://all:1")], "http://all:1");
        check(&[("AWS_ENDPOINT_URL", "http://all:1"), ("AWS_ENDPOINT_URL_EC2", "http://ec2:2")], "http://ec2:2");
        let three =
            [("AWS_EC2_ENDPOINT", "http://own:3"), ("AWS_ENDPOINT_URL_EC2", "x"), ("AWS_ENDPOINT_URL", "http://all:1")];
        check(&three, "http://own:3");
        let ignore = ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true");
        check(&[("AWS_ENDPOINT_URL", "http://all:1"), ignore], "https://ec2.eu-west-1.amazonaws.com");
        check(&[("AWS_EC2_ENDPOINT", "http://own:3"), ignore], "http://own:3");
        check(&[("AWS_USE_DUALSTACK_ENDPOINT", "T")], "https://ec2.eu-west-1.api.aws");
        check(&[("AWS_USE_DUALSTACK_ENDPOINT", "yes")], "https://ec2.eu-west-1.amazonaws.com");
    }
}
