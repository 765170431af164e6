//! The plugin as a runtime runs it: every command in every version with everything that can be wrong with a call, through
//! the real program, environment, standard input and output.

#[path = "support/node.rs"]
mod node;
mod support;

use node::{Answer, Call, Node, on_a_node};
use serde_json::Value;
use support::Netns;

const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const COMMANDS: [&str; 6] = ["ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION"];

/// What is wrong with a call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Only that no daemon runs.
    None,
    MissingVariables,
    BadContainerId,
    BadIfname,
    NoJson,
    NoName,
    BadName,
    UnknownVersion,
    NetnsGone,
    OwnNetns,
    BadArgs,
}

const FAULTS: [Fault; 11] = [
    Fault::None,
    Fault::MissingVariables,
    Fault::BadContainerId,
    Fault::BadIfname,
    Fault::NoJson,
    Fault::NoName,
    Fault::BadName,
    Fault::UnknownVersion,
    Fault::NetnsGone,
    Fault::OwnNetns,
    Fault::BadArgs,
];

fn faulty(call: Call, fault: Fault) -> Call {
    match fault {
        Fault::None => call,
        Fault::MissingVariables => {
            ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH", "CNI_ARGS"].into_iter().fold(call, Call::without)
        }
        Fault::BadContainerId => call.env("CNI_CONTAINERID", "a/b"),
        Fault::BadIfname => call.env("CNI_IFNAME", "eth0:1"),
        Fault::NoJson => call.stdin(b"{\"name\":"),
        Fault::NoName => call.config("name", Value::Null),
        Fault::BadName => call.config("name", "../aws-cni"),
        Fault::UnknownVersion => call.config("cniVersion", "9.9.9"),
        Fault::NetnsGone => call.env("CNI_NETNS", "/var/run/netns/gone"),
        Fault::OwnNetns => call.env("CNI_NETNS", "/proc/self/ns/net"),
        Fault::BadArgs => call.env("CNI_ARGS", "K8S_POD_NAME"),
    }
}

/// The code that the CNI specification and its Go skeleton give; 0 is success.
fn wanted(command: &str, version: &str, fault: Fault) -> u64 {
    let of_container = matches!(command, "ADD" | "DEL" | "CHECK");
    match fault {
        _ if command == "VERSION" => return 0,
        Fault::MissingVariables if command != "STATUS" => return 4,
        Fault::NoJson => return 6,
        Fault::NoName | Fault::BadName => return 7,
        Fault::UnknownVersion => return 1,
        Fault::BadContainerId | Fault::BadIfname if of_container => return 4,
        _ => {}
    }
    let since = match command {
        "CHECK" => "0.4.0",
        "STATUS" | "GC" => "1.1.0",
        _ => "0.1.0",
    };
    if VERSIONS.iter().position(|v| *v == version) < VERSIONS.iter().position(|v| *v == since) {
        return 1;
    }
    match (fault, command) {
        (Fault::NetnsGone, "ADD" | "CHECK") | (Fault::OwnNetns, "ADD" | "DEL") => 8,
        (Fault::BadArgs, "ADD" | "DEL" | "CHECK") => 4,
        (_, "ADD") => 11,         // nobody to ask for an address
        (_, "CHECK" | "GC") => 7, // no prevResult, no cni.dev/valid-attachments
        (_, "STATUS") => 50,
        _ => 0,
    }
}

fn check(node: &Node, netns: &Netns, command: &str, version: &str, fault: Fault) {
    let what = format!("{command} {version} {fault:?}");
    let answer = faulty(node.call(command, version).env("CNI_NETNS", netns.path()), fault).run();
    let code = wanted(command, version, fault);
    if command == "VERSION" {
        check_version_document(&answer, version, fault);
    } else if code == 0 {
        assert_eq!((answer.code, answer.stdout.as_str()), (0, ""), "{what}: {answer:?}");
    } else {
        let (got, text) = answer.failure();
        assert_eq!(got, code, "{what}: {text}");
        assert!(!text.is_empty(), "{what}");
        // Without a configuration that was read and understood, the newest version.
        let unread = fault == Fault::MissingVariables && command != "STATUS";
        let known = !unread && !matches!(fault, Fault::NoJson | Fault::UnknownVersion);
        assert_eq!(answer.json()["cniVersion"], if known { version } else { "1.1.0" }, "{what}");
    }
}

