use super::*;
use crate::aws::imds;
use crate::aws::script::{Request, Server, Step, answer, answer_with};
use crate::model::ec2::{ConntrackTimeouts, Count, Create};
use crate::model::ids::EniId;
use crate::model::map::Map;

const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
const INTERFACES: &str = include_str!("../../../testdata/ec2/interfaces.xml");
const CREATED: &str = include_str!("../../../testdata/ec2/created.xml");
const ASSIGNED: &str = include_str!("../../../testdata/ec2/assigned_addresses.xml");

fn chain() -> Arc<Chain> {
    let lookup = |name: &str| match name {
        "AWS_ACCESS_KEY_ID" => Some("AKID".to_owned()),
        "AWS_SECRET_ACCESS_KEY" => Some(SECRET.to_owned()),
        _ => None,
    };
    let imds = imds::Client::new(imds::Config::at("http://127.0.0.1:1")).unwrap();
    Arc::new(Chain::from_env(lookup, Arc::new(imds)).unwrap())
}

fn config(server: &Server) -> Config {
    Config { http_timeout: server.patience(), pace: Pace::thousandths(0), ..Config::at(server.url(), "eu-west-1") }
}

fn client(server: &Server) -> Client {
    Client::new(config(server), chain()).unwrap()
}

fn describe() -> Call {
    Call::DescribeAttached("i-8555".into())
}

fn assign() -> Call {
    Call::Assign { eni: "eni-5881".into(), count: Count::Addresses(2) }
}

fn create() -> Call {
    Call::Create(Create {
        subnet: "subnet-1a96".into(),
        description: "aws-K8S-i-8555".into(),
        groups: Vec::new(),
        count: Count::Addresses(1),
        conntrack: ConntrackTimeouts::default(),
        tags: Map::new(),
        client_token: "0b0f9c1e".into(),
    })
}

fn error(code: &str) -> String {
    format!(
        "<Response><Errors><Error><Code>{code}</Code><Message>m</Message></Error></Errors>\
         <RequestID>req-1</RequestID></Response>"
    )
}

fn last_page() -> String {
    INTERFACES.replace("<nextToken>page-2</nextToken>", "")
}

fn enis(ids: &[&str], next: &str) -> Step {
    let item = |id: &&str| format!("<item><networkInterfaceId>{id}</networkInterfaceId></item>");
    let items = ids.iter().map(item).collect::<Vec<_>>().concat();
    answer(
        200,
        &format!(
            "<DescribeNetworkInterfacesResponse><networkInterfaceSet>{items}</networkInterfaceSet>\
             <nextToken>{next}</nextToken></DescribeNetworkInterfacesResponse>"
        ),
    )
}

/// Runs a call against the steps: the result, and how many requests there were.
fn run(call: &Call, steps: Vec<Step>) -> (std::result::Result<Reply, Failure>, usize) {
    let server = Server::queue(steps);
    let result = client(&server).execute(call);
    (result, server.seen().len())
}

fn verified(request: &Request) -> std::result::Result<sign::Verified, sign::Refusal> {
    let received = sign::Received {
        method: &request.method,
        path: &request.path,
        headers: &request.headers,
        body: request.body.as_bytes(),
    };
    sign::verify(&received, |key| (key == "AKID").then(|| SECRET.to_owned()))
}

