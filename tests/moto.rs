//! Our EC2 client against a foreign EC2 and STS: the emulator moto, which has signatures checked by botocore. Without
//! `python3` the tests say SKIP and pass, any other obstacle fails them.
//!
//! Where moto is not like EC2 (it models no prefixes, returns all addresses of an ENI from an Assign, ignores client
//! tokens and limits), a comment says so; the module tests and the sandbox have these.

#[path = "support/python.rs"]
mod python;

use enibox::aws::pace::Pace;
use enibox::aws::{creds, ec2, imds};
use enibox::model::ec2::{Call, ConntrackTimeouts, Count, Create, Failure, Interface, Reply, Subnet};
use enibox::model::ids::EniId;
use enibox::model::map::Map;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};

const REGION: &str = "eu-west-1";

/// What moto made, by name. It serves all tests of this process and ends with it, when its standard input does.
struct Foreign(#[expect(dead_code, reason = "holds the standard input open")] Child, Map<String, String>);

impl Foreign {
    fn get_or_start() -> Option<&'static Foreign> {
        static FOREIGN: OnceLock<Option<Foreign>> = OnceLock::new();
        FOREIGN.get_or_init(Foreign::start).as_ref()
    }

    fn start() -> Option<Foreign> {
        let what = "EC2 is not tried against a foreign implementation";
        let python = python::environment("venv-moto", &["moto[ec2,server]>=5.1,<6"], what)?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/foreign/ec2.py");
        let mut command = Command::new(python);
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut foreign = Foreign(child, Map::new());
        for line in lines {
            let line = line.unwrap();
            let (name, value) = line.split_once(' ').unwrap();
            foreign.1.insert(name.to_owned(), value.to_owned());
            if name == "ready" {
                return Some(foreign);
            }
        }
        panic!("moto has not started: {:?}", foreign.1);
    }

    fn get(&self, name: &str) -> &str {
        self.1.get(name).unwrap_or_else(|| panic!("{name} was not made"))
    }

    /// A client that knows of AWS what these variables say.
    fn client(&self, variables: &[(&str, &str)]) -> ec2::Client {
        let endpoints = ["AWS_EC2_ENDPOINT", "AWS_ENDPOINT_URL_STS"].map(|name| (name, self.get("url")));
        let all: Map<&str, &str> = variables.iter().copied().chain(endpoints).collect();
        let lookup = |name: &str| all.get(name).map(|value| (*value).to_owned());
        // There is no IMDS; the region is told.
        let nowhere = imds::Config {
            region: Some(REGION.into()),
            pace: Pace::thousandths(0),
            ..imds::Config::at("http://127.0.0.1:1")
        };
        let chain = creds::Chain::from_env(lookup, Arc::new(imds::Client::new(nowhere).unwrap())).unwrap();
        ec2::Client::new(ec2::Config::from_env(lookup, REGION), Arc::new(chain)).unwrap()
    }

    fn user(&self, name: &str, secret: &str) -> ec2::Client {
        self.client(&[("AWS_ACCESS_KEY_ID", self.get(name)), ("AWS_SECRET_ACCESS_KEY", secret)])
    }

    fn node(&self) -> ec2::Client {
        self.user("node", self.get("node-secret"))
    }

    fn create(&self, number: u32) -> Create {
        let tag = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        Create {
            subnet: self.get("home").into(),
            description: format!("aws-K8S-{}", self.get("instance")),
            groups: vec![self.get("first").into()],
            count: Count::Addresses(3),
            conntrack: ConntrackTimeouts { tcp_established_s: Some(350), ..ConntrackTimeouts::default() },
            tags: Map::from([
                tag("node.k8s.amazonaws.com/createdAt", "2026-11-21T01:30:00Z"),
                tag("node.k8s.amazonaws.com/instance_id", self.get("instance")),
                tag("odd ü+&=/*~", &format!("<{number}> & \"more\"")),
            ]),
            client_token: format!("token-{number}"),
        }
    }

    /// Detached ENIs with a tag of ours, as the clean-up asks for them.
    fn leaked(&self) -> Call {
        let tags = vec![
            ("node.k8s.amazonaws.com/instance_id".to_owned(), None),
            ("odd ü+&=/*~".to_owned(), Some("<7> & \"more\"".to_owned())),
        ];
        Call::DescribeLeaked { vpc: self.get("vpc").into(), tags }
    }
}

fn interfaces(client: &ec2::Client, call: &Call) -> Vec<Interface> {
    match client.execute(call) {
        Ok(Reply::Interfaces(found)) => found,
        other => panic!("{call:?}: {other:?}"),
    }
}

