use super::*;
use crate::aws::script::{Server, Step, answer};
use crate::model::time::Mono;

const STS: &str = include_str!("../../../testdata/ec2/sts.xml");

fn at(seconds: i64) -> Now {
    Now { mono: Mono::from_nanos(0), wall: Wall::from_unix_seconds(seconds) }
}

fn credentials(name: &str, expires: Option<i64>) -> Credentials {
    Credentials {
        access_key: name.into(),
        secret: "secret".into(),
        token: None,
        expires: expires.map(Wall::from_unix_seconds),
    }
}

fn document(name: &str, expiration: &str) -> String {
    format!(
        r#"{{"Code":"Success","LastUpdated":"x","Type":"AWS-HMAC","AccessKeyId":"{name}","SecretAccessKey":"s","Token":"t","Expiration":"{expiration}"}}"#
    )
}

const FAR: &str = "2126-11-21T02:36:42Z";

fn seconds(due: Option<Wall>) -> Option<i64> {
    due.map(Wall::as_unix_seconds)
}

#[test]
fn fresh_credentials_are_due_ahead_of_their_end() {
    let due = |now: i64, expires, outlive, random| {
        let mut state = State { rejected: true, ..State::default() };
        let new = credentials("a", expires);
        assert_eq!(state.settle(Ok(new.clone()), outlive, at(now), random).unwrap(), new);
        assert!(!state.rejected);
        seconds(state.due)
    };
    for outlive in [false, true] {
        assert_eq!(due(0, None, outlive, 0), None);
        assert_eq!(due(0, Some(3600), outlive, 0), Some(3300));
        assert_eq!(due(0, Some(3600), outlive, 149_999), Some(3150)); // 5 min and nearly 2.5 more
        assert_eq!(due(0, Some(3600), outlive, 150_000), Some(3300)); // the random part wraps
        assert_eq!(due(0, Some(200), outlive, 0), Some(100)); // short lives: after half
        assert_eq!(due(0, Some(10), outlive, 0), Some(30)); // but not at once
    }
    // Ended on arrival: the instance role's are all that there is.
    assert_eq!(due(100, Some(50), false, 0), Some(130));
    assert_eq!(due(100, Some(50), true, 599_999), Some(100 + 899));
}

#[test]
fn a_failed_refresh_keeps_what_lives() {
    let check = |current: Option<i64>, outlive, random, expected: Option<i64>| {
        let mut state = State { current: current.map(|end| credentials("old", Some(end))), ..State::default() };
        let result = state.settle(Err(Error::new("no")), outlive, at(1000), random);
        assert_eq!(result.is_ok(), expected.is_some());
        if let Some(pause) = expected {
            assert_eq!(seconds(state.due), Some(1000 + pause));
        }
    };
    check(None, true, 0, None);
    check(Some(2000), false, 0, Some(30));
    check(Some(2000), true, 29_999, Some(59));
    // The instance role's serve on when they have ended, others do not.
    check(Some(900), true, 0, Some(300));
    check(Some(900), true, 599_999, Some(899));
    check(Some(900), false, 0, None);
}

#[test]
fn who_refreshes_and_who_waits() {
    let check = |current: Option<i64>, due, rejected, refreshing, expected: &str| {
        let state = State {
            current: current.map(|end| credentials("c", Some(end))),
            due: Some(Wall::from_unix_seconds(due)),
            rejected,
            refreshing,
        };
        let told = match state.decide(at(1000)) {
            Decision::Use(_) => "use",
            Decision::Refresh => "refresh",
            Decision::Wait => "wait",
        };
        assert_eq!(told, expected);
    };
    check(None, 0, false, false, "refresh");
    check(None, 0, false, true, "wait");
    check(Some(3000), 2000, false, false, "use");
    check(Some(3000), 1000, false, false, "refresh");
    check(Some(3000), 1000, false, true, "use");
    check(Some(1000), 500, false, true, "wait");
    check(Some(500), 1300, false, false, "use"); // ended, but the next try is later
    check(Some(3000), 2000, true, false, "refresh");
    check(Some(3000), 2000, true, true, "wait");
}

