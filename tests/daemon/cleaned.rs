//! A node that this program leaves beside living pods, whole: `enibox cleanup --apply --force` takes all away that is not said to
//! stay, and a daemon that is started again puts all of it back.

use crate::doctor::modes::has_vlan;
use crate::stage::{PROGRAM, eventually};
use crate::support::whole::Whole;
use enibox::apply::Host;
use enibox::clock;
use enibox::model::limits;
use enibox::model::net::Family;
use enibox::model::settings::Settings;
use enibox::plan::egress::SNAT_CHAIN;
use enibox::sandbox::agents::{Agent, Runtime, WiredPod};
use enibox::sandbox::cluster::{self, ApiServer};
use enibox::sandbox::controller;
use enibox::sandbox::probe::{Flow, PORT, Proto};
use enibox::sandbox::serve::kube::Kube;
use enibox::sandbox::topology::Node;
use enibox::sandbox::world::{HOSTS, Plan, World};
use serde_json::json;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

/// As much as a virtual machine without acceleration needs.
const PATIENCE: Duration = Duration::from_mins(4);

struct Leaving {
    agent: Option<Agent>,
    settings: Settings,
    env: Vec<(String, String)>,
    node: Arc<Node>,
    egress: bool,
    pods: Vec<WiredPod>,
    kube: Option<Arc<Kube>>,
    before: Whole,
    world: World,
}

impl Leaving {
    fn new(instance_type: &str, seed: u64, env: &[(&str, &str)], egress: bool) -> Leaving {
        let home = std::env::temp_dir().join(format!("enibox-cleaned-{}", std::process::id()));
        let mut world = World::create(&Plan { nodes: 1, instance_type, seed, home: &home }).unwrap();
        let mut env: Vec<_> = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let get = |name: &str| env.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let settings = Settings::parse(get).0;
        let limits = limits::of(instance_type).unwrap();
        let kube = cluster::prepare(&mut world, &settings, &limits, (ApiServer::Answers, 6)).unwrap();
        let node = world.node(0).unwrap();
        node.prepare(&settings).unwrap();
        env.push(cluster::endpoint());
        let before = Whole::at_rest(&node.place.net);
        let mut leaving = Leaving { agent: None, settings, env, node, egress, pods: Vec::new(), kube, before, world };
        leaving.start();
        leaving
    }

    fn start(&mut self) {
        let logs = self.world.topology().run().logs();
        let mut agent = Agent::start(Path::new(PROGRAM), &logs, &self.node, &self.env).unwrap();
        agent.wait_ready(&self.node, &|| Ok(())).unwrap();
        self.agent = Some(agent);
    }

    fn stop(&mut self) {
        self.agent.take().unwrap().stop().unwrap();
    }

    fn log(&self) -> String {
        let name = format!("{}-ipamd.log", self.node.place.name);
        std::fs::read_to_string(self.world.topology().run().logs().join(name)).unwrap_or_default()
    }

