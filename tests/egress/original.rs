//! Pods of the original, and what it has made for them.

use super::*;

/// What the original has made for a pod, beside rules of others.
pub fn chain_of_the_original(program: &str, way: &Way, address: &str) {
    let (chain, multicast) = match way.family {
        Family::V4 => ("CNI-E4-5740307710ebfd5fb24f5", "224.0.0.0/4"),
        Family::V6 => ("CNI-E6-e335b08ae90730d0a659a", "ff00::/8"),
    };
    let container = if way.family == Family::V4 { "containerId-123" } else { "containerId-789" };
    let comment = format!("-m comment --comment \"name: \\\"aws-cni\\\" id: \\\"{container}\\\"\"");
    let rules = format!(
        "*nat\n:{chain} - [0:0]\n:KUBE-POSTROUTING - [0:0]\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A POSTROUTING -s {address} {comment} -j {chain}\n-A {chain} -d {multicast} {comment} -j ACCEPT\n\
         -A {chain} {comment} -j SNAT --to-source {} --random-fully\nCOMMIT\n",
        way.node_ip
    );
    tool_with_input(program, &[], &rules);
}

/// Wires a pod as the original does (`spec/egress.md` 3, 4), as far as there is something to take away.
fn wired_by_the_original(way: &Way, netns: &Netns) {
    let inner = way.inner;
    let (gateway, address, scope) = match way.family {
        Family::V4 => ("169.254.172.1/32", format!("{}/22", way.first), "scope link"),
        Family::V6 => ("fe80::77/64", format!("{}/118", way.first), "nodad"),
    };
    write(way, way.first, "cni-5a1f\r\neth0");
    let host = format!(
        "ip link add veth0a1b2c3d mtu 9001 type veth peer name {inner} netns {}\nip link set veth0a1b2c3d up\n\
         ip address add {gateway} dev veth0a1b2c3d {scope}\nip route add {} dev veth0a1b2c3d",
        netns.path().display(),
        way.first
    );
    tool_with_input("sh", &["-e"], &host);
    let nodad = if way.family == Family::V6 { "nodad" } else { "" };
    let pod = format!("ip address add {address} dev {inner} {nodad}\nip link set {inner} up");
    netns.run(|| tool_with_input("sh", &["-e"], &pod));
}

#[test]
fn pods_of_the_original_are_taken_over() {
    on_a_node(|node| {
        for way in [&V4, &V6] {
            rules_of_the_daemon(way);
            let before = state();
            for (again, netns_lives) in [(false, true), (true, true), (false, false)] {
                let netns = pod();
                wired_by_the_original(way, &netns);
                if again {
                    let result = call(node, way, "ADD", "0.4.0", &netns.path()).run().result();
                    assert_ne!(result["interfaces"][3]["name"], "veth0a1b2c3d", "made anew");
                    assert!(addresses(&netns, way)[0].starts_with(&format!("{}/", way.first)), "with its old address");
                }
                let path = if netns_lives { netns.path() } else { PathBuf::new() };
                call(node, way, "DEL", "0.4.0", &path).run().silent();
                assert_state(&before);
                assert!(!files(way).contains(&way.first.to_owned()));
            }
        }
    });
}

#[test]
fn chains_of_the_original_go_with_their_pods() {
    on_a_node(|node| {
        for (way, container, program) in
            [(&V4, "containerId-123", "iptables-nft"), (&V6, "containerId-789", "ip6tables-nft")]
        {
            if tool(program, &["--version"]).is_none() {
                return;
            }
            write(way, way.first, &format!("{container}\r\neth0"));
            chain_of_the_original(&format!("{program}-restore"), way, way.first);
            let saved = || tool(&format!("{program}-save"), &["-t", "nat"]).unwrap();
            assert!(saved().contains("CNI-E"));
            for _ in 0..2 {
                call(node, way, "DEL", "0.4.0", Path::new("")).env("CNI_CONTAINERID", container).run().silent();
                let left = saved();
                assert!(!left.contains("CNI-E") && left.contains("-A POSTROUTING -j KUBE-POSTROUTING"), "{left}");
            }
            assert_eq!(files(way), ["lock"]);
        }
    });
}

#[test]
fn chains_in_legacy_tables_are_told_with_the_commands() {
    on_a_node(|node| {
        for (way, container, program) in
            [(&V4, "containerId-123", "iptables-legacy"), (&V6, "containerId-789", "ip6tables-legacy")]
        {
            if tool(program, &["--version"]).is_none() {
                return;
            }
            write(way, way.first, &format!("{container}\r\neth0"));
            chain_of_the_original(&format!("{program}-restore"), way, way.first);
            call(node, way, "DEL", "0.4.0", Path::new("")).env("CNI_CONTAINERID", container).run().silent();
            let log = fs::read_to_string(node.path("egress.log")).unwrap();
            let told = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let told: Vec<String> = told.map(|line| line["msg"].as_str().unwrap_or_default().to_owned()).collect();
            let warning =
                told.iter().rfind(|text| text.contains("iptables-legacy")).unwrap_or_else(|| panic!("{told:?}"));
            let commands = warning.lines().skip(1).collect::<Vec<_>>().join("\n");
            assert_eq!(commands.lines().count(), 3, "{warning}");
            tool_with_input("sh", &["-e"], &commands);
            let left = tool(&format!("{program}-save"), &["-t", "nat"]).unwrap();
            assert!(!left.contains("CNI-E") && left.contains("KUBE-POSTROUTING"), "the commands do it: {left}");
        }
    });
}
