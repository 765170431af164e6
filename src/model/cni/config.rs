//! The network configuration on standard input (`spec/plugin.md` 2).

use super::{CniError, Output, Version, code, is_valid_id};
use crate::model::map::Map;
use serde_json::{Map as Object, Value};

/// MTU of pods when the configuration has none, or none that can be used.
pub const DEFAULT_MTU: u32 = 9001;
/// The smallest MTU that is taken from the configuration (RFC 791: every host takes 576).
const SMALLEST_MTU: u32 = 576;
/// The annotation that asks for one interface on each managed network card, and the value that does.
pub const MULTI_NIC_ANNOTATION: (&str, &str) = ("k8s.amazonaws.com/nicConfig", "multi-nic-attachment");
const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
/// Longest prefix of a host veth name: 4 + 11 digits fill the kernel's 15 bytes.
const VETH_PREFIX_LENGTH_MAX: usize = 4;

/// The part of the configuration that the protocol itself needs, and the rest as JSON.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// Negotiated version.
    pub version: Version,
    /// Name of the network.
    pub name: String,
    pub(super) fields: Object<String, Value>,
}

impl Envelope {
    /// Reads name and version. Errors have the codes and texts of the CNI skeleton: no JSON object 6, no or a bad name 7,
    /// an unknown version 1.
    pub fn parse(bytes: &[u8]) -> Result<Envelope, CniError> {
        let decode = |text: String| CniError::new(code::DECODE, format!("error unmarshall network config: {text}"));
        let fields = match serde_json::from_slice(bytes) {
            Ok(Value::Object(fields)) => fields,
            Ok(_) => return Err(decode("not a JSON object".into())),
            Err(error) => return Err(decode(error.to_string())),
        };
        let name = string(&fields, "name").map_err(decode)?.unwrap_or_default();
        if name.is_empty() {
            return Err(CniError::new(code::INVALID_CONFIG, "missing network name"));
        }
        if !is_valid_id(name) {
            let details = format!("network name must match ^[a-zA-Z0-9][a-zA-Z0-9_.\\-]*$, not {name:?}");
            return Err(
                CniError::new(code::INVALID_CONFIG, "invalid characters found in network name").with_details(details)
            );
        }
        let text = string(&fields, "cniVersion").map_err(decode)?.unwrap_or_default();
        let version = Version::parse(text).ok_or_else(|| incompatible(text))?;
        Ok(Envelope { version, name: name.to_owned(), fields })
    }

    /// GC: the attachments that are still in use; `None` when the key is absent.
    pub fn valid_attachments(&self) -> Result<Option<Vec<Attachment>>, String> {
        valid_attachments(&self.fields)
    }

    /// The version that a configuration names, whatever else may be wrong with it. Errors are told in that version.
    pub fn peek_version(bytes: &[u8]) -> Option<Version> {
        let fields: Value = serde_json::from_slice(bytes).ok()?;
        Version::parse(fields.get("cniVersion")?.as_str()?)
    }
}

fn incompatible(text: &str) -> CniError {
    let all = Version::ALL.map(Version::as_str).join(" ");
    CniError::new(code::INCOMPATIBLE_VERSION, "incompatible CNI versions")
        .with_details(format!("config is {text:?}, plugin supports [{all}]"))
}

/// How security groups of branch-ENI pods are enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EnforcingMode {
    /// All traffic of the pod passes its ENI, also that of its own node.
    #[default]
    Strict,
    /// Traffic of the pod's own node reaches it directly.
    Standard,
}

/// One entry of `cni.dev/valid-attachments`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    /// Container id.
    pub container: String,
    /// Interface name.
    pub ifname: String,
}

