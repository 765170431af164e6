//! Texts to settings, and back for the effective configuration.

use super::layers::{self, Layer, Layered, Overlay};
use super::table::{Kind, Row};
use super::{COMPLAINT_BYTES_MAX, Complaint, Inherited, Settings};
use crate::model::map::Map;
use crate::model::nft::SnatPorts;
use ipnet::{IpNet, Ipv4Net};

/// The keys that EC2 tags of ours live under; the operator may not write there.
const RESERVED_TAG: &str = "k8s.amazonaws.com";

/// What became of one text.
enum Outcome {
    /// Taken.
    Taken,
    /// Taken in part or not at all; the default or the rest stands.
    Told(Vec<String>),
    /// Not taken, and the start must fail.
    Fatal(String),
}

impl Settings {
    /// Reads every variable of the table through `lookup`. Nothing fails: what is wrong is told, and the default counts.
    pub fn parse(lookup: impl Fn(&str) -> Option<String>) -> (Settings, Vec<Complaint>) {
        let Layered { settings, complaints, .. } = Settings::parse_sourced(&lookup, &Overlay::default());
        (settings, complaints)
    }

    /// The same with what is set for this node alone, which is stronger.
    pub(super) fn parse_sourced(lookup: &dyn Fn(&str) -> Option<String>, over: &Overlay) -> Layered {
        let mut settings = Settings::blank();
        let (mut complaints, mut sources) = (Vec::new(), Map::new());
        let mut ipv4_told = false;
        for row in Settings::rows() {
            // A default that did not parse would be noticed by the test of the table, so its outcome needs no answer here.
            if !row.default.is_empty() {
                row.take(&mut settings, row.default);
            }
            if let Some(value) = lookup(row.variable)
                && row.take_environment(&mut settings, &value, &mut complaints)
            {
                sources.insert(row.variable, Layer::Environment);
                ipv4_told |= row.variable == "ENABLE_IPv4";
            }
            for (layer, texts) in over.layers() {
                let Some(text) = texts.get(row.variable).map(|text| text.trim()) else { continue };
                if text.is_empty() || !layers::per_node(row) {
                    continue;
                }
                let before = settings.clone();
                let whats = match row.take(&mut settings, text) {
                    Outcome::Taken => {
                        sources.insert(row.variable, layer);
                        continue;
                    }
                    Outcome::Told(whats) => whats,
                    Outcome::Fatal(what) => vec![what],
                };
                settings = before;
                for what in whats {
                    // What the environment's reader would do instead is not what is done here.
                    let what = what.split(';').next().unwrap_or_default();
                    complaints.push(layers::complaint(
                        row.variable,
                        layer,
                        text,
                        format!("{what}; this value does not count"),
                    ));
                }
            }
        }
        if !ipv4_told {
            settings.enable_ipv4 = !settings.enable_ipv6;
        }
        if settings.pod_mtu == 0 {
            settings.pod_mtu = settings.eni_mtu;
        }
        Layered { settings, complaints, refused: false, sources }
    }

    /// Everything off or empty, before the defaults of the table.
    fn blank() -> Settings {
        Settings {
            enable_ipv4: false,
            enable_ipv6: false,
            prefix_delegation: false,
            multi_nic: false,
            custom_networking: false,
            eni_config_annotation: String::new(),
            eni_config_label: String::new(),
            warm_eni_target: 0,
            warm_ip_target: 0,
            minimum_ip_target: 0,
            warm_prefix_target: 0,
            max_eni: None,
            ip_cooldown_s: 0,
            add_wait_s: 0,
            manage_non_schedulable: false,
            subnet_discovery: false,
            cluster_name: String::new(),
            additional_eni_tags: Map::new(),
            manage_untagged_eni: false,
            provisioning_disabled: false,
            imds_only: false,
            leaked_eni_cleanup_disabled: false,
            ec2_endpoint: String::new(),
            http_timeout_s: 0,
            vpc_cni_version: String::new(),
            external_snat: false,
            snat_ports: SnatPorts::FullyRandom,
            keep_host_source: false,
            exclude_snat_cidrs: Vec::new(),
            external_service_cidrs: Vec::new(),
            node_port: false,
            connmark: 0,
            eni_mtu: 0,
            pod_mtu: 0,
            veth_prefix: String::new(),
            pod_ipv6_disabled: false,
            bandwidth_plugin: false,
            annotate_pod_ip: false,
            network_policy_mode: None,
            pod_eni: false,
            pod_security_group_mode: String::new(),
            tcp_early_demux_disabled: false,
            v4_egress: false,
            v6_egress: false,
            egress_v4_log_file: String::new(),
            egress_v6_log_file: String::new(),
            node_name: String::new(),
            pod_name: String::new(),
            cluster_endpoint: String::new(),
            kubernetes_host: String::new(),
            kubernetes_port: String::new(),
            kubeconfig: String::new(),
            log_level: String::new(),
            log_file: String::new(),
            plugin_log_level: String::new(),
            plugin_log_file: String::new(),
            introspection_address: String::new(),
            introspection_disabled: false,
            metrics_disabled: false,
            cni_bin_path: String::new(),
            cni_conf_path: String::new(),
            cni_version: String::new(),
            backing_store: String::new(),
            settings_file: String::new(),
            inherited: Inherited::default(),
        }
    }
}