fn one(client: &ec2::Client, eni: &EniId) -> Interface {
    let found = interfaces(client, &Call::DescribeOne(eni.clone()));
    assert_eq!(found.len(), 1, "{found:?}");
    found.into_iter().next().unwrap()
}

fn create(client: &ec2::Client, what: Create) -> Interface {
    match client.execute(&Call::Create(what)) {
        Ok(Reply::Created(eni)) => *eni,
        other => panic!("{other:?}"),
    }
}

fn done(client: &ec2::Client, call: &Call) {
    assert_eq!(client.execute(call), Ok(Reply::Done), "{call:?}");
}

fn refused(client: &ec2::Client, call: &Call) -> Failure {
    let failure = client.execute(call).unwrap_err();
    assert!(!failure.maybe_applied && !failure.code.is_empty(), "{failure:?}");
    failure
}

#[test]
fn an_eni_lives_and_dies() {
    let Some(foreign) = Foreign::get_or_start() else { return };
    let client = foreign.node();
    let instance = foreign.get("instance");

    let primary = interfaces(&client, &Call::DescribeAttached(instance.into()));
    assert_eq!(primary.len(), 1);
    let attachment = primary[0].attachment.as_ref().unwrap();
    assert_eq!((attachment.device, attachment.card, attachment.instance.as_str()), (0, 0, instance));
    assert!(primary[0].mac.is_some() && primary[0].primary_ipv4.is_some() && primary[0].secondary_ipv4s.is_empty());

    let made = create(&client, foreign.create(1));
    let described = one(&client, &made.id);
    for eni in [&made, &described] {
        assert_eq!(eni.description, format!("aws-K8S-{instance}"));
        assert_eq!(
            (eni.subnet.as_str(), eni.groups.as_slice()),
            (foreign.get("home"), &[foreign.get("first").into()][..])
        );
        assert_eq!((eni.primary_ipv4.is_some(), eni.secondary_ipv4s.len()), (true, 3));
        assert_eq!((&eni.tags, &eni.mac), (&foreign.create(1).tags, &made.mac));
        assert_eq!((eni.status.as_str(), &eni.attachment), ("available", &None));
    }

    let attach = Call::Attach { eni: made.id.clone(), instance: instance.into(), device: 1, card: 0 };
    let Ok(Reply::Attached(attachment)) = client.execute(&attach) else { panic!() };
    done(&client, &Call::DeleteOnTermination { eni: made.id.clone(), attachment: attachment.clone() });
    let attached = interfaces(&client, &Call::DescribeAttached(instance.into()));
    let ours = attached.iter().find(|eni| eni.id == made.id).unwrap();
    assert_eq!((attached.len(), ours.status.as_str()), (2, "in-use"));
    let told = ours.attachment.as_ref().unwrap();
    assert_eq!((&told.id, told.device, told.card), (&attachment, 1, 0));

    let groups = vec![foreign.get("first").into(), foreign.get("second").into()];
    done(&client, &Call::ModifyGroups { eni: made.id.clone(), groups: groups.clone() });
    let more = Map::from([("cluster.k8s.amazonaws.com/name".to_owned(), "prod / +".to_owned())]);
    done(&client, &Call::CreateTags { eni: made.id.clone(), tags: more });
    let changed = one(&client, &made.id);
    assert_eq!(changed.groups, groups);
    assert_eq!((changed.tags.len(), changed.tags["cluster.k8s.amazonaws.com/name"].as_str()), (4, "prod / +"));

    // moto tells all addresses, EC2 the new ones.
    let assign = Call::Assign { eni: made.id.clone(), count: Count::Addresses(2) };
    let Ok(Reply::Assigned(all)) = client.execute(&assign) else { panic!() };
    assert_eq!(all.len(), 6);
    let more = one(&client, &made.id).secondary_ipv4s;
    assert_eq!(more.len(), 5);
    done(&client, &Call::UnassignAddresses { eni: made.id.clone(), addresses: more[1..4].to_vec() });
    assert_eq!(one(&client, &made.id).secondary_ipv4s, [more[0], more[4]]);

    done(&client, &Call::Detach(attachment.clone()));
    let detached = one(&client, &made.id);
    assert_eq!((detached.status.as_str(), detached.attachment), ("available", None));
    done(&client, &Call::Delete(made.id.clone()));
    assert_eq!(interfaces(&client, &Call::DescribeOne(made.id.clone())), []);

    let gone = refused(&client, &Call::Delete(made.id));
    assert!(gone.eni_not_found() && gone.status == 400, "{gone:?}");
    let gone = refused(&client, &Call::Detach(attachment));
    assert!(gone.detached_already() && gone.status == 400, "{gone:?}");
}

