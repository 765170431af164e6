//! EC2's answers, from XML to values (`spec/aws.md` 6.3 and 7). Pure, and total on hostile input: the size is bounded
//! before, the number of nodes while parsing, DTDs are refused, elements are found by local name, unknown ones ignored.

use crate::error::{Context, Error, Result};
use crate::model::ec2::{Attachment, Call, ConntrackTimeouts, InstanceType, Interface, Reply, Subnet};
use crate::model::ids::GroupId;
use crate::model::map::Map;
use crate::model::order::{self, Gather as _};
use ipnet::IpNet;
use roxmltree::{Document, Node, ParsingOptions};
use std::str::FromStr;

/// Bytes of an answer. A full page of ENIs with 50 addresses each has 3 MB.
pub const SIZE_LIMIT: usize = 8 * 1024 * 1024;
/// Nodes of an answer, texts included; such a page has a fifth of it.
const NODES_LIMIT: u32 = 1_000_000;

/// One page of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// What it holds.
    pub reply: Reply,
    /// Where the next page starts, if there is one.
    pub next_token: Option<String>,
}

/// An error as EC2 and STS tell it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiError {
    /// `InvalidNetworkInterfaceID.NotFound`.
    pub code: String,
    /// Text for people.
    pub message: String,
    /// May be empty.
    pub request_id: String,
}

/// Reads the body of an answer with status 200. Calls that give nothing succeed whatever the body is.
pub fn parse_reply(call: &Call, text: &str) -> Result<Page> {
    let done = Page { reply: Reply::Done, next_token: None };
    match call {
        Call::DeleteOnTermination { .. }
        | Call::ModifyGroups { .. }
        | Call::CreateTags { .. }
        | Call::UnassignAddresses { .. }
        | Call::UnassignPrefixes { .. }
        | Call::Detach(_)
        | Call::Delete(_) => Ok(done),
        _ => parse_page(call, text).with_context(|| format!("parse {} answer", call.action())),
    }
}

fn parse_page(call: &Call, text: &str) -> Result<Page> {
    let document = parse(text)?;
    let root = document.root_element();
    let wanted = format!("{}Response", call.action());
    if root.tag_name().name() != wanted {
        return Err(Error::new(format!("root is <{}>, not <{wanted}>", root.tag_name().name())));
    }
    let reply = match call {
        Call::DescribeAttached(_) | Call::DescribeOne(_) | Call::DescribeLeaked { .. } => {
            Reply::Interfaces(items(root, "networkInterfaceSet").map(interface).collect::<Result<_>>()?)
        }
        Call::DescribeSubnets { .. } => {
            let mut subnets: Vec<Subnet> = items(root, "subnetSet").map(subnet).collect::<Result<_>>()?;
            most_free_first(&mut subnets);
            Reply::Subnets(subnets)
        }
        Call::DescribeInstanceType(_) => {
            let types: Vec<Node<'_, '_>> = items(root, "instanceTypeSet").collect();
            let [one] = types[..] else {
                return Err(Error::new(format!("{} instance types instead of one", types.len())));
            };
            Reply::InstanceType(instance_type(one)?)
        }
        Call::Create(_) => {
            let made = child(root, "networkInterface").ok_or_else(|| Error::new("no networkInterface"))?;
            Reply::Created(Box::new(interface(made)?))
        }
        Call::Attach { .. } => Reply::Attached(required(root, "attachmentId")?.into()),
        Call::Assign { .. } | Call::AssignIpv6Prefix(_) => Reply::Assigned(assigned(root)?),
        // Calls that give nothing were answered before.
        _ => Reply::Done,
    };
    Ok(Page { reply, next_token: text_of(root, "nextToken").map(str::to_owned) })
}

/// Most free addresses first; equals keep their order (`spec/aws.md` 7.12).
pub(super) fn most_free_first(subnets: &mut [Subnet]) {
    order::sort_by_key(subnets, |subnet| std::cmp::Reverse(subnet.free));
}

