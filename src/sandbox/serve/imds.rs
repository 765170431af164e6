//! The instance metadata service of one instance (`spec/aws.md` 4): version 2 only, so that a client that forgets the
//! token is found out.

use super::{Cloud, hold};
use crate::clock;
use crate::error::Result;
use crate::model::ids::InstanceId;
use crate::model::imds::Identity;
use crate::model::map::{Map, Set};
use crate::model::order::Gather as _;
use crate::model::time::{Mono, Now, Wall};
use crate::rpc::http1::{Method, Request, Response, Verdict};
use crate::sim::conditions::Lie;
use crate::sim::vpc::{ImdsEni, Planned, Vpc};
use crate::sys;
use std::time::Duration;

/// The role that every instance of the sandbox has.
pub const ROLE: &str = "enibox-sandbox-node";

/// How long credentials live; EC2's own live six hours.
const CREDENTIALS_LIFE: Duration = Duration::from_hours(6);

const TTL_MAX_S: u64 = 21_600;
const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";

/// Tokens kept; the one that ends first goes first.
const TOKENS_LIMIT: usize = 1024;

/// Tokens that were given out: until when each is good, and for whom.
#[derive(Debug, Default)]
pub struct Tokens(Map<String, (Mono, InstanceId)>);

impl Tokens {
    fn give(&mut self, now: Mono, instance: &InstanceId, ttl_s: u64) -> Result<String> {
        let mut bytes = [0; 16];
        sys::random_bytes(&mut bytes)?;
        let token = format!("{:032x}", u128::from_be_bytes(bytes));
        self.0.retain(|_, (until, _)| *until > now);
        if self.0.len() >= TOKENS_LIMIT {
            let oldest = self.0.iter().min_by_key(|(_, (until, _))| *until).map(|(token, _)| token.clone());
            oldest.map(|token| self.0.remove(&token));
        }
        self.0.insert(token.clone(), (now.plus(Duration::from_secs(ttl_s)), instance.clone()));
        Ok(token)
    }

    fn good(&self, now: Mono, instance: &InstanceId, token: &str) -> bool {
        self.0.get(token).is_some_and(|(until, owner)| *until > now && owner == instance)
    }
}

/// Answers one request of an instance.
pub(super) fn answer(cloud: &Cloud, instance: &InstanceId, request: &Request) -> Verdict {
    let now = clock::now();
    let (after, planned) = cloud.vpc().meet_imds(now);
    if !after.is_zero() {
        std::thread::sleep(after);
    }
    match planned {
        Some(Planned::Refused { status, message, .. }) => return Response::text(status, message).into(),
        Some(Planned::AnswerLost | Planned::RequestLost) => return Verdict::HangUp,
        None if matches!(*hold(&cloud.lie), Lie::Down) => return Verdict::HangUp,
        None => {}
    }
    if request.header("x-forwarded-for").is_some() {
        return Response::text(403, "").into();
    }
    match request.method {
        Method::Put if request.path == "/latest/api/token" => give_token(cloud, now, instance, request).into(),
        Method::Get => {
            let good = |token| cloud.tokens().good(now.mono, instance, token);
            if !request.header(TOKEN_HEADER).is_some_and(good) {
                return Response::text(401, "").into();
            }
            match read(cloud, now, instance, &request.path) {
                Some(body) => Response::new(200, "text/plain", body).into(),
                None => Response::text(404, "").into(),
            }
        }
        _ => Response::text(405, "").into(),
    }
}

fn give_token(cloud: &Cloud, now: Now, instance: &InstanceId, request: &Request) -> Response {
    let ttl = request.header(TTL_HEADER).and_then(|text| text.parse().ok());
    let Some(ttl_s) = ttl.filter(|ttl| (1..=TTL_MAX_S).contains(ttl)) else { return Response::text(400, "") };
    match cloud.tokens().give(now.mono, instance, ttl_s) {
        Ok(token) => Response::new(200, "text/plain", token).with(TTL_HEADER, ttl_s.to_string()),
        Err(error) => Response::text(503, error.to_string()),
    }
}

fn read(cloud: &Cloud, now: Now, instance: &InstanceId, path: &str) -> Option<String> {
    let identity = cloud.vpc().identity(instance)?;
    if let Some(document) = path.strip_prefix("/latest/dynamic/instance-identity/document") {
        return document.trim_matches('/').is_empty().then(|| document_of(&identity));
    }
    let path = path.strip_prefix("/latest/meta-data")?;
    let tree = tree(cloud, now, &identity)?;
    find(&tree, path.trim_matches('/'))
}

