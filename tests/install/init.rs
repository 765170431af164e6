//! The init container on a node where nothing is wrong: `spec/install.md` 3 and 6, row by row.

use crate::container::{Imds, MAC, Node, hold, on_a_node, put, set};
use crate::support::{copy_program, find_program};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Child, Stdio};

const RP_FILTER: &str = "net/ipv4/conf/eth0/rp_filter";
const TCP: &str = "net/ipv4/tcp_early_demux";
const UDP: &str = "net/ipv4/udp_early_demux";
const DISABLED: &str = "net/ipv6/conf/all/disable_ipv6";
const FORWARDING: &str = "net/ipv6/conf/all/forwarding";
const ACCEPT_RA: &str = "net/ipv6/conf/eth0/accept_ra";
/// The opposite of what is wanted by default.
const WRONG: &[(&str, &str)] =
    &[(RP_FILTER, "1"), (TCP, "0"), (UDP, "0"), (DISABLED, "1"), (FORWARDING, "0"), (ACCEPT_RA, "1")];
const RECORD: &str = ".enibox-plugins";

/// An image with three plugins, the support script and what is no plugin.
fn fill(node: &Node) {
    for name in ["portmap", "bandwidth", "loopback", "aws-cni-support.sh"] {
        put(&node.image(name), format!("this is {name}"));
    }
    fs::write(node.image("LICENSE"), "text").unwrap();
    fs::create_dir(node.image("folder")).unwrap();
    symlink("portmap", node.image("link")).unwrap();
}

#[test]
fn a_fresh_node_gets_everything_in_order() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        fill(node);
        put(&node.host("bridge"), "of the operating system");
        set(WRONG);
        // Names of other settings, or of none any more, change nothing.
        let ended = node.run(&[("AWS_VPC_K8S_CNI_CONFIGURE_RPFILTER", "false"), ("AWS_VPC_ENI_MTU", "1")]);
        let host = node.host("").display().to_string();
        let mut wanted = vec!["info: Copying CNI plugin binaries ...".to_owned()];
        for name in ["aws-cni-support.sh", "bandwidth", "loopback", "portmap"] {
            wanted.push(format!("info: Installed {host}{name}"));
        }
        wanted.extend([
            format!("info: Copied all CNI plugin binaries to {host}"),
            "info: Configure rp_filter loose...".into(),
            format!("info: Found primaryMAC {MAC}"),
            "info: Found primaryIF eth0".into(),
            format!("info: Updated {RP_FILTER} to 2"),
            format!("info: Updated {TCP} to 1"),
            "info: CNI init container done".into(),
        ]);
        let told: Vec<_> = ended.good().lines.iter().filter(|line| !line.starts_with("warning: ")).collect();
        assert_eq!(told, wanted.iter().collect::<Vec<_>>());
        for name in ["AWS_VPC_K8S_CNI_CONFIGURE_RPFILTER=\"false\"", "AWS_VPC_ENI_MTU=\"1\""] {
            let warned = ended.lines.iter().any(|line| line.starts_with(&format!("warning: setting {name}: ")));
            assert!(warned, "{:#?}", ended.lines);
        }
        assert_eq!(
            node.names(),
            [RECORD, "aws-cni-support.sh", "bandwidth", "bridge", "loopback", "portmap"],
            "names on the host"
        );
        for name in ["aws-cni-support.sh", "bandwidth", "loopback", "portmap"] {
            assert_eq!(fs::read_to_string(node.host(name)).unwrap(), format!("this is {name}"));
            let metadata = fs::symlink_metadata(node.host(name)).unwrap();
            assert_eq!((metadata.mode() & 0o7777, metadata.is_file()), (0o755, true), "{name}");
        }
        hold(&[(RP_FILTER, "2"), (TCP, "1"), (UDP, "0"), (DISABLED, "1"), (FORWARDING, "0"), (ACCEPT_RA, "1")]);
        // One client, one token.
        assert_eq!(imds.seen(), ["PUT /latest/api/token", "GET /latest/meta-data/mac"]);
    });
}

