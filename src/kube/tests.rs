//! The client and its watches against the sandbox's API server, over sockets, plain and with TLS.

use super::config::{Authority, Token};
use super::watch::Tempo;
use super::*;
use crate::clock;
use crate::http::script::{self, Step};
use crate::model::kube::{Call, Feature, Notice, POD_ENI, POD_IPS, Regarding, Reply};
use crate::model::map::Set;
use crate::sandbox::kube::{Api, Kind};
use crate::sandbox::serve::kube::{Kube, Server};
use serde_json::json;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);

fn config(servers: &[String]) -> Config {
    Config {
        servers: servers.to_vec(),
        authority: Authority::System,
        token: Token::None,
        node: "n1".into(),
        pod: "aws-node-x".into(),
        namespace: "kube-system".into(),
    }
}

fn client(servers: &[String]) -> Client {
    Client::new(config(servers)).unwrap().0
}

struct Bed {
    kube: Arc<Kube>,
    server: Server,
}

impl Bed {
    fn new() -> Bed {
        let mut api = Api::new();
        api.add_node("n1", 58);
        api.add_pod("a", "p", "n1", &json!({}));
        let kube = Kube::new(api);
        let server = kube.serve(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        Bed { kube, server }
    }

    fn url(&self) -> String {
        format!("http://{}", self.server.address())
    }

    fn client(&self) -> Client {
        client(&[self.url()])
    }

    fn lists(&self) -> usize {
        self.kube.requests().iter().filter(|line| line.contains("limit=")).count()
    }
}

fn pod() -> Call {
    Call::Pod { namespace: "a".into(), name: "p".into() }
}

#[test]
fn every_call() {
    let bed = Bed::new();
    let client = bed.client();
    client.probe().unwrap();
    assert_eq!(client.node(Duration::from_secs(5)).unwrap().max_pods, Some(58));
    let annotate =
        Call::Annotate { namespace: "a".into(), name: "p".into(), key: POD_IPS.into(), value: "10.0.0.1".into() };
    assert_eq!(client.execute(&annotate), Ok(Reply::Done));
    let Ok(Reply::Pod(found)) = client.execute(&pod()) else { panic!() };
    assert_eq!(found.annotations.get(POD_IPS).map(String::as_str), Some("10.0.0.1"));
    assert!(found.uid.starts_with("uid-") && !found.wants_branch);
    let missing = Call::Pod { namespace: "a".into(), name: "q".into() };
    let failure = client.execute(&missing).unwrap_err();
    assert_eq!((failure.status, failure.message.contains("not found")), (404, true), "{failure}");
    for name in ["", "../nodes", "a/b", ".", "a?b"] {
        let bad = Call::Pod { namespace: "a".into(), name: name.into() };
        assert_eq!(client.execute(&bad).unwrap_err().status, 400, "{name:?}");
    }
    assert_eq!(client.execute(&Call::CniNode).unwrap_err().status, 404);
    bed.kube.change(|api| api.add_cni_node("n1"));
    let Ok(Reply::CniNode { version, features }) = client.execute(&Call::CniNode) else { panic!() };
    assert!(features.is_empty());
    let features = vec![Feature { name: "SecurityGroupsForPods".into(), value: String::new() }];
    let set = Call::SetFeatures { version, features: features.clone() };
    assert_eq!(client.execute(&set), Ok(Reply::Done));
    assert_eq!(client.execute(&set).unwrap_err().status, 409);
    let Ok(Reply::CniNode { features: now, .. }) = client.execute(&Call::CniNode) else { panic!() };
    assert_eq!(now, features);
}

#[test]
fn a_known_eni_config_bridges_an_outage() {
    let bed = Bed::new();
    let client = bed.client();
    let call = |name: &str| Call::EniConfig(name.into());
    bed.kube.change(|api| api.add_eni_config("eu-west-1a", "subnet-1", &["sg-1"]));
    let first = client.execute(&call("eu-west-1a")).unwrap();
    bed.kube.tune(|knobs| knobs.refuse = [(500, None), (503, None)].into());
    assert_eq!(client.execute(&call("eu-west-1a")).unwrap(), first);
    assert_eq!(client.execute(&call("eu-west-1b")).unwrap_err().status, 503);
    bed.kube.change(|api| api.remove(Kind::EniConfig, "", "eu-west-1a"));
    assert_eq!(client.execute(&call("eu-west-1a")).unwrap_err().status, 404);
    drop(bed);
    let failure = client.execute(&call("eu-west-1a")).unwrap_err();
    assert_eq!(failure.status, 0, "what was deleted is not remembered: {failure}");
}

#[test]
fn repeats_when_the_server_asks_for_it() {
    let bed = Bed::new();
    let client = bed.client();
    let check = |refuse: &[(u16, Option<u32>)], status: Option<u16>, requests: usize| {
        bed.kube.tune(|knobs| knobs.refuse = refuse.iter().copied().collect());
        let before = bed.kube.requests().len();
        assert_eq!(client.execute(&pod()).err().map(|failure| failure.status), status, "{refuse:?}");
        assert_eq!(bed.kube.requests().len() - before, requests, "{refuse:?}");
        bed.kube.tune(|knobs| knobs.refuse.clear());
    };
    check(&[(429, Some(0)), (500, Some(0))], None, 3);
    check(&[(429, Some(1))], None, 2);
    check(&[(429, None)], Some(429), 1);
    check(&[(503, Some(60))], Some(503), 1); // longer than the deadline
    check(&[(403, Some(0))], Some(403), 1);
    check(&[(429, Some(0)); 20], Some(429), 11);
}

#[test]
fn the_token_is_read_again_after_a_401() {
    let bed = Bed::new();
    let file = temporary("token", "one\n");
    let client = Client::new(Config { token: Token::File(file.0.clone()), ..config(&[bed.url()]) }).unwrap().0;
    let allow = |token: &str| bed.kube.tune(|knobs| knobs.tokens = Some(Set::from([token.to_owned()])));
    allow("one");
    client.probe().unwrap();
    allow("two");
    assert_eq!(client.probe().unwrap_err().failure.status, 401, "the file has the old one");
    std::fs::write(&file.0, "two").unwrap();
    client.probe().unwrap();
    // A file that is empty or gone leaves the token that is known.
    for broken in ["", " \n"] {
        std::fs::write(&file.0, broken).unwrap();
        allow("three");
        assert!(client.probe().unwrap_err().is_final());
        allow("two");
        client.probe().unwrap();
    }
}

#[test]
fn the_other_address_is_tried() {
    let bed = Bed::new();
    // At an address where no other test listens, so that the port stays free.
    let nobody = TcpListener::bind("127.0.0.3:0").unwrap().local_addr().unwrap();
    let client = client(&[format!("http://{nobody}"), bed.url()]);
    client.probe().unwrap();
    assert_eq!(bed.kube.requests().len(), 1);
    let alone = super::tests::client(&[format!("http://{nobody}")]);
    let trouble = alone.probe().unwrap_err();
    assert!(trouble.failure.status == 0 && !trouble.is_final(), "{trouble}");
}

#[test]
fn a_black_hole_costs_the_deadline() {
    let bed = Bed::new();
    bed.kube.tune(|knobs| knobs.black_hole = true);
    // The machine may be busy with other things: one of three calls counts.
    let in_time = (0..3).any(|_| {
        let begin = clock::instant();
        let failure = bed.client().execute(&pod()).unwrap_err();
        assert_eq!(failure.status, 0, "{failure}");
        begin.elapsed() < Duration::from_secs(7)
    });
    assert!(in_time);
    bed.kube.tune(|knobs| knobs.black_hole = false);
}

#[test]
fn answers_are_bounded_and_may_be_garbage() {
    let check = |body: &str, status: u16| {
        let server = script::Server::queue(vec![script::answer(200, body)]);
        let failure = client(&[server.url()]).execute(&pod()).unwrap_err();
        assert_eq!(failure.status, status, "{failure}");
    };
    check("<html>", 200);
    check("", 200);
    check(&"[".repeat(5 << 20), 0);
    check(&"[".repeat(1000), 200);
    let server = script::Server::queue(vec![Step::Close(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{".into())]);
    assert_eq!(client(&[server.url()]).execute(&pod()).unwrap_err().status, 0);
    let server = script::Server::queue(vec![script::answer(502, &"ä".repeat(500))]);
    let failure = client(&[server.url()]).execute(&pod()).unwrap_err();
    assert!(failure.status == 502 && failure.message.len() < 400, "{failure}");
}

#[test]
fn a_branch_eni_is_waited_for() {
    let bed = Bed::new();
    let client = bed.client();
    let limits = json!({"containers": [{"resources": {"limits": {POD_ENI: "1"}}}]});
    bed.kube.change(|api| api.add_pod("a", "branch", "n1", &limits));
    let call = |name: &str| Call::PodWithBranch { namespace: "a".into(), name: name.into() };
    // A pod that wants none is not waited for.
    let begin = clock::instant();
    assert!(matches!(client.execute(&call("p")), Ok(Reply::Pod(_))));
    assert!(begin.elapsed() < Duration::from_secs(3));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| client.execute(&call("branch")));
        eventually(|| bed.kube.requests().iter().any(|line| line.contains("watch=true")));
        bed.kube.change(|api| api.annotate(Kind::Pod, "a", "branch", "other", "x"));
        bed.kube.change(|api| api.annotate(Kind::Pod, "a", "branch", POD_ENI, "[]"));
        let Ok(Reply::Pod(found)) = waiting.join().unwrap() else { panic!() };
        assert_eq!(found.annotations.get(POD_ENI).map(String::as_str), Some("[]"));
    });
    bed.kube.change(|api| api.add_pod("a", "doomed", "n1", &limits));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| client.execute(&call("doomed")));
        eventually(|| bed.kube.requests().iter().any(|line| line.contains("doomed&watch=true")));
        bed.kube.change(|api| api.remove(Kind::Pod, "a", "doomed"));
        assert_eq!(waiting.join().unwrap().unwrap_err().status, 404);
    });
}