fn check_version_document(answer: &Answer, version: &str, fault: Fault) {
    let result = answer.result();
    let told = if matches!(fault, Fault::NoJson | Fault::UnknownVersion) { "1.1.0" } else { version };
    assert_eq!(result["cniVersion"], told);
    assert_eq!(result["supportedVersions"], serde_json::json!(VERSIONS));
    assert_eq!(answer.stdout.matches('\n').count(), 1);
}

#[test]
fn every_command_version_and_fault() {
    on_a_node(|node| {
        let netns = Netns::new("pod");
        for command in COMMANDS {
            for version in VERSIONS {
                for fault in FAULTS {
                    check(node, &netns, command, version, fault);
                }
            }
        }
    });
}

#[test]
fn no_command_says_what_it_is() {
    on_a_node(|node| {
        let answer = node.call("", "1.0.0").run();
        answer.silent();
        let lines: Vec<_> = answer.stderr.lines().collect();
        assert_eq!(lines[0], format!("AWS CNI {}", enibox::VERSION));
        assert_eq!(lines[1], format!("CNI protocol versions supported: {}", VERSIONS.join(", ")));
        assert_eq!(node.call("REMOVE", "1.0.0").run().failure(), (4, "unknown CNI_COMMAND: REMOVE".into()));
    });
}

#[test]
fn texts_that_scrapers_know_are_kept() {
    on_a_node(|node| {
        let netns = Netns::new("pod");
        let check = |call: Call, code: u64, text: &str| {
            let (got, message) = call.env("CNI_NETNS", netns.path()).run().failure();
            assert!(got == code && message.starts_with(text), "{got} {message}");
        };
        let call = |command| node.call(command, "0.4.0");
        check(call("ADD"), 11, "add cmd: Error received from AddNetwork gRPC call: ");
        check(
            call("ADD").config("vethPrefix", "toolong"),
            7,
            "add cmd: error loading config from args: conf.VethPrefix can be at most 4 characters long",
        );
        check(
            call("ADD").config("prevResult", "x"),
            7,
            "add cmd: error loading config from args: could not parse prevResult: ",
        );
        check(call("DEL").config("vethPrefix", "toolong"), 7, "del cmd: error loading config from args: ");
        check(
            call("ADD").env("CNI_ARGS", "A=1"),
            4,
            "add cmd: failed to load k8s config from arg: ARGS: unknown args [\"A=1\"]",
        );
        check(
            call("DEL").env("CNI_ARGS", "A"),
            4,
            "del cmd: failed to load k8s config from args: ARGS: invalid pair \"A\"",
        );
    });
}

#[test]
fn a_del_with_a_result_of_another_version_succeeds() {
    on_a_node(|node| {
        for previous in [r#"{"cniVersion":"9.9.9"}"#, r#"{"cniVersion":"0.2.0"}"#, r#""text""#, r#"{"ips":5}"#, "null"]
        {
            let previous: Value = serde_json::from_str(previous).unwrap();
            node.call("DEL", "1.0.0").config("prevResult", previous).run().silent();
        }
    });
}

#[test]
fn the_log_goes_where_the_configuration_says() {
    on_a_node(|node| {
        let file = node.path("log/plugin.log");
        let call = node.call("DEL", "1.0.0");
        let to = |destination: &str, level: &str| {
            call.clone().config("pluginLogFile", destination).config("pluginLogLevel", level).run()
        };
        let answer = to(file.to_str().unwrap(), "DEBUG");
        answer.silent();
        assert_eq!(answer.stderr, "");
        let text = std::fs::read_to_string(&file).unwrap();
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let keys: Vec<_> = line.as_object().unwrap().keys().cloned().collect();
            assert_eq!(keys, ["caller", "level", "msg", "ts"]);
        }
        assert!(text.contains("cni-5a1f"), "{text}");
        to("stdout", "info").silent();
        assert!(to("stderr", "debug").stderr.contains("\"level\":\"debug\""));
        assert!(!to("", "error").stderr.contains("\"level\":\"info\""));
        to("/proc/no/such/directory/plugin.log", "info").silent();
    });
}
