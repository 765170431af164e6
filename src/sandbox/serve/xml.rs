//! EC2's answers as XML (`spec/aws.md` 6.3, 7).

use crate::model::ec2::{Attachment, Failure, InstanceType, Interface, Reply, Subnet};
use crate::model::ids::VpcId;
use crate::model::map::Map;
use ipnet::IpNet;
use std::fmt::Display;

/// An element tree under construction.
struct Xml(String);

impl Xml {
    fn node(&mut self, name: &str, fill: impl FnOnce(&mut Xml)) {
        self.0.extend(["<", name, ">"]);
        fill(self);
        self.0.extend(["</", name, ">"]);
    }

    fn text(&mut self, name: &str, value: impl Display) {
        self.node(name, |xml| escape(&mut xml.0, &value.to_string()));
    }

    fn set<T>(&mut self, name: &str, items: impl IntoIterator<Item = T>, mut fill: impl FnMut(&mut Xml, T)) {
        self.node(name, |xml| items.into_iter().for_each(|item| xml.node("item", |xml| fill(xml, item))));
    }

    fn tags(&mut self, tags: &Map<String, String>) {
        self.set("tagSet", tags, |xml, (key, value)| {
            xml.text("key", key);
            xml.text("value", value);
        });
    }
}

fn escape(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            // XML 1.0 has no way to write other control characters.
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
}

const DECLARATION: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";

/// The answer to an action that went well.
pub fn reply(action: &str, request_id: &str, vpc: &VpcId, reply: &Reply, next_token: Option<&str>) -> String {
    let mut xml = Xml(format!("{DECLARATION}<{action}Response xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\">"));
    xml.text("requestId", request_id);
    match reply {
        Reply::Interfaces(list) => {
            xml.set("networkInterfaceSet", list, |xml, one| interface(xml, one, vpc));
            if let Some(token) = next_token {
                xml.text("nextToken", token);
            }
        }
        Reply::Subnets(list) => xml.set("subnetSet", list, |xml, one| subnet(xml, one, vpc)),
        Reply::InstanceType(kind) => xml.set("instanceTypeSet", [kind], instance_type),
        Reply::Created(one) => xml.node("networkInterface", |xml| interface(xml, one, vpc)),
        Reply::Attached(id) => {
            xml.text("attachmentId", id);
            xml.text("networkCardIndex", 0);
        }
        Reply::Assigned(nets) => assigned(&mut xml, action, nets),
        Reply::Done => xml.text("return", true),
    }
    xml.0.extend(["</", action, "Response>"]);
    xml.0
}

fn assigned(xml: &mut Xml, action: &str, nets: &[IpNet]) {
    if action == "AssignIpv6Addresses" {
        // Plain items, not structures.
        xml.set("assignedIpv6PrefixSet", nets, |xml, net| escape(&mut xml.0, &net.to_string()));
        return;
    }
    let (addresses, prefixes): (Vec<&IpNet>, Vec<&IpNet>) =
        nets.iter().partition(|net| net.prefix_len() == net.max_prefix_len());
    xml.set("assignedPrivateIpAddressesSet", addresses, |xml, net| xml.text("privateIpAddress", net.addr()));
    xml.set("assignedIpv4PrefixSet", prefixes, |xml, net| xml.text("ipv4Prefix", net));
}

/// The answer to an action that failed.
pub fn failure(failure: &Failure) -> String {
    let mut xml = Xml(DECLARATION.to_owned());
    xml.node("Response", |xml| {
        xml.node("Errors", |xml| {
            xml.node("Error", |xml| {
                xml.text("Code", &failure.code);
                xml.text("Message", &failure.message);
            });
        });
        xml.text("RequestID", &failure.request_id);
    });
    xml.0
}

fn interface(xml: &mut Xml, eni: &Interface, vpc: &VpcId) {
    xml.text("networkInterfaceId", &eni.id);
    xml.text("subnetId", &eni.subnet);
    xml.text("vpcId", vpc);
    xml.text("description", &eni.description);
    xml.text("interfaceType", &eni.interface_type);
    xml.text("status", &eni.status);
    if let Some(mac) = eni.mac {
        xml.text("macAddress", mac);
    }
    if let Some(own) = eni.primary_ipv4 {
        xml.text("privateIpAddress", own);
    }
    xml.set("groupSet", &eni.groups, |xml, group| xml.text("groupId", group));
    if let Some(at) = &eni.attachment {
        attachment(xml, at, &eni.status);
    }
    let conntrack = [
        ("tcpEstablishedTimeout", eni.conntrack.tcp_established_s),
        ("udpStreamTimeout", eni.conntrack.udp_stream_s),
        ("udpTimeout", eni.conntrack.udp_s),
    ];
    if conntrack.iter().any(|(_, seconds)| seconds.is_some()) {
        xml.node("connectionTrackingConfiguration", |xml| {
            for (name, seconds) in conntrack {
                if let Some(seconds) = seconds {
                    xml.text(name, seconds);
                }
            }
        });
    }
    let addresses = eni.primary_ipv4.iter().map(|own| (own, true));
    let addresses = addresses.chain(eni.secondary_ipv4s.iter().map(|addr| (addr, false)));
    xml.set("privateIpAddressesSet", addresses, |xml, (addr, primary)| {
        xml.text("primary", primary);
        xml.text("privateIpAddress", addr);
    });
    xml.set("ipv4PrefixSet", &eni.v4_prefixes, |xml, net| xml.text("ipv4Prefix", net));
    xml.set("ipv6AddressesSet", &eni.ipv6s, |xml, addr| xml.text("ipv6Address", addr));
    xml.set("ipv6PrefixSet", &eni.v6_prefixes, |xml, net| xml.text("ipv6Prefix", net));
    xml.tags(&eni.tags);
}