#[test]
fn a_request_is_signed_and_named() {
    let server = Server::queue(vec![answer(200, &last_page())]);
    let lookup = |name: &str| match name {
        "AWS_EC2_ENDPOINT" => Some(server.url()),
        "VPC_CNI_VERSION" => Some("v1.23.1".to_owned()),
        _ => None,
    };
    let config = Config::from_env(lookup, "eu-west-1");
    let Ok(Reply::Interfaces(found)) = Client::new(config, chain()).unwrap().execute(&describe()) else { panic!() };
    assert_eq!(found.len(), 2);
    let request = &server.seen()[0];
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/"));
    assert_eq!(
        request.body,
        "Action=DescribeNetworkInterfaces&Version=2016-11-15&Filter.1.Name=attachment.instance-id\
         &Filter.1.Value.1=i-8555&MaxResults=200"
    );
    assert_eq!(request.header("content-type"), Some("application/x-www-form-urlencoded; charset=utf-8"));
    let agent = format!("enibox/{} amazon-vpc-cni-k8s/v1.23.1", crate::VERSION);
    assert_eq!(request.header("user-agent"), Some(agent.as_str()));
    assert_eq!(request.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("host")).count(), 1);
    let signed = verified(request).unwrap();
    assert_eq!((signed.region.as_str(), signed.service.as_str(), signed.token), ("eu-west-1", "ec2", None));
    assert!(clock::now().wall.since(signed.time) < Duration::from_mins(1));
}

#[test]
fn an_endpoint_may_have_a_path() {
    let server = Server::queue(vec![answer(200, &last_page())]);
    let config = Config { endpoint: format!("{}/ec2", server.url()), ..config(&server) };
    Client::new(config, chain()).unwrap().execute(&describe()).unwrap();
    assert_eq!(server.lines(), ["POST /ec2/"]);
    verified(&server.seen()[0]).unwrap();
}

#[test]
fn pages_are_joined() {
    let server = Server::queue(vec![enis(&["eni-1", "eni-2"], "p/2"), enis(&["eni-3"], "p3"), enis(&["eni-4"], "")]);
    let Ok(Reply::Interfaces(found)) = client(&server).execute(&describe()) else { panic!() };
    let ids: Vec<&str> = found.iter().map(|eni| eni.id.as_str()).collect();
    assert_eq!(ids, ["eni-1", "eni-2", "eni-3", "eni-4"]);
    let tokens: Vec<Option<String>> =
        server.seen().iter().map(|request| request.field("NextToken").map(str::to_owned)).collect();
    assert_eq!(tokens, [None, Some("p%2F2".into()), Some("p3".into())]);
}

#[test]
fn pages_end() {
    let server = Server::new(|_| enis(&["eni-1"], "same"));
    let failure = client(&server).execute(&describe()).unwrap_err();
    assert_eq!((failure.message.as_str(), server.seen().len()), ("the next page is the same page", 2));
    let mut page = 0;
    let server = Server::new(move |_| {
        page += 1;
        enis(&["eni-1"], &format!("p{page}"))
    });
    let failure = client(&server).execute(&describe()).unwrap_err();
    assert_eq!((failure.message.as_str(), server.seen().len()), ("more than 100 pages", 100));
}

#[test]
fn failures_keep_what_ec2_said() {
    let (result, requests) =
        run(&Call::Delete("eni-1".into()), vec![answer(400, &error("InvalidNetworkInterface.InUse"))]);
    let failure = result.unwrap_err();
    assert_eq!(
        failure.to_string(),
        "DeleteNetworkInterface: InvalidNetworkInterface.InUse: m (HTTP 400, request req-1)"
    );
    assert_eq!((failure.maybe_applied, requests), (false, 1));
}

/// What one kind of trouble before a good answer leads to.
fn check(
    call: &Call,
    steps: &[Step],
    good: &str,
    requests: usize,
    expected: std::result::Result<(), (&str, u16, bool)>,
) {
    let mut all = steps.to_vec();
    all.push(answer(200, good));
    let (result, seen) = run(call, all);
    let told =
        result.as_ref().map(drop).map_err(|failure| (failure.code.as_str(), failure.status, failure.maybe_applied));
    assert_eq!((told, seen), (expected, requests), "{} {result:?}", call.action());
}

fn gone() -> Step {
    Step::Close(Vec::new())
}