/// The configuration of `aws-cni`, defaults filled in.
#[derive(Clone, Debug)]
pub struct Config {
    /// Prefix of host veth names, at most four bytes.
    pub veth_prefix: String,
    /// MTU of the pod's interfaces.
    pub mtu: u32,
    /// Only for branch-ENI pods.
    pub enforcing_mode: EnforcingMode,
    /// `pluginLogFile`; empty or `stderr` means standard error.
    pub log_file: String,
    /// `pluginLogLevel`.
    pub log_level: String,
    /// The pod's annotations, where the runtime passes them.
    pub annotations: Map<String, String>,
    /// What earlier plugins (ADD) or the whole chain (DEL, CHECK) returned. The inner error is the reason why one that is
    /// there cannot be understood: ADD and CHECK refuse it, DEL goes on without.
    pub prev_result: Result<Option<Output>, String>,
    /// GC: the attachments that are still in use; absent when the key is.
    pub valid_attachments: Option<Vec<Attachment>>,
}

impl Config {
    /// Reads our own fields; unknown ones are ignored. The texts are those of `spec/plugin.md` 15.
    pub fn from_envelope(envelope: &Envelope) -> Result<Config, String> {
        let fields = &envelope.fields;
        let text = |key| string(fields, key).map(|value| value.map(str::to_owned));
        let veth_prefix = text("vethPrefix")?.unwrap_or_else(|| "eni".to_owned());
        if veth_prefix.len() > VETH_PREFIX_LENGTH_MAX {
            return Err("conf.VethPrefix can be at most 4 characters long".to_owned());
        }
        if veth_prefix.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
            return Err(format!("conf.VethPrefix {veth_prefix:?} cannot begin an interface name"));
        }
        let enforcing_mode = match string(fields, "podSGEnforcingMode")? {
            Some("standard") => EnforcingMode::Standard,
            _ => EnforcingMode::Strict,
        };
        Ok(Config {
            veth_prefix,
            mtu: mtu(fields.get("mtu"))?,
            enforcing_mode,
            log_file: text("pluginLogFile")?.unwrap_or_default(),
            log_level: text("pluginLogLevel")?.unwrap_or_default(),
            annotations: annotations(fields)?,
            prev_result: prev_result(fields, envelope.version),
            valid_attachments: valid_attachments(fields)?,
        })
    }

    /// Whether the pod asks for one interface on each managed network card.
    pub fn wants_multi_nic(&self) -> bool {
        let (key, value) = MULTI_NIC_ANNOTATION;
        self.annotations.get(key).is_some_and(|found| found == value)
    }
}

/// A string field; absent and null are the same, as in Go.
pub(super) fn string<'a>(fields: &'a Object<String, Value>, key: &str) -> Result<Option<&'a str>, String> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("field {key} must be a string")),
    }
}

/// A string of digits or a number; what is out of range or no number counts as the default.
fn mtu(value: Option<&Value>) -> Result<u32, String> {
    let number = match value {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => text.parse::<u32>().ok(),
        Some(Value::Number(number)) => number.as_u64().and_then(|number| u32::try_from(number).ok()),
        Some(_) => return Err("field mtu must be a string or a number".to_owned()),
    };
    Ok(number.filter(|mtu| (SMALLEST_MTU..=DEFAULT_MTU).contains(mtu)).unwrap_or(DEFAULT_MTU))
}

fn annotations(fields: &Object<String, Value>) -> Result<Map<String, String>, String> {
    let found = match fields.get("runtimeConfig") {
        None | Some(Value::Null) => None,
        Some(Value::Object(runtime)) => runtime.get(POD_ANNOTATIONS),
        Some(_) => return Err("field runtimeConfig must be an object".to_owned()),
    };
    match found {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(pairs)) => {
            let mut all = Map::new();
            for (key, value) in pairs {
                let text = value.as_str().ok_or_else(|| format!("pod annotation {key:?} must be a string"))?;
                all.insert(key.clone(), text.to_owned());
            }
            Ok(all)
        }
        Some(_) => Err(format!("field runtimeConfig.{POD_ANNOTATIONS} must be an object")),
    }
}

pub(super) fn prev_result(fields: &Object<String, Value>, version: Version) -> Result<Option<Output>, String> {
    match fields.get("prevResult") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            Output::parse(value, version).map(Some).map_err(|reason| format!("could not parse prevResult: {reason}"))
        }
    }
}

