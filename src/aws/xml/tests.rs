use super::*;
use crate::model::ec2::{Count, Create};
use proptest::prelude::*;

const INTERFACES: &str = include_str!("../../../testdata/ec2/interfaces.xml");
const SUBNETS: &str = include_str!("../../../testdata/ec2/subnets.xml");
const INSTANCE_TYPE: &str = include_str!("../../../testdata/ec2/instance_type.xml");
const CREATED: &str = include_str!("../../../testdata/ec2/created.xml");
const ATTACHED: &str = include_str!("../../../testdata/ec2/attached.xml");
const ASSIGNED_ADDRESSES: &str = include_str!("../../../testdata/ec2/assigned_addresses.xml");
const ASSIGNED_PREFIXES: &str = include_str!("../../../testdata/ec2/assigned_prefixes.xml");
const ASSIGNED_IPV6: &str = include_str!("../../../testdata/ec2/assigned_ipv6.xml");
const ERROR: &str = include_str!("../../../testdata/ec2/error.xml");
const STS: &str = include_str!("../../../testdata/ec2/sts.xml");

fn attached() -> Call {
    Call::DescribeAttached("i-8555".into())
}

fn subnets() -> Call {
    Call::DescribeSubnets { vpc: "vpc-1".into(), zone: "a".into() }
}

fn create() -> Call {
    Call::Create(Create {
        subnet: "subnet-1a96".into(),
        description: String::new(),
        groups: Vec::new(),
        count: Count::Addresses(1),
        conntrack: ConntrackTimeouts::default(),
        tags: Map::new(),
        client_token: "t".into(),
    })
}

fn attach() -> Call {
    Call::Attach { eni: "eni-1".into(), instance: "i-1".into(), device: 1, card: 0 }
}

fn assign() -> Call {
    Call::Assign { eni: "eni-5881".into(), count: Count::Addresses(2) }
}

/// Every call that reads an answer, with one that it understands.
fn samples() -> Vec<(Call, &'static str)> {
    vec![
        (attached(), INTERFACES),
        (Call::DescribeOne("eni-1".into()), INTERFACES),
        (Call::DescribeLeaked { vpc: "vpc-1".into(), tags: Vec::new() }, INTERFACES),
        (subnets(), SUBNETS),
        (Call::DescribeInstanceType("c6in.32xlarge".into()), INSTANCE_TYPE),
        (create(), CREATED),
        (attach(), ATTACHED),
        (assign(), ASSIGNED_ADDRESSES),
        (assign(), ASSIGNED_PREFIXES),
        (Call::AssignIpv6Prefix("eni-1".into()), ASSIGNED_IPV6),
    ]
}

fn reply(call: &Call, text: &str) -> Reply {
    parse_reply(call, text).unwrap().reply
}

#[test]
fn interfaces() {
    let page = parse_reply(&attached(), INTERFACES).unwrap();
    assert_eq!(page.next_token.as_deref(), Some("page-2"));
    let expected = Interface {
        id: "eni-5881".into(),
        mac: Some("02:ef:2a:98:e5:5a".parse().unwrap()),
        description: "aws-K8S-i-8555".into(),
        interface_type: "interface".into(),
        subnet: "subnet-1a96".into(),
        status: "in-use".into(),
        attachment: Some(Attachment {
            id: "eni-attach-7b00".into(),
            instance: "i-8555".into(),
            device: 1,
            card: 2,
            delete_on_termination: true,
        }),
        primary_ipv4: Some("10.0.1.13".parse().unwrap()),
        secondary_ipv4s: vec!["10.0.1.253".parse().unwrap(), "10.0.1.254".parse().unwrap()],
        v4_prefixes: vec!["10.0.1.16/28".parse().unwrap()],
        ipv6s: vec!["2001:db8::7".parse().unwrap()],
        v6_prefixes: vec!["2001:db8:0:1:5b1f::/80".parse().unwrap()],
        groups: vec!["sg-596a".into()],
        conntrack: ConntrackTimeouts { tcp_established_s: Some(350), ..ConntrackTimeouts::default() },
        tags: Map::from([
            ("node.k8s.amazonaws.com/instance_id".into(), "i-8555".into()),
            ("note".into(), " with <spaces> ".into()),
            ("empty".into(), String::new()),
        ]),
    };
    let bare = Interface { id: "eni-bare".into(), status: "available".into(), ..Interface::default() };
    assert_eq!(page.reply, Reply::Interfaces(vec![expected, bare]));
    let empty = "<DescribeNetworkInterfacesResponse><networkInterfaceSet/></DescribeNetworkInterfacesResponse>";
    assert_eq!(parse_reply(&attached(), empty).unwrap(), Page { reply: Reply::Interfaces(vec![]), next_token: None });
}

