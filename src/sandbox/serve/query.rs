//! The EC2 Query protocol read by a strict server (`spec/aws.md` 6.1, 7): form fields to a call. What EC2 would not know
//! is an error here, and so is what it would silently ignore: the sandbox is there to find a client's mistakes.

use crate::model::ec2::{Call, ConntrackTimeouts, Count, Create};
use crate::model::ids::EniId;
use crate::model::map::Map;
use crate::sim::vpc::Filter;
use std::str::FromStr;

/// The version of the API that is spoken.
pub const VERSION: &str = "2016-11-15";

/// Largest page, and the size without `MaxResults`.
pub const PAGE_MAX: usize = 1000;

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Any action but the next one.
    Call(Call),
    /// DescribeNetworkInterfaces.
    Interfaces {
        /// Ids; unknown ones are an error.
        ids: Vec<EniId>,
        /// Filters.
        filters: Vec<Filter>,
        /// Size of a page.
        page: usize,
        /// Only ENIs with a greater id.
        after: Option<EniId>,
    },
}

/// A request that EC2 would refuse before looking at any resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The action, as far as it is known.
    pub action: &'static str,
    /// EC2's code.
    pub code: &'static str,
    /// Text.
    pub message: String,
}

type Read<T> = Result<T, Malformed>;

fn bad<T>(code: &'static str, message: impl Into<String>) -> Read<T> {
    Err(Malformed { action: "unknown", code, message: message.into() })
}

/// Decodes `application/x-www-form-urlencoded`. A field that comes twice is an error.
pub fn decode_form(body: &str) -> Read<Map<String, String>> {
    let mut fields = Map::new();
    for pair in body.split('&').filter(|pair| !pair.is_empty()) {
        let Some((name, value)) = pair.split_once('=') else {
            return bad("MalformedQueryString", format!("no value in {pair:?}"));
        };
        let (Some(name), Some(value)) = (unescape(name), unescape(value)) else {
            return bad("MalformedQueryString", format!("bad escape in {pair:?}"));
        };
        if fields.insert(name.clone(), value).is_some() {
            return bad("InvalidParameterCombination", format!("The parameter {name} is given twice"));
        }
    }
    Ok(fields)
}

// Percent escapes and `+`; None for what is not UTF-8 or no escape.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                let digits = std::str::from_utf8(&digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
                u8::from_str_radix(digits, 16).ok()?
            }
            b'+' => b' ',
            byte => byte,
        });
    }
    String::from_utf8(out).ok()
}

/// Reads the body of a request.
pub fn read(body: &str) -> Read<Asked> {
    let mut form = Form(decode_form(body)?);
    let action = form.need("Action")?;
    let version = form.need("Version")?;
    let Some(action) = ACTIONS.iter().find(|known| ***known == *action) else {
        return bad("InvalidAction", format!("The action {action} is not valid for this web service."));
    };
    let named = |malformed: Malformed| Malformed { action, ..malformed };
    if version != VERSION {
        return bad("InvalidParameterValue", format!("Version {version} is not {VERSION}")).map_err(named);
    }
    let asked = form.ask(action).map_err(named)?;
    match form.0.keys().next() {
        Some(left) => bad("UnknownParameter", format!("The parameter {left} is not recognized")).map_err(named),
        None => Ok(asked),
    }
}

/// The actions that are known.
pub const ACTIONS: &[&str] = &[
    "AssignIpv6Addresses",
    "AssignPrivateIpAddresses",
    "AttachNetworkInterface",
    "CreateNetworkInterface",
    "CreateTags",
    "DeleteNetworkInterface",
    "DescribeInstanceTypes",
    "DescribeNetworkInterfaces",
    "DescribeSubnets",
    "DetachNetworkInterface",
    "ModifyNetworkInterfaceAttribute",
    "UnassignPrivateIpAddresses",
];

// The fields that nobody has read yet.
struct Form(Map<String, String>);

impl Form {
    fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    fn need(&mut self, name: &str) -> Read<String> {
        match self.take(name) {
            Some(value) if !value.is_empty() => Ok(value),
            _ => bad("MissingParameter", format!("The request must contain the parameter {name}")),
        }
    }