#[test]
fn sysctls_follow_the_settings() {
    let check = |variables: &[(&str, &str)], changed: &[(&str, &str)]| {
        on_a_node(|node| {
            let imds = Imds::plain();
            node.asks(imds.address());
            set(WRONG);
            let ended = node.run(variables);
            let updates: Vec<_> = ended.good().lines.iter().filter(|line| line.contains(": Updated ")).collect();
            let wanted: Vec<_> = changed.iter().map(|(key, value)| format!("info: Updated {key} to {value}")).collect();
            assert_eq!(updates, wanted.iter().collect::<Vec<_>>(), "{variables:?}");
            hold(changed);
            for (key, value) in WRONG.iter().filter(|(key, _)| changed.iter().all(|(other, _)| other != key)) {
                hold(&[(key, value)]);
            }
        });
    };
    let ipv6 = [(RP_FILTER, "2"), (TCP, "1"), (DISABLED, "0"), (FORWARDING, "1"), (ACCEPT_RA, "2")];
    let egress = [ipv6[0], ipv6[1], ipv6[3], ipv6[4]];
    let strict = [(RP_FILTER, "2"), (TCP, "0"), (UDP, "0")];
    check(&[("ENABLE_IPv6", "true")], &ipv6);
    check(&[("ENABLE_IPv6", "T"), ("ENABLE_V6_EGRESS", "1")], &ipv6);
    check(&[("ENABLE_V6_EGRESS", "true")], &egress);
    check(&[("DISABLE_TCP_EARLY_DEMUX", "true")], &strict);
    for malformed in ["", "yes", "2"] {
        check(&[("DISABLE_TCP_EARLY_DEMUX", malformed), ("ENABLE_IPv6", malformed)], &ipv6[..2]);
    }
}

#[test]
fn an_image_without_plugins_is_fine_and_an_empty_path_is_the_default() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        let ended = node.run(&[("HOST_CNI_BIN_PATH", "")]);
        assert!(ended.good().has("info: Copied all CNI plugin binaries to /host/opt/cni/bin"));
        assert_eq!(node.names(), [""; 0]);
    });
}

#[test]
fn a_second_start_writes_nothing() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        fill(node);
        put(&node.host("loopback"), "of somebody else");
        node.run(&[]).good();
        let state = || {
            let mut state = Vec::new();
            for name in node.names().into_iter().chain([String::new()]) {
                let metadata = fs::metadata(node.host(&name)).unwrap();
                state.push((name, metadata.ino(), metadata.ctime(), metadata.ctime_nsec()));
            }
            state
        };
        let before = state();
        let ended = node.run(&[]);
        assert!(ended.good().has(&format!("info: {} is there already", node.host("portmap").display())));
        let left = format!("info: Left {} as it is: it was not installed by us", node.host("loopback").display());
        assert!(ended.has(&left), "{:#?}", ended.lines);
        assert_eq!(state(), before);
        assert_eq!(fs::read_to_string(node.host("loopback")).unwrap(), "of somebody else");
    });
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn a_plugin_that_runs_is_replaced_under_it() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        let Some(sleep) = find_program("sleep") else { panic!("sleep is part of every system that has tests") };
        copy_program(&sleep, &node.image("tuning"));
        node.run(&[]).good();
        let mut command = std::process::Command::new(node.host("tuning"));
        let mut running = Running(command.arg("600").stdin(Stdio::null()).spawn().unwrap());
        put(&node.image("tuning"), "another version");
        node.run(&[]).good();
        assert_eq!(fs::read_to_string(node.host("tuning")).unwrap(), "another version");
        assert!(running.0.try_wait().unwrap().is_none(), "it runs on");
        let executable = fs::read_link(format!("/proc/{}/exe", running.0.id())).unwrap();
        assert!(executable.display().to_string().ends_with("(deleted)"), "{}", executable.display());
    });
}

#[test]
fn a_source_of_any_mode_becomes_an_executable_of_all() {
    on_a_node(|node| {
        let imds = Imds::plain();
        node.asks(imds.address());
        put(&node.image("vlan"), "plugin");
        fs::set_permissions(node.image("vlan"), fs::Permissions::from_mode(0o500)).unwrap();
        node.run(&[]).good();
        assert_eq!(fs::metadata(node.host("vlan")).unwrap().mode() & 0o7777, 0o755);
        // As a copy that was interrupted between its name and its mode: right in content alone.
        fs::set_permissions(node.host("vlan"), fs::Permissions::from_mode(0o644)).unwrap();
        node.run(&[]).good();
        assert_eq!(fs::metadata(node.host("vlan")).unwrap().mode() & 0o7777, 0o755);
    });
}
