//! The configuration of `egress-cni` (`spec/egress.md` 1, 7.1), of every release that has had the plugin.
//!
//! What only ADD needs is kept as a result of its own, so that DEL goes on whatever is wrong with it.

use super::Output;
use super::config::{Envelope, prev_result, string};
use ipnet::IpNet;
use serde_json::{Map, Value};
use std::net::IpAddr;

/// `ipam.type` of the allocation that we do ourselves.
pub const HOST_LOCAL: &str = "host-local";
/// Where host-local keeps its files when nothing is configured.
const DATA_DIR: &str = "/var/lib/cni/networks";

/// The configuration of the egress plugin.
#[derive(Clone, Debug)]
pub struct EgressConfig {
    /// Whether ADD does anything.
    pub enabled: bool,
    /// MTU of the veth in bytes, or why there is none.
    pub mtu: Result<u32, String>,
    /// The node's address that the pods are seen as; its family is that of the egress. None: absent or no address.
    pub node_ip: Option<IpAddr>,
    /// Where addresses come from.
    pub ipam: Ipam,
    /// `pluginLogFile`; empty or `stderr` means standard error.
    pub log_file: String,
    /// `pluginLogLevel`.
    pub log_level: String,
    /// What the plugins before this one made, or why it cannot be understood.
    pub prev_result: Result<Option<Output>, String>,
}

/// The part `ipam`.
#[derive(Clone, Debug)]
pub struct Ipam {
    /// `host-local`, or the name of a plugin that is to be executed; empty without the part.
    pub kind: String,
    /// Directory of host-local's networks.
    pub data_dir: String,
    /// The addresses that may be given, or what is wrong with them.
    pub range: Result<Range, String>,
    /// Routes of the pod: destination, and next hop if it is not the gateway.
    pub routes: Vec<(IpNet, Option<IpAddr>)>,
}

/// Addresses of one subnet. All four fields are of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The subnet.
    pub subnet: IpNet,
    /// First address that may be given.
    pub first: IpAddr,
    /// Last address that may be given.
    pub last: IpAddr,
    /// The gateway, which is never given.
    pub gateway: IpAddr,
}

impl EgressConfig {
    /// Reads our fields; unknown ones are ignored, and so is `randomizeSNAT`: the rules are the daemon's.
    pub fn from_envelope(envelope: &Envelope) -> Result<EgressConfig, String> {
        let fields = &envelope.fields;
        let text = |key| string(fields, key).map(Option::unwrap_or_default);
        let enabled = match fields.get("enabled") {
            Some(Value::Bool(enabled)) => *enabled,
            _ => text("enabled")? == "true",
        };
        Ok(EgressConfig {
            enabled,
            mtu: mtu(fields.get("mtu")),
            node_ip: text("nodeIP")?.parse().ok(),
            ipam: ipam(fields.get("ipam"))?,
            log_file: text("pluginLogFile")?.to_owned(),
            log_level: text("pluginLogLevel")?.to_owned(),
            prev_result: prev_result(fields, envelope.version),
        })
    }
}

/// A decimal string, or the JSON number that releases up to 1.11 wrote. The text of the error is that of Go's `Atoi`.
fn mtu(value: Option<&Value>) -> Result<u32, String> {
    let text = match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    text.parse().map_err(|_| format!("strconv.Atoi: parsing {text:?}: invalid syntax"))
}

fn ipam(value: Option<&Value>) -> Result<Ipam, String> {
    let none = Map::new();
    let (fields, missing) = match value {
        None | Some(Value::Null) => (&none, true),
        Some(Value::Object(fields)) => (fields, false),
        Some(_) => return Err("field ipam must be an object".to_owned()),
    };
    let range = if missing { Err("IPAM config missing 'ipam' key".to_owned()) } else { range(fields) };
    let data_dir = string(fields, "dataDir")?.filter(|text| !text.is_empty()).unwrap_or(DATA_DIR);
    Ok(Ipam {
        kind: string(fields, "type")?.unwrap_or_default().to_owned(),
        data_dir: data_dir.to_owned(),
        range,
        routes: routes(fields.get("routes"))?,
    })
}

fn routes(value: Option<&Value>) -> Result<Vec<(IpNet, Option<IpAddr>)>, String> {
    let wrong = || "field ipam.routes must be a list of destinations".to_owned();
    let mut routes = Vec::new();
    for route in value.and_then(Value::as_array).map_or(&[][..], Vec::as_slice) {
        let text = |key| route.get(key).and_then(Value::as_str);
        let dst = text("dst").and_then(|dst| dst.parse().ok()).ok_or_else(wrong)?;
        let gateway = text("gw").filter(|gateway| !gateway.is_empty());
        routes.push((dst, gateway.map(|gateway| gateway.parse().map_err(|_| wrong())).transpose()?));
    }
    Ok(routes)
}

