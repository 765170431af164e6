//! The init container where something is wrong: it says what, ends with code 1 within a bound, and leaves nothing half-done.

use crate::container::{Answers, Imds, MAC, Node, add_link, hold, on_a_node, put, set};
use crate::support::tool;
use enibox::clock;
use enibox::model::net::{Family, Rule, TABLE_MAIN};
use enibox::netlink::{Socket, rule};
use enibox::rpc::http1::{Response, Verdict};
use enibox::sys;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::time::Duration;

const RP_FILTER: &str = "net/ipv4/conf/eth0/rp_filter";
const RECORD: &str = ".enibox-plugins";
/// A file that is no temporary of anybody's, and one that an interrupted start has left.
const STRAYS: [&str; 2] = ["portmap.tmp", ".enibox-0123456789abcdef.tmp"];

fn mount(arguments: &[&str]) {
    assert!(tool("mount", arguments).is_some(), "mount is needed to make a place read-only or full");
}

fn read_only(path: &str) {
    mount(&["--bind", path, path]);
    mount(&["-o", "remount,bind,ro", path]);
}

// `ip rule flush` between the end of a daemon and the start of the next leaves no way to IMDS, which nobody else would mend.
#[test]
fn a_node_whose_rules_were_flushed_gets_its_way_back_before_imds_is_asked() {
    fn main(family: Family) -> Rule {
        Rule::any(family, 32766, TABLE_MAIN)
    }
    let check = |variables: &[(&str, &str)], families: &[Family]| {
        on_a_node(|node| {
            // This service could be reached without it.
            let way = |family| rule::list(&mut Socket::route().unwrap(), family).unwrap().contains(&main(family));
            let imds = Imds::new(Box::new(move |_| {
                let (status, text) = if way(Family::V4) { (200, MAC) } else { (404, "no way to anybody") };
                Response::text(status, text).into()
            }));
            node.asks(imds.address());
            let mut socket = Socket::route().unwrap();
            socket.run(&[Family::V4, Family::V6].map(|family| rule::delete(&main(family)))).unwrap();
            let ended = node.run(variables);
            for family in [Family::V4, Family::V6] {
                let wanted = families.contains(&family);
                assert_eq!(way(family), wanted, "{variables:?}");
                let of = if family == Family::V6 { "IPv6 rule" } else { "rule" };
                let line = format!("warning: repair main-rule: add {of} 32766: from all lookup main");
                assert_eq!(ended.good().has(&line), wanted, "{:#?}", ended.lines);
            }
        });
    };
    check(&[], &[Family::V4]);
    check(&[("ENABLE_V6_EGRESS", "true")], &[Family::V4, Family::V6]);
}

#[test]
fn what_is_in_the_way_on_the_host() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        set(&[(RP_FILTER, "1")]);
        for name in ["bridge", "loopback", "portmap", "tuning", "aws-cni-support.sh"] {
            put(&node.image(name), format!("{name}, whole"));
        }
        put(&node.host("bridge"), "bridge, who"); // half-written
        put(&node.host("loopback"), "");
        fs::write(node.host("theirs"), "theirs").unwrap();
        symlink("theirs", node.host("tuning")).unwrap();
        symlink("theirs", node.host("aws-cni-support.sh")).unwrap();
        for stray in STRAYS {
            fs::write(node.host(stray), "half").unwrap();
        }
        // A folder stops it, with everything before it done, and its sysctls not.
        fs::create_dir(node.host("portmap")).unwrap();
        let folder = node.host("portmap").display().to_string();
        let ended = node.run(&[]);
        ended.failed(&["Failed to install binaries: ", &folder, "Is a directory (os error 21)"]);
        assert!(imds.seen().is_empty());
        hold(&[(RP_FILTER, "1")]);
        fs::remove_dir(node.host("portmap")).unwrap();
        node.run(&[]).good();
        hold(&[(RP_FILTER, "2")]);
        for name in ["bridge", "loopback", "portmap", "aws-cni-support.sh"] {
            assert!(fs::symlink_metadata(node.host(name)).unwrap().is_file(), "{name}");
            assert_eq!(fs::read_to_string(node.host(name)).unwrap(), format!("{name}, whole"));
        }
        // The host's link is the host's, and what a link leads to is never written.
        assert!(node.host("tuning").is_symlink());
        assert_eq!(fs::read_to_string(node.host("theirs")).unwrap(), "theirs");
        let names = [RECORD, "aws-cni-support.sh", "bridge", "loopback", "portmap", STRAYS[0], "theirs", "tuning"];
        assert_eq!(node.names(), names);
    });
}

