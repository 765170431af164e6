//! The same in IPv6 mode, on a node with several network cards, and on nodes with pods that have a branch ENI of their own.

use super::faults::{
    BRANCH_FAULTS, Fault, STANDARD_FAULTS, STRICT_FAULTS, V6_BRANCH_FAULTS, V6_EGRESS_FAULTS, V6_FAULTS,
};
use super::{Ward, names, router};
use crate::settings::fetch;
use crate::stage::{PROGRAM, eventually};
use enibox::clock;
use enibox::model::ec2::Call;
use enibox::model::limits;
use enibox::model::map::Map;
use enibox::model::naming::{VLAN_PREFIX, host_veth};
use enibox::model::settings::Settings;
use enibox::rpc::http1::Server;
use enibox::sandbox::agents::{Agent, EVERY_CARD, Runtime, WiredPod};
use enibox::sandbox::cluster::{self, ApiServer};
use enibox::sandbox::controller::{self, Trunk};
use enibox::sandbox::kube::Kind;
use enibox::sandbox::probe::{Flow, PORT, Proto};
use enibox::sandbox::serve::kube::Kube;
use enibox::sandbox::topology::Node;
use enibox::sandbox::world::{HOSTS, Plan, World};
use serde_json::json;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

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
    kube: Arc<Kube>,
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
        let kube = cluster::prepare(&mut world, &settings, &limits, (ApiServer::Answers, 4)).unwrap().unwrap();
        let node = world.node(0).unwrap();
        node.prepare(&settings).unwrap();
        env.push(cluster::endpoint());
        let mut clinic = Clinic { agent: None, settings, env, node, kube, pods: Vec::new(), world };
        clinic.start();
        clinic
    }

    fn start(&mut self) {
        let logs = self.world.topology().run().logs();
        let mut agent = Agent::start(Path::new(PROGRAM), &logs, &self.node, &self.env).unwrap();
        agent.wait_ready(&self.node, &|| Ok(())).unwrap();
        self.agent = Some(agent);
    }

    fn add(&mut self, name: &str, annotations: &[(&str, &str)]) {
        let logs = self.world.topology().run().logs();
        let runtime = Runtime {
            program: Path::new(PROGRAM),
            logs: &logs,
            node: &self.node,
            settings: &self.settings,
            egress: self.settings.v6_egress.then(|| self.world.nodes[0].address_v6.into()),
        };
        self.pods.push(runtime.add(name, annotations).unwrap());
    }

    /// A trunk ENI, for pods with branch ENIs.
    fn trunk(&self) -> Trunk {
        controller::attach(&self.world, &self.kube, &self.world.nodes[0], &|| Ok(())).unwrap()
    }

    fn add_branch(&mut self, name: &str, trunk: &Trunk) {
        let namespace = self.node.place.name.clone();
        self.kube.change(|api| api.add_pod(&namespace, name, &namespace, &controller::wish()));
        trunk.branch(&namespace, name).unwrap();
        self.add(name, &[]);
        assert!(self.pods.last().unwrap().branch);
    }

    /// What the internet says to the pod; its patience is short.
    fn talk(&self, pod: usize, proto: Proto) -> Result<SocketAddr, String> {
        self.talk_in(pod, proto, self.pods[pod].address.is_ipv6())
    }

    /// The same in the other family.
    fn talk_out(&self, pod: usize, proto: Proto) -> Result<SocketAddr, String> {
        self.talk_in(pod, proto, self.pods[pod].address.is_ipv4())
    }

    fn talk_in(&self, pod: usize, proto: Proto, v6: bool) -> Result<SocketAddr, String> {
        let pod = &self.pods[pod];
        let host = HOSTS.iter().find(|host| host.name == "internet").unwrap();
        let far = self.world.namespace(host.name).unwrap();
        let at = SocketAddr::from((host.at(v6), PORT));
        let near = pod.pod.place.handle().unwrap();
        let flow = Flow { client: &near, source: None, target: at, server: &far, listen: at };
        flow.run(proto, Duration::from_secs(2)).map_err(|error| error.to_string())
    }

    /// How often the daemon has put back a thing of this kind.
    fn repairs(&self, what: &str) -> u64 {
        let page = self.node.place.net.run(|| fetch("127.0.0.1:61678", "/metrics")).unwrap();
        let start = format!("awscni_repairs_total{{what=\"{what}\"}} ");
        page.lines().find_map(|line| line.strip_prefix(&start)).map_or(0, |count| count.trim().parse().unwrap())
    }

    /// A repair is counted at the end of the round that made it.
    fn counts_beyond(&self, what: &str, counted: u64) {
        eventually(Duration::from_secs(5), &format!("{what} is counted"), || {
            let now = self.repairs(what);
            if now > counted { Ok(()) } else { Err((now, counted)) }
        });
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
    fn replace_daemon(&mut self, ward: &Ward) -> [Server; 2] {
        let pages = ward.pages();
        drop(self.agent.take());
        ward.answer_with(pages)
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
        ("ROUTER", router(&clinic.world)),
        ("NODE", clinic.world.nodes[0].address_v6.to_string()),
        ("T", from),
        ("OWN", own),
        ("NET", net),
    ];
    let addresses = clinic.pods.iter().map(|pod| 1 + pod.further.len()).sum();
    ward.is_healthy(addresses);
    settings_are_put_back_at_once(&clinic, &ward);
    let _answers = clinic.replace_daemon(&ward);
    let (code, told) = ward.doctor(None, &["--address", "127.0.0.1:1"]);
    assert_eq!((code, names(&told)), (3, vec!["daemon-silent".to_owned()]), "without a daemon: {told:#}");
    let env = std::mem::take(&mut ward.env);
    let (code, told) = ward.doctor(None, &["--address", "127.0.0.1:1"]);
    assert_eq!((code, names(&told)), (3, vec!["daemon-silent".to_owned()]), "without its variables: {told:#}");
    ward.env = env;
    let wrong = ward.trials(V6_FAULTS);
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(V6_FAULTS.len() >= 60, "{}", V6_FAULTS.len());
}

