//! Results of ADD in the shape of each version, and `prevResult` back from them (`spec/plugin.md` 12; CNI specification,
//! "Success").
//!
//! One type holds what the newest version can say. Writing it for an older version leaves out what that version has no
//! place for; reading accepts exactly the family of the configuration's version, as the Go library does.

use super::{Shape, Version};
use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::net::IpAddr;

/// What a chain of plugins made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Interfaces, those of the host included.
    pub interfaces: Vec<Interface>,
    /// Addresses.
    pub ips: Vec<IpConfig>,
    /// Routes.
    pub routes: Vec<Route>,
    /// Name servers.
    pub dns: Dns,
}

/// An interface that was made. `aws-cni` keeps its own data in `mac` and `sandbox` (`spec/plugin.md` 12).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interface {
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Hardware address.
    #[serde(deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// MTU; 0 when not told. From 1.1.0 on.
    #[serde(deserialize_with = "nullable", skip_serializing_if = "is_zero")]
    pub mtu: u32,
    /// Path of the network namespace; empty for the host's.
    #[serde(deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// Path of a socket. From 1.1.0 on.
    #[serde(rename = "socketPath", deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    /// PCI address. From 1.1.0 on.
    #[serde(rename = "pciID", deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub pci_id: String,
}

/// An address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpConfig {
    /// Index into the interfaces; foreign results may hold nonsense.
    pub interface: Option<i64>,
    /// Address with its prefix length.
    pub address: IpNet,
    /// Gateway.
    pub gateway: Option<IpAddr>,
}

/// A route in the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Next hop; in 0.1.0 and 0.2.0 its absence stands for the address's gateway.
    #[serde(default, deserialize_with = "empty_is_none", skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// MTU of the path. This and what follows from 1.1.0 on.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "is_zero")]
    pub mtu: u32,
    /// Largest segment to advertise.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "is_zero")]
    pub advmss: u32,
    /// Metric.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "is_zero")]
    pub priority: u32,
    /// Routing table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    /// Scope, a number of the kernel's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u32>,
}

/// Name servers for the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of the servers.
    #[serde(deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// Local domain.
    #[serde(deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search list.
    #[serde(deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

// The shapes on the wire. Field order is that of the Go library, so that results compare as text.

#[derive(Serialize, Deserialize)]
struct WireSingle {
    #[serde(rename = "cniVersion", default)]
    cni_version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ip4: Option<WireSingleIp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ip6: Option<WireSingleIp>,
    #[serde(default, deserialize_with = "nullable")]
    dns: Dns,
}

#[derive(Serialize, Deserialize)]
struct WireSingleIp {
    ip: IpNet,
    #[serde(default, deserialize_with = "empty_is_none", skip_serializing_if = "Option::is_none")]
    gateway: Option<IpAddr>,
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    routes: Vec<Route>,
}

#[derive(Serialize, Deserialize)]
struct WireLists {
    #[serde(rename = "cniVersion", default)]
    cni_version: String,
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    interfaces: Vec<Interface>,
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    ips: Vec<WireIp>,
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    routes: Vec<Route>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dns: Option<Dns>,
}

#[derive(Serialize, Deserialize)]
struct WireIp {
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    interface: Option<i64>,
    address: IpNet,
    #[serde(default, deserialize_with = "empty_is_none", skip_serializing_if = "Option::is_none")]
    gateway: Option<IpAddr>,
}