fn attachment(xml: &mut Xml, at: &Attachment, status: &str) {
    xml.node("attachment", |xml| {
        xml.text("attachmentId", &at.id);
        xml.text("instanceId", &at.instance);
        xml.text("deviceIndex", at.device);
        xml.text("networkCardIndex", at.card);
        xml.text("deleteOnTermination", at.delete_on_termination);
        xml.text("status", if status == "detaching" { "detaching" } else { "attached" });
    });
}

fn subnet(xml: &mut Xml, subnet: &Subnet, vpc: &VpcId) {
    xml.text("subnetId", &subnet.id);
    xml.text("vpcId", vpc);
    xml.text("availableIpAddressCount", subnet.free);
    xml.tags(&subnet.tags);
}

fn instance_type(xml: &mut Xml, kind: &InstanceType) {
    xml.text("instanceType", &kind.name);
    xml.text("bareMetal", kind.bare_metal);
    if kind.hypervisor != "unknown" {
        xml.text("hypervisor", &kind.hypervisor);
    }
    xml.node("networkInfo", |xml| {
        xml.text("maximumNetworkInterfaces", kind.cards.iter().map(|(_, enis)| enis).sum::<u32>());
        xml.text("maximumNetworkCards", kind.cards.len());
        xml.text("defaultNetworkCardIndex", kind.default_card);
        xml.set("networkCards", &kind.cards, |xml, (index, enis)| {
            xml.text("networkCardIndex", index);
            xml.text("maximumNetworkInterfaces", enis);
        });
        xml.text("ipv4AddressesPerInterface", kind.ipv4_per_eni);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        let mut xml = Xml(String::new());
        xml.text("a", "<b> & \"c\"\u{1}");
        assert_eq!(xml.0, "<a>&lt;b&gt; &amp; &quot;c&quot;\u{fffd}</a>");
    }

    #[test]
    fn errors_look_like_ec2s() {
        let text = failure(&Failure {
            action: "x",
            code: "InvalidNetworkInterfaceID.NotFound".into(),
            message: "The networkInterface ID 'eni-0' does not exist".into(),
            status: 400,
            request_id: "r-1".into(),
            maybe_applied: false,
        });
        let expect = "<Response><Errors><Error><Code>InvalidNetworkInterfaceID.NotFound</Code>\
             <Message>The networkInterface ID 'eni-0' does not exist</Message></Error></Errors>\
             <RequestID>r-1</RequestID></Response>";
        assert_eq!(text.strip_prefix(DECLARATION), Some(expect));
    }

    #[test]
    fn an_interface_has_the_elements_that_clients_read() {
        let eni = Interface {
            id: "eni-1".into(),
            attachment: Some(Attachment { id: "eni-attach-1".into(), device: 1, ..Attachment::default() }),
            primary_ipv4: Some("10.0.1.13".parse().unwrap()),
            secondary_ipv4s: vec!["10.0.1.253".parse().unwrap()],
            v4_prefixes: vec!["10.0.1.16/28".parse().unwrap()],
            tags: [("k".to_owned(), "v".to_owned())].into(),
            ..Interface::default()
        };
        let text = reply("DescribeNetworkInterfaces", "r", &"vpc-1".into(), &Reply::Interfaces(vec![eni]), Some("t"));
        for piece in [
            "<networkInterfaceSet><item><networkInterfaceId>eni-1</networkInterfaceId>",
            "<attachmentId>eni-attach-1</attachmentId>",
            "<deviceIndex>1</deviceIndex>",
            "<item><primary>true</primary><privateIpAddress>10.0.1.13</privateIpAddress></item>",
            "<item><primary>false</primary><privateIpAddress>10.0.1.253</privateIpAddress></item>",
            "<ipv4PrefixSet><item><ipv4Prefix>10.0.1.16/28</ipv4Prefix></item></ipv4PrefixSet>",
            "<tagSet><item><key>k</key><value>v</value></item></tagSet>",
            "<nextToken>t</nextToken></DescribeNetworkInterfacesResponse>",
        ] {
            assert!(text.contains(piece), "{piece} in {text}");
        }
    }
}