#[test]
fn single_faults_of_the_way_out_to_ipv6() {
    let mut clinic = Clinic::new("t3.small", 97, &[("ENABLE_V6_EGRESS", "true")]);
    clinic.add("one", &[]);
    let mut ward = clinic.ward();
    let address = clinic.pods[0].egress.unwrap().to_string();
    let link = ward.told(&format!("ip -6 -o route show {address} | sed 's/.* dev \\([^ ]*\\).*/\\1/'"));
    ward.variables = vec![("ETH", "eth0".into()), ("A", address), ("V", link)];
    ward.is_healthy(1);
    let counted = clinic.repairs("ruleset");
    ward.script("nft delete table ip6 aws-cni").unwrap();
    eventually(Duration::from_secs(10), "the table is back", || ward.script("nft list table ip6 aws-cni").map(drop));
    clinic.counts_beyond("ruleset", counted);
    a_kubelet_that_takes_too_many_pods(&clinic, &ward);
    let _answers = clinic.replace_daemon(&ward);
    let wrong = ward.trials(V6_EGRESS_FAULTS);
    assert!(wrong.is_empty(), "{wrong:#?}");
    for proto in [Proto::Tcp, Proto::Udp] {
        assert_eq!(clinic.talk_out(0, proto).unwrap().ip(), clinic.world.nodes[0].address_v6);
    }
}

/// The API server tells the daemon of the Node, and the daemon the doctor.
fn a_kubelet_that_takes_too_many_pods(clinic: &Clinic, ward: &Ward) {
    let name = clinic.node.place.name.as_str();
    for (pods, expected) in [(110, &["max-pods"][..]), (11, &[]), (12, &["max-pods"]), (11, &[])] {
        clinic
            .kube
            .change(|api| api.patch(Kind::Node, "", name, &json!({"status": {"capacity": {"pods": pods.to_string()}}})))
            .unwrap();
        let seen = format!(
            "the kubelet takes {pods} pods, and the node has room for 11: 3 ENIs x 3 addresses + 2 on the host's network"
        );
        eventually(Duration::from_secs(40), "the doctor counts", || {
            let (_, told) = ward.doctor(None, &[]);
            let tells = expected.is_empty() || told["findings"].to_string().contains(&seen);
            if names(&told) == expected && tells { Ok(()) } else { Err(told) }
        });
    }
}