/// One range: `ranges` with one set of one subnet, as every shipped configuration has it, or a subnet beside `type`.
fn range(fields: &Map<String, Value>) -> Result<Range, String> {
    let sets = fields.get("ranges").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let fields = match sets {
        [] if fields.contains_key("subnet") => fields,
        [] => return Err("no IP ranges specified".to_owned()),
        [set] => match set.as_array().map(Vec::as_slice) {
            Some([Value::Object(range)]) => range,
            _ => return Err("a range set must have exactly one range".to_owned()),
        },
        more => {
            return Err(format!(
                "IPAM plugin is expected to return 1 IP address, not one of each of {} range sets",
                more.len()
            ));
        }
    };
    let text = string(fields, "subnet")?.unwrap_or_default();
    let subnet: IpNet = text.parse().map_err(|_| format!("subnet {text:?} is no CIDR"))?;
    if subnet.trunc() != subnet {
        return Err(format!(
            "Network has host bits set. For a subnet mask of length {} the network address is {}",
            subnet.prefix_len(),
            subnet.network()
        ));
    }
    if subnet.prefix_len() == 0 {
        return Err(format!("Network {subnet} is everything"));
    }
    if subnet.prefix_len() > subnet.max_prefix_len() - 2 {
        return Err(format!("Network {subnet} too small to allocate from"));
    }
    let second = address(number(subnet.network()) + 1, subnet);
    // An IPv4 broadcast address is nobody's.
    let last = number(subnet.broadcast()) - u128::from(subnet.addr().is_ipv4());
    let one = |key, default: IpAddr| match string(fields, key)?.filter(|text| !text.is_empty()) {
        None => Ok(default),
        Some(text) => text
            .parse()
            .ok()
            .filter(|address| subnet.contains(address))
            .ok_or_else(|| format!("{key} {text:?} is not in network {subnet}")),
    };
    let (first, last) = (one("rangeStart", second)?, one("rangeEnd", address(last, subnet))?);
    Ok(Range { subnet, first, last, gateway: one("gateway", second)? })
}

/// An address as a number.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// A number as an address of the family of `like`.
fn address(number: u128, like: IpNet) -> IpAddr {
    match like {
        // Numbers come from addresses of that family and their neighbours inside a subnet.
        IpNet::V4(_) => u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes().into(),
        IpNet::V6(_) => number.to_be_bytes().into(),
    }
}

