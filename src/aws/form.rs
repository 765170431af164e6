//! EC2 calls as form fields (`spec/aws.md` 6.1 and 7). Pure: used by the client, by tests and by whoever wants to see
//! what would be sent.

use crate::model::ec2::{Call, Count, Create};
use crate::model::map::Map;
use std::fmt::Write;

/// The version of the API.
pub const VERSION: &str = "2016-11-15";

/// Entries of a page, of at most 1000. An ENI with 50 addresses takes 13 KB, so that a full page has 3 MB, well below
/// the limit of an answer, and an instance's ENIs still come in one. That there are pages at all also draws from the
/// larger of EC2's rate limits (`spec/aws.md` 11.3).
const PAGE: &str = "200";

/// The fields of a call in the order in which they are sent, `Action` and `Version` first. A page's token is not among
/// them.
pub fn form(call: &Call) -> Vec<(String, String)> {
    let mut fields = Fields(Vec::new());
    fields.put("Action", call.action());
    fields.put("Version", VERSION);
    match call {
        Call::DescribeAttached(instance) => {
            fields.filters(&[("attachment.instance-id", instance.as_str())]);
            fields.put("MaxResults", PAGE);
        }
        Call::DescribeOne(eni) => {
            fields.filters(&[("network-interface-id", eni.as_str())]);
            fields.put("MaxResults", PAGE);
        }
        Call::DescribeLeaked { vpc, tags } => {
            let names: Vec<(String, &str)> = tags
                .iter()
                .map(|(key, value)| match value {
                    Some(value) => (format!("tag:{key}"), value.as_str()),
                    None => ("tag-key".to_owned(), key.as_str()),
                })
                .collect();
            let fixed = [("status", "available"), ("vpc-id", vpc.as_str())];
            let tagged = names.iter().map(|(name, value)| (name.as_str(), *value));
            fields.filters(&fixed.into_iter().chain(tagged).collect::<Vec<_>>());
            fields.put("MaxResults", PAGE);
        }
        Call::DescribeInstanceType(name) => fields.put("InstanceType.1", name),
        Call::DescribeSubnets { vpc, zone } => {
            fields.filters(&[("vpc-id", vpc.as_str()), ("availability-zone", zone)]);
        }
        Call::Create(create) => fields.create(create),
        Call::Attach { eni, instance, device, card } => {
            fields.put("DeviceIndex", device.to_string());
            fields.put("InstanceId", instance.as_str());
            fields.put("NetworkInterfaceId", eni.as_str());
            fields.put("NetworkCardIndex", card.to_string());
        }
        Call::DeleteOnTermination { eni, attachment } => {
            fields.put("NetworkInterfaceId", eni.as_str());
            fields.put("Attachment.AttachmentId", attachment.as_str());
            fields.put("Attachment.DeleteOnTermination", "true");
        }
        Call::ModifyGroups { eni, groups } => {
            fields.put("NetworkInterfaceId", eni.as_str());
            fields.list("SecurityGroupId", groups);
        }
        Call::CreateTags { eni, tags } => {
            fields.put("ResourceId.1", eni.as_str());
            fields.tags("", tags);
        }
        Call::Assign { eni, count } => {
            fields.put("NetworkInterfaceId", eni.as_str());
            fields.count(*count);
        }
        Call::AssignIpv6Prefix(eni) => {
            fields.put("NetworkInterfaceId", eni.as_str());
            fields.put("Ipv6PrefixCount", "1");
        }
        Call::UnassignAddresses { eni, addresses } => {
            fields.put("NetworkInterfaceId", eni.as_str());
            fields.list("PrivateIpAddress", addresses);
        }
        Call::UnassignPrefixes { eni, prefixes } => {
            fields.put("NetworkInterfaceId", eni.as_str());
            fields.list("Ipv4Prefix", prefixes);
        }
        Call::Detach(attachment) => fields.put("AttachmentId", attachment.as_str()),
        Call::Delete(eni) => fields.put("NetworkInterfaceId", eni.as_str()),
    }
    fields.0
}

struct Fields(Vec<(String, String)>);

impl Fields {
    fn put(&mut self, name: &str, value: impl Into<String>) {
        self.0.push((name.to_owned(), value.into()));
    }

    fn list<T: ToString>(&mut self, name: &str, values: &[T]) {
        for (number, value) in (1..).zip(values) {
            self.put(&format!("{name}.{number}"), value.to_string());
        }
    }