// A leaf's text, or the listing of a directory: one name per line, sub-directories with a slash.
fn find(tree: &Map<String, String>, path: &str) -> Option<String> {
    if let Some(leaf) = tree.get(path) {
        return Some(leaf.clone());
    }
    let prefix = if path.is_empty() { String::new() } else { format!("{path}/") };
    let names = tree.keys().filter_map(|leaf| {
        let rest = leaf.strip_prefix(&prefix)?;
        Some(rest.split_once('/').map_or(rest.to_owned(), |(directory, _)| format!("{directory}/")))
    });
    let names = names.gather::<Set<_>>();
    (!names.is_empty()).then(|| names.into_iter().collect::<Vec<_>>().join("\n"))
}

fn tree(cloud: &Cloud, now: Now, identity: &Identity) -> Option<Map<String, String>> {
    let mut vpc = cloud.vpc();
    let mut enis = vpc.imds(now, &identity.instance)?.clone();
    hold(&cloud.lie).tell(&mut enis);
    let mut tree = Map::new();
    let mut put = |path: String, text: String| tree.insert(path, text);
    put("placement/availability-zone".into(), identity.zone.clone());
    put("placement/region".into(), identity.region.clone());
    put("local-ipv4".into(), identity.local_ipv4.to_string());
    put("instance-id".into(), identity.instance.to_string());
    put("instance-type".into(), identity.instance_type.clone());
    put("mac".into(), identity.mac.to_string());
    put(format!("iam/security-credentials/{ROLE}"), credentials(cloud, now.wall));
    if let Some(first) = identity.local_ipv6 {
        put("ipv6".into(), first.to_string());
    }
    for listed in &enis {
        for (name, text) in fields(&vpc, listed) {
            put(format!("network/interfaces/macs/{}/{name}", listed.eni.mac), text);
        }
    }
    Some(tree)
}

fn lines<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join("\n")
}

// What the directory of one ENI holds. An attribute without a value is absent.
fn fields(vpc: &Vpc, ImdsEni { eni, groups }: &ImdsEni) -> Vec<(&'static str, String)> {
    let mut fields = vec![
        ("device-number", eni.device.to_string()),
        ("interface-id", eni.id.to_string()),
        ("local-ipv4s", lines(&eni.ipv4s)),
        ("mac", eni.mac.to_string()),
        ("security-group-ids", lines(groups)),
        ("subnet-id", eni.subnet.to_string()),
        ("subnet-ipv4-cidr-block", eni.subnet_v4.map(|net| net.to_string()).unwrap_or_default()),
        ("vpc-id", vpc.id().to_string()),
        ("vpc-ipv4-cidr-block", vpc.cidrs().first().map(ToString::to_string).unwrap_or_default()),
        ("vpc-ipv4-cidr-blocks", lines(vpc.cidrs())),
        ("ipv4-prefix", lines(&eni.v4_prefixes)),
        ("ipv6s", lines(&eni.ipv6s)),
        ("ipv6-prefix", lines(&eni.v6_prefixes)),
        ("subnet-ipv6-cidr-blocks", eni.subnet_v6.map(|net| net.to_string()).unwrap_or_default()),
    ];
    if !eni.ipv6s.is_empty() {
        fields.push(("vpc-ipv6-cidr-blocks", lines(vpc.v6_cidrs())));
    }
    if eni.card > 0 {
        fields.push(("network-card", eni.card.to_string()));
    }
    fields.retain(|(_, text)| !text.is_empty());
    fields
}

fn document_of(identity: &Identity) -> String {
    serde_json::json!({
        "accountId": "123456789012",
        "architecture": "x86_64",
        "availabilityZone": identity.zone,
        "imageId": "ami-0123456789abcdef0",
        "instanceId": identity.instance,
        "instanceType": identity.instance_type,
        "privateIp": identity.local_ipv4,
        "region": identity.region,
        "version": "2017-09-30",
    })
    .to_string()
}

fn credentials(cloud: &Cloud, now: Wall) -> String {
    let keys = cloud.keys();
    serde_json::json!({
        "Code": "Success",
        "LastUpdated": now.to_string(),
        "Type": "AWS-HMAC",
        "AccessKeyId": keys.access_key,
        "SecretAccessKey": keys.secret,
        "Token": keys.token,
        "Expiration": now.plus(CREDENTIALS_LIFE).to_string(),
    })
    .to_string()
}
