use super::*;
use crate::aws::script::{Request, Server, Step, answer, answer_with};
use crate::model::map::Map;
use std::sync::Arc;

const TOKEN: &str = "AQAEAToken==";
const A: &str = "02:ef:2a:98:e5:5a";
const B: &str = "02:11:22:33:44:55";

fn token_answer(ttl: &str) -> Step {
    answer_with(200, &[(TTL_HEADER, ttl)], TOKEN)
}

fn config(server: &Server) -> Config {
    let limits = Limits {
        connect: Duration::from_millis(500),
        response: server.patience(),
        operation: Duration::from_secs(20),
        pause: Duration::from_secs(1),
    };
    Config { limits, pace: Pace::thousandths(1), ..Config::at(server.url()) }
}

fn client(server: &Server) -> Client {
    Client::new(config(server)).unwrap()
}

/// A server with a tree of paths below `/latest/meta-data/` (or absolute), which insists on a token.
fn tree(entries: &[(&str, &str)]) -> (Server, Arc<Mutex<Map<String, String>>>) {
    let full = |path: &str| if path.starts_with('/') { path.into() } else { format!("/latest/meta-data/{path}") };
    let entries: Map<String, String> = entries.iter().map(|(path, text)| (full(path), (*text).to_owned())).collect();
    let entries = Arc::new(Mutex::new(entries));
    let shared = entries.clone();
    let server = Server::new(move |request| {
        if request.method == "PUT" {
            return token_answer("21600");
        }
        if request.header(TOKEN_HEADER) != Some(TOKEN) {
            return answer(401, "");
        }
        match shared.lock().unwrap().get(&request.path) {
            Some(text) => answer(200, text),
            None => answer(404, "<html>not found</html>"),
        }
    });
    (server, entries)
}