#[test]
fn a_folder_that_is_not_there_is_told() {
    on_a_node(|node| {
        put(&node.image("portmap"), "one");
        let path = node.host("missing").display().to_string();
        node.run(&[("HOST_CNI_BIN_PATH", &path)]).failed(&["Failed to install binaries: ", &path, "No such file"]);
    });
}

#[test]
fn a_read_only_folder_is_told_unless_nothing_is_to_be_done() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        put(&node.image("portmap"), "one");
        node.run(&[]).good();
        read_only(&node.host("").display().to_string());
        node.run(&[]).good();
        put(&node.image("portmap"), "two");
        let path = node.host(".enibox-").display().to_string();
        node.run(&[]).failed(&["Failed to install binaries: ", &path, "Read-only file system (os error 30)"]);
        assert_eq!(fs::read_to_string(node.host("portmap")).unwrap(), "one");
        assert_eq!(node.names(), [RECORD, "portmap"]);
    });
}

#[test]
fn a_full_disk_leaves_what_was_there() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        mount(&["-t", "tmpfs", "-o", "size=256k", "tmpfs", &node.host("").display().to_string()]);
        put(&node.image("portmap"), vec![b'1'; 100 << 10]);
        node.run(&[]).good();
        put(&node.image("portmap"), vec![b'2'; 300 << 10]);
        let ended = node.run(&[]);
        ended.failed(&["Failed to install binaries: ", "write ", "No space left on device (os error 28)"]);
        assert!(fs::read(node.host("portmap")).unwrap() == vec![b'1'; 100 << 10], "the old plugin is whole");
        assert_eq!(node.names(), [RECORD, "portmap"]);
        // Not even the record can be written.
        fs::write(node.host("filler"), vec![0; 1 << 20]).unwrap_err();
        put(&node.image("portmap"), "3");
        node.run(&[]).failed(&["Failed to install binaries: ", "No space left on device"]);
        fs::remove_file(node.host("filler")).unwrap();
        node.run(&[]).good();
        assert_eq!(fs::read_to_string(node.host("portmap")).unwrap(), "3");
    });
}

#[test]
fn twenty_starts_at_once() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        let content: Vec<Vec<u8>> = (0..4_u8).map(|one| vec![one; 200_000 + usize::from(one)]).collect();
        let name = |number: usize| format!("plugin-{number}");
        for (number, content) in content.iter().enumerate() {
            put(&node.image(&name(number)), content);
        }
        put(&node.host(&name(0)), &content[0][..1000]);
        set(&[(RP_FILTER, "1")]);
        let start = |_| node.command(&[]).stderr(std::process::Stdio::piped()).spawn().unwrap();
        let running: Vec<_> = (0..20).map(start).collect();
        for child in running {
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        }
        for (number, content) in content.iter().enumerate() {
            assert!(fs::read(node.host(&name(number))).unwrap() == *content, "{}", name(number));
        }
        let names: Vec<_> = [RECORD.to_owned()].into_iter().chain((0..4).map(name)).collect();
        assert_eq!(node.names(), names);
        hold(&[(RP_FILTER, "2")]);
    });
}