fn chain(variables: &[(&str, &str)], imds: &str) -> Result<Chain> {
    let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
    let imds = imds::Config { pace: Pace::thousandths(0), ..imds::Config::at(imds) };
    Chain::at_pace(lookup, Arc::new(imds::Client::new(imds).unwrap()), Pace::thousandths(0))
}

#[test]
fn the_first_configured_source_counts() {
    let check = |variables: &[(&str, &str)], expected: std::result::Result<&str, &str>| {
        let told = chain(variables, "http://127.0.0.1:1").map_err(|error| error.to_string());
        assert_eq!(told.as_ref().map(Chain::source).map_err(String::as_str), expected);
    };
    let key = ("AWS_ACCESS_KEY_ID", "AK");
    let secret = ("AWS_SECRET_ACCESS_KEY", "SK");
    let file = ("AWS_WEB_IDENTITY_TOKEN_FILE", "/token");
    let role = ("AWS_ROLE_ARN", "arn");
    let full = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/v1/credentials");
    check(&[], Ok("instance role"));
    check(&[key], Ok("instance role"));
    check(&[key, secret, file, role, full], Ok("environment"));
    check(&[file, role, full], Ok("web identity"));
    check(&[full], Ok("container endpoint"));
    check(&[("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/x")], Ok("container endpoint"));
    check(&[file, full], Err("set up credentials: AWS_WEB_IDENTITY_TOKEN_FILE is set, but AWS_ROLE_ARN is not"));
    let clear = |url| [("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)];
    for allowed in
        ["http://localhost:1/x", "http://127.0.0.1/x", "http://[::1]/", "http://[fd00:ec2::23]/v1", "https://any.host/"]
    {
        check(&clear(allowed), Ok("container endpoint"));
    }
    for refused in ["http://169.254.169.254/x", "http://example.com/", "http://[fd00:ec2::24]/", "http://10.0.0.1/"] {
        let error = chain(&clear(refused), "http://127.0.0.1:1").unwrap_err().to_string();
        assert!(error.contains("is not allowed"), "{error}");
    }
}

#[test]
fn keys_of_the_environment() {
    let variables = [("AWS_ACCESS_KEY_ID", "AK"), ("AWS_SECRET_ACCESS_KEY", "SK"), ("AWS_SESSION_TOKEN", "T")];
    let chain = chain(&variables, "http://127.0.0.1:1").unwrap();
    let got = chain.get().unwrap();
    assert_eq!((got.access_key.as_str(), got.secret.as_str(), got.token.as_deref()), ("AK", "SK", Some("T")));
    chain.reject(&got);
    assert_eq!(chain.get().unwrap(), got);
    assert!(!format!("{chain:?}").contains("SK"));
}

/// An IMDS without tokens that gives the documents one after the other.
fn role_server(mut documents: Vec<Step>) -> Server {
    documents.reverse();
    Server::new(move |request| match (request.method.as_str(), request.path.as_str()) {
        ("PUT", _) => answer(403, ""),
        (_, "/latest/meta-data/iam/security-credentials/") => answer(200, "node-role\n"),
        (_, "/latest/meta-data/iam/security-credentials/node-role") => {
            documents.pop().unwrap_or_else(|| answer(404, ""))
        }
        _ => answer(404, ""),
    })
}

fn fetches(server: &Server) -> usize {
    server.lines().iter().filter(|line| line.ends_with("/node-role")).count()
}

#[test]
fn the_instance_role_is_cached_and_renewed_when_refused() {
    let server = role_server(vec![answer(200, &document("A", FAR)), answer(200, &document("B", FAR))]);
    let chain = chain(&[], &server.url()).unwrap();
    let first = chain.get().unwrap();
    assert_eq!((first.access_key.as_str(), first.token.as_deref()), ("A", Some("t")));
    assert_eq!(chain.get().unwrap(), first);
    assert_eq!(fetches(&server), 1);
    chain.reject(&first);
    let second = chain.get().unwrap();
    assert_eq!(second.access_key, "B");
    // Another thread that was refused with the first ones does not make the second go.
    chain.reject(&first);
    assert_eq!(chain.get().unwrap(), second);
    assert_eq!(fetches(&server), 2);
    // A refresh that fails keeps what lives.
    chain.reject(&second);
    assert_eq!(chain.get().unwrap(), second);
    assert_eq!(chain.get().unwrap(), second);
    assert_eq!(fetches(&server), 3);
}

#[test]
fn ended_credentials_of_the_role_serve_on() {
    let server = role_server(vec![answer(200, &document("A", "2020-01-01T00:00:00Z"))]);
    let chain = chain(&[], &server.url()).unwrap();
    // Nobody asks again for minutes, unless AWS refuses them; then it is asked once, in vain.
    let first = chain.get().unwrap();
    assert_eq!(chain.get().unwrap(), first);
    assert_eq!(fetches(&server), 1);
    chain.reject(&first);
    for _ in 0..3 {
        assert_eq!(chain.get().unwrap(), first);
    }
    assert_eq!(fetches(&server), 2);
}

#[test]
fn what_the_role_may_answer() {
    let check = |steps: Vec<Step>, expected: &str| {
        let server = role_server(steps);
        let error = chain(&[], &server.url()).unwrap().get().unwrap_err().to_string();
        assert_eq!(error.strip_prefix("get credentials from instance role: "), Some(expected));
    };
    check(vec![answer(404, "")], "role \"node-role\" has no credentials (HTTP 404)");
    check(
        vec![answer(200, r#"{"Code":"AssumeRoleUnauthorizedAccess","Message":"cannot be assumed"}"#)],
        "role \"node-role\": AssumeRoleUnauthorizedAccess: cannot be assumed",
    );
    check(vec![answer(200, "<html>secret")], "role \"node-role\": parse credentials: line 1 column 1");
    check(vec![answer(200, r#"{"Code":"Success"}"#)], "role \"node-role\": parse credentials: no AccessKeyId");
    check(vec![answer(200, &document("A", "soon"))], "role \"node-role\": parse credentials: expiration \"soon\"");
    let server = Server::new(|request| answer(if request.method == "PUT" { 403 } else { 404 }, ""));
    let error = chain(&[], &server.url()).unwrap().get().unwrap_err().to_string();
    assert!(error.ends_with("the instance has no role (HTTP 404)"), "{error}");
}

#[test]
fn one_thread_refreshes_for_all() {
    let server = role_server(vec![answer(200, &document("A", FAR))]);
    let chain = chain(&[], &server.url()).unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| chain.get().unwrap().access_key)).collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), "A");
        }
    });
    assert_eq!(fetches(&server), 1);
}

