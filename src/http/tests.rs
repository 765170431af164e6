use super::script::{Server, Step, answer, answer_with};
use super::*;

fn options() -> Options {
    Options {
        user_agent: "test/1".into(),
        connect: Duration::from_millis(500),
        response: Duration::from_secs(5),
        total: Duration::from_secs(10),
        body_limit: 1000,
        idle: 1,
        roots: Roots::default(),
        proxies: Proxies::NONE,
    }
}

fn get(server: &Server) -> std::result::Result<Response, Broken> {
    let options = Options { response: server.patience(), ..options() };
    Agent::new(&server.url(), options).unwrap().send("GET", "/x", &[("a", "b")], &[])
}

#[test]
fn any_status_is_an_answer_and_redirects_are_not_followed() {
    for status in [200, 307, 404, 503] {
        let server = Server::queue(vec![answer_with(status, &[("Location", "/y"), ("X-Y", "z")], "body")]);
        let response = get(&server).unwrap();
        assert_eq!((response.status, &*response.text()), (status, "body"));
        assert_eq!(response.header("x-y"), Some("z"));
        assert_eq!(server.lines(), ["GET /x"]);
        let request = &server.seen()[0];
        assert_eq!(request.header("user-agent"), Some("test/1"));
        assert_eq!(request.header("a"), Some("b"));
        assert_eq!(request.header("accept-encoding"), None);
    }
}