    fn filters(&mut self, filters: &[(&str, &str)]) {
        for (number, (name, value)) in (1..).zip(filters) {
            self.put(&format!("Filter.{number}.Name"), *name);
            self.put(&format!("Filter.{number}.Value.1"), *value);
        }
    }

    fn tags(&mut self, prefix: &str, tags: &Map<String, String>) {
        for (number, (key, value)) in (1..).zip(tags) {
            self.put(&format!("{prefix}Tag.{number}.Key"), key);
            self.put(&format!("{prefix}Tag.{number}.Value"), value);
        }
    }

    fn count(&mut self, count: Count) {
        match count {
            Count::Addresses(count) => self.put("SecondaryPrivateIpAddressCount", count.to_string()),
            Count::Prefixes(count) => self.put("Ipv4PrefixCount", count.to_string()),
            Count::Ipv6Addresses(count) => self.put("Ipv6AddressCount", count.to_string()),
        }
    }

    fn create(&mut self, create: &Create) {
        self.put("Description", &create.description);
        self.list("SecurityGroupId", &create.groups);
        self.put("SubnetId", create.subnet.as_str());
        self.count(create.count);
        let timeouts = [
            ("TcpEstablishedTimeout", create.conntrack.tcp_established_s),
            ("UdpStreamTimeout", create.conntrack.udp_stream_s),
            ("UdpTimeout", create.conntrack.udp_s),
        ];
        for (name, seconds) in timeouts {
            if let Some(seconds) = seconds {
                self.put(&format!("ConnectionTrackingSpecification.{name}"), seconds.to_string());
            }
        }
        self.put("ClientToken", &create.client_token);
        if !create.tags.is_empty() {
            self.put("TagSpecification.1.ResourceType", "network-interface");
            self.tags("TagSpecification.1.", &create.tags);
        }
    }
}

/// The fields as a request's body, percent-encoded as RFC 3986 has it: only letters, digits and `-._~` stay.
pub fn encode<'a>(fields: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut body = String::new();
    for (name, value) in fields {
        if !body.is_empty() {
            body.push('&');
        }
        percent(&mut body, name);
        body.push('=');
        percent(&mut body, value);
    }
    body
}

