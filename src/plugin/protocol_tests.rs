//! The protocol with a plugin that only answers: every command, every version, everything that can be wrong.

use super::*;
use crate::model::cni::{Interface, IpConfig};
use crate::model::map::Map;
use proptest::prelude::*;
use serde_json::{Value, json};

const ADDED: fn(&Request) -> Result<Output, CniError> = |_| {
    Ok(Output {
        interfaces: vec![Interface { name: "eth0".into(), sandbox: "/x".into(), mtu: 9001, ..Interface::default() }],
        ips: vec![IpConfig { interface: Some(0), address: "10.0.0.5/32".parse().unwrap(), gateway: None }],
        ..Output::default()
    })
};
const DONE: fn(&Request) -> Result<(), CniError> = |_| Ok(());
const NAMED: fn(&Request) -> Result<(), CniError> =
    |request| Err(CniError::new(100, format!("{}/{}", request.envelope.name, request.container_id)));

const PLUGIN: Plugin = Plugin { about: "a plugin", add: ADDED, del: DONE, check: DONE, status: NAMED, gc: NAMED };

struct Answer {
    code: u8,
    stdout: String,
    stderr: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {:?}", self.stdout))
    }

    /// Code and message of the error document, or 0 and what was printed.
    fn failure(&self) -> (u64, String) {
        if self.code == exit::OK {
            return (0, self.stdout.clone());
        }
        let json = self.json();
        assert!(Version::parse(json["cniVersion"].as_str().unwrap()).is_some(), "{json}");
        (json["code"].as_u64().unwrap(), json["msg"].as_str().unwrap().to_owned())
    }
}

/// Standard input with this content.
fn input(bytes: &[u8]) -> io::PipeReader {
    let (reader, mut writer) = io::pipe().unwrap();
    let bytes = bytes.to_owned();
    // A pipe holds less than the longest configuration; the other end may close before it has read all.
    std::thread::spawn(move || writer.write_all(&bytes));
    reader
}

fn call_raw(env: &[(&str, &str)], stdin: &[u8]) -> Answer {
    let env: Map<String, String> = env.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let get = |name: &str| env.get(name).cloned().map(Ok);
    let code = serve(&PLUGIN, get, input(stdin), &mut stdout, &mut stderr);
    Answer { code, stdout: String::from_utf8(stdout).unwrap(), stderr: String::from_utf8(stderr).unwrap() }
}

const GOOD_ENV: [(&str, &str); 6] = [
    ("CNI_CONTAINERID", "cni-5a1f"),
    ("CNI_NETNS", "/proc/self/ns/uts"), // exists, and is not our network namespace
    ("CNI_IFNAME", "eth0"),
    ("CNI_PATH", "/opt/cni/bin"),
    ("CNI_ARGS", "IgnoreUnknown=1"),
    ("CNI_NETNS_OVERRIDE", ""),
];

/// A good call with some variables replaced.
fn call(command: &str, version: &str, changes: &[(&str, &str)]) -> Answer {
    let mut env: Map<&str, &str> = GOOD_ENV.into_iter().collect();
    env.insert("CNI_COMMAND", command);
    env.extend(changes.iter().copied());
    let env: Vec<_> = env.into_iter().collect();
    call_raw(&env, json!({"cniVersion": version, "name": "aws-cni", "type": "aws-cni"}).to_string().as_bytes())
}

#[test]
fn every_command_in_every_version() {
    for version in Version::ALL {
        for command in Command::ALL {
            let (code, text) = call(command.as_str(), version.as_str(), &[]).failure();
            if command != Command::Version && version < command.since() {
                assert_eq!((code, text), (1, format!("config version does not allow {}", command.as_str())));
                continue;
            }
            match command {
                Command::Add => assert!(code == 0 && text.contains(version.as_str()), "{text}"),
                Command::Del | Command::Check => assert_eq!((code, text.as_str()), (0, "")),
                Command::Status | Command::Gc => assert_eq!((code, text.as_str()), (100, "aws-cni/")),
                Command::Version => assert!(code == 0 && text.ends_with("]}\n"), "{text}"),
            }
        }
    }
}

#[test]
fn all_missing_variables_are_told_at_once() {
    let config = br#"{"cniVersion":"1.1.0","name":"a"}"#;
    for (command, names) in [
        ("ADD", "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME"),
        ("CHECK", "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME"),
        ("DEL", "CNI_CONTAINERID,CNI_IFNAME"),
        ("GC", "CNI_PATH"),
    ] {
        let wanted = (4, format!("required env variables [{names}] missing"));
        assert_eq!(call_raw(&[("CNI_COMMAND", command)], config).failure(), wanted);
        let empty: Vec<_> = GOOD_ENV.iter().map(|(name, _)| (*name, "")).chain([("CNI_COMMAND", command)]).collect();
        assert_eq!(call_raw(&empty, config).failure(), wanted, "empty is missing");
    }
    assert_eq!(call_raw(&[("CNI_COMMAND", "STATUS")], config).failure(), (100, "a/".into()));
    assert_eq!(call("ADD", "1.0.0", &[("CNI_PATH", "")]).failure().0, 0, "CNI_PATH may be absent");
}