#[test]
fn events_are_written() {
    let bed = Bed::new();
    bed.kube.change(|api| api.add_pod("kube-system", "aws-node-x", "n1", &json!({"hostNetwork": true})));
    let (client, writer) = Client::new(config(&[bed.url()])).unwrap();
    let client = Arc::new(client);
    let writing = Arc::clone(&client);
    std::thread::spawn(move || writer.run(&writing));
    let notice = Notice {
        regarding: Regarding::OwnPod,
        reason: "MissingIAMPermissions".into(),
        action: "ec2:CreateTags".into(),
        note: "denied".into(),
    };
    for regarding in [Regarding::OwnPod, Regarding::OwnPod, Regarding::Node] {
        assert_eq!(client.execute(&Call::Event(Notice { regarding, ..notice.clone() })), Ok(Reply::Done));
    }
    let events = || bed.kube.change(|api| api.list(Kind::Event, "", ""));
    eventually(|| events().len() == 2);
    let regarding: Vec<String> = events().iter().map(|event| event["regarding"]["kind"].to_string()).collect();
    assert_eq!(regarding, ["\"Node\"", "\"Pod\""]);
    assert!(events()[1]["regarding"]["uid"].as_str().unwrap().starts_with("uid-"));
}

// ---- watches

const QUICK: Tempo = Tempo {
    first: Duration::from_millis(20),
    cap: Duration::from_millis(100),
    calm: Duration::from_secs(5),
    silence: Duration::from_secs(20),
};

