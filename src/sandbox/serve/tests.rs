use super::*;
use crate::aws::{creds, ec2, imds as aws_imds};
use crate::model::ec2::{Call, ConntrackTimeouts, Count, Create};
use crate::model::ids::SubnetId;
use crate::model::imds::{Answer, Query};
use crate::model::map::Map;
use crate::sim::vpc::Planned;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

/// One of each call.
pub(crate) fn calls() -> Vec<Call> {
    let tags = Map::from([("a/b".to_owned(), "c d&e".to_owned()), ("f".to_owned(), String::new())]);
    let create = Create {
        subnet: "subnet-1".into(),
        description: "aws-K8S-i-1".into(),
        groups: vec!["sg-1".into(), "sg-2".into()],
        count: Count::Addresses(9),
        conntrack: ConntrackTimeouts { tcp_established_s: Some(350), ..ConntrackTimeouts::default() },
        tags: tags.clone(),
        client_token: "t-1".into(),
    };
    let eni = || EniId::from("eni-1");
    vec![
        Call::DescribeAttached("i-1".into()),
        Call::DescribeOne(eni()),
        Call::DescribeLeaked { vpc: "vpc-1".into(), tags: vec![("k".into(), None), ("l".into(), Some("v".into()))] },
        Call::DescribeInstanceType("m5.large".into()),
        Call::DescribeSubnets { vpc: "vpc-1".into(), zone: "eu-west-1a".into() },
        Call::Create(Create { count: Count::Prefixes(1), tags: Map::new(), ..create.clone() }),
        Call::Create(Create { count: Count::Ipv6Addresses(1), ..create.clone() }),
        Call::Create(create),
        Call::Attach { eni: eni(), instance: "i-1".into(), device: 1, card: 0 },
        Call::DeleteOnTermination { eni: eni(), attachment: "eni-attach-1".into() },
        Call::ModifyGroups { eni: eni(), groups: vec!["sg-1".into()] },
        Call::CreateTags { eni: eni(), tags },
        Call::Assign { eni: eni(), count: Count::Addresses(3) },
        Call::Assign { eni: eni(), count: Count::Prefixes(1) },
        Call::AssignIpv6Prefix(eni()),
        Call::UnassignAddresses { eni: eni(), addresses: vec!["10.0.0.5".parse().unwrap()] },
        Call::UnassignPrefixes { eni: eni(), prefixes: vec!["10.0.0.16/28".parse().unwrap()] },
        Call::Detach("eni-attach-1".into()),
        Call::Delete(eni()),
    ]
}

struct Bed {
    cloud: Arc<Cloud>,
    subnet: SubnetId,
    instance: InstanceId,
    ec2: Server,
    imds: Server,
}

fn bed() -> Bed {
    let mut vpc = Vpc::new("eu-west-1", vec!["10.20.0.0/16".parse().unwrap(), "100.64.0.0/16".parse().unwrap()], 3);
    let v6 = Some("2001:db8:0:1::/64".parse().unwrap());
    let subnet = vpc.add_subnet("eu-west-1a", "10.20.1.0/24".parse().unwrap(), v6, &[("kubernetes.io/role/cni", "1")]);
    let instance = vpc.launch(clock::now(), "m5.large", &subnet, &[]).unwrap();
    let cloud = Cloud::new(vpc);
    let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
    let ec2 = cloud.serve_ec2(listen()).unwrap();
    let imds = cloud.serve_imds(listen(), Seat::Instance(instance.clone())).unwrap();
    Bed { cloud, subnet, instance, ec2, imds }
}

impl Bed {
    fn imds_client(&self) -> Arc<aws_imds::Client> {
        let config = aws_imds::Config::at(format!("http://{}", self.imds.address()));
        Arc::new(aws_imds::Client::new(config).unwrap())
    }

    fn ec2_client(&self) -> ec2::Client {
        let config = ec2::Config::at(format!("http://{}", self.ec2.address()), "eu-west-1");
        let chain = creds::Chain::from_env(|_| None, self.imds_client()).unwrap();
        ec2::Client::new(config, Arc::new(chain)).unwrap()
    }

    fn create(&self, token: &str, count: Count) -> Call {
        Call::Create(Create {
            subnet: self.subnet.clone(),
            description: "aws-K8S-x".into(),
            groups: vec![],
            count,
            conntrack: ConntrackTimeouts { udp_s: Some(30), ..ConntrackTimeouts::default() },
            tags: Map::from([("k<&>".to_owned(), " v\"' ".to_owned())]),
            client_token: token.into(),
        })
    }
}

