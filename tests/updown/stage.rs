//! A node of the sandbox on which either product can run: ours as processes, the original by the test's own hands.

use crate::support::tool_with_input;
use enibox::model::ec2::Interface;
use enibox::netlink::netns::Namespace;
use enibox::sandbox::agents::Agent;
use enibox::sandbox::topology::{Node, Pod};
use enibox::sandbox::world::{HOSTS, Host, Plan, World};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

const PROGRAM: &str = env!("CARGO_BIN_EXE_enibox");
pub const CHECKPOINT: &str = "/var/run/aws-node/ipam.json";
/// Of Kubernetes, for all pods.
pub const NAMESPACE: &str = "default";

/// What differs between a node with IPv4 pods and one with IPv6 pods.
pub struct Family {
    pub v6: bool,
    pub env: &'static [(&'static str, &'static str)],
    /// `ip` for the pods' family and for that of their way out.
    pub ip: [&'static str; 2],
    /// Prefix length of a single address, in the same order.
    pub bits: [u8; 2],
    /// Member of an entry of the checkpoint.
    pub member: &'static str,
    /// Of a pod's main interface.
    pub gateway: &'static str,
    /// `egress-cni`: interface, range, all, directory, range of multicast, start of a chain's name, `iptables`.
    pub inner: &'static str,
    pub range: &'static str,
    pub all: &'static str,
    pub data: &'static str,
    pub multicast: &'static str,
    pub chain: &'static str,
    pub tables: &'static str,
    /// `iptables` for the nodes' IPv4.
    pub nat: &'static str,
}

pub const V4: Family = Family {
    v6: false,
    env: &[("ENABLE_V6_EGRESS", "true")],
    ip: ["ip", "ip -6"],
    bits: [32, 128],
    member: "ipv4",
    gateway: "169.254.1.1",
    inner: "v6if0",
    range: "fd00::ac:00/118",
    all: "::/0",
    data: "/run/cni/v4pd/egress-v6-ipam",
    multicast: "ff00::/8",
    chain: "CNI-E6-",
    tables: "ip6tables-nft-restore",
    nat: "iptables-nft-restore",
};
/// With the backend of the tables of old.
pub const V4_LEGACY: Family = Family { tables: "ip6tables-legacy-restore", nat: "iptables-legacy-restore", ..V4 };
pub const V6: Family = Family {
    v6: true,
    env: &[("ENABLE_IPv6", "true"), ("ENABLE_IPv4", "false"), ("ENABLE_PREFIX_DELEGATION", "true")],
    ip: ["ip -6", "ip"],
    bits: [128, 32],
    member: "ipv6",
    gateway: "fe80::1",
    inner: "v4if0",
    range: "169.254.172.0/22",
    all: "0.0.0.0/0",
    data: "/run/cni/v6pd/egress-v4-ipam",
    multicast: "224.0.0.0/4",
    chain: "CNI-E4-",
    tables: "iptables-nft-restore",
    nat: "iptables-nft-restore",
};

/// A pod that has its network, by whomever.
pub struct Living {
    pub name: String,
    pub container: String,
    pub pod: Pod,
    pub address: IpAddr,
    pub egress: IpAddr,
    /// What the runtime has kept of its ADD.
    pub result: Value,
}

pub struct Stage {
    agent: Option<Agent>,
    pub family: &'static Family,
    pub node: Arc<Node>,
    logs: PathBuf,
    pub world: World,
}

impl Stage {
    /// A node on which nothing runs yet.
    pub fn new(family: &'static Family, seed: u64) -> Stage {
        let home = std::env::temp_dir().join(format!("enibox-updown-{}", std::process::id()));
        let world = World::create(&Plan { nodes: 1, instance_type: "m5.large", seed, home: &home }).unwrap();
        let node = world.node(0).unwrap();
        let settings = enibox::model::settings::Settings::parse(|_| None).0;
        node.prepare(&settings).unwrap();
        let logs = world.topology().run().logs();
        Stage { agent: None, family, node, logs, world }
    }

    pub fn is_legacy(&self) -> bool {
        self.family.nat.contains("legacy")
    }