impl Row {
    // Whether the value of the environment counts, at least in part.
    fn take_environment(&self, settings: &mut Settings, value: &str, complaints: &mut Vec<Complaint>) -> bool {
        let text = value.trim();
        let before = self.show(settings);
        let (whats, fatal) = match self.take(settings, text) {
            Outcome::Taken => {
                return !text.is_empty() || matches!(self.kind, Kind::TextOrEmpty(_) | Kind::Verbatim(_));
            }
            Outcome::Told(whats) => (whats, false),
            Outcome::Fatal(what) => (vec![what], true),
        };
        let value = if matches!(self.kind, Kind::Inherited { secret: true }) { "" } else { value };
        for what in whats {
            complaints.push(Complaint { fatal, ..layers::complaint(self.variable, Layer::Environment, value, what) });
        }
        self.show(settings) != before
    }

    /// Puts the meaning of `text`, which has no blanks around it, into its place.
    fn take(&self, settings: &mut Settings, text: &str) -> Outcome {
        let default = || format!("the default {:?} is used", self.default);
        match self.kind {
            Kind::TextOrEmpty(slot) => text.clone_into(slot(settings)),
            Kind::Verbatim(slot) => *slot(settings) = Some(text.to_owned()),
            Kind::Strict { least, most, slot } => return take_strict(slot(settings), text, least, most),
            _ if text.is_empty() => {} // unset for all others
            Kind::Bool(slot) => match parse_bool(text) {
                Some(value) => *slot(settings) = value,
                None => return told(format!("is neither true nor false; {}", default())),
            },
            Kind::Count { least, most, slot } => return take_count(slot(settings), text, least, most, &default()),
            Kind::Cap { slot } => match parse_integer(text) {
                Some(count) if count >= 1 => *slot(settings) = Some(u32::try_from(count).unwrap_or(u32::MAX)),
                Some(_) => *slot(settings) = None, // the documented way to switch it off
                None => return told("is not an integer; there is no bound".into()),
            },
            Kind::Mark(slot) => match parse_mark(text) {
                Some(mark) => *slot(settings) = mark,
                None => return told(format!("is not a mark of 1 to 0xffffffff; {}", default())),
            },
            Kind::Text(slot) => text.clone_into(slot(settings)),
            Kind::Cidrs(slot) => return take_cidrs(slot(settings), text),
            Kind::Tags(slot) => return take_tags(slot(settings), text),
            Kind::Ports(slot) => match text {
                "prng" => *slot(settings) = SnatPorts::FullyRandom,
                "hashrandom" => *slot(settings) = SnatPorts::Random,
                "none" => *slot(settings) = SnatPorts::Keep,
                _ => return told(format!("is not prng, hashrandom or none; {}", default())),
            },
            Kind::Inherited { .. } => {
                settings.inherited.0.insert(self.variable, text.to_owned());
            }
            Kind::Ignored(why) => return told(format!("has no effect: {why}")),
        }
        Outcome::Taken
    }

    /// The value as a text that [`Row::take`] understands; `None` when nothing is set. Mutable only for the slots' sake.
    pub(super) fn show(&self, settings: &mut Settings) -> Option<String> {
        let text = match self.kind {
            Kind::Bool(slot) => slot(settings).to_string(),
            Kind::Count { slot, .. } | Kind::Strict { slot, .. } => slot(settings).to_string(),
            Kind::Cap { slot } => return slot(settings).map(|cap| cap.to_string()),
            Kind::Mark(slot) => format!("{:#x}", slot(settings)),
            Kind::Text(slot) => return Some(slot(settings).clone()).filter(|text| !text.is_empty()),
            Kind::TextOrEmpty(slot) => slot(settings).clone(),
            Kind::Verbatim(slot) => return slot(settings).clone(),
            Kind::Cidrs(slot) => {
                let cidrs: Vec<String> = slot(settings).iter().map(ToString::to_string).collect();
                return (!cidrs.is_empty()).then(|| cidrs.join(","));
            }
            Kind::Tags(slot) => serde_json::to_string(slot(settings)).unwrap_or_default(),
            Kind::Ports(slot) => match slot(settings) {
                SnatPorts::FullyRandom => "prng".into(),
                SnatPorts::Random => "hashrandom".into(),
                SnatPorts::Keep => "none".into(),
            },
            Kind::Inherited { secret: true } => {
                return settings.inherited.get(self.variable).map(|_| "(set, not shown)".into());
            }
            Kind::Inherited { secret: false } => return settings.inherited.get(self.variable).map(hide_user),
            Kind::Ignored(_) => return None,
        };
        Some(text)
    }
}