impl Range {
    /// Whether an address may be given, the gateway apart.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.subnet.contains(&address) && self.first <= address && address <= self.last
    }

    /// Every address in the order in which they are given: those after `last_given` if that one is of this range, round
    /// to it again, without the gateway.
    pub fn after(&self, last_given: Option<IpAddr>) -> impl Iterator<Item = IpAddr> + use<> {
        let (range, first, last) = (*self, number(self.first), number(self.last));
        let count = last.checked_sub(first).map_or(0, |more| more.saturating_add(1));
        let start = last_given.filter(|given| range.contains(*given)).map_or(0, |given| number(given) - first + 1);
        (0..count)
            .map(move |step| address(first + start.wrapping_add(step) % count, range.subnet))
            .filter(move |a| *a != range.gateway)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn config(fields: &Value) -> Result<EgressConfig, String> {
        let mut all = json!({"cniVersion": "0.4.0", "name": "aws-cni", "type": "egress-cni"});
        for (key, value) in fields.as_object().unwrap() {
            all[key] = value.clone();
        }
        EgressConfig::from_envelope(&Envelope::parse(all.to_string().as_bytes()).unwrap())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn every_generation_of_the_configuration_is_read() {
        let ranges = json!({"type": "host-local", "ranges": [[{"subnet": "169.254.172.0/22"}]],
            "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "/run/cni/v6pd/egress-v4-ipam"});
        for mtu in [json!("9001"), json!(9001)] {
            let config = config(&json!({"mtu": mtu, "enabled": "true", "nodeIP": "10.0.0.5", "ipam": ranges})).unwrap();
            assert!(config.enabled && config.mtu == Ok(9001) && config.node_ip == Some(ip("10.0.0.5")));
            let wanted = Range {
                subnet: "169.254.172.0/22".parse().unwrap(),
                first: ip("169.254.172.1"),
                last: ip("169.254.175.254"),
                gateway: ip("169.254.172.1"),
            };
            assert_eq!(config.ipam.range, Ok(wanted));
            assert_eq!(config.ipam.routes, [("0.0.0.0/0".parse().unwrap(), None)]);
        }
        let sparse = config(&json!({"enabled": "True", "nodeIP": ""})).unwrap();
        assert!(!sparse.enabled && sparse.node_ip.is_none());
        assert_eq!(sparse.mtu.unwrap_err(), "strconv.Atoi: parsing \"\": invalid syntax");
        assert_eq!(sparse.ipam.range.unwrap_err(), "IPAM config missing 'ipam' key");
        assert_eq!(sparse.ipam.data_dir, "/var/lib/cni/networks");
    }

    #[test]
    fn ranges_are_normalised_as_host_local_does() {
        let check = |ipam: Value, wanted: Result<(&str, &str, &str), &str>| {
            let range = config(&json!({"ipam": ipam})).unwrap().ipam.range;
            let wanted = wanted.map(|(first, last, gateway)| (ip(first), ip(last), ip(gateway)));
            match (range.map(|range| (range.first, range.last, range.gateway)), wanted) {
                (Err(text), Err(part)) => assert!(text.contains(part), "{text}"),
                (got, wanted) => assert_eq!(got.ok(), wanted.ok(), "{ipam}"),
            }
        };
        let one = |range: Value| json!({"ranges": [[range]]});
        check(one(json!({"subnet": "fd00::ac:00/118"})), Ok(("fd00::ac:1", "fd00::ac:3ff", "fd00::ac:1")));
        check(json!({"subnet": "10.0.0.0/30"}), Ok(("10.0.0.1", "10.0.0.2", "10.0.0.1")));
        let narrow = json!({"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9", "rangeEnd": "10.0.0.12", "gateway": "10.0.0.254"});
        check(one(narrow), Ok(("10.0.0.9", "10.0.0.12", "10.0.0.254")));
        check(one(json!({"subnet": "10.0.0.0/31"})), Err("too small"));
        check(one(json!({"subnet": "::/0"})), Err("everything"));
        let end = json!({"subnet": "8000::/1", "rangeStart": "8000::"});
        check(one(end), Ok(("8000::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "8000::1")));
        check(one(json!({"subnet": "10.0.0.1/24"})), Err("host bits"));
        check(one(json!({"subnet": "10.0.0.0/24", "rangeStart": "10.0.1.1"})), Err("not in network"));
        check(one(json!({"subnet": "ten"})), Err("no CIDR"));
        check(json!({}), Err("no IP ranges"));
        check(json!({"ranges": [[]]}), Err("exactly one range"));
        check(json!({"ranges": [[{}], [{}]]}), Err("expected to return 1 IP address"));
    }

    #[test]
    fn addresses_come_round() {
        let range = config(&json!({"ipam": {"subnet": "10.0.0.0/29"}})).unwrap().ipam.range.unwrap();
        let check = |last: Option<&str>, wanted: &[u8]| {
            let got: Vec<u8> = range
                .after(last.map(ip))
                .map(|address| match address {
                    IpAddr::V4(address) => address.octets()[3],
                    IpAddr::V6(_) => 0,
                })
                .collect();
            assert_eq!(got, wanted, "{last:?}");
        };
        check(None, &[2, 3, 4, 5, 6]);
        check(Some("10.0.0.4"), &[5, 6, 2, 3, 4]);
        check(Some("10.0.0.6"), &[2, 3, 4, 5, 6]);
        check(Some("10.0.0.7"), &[2, 3, 4, 5, 6]);
        check(Some("fd00::ac:4"), &[2, 3, 4, 5, 6]);
        let half =
            config(&json!({"ipam": {"subnet": "8000::/1", "rangeStart": "8000::"}})).unwrap().ipam.range.unwrap();
        assert_eq!(half.after(Some(half.last)).next(), Some(ip("8000::")));
        let none = json!({"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9", "rangeEnd": "10.0.0.8"});
        assert_eq!(config(&json!({"ipam": none})).unwrap().ipam.range.unwrap().after(None).next(), None);
        let v6 = config(&json!({"ipam": {"subnet": "fd00::ac:0/118"}})).unwrap().ipam.range.unwrap();
        assert_eq!(v6.after(None).count(), 1022);
        assert_eq!(v6.after(Some(ip("fd00::ac:3ff"))).next(), Some(ip("fd00::ac:2")));
    }

    proptest! {
        #[test]
        fn no_range_panics(subnet in "[0-9a-f:.]{1,12}/[0-9]{1,3}", start in "[0-9a-f:.]{0,12}", end in "[0-9a-f:.]{0,12}") {
            let read = config(&json!({"ipam": {"subnet": subnet, "rangeStart": start, "rangeEnd": end}})).unwrap();
            if let Ok(range) = read.ipam.range {
                range.after(Some(range.last)).take(5).count();
            }
        }
    }
}