fn raw(server: &Server, text: &str) -> String {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn the_real_client_and_the_fake_agree() {
    let bed = bed();
    let client = bed.ec2_client();
    let Reply::Created(eni) = client.execute(&bed.create("t", Count::Addresses(4))).unwrap() else { panic!() };
    let truth = |id: &EniId| bed.cloud.vpc().interfaces().find(|eni| eni.id == *id).cloned().unwrap();
    assert_eq!(*eni, truth(&eni.id));
    let attach = Call::Attach { eni: eni.id.clone(), instance: bed.instance.clone(), device: 1, card: 0 };
    let Reply::Attached(attachment) = client.execute(&attach).unwrap() else { panic!() };
    client.execute(&Call::DeleteOnTermination { eni: eni.id.clone(), attachment: attachment.clone() }).unwrap();
    let assigned = client.execute(&Call::Assign { eni: eni.id.clone(), count: Count::Prefixes(2) }).unwrap();
    assert_eq!(assigned, Reply::Assigned(truth(&eni.id).v4_prefixes.into_iter().map(ipnet::IpNet::V4).collect()));
    client.execute(&Call::AssignIpv6Prefix(eni.id.clone())).unwrap();
    let listed = client.execute(&Call::DescribeOne(eni.id.clone())).unwrap();
    assert_eq!(listed, Reply::Interfaces(vec![truth(&eni.id)]));
    let subnets = Call::DescribeSubnets { vpc: bed.cloud.vpc().id().clone(), zone: "eu-west-1a".into() };
    let Reply::Subnets(subnets) = client.execute(&subnets).unwrap() else { panic!() };
    assert_eq!(Some(subnets[0].free), bed.cloud.vpc().free(&bed.subnet));
    let kind = client.execute(&Call::DescribeInstanceType("p4d.24xlarge".into())).unwrap();
    assert_eq!(kind, Reply::InstanceType(bed.cloud.vpc().instance_type("p4d.24xlarge").unwrap()));
    client.execute(&Call::Detach(attachment)).unwrap();
    client.execute(&Call::Delete(eni.id.clone())).unwrap();
    let gone = client.execute(&Call::Delete(eni.id)).unwrap_err();
    assert_eq!((gone.code.as_str(), gone.status), ("InvalidNetworkInterfaceID.NotFound", 400));
    assert_eq!(bed.cloud.complaints(), Vec::<String>::new());
}

#[test]
fn pages_follow_each_other() {
    let bed = bed();
    for number in 0..12 {
        bed.cloud
            .change(|vpc| vpc.add_interface(clock::now(), &bed.subnet, &format!("n{number}"), &Map::new()))
            .unwrap();
    }
    let ask = |token: Option<EniId>| {
        let asked = Asked::Interfaces { ids: vec![], filters: vec![], page: 5, after: token };
        let Verdict::Answer(answer) = bed.cloud.act(clock::now(), &asked) else { panic!() };
        String::from_utf8(answer.body).unwrap()
    };
    let (mut seen, mut token, mut pages) = (0, None, 0);
    loop {
        let text = ask(token);
        seen += text.matches("<networkInterfaceId>").count();
        pages += 1;
        let Some((_, rest)) = text.split_once("<nextToken>") else { break };
        let form = format!(
            "Version=2016-11-15&Action=DescribeNetworkInterfaces&NextToken={}",
            rest.split('<').next().unwrap()
        );
        let Ok(Asked::Interfaces { after, .. }) = query::read(&form) else { panic!() };
        token = after;
    }
    assert_eq!((seen, pages), (13, 3));
}

#[test]
fn bad_requests_are_complained_about() {
    let bed = bed();
    let check = |text: &str, code: &str| {
        let answer = raw(&bed.ec2, text);
        assert!(answer.contains(&format!("<Code>{code}</Code>")), "{answer}");
        assert!(bed.cloud.complaints().last().unwrap().contains(code) || code == "InvalidRequest");
    };
    check("GET /?Action=DescribeSubnets HTTP/1.1\r\n\r\n", "InvalidRequest");
    let unsigned = "POST / HTTP/1.1\r\ncontent-type: application/x-www-form-urlencoded\r\ncontent-length: 0\r\n\r\n";
    check(unsigned, "MissingAuthenticationToken");
    let signed = unsigned.replacen(
        "content-length",
        "host: x\r\nx-amz-date: 20261121T000000Z\r\nauthorization: AWS4-HMAC-SHA256 Credential=ASIAENIBOXSANDBOX000/20261121/\
         eu-west-1/ec2/aws4_request, SignedHeaders=host;x-amz-date, Signature=00\r\ncontent-length",
        1,
    );
    check(&signed, "SignatureDoesNotMatch");
    check(&signed.replace("ASIAENIBOXSANDBOX000", "AKIA"), "AuthFailure");
    assert_eq!(bed.cloud.complaints().len(), 4);
}

#[test]
fn a_request_signed_for_another_region_is_refused() {
    let bed = bed();
    let config = ec2::Config::at(format!("http://{}", bed.ec2.address()), "us-east-1");
    let chain = creds::Chain::from_env(|_| None, bed.imds_client()).unwrap();
    let client = ec2::Client::new(config, Arc::new(chain)).unwrap();
    assert_eq!(client.execute(&bed.create("t", Count::Addresses(1))).unwrap_err().code, "SignatureDoesNotMatch");
}

#[test]
fn the_watcher_is_told_in_order() {
    let bed = bed();
    let told = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&told);
    bed.cloud.watch(Box::new(move |wires| {
        hold(&sink).push(wires.len());
        if wires.len() > 1 { Err(crate::error::Error::new("no room")) } else { Ok(()) }
    }));
    let client = bed.ec2_client();
    let Reply::Created(eni) = client.execute(&bed.create("t", Count::Addresses(1))).unwrap() else { panic!() };
    client.execute(&Call::Attach { eni: eni.id, instance: bed.instance.clone(), device: 1, card: 0 }).unwrap();
    assert_eq!(*hold(&told), [1, 1, 2]);
    assert_eq!(bed.cloud.complaints(), ["wire the topology: no room"]);
}

