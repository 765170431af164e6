//! Whether NetworkManager leaves alone what is ours (`spec/operations.md` 13.3): links of pods, VLAN devices, and every ENI but the
//! primary one, which it otherwise gives addresses and a default route by DHCP.
//!
//! What it is told stands in its configuration (`NetworkManager.conf(5)`): `unmanaged-devices`, or `managed=0` in a section that
//! matches devices. For veths the rules that it brings along for udev may say it as well.

use super::Finding;
use super::environment::{Facts, ini, says_no};
use crate::model::naming::VLAN_PREFIX;
use crate::model::settings::Settings;
use crate::plan::host::{Intent, Observation, link_of};

/// NetworkManager's own rules for udev, which leave veths alone unless somebody has taken that out.
pub(super) const UDEV_RULES: &str = "85-nm-unmanaged.rules";

/// A link as a list of devices may name it.
struct Device {
    /// What the list lacks if it does not.
    word: String,
    name: String,
    mac: String,
    kind: &'static str,
    driver: &'static str,
}

/// The finding, if it runs.
pub(super) fn network_manager(
    intent: Option<&Intent>,
    seen: &Observation,
    settings: &Settings,
    facts: &Facts,
) -> Option<Finding> {
    if !facts.there.contains("/run/NetworkManager") {
        return None;
    }
    let parts =
        facts.layered(&["/etc/NetworkManager/conf.d", "/run/NetworkManager/conf.d", "/usr/lib/NetworkManager/conf.d"]);
    let main = facts.text("/etc/NetworkManager/NetworkManager.conf");
    let lists = parts.values().copied().chain(main).flat_map(|text| {
        let section = ini(text, "match-device").filter(|_| ini(text, "managed").is_some_and(says_no));
        let lists = [ini(text, "unmanaged-devices"), ini(text, "unmanaged-devices+"), section];
        // An ENI without settings of the operator's is left as it is.
        let idle = ini(text, "no-auto-default").map(|list| (list, true));
        lists.into_iter().flatten().map(|list| (list, false)).chain(idle)
    });
    let lists = lists.collect::<Vec<_>>();
    let rules = facts.layered(&["/etc/udev/rules.d", "/usr/lib/udev/rules.d"]);
    let veths = rules.get(UDEV_RULES).is_some_and(|text| text.lines().any(spares_veths));
    let mut missing = Vec::<String>::new();
    for device in devices(intent, seen, settings) {
        let eni = device.kind == "ethernet";
        let listed = lists.iter().any(|(list, idle)| (eni || !idle) && covers(list, &device));
        let spared = listed || (veths && device.kind == "veth");
        if !spared && !missing.contains(&device.word) {
            missing.push(device.word);
        }
    }
    let text = || format!("NetworkManager runs, and unmanaged-devices has no {}", missing.join(", no "));
    (!missing.is_empty()).then(|| Finding::new("networkmanager", "", text()))
}

/// Whether a rule of udev's says of all veths, and of them alone, that they are not NetworkManager's.
fn spares_veths(line: &str) -> bool {
    let words = line.split(',').map(str::trim).collect::<Vec<_>>();
    words == ["ENV{ID_NET_DRIVER}==\"veth\"", "ENV{NM_UNMANAGED}=\"1\""]
}

// One of each kind of pods' links, and the ENIs that are there.
fn devices(intent: Option<&Intent>, seen: &Observation, settings: &Settings) -> Vec<Device> {
    let virtuals = [
        (settings.veth_prefix.as_str(), "0123456789a", "veth"),
        (VLAN_PREFIX, "0123456789a", "veth"),
        (VLAN_PREFIX, ".eth.1", "vlan"),
    ];
    let virtuals = virtuals.map(|(prefix, rest, kind)| {
        let (word, name) = (format!("interface-name:{prefix}*"), format!("{prefix}{rest}"));
        Device { word, name, mac: String::new(), kind, driver: kind }
    });
    let links = intent.into_iter().flat_map(|intent| &intent.enis).filter_map(|eni| link_of(&seen.links, eni.mac));
    let enis = links.map(|link| {
        let mac = link.mac.map(|mac| mac.to_string()).unwrap_or_default();
        let word = format!("interface-name:{}", link.name);
        Device { word, name: link.name.clone(), mac, kind: "ethernet", driver: "ena" }
    });
    virtuals.into_iter().chain(enis).collect()
}

/// Whether a list of devices names this one. What is excepted counts more; a list of exceptions alone names all the rest.
fn covers(list: &str, device: &Device) -> bool {
    let words = list.split([';', ',']).map(str::trim).filter(|word| !word.is_empty());
    let (mut named, mut positive, mut some) = (false, false, false);
    for word in words {
        let (except, word) = word.strip_prefix("except:").map_or((false, word), |word| (true, word));
        let hit = is(word, device);
        if hit && except {
            return false;
        }
        (named, positive, some) = (named || hit, positive || !except, true);
    }
    named || (some && !positive)
}

