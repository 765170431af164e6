//! The product as processes of their own on the nodes of the sandbox: the daemon, and the plugin called as a container
//! runtime calls it. They are started by name and talked to by their protocols; nothing of them is linked in.

use super::topology::{EC2, IMDS, Node, Pod};
use crate::clock;
use crate::error::{Context, Error, List, Result};
use crate::model::net::Family;
use crate::model::settings::Settings;
use crate::netlink::addr;
use crate::plan::egress;
use crate::rpc::grpc::Client;
use crate::rpc::proto::{HealthCheckRequest, HealthCheckResponse};
use crate::sys;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long the daemon may take until it serves.
const READY_TIMEOUT: Duration = Duration::from_mins(1);
/// How long it may take to end: five seconds for calls that run, and the disk.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a call of the plugin may take; the kubelet's own limit is two minutes.
const CNI_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between two looks at something that is on its way.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long the daemon may take to tell of new pods, and how often it is asked.
const KNOWN_TIMEOUT: Duration = Duration::from_secs(10);
const KNOWN_EVERY: Duration = Duration::from_millis(100);
/// Bytes of a result; a real one has under 2 KB.
const RESULT_LIMIT: usize = 64 << 10;
/// Lines of a log that an error shows.
const LOG_LINES: usize = 12;

/// A daemon on a node. Killed when dropped, if it still runs.
#[derive(Debug)]
pub struct Agent {
    name: String,
    child: Child,
    log: PathBuf,
    started: crate::model::time::Mono,
}

impl Agent {
    /// Starts `program` as the daemon of a node; `env` adds to the settings of the sandbox or changes them. It ends with the thread that calls this.
    pub fn start(program: &Path, logs: &Path, node: &Node, env: &[(String, String)]) -> Result<Agent> {
        let name = node.place.name.clone();
        let (log, output) = (logs.join(format!("{name}-ipamd.log")), logs.join(format!("{name}-ipamd.out")));
        let out = File::create(&output).with_context(|| format!("create {}", output.display()))?;
        let mut command = node.command(program)?;
        command.arg0("aws-k8s-agent").env_clear().stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        command.env("AWS_VPC_K8S_CNI_LOGLEVEL", "DEBUG").env("AWS_VPC_K8S_CNI_LOG_FILE", &log);
        surround(&mut command, &name, env);
        let started = clock::now().mono;
        let child = command.spawn().with_context(|| format!("start the daemon on {name}"))?;
        Ok(Agent { name, child, log, started })
    }