fn half() -> Step {
    Step::Close(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n<Assign".to_vec())
}

fn page(status: u16) -> Step {
    answer(status, "<html><body>proxy</body></html>")
}

#[test]
fn reading_is_retried() {
    let good = last_page();
    let away = || answer(503, &error("Unavailable"));
    check(&describe(), &[away(), away()], &good, 3, Ok(()));
    check(&describe(), &[away(), away(), away()], &good, 3, Err(("Unavailable", 503, false)));
    check(&describe(), &[answer(400, &error("RequestTimeout"))], &good, 2, Ok(()));
    check(&describe(), &[page(503), page(502)], &good, 3, Ok(()));
    check(&describe(), &[answer(500, &error("InternalError"))], &good, 2, Ok(()));
    check(&describe(), &[gone(), half()], &good, 3, Ok(()));
    check(&describe(), &[Step::Hang], &good, 2, Ok(()));
    check(&describe(), &[Step::Hang, Step::Hang, Step::Hang], &good, 3, Err(("", 0, false)));
    // Not retried.
    for call in [&describe(), &create(), &assign()] {
        let throttled = answer(503, &error("RequestLimitExceeded"));
        check(call, &[throttled], &good, 1, Err(("RequestLimitExceeded", 503, false)));
        check(call, &[answer(400, &error("Throttling"))], &good, 1, Err(("Throttling", 400, false)));
    }
    check(
        &describe(),
        &[answer(403, &error("UnauthorizedOperation"))],
        &good,
        1,
        Err(("UnauthorizedOperation", 403, false)),
    );
    check(&describe(), &[page(407)], &good, 1, Err(("", 407, false)));
    check(&describe(), &[page(200)], &good, 1, Err(("", 200, false)));
    check(
        &describe(),
        &[answer_with(307, &[("Location", "http://127.0.0.1:1/")], "")],
        &good,
        1,
        Err(("", 307, false)),
    );
}

#[test]
fn an_assign_or_unassign_is_never_sent_twice_once_it_may_have_worked() {
    // Certainly not carried out: sent again.
    check(&assign(), &[answer(503, &error("Unavailable"))], ASSIGNED, 2, Ok(()));
    check(&assign(), &[page(503)], ASSIGNED, 2, Ok(()));
    // Perhaps carried out: not.
    for unclear in [gone(), half(), Step::Hang, page(502), page(504), page(200)] {
        let status = match &unclear {
            Step::Answer(bytes) => std::str::from_utf8(&bytes[9..12]).unwrap().parse().unwrap(),
            _ => 0,
        };
        check(&assign(), &[unclear], ASSIGNED, 1, Err(("", status, true)));
    }
    check(&assign(), &[answer(500, &error("InternalError"))], ASSIGNED, 1, Err(("InternalError", 500, true)));
    check(&Call::AssignIpv6Prefix("eni-1".into()), &[gone()], ASSIGNED, 1, Err(("", 0, true)));
    // What EC2 takes twice may be another pod's by then.
    let eni = || EniId::from("eni-1");
    let addresses = Call::UnassignAddresses { eni: eni(), addresses: vec!["10.0.0.9".parse().unwrap()] };
    let prefixes = Call::UnassignPrefixes { eni: eni(), prefixes: vec!["10.0.0.0/28".parse().unwrap()] };
    check(&addresses, &[gone()], ASSIGNED, 1, Err(("", 0, true)));
    check(&prefixes, &[Step::Hang], ASSIGNED, 1, Err(("", 0, true)));
    // EC2's own refusal leaves nothing open.
    let refusal = answer(400, &error("PrivateIpAddressLimitExceeded"));
    check(&assign(), &[refusal], ASSIGNED, 1, Err(("PrivateIpAddressLimitExceeded", 400, false)));
}

#[test]
fn a_create_is_sent_again_with_the_same_token() {
    let server = Server::queue(vec![gone(), Step::Hang, answer(200, CREATED)]);
    let Ok(Reply::Created(eni)) = client(&server).execute(&create()) else { panic!() };
    assert_eq!(eni.id.as_str(), "eni-new");
    let tokens: Vec<_> = server.seen().iter().map(|request| request.field("ClientToken").map(str::to_owned)).collect();
    assert_eq!(tokens, vec![Some("0b0f9c1e".to_owned()); 3]);
    // An earlier attempt that may have worked stays told, whatever the last one said.
    check(
        &create(),
        &[gone(), answer(400, &error("InsufficientFreeAddressesInSubnet"))],
        CREATED,
        2,
        Err(("InsufficientFreeAddressesInSubnet", 400, true)),
    );
}

#[test]
fn nothing_listens() {
    let server = Server::queue(Vec::new());
    let config = Config { endpoint: "http://127.0.0.1:1".into(), ..config(&server) };
    let failure = Client::new(config, chain()).unwrap().execute(&assign()).unwrap_err();
    assert_eq!((failure.maybe_applied, failure.status), (false, 0));
    assert!(failure.message.contains("refused"), "{failure}");
}

#[test]
fn retries_have_a_quota() {
    let server = Server::new(|_| answer(503, &error("Unavailable")));
    let client = client(&server);
    for _ in 0..60 {
        client.execute(&describe()).unwrap_err();
    }
    // 500 tokens pay 100 retries.
    assert_eq!(server.seen().len(), 60 + 100);
    assert_eq!(*client.quota.lock().unwrap(), 0);
    let course = Course { paid: RETRY_COST, ..Course::default() };
    client.refund(&course);
    client.refund(&Course::default());
    assert_eq!(*client.quota.lock().unwrap(), RETRY_COST + 1);
    for _ in 0..1000 {
        client.refund(&course);
    }
    assert_eq!(*client.quota.lock().unwrap(), QUOTA);
}

#[test]
fn time_outs_cost_double() {
    let server = Server::queue(vec![Step::Hang, answer(200, &last_page())]);
    let client = client(&server);
    *client.quota.lock().unwrap() = TIMEOUT_COST - 1;
    assert!(client.execute(&describe()).is_err());
    *client.quota.lock().unwrap() = TIMEOUT_COST;
    assert!(client.execute(&describe()).is_ok());
}

#[test]
fn a_wrong_clock_is_learnt() {
    let ahead = Duration::from_hours(1);
    let server = Server::new(move |request| {
        let told = clock::now().wall.plus(ahead);
        let signed = verified(request).unwrap();
        if told.since(signed.time) < Duration::from_mins(5) {
            return answer(200, &last_page());
        }
        let text = told.to_string();
        let month = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
            [text[5..7].parse::<usize>().unwrap() - 1];
        let date = format!("Xxx, {} {month} {} {} GMT", &text[8..10], &text[..4], &text[11..19]);
        answer_with(400, &[("Date", &date)], &error("RequestExpired"))
    });
    let client = client(&server);
    assert!(client.execute(&describe()).is_ok());
    assert_eq!(server.seen().len(), 2);
    assert!(client.execute(&describe()).is_ok());
    assert_eq!(server.seen().len(), 3);
}

#[test]
fn a_refused_signature_with_the_right_clock_is_final() {
    let (result, requests) = run(&describe(), vec![answer(403, &error("SignatureDoesNotMatch"))]);
    assert_eq!((result.unwrap_err().code.as_str(), requests), ("SignatureDoesNotMatch", 1));
    // Keys are tried anew once, also for calls that are not idempotent: nothing was carried out.
    let expired = || answer(400, &error("ExpiredToken"));
    check(&assign(), &[expired()], ASSIGNED, 2, Ok(()));
    check(&assign(), &[expired(), expired()], ASSIGNED, 2, Err(("ExpiredToken", 400, false)));
}

#[test]
fn refused_credentials_are_fetched_anew() {
    let mut number = 0;
    let imds = Server::new(move |request| match (request.method.as_str(), request.path.rsplit('/').next()) {
        ("PUT", _) => answer(403, ""),
        (_, Some("")) => answer(200, "role"),
        _ => {
            number += 1;
            answer(
                200,
                &format!(r#"{{"Code":"Success","AccessKeyId":"K{number}","SecretAccessKey":"s","Token":"t{number}"}}"#),
            )
        }
    });
    let ec2 = Server::new(|request| {
        let old = request.header("x-amz-security-token") == Some("t1");
        if old { answer(400, &error("ExpiredToken")) } else { answer(200, &last_page()) }
    });
    let imds = Arc::new(imds::Client::new(imds::Config::at(imds.url())).unwrap());
    let client = Client::new(config(&ec2), Arc::new(Chain::from_env(|_| None, imds).unwrap())).unwrap();
    assert!(client.execute(&describe()).is_ok());
    let tokens: Vec<_> =
        ec2.seen().iter().map(|request| request.header("x-amz-security-token").map(str::to_owned)).collect();
    assert_eq!(tokens, [Some("t1".to_owned()), Some("t2".to_owned())]);
}

#[test]
fn calls_are_observed() {
    let server = Server::queue(vec![answer(503, &error("Unavailable")), answer(200, &last_page()), page(407)]);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let client = client(&server).observed_by(move |call| {
        log.lock().unwrap().push((call.action, call.failure.map(|failure| failure.status), call.attempts));
    });
    let _ = client.execute(&describe());
    let _ = client.execute(&assign());
    let expected = [("DescribeNetworkInterfaces", None, 2), ("AssignPrivateIpAddresses", Some(407), 1)];
    assert_eq!(*seen.lock().unwrap(), expected);
}

#[test]
fn an_answer_has_a_limit() {
    let huge = format!("<DescribeNetworkInterfacesResponse>{}", " ".repeat(9 * 1024 * 1024));
    let server = Server::queue(vec![answer(200, &huge)]);
    let config = Config { http_timeout: Duration::from_secs(10), ..config(&server) };
    let failure = Client::new(config, chain()).unwrap().execute(&describe()).unwrap_err();
    assert!(failure.message.contains("larger than"), "{failure}");
    assert_eq!(server.seen().len(), 1);
}

#[test]
fn configuration() {
    let check = |variables: &[(&str, &str)]| {
        let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
        let config = Config::from_env(lookup, "cn-north-1");
        (config.endpoint, config.http_timeout.as_secs(), config.max_attempts)
    };
    let standard = "https://ec2.cn-north-1.amazonaws.com.cn".to_owned();
    assert_eq!(check(&[]), (standard.clone(), 10, 3));
    assert_eq!(check(&[("HTTP_TIMEOUT", "9"), ("AWS_MAX_ATTEMPTS", "0")]), (standard.clone(), 10, 3));
    assert_eq!(check(&[("HTTP_TIMEOUT", "25"), ("AWS_MAX_ATTEMPTS", "5")]), (standard.clone(), 25, 5));
    assert_eq!(check(&[("HTTP_TIMEOUT", "x"), ("AWS_MAX_ATTEMPTS", "1000")]), (standard.clone(), 10, 20));
    let huge = u64::MAX.to_string();
    assert_eq!(check(&[("HTTP_TIMEOUT", &huge), ("AWS_MAX_ATTEMPTS", &huge)]), (standard, 3600, 20));
    assert_eq!(user_agent(""), format!("enibox/{0} amazon-vpc-cni-k8s/{0}", crate::VERSION));
    assert_eq!(user_agent("a b\r\nc"), format!("enibox/{} amazon-vpc-cni-k8s/abc", crate::VERSION));
}

#[test]
fn dates_of_http() {
    let check = |text| parse_http_date(text).map(|wall| wall.to_string());
    assert_eq!(check("Sat, 21 Nov 2026 01:30:00 GMT").as_deref(), Some("2026-11-21T01:30:00Z"));
    for bad in ["", "now", "Sat, 21 Nox 2026 01:30:00 GMT", "Sat, 21 Nov 2026 01:30:00 CET", "Sat, 21 Nov 2026"] {
        assert_eq!(check(bad), None, "{bad}");
    }
}