fn percent(body: &mut String, text: &str) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            body.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(body, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ec2::ConntrackTimeouts;

    fn check(call: &Call, expected: &str) {
        let fields = form(call);
        let text = fields.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ");
        let head = format!("Action={} Version=2016-11-15 ", call.action());
        assert_eq!(text.strip_prefix(&head), Some(expected));
    }

    #[test]
    fn describing() {
        check(
            &Call::DescribeAttached("i-8555".into()),
            "Filter.1.Name=attachment.instance-id Filter.1.Value.1=i-8555 MaxResults=200",
        );
        check(
            &Call::DescribeOne("eni-1".into()),
            "Filter.1.Name=network-interface-id Filter.1.Value.1=eni-1 MaxResults=200",
        );
        check(
            &Call::DescribeLeaked {
                vpc: "vpc-1".into(),
                tags: vec![
                    ("node.k8s.amazonaws.com/instance_id".into(), None),
                    ("cluster.k8s.amazonaws.com/name".into(), Some("prod".into())),
                ],
            },
            "Filter.1.Name=status Filter.1.Value.1=available Filter.2.Name=vpc-id Filter.2.Value.1=vpc-1 \
             Filter.3.Name=tag-key Filter.3.Value.1=node.k8s.amazonaws.com/instance_id \
             Filter.4.Name=tag:cluster.k8s.amazonaws.com/name Filter.4.Value.1=prod MaxResults=200",
        );
        check(&Call::DescribeInstanceType("m5.large".into()), "InstanceType.1=m5.large");
        check(
            &Call::DescribeSubnets { vpc: "vpc-1".into(), zone: "eu-west-1a".into() },
            "Filter.1.Name=vpc-id Filter.1.Value.1=vpc-1 Filter.2.Name=availability-zone Filter.2.Value.1=eu-west-1a",
        );
    }

    fn create(count: Count) -> Create {
        Create {
            subnet: "subnet-1a96".into(),
            description: "aws-K8S-i-8555".into(),
            groups: vec!["sg-596a".into(), "sg-596b".into()],
            count,
            conntrack: ConntrackTimeouts { tcp_established_s: Some(350), udp_stream_s: None, udp_s: Some(60) },
            tags: Map::from([("b".into(), "2".into()), ("a".into(), "1".into())]),
            client_token: "0b0f9c1e".into(),
        }
    }

    #[test]
    fn creating() {
        check(
            &Call::Create(create(Count::Addresses(9))),
            "Description=aws-K8S-i-8555 SecurityGroupId.1=sg-596a SecurityGroupId.2=sg-596b SubnetId=subnet-1a96 \
             SecondaryPrivateIpAddressCount=9 ConnectionTrackingSpecification.TcpEstablishedTimeout=350 \
             ConnectionTrackingSpecification.UdpTimeout=60 ClientToken=0b0f9c1e \
             TagSpecification.1.ResourceType=network-interface TagSpecification.1.Tag.1.Key=a \
             TagSpecification.1.Tag.1.Value=1 TagSpecification.1.Tag.2.Key=b TagSpecification.1.Tag.2.Value=2",
        );
        let bare = Create {
            groups: Vec::new(),
            conntrack: ConntrackTimeouts::default(),
            tags: Map::new(),
            ..create(Count::Prefixes(1))
        };
        let expected = "Description=aws-K8S-i-8555 SubnetId=subnet-1a96 Ipv4PrefixCount=1 ClientToken=0b0f9c1e";
        check(&Call::Create(bare.clone()), expected);
        let v6 = Create { count: Count::Ipv6Addresses(1), ..bare };
        check(&Call::Create(v6), &expected.replace("Ipv4PrefixCount", "Ipv6AddressCount"));
    }

    #[test]
    fn changing() {
        check(
            &Call::Attach { eni: "eni-1".into(), instance: "i-8555".into(), device: 2, card: 0 },
            "DeviceIndex=2 InstanceId=i-8555 NetworkInterfaceId=eni-1 NetworkCardIndex=0",
        );
        check(
            &Call::DeleteOnTermination { eni: "eni-1".into(), attachment: "eni-attach-7".into() },
            "NetworkInterfaceId=eni-1 Attachment.AttachmentId=eni-attach-7 Attachment.DeleteOnTermination=true",
        );
        check(
            &Call::ModifyGroups { eni: "eni-1".into(), groups: vec!["sg-1".into(), "sg-2".into()] },
            "NetworkInterfaceId=eni-1 SecurityGroupId.1=sg-1 SecurityGroupId.2=sg-2",
        );
        check(
            &Call::CreateTags { eni: "eni-1".into(), tags: Map::from([("k".into(), "v".into())]) },
            "ResourceId.1=eni-1 Tag.1.Key=k Tag.1.Value=v",
        );
        check(
            &Call::Assign { eni: "eni-1".into(), count: Count::Addresses(3) },
            "NetworkInterfaceId=eni-1 SecondaryPrivateIpAddressCount=3",
        );
        check(
            &Call::Assign { eni: "eni-1".into(), count: Count::Prefixes(2) },
            "NetworkInterfaceId=eni-1 Ipv4PrefixCount=2",
        );
        check(&Call::AssignIpv6Prefix("eni-1".into()), "NetworkInterfaceId=eni-1 Ipv6PrefixCount=1");
        check(
            &Call::UnassignAddresses {
                eni: "eni-1".into(),
                addresses: vec!["10.0.1.5".parse().unwrap(), "10.0.1.6".parse().unwrap()],
            },
            "NetworkInterfaceId=eni-1 PrivateIpAddress.1=10.0.1.5 PrivateIpAddress.2=10.0.1.6",
        );
        check(
            &Call::UnassignPrefixes { eni: "eni-1".into(), prefixes: vec!["10.0.1.16/28".parse().unwrap()] },
            "NetworkInterfaceId=eni-1 Ipv4Prefix.1=10.0.1.16/28",
        );
        check(&Call::Detach("eni-attach-7".into()), "AttachmentId=eni-attach-7");
        check(&Call::Delete("eni-1".into()), "NetworkInterfaceId=eni-1");
    }

    #[test]
    fn encoding_is_that_of_rfc_3986() {
        let body = encode([("Tag.1.Key", "node.k8s.amazonaws.com/createdAt"), ("Tag.1.Value", "2026-11-21T01:30:00Z")]);
        assert_eq!(body, "Tag.1.Key=node.k8s.amazonaws.com%2FcreatedAt&Tag.1.Value=2026-11-21T01%3A30%3A00Z");
        assert_eq!(encode([("a b", "+&=~*ü")]), "a%20b=%2B%26%3D~%2A%C3%BC");
        assert_eq!(encode([]), "");
    }
}