#[test]
fn killed_at_any_moment_it_leaves_whole_files() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        let content = |version: u8| vec![version; 8 << 20];
        put(&node.image("portmap"), content(0));
        node.run(&[]).good();
        let (mut old, mut new) = (0, 0);
        for round in 1..=20_u8 {
            put(&node.image("portmap"), content(round));
            let mut child = node.command(&[]).stderr(std::process::Stdio::null()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(u64::from(round) * 5));
            child.kill().unwrap();
            child.wait().unwrap();
            let found = fs::read(node.host("portmap")).unwrap();
            assert!(found.len() == 8 << 20 && found.iter().all(|byte| *byte == found[0]), "round {round}");
            *if found[0] == round { &mut new } else { &mut old } += 1;
        }
        println!("killed before the new file was there: {old}, after: {new}");
        // Whatever was left is known as ours, and its traces go.
        node.run(&[]).good();
        assert!(fs::read(node.host("portmap")).unwrap() == content(20));
        assert_eq!(node.names(), [RECORD, "portmap"]);
    });
}

fn answered(verdict: impl Fn(u32) -> Verdict + Send + Sync + 'static) -> Answers {
    Box::new(verdict)
}

fn token() -> Answers {
    answered(|_| Response::text(200, "a-token").into())
}

#[test]
fn the_metadata_service_may_take_its_time() {
    let check = |what: &str, tokens: Answers, answers: Answers| {
        on_a_node(|node| {
            let imds = Imds::with(tokens, answers);
            node.asks(imds.address());
            let ended = node.run(&[]);
            println!("{what}: {:?}, {} requests", ended.took, imds.seen().len());
            assert!(ended.good().has(&format!("info: Found primaryMAC {MAC}")), "{what}");
        });
    };
    let mac = || Response::text(200, format!("{MAC}\n")).into();
    check(
        "slow",
        answered(|_| {
            std::thread::sleep(Duration::from_secs(2));
            Response::text(200, "a-token").into()
        }),
        answered(move |_| {
            std::thread::sleep(Duration::from_secs(2));
            mac()
        }),
    );
    check("empty at first", token(), answered(move |n| if n < 4 { Response::text(200, "\n").into() } else { mac() }));
    check("broken at first", token(), answered(move |n| if n < 5 { Response::text(503, "").into() } else { mac() }));
    check("lost at first", token(), answered(move |n| if n < 3 { Verdict::HangUp } else { mac() }));
    check("token expired", token(), answered(move |n| if n < 2 { Response::text(401, "").into() } else { mac() }));
    check("without tokens", answered(|_| Response::text(403, "").into()), answered(move |_| mac()));
}

#[test]
fn a_metadata_service_that_tells_nothing_ends_it() {
    let check = |tokens: Answers, answers: Answers, variables: &[(&str, &str)], text: &str, most: u64| {
        on_a_node(|node| {
            let imds = Imds::with(tokens, answers);
            node.asks(imds.address());
            set(&[(RP_FILTER, "1")]);
            let ended = node.run(variables);
            println!("{text}: {:?}, {} requests", ended.took, imds.seen().len());
            ended.failed(&["Failed to get primary IF: ", text]);
            // Far over what it takes, far under for ever.
            assert!(ended.took < Duration::from_secs(most), "{:?}", ended.took);
            hold(&[(RP_FILTER, "1")]);
        });
    };
    let plain = |status: u16, text: &'static str| answered(move |_| Response::text(status, text).into());
    check(token(), plain(200, ""), &[], "tells no mac", 60);
    check(token(), plain(404, ""), &[], "tells no mac", 60);
    check(token(), plain(403, ""), &[], "read imds mac: HTTP 403", 60);
    check(token(), plain(200, "<html>"), &[], "tells \"<html>\" as mac", 60);
    check(plain(403, ""), plain(200, MAC), &[("AWS_EC2_METADATA_V1_DISABLED", "true")], "token refused", 60);
    check(token(), plain(200, MAC), &[("AWS_EC2_METADATA_DISABLED", "true")], "AWS_EC2_METADATA_DISABLED", 60);
    check(token(), plain(500, ""), &[], "read imds mac: HTTP 500", 200);
}

#[test]
fn a_metadata_service_that_is_never_there_ends_it() {
    // Two at once: each takes its whole time.
    std::thread::scope(|scope| {
        for silent in [false, true] {
            scope.spawn(move || {
                on_a_node(|node: &mut Node| {
                    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                    node.asks(listener.local_addr().unwrap());
                    // The kernel goes on taking connections that nobody answers; without the listener it refuses them.
                    let held = silent.then_some(listener);
                    let ended = node.run(&[]);
                    println!("silent {silent}: {:?}", ended.took);
                    ended.failed(&["Failed to get primary IF: ", "read imds mac: "]);
                    assert!((25..200).contains(&ended.took.as_secs()), "{:?}", ended.took);
                    drop(held);
                });
            });
        }
    });
}

