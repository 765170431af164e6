//! A real runtime: containerd and runc start containers whose network comes from a conflist, as on a node.
//!
//! containerd runs on sockets and folders of its own, in a mount namespace of its own, because `ctr run --cni` has fixed
//! paths (`/etc/cni/net.d`, `/opt/cni/bin`); the machine's own are never touched. The same scenario is run with the
//! reference plugin `ptp`: when both fail, it is the machine that cannot run containers.

#![cfg(feature = "sandbox")]

use enibox::model::naming::DAEMON_SOCKET;
use enibox::sandbox::topology::{EC2, IMDS};
use enibox::sandbox::world::{Plan, World};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
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
const PTP: &str =
    r#"{"type":"ptp","ipam":{"type":"host-local","subnet":"10.77.0.0/24","routes":[{"dst":"0.0.0.0/0"}]}}"#;

#[test]
fn the_reference_plugin_passes() {
    in_private_mounts("the_reference_plugin_passes", |dir| {
        scenario(dir, &PlainNode::start().bed);
    });
}

#[test]
fn the_plugin_and_the_daemon_pass() {
    in_private_mounts("the_plugin_and_the_daemon_pass", |dir| {
        install_plugin();
        let node = SandboxNode::start(dir);
        scenario(dir, &node.bed);
        node.stop();
    });
}

/// The first entry of the list as the installer writes it.
const PLUGIN: &str = r#"{"type":"aws-cni","vethPrefix":"eni","mtu":"9001","podSGEnforcingMode":"strict","pluginLogFile":"/var/log/aws-routed-eni/plugin.log","pluginLogLevel":"DEBUG"}"#;

/// A kubelet's runtime tells the pod's name in CNI_ARGS, `ctr` tells none; so the container's stands for it.
fn install_plugin() {
    fs::create_dir("/opt/enibox").unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_enibox"), "/opt/enibox/aws-cni").unwrap();
    let wrapper = "#!/bin/sh\n\
        export CNI_ARGS=\"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=$CNI_CONTAINERID\"\n\
        exec /opt/enibox/aws-cni\n";
    fs::write("/opt/cni/bin/aws-cni", wrapper).unwrap();
    fs::set_permissions("/opt/cni/bin/aws-cni", fs::Permissions::from_mode(0o755)).unwrap();
}

/// A node, a neighbour that calls it, and what stands before `portmap` in the list.
struct Bed {
    /// Words before a command that is to run on the node.
    node: String,
    /// Words before a command that is to run on the neighbour.
    outside: String,
    /// The node's address as seen from there.
    address: String,
    /// How the addresses of its pods start.
    pods: &'static str,
    /// First plugin of the conflist, as JSON.
    plugin: &'static str,
}

/// Two namespaces joined by a veth.
struct PlainNode {
    names: [String; 2],
    bed: Bed,
}

impl PlainNode {
    fn start() -> PlainNode {
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
        PlainNode { bed: Bed { node, outside, address: "10.78.0.1".into(), pods: "10.77.0.", plugin: PTP }, names }
    }
}

impl Drop for PlainNode {
    fn drop(&mut self) {
        for name in &self.names {
            _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

/// A node of the sandbox, with our daemon on it.
struct SandboxNode {
    bed: Bed,
    daemon: Child,
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
        let mut command = topology.node(&node.instance).unwrap().command(env!("CARGO_BIN_EXE_enibox")).unwrap();
        let log = fs::File::create(dir.join("daemon.log")).unwrap();
        command.arg0("aws-k8s-agent").env_clear().stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command.envs([
            ("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}")),
            ("AWS_EC2_ENDPOINT", format!("http://{EC2}")),
            ("MY_NODE_NAME", node.name.clone()),
            // No second ENI: it would come while the state of the network is being compared.
            ("WARM_IP_TARGET", "2".into()),
            ("AWS_VPC_K8S_CNI_LOG_FILE", "stderr".into()),
        ]);
        let daemon = command.spawn().unwrap();
        drop(topology);
        let place = |kind: &str, name: &str| names.join(kind).join(name).display().to_string();
        let (net, mnt) = (place("netns", &node.name), place("mnt", &node.name));
        let bed = Bed {
            node: format!("nsenter --net={net} --mount={mnt}"),
            outside: format!("nsenter --net={}", place("netns", "vpc-host")),
            address: node.address.to_string(),
            pods: "10.20.",
            plugin: PLUGIN,
        };
        until("the daemon serves", || try_run(&format!("{} test -S {DAEMON_SOCKET}", bed.node)));
        SandboxNode { bed, daemon, _world: world }
    }

    /// Ends the daemon as a kubelet does.
    fn stop(mut self) {
        enibox::sys::signal(self.daemon.id(), TERMINATE).unwrap();
        let status = self.daemon.wait().unwrap();
        assert!(status.success(), "the daemon ends with {status}");
    }
}

impl Drop for SandboxNode {
    fn drop(&mut self) {
        // Both fail when it has ended.
        _ = self.daemon.kill();
        _ = self.daemon.wait();
    }
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
        if state.contains(" veth") || state.contains(" eni") || state.contains("tentative") {
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

    containerd.remove(client);
    containerd.remove(server);
    until("nothing of two containers is left", || {
        let after = containerd.network_state();
        let is_new = |line: &&str| !before.lines().any(|old| old == *line);
        let left: Vec<&str> = after.lines().filter(is_new).collect();
        if after == before { Ok(after) } else { Err(format!("left: {left:#?} of {after}")) }
    });
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

    /// The list as on a node: our plugin, then portmap. `ctr` has no option for ports, so the mapping that a runtime would
    /// put into portmap's configuration stands there from the start.
    fn write_conflist(&self, with_port: bool) {
        let (inside, outside) = PORTS;
        let mapping = format!(r#"{{"hostPort":{outside},"containerPort":{inside},"protocol":"tcp"}}"#);
        let mappings = if with_port { mapping } else { String::new() };
        let list = format!(
            r#"{{"cniVersion":"0.4.0","name":"aws-cni","disableCheck":true,"plugins":[{},{{"type":"portmap","capabilities":{{"portMappings":true}},"snat":true,"runtimeConfig":{{"portMappings":[{mappings}]}}}}]}}"#,
            self.bed.plugin
        );
        fs::write("/etc/cni/net.d/10-aws.conflist", list).unwrap();
    }

    fn create(&self, name: &'static str, command: &str, with_port: bool) -> Container {
        self.write_conflist(with_port); // read once, by the `ctr run` below
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
        for plugin in ["host-local", "ptp", "portmap", "loopback"] {
            fs::copy(Path::new(PLUGINS).join(plugin), Path::new("/opt/cni/bin").join(plugin)).unwrap();
        }
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