    /// Waits until the daemon says that it serves; how long that took since its start. `going` is asked now and then
    /// whether to go on.
    pub fn wait_ready(&mut self, node: &Node, going: &dyn Fn() -> Result<()>) -> Result<Duration> {
        loop {
            if healthy(node) {
                return Ok(clock::now().mono.since(self.started));
            }
            if let Some(status) = self.child.try_wait()? {
                let why = self.last_words().unwrap_or_else(|| format!("{status}\n{}", self.tail()));
                return Err(Error::new(format!("the daemon on {} ended: {why}", self.name)));
            }
            if clock::now().mono.since(self.started) > READY_TIMEOUT {
                let told = self.tail();
                return Err(Error::new(format!("the daemon on {} does not serve within 60 s\n{told}", self.name)));
            }
            going()?;
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    // The error that it ended with, if that was the last that it wrote.
    fn last_words(&self) -> Option<String> {
        let tail = self.tail();
        let last: Value = serde_json::from_str(tail.lines().last()?).ok()?;
        let text = last["msg"].as_str().filter(|_| last["level"] == "error");
        text.map(str::to_owned)
    }

    /// The end of its log.
    pub fn tail(&self) -> String {
        let mut text = fs::read_to_string(self.log.with_extension("out")).unwrap_or_default();
        text.push_str(&fs::read_to_string(&self.log).unwrap_or_default());
        let lines = text.lines().collect::<Vec<_>>();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// Ends it as the kubelet does, and insists that it ends well.
    pub fn stop(mut self) -> Result<()> {
        let what = || format!("stop the daemon on {}", self.name);
        if self.child.try_wait()?.is_none() {
            sys::signal(self.child.id(), libc::SIGTERM).with_context(what)?;
        }
        let deadline = clock::instant() + STOP_TIMEOUT;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if clock::instant() > deadline {
                return Err(Error::new(format!("it does not end within 10 s\n{}", self.tail())).context(what()));
            }
            std::thread::sleep(LOOK_EVERY);
        };
        if status.success() { Ok(()) } else { Err(Error::new(format!("{status}\n{}", self.tail())).context(what())) }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Both fail when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// The settings of the daemon on a node of this name.
fn surround(command: &mut Command, name: &str, env: &[(String, String)]) {
    for (variable, value) in [
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://{IMDS}")),
        ("AWS_EC2_ENDPOINT", format!("http://{EC2}")),
        ("MY_NODE_NAME", name.to_owned()),
        ("CLUSTER_NAME", "enibox-sandbox".into()),
    ] {
        command.env(variable, value);
    }
    command.envs(env.iter().map(|(name, value)| (name, value)));
}

/// What the doctor says of a node whose daemon was started with `env`: a line for each finding that is more than a note.
/// Files of the machine that all this runs on are left out of it.
/// The daemon tells of new pods when it has nothing else to do: until it has told of so many it is asked again.
pub fn doctor(program: &Path, node: &Node, env: &[(String, String)], pods: usize) -> Result<Vec<String>> {
    let name = &node.place.name;
    let what = || format!("ask the doctor on {name}");
    let deadline = clock::instant() + KNOWN_TIMEOUT;
    loop {
        let mut command = node.command(program)?;
        command.args(["doctor", "--json", "--root", "/nonexistent"]).env_clear().stdin(Stdio::null());
        surround(&mut command, name, env);
        let output = command.output().with_context(what)?;
        let document: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
            .with_context(what)?;
        let known = document["pods"].as_u64().unwrap_or(0);
        let blind = (known < pods as u64).then(|| format!("{name}: the doctor knows {known} of {pods} pods"));
        if blind.is_some() && clock::instant() < deadline {
            std::thread::sleep(KNOWN_EVERY);
            continue;
        }
        let findings = document["findings"].as_array().into_iter().flatten();
        let findings = findings.filter(|finding| finding["severity"] != "NOTE");
        let text = |finding: &Value| {
            let words = ["name", "subject", "seen"].map(|word| finding[word].as_str().unwrap_or_default().to_owned());
            format!("{name}: {}", words.join(" "))
        };
        return Ok(findings.map(text).chain(blind).collect());
    }
}

fn healthy(node: &Node) -> bool {
    let ask = || {
        let limit = Duration::from_secs(1);
        let mut client = Client::connect(Path::new(crate::model::naming::DAEMON_SOCKET), limit)?;
        let request = HealthCheckRequest { service: String::new() };
        let reply: HealthCheckResponse = client.call("/grpc.health.v1.Health/Check", &request, limit)?;
        Ok(reply.status == crate::rpc::health::SERVING)
    };
    node.inside(ask).unwrap_or(false)
}

/// A pod that has its network.
#[derive(Debug)]
pub struct WiredPod {
    /// Name in Kubernetes.
    pub name: String,
    /// The namespace.
    pub pod: Pod,
    /// Its address: that of the first interface.
    pub address: IpAddr,
    /// Its address is that of a branch ENI of its own.
    pub branch: bool,
    /// Names and addresses of its further interfaces.
    pub further: Vec<(String, IpAddr)>,
    /// Its address of the other family, if it was chained through `egress-cni`.
    pub egress: Option<IpAddr>,
    /// How long the ADD took, from the start of the process to its end.
    pub add: Duration,
    container: String,
    annotations: Value,
    result: Value,
}

/// The plugin on one node, called with one program.
#[derive(Debug)]
pub struct Runtime<'a> {
    /// The executable; it is called `aws-cni`.
    pub program: &'a Path,
    /// Where logs go.
    pub logs: &'a Path,
    /// The node.
    pub node: &'a Node,
    /// What the installer makes the plugin's configuration of.
    pub settings: &'a Settings,
    /// The node's address of the other family, if pods are chained through `egress-cni`.
    pub egress: Option<IpAddr>,
}

/// Until the daemon has found the trunk ENI of a node it refuses pods that want a branch of it, with these words.
const NO_TRUNK: &str = "has no trunk ENI yet";
/// It looks for one every five seconds.
const TRUNK_MAX: Duration = Duration::from_secs(20);

const CNI_VERSION: &str = "1.0.0";

/// The capability by which a runtime passes a pod's annotations.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// The annotation of a pod that wants an interface on every network card.
pub const EVERY_CARD: (&str, &str) = ("k8s.amazonaws.com/nicConfig", "multi-nic-attachment");

impl Runtime<'_> {
    // The configuration of one plugin as libcni composes it from the conflist.
    fn config(&self, annotations: &Value, previous: Option<&Value>) -> String {
        let log = self.logs.join(format!("{}-plugin.log", self.node.place.name));
        let mut config = json!({
            "cniVersion": CNI_VERSION,
            "name": "aws-cni",
            "type": "aws-cni",
            "vethPrefix": self.settings.veth_prefix,
            "mtu": self.settings.pod_mtu.to_string(),
            "podSGEnforcingMode": self.settings.pod_security_group_mode,
            "pluginLogFile": log,
            "pluginLogLevel": "DEBUG",
            "capabilities": {ANNOTATIONS: true},
            "runtimeConfig": {ANNOTATIONS: annotations},
        });
        if let (Some(previous), Some(map)) = (previous, config.as_object_mut()) {
            map.insert("prevResult".into(), previous.clone());
        }
        config.to_string()
    }

    // The second plugin of the conflist.
    fn egress_config(&self, node_ip: IpAddr, previous: &Value) -> String {
        let family = Family::of(node_ip);
        let all = if family == Family::V4 { "0.0.0.0/0" } else { "::/0" };
        let log = self.logs.join(format!("{}-egress.log", self.node.place.name));
        let config = json!({
            "cniVersion": CNI_VERSION,
            "name": "aws-cni",
            "type": "egress-cni",
            "enabled": "true",
            "mtu": self.settings.pod_mtu.to_string(),
            "nodeIP": node_ip,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": egress::range(family)}]], "routes": [{"dst": all}],
                     "dataDir": egress::data_dir(family)},
            "pluginLogFile": log,
            "pluginLogLevel": "DEBUG",
            "prevResult": previous,
        });
        config.to_string()
    }

    // Chains an added pod through `egress-cni`; its address there.
    fn add_egress(&self, wired: &mut WiredPod, node_ip: IpAddr) -> Result<()> {
        let config = self.egress_config(node_ip, &wired.result);
        let (output, _) = self.call("ADD", "egress-cni", &wired.pod, &wired.name, &wired.container, &config)?;
        wired.result = serde_json::from_str(&output).with_context(|| format!("egress result of {}", wired.name))?;
        let range = egress::range(Family::of(node_ip));
        let addresses = addr::list(&mut wired.pod.place.socket()?, Some(Family::of(node_ip)))?;
        wired.egress = addresses.iter().map(|address| address.addr.addr()).find(|address| range.contains(address));
        Ok(())
    }

    fn call(
        &self,
        verb: &str,
        plugin: &str,
        pod: &Pod,
        name: &str,
        container: &str,
        config: &str,
    ) -> Result<(String, Duration)> {
        let what = || format!("{plugin}: {verb} of {}/{name}", self.node.place.name);
        let mut command = self.node.command(self.program)?;
        command.arg0(plugin).env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={container};\
             K8S_POD_UID={name}-uid",
            self.node.place.name, // so that pods of one name are several
        );
        let netns = pod.path.display().to_string();
        for (variable, value) in [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", container),
            ("CNI_NETNS", &netns),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
            ("CNI_ARGS", &args),
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ] {
            command.env(variable, value);
        }
        let begin = clock::now().mono;
        let mut child = command.spawn().with_context(what)?;
        let output = converse(&mut child, config).with_context(what);
        if output.is_err() {
            // It may hang; its end is certain then.
            let _ = child.kill();
        }
        let status = child.wait().with_context(what)?;
        let took = clock::now().mono.since(begin);
        match output? {
            output if status.success() => Ok((output, took)),
            output => Err(Error::new(format!("{status}: {}", output.trim())).context(what())),
        }
    }