/// `cni.dev/valid-attachments`, or the name that libcni wrote by mistake for some releases (containernetworking/cni#1101).
fn valid_attachments(fields: &Object<String, Value>) -> Result<Option<Vec<Attachment>>, String> {
    let key = "cni.dev/valid-attachments";
    let list = match fields.get(key).or_else(|| fields.get("cni.dev/attachments")) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(format!("field {key} must be a list")),
    };
    let attachment = |value: &Value| {
        let text = |key| value.get(key).and_then(Value::as_str).filter(|text: &&str| !text.is_empty());
        match (text("containerID"), text("ifname")) {
            (Some(container), Some(ifname)) => {
                Ok(Attachment { container: container.to_owned(), ifname: ifname.to_owned() })
            }
            _ => Err(format!("field {key}: {value} has no containerID or no ifname")),
        }
    };
    list.iter().map(attachment).collect::<Result<Vec<_>, _>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn config(fields: &Value) -> Result<Config, String> {
        let mut all = json!({"cniVersion": "1.1.0", "name": "aws-cni", "type": "aws-cni"});
        for (key, value) in fields.as_object().unwrap() {
            all[key] = value.clone();
        }
        Config::from_envelope(&Envelope::parse(all.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn the_envelope_tells_what_is_wrong() {
        let check = |text: &str, wanted: Result<Version, (u32, &str)>| {
            let got = Envelope::parse(text.as_bytes()).map(|envelope| envelope.version);
            assert_eq!(
                got.map_err(|error| (error.code, error.msg)),
                wanted.map_err(|(code, msg)| (code, msg.to_owned()))
            );
        };
        check(r#"{"name":"a","cniVersion":"1.0.0"}"#, Ok(Version::V1_0_0));
        check(r#"{"name":"a"}"#, Ok(Version::V0_1_0));
        check(r#"{"name":"a","cniVersion":null}"#, Ok(Version::V0_1_0));
        check(r#"{"name":"a","cniVersion":"9.9.9"}"#, Err((1, "incompatible CNI versions")));
        check(r#"{"cniVersion":"1.0.0"}"#, Err((7, "missing network name")));
        check(r#"{"name":"a b"}"#, Err((7, "invalid characters found in network name")));
        check(r#"{"name":5}"#, Err((6, "error unmarshall network config: field name must be a string")));
        check("[]", Err((6, "error unmarshall network config: not a JSON object")));
        assert_eq!(Envelope::parse(b"").unwrap_err().code, 6);
        assert_eq!(Envelope::parse(b"{\"name\":\"a\"} x").unwrap_err().code, 6);
        assert_eq!(Envelope::parse(&[0xff, 0xfe]).unwrap_err().code, 6);
        assert_eq!(Envelope::parse("[".repeat(100_000).as_bytes()).unwrap_err().code, 6);
    }

    #[test]
    fn absent_fields_have_the_defaults_of_the_shipped_configuration() {
        let config = config(&json!({})).unwrap();
        assert_eq!((config.veth_prefix.as_str(), config.mtu), ("eni", 9001));
        assert_eq!(config.enforcing_mode, EnforcingMode::Strict);
        assert!(config.prev_result.unwrap().is_none() && config.valid_attachments.is_none());
    }

    #[test]
    fn mtu_is_read_from_strings_and_numbers() {
        for (value, wanted) in [
            (json!("1500"), 1500),
            (json!(1500), 1500),
            (json!("576"), 576),
            (json!("575"), 9001),
            (json!("9002"), 9001),
            (json!(""), 9001),
            (json!("-1"), 9001),
            (json!(-1), 9001),
            (json!(1e99), 9001),
            (json!("nine"), 9001),
            (json!(null), 9001),
        ] {
            assert_eq!(config(&json!({"mtu": value})).unwrap().mtu, wanted, "{value}");
        }
        assert!(config(&json!({"mtu": []})).is_err());
    }

    #[test]
    fn the_prefix_fits_a_name() {
        assert_eq!(config(&json!({"vethPrefix": ""})).unwrap().veth_prefix, "");
        assert_eq!(config(&json!({"vethPrefix": "vlan"})).unwrap().veth_prefix, "vlan");
        for bad in ["toolong", "a/b", "a b", "a\n"] {
            assert!(config(&json!({"vethPrefix": bad})).is_err(), "{bad:?}");
        }
        assert!(config(&json!({"vethPrefix": 4})).is_err());
    }

    #[test]
    fn multi_nic_is_asked_for_by_exact_value() {
        let wants = |value: &str| {
            config(&json!({"runtimeConfig": {POD_ANNOTATIONS: {"k8s.amazonaws.com/nicConfig": value}}}))
                .unwrap()
                .wants_multi_nic()
        };
        assert!(wants("multi-nic-attachment"));
        assert!(!wants("Multi-NIC-attachment"));
        assert!(config(&json!({"runtimeConfig": {"portMappings": []}})).is_ok());
        assert!(config(&json!({"runtimeConfig": {POD_ANNOTATIONS: {"a": 1}}})).is_err());
    }

    #[test]
    fn attachments_under_either_name() {
        let list = json!([{"containerID": "a", "ifname": "eth0"}]);
        let wanted = Some(vec![Attachment { container: "a".into(), ifname: "eth0".into() }]);
        assert_eq!(config(&json!({"cni.dev/valid-attachments": list})).unwrap().valid_attachments, wanted);
        assert_eq!(config(&json!({"cni.dev/attachments": list})).unwrap().valid_attachments, wanted);
        assert_eq!(config(&json!({"cni.dev/valid-attachments": []})).unwrap().valid_attachments, Some(Vec::new()));
        assert!(config(&json!({"cni.dev/valid-attachments": [{"containerID": "a"}]})).is_err());
        assert!(config(&json!({"cni.dev/valid-attachments": {}})).is_err());
    }

    #[test]
    fn a_previous_result_must_be_of_the_same_family() {
        let check = |version: &str, previous: Value, good: bool| {
            let all = json!({"cniVersion": version, "name": "a", "prevResult": previous});
            let envelope = Envelope::parse(all.to_string().as_bytes()).unwrap();
            assert_eq!(Config::from_envelope(&envelope).unwrap().prev_result.is_ok(), good, "{all}");
        };
        check("0.4.0", json!({"cniVersion": "0.3.1", "ips": []}), true);
        check("0.4.0", json!({"ips": []}), true);
        check("0.4.0", json!({"cniVersion": "1.0.0"}), false);
        check("1.1.0", json!({"cniVersion": "1.0.0"}), true);
        check("1.1.0", json!({"cniVersion": "9.9.9"}), false);
        check("0.1.0", json!({"cniVersion": "", "ip4": {"ip": "10.0.0.1/32"}}), true);
        check("1.1.0", json!("text"), false);
        check("1.1.0", json!(null), true);
    }

    /// JSON of any shape under the keys that are read.
    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC{0,20}".prop_map(Value::from),
        ];
        let keys = prop::sample::select(vec![
            "interfaces",
            "ips",
            "routes",
            "dns",
            "ip4",
            "ip6",
            "ip",
            "address",
            "gateway",
            "interface",
            "dst",
            "gw",
            "name",
            "mac",
            "mtu",
            "cniVersion",
            POD_ANNOTATIONS,
            "containerID",
            "ifname",
        ]);
        leaf.prop_recursive(5, 40, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec((keys.clone(), inner), 0..6)
                    .prop_map(|pairs| pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn hostile_configurations_never_panic(
            value in any_json(),
            key in prop::sample::select(vec![
                "prevResult", "mtu", "runtimeConfig", "vethPrefix", "cni.dev/valid-attachments", "pluginLogFile", "name", "cniVersion",
            ]),
            version in prop::sample::select(Version::ALL.to_vec()),
        ) {
            let mut all = json!({"cniVersion": version.as_str(), "name": "aws-cni"});
            all[key] = value;
            if let Ok(envelope) = Envelope::parse(all.to_string().as_bytes()) {
                let _ = Config::from_envelope(&envelope);
            }
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Envelope::parse(&bytes);
            let _ = Envelope::peek_version(&bytes);
        }
    }
}