#[test]
fn failures_tell_whether_the_request_left() {
    let check = |server: &Server, sent, timed_out, retry| {
        let broken = get(server).unwrap_err();
        assert_eq!((broken.sent, broken.timed_out, broken.retry), (sent, timed_out, retry), "{broken}");
    };
    check(&Server::queue(vec![Step::Hang]), true, true, true);
    check(&Server::queue(vec![Step::Close(Vec::new())]), true, false, true);
    check(
        &Server::queue(vec![Step::Close(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf".to_vec())]),
        true,
        false,
        true,
    );
    check(&Server::queue(vec![Step::Close(b"SSH-2.0-OpenSSH_9.9\r\n\r\n".to_vec())]), true, false, false);
    check(&Server::queue(vec![answer(200, &"x".repeat(1001))]), true, false, false);
}

#[test]
fn a_refused_connection_was_not_sent() {
    // At an address where no other test listens, so that the port stays free.
    let listener = std::net::TcpListener::bind("127.0.0.2:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let broken = Agent::new(&url, options()).unwrap().send("POST", "/", &[], b"x").unwrap_err();
    assert_eq!((broken.sent, broken.retry), (false, true), "{broken}");
}

#[test]
fn connections_are_kept() {
    let server = Server::new(|_| answer(200, "ok"));
    let agent = Agent::new(&server.url(), options()).unwrap();
    for _ in 0..5 {
        agent.send("GET", "/", &[], &[]).unwrap();
    }
    assert!(server.seen().iter().all(|request| request.connection == 1));
}

#[test]
fn a_kept_connection_that_breaks_is_replaced_at_once() {
    let check = |method: &str, steps: Vec<Step>, want: &[Option<u16>], connections: &[usize]| {
        let server = Server::queue(steps);
        let agent = Agent::new(&server.url(), options()).unwrap();
        let got: Vec<_> = want.iter().map(|_| agent.send(method, "/", &[], &[]).ok().map(|r| r.status)).collect();
        assert_eq!(got, want, "{method}");
        let seen: Vec<_> = server.seen().iter().map(|request| request.connection).collect();
        assert_eq!(seen, connections, "{method}");
    };
    let (ok, cut) = (|| answer(200, "ok"), || Step::Close(Vec::new()));
    for method in ["GET", "PUT"] {
        check(method, vec![ok(), cut(), ok(), ok()], &[Some(200), Some(200), Some(200)], &[1, 1, 2, 2]);
        // Once, and only what was kept.
        check(method, vec![ok(), cut(), cut(), ok()], &[Some(200), None, Some(200)], &[1, 1, 2, 3]);
        check(method, vec![cut(), ok()], &[None, Some(200)], &[1, 2]);
        // Half an answer is an answer.
        let half = Step::Close(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf".to_vec());
        check(method, vec![ok(), half, ok()], &[Some(200), None, Some(200)], &[1, 1, 2]);
    }
    // A call that may have been carried out is not repeated here.
    check("POST", vec![ok(), cut(), ok()], &[Some(200), None, Some(200)], &[1, 1, 2]);
}

#[test]
fn a_path_of_the_endpoint_stays_and_its_port_is_in_the_host() {
    let agent = Agent::new("http://[::1]:8080/base/?x", options()).unwrap();
    assert_eq!(agent.host(), "[::1]:8080");
    assert_eq!(agent.url("/x"), "http://[::1]:8080/base/x");
    assert_eq!(agent.full_path("/x"), "/base/x");
    assert_eq!(Agent::new("http://a", options()).unwrap().full_path("/"), "/");
    for bad in ["", "ec2.example", "ftp://x", "http://", "/x", "http://a b", "http://user:secret@a"] {
        let error = Agent::new(bad, options()).unwrap_err().to_string();
        assert!(!error.contains("secret"), "{bad}: {error}");
    }
}

#[test]
fn roots_are_read_only_for_https() {
    let missing = Roots { bundle: Some("/nonexistent/bundle.pem".into()), ..Roots::default() };
    let server = Server::queue(vec![answer(200, "ok")]);
    let plain = Agent::new(&server.url(), Options { roots: missing.clone(), ..options() }).unwrap();
    assert_eq!(plain.send("GET", "/", &[], &[]).unwrap().status, 200);
    let tls = Agent::new("https://127.0.0.1:1", Options { roots: missing, ..options() }).unwrap();
    let broken = tls.send("GET", "/", &[], &[]).unwrap_err();
    assert_eq!((broken.sent, broken.retry), (false, false));
    assert!(broken.text.starts_with("read AWS_CA_BUNDLE: read /nonexistent/bundle.pem"), "{broken}");
}

/// An empty certificate is enough: the roots are parsed by the TLS library when it connects.
const PEM: &str = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";

#[test]
fn roots_by_the_environment() {
    let dir = std::env::temp_dir().join(format!("enibox-roots-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("some")).unwrap();
    let write = |name: &str, text: &str| {
        std::fs::write(dir.join(name), text).unwrap();
        dir.join(name).display().to_string()
    };
    let one = write("one.pem", PEM);
    let two = write("some/two.pem", &format!("# a comment\n{PEM}{PEM}"));
    write("some/readme", "no PEM here");
    let empty = write("empty.pem", "");
    let some = dir.join("some").display().to_string();
    let check = |variables: &[(&str, &str)]| {
        let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
        Roots::from_env(lookup).load().map(|roots| roots.len()).map_err(|error| error.to_string())
    };
    assert_eq!(check(&[("AWS_CA_BUNDLE", &one), ("SSL_CERT_FILE", &two)]), Ok(1));
    assert_eq!(check(&[("SSL_CERT_FILE", &two)]), Ok(2));
    assert_eq!(check(&[("SSL_CERT_FILE", &one), ("SSL_CERT_DIR", &format!("{some}:"))]), Ok(3));
    assert!(check(&[("AWS_CA_BUNDLE", &empty)]).unwrap_err().contains("none found"));
    assert!(check(&[("SSL_CERT_DIR", "/nonexistent")]).unwrap_err().starts_with("read SSL_CERT_DIR"));
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn proxies_are_for_other_hosts_only() {
    let variables = [
        ("HTTPS_PROXY", "http://proxy:3128"),
        ("http_proxy", "http://plain:80"),
        ("NO_PROXY", "svc, .local,10.0.0.0/8,192.0.2.7,*.wild,named:8443,2001:db8::/32,192.0.2.8:8443,[2001:db9::1]"),
    ];
    let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| (*v).to_owned());
    let proxies = Proxies::from_env(lookup);
    let check = |url: &str, expected: Option<&str>| {
        let proxy = proxies.for_target(&url.parse().unwrap()).unwrap();
        assert_eq!(proxy.as_ref().map(ureq::Proxy::host), expected, "{url}");
    };
    check("https://ec2.eu-west-1.amazonaws.com", Some("proxy"));
    check("http://ec2.example", Some("plain"));
    for direct in [
        "http://169.254.169.254",
        "http://[fd00:ec2::254]",
        "http://127.0.0.1:4566",
        "http://localhost:4566",
        "https://[::1]",
        "https://[fe80::1]",
        "https://svc",
        "https://a.svc",
        "https://x.local",
        "https://10.1.2.3",
        "https://192.0.2.7",
        "https://a.wild",
        "https://named:8443",
        "https://192.0.2.8:8443",
        "https://[2001:db8::7]",
        "https://[2001:db9::1]",
    ] {
        check(direct, None);
    }
    for proxied in [
        "https://local",
        "https://xsvc",
        "https://192.0.2.8",
        "https://wild",
        "https://named",
        "https://named:1",
        "https://[2001:db9::2]",
    ] {
        check(proxied, Some("proxy"));
    }
    let bare = Proxies { https: Some("bare:3128".into()), ..Proxies::NONE };
    let proxy = bare.for_target(&"https://a".parse().unwrap()).unwrap().unwrap();
    assert_eq!((proxy.host(), proxy.port(), proxy.uri().scheme_str()), ("bare", 3128, Some("http")));
    let all = Proxies { except: vec!["*".into()], ..proxies.clone() };
    assert!(all.for_target(&"https://a".parse().unwrap()).unwrap().is_none());
    for other in ["gopher://x", "socks5://x:1080"] {
        let bad = Proxies { https: Some(other.into()), ..Proxies::NONE };
        let error = bad.for_target(&"https://a".parse().unwrap()).unwrap_err().to_string();
        assert!(error.starts_with("parse HTTPS_PROXY"), "{error}");
    }
    assert!(!format!("{:?}", Proxies { https: Some("http://u:pass@p".into()), ..Proxies::NONE }).contains("pass"));
}

#[test]
fn a_proxy_is_gone_through() {
    let through = |steps: Vec<Step>| {
        let proxy = Server::queue(steps);
        let url = proxy.url().replace("http://", "http://user:p%40ss@");
        let proxies = Proxies { http: Some(url), ..Proxies::NONE };
        let agent = Agent::new("http://ec2.example", Options { proxies, ..options() }).unwrap();
        (agent.send("POST", "/x", &[], b"body"), proxy.seen())
    };
    let open = || Step::Answer(b"HTTP/1.1 200 Connection established\r\n\r\n".to_vec());
    let (response, seen) = through(vec![open(), answer(200, "through")]);
    assert_eq!(response.unwrap().text(), "through");
    assert_eq!((seen[0].method.as_str(), seen[0].path.as_str()), ("CONNECT", "ec2.example:80"));
    assert_eq!(seen[0].header("proxy-authorization"), Some("Basic dXNlcjpwQHNz"));
    assert_eq!((seen[1].path.as_str(), seen[1].header("proxy-authorization")), ("/x", None));
    // What the proxy refuses has not left.
    let (response, seen) = through(vec![answer(407, "who are you")]);
    assert_eq!((response.map_err(|broken| broken.sent).unwrap_err(), seen.len()), (false, 1));
}

/// A TLS server on loopback that answers one request with "over tls".
fn tls_server() -> u16 {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use std::io::{Read, Write};
    let certificate = CertificateDer::from_pem_slice(include_bytes!("../../testdata/tls/server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_slice(include_bytes!("../../testdata/tls/server.key")).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let connection = rustls::ServerConnection::new(Arc::new(config)).unwrap();
        let mut stream = rustls::StreamOwned::new(connection, socket);
        // A client that refuses the certificate ends the connection here.
        if stream.read(&mut [0; 4096]).is_ok() {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nover tls");
        }
    });
    port
}

#[test]
fn tls_with_a_bundle_of_ones_own() {
    let ours = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tls/ca.pem");
    let others = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/tls/server.pem"); // trusts nothing but itself
    let check = |bundle: &str| {
        let roots = Roots { bundle: Some(bundle.into()), ..Roots::default() };
        let options = Options { roots, total: Duration::from_secs(5), connect: Duration::from_secs(4), ..options() };
        let agent = Agent::new(&format!("https://127.0.0.1:{}", tls_server()), options).unwrap();
        agent.send("GET", "/", &[], &[])
    };
    assert_eq!(check(ours).unwrap().text(), "over tls");
    let broken = check(others).unwrap_err();
    assert!(broken.text.contains("ertificate"), "{broken}");
    assert_eq!((broken.sent, broken.retry), (false, false), "{broken}");
}