fn node() -> Vec<(&'static str, &'static str)> {
    vec![
        ("/latest/dynamic/instance-identity/document", r#"{"region":"eu-west-1","instanceId":"i-1"}"#),
        ("placement/availability-zone", "eu-west-1a\n"),
        ("local-ipv4", "10.0.1.10"),
        ("ipv6", "2001:db8::2"),
        ("instance-id", "i-0e1f"),
        ("instance-type", "m5.large"),
        ("mac", A),
        ("network/interfaces/macs", "02:ef:2a:98:e5:5a/\n02:11:22:33:44:55/\n"),
        (
            "network/interfaces/macs/02:ef:2a:98:e5:5a",
            "device-number\ninterface-id\nipv4-associations/\nlocal-ipv4s\nsubnet-id\nsubnet-ipv4-cidr-block",
        ),
        ("network/interfaces/macs/02:ef:2a:98:e5:5a/interface-id", "eni-a"),
        ("network/interfaces/macs/02:ef:2a:98:e5:5a/device-number", "0"),
        ("network/interfaces/macs/02:ef:2a:98:e5:5a/subnet-id", "subnet-a"),
        ("network/interfaces/macs/02:ef:2a:98:e5:5a/vpc-id", "vpc-a"),
        ("network/interfaces/macs/02:ef:2a:98:e5:5a/local-ipv4s", "10.0.1.10\n10.0.1.11\n10.0.1.12"),
        ("network/interfaces/macs/02:ef:2a:98:e5:5a/subnet-ipv4-cidr-block", "10.0.1.0/24"),
        ("network/interfaces/macs/02:ef:2a:98:e5:5a/security-group-ids", "sg-2\nsg-1"),
        ("network/interfaces/macs/02:ef:2a:98:e5:5a/vpc-ipv4-cidr-blocks", "10.0.0.0/16\n100.64.0.0/16"),
        (
            "network/interfaces/macs/02:11:22:33:44:55",
            "device-number\ninterface-id\nipv4-prefix\nipv6-prefix\nipv6s\nlocal-ipv4s\nnetwork-card\nsubnet-id",
        ),
        ("network/interfaces/macs/02:11:22:33:44:55/interface-id", "eni-b"),
        ("network/interfaces/macs/02:11:22:33:44:55/device-number", "1"),
        ("network/interfaces/macs/02:11:22:33:44:55/network-card", "3"),
        ("network/interfaces/macs/02:11:22:33:44:55/subnet-id", "subnet-b"),
        ("network/interfaces/macs/02:11:22:33:44:55/local-ipv4s", "10.0.2.9"),
        ("network/interfaces/macs/02:11:22:33:44:55/ipv4-prefix", "10.0.2.16/28\n10.0.2.32/28"),
        ("network/interfaces/macs/02:11:22:33:44:55/subnet-ipv4-cidr-block", "10.0.2.0/24"),
        ("network/interfaces/macs/02:11:22:33:44:55/ipv6s", "2001:db8:1::5"),
        ("network/interfaces/macs/02:11:22:33:44:55/ipv6-prefix", "2001:db8:1:0:1::/80"),
        ("network/interfaces/macs/02:11:22:33:44:55/subnet-ipv6-cidr-blocks", "2001:db8:1::/64\n2001:db8:2::/64"),
    ]
}

fn scan(client: &Client) -> Result<Vec<Eni>> {
    match client.query(&Query::Scan)? {
        Answer::Enis(enis) => Ok(enis),
        other => panic!("{other:?}"),
    }
}

#[test]
fn identity_is_read_in_order() {
    let (server, entries) = tree(&node());
    let identity = client(&server).identity(true).unwrap();
    assert_eq!(identity.region, "eu-west-1");
    assert_eq!(identity.zone, "eu-west-1a");
    assert_eq!(identity.local_ipv6, Some("2001:db8::2".parse().unwrap()));
    assert_eq!(
        (identity.primary_eni.as_str(), identity.subnet.as_str(), identity.vpc.as_str()),
        ("eni-a", "subnet-a", "vpc-a")
    );
    entries.lock().unwrap().remove("/latest/meta-data/ipv6");
    assert_eq!(client(&server).identity(true).unwrap().local_ipv6, None);
    entries.lock().unwrap().remove("/latest/meta-data/instance-type");
    let error = client(&server).identity(false).unwrap_err();
    assert_eq!(error.to_string(), "read imds instance-type: not there (HTTP 404)");
    assert_eq!(error.find::<ImdsError>().map(|error| error.status), Some(404));
}

#[test]
fn the_region_has_other_sources() {
    let (server, entries) = tree(&[("placement/region", "eu-north-1"), (IDENTITY_DOCUMENT, r#"{"region":""}"#)]);
    assert_eq!(client(&server).region().unwrap(), "eu-north-1");
    let told = Config { region: Some("eu-south-1".into()), ..config(&server) };
    assert_eq!(Client::new(told).unwrap().region().unwrap(), "eu-south-1");
    entries.lock().unwrap().clear();
    assert!(client(&server).region().unwrap_err().to_string().contains(IDENTITY_DOCUMENT));
}

#[test]
fn a_scan_takes_few_reads_over_one_connection() {
    let (server, _) = tree(&node());
    let enis = scan(&client(&server)).unwrap();
    assert_eq!(enis.len(), 2);
    assert_eq!(enis[0].ipv4s.len(), 3);
    assert_eq!((enis[0].device, enis[0].card, enis[0].subnet_v4), (0, 0, Some("10.0.1.0/24".parse().unwrap())));
    assert_eq!(enis[0].subnet_v6, None);
    let b = &enis[1];
    assert_eq!((b.id.as_str(), b.mac.to_string().as_str(), b.device, b.card), ("eni-b", B, 1, 3));
    assert_eq!(b.v4_prefixes, ["10.0.2.16/28".parse().unwrap(), "10.0.2.32/28".parse().unwrap()]);
    assert_eq!(b.v6_prefixes, ["2001:db8:1:0:1::/80".parse().unwrap()]);
    assert_eq!(b.subnet_v6, Some("2001:db8:1::/64".parse().unwrap()));
    let seen = server.seen();
    let of_first = seen.iter().filter(|request| request.path.contains(A)).count();
    assert!(of_first <= 7, "{:?}", server.lines());
    assert!(seen.iter().all(|request| request.connection == 1));
    assert_eq!(seen.iter().filter(|request| request.method == "PUT").count(), 1);
}

#[test]
fn enis_that_are_strange_or_going_away() {
    let with = |path: &str, text: Option<&str>| {
        let (server, entries) = tree(&node());
        let path = format!("/latest/meta-data/network/interfaces/macs{path}");
        match text {
            Some(text) => drop(entries.lock().unwrap().insert(path, text.to_owned())),
            None => drop(entries.lock().unwrap().remove(&path)),
        }
        scan(&client(&server)).map_err(|error| error.to_string())
    };
    let field = |mac: &str, name: &str| format!("/{mac}/{name}");
    // Going away or coming: the listing or a field that every ENI has is not there. The others are read all the same.
    assert_eq!(with(&format!("/{B}"), None).unwrap().len(), 1);
    for name in ["interface-id", "device-number", "subnet-id", "subnet-ipv4-cidr-block"] {
        let enis = with(&field(B, name), None).unwrap();
        assert_eq!(enis.iter().map(|eni| eni.id.as_str()).collect::<Vec<_>>(), ["eni-a"], "{name}");
    }
    // The primary ENI is device 0, whatever IMDS says.
    assert_eq!(with(&field(A, "device-number"), Some("7")).unwrap()[0].device, 0);
    // An ENI without addresses (EFA only) has no CIDRs and no prefixes.
    let bare = with(&format!("/{B}"), Some("device-number\ninterface-id\nsubnet-id")).unwrap();
    assert_eq!((bare[1].ipv4s.len(), bare[1].subnet_v4, bare[1].v4_prefixes.len(), bare[1].card), (0, None, 0, 0));
    // Listed but gone, or empty: no addresses.
    assert_eq!(with(&field(B, "local-ipv4s"), None).unwrap()[1].subnet_v4, None);
    assert_eq!(with(&field(B, "local-ipv4s"), Some("")).unwrap()[1].ipv4s.len(), 0);
    assert_eq!(with(&field(B, "network-card"), None).unwrap()[1].card, 0);
    // Prefixes count whether the listing names them or not; IPv6 alone is an ENI like another.
    assert_eq!(with(&field(A, "ipv4-prefix"), Some("10.0.1.32/28")).unwrap()[0].v4_prefixes.len(), 1);
    let v6 = with(&format!("/{B}"), Some("interface-id\nipv6s\nnetwork-card\nsubnet-id")).unwrap();
    assert_eq!((v6[1].own_address(false), v6[1].subnet_v4, v6[1].card), (None, None, 3));
    assert_eq!(v6[1].own_address(true), Some("2001:db8:1::5".parse().unwrap()));
    assert_eq!((v6[1].v4_prefixes.len(), v6[1].v6_prefixes.len()), (0, 1));
    assert_eq!(v6[1].subnet_v6, Some("2001:db8:1::/64".parse().unwrap()));
    assert_eq!(with(&field(B, "subnet-ipv6-cidr-blocks"), None).unwrap()[1].subnet_v6, None);
    // These are errors, since the ENI is there.
    for (path, text) in [
        (field(A, "subnet-ipv4-cidr-block"), None),
        (field(A, "subnet-id"), None),
        (field(A, "interface-id"), None),
        (field(B, "device-number"), Some("one")),
        (field(B, "local-ipv4s"), Some("<html>")),
        (field(B, "interface-id"), Some(" \n")),
        (String::new(), Some("no-mac/")),
        (String::new(), Some("")),
        (String::new(), None),
    ] {
        let error = with(&path, text).unwrap_err();
        assert!(error.starts_with("scan attached enis: "), "{path}: {error}");
    }
}

#[test]
fn an_eni_that_goes_between_two_reads_is_left_out() {
    let (inner, entries) = tree(&node());
    let url = inner.url();
    // The subnet is asked for after the id: take everything away in between.
    let server = Server::new(move |request: &Request| {
        if request.path.ends_with(&format!("{B}/subnet-id")) {
            entries.lock().unwrap().retain(|path, _| !path.contains(B));
        }
        let agent = Agent::new(&url, options()).unwrap();
        let token = request.header(TOKEN_HEADER).map(|token| (TOKEN_HEADER, token));
        let response = agent.send(&request.method, &request.path, token.as_slice(), &[]).unwrap();
        answer_with(response.status, &[(TTL_HEADER, "21600")], &response.text())
    });
    let enis = scan(&client(&server)).unwrap();
    assert_eq!(enis.iter().map(|eni| eni.id.as_str()).collect::<Vec<_>>(), ["eni-a"]);
}

fn options() -> Options {
    Options {
        user_agent: String::new(),
        connect: Duration::from_secs(1),
        response: Duration::from_secs(1),
        total: Duration::from_secs(2),
        body_limit: BODY_LIMIT,
        idle: 1,
        roots: Roots::default(),
        proxies: Proxies::NONE,
    }
}

#[test]
fn other_questions() {
    let (server, entries) = tree(&node());
    let client = client(&server);
    let ask = |query: Query| client.query(&query).map_err(|error| error.to_string());
    assert_eq!(ask(Query::SecurityGroups), Ok(Answer::Groups(vec!["sg-1".into(), "sg-2".into()])));
    let cidrs = ["10.0.0.0/16", "100.64.0.0/16"].map(|cidr| cidr.parse().unwrap()).to_vec();
    assert_eq!(ask(Query::VpcCidrs { v6: false }), Ok(Answer::Cidrs(cidrs)));
    assert_eq!(ask(Query::VpcCidrs { v6: true }), Ok(Answer::Cidrs(Vec::new())));
    let path = format!("/latest/meta-data/network/interfaces/macs/{A}/vpc-ipv6-cidr-blocks");
    entries.lock().unwrap().insert(path, "2001:db8::/56\n2001:db8:f00::/56\n".into());
    let both = ["2001:db8::/56", "2001:db8:f00::/56"].map(|cidr| cidr.parse().unwrap()).to_vec();
    assert_eq!(ask(Query::VpcCidrs { v6: true }), Ok(Answer::Cidrs(both)));
    assert!(matches!(ask(Query::Eni(B.parse().unwrap())), Ok(Answer::Eni(Some(_)))));
    assert_eq!(ask(Query::Eni("02:00:00:00:00:09".parse().unwrap())), Ok(Answer::Eni(None)));
    entries.lock().unwrap().retain(|path, _| !path.ends_with("vpc-ipv4-cidr-blocks"));
    assert!(ask(Query::VpcCidrs { v6: false }).unwrap_err().contains("vpc-ipv4-cidr-blocks"));
    assert_eq!(client.get("nothing/here").unwrap(), None);
    assert_eq!(client.get(IDENTITY_DOCUMENT).unwrap().as_deref(), Some(node()[0].1));
}

fn check(steps: Vec<Step>, v1_disabled: bool, expected: std::result::Result<Option<&str>, u16>, lines: &[&str]) {
    let server = Server::queue(steps);
    let client = Client::new(Config { v1_disabled, ..config(&server) }).unwrap();
    let told = client.read("mac").map_err(|error| error.status);
    assert_eq!(told, expected.map(|text| text.map(str::to_owned)), "{:?}", server.lines());
    let seen: Vec<String> = server
        .seen()
        .iter()
        .map(|request| match request.header(TOKEN_HEADER) {
            Some(token) => format!("{} {token}", request.method),
            None => request.method.clone(),
        })
        .collect();
    assert_eq!(seen, lines);
}

const WITH: &str = "GET AQAEAToken==";

#[test]
fn tokens_and_retries() {
    let token = || token_answer("300");
    let ok = || answer(200, "x");
    check(vec![token(), ok()], false, Ok(Some("x")), &["PUT", WITH]);
    check(vec![token(), answer(404, "")], false, Ok(None), &["PUT", WITH]);
    // 401: one new token, at once.
    check(vec![token(), answer(401, ""), token(), ok()], false, Ok(Some("x")), &["PUT", WITH, "PUT", WITH]);
    // Three attempts, and no more.
    check(vec![token(), answer(500, ""), answer(503, ""), ok()], false, Ok(Some("x")), &["PUT", WITH, WITH, WITH]);
    check(
        vec![token(), answer(500, ""), answer(502, ""), answer(504, ""), ok()],
        false,
        Err(504),
        &["PUT", WITH, WITH, WITH],
    );
    check(vec![token(), Step::Hang, Step::Close(Vec::new()), ok()], false, Ok(Some("x")), &["PUT", WITH, WITH, WITH]);
    // Not retried.
    check(vec![token(), answer(403, "")], false, Err(403), &["PUT", WITH]);
    check(vec![answer(400, "")], false, Err(400), &["PUT"]);
    // IMDSv1 where tokens are refused, unless it is not allowed.
    for status in [403, 404, 405] {
        check(vec![answer(status, ""), ok()], false, Ok(Some("x")), &["PUT", "GET"]);
        check(vec![answer(status, "")], true, Err(status), &["PUT"]);
    }
    // A token request that times out or fails otherwise: this one GET goes without.
    check(vec![Step::Hang, ok()], false, Ok(Some("x")), &["PUT", "GET"]);
    check(vec![answer(500, ""), ok()], false, Ok(Some("x")), &["PUT", "GET"]);
    check(vec![Step::Hang, token(), ok()], true, Ok(Some("x")), &["PUT", "PUT", WITH]);
    // ... and if IMDS then wants one, it is asked for again.
    check(vec![Step::Hang, answer(401, ""), token(), ok()], false, Ok(Some("x")), &["PUT", "GET", "PUT", WITH]);
    // A token that is none is not put into a header.
    check(vec![answer(200, "a b\r\nc"), token(), ok()], false, Ok(Some("x")), &["PUT", "PUT", WITH]);
}

#[test]
fn a_timed_out_token_request_does_not_disable_tokens() {
    let server =
        Server::queue(vec![Step::Hang, answer(200, "1"), token_answer("300"), answer(200, "2"), answer(200, "3")]);
    let client = client(&server);
    for expected in ["1", "2", "3"] {
        assert_eq!(client.get("mac").unwrap().as_deref(), Some(expected));
    }
    let methods: Vec<String> = server.seen().iter().map(|request| request.method.clone()).collect();
    assert_eq!(methods, ["PUT", "GET", "PUT", "GET", "GET"]);
}

#[test]
fn refused_tokens_are_not_asked_for_until_a_401() {
    let server = Server::queue(vec![
        answer(403, ""),
        answer(200, "1"),
        answer(200, "2"),
        answer(401, ""),
        token_answer("300"),
        answer(200, "3"),
    ]);
    let client = client(&server);
    for expected in ["1", "2", "3"] {
        assert_eq!(client.get("mac").unwrap().as_deref(), Some(expected));
    }
    let methods: Vec<String> = server.seen().iter().map(|request| request.method.clone()).collect();
    assert_eq!(methods, ["PUT", "GET", "GET", "GET", "PUT", "GET"]);
}

#[test]
fn tokens_are_renewed_before_they_end() {
    // A life of zero seconds is due at once.
    let server = Server::queue(vec![token_answer("0"), answer(200, "1"), token_answer("300"), answer(200, "2")]);
    let first = client(&server);
    first.get("mac").unwrap();
    first.get("mac").unwrap();
    assert_eq!(server.lines().iter().filter(|line| line.starts_with("PUT")).count(), 2);
    assert_eq!(server.seen()[0].header(TTL_HEADER), Some("21600"));
    // Due but alive: the old token serves when the renewal fails.
    let server = Server::queue(vec![answer(500, ""), answer(200, "1")]);
    let second = client(&server);
    let now = clock::now().mono;
    let old = Current { value: "old".into(), renew: now, expires: now.plus(Duration::from_mins(1)) };
    second.token.lock().unwrap().current = Some(old);
    second.get("mac").unwrap();
    assert_eq!(server.seen()[1].header(TOKEN_HEADER), Some("old"));
}

#[test]
fn an_operation_ends_in_time() {
    let server = Server::new(|_| Step::Hang);
    let (response, operation) = (Duration::from_millis(150), Duration::from_millis(250));
    let limits = Limits { response, operation, ..config(&server).limits };
    let slow = Client::new(Config { limits, ..config(&server) }).unwrap();
    // The machine may be busy with other things: one of three operations counts.
    let in_time = (0..3).any(|_| {
        let start = clock::now().mono;
        assert!(slow.get("mac").unwrap_err().to_string().contains("1 attempts"));
        clock::now().mono.since(start) < Duration::from_secs(2)
    });
    assert!(in_time);
}

#[test]
fn configuration() {
    let check = |variables: &[(&str, &str)]| {
        Config::from_env(|name| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned()))
    };
    assert_eq!(check(&[]).endpoint, ENDPOINT_V4);
    assert_eq!(check(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "ipv6")]).endpoint, ENDPOINT_V6);
    let both =
        [("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6"), ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://x:1")];
    assert_eq!(check(&both).endpoint, "http://x:1");
    assert!(check(&[("AWS_EC2_METADATA_V1_DISABLED", "true")]).v1_disabled);
    let disabled = Client::new(check(&[("AWS_EC2_METADATA_DISABLED", "1")])).unwrap();
    assert!(disabled.get("mac").unwrap_err().to_string().contains("AWS_EC2_METADATA_DISABLED"));
}

#[test]
fn over_ipv6() {
    let server = Server::at("[::1]:0", |request| match request.method.as_str() {
        "PUT" => token_answer("300"),
        _ => answer(200, request.header("host").unwrap_or_default()),
    });
    let host = client(&server).get("mac").unwrap();
    assert_eq!(host.map(|host| format!("http://{host}")), Some(server.url()));
}

#[test]
fn reads_are_observed() {
    let server = Server::queue(vec![answer(403, ""), answer(404, ""), answer(403, "")]);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let client = client(&server).observed_by(move |read| {
        log.lock().unwrap().push((read.path.to_owned(), read.error.map(|error| error.status)));
    });
    let _ = (client.get("ipv6"), client.get("mac"));
    assert_eq!(*seen.lock().unwrap(), [("ipv6".to_owned(), None), ("mac".to_owned(), Some(403))]);
}

#[test]
fn a_restart_while_imds_is_silent_knows_what_was_told_before() {
    let (server, entries) = tree(&node());
    let first = client(&server);
    let identity = first.identity(true).unwrap();
    // Only one ENI stands in the listing that was read; the other was asked for by its MAC.
    let listing = |macs: &str| {
        entries.lock().unwrap().insert("/latest/meta-data/network/interfaces/macs".into(), macs.to_owned());
    };
    listing(&format!("{A}/"));
    first.query(&Query::Scan).unwrap();
    first.query(&Query::Eni(B.parse().unwrap())).unwrap();
    listing(&format!("{B}/\n{A}/"));
    let told = client(&server).query(&Query::Scan).unwrap();
    let kept = first.to_keep().unwrap();
    assert_eq!(first.to_keep(), None, "nothing is new");
    assert!(kept.iter().all(|(path, _)| !path.contains("security-credentials")));

    let silent = Server::queue(Vec::new());
    drop(first);
    let again = client(&silent).remembering(kept.clone());
    let start = clock::instant();
    assert_eq!(again.identity(true).unwrap(), identity);
    assert_eq!(again.query(&Query::Scan).unwrap(), told);
    assert!(again.get("iam/security-credentials/").is_err());
    println!("told from memory within {:?}; {} requests", start.elapsed(), silent.seen().len());
    assert!(again.to_keep().is_none(), "what was remembered is no news");

    // IMDS answers again: an ENI has gone meanwhile, and from now on a failure is one.
    let again = client(&server).remembering(kept);
    listing(&format!("{A}/"));
    let Answer::Enis(enis) = again.query(&Query::Scan).unwrap() else { panic!("no ENIs") };
    assert_eq!(enis.len(), 1);
    assert!(again.to_keep().unwrap().keys().all(|path| !path.contains(B)));
    assert!(!again.memory().knows("mac"));
}
