//! The entrypoint `aws-vpc-cni`, run as the node's container runs it: in a working directory of its own, with the host's
//! folders named by its environment. Seen from outside: files, their order, output, exit codes.

use crate::support::{copy_program, in_fresh_netns};
use enibox::clock;
use enibox::model::settings::Settings;
use enibox::netlink::{rule, sysctl};
use enibox::rpc::grpc::Client;
use enibox::sandbox::topology::{EC2, IMDS, Node};
use enibox::sandbox::world::{Plan, World};
use enibox::sys;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_enibox");
/// Nothing here takes longer on a loaded machine.
const LIMIT: Duration = Duration::from_mins(2);
/// Calls that run have so long to end after a SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(2);
const CONFLIST: &str = "10-aws.conflist";
/// A plugin of the runtime's that knows all versions.
const PORTMAP: &str =
    "#!/bin/sh\necho '{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}'\n";

/// The folders of a host and of the container's image, removed when dropped.
struct Host(PathBuf);

impl Host {
    /// As a fresh node: `portmap` is there and nothing of ours.
    fn new() -> Host {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("enibox-install-{}-{number}", std::process::id()));
        for folder in ["bin", "net.d", "app"] {
            fs::create_dir_all(path.join(folder)).unwrap();
        }
        let host = Host(path);
        for name in ["aws-vpc-cni", "aws-vpc-cni-init"] {
            std::os::unix::fs::symlink(PROGRAM, host.path("app").join(name)).unwrap();
        }
        host.plugin("portmap", PORTMAP);
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn plugin(&self, name: &str, script: &str) {
        let draft = self.path(name);
        fs::write(&draft, script).unwrap();
        fs::set_permissions(&draft, Permissions::from_mode(0o755)).unwrap();
        copy_program(&draft, &self.path("bin").join(name));
        fs::remove_file(draft).unwrap();
    }

    fn conflist(&self) -> PathBuf {
        self.path("net.d").join(CONFLIST)
    }