/// null counts as absent, as in Go.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// An address; null and the empty text stand for none, as in Go.
fn empty_is_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    let text: Option<String> = Option::deserialize(deserializer)?;
    match text.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Output {
    /// Reads a `prevResult` that came with a configuration of `version`. It must be of the same family; one that names no
    /// version takes the configuration's. The error is a short reason.
    pub fn parse(value: &Value, version: Version) -> Result<Output, String> {
        let own = match value.get("cniVersion") {
            None | Some(Value::Null) => version,
            Some(Value::String(text)) if text.is_empty() => version,
            Some(Value::String(text)) => Version::parse(text).ok_or_else(|| format!("unknown version {text:?}"))?,
            Some(_) => return Err("field cniVersion must be a string".to_owned()),
        };
        if own.shape() != version.shape() {
            return Err(format!("version {own} cannot be used with a configuration of version {version}"));
        }
        match own.shape() {
            Shape::Single => decode::<WireSingle>(value).map(from_single),
            Shape::Tagged | Shape::Plain => decode::<WireLists>(value).map(from_lists),
        }
    }

    /// The document for standard output in the shape of `version`: four spaces of indentation, no final newline.
    pub fn to_json(&self, version: Version) -> String {
        match version.shape() {
            Shape::Single => indent(&self.to_single(version)),
            Shape::Tagged | Shape::Plain => indent(&self.to_lists(version)),
        }
    }

    /// Adds what earlier plugins of the chain made behind our own, so that our entries keep their places.
    pub fn append(&mut self, earlier: Output) {
        let shift = i64::try_from(self.interfaces.len()).unwrap_or(0);
        self.interfaces.extend(earlier.interfaces);
        self.ips.extend(
            earlier
                .ips
                .into_iter()
                .map(|ip| IpConfig { interface: ip.interface.map(|index| index.saturating_add(shift)), ..ip }),
        );
        self.routes.extend(earlier.routes);
        if self.dns == Dns::default() {
            self.dns = earlier.dns;
        }
    }

    /// The interface that an address belongs to.
    pub fn interface_of(&self, ip: &IpConfig) -> Option<&Interface> {
        self.interfaces.get(usize::try_from(ip.interface?).ok()?)
    }

    fn to_single(&self, version: Version) -> WireSingle {
        let of_family = |v4: bool| {
            self.ips.iter().find(|ip| ip.address.addr().is_ipv4() == v4).map(|ip| WireSingleIp {
                ip: ip.address,
                gateway: ip.gateway,
                routes: self.routes.iter().filter(|r| r.dst.addr().is_ipv4() == v4).map(Route::basic).collect(),
            })
        };
        WireSingle {
            cni_version: version.as_str().to_owned(),
            ip4: of_family(true),
            ip6: of_family(false),
            dns: self.dns.clone(),
        }
    }

    fn to_lists(&self, version: Version) -> WireLists {
        let tagged = version.shape() == Shape::Tagged;
        let full = version >= Version::V1_1_0;
        WireLists {
            cni_version: version.as_str().to_owned(),
            interfaces: self.interfaces.iter().map(|i| if full { i.clone() } else { i.basic() }).collect(),
            ips: self
                .ips
                .iter()
                .map(|ip| WireIp {
                    version: match ip.address {
                        _ if !tagged => String::new(),
                        IpNet::V4(_) => "4".to_owned(),
                        IpNet::V6(_) => "6".to_owned(),
                    },
                    interface: ip.interface,
                    address: ip.address,
                    gateway: ip.gateway,
                })
                .collect(),
            routes: self.routes.iter().map(|r| if full { r.clone() } else { r.basic() }).collect(),
            dns: Some(self.dns.clone()).filter(|dns| tagged || *dns != Dns::default()),
        }
    }
}

impl Interface {
    /// Without what only 1.1.0 has a place for.
    fn basic(&self) -> Interface {
        Interface { mtu: 0, socket_path: String::new(), pci_id: String::new(), ..self.clone() }
    }
}

impl Route {
    /// A route with nothing but a destination and perhaps a next hop.
    pub fn new(dst: IpNet, gw: Option<IpAddr>) -> Route {
        Route { dst, gw, mtu: 0, advmss: 0, priority: 0, table: None, scope: None }
    }

    /// Without what only 1.1.0 has a place for.
    fn basic(&self) -> Route {
        Route::new(self.dst, self.gw)
    }
}

fn decode<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    T::deserialize(value).map_err(|error| error.to_string())
}

fn from_single(wire: WireSingle) -> Output {
    let mut output = Output { dns: wire.dns, ..Output::default() };
    for ip in [wire.ip4, wire.ip6].into_iter().flatten() {
        output.ips.push(IpConfig { interface: None, address: ip.ip, gateway: ip.gateway });
        output.routes.extend(ip.routes.into_iter().map(|route| Route { gw: route.gw.or(ip.gateway), ..route }));
    }
    output
}