    /// Makes a pod and adds it to the network.
    pub fn add(&self, name: &str, annotations: &[(&str, &str)]) -> Result<WiredPod> {
        let mut random = [0; 16];
        sys::random_bytes(&mut random)?;
        let container = format!("{0:032x}{0:032x}", u128::from_be_bytes(random));
        let pod = self.node.create_pod(&format!("cni-{name}"))?;
        let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect::<Value>();
        let config = self.config(&annotations, None);
        let end = clock::instant() + TRUNK_MAX;
        let (output, add) = loop {
            match self.call("ADD", "aws-cni", &pod, name, &container, &config) {
                // As the kubelet does; only this one refusal is to be expected.
                Err(error) if error.to_string().contains(NO_TRUNK) && clock::instant() < end => {
                    std::thread::sleep(LOOK_EVERY);
                }
                result => break result?,
            }
        };
        let what = || format!("result of ADD of {name}");
        let result: Value = serde_json::from_slice(output.as_bytes()).with_context(what)?;
        let mut interfaces = interfaces_of(&result).into_iter();
        let first = interfaces.next().ok_or_else(|| Error::new(format!("no address in {output}")).context(what()))?;
        let (name, further) = (name.to_owned(), interfaces.collect());
        let branch = result["ips"][0]["gateway"].is_string();
        let address = first.1;
        let mut wired =
            WiredPod { name, pod, address, branch, further, egress: None, add, container, annotations, result };
        if let Some(node_ip) = self.egress {
            self.add_egress(&mut wired, node_ip)?;
        }
        Ok(wired)
    }