fn is(word: &str, device: &Device) -> bool {
    let (key, value) = match word.split_once(':') {
        Some((key @ ("interface-name" | "mac" | "type" | "driver"), value)) => (key, value),
        // A bare name or MAC.
        _ => ("", word),
    };
    let by_name = || like(value.trim_start_matches(['=', '~']), &device.name);
    let by_mac = || value.eq_ignore_ascii_case(&device.mac);
    match key {
        "interface-name" => by_name(),
        "mac" => by_mac(),
        "type" => value == device.kind,
        "driver" => like(value, device.driver),
        _ => by_name() || by_mac(),
    }
}

/// Whether a name is as a pattern, in which `*` stands for anything and `?` for one letter.
fn like(pattern: &str, name: &str) -> bool {
    match (pattern.chars().next(), name.chars().next()) {
        (None, first) => first.is_none(),
        (Some('*'), _) => {
            let rest = pattern.trim_start_matches('*');
            rest.is_empty() || name.char_indices().any(|(at, _)| like(rest, &name[at..]))
        }
        (Some(letter), Some(first)) if letter == '?' || letter == first => {
            like(&pattern[letter.len_utf8()..], &name[first.len_utf8()..])
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::doctor::tests::node;

    #[test]
    fn what_network_manager_leaves_alone() {
        let check = |texts: &[&str], missing: Option<&str>| {
            let mut facts = Facts::default();
            facts.there.insert("/run/NetworkManager".into());
            for (number, text) in texts.iter().enumerate() {
                facts.files.insert(format!("/etc/NetworkManager/conf.d/{number}.conf"), (*text).to_owned());
            }
            let settings = Settings::parse(|_| None).0;
            let (intent, seen) = node();
            let found = network_manager(Some(&intent), &seen, &settings, &facts);
            let missing = missing.map(|what| format!("NetworkManager runs, and unmanaged-devices has no {what}"));
            assert_eq!(found.map(|finding| finding.seen), missing, "{texts:?}");
            facts.there.clear();
            assert_eq!(network_manager(Some(&intent), &seen, &settings, &facts), None);
        };
        let all = "interface-name:eni*, no interface-name:vlan*, no interface-name:eth1";
        check(&[], Some(all));
        check(&["[main]\nplugins=keyfile\n"], Some(all));
        check(
            &["[keyfile]\nunmanaged-devices=interface-name:eni*\n"],
            Some("interface-name:vlan*, no interface-name:eth1"),
        );
        check(&["unmanaged-devices=interface-name:eni*;interface-name:vlan*"], Some("interface-name:eth1"));
        check(&["unmanaged-devices=interface-name:eni*;interface-name:vlan*;interface-name:eth1;"], None);
        check(&["unmanaged-devices=eni*,vlan*", "unmanaged-devices+=mac:02:00:00:00:00:04"], None);
        check(&["unmanaged-devices=interface-name:eni*;vlan*;02:00:00:00:00:04"], None);
        check(&["unmanaged-devices=type:veth;type:vlan;driver:ena;except:interface-name:eth0"], None);
        check(
            &["unmanaged-devices=type:veth;type:vlan;type:ethernet;except:interface-name:eth?"],
            Some("interface-name:eth1"),
        );
        check(&["unmanaged-devices=type:veth;interface-name:eth1"], Some("interface-name:vlan*"));
        check(&["unmanaged-devices=*;except:mac:02:00:00:00:00:03"], None);
        check(&["unmanaged-devices=except:interface-name:eth0"], None);
        check(&["unmanaged-devices=eni*;vlan*", "[main]\nno-auto-default=*"], None);
        check(&["[main]\nno-auto-default=*"], Some("interface-name:eni*, no interface-name:vlan*"));
        check(&["[device-ours]\nmatch-device=interface-name:eni*;vlan*;eth*\nmanaged=0"], None);
        check(&["[device-ours]\nmatch-device=interface-name:eni*;vlan*;eth*\nmanaged=1"], Some(all));
    }

    /// Veths are left alone by rules that NetworkManager brings along; VLAN devices and ENIs are not.
    #[test]
    fn what_network_managers_own_rules_leave_alone() {
        let stock = "# pairs\nENV{ID_NET_DRIVER}==\"veth\", ENV{NM_UNMANAGED}=\"1\"\n";
        let check = |folder: &str, text: &str, missing: &str| {
            let mut facts = Facts::default();
            facts.there.insert("/run/NetworkManager".into());
            facts.files.insert(format!("/usr/lib/udev/rules.d/{UDEV_RULES}"), stock.into());
            facts.files.insert(format!("{folder}/{UDEV_RULES}"), text.into());
            let (intent, seen) = node();
            let found = network_manager(Some(&intent), &seen, &Settings::parse(|_| None).0, &facts).unwrap();
            assert_eq!(found.seen, format!("NetworkManager runs, and unmanaged-devices has no {missing}"), "{text}");
        };
        let (usr, all) =
            ("/usr/lib/udev/rules.d", "interface-name:eni*, no interface-name:vlan*, no interface-name:eth1");
        let rest = "interface-name:vlan*, no interface-name:eth1";
        check(usr, stock, rest);
        check(usr, &stock.replace("\", E", "\",E"), rest);
        check(usr, &format!("# {}", &stock[8..]), all);
        check(usr, &stock.replace("=\"1\"", "=\"0\""), all);
        check(usr, &stock.replace("==", "!="), all);
        check("/etc/udev/rules.d", "", all); // in its place
        check("/etc/udev/rules.d", stock, rest);
    }
}