/// Reads the body of an answer with another status; `None` if it is not an error as EC2 or STS tells it.
pub fn parse_error(text: &str) -> Option<ApiError> {
    let document = parse(text).ok()?;
    let root = document.root_element();
    // EC2: Response/Errors/Error and RequestID. STS: ErrorResponse/Error and RequestId. Emulators mix them.
    if !matches!(root.tag_name().name(), "Response" | "ErrorResponse") {
        return None;
    }
    let error = child(child(root, "Errors").unwrap_or(root), "Error")?;
    let code = text_of(error, "Code")?.to_owned();
    let request_id = text_of(root, "RequestID").or_else(|| text_of(root, "RequestId")).unwrap_or_default();
    Some(ApiError {
        code,
        message: text_of(error, "Message").unwrap_or_default().to_owned(),
        request_id: request_id.to_owned(),
    })
}

/// The credentials in an STS answer: access key, secret, token, expiration (`spec/aws.md` 5.2).
pub fn parse_assumed_role(text: &str) -> Result<[String; 4]> {
    let read = || {
        let document = parse(text)?;
        let result = child(document.root_element(), "AssumeRoleWithWebIdentityResult");
        let credentials =
            result.and_then(|node| child(node, "Credentials")).ok_or_else(|| Error::new("no credentials"))?;
        let field = |name| required(credentials, name).map(str::to_owned);
        Ok([field("AccessKeyId")?, field("SecretAccessKey")?, field("SessionToken")?, field("Expiration")?])
    };
    read().map_err(|error: Error| error.context("parse AssumeRoleWithWebIdentity answer"))
}

fn parse(text: &str) -> Result<Document<'_>> {
    if text.len() > SIZE_LIMIT {
        return Err(Error::new(format!("{} bytes are more than the {SIZE_LIMIT} allowed", text.len())));
    }
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES_LIMIT, ..ParsingOptions::default() };
    Document::parse_with_options(text, options).map_err(Error::from)
}

fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.is_element() && child.tag_name().name() == name)
}

fn items<'a, 'i: 'a>(node: Node<'a, 'i>, set: &str) -> impl Iterator<Item = Node<'a, 'i>> {
    let items = child(node, set).into_iter().flat_map(|set| set.children());
    items.filter(|item| item.is_element() && item.tag_name().name() == "item")
}

/// The text of a child, trimmed; an empty one counts as absent.
fn text_of<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(node, name)?.text().map(str::trim).filter(|text| !text.is_empty())
}

fn required<'a>(node: Node<'a, '_>, name: &str) -> Result<&'a str> {
    text_of(node, name).ok_or_else(|| {
        let at = node.document().text_pos_at(node.range().start);
        Error::new(format!("<{}> at {at} has no {name}", node.tag_name().name()))
    })
}

fn parsed<T: FromStr>(text: &str, name: &str) -> Result<T> {
    text.parse().map_err(|_| Error::new(format!("{name}: cannot read {text:?}")))
}

fn optional<T: FromStr>(node: Node<'_, '_>, name: &str) -> Result<Option<T>> {
    text_of(node, name).map(|text| parsed(text, name)).transpose()
}

fn owned(node: Node<'_, '_>, name: &str) -> String {
    text_of(node, name).unwrap_or_default().to_owned()
}

fn list<T: FromStr>(node: Node<'_, '_>, set: &str, name: &str) -> Result<Vec<T>> {
    items(node, set).map(|item| required(item, name).and_then(|text| parsed(text, name))).collect()
}

fn tags(node: Node<'_, '_>) -> Map<String, String> {
    items(node, "tagSet")
        .filter_map(|item| text_of(item, "key").map(|key| (key.to_owned(), raw(item, "value"))))
        .gather()
}

/// The text of a child as it stands: a tag's value may begin or end with a space.
fn raw(node: Node<'_, '_>, name: &str) -> String {
    child(node, name).and_then(|node| node.text()).unwrap_or_default().to_owned()
}