    fn names(&self, folder: &str) -> BTreeSet<String> {
        let entries = fs::read_dir(self.path(folder)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Starts a container's process with a command that runs `sh`: entering a mount namespace leads to its root, so that
    /// only a process inside can go to the working directory.
    fn start(&self, name: &str, command: &mut Command, env: &[(&str, &str)], out: &str) -> Child {
        let out = File::options().create(true).append(true).open(self.path(out)).unwrap();
        command.args(["-c", "cd \"$0\" && exec \"./$1\""]).arg(self.path("app")).arg(name).env_clear();
        command.stdin(Stdio::null());
        command.stdout(out.try_clone().unwrap()).stderr(out);
        command.env("HOST_CNI_BIN_PATH", self.path("bin")).env("HOST_CNI_CONFDIR_PATH", self.path("net.d"));
        command.env("AWS_VPC_K8S_CNI_LOG_FILE", self.path("ipamd.log"));
        command.env("ENIBOX_SETTINGS_FILE", self.path("settings.env"));
        command.envs(env.iter().copied()).spawn().unwrap()
    }

    fn output(&self, out: &str) -> String {
        fs::read_to_string(self.path(out)).unwrap_or_default()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let removed = fs::remove_dir_all(&self.0);
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

/// Held to write while twenty containers start: beside them no other gets an answer from a plugin in time.
static CROWD: RwLock<()> = RwLock::new(());

/// A node of the sandbox with its host's folders.
struct Stage {
    node: Arc<Node>,
    host: Host,
    world: World,
    _quiet: Option<RwLockReadGuard<'static, ()>>,
}

/// A container that runs; killed when dropped.
struct Container(Child);

impl Drop for Container {
    fn drop(&mut self) {
        self.0.kill().ok(); // it may have ended
        self.0.wait().unwrap();
    }
}

impl Container {
    fn wait(&mut self) -> ExitStatus {
        eventually("the container ends", || self.0.try_wait().unwrap())
    }

    /// SIGTERM, as the kubelet sends it; how long it takes to end, which it must do with code 0.
    fn stop(mut self) -> Duration {
        let begin = clock::instant();
        sys::signal(self.0.id(), libc::SIGTERM).unwrap();
        assert_eq!(self.wait().code(), Some(0));
        begin.elapsed()
    }
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = clock::instant() + LIMIT;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(clock::instant() < end, "not within {LIMIT:?}: {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}

impl Stage {
    fn new(seed: u64) -> Stage {
        let quiet = CROWD.read().unwrap_or_else(PoisonError::into_inner);
        Stage { _quiet: Some(quiet), ..Stage::unguarded(seed) }
    }

    fn unguarded(seed: u64) -> Stage {
        let home = std::env::temp_dir().join(format!("enibox-install-sandbox-{}", std::process::id()));
        let world = World::create(&Plan { nodes: 1, instance_type: "m5.large", seed, home: &home }).unwrap();
        Stage { node: world.node(0).unwrap(), host: Host::new(), world, _quiet: None }
    }

    /// Starts the container; its output goes to the file of this name.
    fn start(&self, env: &[(&str, &str)], out: &str) -> Container {
        self.start_as("aws-vpc-cni", env, out)
    }

    fn start_as(&self, name: &str, env: &[(&str, &str)], out: &str) -> Container {
        let mut all = vec![
            ("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}")),
            ("AWS_EC2_ENDPOINT", format!("http://{EC2}")),
            ("CLUSTER_NAME", "enibox-sandbox".into()),
        ];
        all.extend(env.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let all: Vec<(&str, &str)> = all.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let mut command = self.node.command("/bin/sh").unwrap();
        Container(self.host.start(name, &mut command, &all, out))
    }

    /// Whether the daemon takes connections.
    fn serves(&self) -> bool {
        let socket = Path::new("/run/aws-node/ipamd.sock");
        self.node.inside(|| Ok(Client::connect(socket, Duration::from_secs(5)).is_ok())).unwrap()
    }

    /// Waits for the last line of the installation.
    fn wait_installed(&self, container: &mut Container, out: &str) {
        eventually("the installation is done", || {
            assert!(container.0.try_wait().unwrap().is_none(), "it ended: {}", self.said(out));
            self.host.output(out).contains("Successfully copied").then_some(())
        });
    }

    fn said(&self, out: &str) -> String {
        format!("{}\n{}", self.host.output(out), self.host.output("ipamd.log"))
    }

    /// A pod by the plugin and the configuration that were installed.
    fn add_pod(&self, name: &str) -> Value {
        let list: Value = serde_json::from_slice(&fs::read(self.host.conflist()).unwrap()).unwrap();
        let mut config = list["plugins"][0].clone();
        config["cniVersion"] = json!("1.1.0");
        config["name"] = list["name"].clone();
        config["pluginLogFile"] = json!(self.host.path("plugin.log"));
        let pod = self.node.create_pod(name).unwrap();
        let mut command = self.node.command(self.host.path("bin").join("aws-cni")).unwrap();
        command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=tests;K8S_POD_NAME={name};K8S_POD_UID={name}-uid");
        command.env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", name).env("CNI_NETNS", &pod.path);
        command.env("CNI_IFNAME", "eth0").env("CNI_PATH", self.host.path("bin")).env("CNI_ARGS", args);
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "ADD of {name}: {text}\n{}", self.said("out"));
        std::mem::forget(pod); // it lives as long as the node
        serde_json::from_str(&text).unwrap()
    }

    /// What the pods' network consists of on the host.
    fn pods_network(&self) -> Vec<String> {
        let mut socket = self.node.place.socket().unwrap();
        let rules = rule::list(&mut socket, enibox::model::net::Family::V4).unwrap();
        let links = self.node.place.links().unwrap().into_iter().filter(|link| link.name.starts_with("eni"));
        links
            .map(|link| format!("{} {}", link.index, link.name))
            .chain(rules.iter().map(|rule| format!("{rule:?}")))
            .collect()
    }
}

fn golden(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/conflist").join(format!("{name}.conflist"));
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_fresh_node_gets_plugin_daemon_and_configuration_in_this_order() {
    let stage = Stage::new(1);
    fs::write(stage.host.path("net.d/.enibox-0123456789abcdef.tmp"), "half").unwrap();
    fs::write(stage.host.path("bin/.enibox-0123456789abcdef.tmp"), "half").unwrap();
    fs::write(stage.host.path("bin/foreign.tmp"), "somebody's").unwrap();
    let mut container = stage.start(&[], "out");
    // As soon as there is a configuration, a runtime may call the plugin.
    eventually("a configuration is there", || {
        assert!(container.0.try_wait().unwrap().is_none(), "it ended: {}", stage.said("out"));
        stage.host.conflist().exists().then_some(())
    });
    assert!(stage.serves(), "the configuration is there before the daemon serves");
    assert_eq!(fs::read_to_string(stage.host.conflist()).unwrap(), golden("v4-newest"));
    let result = stage.add_pod("first");
    assert!(result["ips"][0]["address"].is_string(), "{result}");
    stage.wait_installed(&mut container, "out");

    assert_eq!(fs::metadata(stage.host.conflist()).unwrap().mode() & 0o7777, 0o644);
    let names = ["aws-cni", "egress-cni", "egress-v4-cni"];
    let files = names.map(|name| fs::metadata(stage.host.path("bin").join(name)).unwrap());
    assert!(files.iter().all(|file| file.mode() & 0o7777 == 0o755 && file.ino() == files[0].ino()));
    assert!(fs::read(stage.host.path("bin/aws-cni")).unwrap() == fs::read(PROGRAM).unwrap(), "another program");
    assert_eq!(stage.host.names("net.d"), BTreeSet::from([CONFLIST.to_owned()]));
    let wanted = ["aws-cni", "egress-cni", "egress-v4-cni", "foreign.tmp", "portmap"].map(str::to_owned);
    assert_eq!(stage.host.names("bin"), BTreeSet::from(wanted));

    let output = stage.host.output("out");
    let order = [
        "Validating env variables ...",
        "Install CNI binaries ...",
        "Installed ",
        "/bin/aws-cni\n",
        "/bin/egress-cni\n",
        "/bin/egress-v4-cni\n",
        "Starting IPAM daemon ...",
        "Checking for IPAM connectivity ...",
        "Copying config file ...",
        "Successfully copied CNI plugin binary and config file.",
    ];
    let mut rest = output.as_str();
    for part in order {
        let at = rest.find(part).unwrap_or_else(|| panic!("{part:?} is missing or too early in\n{output}"));
        rest = &rest[at + part.len()..];
    }
    let mut timed = output.lines().filter(|line| !line.starts_with("Installed "));
    assert!(timed.all(|line| line.starts_with("time=\"") && line.contains("Z\" level=info msg=\"")), "{output}");
    container.stop();
}

#[test]
fn a_restart_leaves_configuration_and_pods_alone() {
    let stage = Stage::new(2);
    let mut container = stage.start(&[], "out");
    stage.wait_installed(&mut container, "out");
    stage.add_pod("first");
    let before = (stage.pods_network(), fs::metadata(stage.host.conflist()).unwrap(), stage.plugin_file());
    assert!(before.0.iter().any(|line| line.contains("eni")), "{:?}", before.0);
    let took = container.stop();
    println!("SIGTERM to the end: {took:?}");
    assert!(took < STOP_LIMIT, "{took:?}");
    assert!(
        stage.host.output("out").trim_end().ends_with("IPAMD stopped hence exiting ...\""),
        "{}",
        stage.said("out")
    );
    assert_eq!(stage.pods_network(), before.0);
    let stays = |when: &str| {
        let now = fs::metadata(stage.host.conflist()).unwrap_or_else(|error| panic!("{when}: {error}"));
        assert_eq!((now.ino(), now.mtime_nsec()), (before.1.ino(), before.1.mtime_nsec()), "{when}: written again");
    };
    stays("after SIGTERM");

    // One that cannot start says why, and takes nothing away either.
    let mut failed = stage.start(&[("ENABLE_POD_ENI", "true")], "failed");
    assert_eq!(failed.wait().code(), Some(1));
    let output = stage.host.output("failed");
    assert!(
        output.contains("MY_NODE_NAME is not set") && output.contains("level=error msg=\"IPAMD stopped"),
        "{output}"
    );
    stays("after a start that failed");

    let mut again = stage.start(&[], "again");
    stage.wait_installed(&mut again, "again");
    stays("after a restart");
    assert_eq!(stage.plugin_file(), before.2, "the plugin was written again");
    assert_eq!(stage.pods_network(), before.0);
    assert!(stage.host.output("again").contains("the config file is as it was"), "{}", stage.said("again"));
    stage.add_pod("second");
    again.stop();

    // What is different is written.
    let mut changed = stage.start(&[("POD_MTU", "1400"), ("ENIBOX_CNI_VERSION", "1.0.0")], "changed");
    stage.wait_installed(&mut changed, "changed");
    assert_eq!(fs::read_to_string(stage.host.conflist()).unwrap(), golden("v4-pinned").replace("9001", "1400"));
    changed.stop();
}

impl Stage {
    fn plugin_file(&self) -> (u64, i64) {
        let file = fs::metadata(self.host.path("bin/aws-cni")).unwrap();
        (file.ino(), file.mtime_nsec())
    }
}

#[test]
fn a_daemon_that_cannot_start_gets_no_configuration() {
    let stage = Stage::new(3);
    let nowhere = ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1");
    let mut container = stage.start(&[nowhere], "out");
    assert_eq!(container.wait().code(), Some(1));
    let output = stage.host.output("out");
    assert!(output.contains("read the instance's identity: "), "{output}");
    assert_eq!(stage.host.names("net.d"), BTreeSet::new());

    // Nor one that is told to go while it waits for somebody who never answers.
    let silent = stage.node.place.net.run(|| TcpListener::bind("127.0.0.1:80").unwrap()).unwrap();
    let container = stage.start(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1")], "silent");
    let retrying = || stage.host.output("silent").contains("Retrying waiting for IPAM-D, 1 s by now; its log says");
    eventually("it waits", || retrying().then_some(()));
    let took = container.stop();
    println!("SIGTERM while IMDS is silent: {took:?}");
    assert!(took < STOP_LIMIT, "{took:?}");
    assert!(stage.host.output("ipamd.log").contains("leaving before the start is done"), "{}", stage.said("silent"));
    assert_eq!(stage.host.names("net.d"), BTreeSet::new());
    drop(silent);
}

#[test]
fn the_other_family_has_its_own_egress() {
    let stage = Stage::new(4);
    let v6 = [("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true")];
    let mut container = stage.start(&[&v6[..], &[("ENIBOX_CNI_VERSION", "0.4.0")]].concat(), "out");
    stage.wait_installed(&mut container, "out");
    let address = stage.world.nodes[0].address.to_string();
    assert_eq!(fs::read_to_string(stage.host.conflist()).unwrap(), golden("v6").replace("10.0.0.5", &address));
    container.stop();
    let mut container = stage.start(&[("ENABLE_V6_EGRESS", "true"), ("ENIBOX_CNI_VERSION", "0.4.0")], "egress");
    stage.wait_installed(&mut container, "egress");
    let address = stage.world.nodes[0].address_v6.to_string();
    assert_eq!(
        fs::read_to_string(stage.host.conflist()).unwrap(),
        golden("v4-egress").replace("2001:db8::5", &address)
    );
    container.stop();
}

/// The sandbox sets by itself what the init container sets on a node, which runs in no other mode of it: both must be the same.
#[test]
fn the_sandbox_prepares_nodes_as_the_init_container_does() {
    const KEYS: &[&str] = &[
        "net/ipv4/conf/eth0/rp_filter",
        "net/ipv4/tcp_early_demux",
        "net/ipv4/udp_early_demux",
        "net/ipv6/conf/all/disable_ipv6",
        "net/ipv6/conf/all/forwarding",
        "net/ipv6/conf/eth0/accept_ra",
    ];
    const V6: &[(&str, &str)] =
        &[("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true")];
    let stage = Stage::new(9);
    let seen = || -> Vec<String> {
        let read = || KEYS.iter().map(|key| sysctl::read(key).unwrap()).collect();
        stage.node.place.net.run(read).unwrap()
    };
    for (number, env) in
        [&[][..], &[("DISABLE_TCP_EARLY_DEMUX", "true")], &[("ENABLE_V6_EGRESS", "true")], V6].iter().enumerate()
    {
        let lookup = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        stage.node.prepare(&Settings::parse(lookup).0).unwrap();
        let wanted = seen();
        let wrong = || {
            for (key, value) in KEYS.iter().zip(&wanted) {
                // What the init container leaves alone in this mode is the sandbox's own.
                let set = |part: &str| env.iter().any(|(name, _)| name.contains(part));
                let ours = match *key {
                    "net/ipv4/udp_early_demux" => set("DEMUX"),
                    key => key.contains("ipv4") || set("V6") || set("v6"),
                };
                if ours && !key.ends_with("disable_ipv6") {
                    sysctl::set(key, if value == "1" { "0" } else { "1" }).unwrap();
                }
            }
        };
        stage.node.place.net.run(wrong).unwrap();
        assert_ne!(seen(), wanted);
        let begin = clock::instant();
        let out = format!("init-{number}");
        assert_eq!(stage.start_as("aws-vpc-cni-init", env, &out).wait().code(), Some(0), "{}", stage.host.output(&out));
        println!("init container with {env:?}: {:?}", begin.elapsed());
        assert_eq!(seen(), wanted, "{env:?}: {}", stage.host.output(&out));
    }
}

#[test]
fn a_plugin_that_is_not_there_is_told_and_keeps_the_version_down() {
    let stage = Stage::new(5);
    fs::remove_file(stage.host.path("bin/portmap")).unwrap();
    let warned = [("ENABLE_BANDWIDTH_PLUGIN", "true"), ("NETWORK_POLICY_ENFORCING_MODE", "standard")];
    let mut container = stage.start(&warned, "out");
    stage.wait_installed(&mut container, "out");
    assert_eq!(fs::read_to_string(stage.host.conflist()).unwrap(), golden("v4-bandwidth"));
    let output = stage.host.output("out");
    for name in ["portmap", "bandwidth"] {
        assert!(output.contains(&format!("level=error msg=\"plugin {name} is not in ")), "{output}");
    }
    assert!(output.contains("level=warning msg=\"ENABLE_BANDWIDTH_PLUGIN and the network policy agent"), "{output}");
    container.stop();
}

#[test]
fn the_operators_template_counts() {
    let stage = Stage::new(6);
    let template = stage.host.path("app").join(CONFLIST);
    fs::write(
        &template,
        r#"{"cniVersion":"0.4.0","name":"aws-cni","mine":1e3,"plugins":[{"type":"aws-cni","mtu":__MTU__}]}"#,
    )
    .unwrap();
    let mut container = stage.start(&[("DISABLE_POD_V6", "true"), ("ENIBOX_CNI_VERSION", "0.4.0")], "out");
    stage.wait_installed(&mut container, "out");
    let tuning = golden("v4-tuning");
    let tuning = tuning.lines().find(|line| line.contains("tuning")).unwrap().trim();
    let wanted = format!(
        r#"{{"cniVersion":"0.4.0","name":"aws-cni","mine":1e3,"plugins":[{{"type":"aws-cni","mtu":9001}},{tuning}]}}"#
    );
    assert_eq!(fs::read_to_string(stage.host.conflist()).unwrap(), wanted);
    container.stop();
}

#[test]
fn a_folder_that_cannot_be_written_ends_it_with_the_reason() {
    let stage = Stage::new(7);
    let folder = stage.host.path("net.d");
    let mount =
        || Ok(Command::new("mount").args(["-t", "tmpfs", "-o", "ro", "tmpfs"]).arg(&folder).status()?.success());
    assert!(stage.node.inside(mount).unwrap());
    let mut container = stage.start(&[], "out");
    assert_eq!(container.wait().code(), Some(1));
    let output = stage.host.output("out");
    assert!(output.contains("Read-only file system") && output.contains(CONFLIST), "{output}");
    assert!(!output.contains("Successfully"), "{output}");
}

#[test]
fn twenty_starts_at_once_leave_whole_files() {
    let _crowd = CROWD.write().unwrap_or_else(PoisonError::into_inner);
    let stage = Stage::unguarded(8);
    let going = AtomicBool::new(true);
    let program = fs::read(PROGRAM).unwrap();
    let (looks, floor) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let (mut looks, mut floor) = (0, false);
            while going.load(Ordering::Relaxed) {
                // Whatever is there is whole and may be run, at every moment.
                if let Ok(file) = fs::metadata(stage.host.path("bin/aws-cni")) {
                    assert_eq!((file.len(), file.mode() & 0o7777), (program.len() as u64, 0o755));
                    looks += 1;
                }
                if let Ok(text) = fs::read_to_string(stage.host.conflist()) {
                    let low = text == golden("v4");
                    assert!(low || text == golden("v4-newest"), "{text}");
                    floor |= low;
                }
                std::thread::sleep(LOOK_EVERY);
            }
            (looks, floor)
        });
        let mut containers: Vec<Container> = (0..20).map(|_| stage.start(&[], "out")).collect();
        eventually("one of them has installed", || {
            stage.host.output("out").contains("Successfully copied").then_some(())
        });
        for container in &mut containers {
            sys::signal(container.0.id(), libc::SIGTERM).ok(); // those that found the ports taken have ended
        }
        for container in &mut containers {
            container.wait();
        }
        going.store(false, Ordering::Relaxed);
        watcher.join().unwrap()
    });
    println!("{looks} looks at the plugin meanwhile");
    // Of the versions alone that need nobody's word, if among so many the other plugin has not got its say in time.
    let told = stage.host.output("out");
    assert!(!floor || told.contains("no answer within"), "{told}");
    // One that was killed while it wrote has left a temporary, which is for the next start to sweep.
    let mut next = stage.start(&[], "next");
    stage.wait_installed(&mut next, "next");
    next.stop();
    assert!(fs::read(stage.host.path("bin/egress-cni")).unwrap() == program);
    assert_eq!(stage.host.names("net.d"), BTreeSet::from([CONFLIST.to_owned()]));
    let names = ["aws-cni", "egress-cni", "egress-v4-cni", "portmap"].map(str::to_owned);
    assert_eq!(stage.host.names("bin"), BTreeSet::from(names));
}

/// One mistake: what is set, and what is said of it.
type Mistake = (&'static [(&'static str, &'static str)], &'static str);

const MISTAKES: &[Mistake] = &[
    (&[("AWS_VPC_K8S_PLUGIN_LOG_FILE", "StdOut")], "AWS_VPC_K8S_PLUGIN_LOG_FILE cannot be stdout"),
    (&[("AWS_VPC_K8S_EGRESS_V4_PLUGIN_LOG_FILE", "stdout")], "AWS_VPC_K8S_EGRESS_V4_PLUGIN_LOG_FILE cannot be stdout"),
    (&[("AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE", "STDOUT")], "AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE cannot be stdout"),
    (&[("AWS_VPC_K8S_CNI_VETHPREFIX", "eniXX")], "AWS_VPC_K8S_CNI_VETHPREFIX=\"eniXX\" must have at most 4 bytes"),
    (
        &[("ENABLE_POD_ENI", "true"), ("POD_SECURITY_GROUP_ENFORCING_MODE", "Strict")],
        "POD_SECURITY_GROUP_ENFORCING_MODE=\"Strict\" is not strict or standard",
    ),
    (&[("IP_COOLDOWN_PERIOD", "-1")], "IP_COOLDOWN_PERIOD=\"-1\": is not an integer from 0"),
    (&[("AWS_VPC_ENI_MTU", "9002")], "AWS_VPC_ENI_MTU=\"9002\": is not an integer from 576 to 9001"),
    (&[("POD_MTU", "")], "POD_MTU=\"\": is not an integer from 576 to 9001"),
    (&[("ENABLE_PREFIX_DELEGATION", "true")], "ENABLE_PREFIX_DELEGATION needs WARM_IP_TARGET"),
    (&[("NETWORK_POLICY_ENFORCING_MODE", "on")], "NETWORK_POLICY_ENFORCING_MODE=\"on\" is not none"),
    (&[("ENABLE_IPv4", "false")], "one of ENABLE_IPv4 and ENABLE_IPv6 must be true"),
    (&[("ENIBOX_CNI_VERSION", "2.0.0")], "ENIBOX_CNI_VERSION=\"2.0.0\" is not auto"),
    (&[("HOST_CNI_CONFDIR_PATH", "/nonexistent")], "HOST_CNI_CONFDIR_PATH=/nonexistent is not a folder"),
];

/// Mistakes that exclude one of the others.
const FURTHER: &[Mistake] = &[
    (&[("AWS_VPC_K8S_CNI_VETHPREFIX", "vlan")], "AWS_VPC_K8S_CNI_VETHPREFIX=\"vlan\""),
    (&[("IP_COOLDOWN_PERIOD", "soon")], "IP_COOLDOWN_PERIOD=\"soon\""),
    (&[("AWS_VPC_ENI_MTU", "1500.5")], "AWS_VPC_ENI_MTU=\"1500.5\""),
    (&[("POD_MTU", "575")], "POD_MTU=\"575\""),
    (
        &[("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true"), ("POD_MTU", "1279")],
        "POD_MTU=1279 is less than 1280",
    ),
    (&[("ENABLE_IPv4", "true"), ("ENABLE_IPv6", "true")], "ENABLE_IPv4 and ENABLE_IPv6 exclude each other"),
    (&[("ENABLE_IPv6", "true")], "ENABLE_IPv6 needs ENABLE_PREFIX_DELEGATION"),
    (&[("HOST_CNI_BIN_PATH", "/nonexistent")], "HOST_CNI_BIN_PATH=/nonexistent is not a folder"),
];

/// Starts with these variables, which must end it at once with nothing installed; what it says.
#[track_caller]
fn refused(host: &Host, env: &[(&str, &str)]) -> String {
    fs::write(host.path("out"), "").unwrap();
    let mut child = in_fresh_netns(|| host.start("aws-vpc-cni", &mut Command::new("/bin/sh"), env, "out"));
    assert_eq!(child.wait().unwrap().code(), Some(1), "{env:?}: {}", host.output("out"));
    assert_eq!(host.names("bin"), BTreeSet::from(["portmap".to_owned()]), "{env:?}");
    assert_eq!(host.names("net.d"), BTreeSet::new(), "{env:?}");
    host.output("out")
}

fn errors(output: &str) -> usize {
    output.lines().filter(|line| line.contains(" level=error ")).count()
}

#[test]
fn every_mistake_is_told_before_anything_is_installed() {
    let host = Host::new();
    for (env, text) in MISTAKES.iter().chain(FURTHER) {
        let output = refused(&host, env);
        let escaped = text.replace('"', "\\\"");
        assert!(output.contains(&escaped) && errors(&output) == 1, "{env:?}: {output}");
    }
    let all: Vec<(&str, &str)> = MISTAKES.iter().flat_map(|(env, _)| env.iter().copied()).collect();
    fs::write(host.path("app").join(CONFLIST), "{\n\"name\": \"n\",\n\"plugins\": [}").unwrap();
    let output = refused(&host, &all);
    for (_, text) in MISTAKES {
        assert!(output.contains(&text.replace('"', "\\\"")), "{text}: {output}");
    }
    assert!(output.contains("10-aws.conflist: expected value at line 3 column 13"), "{output}");
    assert_eq!(errors(&output), MISTAKES.len() + 1, "{output}");
}