fn temporary(name: &str, text: &str) -> String {
    let file = std::env::temp_dir().join(format!("enibox-{name}-{}", std::process::id()));
    std::fs::write(&file, text).unwrap();
    file.display().to_string()
}

#[test]
fn the_container_endpoint() {
    let body = r#"{"AccessKeyId":"C","SecretAccessKey":"s","Token":"t"}"#;
    let server = Server::queue(vec![answer(500, ""), Step::Close(Vec::new()), answer(200, body), answer(200, body)]);
    let url = format!("{}/v1/credentials?x=1", server.url());
    let file = temporary("pod-token", "eyJ");
    let variables = [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", url.as_str()),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", file.as_str()),
        ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "not this one"),
    ];
    let pod = chain(&variables, "http://127.0.0.1:1").unwrap();
    let got = pod.get().unwrap();
    assert_eq!((got.access_key.as_str(), got.expires), ("C", None));
    assert_eq!(server.lines(), ["GET /v1/credentials?x=1"; 3]);
    assert_eq!(server.seen()[0].header("authorization"), Some("eyJ"));
    assert_eq!(server.seen()[0].header("accept"), Some("application/json"));
    // The token is read again for each refresh: it rotates.
    std::fs::write(&file, "new").unwrap();
    pod.reject(&got);
    pod.get().unwrap();
    assert_eq!(server.seen()[3].header("authorization"), Some("new"));

    let refused = Server::queue(vec![answer(403, r#"{"code":"AccessDenied","message":"no"}"#)]);
    let url = refused.url();
    let check = |token: &str, expected: &str| {
        let variables =
            [("AWS_CONTAINER_CREDENTIALS_FULL_URI", url.as_str()), ("AWS_CONTAINER_AUTHORIZATION_TOKEN", token)];
        let error = chain(&variables, "http://127.0.0.1:1").unwrap().get().unwrap_err().to_string();
        assert_eq!(error, format!("get credentials from container endpoint: {expected}"));
    };
    check("ok", "HTTP 403: AccessDenied: no");
    check("a\nb", "authorization token holds a line break");
    assert_eq!(refused.lines(), ["GET /"]);
    std::fs::remove_file(file).unwrap();
}

#[test]
fn web_identity_at_sts() {
    let error = |code: &str| {
        format!(
            "<ErrorResponse><Error><Code>{code}</Code><Message>m</Message></Error><RequestId>r</RequestId></ErrorResponse>"
        )
    };
    let imds = Server::new(|request| match request.path.as_str() {
        "/latest/dynamic/instance-identity/document" => answer(200, r#"{"region":"eu-west-1"}"#),
        _ => answer(403, ""),
    });
    let file = temporary("web-token", "eyJhbGciOi\n");
    let run = |steps: Vec<Step>, session: &str| {
        let sts = Server::queue(steps);
        let url = sts.url();
        let variables = [
            ("AWS_WEB_IDENTITY_TOKEN_FILE", file.as_str()),
            ("AWS_ROLE_ARN", "arn:aws:iam::1:role/cni"),
            ("AWS_ROLE_SESSION_NAME", session),
            ("AWS_ENDPOINT_URL_STS", url.as_str()),
        ];
        let got = chain(&variables, &imds.url()).unwrap().get().map_err(|error| error.to_string());
        (got, sts.seen())
    };
    let (got, seen) = run(vec![answer(400, &error("IDPCommunicationError")), answer(200, STS)], "me");
    let got = got.unwrap();
    assert_eq!((got.access_key.as_str(), got.token.as_deref()), ("ASIAWEB", Some("FwoG/+==")));
    assert_eq!(got.expires.map(|end| end.to_string()).as_deref(), Some(FAR));
    assert_eq!(seen.len(), 2);
    assert_eq!(
        seen[0].body,
        "Action=AssumeRoleWithWebIdentity&Version=2011-06-15&RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fcni\
         &RoleSessionName=me&WebIdentityToken=eyJhbGciOi"
    );
    assert_eq!(seen[0].header("authorization"), None);
    let (got, seen) = run(vec![answer(403, &error("AccessDenied"))], "");
    let expected = "get credentials from web identity: assume role with web identity: AccessDenied: m \
                    (HTTP 403, request r)";
    assert_eq!(got, Err(expected.to_owned()));
    assert!(seen[0].field("RoleSessionName").unwrap().parse::<u64>().is_ok());
    let (got, seen) = run(vec![answer(400, &error("Throttling")), answer(200, STS)], "");
    assert!(got.is_ok() && seen.len() == 2);
    let (got, seen) = run(vec![answer(503, ""), answer(503, ""), answer(503, "busy")], "");
    assert!(got.unwrap_err().contains("HTTP 503"));
    assert_eq!(seen.len(), 3);
    std::fs::remove_file(file).unwrap();
}