/// A cluster with security groups for pods whose controller has not come to the node yet.
#[test]
fn a_node_without_a_trunk_eni() {
    let env = [("ENABLE_POD_ENI", "true"), ("POD_SECURITY_GROUP_ENFORCING_MODE", "standard")];
    let mut clinic = Clinic::new("m5.large", 99, &env);
    let namespace = clinic.node.place.name.clone();
    clinic.kube.change(|api| api.add_pod(&namespace, "one", &namespace, &json!({})));
    clinic.add("one", &[]);
    let ward = clinic.ward();
    eventually(Duration::from_secs(40), "the trunk is missed", || {
        let (code, told) = ward.doctor(None, &[]);
        if (code, names(&told)) == (3, vec!["trunk-missing".to_owned()]) && told["pods"] == 1 {
            Ok(())
        } else {
            Err(told)
        }
    });
    let _trunk = clinic.trunk();
    ward.is_healthy(1);
}

/// An EFA with addresses serves pods like any other ENI; one without has no link for IP, and nobody misses it
/// (`spec/dataplane.md` 8.5). Neither is a fault, with the daemon or without.
#[test]
fn a_node_with_efas_is_healthy() {
    let mut clinic = Clinic::new("p4d.24xlarge", 98, &[]);
    // A daemon that starts finds at once what others have attached.
    drop(clinic.agent.take());
    let instance = clinic.world.nodes[0].instance.clone();
    let efas = [(0, 1, "efa"), (1, 0, "efa-only")].map(|(card, device, kind)| {
        clinic.world.cloud.change(|vpc| {
            let subnet = vpc.identity(&instance).unwrap().subnet;
            let eni = vpc.add_interface(clock::now(), &subnet, "by hand", &Map::new()).unwrap();
            let call = Call::Attach { eni: eni.clone(), instance: instance.clone(), device, card };
            assert!(vpc.execute(clock::now(), &call).result.is_ok());
            vpc.meddle(clock::now(), &eni, |eni| {
                eni.interface_type = kind.into();
                eni.primary_ipv4 = eni.primary_ipv4.filter(|_| kind == "efa");
            });
            (eni, kind == "efa")
        })
    });
    clinic.start();
    clinic.add("one", &[]);
    let ward = clinic.ward();
    ward.is_healthy(1);
    let (_, told) = ward.doctor(None, &[]);
    assert_eq!(told["findings"].as_array().unwrap().len(), 0, "not even a note: {told:#}");
    assert!(ward.told("ip -o rule").contains("32765:"), "the one with addresses is set up");
    let pages = ward.pages();
    assert!(efas.iter().all(|(eni, set_up)| pages["/v1/enibox/intent"].contains(eni.as_str()) == *set_up), "{pages:?}");
    drop(clinic.agent.take());
    let (code, told) = ward.doctor(None, &[]);
    assert_eq!((code, names(&told)), (3, vec!["daemon-silent".to_owned()]), "{told:#}");
}

/// Of these the kernel tells when they are changed, so that the daemon needs not wait for its next regular look.
fn settings_are_put_back_at_once(clinic: &Clinic, ward: &Ward) {
    for (path, wrong, right) in [
        ("net/ipv6/conf/all/forwarding", "0", "1"),
        ("net/ipv4/ip_forward", "0", "1"),
        ("net/ipv4/conf/eth0/rp_filter", "1", "2"),
    ] {
        let counted = clinic.repairs("sysctl");
        let begin = clock::instant();
        ward.script(&format!("echo {wrong} > /proc/sys/{path}")).unwrap();
        eventually(Duration::from_secs(4), path, || {
            let value = ward.told(&format!("cat /proc/sys/{path}"));
            if value == right { Ok(()) } else { Err(value) }
        });
        println!("{path} is put back after {:?}", begin.elapsed());
        clinic.counts_beyond("sysctl", counted);
    }
}

/// Whether this kernel has VLAN devices; says so if not.
pub fn has_vlan() -> bool {
    let home = std::env::temp_dir().join(format!("enibox-vlan-{}", std::process::id()));
    let world = World::create(&Plan { nodes: 1, instance_type: "m5.large", seed: 1, home: &home }).unwrap();
    let has = world.topology().takes_branches().unwrap();
    if !has {
        // Straight to the descriptor: a captured line would be a silent skip.
        let line = b"SKIP: no vlan device in this kernel, no faults of branch ENIs\n";
        _ = std::io::Write::write_all(&mut std::io::stderr(), line);
    }
    has
}