/// moto models no prefixes: it takes these requests and leaves the elements away, which must read as empty lists.
#[test]
fn prefixes_are_asked_for_as_ec2_has_them() {
    let Some(foreign) = Foreign::get_or_start() else { return };
    let client = foreign.node();
    let eni = create(&client, Create { count: Count::Prefixes(2), ..foreign.create(1) });
    assert_eq!((eni.secondary_ipv4s.len(), eni.v4_prefixes.len(), eni.v6_prefixes.len()), (0, 0, 0));
    let prefixes = Call::Assign { eni: eni.id.clone(), count: Count::Prefixes(1) };
    assert!(matches!(client.execute(&prefixes), Ok(Reply::Assigned(all)) if all.len() == 1), "its own address");
    assert_eq!(client.execute(&Call::AssignIpv6Prefix(eni.id.clone())), Ok(Reply::Assigned(Vec::new())));
    done(&client, &Call::UnassignPrefixes { eni: eni.id, prefixes: vec!["10.0.2.16/28".parse().unwrap()] });
}

#[test]
fn subnets_and_instance_types_are_described() {
    let Some(foreign) = Foreign::get_or_start() else { return };
    let client = foreign.node();
    let subnets = Call::DescribeSubnets { vpc: foreign.get("vpc").into(), zone: format!("{REGION}b") };
    let Ok(Reply::Subnets(found)) = client.execute(&subnets) else { panic!() };
    let told: Vec<(&str, u32, usize)> = found.iter().map(|s: &Subnet| (s.id.as_str(), s.free, s.tags.len())).collect();
    // AWS keeps five addresses of a subnet.
    assert_eq!(told, [(foreign.get("large"), 251, 0), (foreign.get("small"), 59, 1)]);
    assert_eq!(found[1].tags["kubernetes.io/role/cni"], "1");

    for name in ["m5.large", "c5.metal", "t2.micro", "p4d.24xlarge", "m4.4xlarge"] {
        let Ok(Reply::InstanceType(described)) = client.execute(&Call::DescribeInstanceType(name.into())) else {
            panic!("{name}")
        };
        let (theirs, ours) = (enibox::model::limits::from_ec2(&described), enibox::model::limits::of(name));
        let part = |limits: Option<enibox::model::limits::Limits>| {
            limits.map(|l| (l.enis, l.ipv4_per_eni, l.cards.len(), l.takes_prefixes(), l.kubelet_pods))
        };
        assert_eq!(part(theirs), part(ours), "{name}: {described:?}");
    }
    let unknown = refused(&client, &Call::DescribeInstanceType("m99.huge".into()));
    assert_eq!((unknown.code.as_str(), unknown.status), ("InvalidInstanceType", 400));
}

#[test]
fn pages_are_followed() {
    let Some(foreign) = Foreign::get_or_start() else { return };
    let requests = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&requests);
    let client = foreign.node().observed_by(move |call| seen.lock().unwrap().push(call.attempts));
    let mut wanted: Vec<EniId> = (0..8).map(|_| create(&client, foreign.create(7)).id).collect();
    create(&client, foreign.create(8)); // has another tag
    wanted.sort();
    requests.lock().unwrap().clear();
    let mut found: Vec<EniId> = interfaces(&client, &foreign.leaked()).into_iter().map(|eni| eni.id).collect();
    found.sort();
    assert_eq!(found, wanted);
    assert_eq!(*requests.lock().unwrap(), [3], "eight ENIs by three");
}

#[test]
fn what_is_wrong_with_keys_is_told() {
    let Some(foreign) = Foreign::get_or_start() else { return };
    let secret = foreign.get("node-secret").to_lowercase();
    assert_eq!(refused(&foreign.user("node", &secret), &foreign.leaked()).code, "AuthFailure");
    let stranger = foreign.user("stranger", foreign.get("stranger-secret"));
    assert!(refused(&stranger, &foreign.leaked()).unauthorised());
}

#[test]
fn a_service_account_assumes_its_role() {
    let Some(foreign) = Foreign::get_or_start() else { return };
    let token = std::env::temp_dir().join(format!("enibox-moto-token-{}", std::process::id()));
    std::fs::write(&token, "eyJhbGciOiJSUzI1NiJ9.e30.c2ln\n").unwrap();
    let client = foreign
        .client(&[("AWS_WEB_IDENTITY_TOKEN_FILE", token.to_str().unwrap()), ("AWS_ROLE_ARN", foreign.get("role"))]);
    let found = client.execute(&Call::DescribeAttached(foreign.get("instance").into()));
    std::fs::remove_file(&token).unwrap();
    assert!(matches!(&found, Ok(Reply::Interfaces(enis)) if !enis.is_empty()), "{found:?}");
}