#[test]
fn names_are_checked() {
    for bad in ["-a", "a b", "a/../b", "ä"] {
        for command in ["ADD", "DEL", "CHECK"] {
            let got = call(command, "1.0.0", &[("CNI_CONTAINERID", bad)]).failure();
            assert_eq!(got, (4, "invalid characters in containerID".into()), "{command} {bad}");
        }
        assert_eq!(call("STATUS", "1.1.0", &[("CNI_CONTAINERID", bad)]).failure().0, 100, "STATUS has no container");
    }
    for bad in [".", "..", "a/b", "a:b", "a b", "sixteen-bytes-xx"] {
        for command in ["ADD", "DEL", "CHECK"] {
            assert_eq!(call(command, "1.0.0", &[("CNI_IFNAME", bad)]).failure().0, 4, "{command} {bad}");
        }
    }
}

#[test]
fn configurations_are_checked() {
    let check = |stdin: &[u8], wanted: u64| {
        for command in ["ADD", "DEL", "CHECK", "STATUS", "GC"] {
            let mut env = GOOD_ENV.to_vec();
            env.push(("CNI_COMMAND", command));
            assert_eq!(call_raw(&env, stdin).failure().0, wanted, "{command} {}", String::from_utf8_lossy(stdin));
        }
    };
    check(b"", 6);
    check(b"{", 6);
    check(b"null", 6);
    check(b"\xff\xfe", 6);
    check(br#"{"cniVersion":1,"name":"a"}"#, 6);
    check(br#"{"cniVersion":"1.1.0"}"#, 7);
    check(br#"{"cniVersion":"1.1.0","name":""}"#, 7);
    check(br#"{"cniVersion":"1.1.0","name":"a/b"}"#, 7);
    check(br#"{"cniVersion":"9.9.9","name":"a"}"#, 1);
    let long = format!(r#"{{"name":"a","filler":"{}"}}"#, "x".repeat(1 << 20));
    check(long.as_bytes(), 5);
}

#[test]
fn an_unknown_version_is_explained() {
    let mut env = GOOD_ENV.to_vec();
    env.push(("CNI_COMMAND", "ADD"));
    let answer = call_raw(&env, br#"{"cniVersion":"9.9.9","name":"a"}"#);
    assert_eq!(
        answer.json()["details"],
        r#"config is "9.9.9", plugin supports [0.1.0 0.2.0 0.3.0 0.3.1 0.4.0 1.0.0 1.1.0]"#
    );
}

#[test]
fn unknown_fields_and_capabilities_are_ignored() {
    let config =
        json!({"cniVersion": "1.0.0", "name": "a", "runtimeConfig": {"x": 1}, "args": {"cni": {}}, "cni.dev/x": []});
    let mut env = GOOD_ENV.to_vec();
    env.push(("CNI_COMMAND", "DEL"));
    assert_eq!(call_raw(&env, config.to_string().as_bytes()).failure(), (0, String::new()));
}

#[test]
fn no_command_prints_what_it_is() {
    for env in [vec![], vec![("CNI_COMMAND", "")]] {
        let answer = call_raw(&env, b"");
        assert_eq!((answer.code, answer.stdout.as_str()), (0, ""));
        assert_eq!(
            answer.stderr,
            "a plugin\nCNI protocol versions supported: 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0\n"
        );
    }
    for unknown in ["add", "FOO", "ADD "] {
        let wanted = (4, format!("unknown CNI_COMMAND: {unknown}"));
        assert_eq!(call_raw(&[("CNI_COMMAND", unknown)], b"").failure(), wanted);
    }
}

#[test]
fn version_echoes_the_input() {
    let check = |stdin: &str, wanted: &str| {
        let answer = call_raw(&[("CNI_COMMAND", "VERSION")], stdin.as_bytes());
        assert_eq!(
            answer.stdout,
            format!(
                "{{\"cniVersion\":\"{wanted}\",\"supportedVersions\":[\"0.1.0\",\"0.2.0\",\"0.3.0\",\"0.3.1\",\"0.4.0\",\
                 \"1.0.0\",\"1.1.0\"]}}\n"
            )
        );
    };
    check("", "1.1.0");
    check("not JSON", "1.1.0");
    check("{}", "1.1.0");
    check(r#"{"cniVersion":"0.4.0"}"#, "0.4.0");
    check(r#"{"cniVersion":"9.9.9"}"#, "1.1.0");
}

#[test]
fn version_does_not_wait_for_input() {
    let (reader, _open) = io::pipe().unwrap();
    let mut stdout = Vec::new();
    let env = |name: &str| (name == "CNI_COMMAND").then(|| Ok("VERSION".to_owned()));
    assert_eq!(serve(&PLUGIN, env, reader, &mut stdout, &mut Vec::new()), exit::OK);
    assert!(stdout.starts_with(b"{\"cniVersion\":\"1.1.0\""));
}

#[test]
fn the_own_namespace_is_refused_before_anything_is_done() {
    const NEVER: Plugin = Plugin { add: |_| panic!("acted"), del: |_| panic!("acted"), ..PLUGIN };
    let own = "/proc/self/ns/net";
    for command in ["ADD", "DEL"] {
        let mut env: Map<&str, &str> = GOOD_ENV.into_iter().collect();
        env.extend([("CNI_COMMAND", command), ("CNI_NETNS", own)]);
        let get = |name: &str| env.get(name).map(|value| Ok((*value).to_owned()));
        let mut stdout = Vec::new();
        let stdin = input(br#"{"name":"a"}"#);
        assert_eq!(serve(&NEVER, get, stdin, &mut stdout, &mut Vec::new()), exit::FAILURE);
        let json: Value = serde_json::from_slice(&stdout).unwrap();
        assert_eq!(json["code"], 8);
        assert_eq!(json["msg"], "plugin's netns and netns from CNI_NETNS should not be the same");
        for allow in ["1", "true", "TRUE"] {
            let got = call(command, "0.4.0", &[("CNI_NETNS", own), ("CNI_NETNS_OVERRIDE", allow)]);
            assert_eq!(got.code, exit::OK, "{command} {allow}");
        }
        let got = call(command, "0.4.0", &[("CNI_NETNS", own), ("CNI_NETNS_OVERRIDE", "yes")]);
        assert_eq!(got.failure().0, 8);
    }
}

#[test]
fn a_missing_namespace_matters_to_add_and_check_only() {
    let gone = [("CNI_NETNS", "/var/run/netns/is-not-there")];
    assert_eq!(call("ADD", "0.4.0", &gone).failure().0, 8);
    assert_eq!(call("CHECK", "0.4.0", &gone).failure().0, 8);
    assert_eq!(call("DEL", "0.4.0", &gone).failure().0, 0);
    assert_eq!(call("DEL", "0.4.0", &[("CNI_NETNS", "")]).failure().0, 0);
}

#[test]
fn a_result_nobody_reads_is_a_failure() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    for command in ["ADD", "FOO", "VERSION"] {
        let mut env: Map<&str, &str> = GOOD_ENV.into_iter().collect();
        env.insert("CNI_COMMAND", command);
        let get = |name: &str| env.get(name).map(|value| Ok((*value).to_owned()));
        let stdin = input(br#"{"name":"a"}"#);
        assert_eq!(serve(&PLUGIN, get, stdin, &mut Closed, &mut Closed), exit::FAILURE, "{command}");
    }
}

#[test]
fn variables_that_are_not_utf8_are_named() {
    let get = |name: &str| match name {
        "CNI_COMMAND" => Some(Ok("ADD".to_owned())),
        "CNI_CONTAINERID" => Some(Err(name.to_owned())),
        _ => Some(Ok("x".to_owned())),
    };
    let mut stdout = Vec::new();
    assert_eq!(serve(&PLUGIN, get, input(br#"{"name":"a"}"#), &mut stdout, &mut Vec::new()), exit::FAILURE);
    assert_eq!(serde_json::from_slice::<Value>(&stdout).unwrap()["msg"], "CNI_CONTAINERID is not UTF-8");
}

fn variable() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        prop::sample::select(vec![
            "eth0",
            "cni-5a1f",
            "/proc/self/ns/net",
            "/proc/self/ns/uts",
            "IgnoreUnknown=1",
            "1"
        ])
        .prop_map(str::to_owned),
        "\\PC{0,20}",
    ]
}

proptest! {
    #[test]
    fn whatever_comes_in_one_document_goes_out(
        command in prop_oneof![prop::sample::select(Command::ALL.to_vec()).prop_map(|c| c.as_str().to_owned()), "\\PC{1,9}"],
        values in prop::collection::vec(variable(), 6),
        stdin in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            prop::sample::select(Version::ALL.to_vec())
                .prop_map(|v| json!({"cniVersion": v.as_str(), "name": "a"}).to_string().into_bytes()),
        ],
    ) {
        let mut env: Vec<(&str, &str)> = GOOD_ENV.iter().map(|(name, _)| *name).zip(values.iter().map(String::as_str)).collect();
        env.push(("CNI_COMMAND", &command));
        let answer = call_raw(&env, &stdin);
        prop_assert!(answer.stderr.is_empty());
        match answer.code {
            exit::OK => prop_assert!(answer.stdout.is_empty() || answer.json()["cniVersion"].is_string()),
            _ => prop_assert!(answer.failure().0 > 0),
        }
    }
}