    fn number<T: FromStr>(&mut self, name: &str) -> Read<Option<T>> {
        let Some(text) = self.take(name) else { return Ok(None) };
        match text.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => bad("InvalidParameterValue", format!("Value ({text}) for parameter {name} is invalid.")),
        }
    }

    fn need_number<T: FromStr>(&mut self, name: &str) -> Read<T> {
        let missing = || format!("The request must contain the parameter {name}");
        self.number(name)?.map_or_else(|| bad("MissingParameter", missing()), Ok)
    }

    // Name.1, Name.2, … without a gap.
    fn list(&mut self, name: &str) -> Vec<String> {
        (1..).map_while(|number: u32| self.take(&format!("{name}.{number}"))).collect()
    }

    fn parsed<T: FromStr>(&mut self, name: &str) -> Read<Vec<T>> {
        let parse = |text: String| match text.parse() {
            Ok(value) => Ok(value),
            Err(_) => bad("InvalidParameterValue", format!("Value ({text}) for parameter {name} is invalid.")),
        };
        self.list(name).into_iter().map(parse).collect()
    }

    fn tags(&mut self, prefix: &str) -> Read<Map<String, String>> {
        let mut tags = Map::new();
        for number in 1_u32.. {
            let Some(key) = self.take(&format!("{prefix}Tag.{number}.Key")) else { break };
            let value = self.take(&format!("{prefix}Tag.{number}.Value")).unwrap_or_default();
            if tags.insert(key.clone(), value).is_some() {
                return bad("InvalidParameterValue", format!("Duplicate tag key '{key}' specified."));
            }
        }
        Ok(tags)
    }

    fn filters(&mut self) -> Read<Vec<Filter>> {
        let mut filters = Vec::new();
        for number in 1_u32.. {
            let Some(name) = self.take(&format!("Filter.{number}.Name")) else { break };
            let values = self.list(&format!("Filter.{number}.Value"));
            if values.is_empty() {
                return bad("InvalidParameterValue", format!("The filter '{name}' has no value"));
            }
            filters.push(Filter { name, values });
        }
        Ok(filters)
    }

    fn eni(&mut self) -> Read<EniId> {
        self.need("NetworkInterfaceId").map(EniId)
    }

    fn ask(&mut self, action: &str) -> Read<Asked> {
        Ok(Asked::Call(match action {
            "DescribeNetworkInterfaces" => return self.interfaces(),
            "DescribeSubnets" => self.subnets()?,
            "DescribeInstanceTypes" => match self.list("InstanceType").as_slice() {
                [one] => Call::DescribeInstanceType(one.clone()),
                _ => return bad("MissingParameter", "the sandbox describes exactly one instance type"),
            },
            "CreateNetworkInterface" => Call::Create(self.create()?),
            "AttachNetworkInterface" => Call::Attach {
                eni: self.eni()?,
                instance: self.need("InstanceId")?.into(),
                device: self.need_number("DeviceIndex")?,
                card: self.number("NetworkCardIndex")?.unwrap_or(0),
            },
            "ModifyNetworkInterfaceAttribute" => self.modify()?,
            "CreateTags" => {
                let Some(eni) = self.take("ResourceId.1").map(EniId) else {
                    return bad("MissingParameter", "The request must contain the parameter resourceIdSet");
                };
                let tags = self.tags("")?;
                if tags.is_empty() {
                    return bad("MissingParameter", "The request must contain the parameter Tag");
                }
                Call::CreateTags { eni, tags }
            }
            "AssignPrivateIpAddresses" => {
                let eni = self.eni()?;
                match self.count()? {
                    Some(count @ (Count::Addresses(1..) | Count::Prefixes(1..))) => Call::Assign { eni, count },
                    _ => return bad("InvalidParameterCombination", "a count of addresses or of prefixes is needed"),
                }
            }
            "AssignIpv6Addresses" => {
                let eni = self.eni()?;
                match self.need_number::<u32>("Ipv6PrefixCount")? {
                    1 => Call::AssignIpv6Prefix(eni),
                    _ => return bad("InvalidParameterValue", "the sandbox assigns one IPv6 prefix at a time"),
                }
            }
            "UnassignPrivateIpAddresses" => self.unassign()?,
            "DetachNetworkInterface" => Call::Detach(self.need("AttachmentId")?.into()),
            "DeleteNetworkInterface" => Call::Delete(self.eni()?),
            _ => return bad("InvalidAction", format!("The action {action} is not valid for this web service.")),
        }))
    }

    fn interfaces(&mut self) -> Read<Asked> {
        let ids = self.list("NetworkInterfaceId").into_iter().map(EniId).collect::<Vec<_>>();
        let filters = self.filters()?;
        let page = self.number::<usize>("MaxResults")?;
        let token = self.take("NextToken");
        if !ids.is_empty() && page.is_some() {
            return bad("InvalidParameterCombination", "MaxResults cannot be combined with NetworkInterfaceId");
        }
        if page.is_some_and(|size| !(5..=PAGE_MAX).contains(&size)) {
            return bad("InvalidParameterValue", "MaxResults must be between 5 and 1000");
        }
        let after = match token {
            None => None,
            Some(token) => match read_token(&token) {
                Some(eni) => Some(eni),
                None => return bad("InvalidParameterValue", "NextToken is invalid"),
            },
        };
        Ok(Asked::Interfaces { ids, filters, page: page.unwrap_or(PAGE_MAX), after })
    }

    fn subnets(&mut self) -> Read<Call> {
        let (mut vpc, mut zone) = (None, None);
        for Filter { name, mut values } in self.filters()? {
            let place = match name.as_str() {
                "vpc-id" => &mut vpc,
                "availability-zone" => &mut zone,
                _ => return bad("InvalidParameterValue", format!("The filter '{name}' is invalid")),
            };
            *place = values.pop();
        }
        match (vpc, zone) {
            (Some(vpc), Some(zone)) => Ok(Call::DescribeSubnets { vpc: vpc.into(), zone }),
            _ => bad("MissingParameter", "the sandbox describes subnets by vpc-id and availability-zone"),
        }
    }

    fn count(&mut self) -> Read<Option<Count>> {
        let mut counts = Vec::new();
        counts.extend(self.number("SecondaryPrivateIpAddressCount")?.map(Count::Addresses));
        counts.extend(self.number("Ipv4PrefixCount")?.map(Count::Prefixes));
        counts.extend(self.number("Ipv6AddressCount")?.map(Count::Ipv6Addresses));
        match counts.as_slice() {
            [] => Ok(None),
            [one] => Ok(Some(*one)),
            _ => bad("InvalidParameterCombination", "more than one kind of address is asked for"),
        }
    }

    fn create(&mut self) -> Read<Create> {
        let tracking = "ConnectionTrackingSpecification";
        let create = Create {
            subnet: self.need("SubnetId")?.into(),
            description: self.take("Description").unwrap_or_default(),
            groups: self.list("SecurityGroupId").into_iter().map(Into::into).collect(),
            count: self.count()?.unwrap_or(Count::Addresses(0)),
            conntrack: ConntrackTimeouts {
                tcp_established_s: self.number(&format!("{tracking}.TcpEstablishedTimeout"))?,
                udp_stream_s: self.number(&format!("{tracking}.UdpStreamTimeout"))?,
                udp_s: self.number(&format!("{tracking}.UdpTimeout"))?,
            },
            tags: self.tags("TagSpecification.1.")?,
            client_token: self.take("ClientToken").unwrap_or_default(),
        };
        let resource = self.take("TagSpecification.1.ResourceType");
        match (create.tags.is_empty(), resource.as_deref()) {
            (true, None) | (false, Some("network-interface")) => Ok(create),
            _ => bad("InvalidParameterValue", "Tag specification resource type must have a value: network-interface"),
        }
    }

    fn modify(&mut self) -> Read<Call> {
        let eni = self.eni()?;
        let groups = self.list("SecurityGroupId");
        match self.take("Attachment.AttachmentId") {
            // One attribute per call is EC2's rule.
            Some(_) if !groups.is_empty() => {
                bad("InvalidParameterCombination", "Fields for multiple attribute types specified")
            }
            Some(attachment) => match self.need("Attachment.DeleteOnTermination")?.as_str() {
                "true" => Ok(Call::DeleteOnTermination { eni, attachment: attachment.into() }),
                _ => bad("InvalidParameterValue", "the sandbox knows only DeleteOnTermination=true"),
            },
            None if groups.is_empty() => bad("MissingParameter", "No attributes specified."),
            None => Ok(Call::ModifyGroups { eni, groups: groups.into_iter().map(Into::into).collect() }),
        }
    }

    fn unassign(&mut self) -> Read<Call> {
        let eni = self.eni()?;
        let (addresses, prefixes) = (self.parsed("PrivateIpAddress")?, self.parsed("Ipv4Prefix")?);
        match (addresses.is_empty(), prefixes.is_empty()) {
            (false, true) => Ok(Call::UnassignAddresses { eni, addresses }),
            (true, false) => Ok(Call::UnassignPrefixes { eni, prefixes }),
            _ => bad("InvalidParameterCombination", "either addresses or prefixes must be given"),
        }
    }
}