fn branch_faults(mode: &str, v6: bool, seed: u64, lists: &[&[Fault]]) {
    let mut env = vec![
        ("ENABLE_POD_ENI", "true"),
        ("DISABLE_TCP_EARLY_DEMUX", "true"),
        ("POD_SECURITY_GROUP_ENFORCING_MODE", mode),
    ];
    env.extend_from_slice(if v6 { &V6[..2] } else { &[] });
    let mut clinic = Clinic::new("m5.large", seed, &env);
    let trunk = clinic.trunk();
    clinic.add_branch("one", &trunk);
    let mut ward = clinic.ward();
    let table =
        ward.told("ip -o link show type vlan | sed 's/.*vlan.eth.\\([0-9]*\\)@.*/\\1/'").parse::<u32>().unwrap() + 100;
    let ip = if v6 { "ip -6" } else { "ip -4" };
    ward.variables = vec![
        ("IP", ip.into()),
        ("A", clinic.pods[0].address.to_string()),
        ("P", clinic.netns(0)),
        ("V", clinic.veth(0, 0)),
        ("DEV", format!("vlan.eth.{}", table - 100)),
        ("GW", ward.told(&format!("{ip} -o route show table {table} default | sed 's/.* via \\([^ ]*\\).*/\\1/'"))),
        ("PGW", if v6 { "fe80::1" } else { "169.254.1.1" }.into()),
        ("TRUNK", ward.told("ip -o link show type vlan | sed 's/.*@\\([^:]*\\):.*/\\1/'")),
        ("ETH", "eth0".into()),
        ("T", table.to_string()),
    ];
    ward.is_healthy(1);
    // What EC2 says is tried elsewhere, and emulation is slow.
    ward.args = &["--no-ec2"];
    ward.script("ip link add link $TRUNK name vlan.eth.997 type vlan id 997").unwrap();
    made_again(&clinic, &ward);
    // The daemon has looked meanwhile: what it takes for a leftover it gives time, an operator need not.
    let (code, told) = ward.doctor(None, &["--wait", "0"]);
    assert_eq!((code, names(&told)), (3, vec!["branch-leftover".to_owned()]), "{told:#}");
    let (code, told) = ward.doctor(None, &["--fix"]);
    assert_eq!((code, names(&told)), (0, Vec::new()), "{told:#}");
    ward.script("! ip link show vlan.eth.997 2> /dev/null").unwrap();
    let _answers = clinic.replace_daemon(&ward);
    let wrong: Vec<_> = lists.iter().flat_map(|list| ward.trials(list)).collect();
    assert!(wrong.is_empty(), "{mode} {ip}: {wrong:#?}");
    for proto in [Proto::Tcp, Proto::Udp] {
        clinic.talk(0, proto).unwrap();
    }
}

/// The running daemon makes a deleted VLAN device again, with all that hangs on it, and packets flow.
fn made_again(clinic: &Clinic, ward: &Ward) {
    const LOOK: &str = "ip link show $DEV | sed -n 's/.*ether //p'; $IP route show table $T; $IP rule";
    let seen = [Proto::Tcp, Proto::Udp].map(|proto| clinic.talk(0, proto).unwrap().ip());
    let before = ward.told(LOOK);
    let counted = clinic.repairs("branch-link");
    let begin = clock::instant();
    ward.script("ip link del $DEV").unwrap();
    eventually(Duration::from_secs(20), "the device is back", || {
        let now = ward.script(LOOK)?;
        if now.trim() == before { Ok(()) } else { Err(now) }
    });
    println!("VLAN device and routes are back after {:?}", begin.elapsed());
    eventually(Duration::from_secs(20), "packets flow again", || {
        let again = [Proto::Tcp, Proto::Udp].map(|proto| clinic.talk(0, proto));
        if again.iter().flatten().map(SocketAddr::ip).eq(seen) { Ok(()) } else { Err(again) }
    });
    println!("packets flow after {:?}", begin.elapsed());
    assert!(clinic.repairs("branch-link") > counted, "it is counted");
}

#[test]
fn branch_faults_in_strict_mode() {
    if has_vlan() {
        branch_faults("strict", false, 93, &[BRANCH_FAULTS, STRICT_FAULTS]);
        branch_faults("strict", true, 94, &[V6_BRANCH_FAULTS]);
    }
}

#[test]
fn branch_faults_in_standard_mode() {
    if has_vlan() {
        branch_faults("standard", false, 95, &[STANDARD_FAULTS]);
        branch_faults("standard", true, 96, &[V6_BRANCH_FAULTS, STANDARD_FAULTS]);
    }
}
