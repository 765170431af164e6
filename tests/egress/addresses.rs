//! Where addresses come from: the files of the reference plugin `host-local`, alone and in turn with it, what is taken back of
//! them, and other plugins.

use super::*;

const HOST_LOCAL: &str = "/usr/lib/cni/host-local";

#[test]
fn a_full_range_takes_back_what_is_dead() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let netns = pod();
            let all: Vec<IpAddr> = addresses_of(way);
            assert_eq!(all.len(), way.count);
            let paths: Vec<_> =
                all.iter().map(|ip| write(way, &ip.to_string(), &format!("old-{ip}\r\neth0"))).collect();
            let (code, text) = call(node, way, "ADD", "1.0.0", &netns.path()).run().failure();
            assert!(code == 11 && text.contains("no IP addresses available in range set: "), "{text}");
            assert_eq!(files(way).len(), way.count + 1, "all are young");
            for path in &paths {
                aged(path);
            }
            // Living pods have their routes.
            let living = &all[5..25];
            let routes: Vec<String> = living.iter().map(|ip| format!("ip route add {ip} dev alive")).collect();
            let routes = routes.join("\n");
            tool_with_input(
                "sh",
                &["-e"],
                &format!(
                    "ip link add alive type veth peer name far\nip link set far up\nip link set alive up\n{routes}"
                ),
            );
            call(node, way, "ADD", "1.0.0", &netns.path()).run().result();
            let left = files(way);
            assert!(living.iter().all(|ip| left.contains(&ip.to_string())), "{left:?}");
            assert_eq!(left.len(), living.len() + 3, "those, the new one, the lock, the last one");
            call(node, way, "DEL", "1.0.0", &netns.path()).run().silent();
            tool("ip", &["link", "delete", "alive"]);
        }
    });
}

#[test]
fn gc_takes_back_what_is_dead_and_nothing_of_the_living() {
    on_a_node(|node| {
        for (way, program) in [(&V4, "iptables-nft"), (&V6, "ip6tables-nft")] {
            rules_of_the_daemon(way);
            let netns = pod();
            call(node, way, "ADD", "1.1.0", &netns.path()).run().result();
            let all = addresses_of(way);
            let file = |index: usize, content: &str| write(way, &all[index].to_string(), content);
            // The pod is not in the list; others are dead, listed without a route, and young.
            let (dead, listed, young) =
                (file(5, "containerId-123\r\neth0"), file(6, "listed\r\neth0"), file(7, "young\r\neth0"));
            let old = file(8, "containerId-789");
            for path in [&Path::new(way.data).join("aws-cni").join(way.first), &dead, &listed, &old] {
                aged(path);
            }
            let address = all[if way.family == Family::V4 { 5 } else { 8 }].to_string();
            let chains = tool(program, &["--version"]).is_some();
            if chains {
                original::chain_of_the_original(&format!("{program}-restore"), way, &address);
            }
            let before = state();
            let gc =
                |list: Value| call(node, way, "GC", "1.1.0", Path::new("")).config("cni.dev/valid-attachments", list);
            let (code, text) = gc(json!("all")).run().failure();
            assert!(code != 0 && text.contains("must be a list"), "{text}");
            gc(Value::Null).run().silent();
            assert!(dead.exists(), "without a list nothing is done");
            let valid = json!([{"containerID": "listed", "ifname": "eth0"}, {"containerID": "containerId-123", "ifname": "net1"}]);
            for _ in 0..2 {
                gc(valid.clone()).run().silent();
                assert_eq!([&dead, &old, &listed, &young].map(|path| path.exists()), [false, false, true, true]);
                assert!(files(way).contains(&way.first.to_owned()), "the pod's");
                assert_eq!(state(), before);
                if chains {
                    let left = tool(&format!("{program}-save"), &["-t", "nat"]).unwrap();
                    assert!(!left.contains("CNI-E") && left.contains("-A POSTROUTING -j KUBE-POSTROUTING"), "{left}");
                }
            }
            call(node, way, "DEL", "1.1.0", &netns.path()).run().silent();
        }
    });
}

fn addresses_of(way: &Way) -> Vec<IpAddr> {
    let ipam = json!({"name": "aws-cni", "ipam": {"ranges": [[{"subnet": way.range}]]}});
    let envelope = enibox::model::cni::Envelope::parse(ipam.to_string().as_bytes()).unwrap();
    enibox::model::cni::EgressConfig::from_envelope(&envelope).unwrap().ipam.range.unwrap().after(None).collect()
}