fn interface(node: Node<'_, '_>) -> Result<Interface> {
    let read = || {
        let mut primary = None;
        let mut secondary = Vec::new();
        for item in items(node, "privateIpAddressesSet") {
            let address = parsed(required(item, "privateIpAddress")?, "privateIpAddress")?;
            if text_of(item, "primary") == Some("true") && primary.is_none() {
                primary = Some(address);
            } else {
                secondary.push(address);
            }
        }
        if primary.is_none() {
            primary = optional(node, "privateIpAddress")?;
            secondary.retain(|address| Some(*address) != primary);
        }
        let conntrack = match child(node, "connectionTrackingConfiguration") {
            None => ConntrackTimeouts::default(),
            Some(timeouts) => ConntrackTimeouts {
                tcp_established_s: optional(timeouts, "tcpEstablishedTimeout")?,
                udp_stream_s: optional(timeouts, "udpStreamTimeout")?,
                udp_s: optional(timeouts, "udpTimeout")?,
            },
        };
        Ok(Interface {
            id: required(node, "networkInterfaceId")?.into(),
            mac: optional(node, "macAddress")?,
            description: owned(node, "description"),
            interface_type: owned(node, "interfaceType"),
            subnet: owned(node, "subnetId").into(),
            status: owned(node, "status"),
            attachment: child(node, "attachment").map(attachment).transpose()?.flatten(),
            primary_ipv4: primary,
            secondary_ipv4s: secondary,
            v4_prefixes: list(node, "ipv4PrefixSet", "ipv4Prefix")?,
            ipv6s: list(node, "ipv6AddressesSet", "ipv6Address")?,
            v6_prefixes: list(node, "ipv6PrefixSet", "ipv6Prefix")?,
            groups: items(node, "groupSet")
                .map(|item| required(item, "groupId").map(GroupId::from))
                .collect::<Result<_>>()?,
            conntrack,
            tags: tags(node),
        })
    };
    let id = text_of(node, "networkInterfaceId").unwrap_or("?");
    read().map_err(|error: Error| error.context(format!("interface {id:?}")))
}

/// An attachment; an empty element is none, as for an ENI that is being detached.
fn attachment(node: Node<'_, '_>) -> Result<Option<Attachment>> {
    let Some(id) = text_of(node, "attachmentId") else { return Ok(None) };
    Ok(Some(Attachment {
        id: id.into(),
        instance: owned(node, "instanceId").into(),
        device: optional(node, "deviceIndex")?.unwrap_or(0),
        card: optional(node, "networkCardIndex")?.unwrap_or(0),
        delete_on_termination: text_of(node, "deleteOnTermination") == Some("true"),
    }))
}

fn subnet(node: Node<'_, '_>) -> Result<Subnet> {
    Ok(Subnet {
        id: required(node, "subnetId")?.into(),
        free: optional(node, "availableIpAddressCount")?.unwrap_or(0),
        tags: tags(node),
    })
}

fn instance_type(node: Node<'_, '_>) -> Result<InstanceType> {
    let name = required(node, "instanceType")?;
    let network = child(node, "networkInfo").ok_or_else(|| Error::new(format!("{name}: no networkInfo")))?;
    let enis: u32 = optional(network, "maximumNetworkInterfaces")?.unwrap_or(0);
    let mut cards = items(network, "networkCards")
        .map(|card| {
            let index = optional(card, "networkCardIndex")?.unwrap_or(0);
            Ok((index, optional(card, "maximumNetworkInterfaces")?.unwrap_or(0)))
        })
        .collect::<Result<Vec<(u32, u32)>>>()?;
    if cards.is_empty() {
        cards.push((0, enis));
    }
    let default_card = optional(network, "defaultNetworkCardIndex")?.unwrap_or(0);
    let ipv4_per_eni = optional(network, "ipv4AddressesPerInterface")?.unwrap_or(0);
    if ipv4_per_eni == 0 || !cards.iter().any(|(index, enis)| *index == default_card && *enis > 0) {
        return Err(Error::new(format!("unknown instance type {name:?}: no ENI or address limit")));
    }
    Ok(InstanceType {
        name: name.to_owned(),
        hypervisor: text_of(node, "hypervisor").unwrap_or("unknown").to_owned(),
        bare_metal: text_of(node, "bareMetal") == Some("true"),
        ipv4_per_eni,
        default_card,
        cards,
    })
}

fn assigned(root: Node<'_, '_>) -> Result<Vec<IpNet>> {
    let mut new = Vec::new();
    for address in list::<std::net::Ipv4Addr>(root, "assignedPrivateIpAddressesSet", "privateIpAddress")? {
        new.push(IpNet::from(std::net::IpAddr::from(address)));
    }
    new.extend(list::<IpNet>(root, "assignedIpv4PrefixSet", "ipv4Prefix")?);
    for item in items(root, "assignedIpv6PrefixSet") {
        // Plain text items; emulators wrap them like the IPv4 ones.
        let text = text_of(item, "ipv6Prefix").or_else(|| item.text().map(str::trim)).unwrap_or_default();
        new.push(parsed(text, "assignedIpv6PrefixSet")?);
    }
    Ok(new)
}

#[cfg(test)]
mod tests;