#[test]
fn the_primary_address_may_be_told_beside_the_set() {
    let text = "<e:DescribeNetworkInterfacesResponse xmlns:e='urn:x'><e:networkInterfaceSet><e:item>\
        <e:networkInterfaceId>eni-1</e:networkInterfaceId><e:privateIpAddress>10.0.0.4</e:privateIpAddress>\
        <e:privateIpAddressesSet><e:item><e:privateIpAddress>10.0.0.4</e:privateIpAddress></e:item>\
        <e:item><e:privateIpAddress>10.0.0.5</e:privateIpAddress></e:item></e:privateIpAddressesSet><e:attachment/>\
        </e:item></e:networkInterfaceSet></e:DescribeNetworkInterfacesResponse>";
    let Reply::Interfaces(enis) = reply(&attached(), text) else { panic!() };
    assert_eq!(enis[0].primary_ipv4, Some("10.0.0.4".parse().unwrap()));
    assert_eq!(enis[0].secondary_ipv4s, ["10.0.0.5".parse::<std::net::Ipv4Addr>().unwrap()]);
    assert_eq!(enis[0].attachment, None);
}

#[test]
fn subnets_come_by_free_addresses() {
    let Reply::Subnets(found) = reply(&subnets(), SUBNETS) else { panic!() };
    let order: Vec<(&str, u32)> = found.iter().map(|subnet| (subnet.id.as_str(), subnet.free)).collect();
    assert_eq!(order, [("subnet-many", 250), ("subnet-few", 5), ("subnet-few-too", 5)]);
    assert_eq!(found[0].tags.get("kubernetes.io/role/cni").map(String::as_str), Some("1"));
}

#[test]
fn instance_types() {
    let call = Call::DescribeInstanceType("c6in.32xlarge".into());
    let expected = InstanceType {
        name: "c6in.32xlarge".into(),
        hypervisor: "nitro".into(),
        bare_metal: false,
        ipv4_per_eni: 50,
        default_card: 0,
        cards: vec![(0, 8), (1, 8)],
    };
    assert_eq!(reply(&call, INSTANCE_TYPE), Reply::InstanceType(expected.clone()));
    let single = INSTANCE_TYPE.replace("networkCards", "other").replace("<hypervisor>nitro</hypervisor>", "");
    let expected = InstanceType { hypervisor: "unknown".into(), cards: vec![(0, 16)], ..expected };
    assert_eq!(reply(&call, &single), Reply::InstanceType(expected));
    let check = |text: String, message: &str| {
        let error = parse_reply(&call, &text).unwrap_err().to_string();
        assert!(error.ends_with(message), "{error}");
    };
    check(INSTANCE_TYPE.replace(">50<", ">0<"), "no ENI or address limit");
    check(INSTANCE_TYPE.replace(">8<", ">0<"), "no ENI or address limit");
    check(INSTANCE_TYPE.replace(">8<", ">-1<"), "maximumNetworkInterfaces: cannot read \"-1\"");
    check(INSTANCE_TYPE.replace("instanceTypeSet", "x"), "0 instance types instead of one");
}

#[test]
fn what_changes_give() {
    let Reply::Created(eni) = reply(&create(), CREATED) else { panic!() };
    assert_eq!((eni.id.as_str(), eni.mac, eni.attachment), ("eni-new", "02:00:00:00:00:07".parse().ok(), None));
    assert_eq!(eni.secondary_ipv4s, ["10.0.1.21".parse::<std::net::Ipv4Addr>().unwrap()]);
    assert_eq!(reply(&attach(), ATTACHED), Reply::Attached("eni-attach-1".into()));
    let nets = |texts: &[&str]| Reply::Assigned(texts.iter().map(|text| text.parse().unwrap()).collect());
    assert_eq!(reply(&assign(), ASSIGNED_ADDRESSES), nets(&["10.0.1.30/32", "10.0.1.31/32"]));
    assert_eq!(reply(&assign(), ASSIGNED_PREFIXES), nets(&["10.0.1.32/28"]));
    let v6 = Call::AssignIpv6Prefix("eni-1".into());
    assert_eq!(reply(&v6, ASSIGNED_IPV6), nets(&["2001:db8:0:1:5b1f::/80"]));
    let wrapped = ASSIGNED_IPV6.replace("<item>", "<item><ipv6Prefix>").replace("</item>", "</ipv6Prefix></item>");
    assert_eq!(reply(&v6, &wrapped), nets(&["2001:db8:0:1:5b1f::/80"]));
}

#[test]
fn calls_without_a_result_succeed_whatever_comes() {
    for call in [
        Call::DeleteOnTermination { eni: "eni-1".into(), attachment: "a".into() },
        Call::ModifyGroups { eni: "eni-1".into(), groups: Vec::new() },
        Call::CreateTags { eni: "eni-1".into(), tags: Map::new() },
        Call::UnassignAddresses { eni: "eni-1".into(), addresses: Vec::new() },
        Call::UnassignPrefixes { eni: "eni-1".into(), prefixes: Vec::new() },
        Call::Detach("a".into()),
        Call::Delete("eni-1".into()),
    ] {
        for text in ["", "<html>", "<X><return>true</return></X>"] {
            assert_eq!(reply(&call, text), Reply::Done);
        }
    }
}