#[test]
fn twenty_at_once_have_twenty_addresses() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let before = state();
            let pods: Vec<(String, Netns)> = (0..20).map(|number| (format!("c{number}"), pod())).collect();
            let all = |command: &str| {
                std::thread::scope(|scope| {
                    let running: Vec<_> = pods
                        .iter()
                        .map(|(id, netns)| {
                            let call = call(node, way, command, "1.0.0", &netns.path()).env("CNI_CONTAINERID", id);
                            scope.spawn(move || call.run())
                        })
                        .collect();
                    for run in running {
                        assert_eq!(run.join().unwrap().code, 0);
                    }
                });
            };
            all("ADD");
            let mut given: Vec<String> = pods.iter().flat_map(|(_, netns)| addresses(netns, way)).collect();
            given.sort();
            given.dedup();
            assert_eq!(given.len(), 20);
            assert_eq!(files(way).len(), 22);
            all("DEL");
            assert_state(&before);
            assert_eq!(files(way), ["last_reserved_ip.0", "lock"]);
        }
    });
}

/// The reference plugin; none, with a line that says so, where it is not installed.
fn host_local(way: &Way, command: &str, container: &str) -> Option<(bool, String)> {
    if !Path::new(HOST_LOCAL).exists() {
        let missing = format!("SKIP: {HOST_LOCAL} is not installed (Debian: containernetworking-plugins)");
        assert!(std::env::var_os("CI").is_none(), "{missing}");
        _ = std::io::stderr().write_all(format!("{missing}\n").as_bytes());
        return None;
    }
    let config = json!({"cniVersion": "0.4.0", "name": "aws-cni", "type": "egress-cni", "ipam": {"type": "host-local",
        "ranges": [[{"subnet": way.range}]], "routes": [{"dst": way.all}], "dataDir": way.data}});
    let variables = [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", container),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/usr/lib/cni"),
    ];
    let mut child = Command::new(HOST_LOCAL)
        .env_clear()
        .envs(variables)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    Some((output.status.success(), String::from_utf8(output.stdout).unwrap()))
}

#[test]
fn host_local_and_we_work_on_one_directory_in_turn() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let pods = [pod(), pod(), pod()];
            let ours = |command: &str, index: usize| {
                let call = call(node, way, command, "0.4.0", &pods[index].path())
                    .env("CNI_CONTAINERID", format!("ours{index}"));
                let answer = call.run();
                assert_eq!(answer.code, 0, "{answer:?}");
            };
            let Some((good, text)) = host_local(way, "ADD", "theirs0") else { return };
            assert!(good && text.contains(&format!("\"{}/", way.first)), "{text}");
            ours("ADD", 0);
            assert!(addresses(&pods[0], way)[0].starts_with(&format!("{}/", way.second)), "behind theirs");
            let (_, text) = host_local(way, "ADD", "theirs1").unwrap();
            assert!(text.contains(&way.second.replace('3', "4")), "behind ours: {text}");
            let (good, text) = host_local(way, "ADD", "ours0").unwrap();
            assert!(!good && text.contains("duplicate allocation is not allowed"), "they know our files: {text}");
            // Each deletes what the other made.
            assert!(host_local(way, "DEL", "ours0").unwrap().0);
            let theirs = call(node, way, "DEL", "0.4.0", Path::new("")).env("CNI_CONTAINERID", "theirs0");
            theirs.run().silent();
            assert_eq!(files(way), [&way.second.replace('3', "4"), "last_reserved_ip.0", "lock"]);
            // One lock for both.
            std::thread::scope(|scope| {
                let theirs: Vec<_> =
                    (10..20).map(|n| scope.spawn(move || host_local(way, "ADD", &format!("theirs{n}")))).collect();
                ours("ADD", 1);
                ours("ADD", 2);
                for run in theirs {
                    assert!(run.join().unwrap().unwrap().0);
                }
            });
            assert_eq!(files(way).len(), 10 + 2 + 1 + 2);
        }
    });
}