    /// What the plugins have logged so far.
    pub fn plugin_log(&self) -> String {
        fs::read_to_string(self.logs.join("plugin.log")).unwrap_or_default()
    }

    /// Starts our daemon and waits until it serves. It ends with the calling thread.
    pub fn up(&mut self) {
        assert!(self.agent.is_none(), "one daemon at a time");
        let env: Vec<_> = self.family.env.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let mut agent = Agent::start(Path::new(PROGRAM), &self.logs, &self.node, &env).unwrap();
        agent.wait_ready(&self.node, &|| Ok(())).unwrap();
        self.agent = Some(agent);
    }

    /// SIGTERM; it must end well.
    pub fn down(&mut self) {
        self.agent.take().expect("it runs").stop().unwrap();
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.logs.join(format!("{}-ipamd.log", self.node.place.name))).unwrap_or_default()
    }

    /// What a shell on the node prints.
    #[track_caller]
    pub fn shell(&self, script: &str) -> String {
        let mut command = self.node.command("sh").unwrap();
        let (good, out, errors) = converse(command.arg("-e"), script);
        assert!(good, "{script}\n{errors}");
        out
    }

    /// The same inside a pod, whose files are the test's.
    #[track_caller]
    pub fn shell_in(pod: &Pod, script: &str) {
        let run = || tool_with_input("sh", &["-e"], script);
        pod.place.handle().unwrap().run(run).unwrap();
    }

    /// Runs a program on the node with these variables alone and this input; standard output if it succeeds.
    pub fn run(&self, program: &str, name: &str, env: &[(&str, &str)], input: &str) -> Result<String, String> {
        let mut command = self.node.command(program).unwrap();
        command.arg0(name).env_clear().envs(env.iter().copied()).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let (good, out, errors) = converse(&mut command, input);
        if good { Ok(out) } else { Err(format!("{name}: {out}{errors}")) }
    }

    /// What the step after a roll-back says (`docs/roll-back.md`).
    pub fn clean_up(&self) -> String {
        let mut command = self.node.command(PROGRAM).unwrap();
        let (good, out, errors) = converse(command.args(["cleanup", "--packet-filter", "--apply"]), "");
        assert!(good, "{out}{errors}");
        out + &errors
    }

    /// A file of the node.
    pub fn read(&self, path: &str) -> String {
        self.node.inside(|| Ok(fs::read_to_string(path)?)).unwrap()
    }

    pub fn new_pod(&self, name: &str) -> Pod {
        self.node.create_pod(&format!("cni-{name}")).unwrap()
    }

    /// The node's address of the pods' family, or of the other.
    pub fn own(&self, of_pods: bool) -> IpAddr {
        self.world.nodes[0].at(self.family.v6 == of_pods)
    }

    /// The ENIs that EC2 shows on the node, with device numbers.
    pub fn enis(&self) -> Vec<(u32, Interface)> {
        let vpc = self.world.cloud.vpc();
        let enis = vpc.attached_to(&self.world.nodes[0].instance);
        enis.map(|eni| (eni.attachment.as_ref().unwrap().device, eni.clone())).collect()
    }

    pub fn host(&self, name: &str) -> (Host, Namespace) {
        let host = *HOSTS.iter().find(|host| host.name == name).unwrap();
        (host, self.world.namespace(name).unwrap())
    }

    // The plugins' part of the conflist, as the original's and our entrypoint write it.
    fn config(&self, plugin: &str, previous: Option<&Value>) -> Value {
        let log = self.logs.join("plugin.log");
        let mut config = json!({"cniVersion": "0.4.0", "name": "aws-cni", "type": plugin, "mtu": "9001",
            "pluginLogFile": log, "pluginLogLevel": "DEBUG"});
        if plugin == "aws-cni" {
            config["vethPrefix"] = "eni".into();
            config["podSGEnforcingMode"] = "strict".into();
        } else {
            config["enabled"] = "true".into();
            config["nodeIP"] = self.own(false).to_string().into();
            config["randomizeSNAT"] = "prng".into();
            config["ipam"] = self.ipam();
        }
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        config
    }

