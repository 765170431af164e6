//! The same in IPv6 mode, on a node with several network cards.

use super::faults::V6_FAULTS;
use super::{Ward, names};
use crate::settings::fetch;
use crate::stage::PROGRAM;
use enibox::model::limits;
use enibox::model::naming::{VLAN_PREFIX, host_veth};
use enibox::model::settings::Settings;
use enibox::rpc::http1::{Limits, Request, Response, Server};
use enibox::sandbox::agents::{Agent, EVERY_CARD, Runtime, WiredPod};
use enibox::sandbox::cluster::{self, ApiServer};
use enibox::sandbox::topology::Node;
use enibox::sandbox::world::{Plan, World};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

const V6: &[(&str, &str)] = &[
    ("ENABLE_IPv6", "true"),
    ("ENABLE_PREFIX_DELEGATION", "true"),
    ("ENABLE_MULTI_NIC", "true"),
    ("AWS_EXTERNAL_SERVICE_CIDRS", "192.0.2.0/28"),
];

/// A node with its daemon.
struct Clinic {
    agent: Option<Agent>,
    settings: Settings,
    env: Vec<(String, String)>,
    node: Arc<Node>,
    pods: Vec<WiredPod>,
    world: World,
}

impl Clinic {
    fn new(instance_type: &str, seed: u64, env: &[(&str, &str)]) -> Clinic {
        let home = std::env::temp_dir().join(format!("enibox-clinic-{}", std::process::id()));
        let mut world = World::create(&Plan { nodes: 1, instance_type, seed, home: &home }).unwrap();
        let mut env: Vec<(String, String)> =
            env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let get = |name: &str| env.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let settings = Settings::parse(get).0;
        let limits = limits::of(instance_type).unwrap();
        cluster::prepare(&mut world, &settings, &limits, (ApiServer::Answers, 4)).unwrap();
        let node = world.node(0).unwrap();
        node.prepare(&settings).unwrap();
        env.push(cluster::endpoint());
        let logs = world.topology().run().logs();
        let mut agent = Agent::start(Path::new(PROGRAM), &logs, &node, &env).unwrap();
        agent.wait_ready(&node, &|| Ok(())).unwrap();
        Clinic { agent: Some(agent), settings, env, node, pods: Vec::new(), world }
    }

    fn add(&mut self, name: &str, annotations: &[(&str, &str)]) {
        let logs = self.world.topology().run().logs();
        let runtime = Runtime {
            program: Path::new(PROGRAM),
            logs: &logs,
            node: &self.node,
            settings: &self.settings,
            egress: None,
        };
        self.pods.push(runtime.add(name, annotations).unwrap());
    }

    fn ward(&self) -> Ward {
        let env: Vec<(&str, &str)> = self.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        Ward::new(Arc::clone(&self.node), &env)
    }

    /// Name of the host's end of an interface of a pod.
    fn veth(&self, pod: usize, interface: usize) -> String {
        let pod = &self.pods[pod];
        let strict = pod.branch && self.settings.pod_security_groups_strict();
        let prefix = if strict { VLAN_PREFIX } else { &self.settings.veth_prefix };
        host_veth(prefix, &self.node.place.name, &pod.name, interface).unwrap()
    }

    fn netns(&self, pod: usize) -> String {
        self.pods[pod].pod.path.file_name().unwrap().to_string_lossy().into_owned()
    }

    /// Ends the daemon, which would mend what is planted, and answers for it with what it has said last.
    fn replace_daemon(&mut self) -> Server {
        let at = "127.0.0.1:61679";
        let ask = |path: &str| {
            let answer = self.node.place.net.run(|| fetch(at, path)).unwrap();
            answer.split_once("\r\n\r\n").unwrap().1.to_owned()
        };
        let pages = ["/v1/enibox/intent", "/v1/enibox/status"].map(|path| (path.to_owned(), ask(path)));
        let pages: BTreeMap<String, String> = pages.into();
        drop(self.agent.take());
        let listener = self.node.place.net.run(|| TcpListener::bind(at)).unwrap().unwrap();
        let answer = move |request: &Request| match pages.get(&request.path) {
            Some(page) => Response::new(200, "application/json", page.as_str()).into(),
            None => Response::text(404, "").into(),
        };
        Server::start("stand-in", listener, Limits::default(), Arc::new(answer)).unwrap()
    }
}

#[test]
fn single_faults_in_ipv6_mode() {
    let mut clinic = Clinic::new("p4d.24xlarge", 92, V6);
    clinic.add("one", &[]);
    clinic.add("two", &[EVERY_CARD]);
    let mut ward = clinic.ward();
    let further = clinic.pods[1].further[0].1.to_string();
    let from = ward.told(&format!("ip -6 -o rule | grep 'from {further} ' | sed 's/.* lookup //'"));
    let own = ward
        .told(&format!("ip -6 -o rule | sed -n 's/^32765:.*from \\([0-9a-f:]*\\) lookup {from} *$/\\1/p' | head -n 1"));
    let net = ward.told(&format!("ip -o -6 addr show to {own} | awk '{{print $4}}'"));
    ward.variables = vec![
        ("A1", clinic.pods[0].address.to_string()),
        ("P1", clinic.netns(0)),
        ("V1", clinic.veth(0, 0)),
        ("A2", further),
        ("P2", clinic.netns(1)),
        ("V2", clinic.veth(1, 1)),
        ("I2", clinic.pods[1].further[0].0.clone()),
        ("SUBNET", net.parse::<ipnet::IpNet>().unwrap().trunc().to_string()),
        ("ENI", ward.told(&format!("ip -o -6 addr show to {own} | awk '{{print $2}}'"))),
        ("ETH", "eth0".into()),
        ("NODE", clinic.world.nodes[0].address_v6.to_string()),
        ("T", from),
        ("OWN", own),
        ("NET", net),
    ];
    let addresses = clinic.pods.iter().map(|pod| 1 + pod.further.len()).sum();
    ward.is_healthy(addresses);
    let _answers = clinic.replace_daemon();
    let (code, told) = ward.doctor(None, &["--address", "127.0.0.1:1"]);
    assert_eq!((code, names(&told)), (3, vec!["daemon-silent".to_owned()]), "without a daemon: {told:#}");
    let wrong = ward.trials(V6_FAULTS);
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(V6_FAULTS.len() >= 60, "{}", V6_FAULTS.len());
}