#[test]
fn imds_wants_a_token() {
    let bed = bed();
    let get = |path: &str, token: &str| {
        let text = raw(&bed.imds, &format!("GET {path} HTTP/1.1\r\n{token}\r\n"));
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head[9..12].to_owned(), body.to_owned())
    };
    assert_eq!(get("/latest/meta-data/instance-id", "").0, "401");
    for (ttl, status) in [("0", "400"), ("21601", "400"), ("x", "400"), ("60", "200")] {
        let text = format!("PUT /latest/api/token HTTP/1.1\r\nx-aws-ec2-metadata-token-ttl-seconds: {ttl}\r\n\r\n");
        assert!(raw(&bed.imds, &text).starts_with(&format!("HTTP/1.1 {status} ")), "{ttl}");
    }
    let text = raw(&bed.imds, "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n");
    assert!(text.contains("x-aws-ec2-metadata-token-ttl-seconds: 60"), "{text}");
    let token = format!("X-aws-ec2-metadata-token: {}\r\n", text.split_once("\r\n\r\n").unwrap().1);
    let instance = bed.instance.to_string();
    assert_eq!(get("/latest/meta-data/instance-id", &token), ("200".into(), instance.clone()));
    assert_eq!(get("/latest/meta-data/instance-id/", &token), ("200".into(), instance));
    let forwarded = format!("{token}X-Forwarded-For: 1.2.3.4\r\n");
    assert_eq!(get("/latest/meta-data/instance-id", &forwarded).0, "403");
    assert_eq!(get("/latest/meta-data/no/such", &token).0, "404");
    assert_eq!(get("/latest/meta-data/iam/security-credentials/", &token).1, ROLE);
    let mac = get("/latest/meta-data/mac", &token).1;
    assert_eq!(get("/latest/meta-data/network/interfaces/macs/", &token).1, format!("{mac}/"));
    let fields = get(&format!("/latest/meta-data/network/interfaces/macs/{mac}"), &token).1;
    assert!(fields.lines().any(|line| line == "local-ipv4s"), "{fields}");
    assert!(!fields.contains("ipv4-prefix\n"), "an attribute without a value is absent: {fields}");
}

#[test]
fn the_real_imds_client_reads_the_tree() {
    let bed = bed();
    let client = bed.imds_client();
    let identity = client.identity(false).unwrap();
    assert_eq!(Some(identity), bed.cloud.vpc().identity(&bed.instance));
    let truth = bed.cloud.vpc().imds(clock::now(), &bed.instance).unwrap()[0].clone();
    assert_eq!(client.query(&Query::Scan).unwrap(), Answer::Enis(vec![truth.eni.clone()]));
    assert_eq!(client.query(&Query::Eni(truth.eni.mac)).unwrap(), Answer::Eni(Some(truth.eni)));
    assert_eq!(client.query(&Query::SecurityGroups).unwrap(), Answer::Groups(truth.groups));
    let cidrs = vec!["10.20.0.0/16".parse().unwrap(), "100.64.0.0/16".parse().unwrap()];
    assert_eq!(client.query(&Query::VpcCidrs { v6: false }).unwrap(), Answer::Cidrs(cidrs));
}

#[test]
fn a_lost_answer_is_silence() {
    let bed = bed();
    bed.cloud.change(|vpc| vpc.knobs.action("CreateNetworkInterface").next.push_back(Planned::AnswerLost));
    // The client repeats a create, and the token brings the same ENI.
    bed.ec2_client().execute(&bed.create("t", Count::Addresses(1))).unwrap();
    let vpc = bed.cloud.vpc();
    assert_eq!((vpc.interfaces().count(), vpc.journal().counts()["CreateNetworkInterface"]), (2, 2));
}