// By a process of its own: a program that another test starts holds what this process has open to write until its exec, and what
// is open to write is not run.
fn program(path: &Path, text: &str) {
    let draft = path.with_extension("draft");
    fs::write(&draft, text).unwrap();
    fs::set_permissions(&draft, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert!(Command::new("cp").arg(draft).arg(path).status().unwrap().success());
}

#[test]
fn other_plugins_may_give_the_address() {
    on_a_node(|node| {
        rules_of_the_daemon(&V4);
        let netns = pod();
        let script =
            "#!/bin/sh\ncat > /run/node/stdin\necho \"$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME\" >> /run/node/calls\n";
        let plugin = |name: &str, rest: &str| {
            program(&node.path("bin").join(name), &format!("{script}{rest}\n"));
        };
        let ips = |ips: &str| format!("[ $CNI_COMMAND = DEL ] || echo '{{\"cniVersion\":\"0.4.0\",\"ips\":[{ips}]}}'");
        let one = r#"{"version":"4","address":"169.254.172.9/22","gateway":"169.254.172.1"}"#;
        plugin("one", &ips(one));
        plugin("none", &ips(""));
        plugin("two", &ips(&format!("{one},{one}")));
        plugin("refuses", r#"echo '{"code":11,"msg":"try later","details":"full"}'; exit 1"#);
        plugin("dies", "echo oh dear >&2; exit 3");
        let call = |command: &str, kind: &str| {
            let ipam = json!({"type": kind, "routes": [{"dst": "0.0.0.0/0"}]});
            call(node, &V4, command, "0.4.0", &netns.path()).env("PATH", "/usr/bin:/bin").config("ipam", ipam)
        };
        call("ADD", "one").run().result();
        assert_eq!(addresses(&netns, &V4), ["169.254.172.9/22"]);
        call("DEL", "one").run().silent();
        let calls = || fs::read_to_string(node.path("calls")).unwrap_or_default();
        assert_eq!(calls(), "ADD cni-5a1f eth0\nDEL cni-5a1f eth0\n");
        assert!(fs::read_to_string(node.path("stdin")).unwrap().contains("nodeIP"), "with the whole configuration");
        for (kind, part) in [
            ("none", "IPAM plugin returned zero IPs"),
            ("two", "IPAM plugin is expected to return 1 IP address, but returned 2 IPs, "),
            ("refuses", "running IPAM plugin failed: try later; full"),
            ("dies", "netplugin failed: exit status: 3: \"oh dear\""),
            ("absent", "failed to find plugin \"absent\" in path [/run/node/bin]"),
            ("../bin/one", "failed to find plugin"),
        ] {
            let (code, text) = call("ADD", kind).run().failure();
            assert!(code == 11 && text.contains(part), "{kind}: {text}");
            call("DEL", kind).run().silent();
        }
        // One that never reads, and leaves somebody behind who does not either.
        let leaves = node.path("bin").join("leaves");
        let behind = "#!/bin/sh\nsleep 100 <&0 >/dev/null 2>&1 &\necho $! >> /run/node/behind\n";
        program(&leaves, &format!("{behind}{}\n", ips(one)));
        for command in ["ADD", "DEL"] {
            let done = call(command, "leaves").config("filler", "x".repeat(200_000)).run();
            assert_eq!(done.code, 0, "{done:?}");
            println!("{command} by a plugin that leaves somebody behind: {:?}", done.took);
            assert!(done.took < Duration::from_secs(50), "{:?}", done.took);
        }
        for process in fs::read_to_string(node.path("behind")).unwrap().lines() {
            sys::signal(process.parse().unwrap(), libc::SIGKILL).unwrap();
        }
        assert!(calls().contains("ADD cni-5a1f eth0\nDEL cni-5a1f eth0\nDEL cni-5a1f eth0\n"), "{}", calls());
    });
}

#[test]
fn a_lock_that_nobody_gives_back_ends_an_add() {
    on_a_node(|node| {
        rules_of_the_daemon(&V4);
        let held = File::open(write(&V4, "lock", "")).unwrap();
        sys::lock_exclusive(&held).unwrap();
        let netns = pod();
        let (code, text) = call(node, &V4, "ADD", "1.0.0", &netns.path()).run().failure();
        assert!(code == 11 && text.contains("lock /run/cni"), "{text}");
        assert!(Host::open().unwrap().require_egress_rules(Family::V4).is_ok());
    });
}