fn from_lists(wire: WireLists) -> Output {
    let ips = wire.ips.into_iter();
    Output {
        interfaces: wire.interfaces,
        ips: ips.map(|ip| IpConfig { interface: ip.interface, address: ip.address, gateway: ip.gateway }).collect(),
        routes: wire.routes,
        dns: wire.dns.unwrap_or_default(),
    }
}

/// JSON with four spaces of indentation.
pub(super) fn indent(document: &impl Serialize) -> String {
    let mut bytes = Vec::with_capacity(512);
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let written = document.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter));
    // Our documents have string keys and finite numbers only, which is all that could make serialisation fail.
    debug_assert!(written.is_ok());
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn interface(name: &str, mac: &str, sandbox: &str) -> Interface {
        Interface { name: name.into(), mac: mac.into(), sandbox: sandbox.into(), ..Interface::default() }
    }

    /// The first sample of `spec/plugin.md` 12.
    fn sample() -> Output {
        Output {
            interfaces: vec![
                interface("enicc21c2d7785", "", ""),
                interface("eth0", "3", "/var/run/netns/cni-5a1f"),
                interface("dummycc21c2d7785", "0", "2"),
            ],
            ips: vec![IpConfig { interface: Some(1), address: net("10.0.12.34/32"), gateway: None }],
            ..Output::default()
        }
    }

    #[test]
    fn golden_per_version() {
        let interfaces = r#"
    "interfaces": [
        {
            "name": "enicc21c2d7785"
        },
        {
            "name": "eth0",
            "mac": "3",
            "sandbox": "/var/run/netns/cni-5a1f"
        },
        {
            "name": "dummycc21c2d7785",
            "mac": "0",
            "sandbox": "2"
        }
    ],"#;
        let check = |version: Version, wanted: &str| assert_eq!(sample().to_json(version), wanted, "{version}");
        for version in [Version::V0_1_0, Version::V0_2_0] {
            let wanted = format!(
                "{{\n    \"cniVersion\": \"{version}\",\n    \"ip4\": {{\n        \"ip\": \"10.0.12.34/32\"\n    }},\n    \
                 \"dns\": {{}}\n}}"
            );
            check(version, &wanted);
        }
        for version in [Version::V0_3_0, Version::V0_3_1, Version::V0_4_0] {
            let wanted = format!(
                "{{\n    \"cniVersion\": \"{version}\",{interfaces}\n    \"ips\": [\n        {{\n            \"version\": \"4\",\n            \
                 \"interface\": 1,\n            \"address\": \"10.0.12.34/32\"\n        }}\n    ],\n    \"dns\": {{}}\n}}"
            );
            check(version, &wanted);
        }
        for version in [Version::V1_0_0, Version::V1_1_0] {
            let wanted = format!(
                "{{\n    \"cniVersion\": \"{version}\",{interfaces}\n    \"ips\": [\n        {{\n            \
                 \"interface\": 1,\n            \"address\": \"10.0.12.34/32\"\n        }}\n    ]\n}}"
            );
            check(version, &wanted);
        }
    }

    #[test]
    fn a_cached_result_of_a_whole_chain_is_understood() {
        let text = r#"{"cniVersion":"0.4.0","interfaces":[{"name":"eni1","mac":null},{"name":"eth0","sandbox":"/x","extra":1}],
            "ips":[{"version":"4","address":"10.0.0.5/32","gateway":"","interface":1}],
            "routes":[{"dst":"0.0.0.0/0","gw":null}],"dns":null,"unknown":{}}"#;
        let output = Output::parse(&serde_json::from_str(text).unwrap(), Version::V0_4_0).unwrap();
        assert_eq!(output.interface_of(&output.ips[0]).unwrap().sandbox, "/x");
        assert_eq!(output.routes, [Route::new(net("0.0.0.0/0"), None)]);
    }

    #[test]
    fn nonsense_indices_point_nowhere() {
        for interface in [None, Some(-1), Some(3), Some(i64::MAX), Some(i64::MIN)] {
            let ip = IpConfig { interface, address: net("10.0.0.1/32"), gateway: None };
            assert!(sample().interface_of(&ip).is_none(), "{interface:?}");
        }
    }

    #[test]
    fn appended_results_keep_their_indices() {
        let mut output = sample();
        output.append(sample());
        assert_eq!(output.ips.iter().map(|ip| ip.interface).collect::<Vec<_>>(), [Some(1), Some(4)]);
        assert_eq!(output.interface_of(&output.ips[1]).unwrap().name, "eth0");
    }

    fn any_ip() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
    }

    fn any_net() -> impl Strategy<Value = IpNet> {
        (any_ip(), 0..=128u8)
            .prop_map(|(ip, length)| IpNet::new(ip, if ip.is_ipv4() { length % 33 } else { length }).unwrap())
    }

    fn any_output() -> impl Strategy<Value = Output> {
        let text = "[a-z0-9:/.\"\\\\ é]{0,8}";
        let interface =
            (text, text, any::<u32>(), text, text, text).prop_map(|(name, mac, mtu, sandbox, socket_path, pci_id)| {
                Interface { name, mac, mtu, sandbox, socket_path, pci_id }
            });
        let ip = (prop::option::of(any::<i64>()), any_net(), prop::option::of(any_ip()))
            .prop_map(|(interface, address, gateway)| IpConfig { interface, address, gateway });
        let numbers = (any::<u32>(), any::<u32>(), any::<u32>());
        let route = (
            any_net(),
            prop::option::of(any_ip()),
            numbers,
            prop::option::of(any::<u32>()),
            prop::option::of(0..256u32),
        )
            .prop_map(|(dst, gw, (mtu, advmss, priority), table, scope)| Route {
                dst,
                gw,
                mtu,
                advmss,
                priority,
                table,
                scope,
            });
        let list = || prop::collection::vec("[a-z0-9.]{1,8}", 0..3);
        let dns = (list(), "[a-z]{0,5}", list(), list()).prop_map(|(nameservers, domain, search, options)| Dns {
            nameservers,
            domain,
            search,
            options,
        });
        let many = 0..4usize;
        (
            prop::collection::vec(interface, many.clone()),
            prop::collection::vec(ip, many.clone()),
            prop::collection::vec(route, many),
            dns,
        )
            .prop_map(|(interfaces, ips, routes, dns)| Output { interfaces, ips, routes, dns })
    }

    /// What a version has a place for.
    fn projected(output: &Output, version: Version) -> Output {
        let mut wanted = output.clone();
        if version < Version::V1_1_0 {
            wanted.interfaces = wanted.interfaces.iter().map(Interface::basic).collect();
            wanted.routes = wanted.routes.iter().map(Route::basic).collect();
        }
        if version.shape() == Shape::Single {
            wanted.interfaces.clear();
            let first = |v4: bool| output.ips.iter().find(|ip| ip.address.addr().is_ipv4() == v4).cloned();
            wanted.ips = [first(true), first(false)].into_iter().flatten().collect();
            wanted.routes = Vec::new();
            for ip in &mut wanted.ips {
                ip.interface = None;
                let same = |route: &&Route| route.dst.addr().is_ipv4() == ip.address.addr().is_ipv4();
                let routes = output.routes.iter().filter(same);
                wanted.routes.extend(routes.map(|route| Route::new(route.dst, route.gw.or(ip.gateway))));
            }
        }
        wanted
    }

    proptest! {
        #[test]
        fn every_version_keeps_what_its_shape_can_hold(output in any_output()) {
            for version in Version::ALL {
                let text = output.to_json(version);
                let value: Value = serde_json::from_str(&text).unwrap();
                prop_assert_eq!(value["cniVersion"].as_str(), Some(version.as_str()));
                let back = Output::parse(&value, version).unwrap();
                prop_assert_eq!(&back, &projected(&output, version), "{}", text);
                // What came back converts again without further loss, through every other version of the family as well.
                for other in Version::ALL.into_iter().filter(|other| other.shape() == version.shape()) {
                    let again: Value = serde_json::from_str(&back.to_json(other)).unwrap();
                    prop_assert_eq!(Output::parse(&again, version).unwrap(), projected(&back, other));
                }
            }
        }
    }
}