/// The token of the page that follows after this ENI.
pub fn token(last: &EniId) -> String {
    format!("after-{last}")
}

fn read_token(token: &str) -> Option<EniId> {
    token.strip_prefix("after-").filter(|eni| eni.starts_with("eni-")).map(EniId::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str, expect: &Result<Asked, &str>) {
        let body = body.replacen("Action=", "Version=2016-11-15&Action=", 1);
        assert_eq!(read(&body).map_err(|malformed| malformed.code), *expect, "{body}");
    }

    #[test]
    fn requests_are_read_strictly() {
        let delete = Call::Delete("eni-1".into());
        check("Action=DeleteNetworkInterface&NetworkInterfaceId=eni-1", &Ok(Asked::Call(delete)));
        check("Action=DeleteNetworkInterface", &Err("MissingParameter"));
        check("Action=DeleteNetworkInterface&NetworkInterfaceId=eni-1&Force=true", &Err("UnknownParameter"));
        check(
            "Action=DeleteNetworkInterface&NetworkInterfaceId=a&NetworkInterfaceId=b",
            &Err("InvalidParameterCombination"),
        );
        check("Action=RunInstances", &Err("InvalidAction"));
        check("Action=DeleteNetworkInterface&NetworkInterfaceId=%zz", &Err("MalformedQueryString"));
        check("Action=DescribeNetworkInterfaces&MaxResults=4", &Err("InvalidParameterValue"));
        check(
            "Action=DescribeNetworkInterfaces&MaxResults=5&NetworkInterfaceId.1=eni-1",
            &Err("InvalidParameterCombination"),
        );
        check("Action=DescribeNetworkInterfaces&NextToken=zz", &Err("InvalidParameterValue"));
        check("Action=AssignPrivateIpAddresses&NetworkInterfaceId=eni-1", &Err("InvalidParameterCombination"));
        check(
            "Action=UnassignPrivateIpAddresses&NetworkInterfaceId=e&PrivateIpAddress.1=x",
            &Err("InvalidParameterValue"),
        );
        check("Action=CreateNetworkInterface&SubnetId=s&TagSpecification.1.Tag.1.Key=k", &Err("InvalidParameterValue"));
        // A gap in a list leaves a field over.
        check(
            "Action=ModifyNetworkInterfaceAttribute&NetworkInterfaceId=e&SecurityGroupId.2=sg",
            &Err("MissingParameter"),
        );
        check(
            "Action=DescribeNetworkInterfaces&Filter.1.Name=tag-key&Filter.1.Value.1=a%2Fb&MaxResults=5",
            &Ok(Asked::Interfaces { ids: vec![], filters: vec![Filter::new("tag-key", "a/b")], page: 5, after: None }),
        );
        assert_eq!(
            read("Action=DeleteNetworkInterface&NetworkInterfaceId=eni-1").unwrap_err().code,
            "MissingParameter"
        );
    }

    proptest::proptest! {
        #[test]
        fn hostile_forms_never_panic(
            action in proptest::sample::select(ACTIONS),
            fields in proptest::collection::vec(("[A-Za-z.1-3]{0,20}", ".{0,12}"), 0..6),
            tail in ".{0,40}",
        ) {
            let pairs = fields.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            let sound = [("Action", action), ("Version", VERSION)];
            let body = crate::aws::ec2::encode(sound.into_iter().chain(pairs));
            let _ = read(&body);
            let _ = read(&format!("{body}&{tail}"));
        }

        #[test]
        fn what_is_escaped_comes_back(name in ".{1,20}", value in ".{0,40}") {
            let body = crate::aws::ec2::encode([(name.as_str(), value.as_str())]);
            proptest::prop_assert_eq!(decode_form(&body).unwrap(), Map::from([(name, value)]));
        }
    }

    #[test]
    fn tokens_come_back() {
        let eni = EniId::from("eni-0123");
        assert_eq!(read_token(&token(&eni)), Some(eni));
        for bad in ["", "eni-1", "after-", "after-i-1"] {
            assert_eq!(read_token(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_the_client_sends_is_understood() {
        for call in crate::sandbox::serve::tests::calls() {
            let fields = crate::aws::ec2::form(&call);
            let pairs = fields.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            match read(&crate::aws::ec2::encode(pairs)) {
                Ok(Asked::Call(read)) => assert_eq!(read, call),
                Ok(Asked::Interfaces { ids, filters, .. }) => {
                    assert!(ids.is_empty() && !filters.is_empty() && call.action() == "DescribeNetworkInterfaces");
                }
                Err(malformed) => panic!("{call:?}: {malformed:?}"),
            }
        }
    }
}