#[test]
fn errors_of_ec2_and_sts() {
    let error = parse_error(ERROR).unwrap();
    assert_eq!(error.code, "InvalidNetworkInterfaceID.NotFound");
    assert_eq!(error.message, "The networkInterface ID 'eni-0123456789abcdef0' does not exist");
    assert_eq!(error.request_id, "8bc4");
    let sts = "<ErrorResponse xmlns='https://sts'><Error><Type>Sender</Type><Code>ExpiredTokenException</Code>\
        <Message>m</Message></Error><RequestId>r</RequestId></ErrorResponse>";
    let expected = ApiError { code: "ExpiredTokenException".into(), message: "m".into(), request_id: "r".into() };
    assert_eq!(parse_error(sts), Some(expected));
    for none in ["", "<html><body>502</body></html>", "<Response/>", "<Response><Errors><Error/></Errors></Response>"] {
        assert_eq!(parse_error(none), None, "{none}");
    }
}

#[test]
fn assumed_roles() {
    let [access_key, secret, token, end] = parse_assumed_role(STS).unwrap();
    assert_eq!((access_key.as_str(), secret.as_str()), ("ASIAWEB", "secret/+="));
    assert_eq!((token.as_str(), end.as_str()), ("FwoG/+==", "2126-11-21T02:36:42Z"));
    assert!(parse_assumed_role(&STS.replace("SessionToken", "x")).is_err());
    assert!(parse_assumed_role("<a/>").is_err());
}

#[test]
fn hostile_input_is_refused() {
    let bomb = format!(
        "<!DOCTYPE x [<!ENTITY a \"{}\"><!ENTITY b \"&a;&a;&a;&a;\">]><DescribeSubnetsResponse>&b;</DescribeSubnetsResponse>",
        "x".repeat(1000)
    );
    let external = "<!DOCTYPE x SYSTEM 'file:///etc/passwd'><DescribeSubnetsResponse/>".to_owned();
    let huge = format!("<DescribeSubnetsResponse>{}</DescribeSubnetsResponse>", " ".repeat(9 * 1024 * 1024));
    let many = format!("<DescribeSubnetsResponse>{}</DescribeSubnetsResponse>", "<a/>".repeat(1_600_000));
    let wrong = SUBNETS.replace("DescribeSubnets", "DescribeInstances");
    let page = "<!DOCTYPE html><html><body>Please log in</body></html>".to_owned();
    for (text, message) in [
        (bomb, "DTD"),
        (external, "DTD"),
        (huge, "bytes are more than"),
        (many, "nodes limit"),
        (wrong, "root is <DescribeInstancesResponse>"),
        (page, "DTD"),
        (String::new(), "root"),
        ("\u{0}".to_owned(), ""),
        ("<html>login</html>".to_owned(), "root is <html>"),
    ] {
        let error = parse_reply(&subnets(), &text).unwrap_err().to_string();
        assert!(error.starts_with("parse DescribeSubnets answer: ") && error.contains(message), "{error}");
        assert_eq!(parse_error(&text), None);
    }
}

#[test]
fn deep_nesting_does_no_harm() {
    let deep = format!("{}{}", "<a>".repeat(200_000), "</a>".repeat(200_000));
    assert!(parse_reply(&subnets(), &deep).is_err());
    let inside = format!("<DescribeSubnetsResponse><subnetSet>{deep}</subnetSet></DescribeSubnetsResponse>");
    assert_eq!(reply(&subnets(), &inside), Reply::Subnets(Vec::new()));
}

#[test]
fn every_truncation_is_an_error() {
    for (call, text) in samples() {
        let text = text.trim_end();
        for end in (0..text.len()).filter(|end| text.is_char_boundary(*end)) {
            assert!(parse_reply(&call, &text[..end]).is_err(), "{} at {end}", call.action());
        }
        assert!(parse_reply(&call, text).is_ok());
    }
}

#[test]
fn values_that_cannot_be_read_name_their_place() {
    let check = |from: &str, to: &str, message: &str| {
        let error = parse_reply(&attached(), &INTERFACES.replace(from, to)).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    check("10.0.1.254", "10.0.1.256", "interface \"eni-5881\": privateIpAddress: cannot read \"10.0.1.256\"");
    check("<deviceIndex>1", "<deviceIndex>-1", "deviceIndex");
    check("02:ef", "2:ef", "macAddress");
    check("10.0.1.16/28", "10.0.1.16", "ipv4Prefix");
    check("<networkInterfaceId>eni-bare</networkInterfaceId>", "", "has no networkInterfaceId");
    check("<groupId>sg-596a</groupId>", "", "has no groupId");
}

proptest! {
    #[test]
    fn no_input_panics(text in "\\PC{0,200}", at in 0usize..2000, insert in "[<>/a-z&;\"0-9]{0,8}") {
        for (call, sample) in samples() {
            let _ = parse_reply(&call, &text);
            let mut changed = sample.to_owned();
            let at = at.min(changed.len());
            if changed.is_char_boundary(at) {
                changed.insert_str(at, &insert);
            }
            let _ = parse_reply(&call, &changed);
        }
        let _ = parse_error(&text);
    }
}