/// A watch of the node's pods on a thread of its own; what it sees comes as words. Ends when the receiver goes.
fn watch(servers: &[String], tempo: Tempo) -> Receiver<String> {
    let (sender, receiver) = channel();
    let client = client(servers);
    std::thread::spawn(move || {
        let mut view = |seen: Seen| {
            let words = match &seen {
                Seen::List => "list".to_owned(),
                Seen::Listed => "listed".to_owned(),
                Seen::Item(object) => format!("item {}", objects::text(object, "/metadata/name")),
                Seen::Set(object) => format!("set {}", objects::text(object, "/metadata/name")),
                Seen::Gone(object) => format!("gone {}", objects::text(object, "/metadata/name")),
            };
            sender.send(words).is_ok()
        };
        client.watch("/api/v1/pods", "spec.nodeName=n1").at(tempo).run(&mut view);
    });
    receiver
}

#[track_caller]
fn expect(watch: &Receiver<String>, words: &[&str]) {
    for word in words {
        assert_eq!(watch.recv_timeout(SOON).as_deref(), Ok(*word), "of {words:?}");
    }
}

#[track_caller]
fn eventually(mut done: impl FnMut() -> bool) {
    let begin = clock::instant();
    while !done() {
        assert!(begin.elapsed() < SOON, "not within {SOON:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_watch_tells_what_changes() {
    let bed = Bed::new();
    let seen = watch(&[bed.url()], QUICK);
    expect(&seen, &["list", "item p", "listed"]);
    bed.kube.change(|api| api.add_pod("b", "q", "n1", &json!({})));
    bed.kube.change(|api| api.add_pod("b", "elsewhere", "n2", &json!({})));
    expect(&seen, &["set q"]);
    bed.kube.change(|api| api.annotate(Kind::Pod, "a", "p", "k", "v"));
    bed.kube.change(|api| api.remove(Kind::Pod, "a", "p"));
    expect(&seen, &["set p", "gone p"]);
    let requests = bed.kube.requests();
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert!(requests[0].ends_with("/api/v1/pods?fieldSelector=spec.nodeName%3Dn1&limit=500&resourceVersion=0"));
    assert!(requests[1].contains("&watch=true&resourceVersion=102&allowWatchBookmarks=true&timeoutSeconds="));
}

#[test]
fn a_cut_watch_goes_on_where_it_was() {
    let bed = Bed::new();
    let seen = watch(&[bed.url()], QUICK);
    expect(&seen, &["list", "item p", "listed"]);
    let watches = || bed.kube.requests().iter().filter(|line| line.contains("watch=true")).count();
    eventually(|| watches() == 1);
    // The next watch is refused once, and something happens meanwhile.
    bed.kube.tune(|knobs| knobs.refuse = [(429, None)].into());
    bed.kube.cut();
    bed.kube.change(|api| api.add_pod("b", "q", "n1", &json!({})));
    expect(&seen, &["set q"]);
    assert_eq!((watches(), bed.lists()), (3, 1));
    bed.kube.cut();
    bed.kube.change(|api| api.remove(Kind::Pod, "b", "q"));
    expect(&seen, &["gone q"]);
    assert_eq!(bed.lists(), 1);
}

#[test]
fn an_expired_version_lists_again() {
    let bed = Bed::new();
    let seen = watch(&[bed.url()], QUICK);
    expect(&seen, &["list", "item p", "listed"]);
    bed.kube.change(|api| {
        api.remove(Kind::Pod, "a", "p");
        api.add_pod("b", "q", "n1", &json!({}));
        api.compact();
    });
    // An ERROR event in the stream; the list names the version that is known.
    expect(&seen, &["list", "item q", "listed"]);
    assert!(bed.kube.requests().iter().any(|line| line.ends_with("limit=500&resourceVersion=102")));
    // A list that is gone as well is read as it is now.
    bed.kube.tune(|knobs| {
        knobs.lists_gone = 1;
        knobs.watch_errors = [410].into();
    });
    bed.kube.cut();
    expect(&seen, &["list", "list", "item q", "listed"]);
    assert!(bed.kube.requests().iter().any(|line| line.ends_with("fieldSelector=spec.nodeName%3Dn1&limit=500")));
    bed.kube.change(|api| api.add_pod("b", "r", "n1", &json!({})));
    expect(&seen, &["set r"]);
}

#[test]
fn errors_in_the_stream() {
    let bed = Bed::new();
    bed.kube.tune(|knobs| knobs.watch_errors = [429, 500, 403].into());
    let seen = watch(&[bed.url()], QUICK);
    // 429 and 500 watch again, others list again.
    expect(&seen, &["list", "item p", "listed", "list", "item p", "listed"]);
    bed.kube.change(|api| api.add_pod("b", "q", "n1", &json!({})));
    expect(&seen, &["set q"]);
    assert_eq!(bed.lists(), 2);
}

#[test]
fn bookmarks_move_the_version_on() {
    let bed = Bed::new();
    let seen = watch(&[bed.url()], QUICK);
    expect(&seen, &["list", "item p", "listed"]);
    bed.kube.change(|api| api.add_node("n7", 1));
    eventually(|| bed.kube.requests().len() == 2);
    let version = bed.kube.change(|api| api.version());
    eventually(|| {
        bed.kube.bookmark();
        std::thread::sleep(Duration::from_millis(300)); // until it has arrived, mostly
        bed.kube.cut();
        std::thread::sleep(Duration::from_millis(200));
        bed.kube.requests().iter().any(|line| line.contains(&format!("resourceVersion={version}&")))
    });
    assert_eq!(bed.lists(), 1);
}

#[test]
fn a_server_that_appears_late_is_found() {
    // At an address where no other test listens, so that the port stays free.
    let listener = TcpListener::bind("127.0.0.4:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let seen = watch(&[format!("http://{address}")], QUICK);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(seen.try_recv().as_deref(), Ok("list"), "it tries");
    let mut api = Api::new();
    api.add_pod("a", "late", "n1", &json!({}));
    let kube = Kube::new(api);
    let _server = kube.serve(TcpListener::bind(address).unwrap()).unwrap();
    let end = clock::instant() + SOON;
    while seen.recv_timeout(SOON).unwrap() != "item late" {
        assert!(clock::instant() < end);
    }
    expect(&seen, &["listed"]);
}

#[test]
fn a_silent_connection_is_left() {
    let bed = Bed::new();
    let seen = watch(&[bed.url()], Tempo { silence: Duration::from_millis(1500), ..QUICK });
    expect(&seen, &["list", "item p", "listed"]);
    eventually(|| bed.kube.requests().iter().filter(|line| line.contains("watch=true")).count() >= 3);
    assert_eq!(bed.lists(), 1);
    bed.kube.change(|api| api.add_pod("b", "q", "n1", &json!({})));
    expect(&seen, &["set q"]);
}

#[test]
fn a_hostile_stream_is_no_harm() {
    let list = r#"{"metadata":{"resourceVersion":"5"},"items":[]}"#;
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
    let stream =
        |body: String| Step::Close(format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{body}").into_bytes());
    let event = r#"{"type":"ADDED","object":{"metadata":{"name":"x","resourceVersion":"6"}}}"#;
    let server = script::Server::queue(vec![
        script::answer(200, list),
        stream(chunk("no json\n")),
        script::answer(200, list),
        stream(chunk(&format!("\n{event}\n{{\"type\":\"ADD")) + "0\r\n\r\n"), // ends in an event
        stream(chunk("{}\n{\"type\":\"NEW\",\"object\":7}\n[]\n") + &chunk(event) + &chunk("\n")),
        stream(chunk(&"x".repeat(5 << 20))),
        script::answer(200, list),
    ]);
    let seen = watch(&[server.url()], QUICK);
    expect(&seen, &["list", "listed", "list", "listed", "set x", "set x", "list", "listed"]);
    let lines = server.lines();
    assert!(lines[4].contains("resourceVersion=6&"), "{lines:?}");
}

#[test]
fn a_list_comes_in_pages() {
    let bed = Bed::new();
    bed.kube.change(|api| {
        for number in 0..600 {
            api.add_pod("b", &format!("q{number}"), "n1", &json!({}));
        }
    });
    bed.kube.tune(|knobs| {
        knobs.lists_gone = 1;
        knobs.watch_errors = [410].into();
    });
    let seen = watch(&[bed.url()], QUICK);
    // From the server's cache as a whole; then, since the version has expired twice, in pages.
    for head in [&["list"][..], &["list", "list"]] {
        expect(&seen, head);
        assert!((0..601).all(|_| seen.recv_timeout(SOON).unwrap().starts_with("item ")));
        expect(&seen, &["listed"]);
    }
    assert!(bed.kube.requests().iter().any(|line| line.ends_with("limit=500&continue=500")));
}

// ---- TLS

/// A TLS server for 127.0.0.1 that hands everything on to a plain one.
fn tls_in_front_of(target: std::net::SocketAddr) -> String {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let certificate = CertificateDer::from_pem_slice(include_bytes!("../../testdata/tls/server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_slice(include_bytes!("../../testdata/tls/server.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let settings = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let settings = settings.with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let settings = Arc::new(settings);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let settings = Arc::clone(&settings);
            std::thread::spawn(move || {
                let session = rustls::ServerConnection::new(settings).unwrap();
                let mut plain = TcpStream::connect(target).unwrap();
                socket.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
                plain.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
                let mut tls = rustls::StreamOwned::new(session, socket);
                let mut buffer = [0; 4096];
                // Each side in turn, a few milliseconds long: a session cannot be shared by two threads.
                loop {
                    match tls.read(&mut buffer) {
                        Ok(0) => return,
                        Ok(count) => plain.write_all(&buffer[..count]).unwrap(),
                        Err(error) if waits(&error) => {}
                        Err(_) => return,
                    }
                    match plain.read(&mut buffer) {
                        Ok(0) => return,
                        Ok(count) => tls.write_all(&buffer[..count]).unwrap(),
                        Err(error) if waits(&error) => {}
                        Err(_) => return,
                    }
                }
            });
        }
    });
    format!("https://{address}")
}

fn waits(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

fn authority(file: &str) -> Authority {
    Authority::File(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/tls").join(file))
}

#[test]
fn tls_to_an_address_with_the_cluster_s_ca() {
    let bed = Bed::new();
    let url = tls_in_front_of(bed.server.address());
    let with =
        |authority: Authority| Client::new(Config { authority, ..config(std::slice::from_ref(&url)) }).unwrap().0;
    let good = with(authority("ca.pem"));
    good.probe().unwrap();
    let seen = std::cell::RefCell::new(Vec::new());
    good.watch("/api/v1/nodes", "metadata.name=n1").at(QUICK).run(&mut |told| {
        if told == Seen::Listed {
            bed.kube.change(|api| api.cordon("n1", true));
        }
        let last = matches!(&told, Seen::Set(object) if objects::node(object).unschedulable);
        seen.borrow_mut().push(told);
        !last
    });
    assert_eq!(seen.borrow().len(), 4, "list, item, listed, set");
    let trouble = with(authority("server.pem")).probe().unwrap_err();
    assert!(trouble.is_final() && trouble.certificate && trouble.failure.status == 0, "{trouble}");
}

#[test]
fn a_renewed_ca_file_is_read_again() {
    let bed = Bed::new();
    let url = tls_in_front_of(bed.server.address());
    let file = temporary("ca", include_str!("../../testdata/tls/server.pem"));
    let config = Config { authority: Authority::File(file.0.clone()), ..config(&[url]) };
    let client = Client::new(config).unwrap().0;
    assert!(client.probe().unwrap_err().certificate);
    std::fs::write(&file.0, include_str!("../../testdata/tls/ca.pem")).unwrap();
    client.probe().unwrap();
}

/// A file that goes with the value.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn temporary(name: &str, text: &str) -> Temporary {
    let file = std::env::temp_dir().join(format!("enibox-kube-{}-{name}", std::process::id()));
    std::fs::write(&file, text).unwrap();
    Temporary(file)
}