    /// The configuration of `host-local`.
    pub fn ipam(&self) -> Value {
        let Family { range, all, data, .. } = self.family;
        json!({"type": "host-local", "ranges": [[{"subnet": range}]], "routes": [{"dst": all}], "dataDir": data})
    }

    fn plugin(&self, verb: &str, plugin: &str, who: (&str, &str, &Pod), previous: Option<&Value>) -> Value {
        let (name, container, pod) = who;
        let netns = pod.path.display().to_string();
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={name};K8S_POD_UID={name}-uid");
        let env = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", container),
            ("CNI_NETNS", &netns),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
            ("CNI_ARGS", &args),
        ];
        let config = self.config(plugin, previous).to_string();
        let said = self.run(PROGRAM, plugin, &env, &config);
        let said = said.unwrap_or_else(|error| panic!("{verb} of {name}: {error}\n{}", self.log()));
        if said.is_empty() { Value::Null } else { serde_json::from_str(&said).unwrap() }
    }

    /// ADD through our plugins.
    pub fn add(&self, name: &str) -> Living {
        let (pod, container) = (self.new_pod(name), container());
        let who = (name, container.as_str(), &pod);
        let first = self.plugin("ADD", "aws-cni", who, None);
        let result = self.plugin("ADD", "egress-cni", who, Some(&first));
        let address = result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap();
        let files = self.host_local_files();
        let mine = files.iter().find(|(_, content)| content.starts_with(&container));
        let egress = mine.unwrap_or_else(|| panic!("{files:?}")).0.parse().unwrap();
        Living { name: name.into(), container, pod, address, egress, result }
    }

    /// DEL through our plugins, and the pod goes.
    pub fn delete(&self, pod: Living) {
        for plugin in ["egress-cni", "aws-cni"] {
            self.plugin("DEL", plugin, (&pod.name, &pod.container, &pod.pod), Some(&pod.result));
        }
        self.node.delete_pod(pod.pod).unwrap();
    }

    /// Names and contents of what `host-local` or we keep.
    pub fn host_local_files(&self) -> BTreeMap<String, String> {
        let directory = Path::new(self.family.data).join("aws-cni");
        let read = || {
            let entries = fs::read_dir(&directory)?.map(|entry| {
                let entry = entry?;
                let name = entry.file_name().into_string().expect("a name of text");
                Ok((name, fs::read_to_string(entry.path())?))
            });
            entries.collect()
        };
        self.node.inside(read).unwrap()
    }

    /// Everything of the node's network that names one of these words, a line each.
    pub fn traces(&self, words: &[String]) -> Vec<String> {
        let seen = self.shell(
            "ip -o link; ip -o address; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all\n\
             nft --stateless list ruleset",
        );
        let names = |line: &&str| {
            let mut tokens = line.split(|c: char| c.is_whitespace() || "/,@\"".contains(c));
            tokens.any(|token| words.iter().any(|word| word == token))
        };
        seen.lines().filter(names).map(str::to_owned).collect()
    }

    /// Names of the node's links.
    pub fn links(&self) -> BTreeSet<String> {
        self.node.place.links().unwrap().into_iter().map(|link| link.name).collect()
    }
}

/// An id as containerd makes them.
pub fn container() -> String {
    let mut random = [0; 16];
    enibox::sys::random_bytes(&mut random).unwrap();
    format!("{0:032x}{0:032x}", u128::from_be_bytes(random))
}

/// Hexadecimal digest by a tool (`sha1sum`, `sha512sum`), not by our code.
pub fn digest(program: &str, text: &str) -> String {
    tool_with_input(program, &[], text).expect("it was looked for").split_whitespace().next().unwrap().to_owned()
}

/// Host end of a pod's veth (`spec/plugin.md` 6).
pub fn host_veth(name: &str) -> String {
    format!("eni{}", &digest("sha1sum", &format!("{NAMESPACE}.{name}"))[..11])
}

fn converse(command: &mut Command, input: &str) -> (bool, String, String) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A program may end without having read it.
    _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}