fn told(what: String) -> Outcome {
    Outcome::Told(vec![what])
}

fn parse_bool(text: &str) -> Option<bool> {
    let is = |words: [&str; 3]| words.iter().any(|word| word.eq_ignore_ascii_case(text));
    if is(["1", "t", "true"]) {
        Some(true)
    } else if is(["0", "f", "false"]) {
        Some(false)
    } else {
        None
    }
}

/// A decimal integer with an optional sign, of any size: what does not fit is as good as the nearest that does.
fn parse_integer(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let limit = if text.starts_with('-') { i64::MIN } else { i64::MAX };
    Some(text.parse().unwrap_or(limit))
}

fn take_count(slot: &mut u32, text: &str, least: i64, most: u32, default: &str) -> Outcome {
    match parse_integer(text) {
        Some(count) if count > i64::from(most) => {
            *slot = most;
            told(format!("is more than {most}, which is used"))
        }
        Some(count) if count >= least => {
            *slot = u32::try_from(count).unwrap_or(most);
            Outcome::Taken
        }
        Some(_) => told(format!("is less than {least}; {default}")),
        None => told(format!("is not an integer; {default}")),
    }
}

fn take_strict(slot: &mut u32, text: &str, least: i64, most: u32) -> Outcome {
    match parse_integer(text) {
        Some(value) if value >= least && value <= i64::from(most) => {
            *slot = u32::try_from(value).unwrap_or(most);
            Outcome::Taken
        }
        _ => Outcome::Fatal(format!("is not an integer from {least} to {most}")),
    }
}

/// An integer as Go reads it with base 0 (`spec/config.md` 2.4): the prefix tells the base, `_` may part digits.
fn parse_mark(text: &str) -> Option<u32> {
    let text = text.strip_prefix('+').unwrap_or(text).to_ascii_lowercase();
    let (digits, base) = match text.as_bytes() {
        [b'0', b'x', ..] => (&text[2..], 16),
        [b'0', b'b', ..] => (&text[2..], 2),
        [b'0', b'o', ..] => (&text[2..], 8),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (&text[..], 10),
    };
    let digits = digits.replace('_', "");
    if digits.starts_with('+') {
        return None; // from_str_radix would take a second sign
    }
    u32::from_str_radix(&digits, base).ok().filter(|mark| *mark > 0)
}

/// Bad items are left out, the others stay, in order and with their host bits cleared (`spec/config.md` 1).
fn take_cidrs(slot: &mut Vec<Ipv4Net>, text: &str) -> Outcome {
    let mut whats = Vec::new();
    slot.clear();
    for item in text.split(',').map(str::trim) {
        match item.parse::<IpNet>() {
            Ok(IpNet::V4(cidr)) => slot.push(cidr.trunc()),
            Ok(IpNet::V6(_)) => whats.push(format!("{item:?} is IPv6 and is left out")),
            Err(_) => whats.push(format!("{:?} is not a CIDR and is left out", shorten(item))),
        }
    }
    if whats.is_empty() { Outcome::Taken } else { Outcome::Told(whats) }
}

fn take_tags(slot: &mut Map<String, String>, text: &str) -> Outcome {
    let Ok(mut tags) = serde_json::from_slice::<Map<String, String>>(text.as_bytes()) else {
        slot.clear();
        return told("is not a JSON object of strings; no tags are added".into());
    };
    let reserved: Vec<String> = tags.keys().filter(|key| key.contains(RESERVED_TAG)).cloned().collect();
    tags.retain(|key, _| !key.contains(RESERVED_TAG));
    *slot = tags;
    if reserved.is_empty() {
        return Outcome::Taken;
    }
    Outcome::Told(reserved.into_iter().map(|key| format!("the key {key:?} is reserved and is left out")).collect())
}

/// URLs of proxies may carry a user and a password.
fn hide_user(text: &str) -> String {
    match (text.split_once("://"), text.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://(hidden)@{host}"),
        (None, Some((_, host))) => format!("(hidden)@{host}"),
        _ => text.to_owned(),
    }
}

pub(super) fn shorten(text: &str) -> String {
    let end = text.floor_char_boundary(COMPLAINT_BYTES_MAX);
    text[..end].to_owned()
}
