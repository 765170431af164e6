//! A real runtime: containerd and runc start containers whose network comes from a conflist, as on a node. What they need is
//! installed on an empty one by the init container's and the node container's programs, with the reference plugins.
//!
//! containerd runs on sockets and folders of its own, in a mount namespace of its own, because `ctr run --cni` has fixed
//! paths (`/etc/cni/net.d`, `/opt/cni/bin`); the machine's own are never touched. The same scenario is run with the
//! reference plugin `ptp`: when both fail, it is the machine that cannot run containers.

#![cfg(feature = "sandbox")]

use enibox::sandbox::topology::{EC2, IMDS, Node};
use enibox::sandbox::world::{Plan, World};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Set in the copy of this test that runs inside the private mount namespace.
const INSIDE: &str = "ENIBOX_TEST_PRIVATE_MOUNTS";
/// What the scenario cannot do without: program and Debian package.
const NEEDS: &[(&str, &str)] = &[
    ("containerd", "containerd"),
    ("ctr", "containerd"),
    ("runc", "runc"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("unshare", "util-linux"),
];
/// Where Debian puts the reference plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// No command of the scenario takes longer on a loaded machine.
const COMMAND_S_MAX: u32 = 60;

/// containerd's namespace, and the name of the cgroup above all containers of it. Each test is a process of its own and has
/// one of its own: whoever ends first removes it.
fn namespace() -> String {
    format!("enibox-test-{}", std::process::id())
}

/// SIGTERM.
const TERMINATE: i32 = 15;

/// Port in the container and on the host.
const PORTS: (u16, u16) = (8080, 18080);

/// The reference plugin that wires a pod up with a veth and a route, with addresses of a range of its own.
const PTP: &str = r#"{"cniVersion":"0.4.0","name":"aws-cni","disableCheck":true,"plugins":[
    {"type":"ptp","ipam":{"type":"host-local","subnet":"10.77.0.0/24","routes":[{"dst":"0.0.0.0/0"}]}},
    {"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}"#;

/// Where a runtime looks for the list and the plugins.
const LISTS: &str = "/etc/cni/net.d";
const LIST: &str = "/etc/cni/net.d/10-aws.conflist";
const BIN: &str = "/opt/cni/bin";

/// What the limited container may receive and send, in bits per second, and at once, in bits.
const RATE: u64 = 8_000_000;
const BURST: u64 = 800_000;

#[test]
fn the_reference_plugin_passes() {
    in_private_mounts("the_reference_plugin_passes", |dir| {
        scenario(dir, &PlainNode::start().bed);
    });
}

#[test]
fn a_node_passes_that_was_installed_from_nothing() {
    in_private_mounts("a_node_passes_that_was_installed_from_nothing", |dir| {
        assert_eq!([names(LISTS), names(BIN)].concat(), Vec::<String>::new(), "the node is empty");
        let node = SandboxNode::start(dir);
        scenario(dir, &node.bed);
        node.stop();
    });
}

fn names(folder: &str) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The working directory of a container: the program under its name there, and what the image has besides.
fn image(dir: &Path, program: &str, plugins: &[&str]) -> PathBuf {
    let image = dir.join(program);
    fs::create_dir(&image).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_enibox"), image.join(program)).unwrap();
    for plugin in plugins {
        fs::copy(Path::new(PLUGINS).join(plugin), image.join(plugin)).unwrap();
    }
    image
}

/// A kubelet's runtime tells the pod's name in CNI_ARGS, `ctr` tells none; so the container's stands for it.
fn name_pods_by_containers(list: &mut Value) {
    let named = Path::new(BIN).join("aws-cni-with-a-name");
    let wrapper = "#!/bin/sh\n\
        export CNI_ARGS=\"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=$CNI_CONTAINERID\"\n\
        exec /opt/cni/bin/aws-cni\n";
    fs::write(&named, wrapper).unwrap();
    fs::set_permissions(&named, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(list["plugins"][0]["type"], "aws-cni");
    list["plugins"][0]["type"] = named.file_name().unwrap().to_str().into();
}

/// A node, a neighbour that calls it, and the list of plugins.
struct Bed {
    /// Words before a command that is to run on the node.
    node: String,
    /// Words before a command that is to run on the neighbour.
    outside: String,
    /// The node's address as seen from there.
    address: String,
    /// How the addresses of its pods start.
    pods: &'static str,
    /// The conflist as it was installed.
    list: Value,
}

/// Two namespaces joined by a veth.
struct PlainNode {
    names: [String; 2],
    bed: Bed,
}

impl PlainNode {
    fn start() -> PlainNode {
        for plugin in ["host-local", "ptp", "portmap", "loopback"] {
            fs::copy(Path::new(PLUGINS).join(plugin), Path::new(BIN).join(plugin)).unwrap();
        }
        let names = ["node", "out"].map(|what| format!("ctd-{what}-{}", std::process::id()));
        let [node, outside] = &names;
        run(&format!("ip netns add {node}"));
        run(&format!("ip netns add {outside}"));
        run(&format!("ip -n {node} link add name up0 type veth peer name up0 netns {outside}"));
        run(&format!("ip -n {node} addr add 10.78.0.1/24 dev up0"));
        run(&format!("ip -n {outside} addr add 10.78.0.2/24 dev up0"));
        for namespace in &names {
            run(&format!("ip -n {namespace} link set lo up"));
            run(&format!("ip -n {namespace} link set up0 up"));
        }
        run(&format!("ip netns exec {node} sysctl -q -w net.ipv4.ip_forward=1"));
        let [node, outside] = [node, outside].map(|name| format!("nsenter --net=/run/netns/{name}"));
        let list = serde_json::from_str(PTP).unwrap();
        PlainNode { bed: Bed { node, outside, address: "10.78.0.1".into(), pods: "10.77.0.", list }, names }
    }
}

impl Drop for PlainNode {
    fn drop(&mut self) {
        for name in &self.names {
            _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

/// A node of the sandbox that our two containers have installed, the second of which runs on.
struct SandboxNode {
    bed: Bed,
    container: Child,
    /// Last, because the daemon needs it.
    _world: World,
}

impl SandboxNode {
    fn start(dir: &Path) -> SandboxNode {
        let home = dir.join("sandbox");
        let plan = Plan { nodes: 1, instance_type: "m5.large", seed: 1, home: &home };
        let world = World::create(&plan).unwrap();
        let node = &world.nodes[0];
        let topology = world.topology();
        let names = topology.run().path().to_owned();
        let place = |kind: &str, name: &str| names.join(kind).join(name).display().to_string();
        let (net, mnt) = (place("netns", &node.name), place("mnt", &node.name));
        let words = format!("nsenter --net={net} --mount={mnt}");
        let inside = topology.node(&node.instance).unwrap().clone();
        drop(topology);
        let settings = settings(dir, &node.name);
        run(&format!("{words} sysctl -q -w net.ipv4.conf.eth0.rp_filter=1"));
        let plugins = ["loopback", "portmap", "bandwidth", "tuning"];
        let mut init = start(&inside, &image(dir, "aws-vpc-cni-init", &plugins), &settings, dir);
        assert!(init.wait().unwrap().success(), "init: {}", said(dir));
        assert_eq!(run(&format!("{words} sysctl -n net.ipv4.conf.eth0.rp_filter")).trim(), "2");
        let theirs: Vec<String> = names_of_plugins();
        assert_eq!(theirs, ["bandwidth", "loopback", "portmap", "tuning"]);
        let mut container = start(&inside, &image(dir, "aws-vpc-cni", &[]), &settings, dir);
        until("the configuration is written", || match (container.try_wait(), fs::read_to_string(LIST)) {
            (Ok(None), list) => list.map_err(|error| format!("{error}: {}", said(dir))),
            ended => panic!("the node's container: {ended:?}: {}", said(dir)),
        });
        assert_eq!(
            names_of_plugins(),
            ["aws-cni", "bandwidth", "egress-cni", "egress-v4-cni", "loopback", "portmap", "tuning"]
        );
        let mut list: Value = serde_json::from_slice(&fs::read(LIST).unwrap()).unwrap();
        let types: Vec<_> = list["plugins"].as_array().unwrap().iter().map(|plugin| plugin["type"].clone()).collect();
        assert_eq!(types, ["aws-cni", "egress-cni", "portmap", "bandwidth", "tuning"]);
        name_pods_by_containers(&mut list);
        let (outside, address) = (format!("nsenter --net={}", place("netns", "vpc-host")), node.address.to_string());
        let bed = Bed { node: words, outside, address, pods: "10.20.", list };
        SandboxNode { bed, container, _world: world }
    }

    /// Ends the daemon as a kubelet does.
    fn stop(mut self) {
        enibox::sys::signal(self.container.id(), TERMINATE).unwrap();
        let status = self.container.wait().unwrap();
        assert!(status.success(), "the node's container ends with {status}");
    }
}

impl Drop for SandboxNode {
    fn drop(&mut self) {
        // Both fail when it has ended.
        _ = self.container.kill();
        _ = self.container.wait();
    }
}

/// What the manifest sets.
fn settings(dir: &Path, node: &str) -> Vec<(&'static str, String)> {
    vec![
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin".into()),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}")),
        ("AWS_EC2_ENDPOINT", format!("http://{EC2}")),
        ("MY_NODE_NAME", node.to_owned()),
        ("HOST_CNI_BIN_PATH", BIN.into()),
        ("HOST_CNI_CONFDIR_PATH", LISTS.into()),
        ("ENABLE_BANDWIDTH_PLUGIN", "true".into()),
        ("DISABLE_POD_V6", "true".into()),
        // No second ENI: it would come while the state of the network is being compared.
        ("WARM_IP_TARGET", "2".into()),
        ("AWS_VPC_K8S_CNI_LOG_FILE", "stderr".into()),
        ("ENIBOX_SETTINGS_FILE", dir.join("settings.env").display().to_string()),
    ]
}

/// Starts a container's program on the node, in its working directory; entering the node's files leads to their root first.
fn start(node: &Node, image: &Path, settings: &[(&str, String)], dir: &Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(dir.join("daemon.log")).unwrap();
    let program = image.file_name().unwrap().to_str().unwrap();
    let mut command = node.command("/bin/sh").unwrap();
    command.args(["-c", &format!("cd \"$0\" && exec ./{program}")]).arg(image).env_clear().stdin(Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log);
    command.envs(settings.iter().map(|(name, value)| (name, value))).spawn().unwrap()
}

fn said(dir: &Path) -> String {
    fs::read_to_string(dir.join("daemon.log")).unwrap_or_default()
}

fn names_of_plugins() -> Vec<String> {
    names(BIN).into_iter().filter(|name| !name.starts_with('.')).collect()
}

/// Two containers find each other, a mapped port is reached from outside, and nothing is left when they are gone.
fn scenario(dir: &Path, bed: &Bed) {
    let containerd = Containerd::start(dir, bed);
    // portmap leaves its empty chains for the next container, as it should: they belong to the state before.
    let first = containerd.create("first", "/bin/sleep 1000", true);
    containerd.remove(first);
    // A dead container's links go with its namespace, which the kernel clears in its own time.
    until("the first container's links are gone", || {
        let state = containerd.network_state();
        if state.contains(" veth") || state.contains(" eni") || state.contains(" bwp") || state.contains("tentative") {
            Err(state)
        } else {
            Ok(state)
        }
    });
    let before = containerd.network_state();

    let serve = format!("/bin/sh -c 'while true; do echo served | nc -l -p {}; done'", PORTS.0);
    let server = containerd.create("server", &serve, true);
    let client = containerd.create("client", "/bin/sleep 1000", false);
    assert_ne!(server.address, client.address, "two containers share an address");
    assert!(server.address.starts_with(bed.pods), "{} is not of {}", server.address, bed.pods);
    assert_ne!(containerd.network_state(), before, "containers do not show in the state, so leaks would not either");

    let call = format!("nc -w 2 {} {}", server.address, PORTS.0);
    expect_served("container to container", || containerd.exec("client", &call));
    let (address, port) = (&bed.address, PORTS.1);
    expect_served("port of the node", || {
        let call = format!("exec 3<>/dev/tcp/{address}/{port}; timeout 2 cat <&3");
        try_run(&format!("{} timeout 5 bash -c '{call}'", bed.outside))
    });
    for plugin in bed.list["plugins"].as_array().unwrap() {
        match plugin["type"].as_str().unwrap() {
            "bandwidth" => assert_limited(&containerd),
            "tuning" => assert_without_ipv6(&containerd, "server"),
            _ => {}
        }
    }

    containerd.remove(client);
    containerd.remove(server);
    until("nothing of two containers is left", || {
        let after = containerd.network_state();
        let is_new = |line: &&str| !before.lines().any(|old| old == *line);
        let left: Vec<&str> = after.lines().filter(is_new).collect();
        if after == before { Ok(after) } else { Err(format!("left: {left:#?} of {after}")) }
    });
}

/// Both directions of one container, and no other's, have the limit.
fn assert_limited(containerd: &Containerd) {
    let shown = run(&format!("{} tc qdisc show", containerd.bed.node));
    let limits: Vec<_> =
        shown.lines().filter(|line| line.contains("qdisc tbf") && line.contains("rate 8Mbit")).collect();
    let on = |prefix: &str| limits.iter().filter(|line| line.contains(&format!(" dev {prefix}"))).count();
    assert_eq!((limits.len(), on("eni"), on("bwp")), (2, 1, 1), "{shown}");
}

fn assert_without_ipv6(containerd: &Containerd, name: &str) {
    for dev in ["all", "default", "lo", "eth0"] {
        let off = containerd.exec(name, &format!("cat /proc/sys/net/ipv6/conf/{dev}/disable_ipv6"));
        assert_eq!(off.unwrap().trim(), "1", "{dev}");
    }
    assert_eq!(containerd.exec(name, "ip -6 addr").unwrap().trim(), "");
}

/// A container and the `ctr` that waits for it: that process calls DEL, without a namespace, when the container has ended.
struct Container {
    name: &'static str,
    address: String,
    ctr: Child,
}

/// containerd on its own, and `ctr` in the node's network namespace.
struct Containerd<'a> {
    process: Child,
    dir: &'a Path,
    bed: &'a Bed,
}

impl<'a> Containerd<'a> {
    fn start(dir: &'a Path, bed: &'a Bed) -> Self {
        let config = include_str!("containerd/config.toml").replace("@dir@", &dir.display().to_string());
        fs::write(dir.join("config.toml"), config).unwrap();
        let log = fs::File::create(dir.join("containerd.log")).unwrap();
        let process = Command::new("bash")
            .arg("-c")
            .arg(format!("exec {} containerd --config {}", bed.node, dir.join("config.toml").display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let containerd = Containerd { process, dir, bed };
        until("containerd answers", || try_run(&format!("{} version", containerd.ctr())));
        let image = dir.join("image.tar");
        let pack = fixture("image");
        run(&format!("{} {} {}", pack.display(), static_busybox().display(), image.display()));
        run(&format!("{} images import --no-unpack {}", containerd.ctr(), image.display()));
        containerd
    }

    fn ctr(&self) -> String {
        let (node, dir) = (&self.bed.node, self.dir.display());
        format!("{node} ctr -a {dir}/containerd.sock -n {}", namespace())
    }

    /// The list as it was installed. `ctr` has no options for ports and limits, so what a runtime would put into the
    /// plugins' configuration stands there from the start.
    fn write_conflist(&self, wanted: bool) {
        let mut list = self.bed.list.clone();
        for plugin in list["plugins"].as_array_mut().unwrap() {
            let (inside, outside) = PORTS;
            let mapping = json!({"hostPort": outside, "containerPort": inside, "protocol": "tcp"});
            let limits = json!({"ingressRate": RATE, "ingressBurst": BURST, "egressRate": RATE, "egressBurst": BURST});
            match plugin["type"].as_str() {
                Some("portmap") if wanted => plugin["runtimeConfig"] = json!({"portMappings": [mapping]}),
                Some("bandwidth") if wanted => plugin["runtimeConfig"] = json!({"bandwidth": limits}),
                _ => {}
            }
        }
        fs::write(LIST, list.to_string()).unwrap();
    }

    fn create(&self, name: &'static str, command: &str, wanted: bool) -> Container {
        self.write_conflist(wanted); // read once, by the `ctr run` below
        let ctr = self.ctr();
        // The native snapshotter needs nothing of the file system below it.
        let run = format!("exec {ctr} run --rm --cni --snapshotter native enibox.test/busybox:1 {name} {command}");
        let log = fs::File::create(self.dir.join(format!("{name}.log"))).unwrap();
        let mut child = Command::new("bash")
            .args(["-c", &run])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        until("the container runs", || match child.try_wait() {
            Ok(None) => self.task_is_running(name),
            ended => panic!("ctr run {name}: {ended:?}: {}", self.log(name)),
        });
        Container { name, address: self.address(name), ctr: child }
    }

    fn task_is_running(&self, name: &str) -> Result<String, String> {
        let tasks = try_run(&format!("{} tasks ls", self.ctr()))?;
        let running = tasks.lines().any(|line| line.starts_with(name) && line.contains("RUNNING"));
        if running { Ok(tasks) } else { Err(tasks) }
    }

    fn remove(&self, mut container: Container) {
        let name = container.name;
        run(&format!("{} tasks kill --signal KILL {name}", self.ctr()));
        let mut status = None;
        until("ctr run ends", || {
            status = container.ctr.try_wait().map_err(|error| error.to_string())?;
            status.map(|_| String::new()).ok_or_else(|| "it still runs".into())
        });
        // It ends with the code of the killed process. A failed DEL would be told on a line of its own.
        let (code, log) = (status.and_then(|status| status.code()), self.log(name));
        assert!(code == Some(137) && log.trim().is_empty(), "ctr run {name} ended with {code:?}: {log}");
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default()
    }

    fn exec(&self, name: &str, command: &str) -> Result<String, String> {
        let id = format!("exec-{}", uniquely());
        try_run(&format!("{} tasks exec --exec-id {id} {name} {command}", self.ctr()))
    }

    fn address(&self, name: &str) -> String {
        let shown = self.exec(name, "ip -o -4 addr show dev eth0").unwrap_or_else(|what| panic!("{what}"));
        let cidr = shown.split_whitespace().skip_while(|word| *word != "inet").nth(1).unwrap_or_default();
        let address = cidr.split('/').next().unwrap_or_default();
        assert!(address.parse::<std::net::Ipv4Addr>().is_ok(), "{name} has no address: {shown:?}");
        address.to_owned()
    }

    /// Everything that a pod could leave behind in the node's network, as text.
    fn network_state(&self) -> String {
        let mut state = String::new();
        for command in [
            "ip -o link show",
            "ip -o addr show",
            "ip -4 rule show",
            "ip -6 rule show",
            "ip -4 route show table all",
            "ip -4 neigh show nud permanent",
            "nft --stateless list ruleset",
            "tc qdisc show",
        ] {
            let shown = run(&format!("{} {command}", self.bed.node));
            _ = writeln!(state, "# {command}\n{shown}");
        }
        state
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
            eprintln!("--- network\n{}", self.network_state());
            eprintln!("--- plugin\n{}", text(Path::new("/var/log/aws-routed-eni/plugin.log")));
            eprintln!("--- daemon\n{}", text(&self.dir.join("daemon.log")));
            eprintln!("--- containerd\n{}", fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default());
            let ctr = self.ctr();
            let names = try_run(&format!("{ctr} tasks ls -q")).unwrap_or_default();
            for name in names.lines() {
                _ = try_run(&format!("{ctr} tasks rm --force {name}"));
            }
        }
        _ = Command::new("kill").arg(self.process.id().to_string()).status();
        _ = self.process.wait();
        // runc removes a container's cgroup and leaves the one above it, in each hierarchy of version 1 or at the root of 2.
        let top = Path::new("/sys/fs/cgroup");
        let below = fs::read_dir(top).into_iter().flatten().flatten().map(|entry| entry.path());
        for hierarchy in below.chain([top.to_owned()]) {
            _ = fs::remove_dir(hierarchy.join(namespace()));
        }
    }
}

fn expect_served(what: &str, call: impl Fn() -> Result<String, String>) {
    until(what, || call().and_then(|text| if text.trim() == "served" { Ok(text) } else { Err(text) }));
}

/// Runs `work` in a copy of this process that has a mount namespace of its own; `work` gets a folder that goes with it.
fn in_private_mounts(test: &str, work: impl FnOnce(&Path)) {
    if let Some(dir) = std::env::var_os(INSIDE) {
        let dir = PathBuf::from(dir);
        run(&format!("{} {}", fixture("private-mounts").display(), dir.display()));
        work(&dir);
        return;
    }
    if let Some(missing) = missing() {
        assert!(std::env::var_os("CI").is_none(), "{missing}");
        // Straight to the descriptor: a captured line would be a silent skip.
        _ = std::io::Write::write_all(&mut std::io::stderr(), format!("SKIPPED {test}: {missing}\n").as_bytes());
        return;
    }
    let dir = std::env::temp_dir().join(format!("enibox-ctd-{}-{}", std::process::id(), uniquely()));
    fs::create_dir(&dir).unwrap();
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, &dir)
        .stdin(Stdio::null())
        .output();
    _ = fs::remove_dir(&dir); // empty: the tmpfs on it went with the namespace
    let output = output.unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{}: {}", output.status, said.concat());
}

fn missing() -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |program: &str| std::env::split_paths(&path).any(|folder| executable(&folder.join(program)));
    if let Some((program, package)) = NEEDS.iter().find(|(program, _)| !found(program)) {
        return Some(format!("{program} is not installed (Debian package {package})"));
    }
    if !executable(&Path::new(PLUGINS).join("portmap")) {
        return Some(format!("{PLUGINS}/portmap is not installed (Debian package containernetworking-plugins)"));
    }
    if let Err(why) = try_run("unshare --net ip link add ifb9 type ifb") {
        return Some(format!("this kernel has no links of type ifb, which the plugin bandwidth needs: {why}"));
    }
    (!executable(&static_busybox())).then(|| "a static busybox is not installed (Debian package busybox-static)".into())
}

fn executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn static_busybox() -> PathBuf {
    let places = ["/usr/bin/busybox", "/bin/busybox"].map(PathBuf::from);
    places.into_iter().find(|place| executable(place)).unwrap_or_default()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/containerd").join(name)
}

fn uniquely() -> usize {
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// Runs a shell command within its time limit; standard output, or everything it said.
fn try_run(command: &str) -> Result<String, String> {
    let output = Command::new("timeout")
        .args(["--kill-after=5", &COMMAND_S_MAX.to_string(), "bash", "-c", command])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{command}: {error}"))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        Ok(out.into_owned())
    } else {
        Err(format!("{command}: {}\n{out}{err}", output.status))
    }
}

#[track_caller]
fn run(command: &str) -> String {
    try_run(command).unwrap_or_else(|what| panic!("{what}"))
}

/// Tries until it works, at most 15 s: what is waited for takes a few milliseconds.
#[track_caller]
fn until(what: &str, mut attempt: impl FnMut() -> Result<String, String>) {
    let start = enibox::clock::instant();
    loop {
        match attempt() {
            Ok(_) => return,
            Err(why) if start.elapsed() > Duration::from_secs(15) => panic!("{what}: {why}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