    /// Takes a pod out of the network, twice (the second time must be as well), and removes it.
    pub fn delete(&self, wired: WiredPod) -> Result<()> {
        let mut chain = vec![("aws-cni", self.config(&wired.annotations, Some(&wired.result)))];
        if let Some(node_ip) = self.egress {
            chain.insert(0, ("egress-cni", self.egress_config(node_ip, &wired.result)));
        }
        let WiredPod { name, pod, container, .. } = wired;
        let mut errors = List::new();
        for (plugin, config) in chain.iter().chain(&chain) {
            errors.note(self.call("DEL", plugin, &pod, &name, &container, config));
        }
        self.node.delete_pod(pod)?;
        errors.into_result()
    }
}

// The pod's interfaces in a result that have addresses.
fn interfaces_of(result: &Value) -> Vec<(String, IpAddr)> {
    let interface = |ip: &Value| {
        let index = usize::try_from(ip["interface"].as_u64()?).ok()?;
        let name = result["interfaces"][index]["name"].as_str()?;
        Some((name.to_owned(), ip["address"].as_str()?.split('/').next()?.parse().ok()?))
    };
    result["ips"].as_array().into_iter().flatten().filter_map(interface).collect()
}

// Writes stdin, reads stdout to its end, which comes with the end of the process.
fn converse(child: &mut Child, input: &str) -> Result<String> {
    let (Some(mut stdin), Some(mut stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(Error::new("no pipes"));
    };
    // A configuration is smaller than a pipe holds, so this does not block. A plugin that ends early shows by its result.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let deadline = clock::instant() + CNI_TIMEOUT;
    let mut output = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(clock::instant());
        if left.is_zero() {
            return Err(Error::new("no end within 30 s"));
        }
        if !sys::poll_readable(&[stdout.as_fd()], left)?.contains(&true) {
            continue;
        }
        match stdout.read(&mut chunk)? {
            0 => return Ok(String::from_utf8_lossy(&output).into_owned()),
            count => output.extend_from_slice(&chunk[..count]),
        }
        if output.len() > RESULT_LIMIT {
            return Err(Error::new("the result is too long"));
        }
    }
}