    fn runtime<T>(&self, call: impl FnOnce(&Runtime<'_>) -> T) -> T {
        let logs = self.world.topology().run().logs();
        let egress = self.egress.then(|| self.world.nodes[0].at(!self.settings.enable_ipv6));
        let (program, node, settings) = (Path::new(PROGRAM), &*self.node, &self.settings);
        call(&Runtime { program, logs: &logs, node, settings, egress })
    }

    fn add(&mut self, name: &str) {
        let pod = self.runtime(|runtime| runtime.add(name, &[])).unwrap();
        self.pods.push(pod);
    }

    /// Whether the table of the other family translates.
    fn translates(&self) -> bool {
        let family = if self.settings.enable_ipv6 { Family::V4 } else { Family::V6 };
        let tables = self.node.place.net.run(|| Host::open()?.observe()).flatten().unwrap().tables;
        let ours = tables.iter().find(|table| table.family == family);
        ours.is_some_and(|table| table.chains.iter().any(|chain| chain.name == SNAT_CHAIN))
    }

    /// The way out in the other family is switched off with a restart: the pod of before keeps it, and takes it along.
    fn keeps_what_is_switched_off(mut self, setting: &str) {
        self.add("one");
        let seen = self.seen();
        assert!(seen.iter().all(Result::is_ok) && self.translates(), "{seen:?}");
        for _ in 0..2 {
            self.stop();
            self.env.retain(|(name, _)| name != setting);
            self.env.push((setting.to_owned(), "false".to_owned()));
            self.start();
            assert_eq!(self.seen(), seen, "{}", self.log());
            assert!(self.translates(), "{}", self.log());
        }
        let pod = self.pods.pop().unwrap();
        self.runtime(|runtime| runtime.delete(pod)).unwrap();
        eventually(PATIENCE, "what translates goes with the last pod", || {
            if self.translates() { Err(self.log()) } else { Ok(()) }
        });
        self.stop();
    }

    fn cleanup(&self, arguments: &[&str]) -> (i32, String, String) {
        let mut command = self.node.command(PROGRAM).unwrap();
        let output = command.arg("cleanup").args(arguments).env_clear().stdin(Stdio::null()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    /// As whom each pod is seen outside, by family.
    fn seen(&self) -> Vec<Result<IpAddr, String>> {
        let internet = HOSTS.iter().find(|host| host.name == "internet").unwrap();
        let far = self.world.namespace(internet.name).unwrap();
        let families: &[bool] = if self.egress { &[false, true] } else { &[self.settings.enable_ipv6] };
        let mut seen = Vec::new();
        for pod in &self.pods {
            let near = pod.pod.place.handle().unwrap();
            for v6 in families {
                let at = SocketAddr::new(internet.at(*v6), PORT);
                let flow = Flow { client: &near, source: None, target: at, server: &far, listen: at };
                for proto in [Proto::Udp, Proto::Tcp] {
                    let source = flow.run(proto, Duration::from_secs(5)).map_err(|error| error.to_string());
                    seen.push(source.map(|source| source.ip()));
                }
            }
        }
        seen
    }

    /// What the node has once nothing changes any more.
    fn at_rest(&self) -> Whole {
        let end = clock::instant() + PATIENCE;
        let mut last = Whole::of(&self.node.place.net);
        loop {
            // Pods are watched over from their sixth second on.
            std::thread::sleep(Duration::from_secs(8));
            let now = Whole::of(&self.node.place.net);
            if now == last && self.seen().iter().all(Result::is_ok) {
                return now;
            }
            assert!(clock::instant() < end, "{:#?} {:?}\n{}", last.differences(&now), self.seen(), self.log());
            last = now;
        }
    }

    fn goes_and_comes_back(mut self) {
        let full = self.at_rest();
        let seen = self.seen();
        self.stop();
        let (code, listed, stays) = self.cleanup(&[]);
        assert_eq!(code, 3, "{stays}");
        let (code, out, err) = self.cleanup(&["--apply"]);
        assert_eq!((code, out.as_str()), (1, ""), "{err}");
        assert!(err.contains("pods are alive"), "{err}");
        assert_eq!(full.differences(&Whole::of(&self.node.place.net)), Vec::<String>::new());
        assert_eq!(self.cleanup(&["--apply", "--force"]), (0, listed, stays.clone()));
        let now = Whole::of(&self.node.place.net);
        assert_eq!(self.before.unexplained(&now, &stays), Vec::<String>::new(), "{stays}");
        let (code, out, err) = self.cleanup(&[]);
        assert_eq!((code, out.as_str()), (0, ""), "{err}");

        self.start();
        eventually(PATIENCE, "all is back", || {
            let now = Whole::of(&self.node.place.net);
            if now == full { Ok(()) } else { Err((full.differences(&now), self.log())) }
        });
        eventually(PATIENCE, "all pods speak again", || {
            let now = self.seen();
            if now == seen { Ok(()) } else { Err((now, self.log())) }
        });
        self.stop();

        // The node is drained by somebody who calls no plugin.
        for pod in std::mem::take(&mut self.pods) {
            self.node.delete_pod(pod.pod).unwrap();
        }
        eventually(PATIENCE, "the pods' links are gone", || {
            let (code, out, err) = self.cleanup(&[]);
            if err.contains("goes with its pod") { Err((code, out, err)) } else { Ok(()) }
        });
        let (code, out, stays) = self.cleanup(&["--apply"]);
        assert_eq!(code, 0, "{stays}");
        assert!(out.contains("delete rule"), "{out}");
        let now = Whole::of(&self.node.place.net);
        assert_eq!(self.before.unexplained(&now, &stays), Vec::<String>::new(), "{stays}");
    }
}

#[test]
fn all_goes_and_comes_back_in_ipv4() {
    let env = [("WARM_ENI_TARGET", "0"), ("WARM_IP_TARGET", "1"), ("ENABLE_V6_EGRESS", "true")];
    let mut leaving = Leaving::new("t3.small", 321, &env, true);
    for number in 0..5 {
        leaving.add(&format!("pod-{number}"));
    }
    leaving.goes_and_comes_back();
}

#[test]
fn all_goes_and_comes_back_in_ipv6() {
    let env = [("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true")];
    let mut leaving = Leaving::new("m5.large", 322, &env, true);
    for number in 0..2 {
        leaving.add(&format!("pod-{number}"));
    }
    leaving.goes_and_comes_back();
}

#[test]
fn pods_keep_a_way_out_that_is_switched_off() {
    let env = [("WARM_ENI_TARGET", "0"), ("WARM_IP_TARGET", "1"), ("ENABLE_V6_EGRESS", "true")];
    Leaving::new("t3.small", 327, &env, true).keeps_what_is_switched_off("ENABLE_V6_EGRESS");
    let env = [("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true")];
    Leaving::new("m5.large", 328, &env, true).keeps_what_is_switched_off("ENABLE_V4_EGRESS");
}

fn with_branches(mode: &str, v6: bool, seed: u64) {
    if !has_vlan() {
        return;
    }
    let six = if v6 { "true" } else { "false" };
    let env = [
        ("ENABLE_POD_ENI", "true"),
        ("ENABLE_IPv6", six),
        ("ENABLE_PREFIX_DELEGATION", six),
        ("POD_SECURITY_GROUP_ENFORCING_MODE", mode),
        ("WARM_ENI_TARGET", "0"),
        ("WARM_IP_TARGET", if v6 { "0" } else { "1" }),
    ];
    let mut leaving = Leaving::new("m5.large", seed, &env, false);
    let kube = leaving.kube.clone().expect("an API server");
    let trunk = controller::attach(&leaving.world, &kube, &leaving.world.nodes[0], &|| Ok(())).unwrap();
    let namespace = leaving.node.place.name.clone();
    for name in ["one", "two"] {
        kube.change(|api| api.add_pod(&namespace, name, &namespace, &controller::wish()));
        trunk.branch(&namespace, name).unwrap();
        leaving.add(name);
    }
    assert!(leaving.pods.iter().all(|pod| pod.branch));
    kube.change(|api| api.add_pod(&namespace, "plain", &namespace, &json!({})));
    leaving.add("plain");
    leaving.goes_and_comes_back();
}

#[test]
fn branches_go_and_come_back_in_strict_mode() {
    with_branches("strict", false, 323);
    with_branches("strict", true, 324);
}

#[test]
fn branches_go_and_come_back_in_standard_mode() {
    with_branches("standard", false, 325);
    with_branches("standard", true, 326);
}