/// The process that `parent` has started, once it is there.
fn child_of(parent: u32) -> u32 {
    let path = format!("/proc/{parent}/task/{parent}/children");
    loop {
        if let Ok(child) = fs::read_to_string(&path).unwrap().trim().parse() {
            return child;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_signal_ends_it_while_the_metadata_service_is_silent() {
    on_a_node(|node| {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        node.asks(silent.local_addr().unwrap());
        put(&node.image("portmap"), "one");
        set(&[(RP_FILTER, "1")]);
        for signal in [libc::SIGTERM, libc::SIGINT] {
            // As the first process of its namespace, as in a container: there the kernel drops signals that nobody asked for.
            let plain = node.command(&[]);
            let mut command = Command::new("unshare");
            command.args(["--pid", "--fork", "--kill-child"]).arg(plain.get_program()).stdin(Stdio::null());
            command.current_dir(plain.get_current_dir().unwrap()).stderr(Stdio::piped()).env_clear();
            command.env("PATH", std::env::var_os("PATH").unwrap());
            command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
            let mut running = command.spawn().unwrap();
            let mut lines = BufReader::new(running.stderr.take().unwrap()).lines().map(Result::unwrap);
            assert!(lines.any(|line| line.contains("Configure rp_filter loose...")));
            // Asking by now, or about to.
            std::thread::sleep(Duration::from_millis(200));
            let begin = clock::instant();
            sys::signal(child_of(running.id()), signal).unwrap();
            let last = lines.last().unwrap_or_default();
            let status = running.wait().unwrap();
            let took = begin.elapsed();
            println!("signal {signal} while the metadata service is silent: {took:?}");
            assert_eq!(status.code(), Some(1), "{last}");
            assert!(last.contains(&format!("level=error msg=\"signal {signal}: leaving before")), "{last}");
            assert!(took < Duration::from_secs(5), "{took:?}");
            hold(&[(RP_FILTER, "1")]);
        }
    });
}

#[test]
fn the_primary_link_is_waited_for_and_then_missed() {
    const OTHER: &str = "0a:58:0a:14:0b:a3";
    on_a_node(|node| {
        let imds = Imds::new(Box::new(|_| Response::text(200, OTHER).into()));
        node.asks(imds.address());
        let ended = node.run(&[]);
        println!("no link: {:?}", ended.took);
        ended.failed(&["Failed to get primary IF: no link has MAC ", OTHER, &format!("eth0 {MAC}")]);
        assert!((8..120).contains(&ended.took.as_secs()), "{:?}", ended.took);
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_secs(2));
                add_link("ens6", OTHER);
            });
            node.run(&[])
        });
        assert!(ended.good().has("info: Found primaryIF ens6"));
        hold(&[("net/ipv4/conf/ens6/rp_filter", "2")]);
    });
}

#[test]
fn sysctls_that_cannot_be_written_are_told_unless_they_are_right() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        node.run(&[("ENABLE_IPv6", "true")]).good();
        read_only("/proc/sys");
        node.run(&[("ENABLE_IPv6", "true")]).good();
        let ended = node.run(&[("DISABLE_TCP_EARLY_DEMUX", "true")]);
        ended.failed(&[
            "Failed to configure IPv4 settings: ",
            "sysctl net/ipv4/tcp_early_demux",
            "Read-only file system",
        ]);
        tool("umount", &["/proc/sys"]).unwrap();
        set(&[("net/ipv6/conf/all/forwarding", "0")]);
        read_only("/proc/sys");
        let ended = node.run(&[("ENABLE_V6_EGRESS", "true")]);
        ended.failed(&["Failed to configure IPv6 settings: ", "net/ipv6/conf/all/forwarding", "Read-only file system"]);
    });
}
