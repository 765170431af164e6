//! The sandbox's network with real packets: what EC2 would drop is dropped, what it would deliver arrives.

use enibox::aws::{creds, ec2, imds};
use enibox::clock;
use enibox::model::ec2::{Call, ConntrackTimeouts, Count, Create, Reply};
use enibox::model::ids::{AttachmentId, EniId};
use enibox::model::map::Map;
use enibox::model::net::{Address, Route, Rule, Scope};
use enibox::netlink::netns::Namespace;
use enibox::netlink::{addr, link, route, rule};
use enibox::sandbox::probe::{Flow, PORT, Proto};
use enibox::sandbox::topology::{EC2, IMDS, Topology};
use enibox::sandbox::world::{HOSTS, Plan, REGION, World};
use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const QUICK: Duration = Duration::from_millis(300);
const PATIENT: Duration = Duration::from_secs(5);

fn home(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("enibox-topology-{}-{name}", std::process::id()))
}

fn world(name: &str, nodes: usize) -> World {
    World::create(&Plan { nodes, instance_type: "m5.large", seed: 5, home: &home(name) }).unwrap()
}

fn call(world: &World, call: &Call) -> Reply {
    let reply = world.cloud.change(|vpc| vpc.execute(clock::now(), call)).result.unwrap();
    assert_eq!(world.cloud.complaints(), Vec::<String>::new());
    reply
}

fn primary(world: &World, node: usize) -> EniId {
    world.cloud.vpc().identity(&world.nodes[node].instance).unwrap().primary_eni
}

fn assign(world: &World, eni: &EniId) -> Ipv4Addr {
    match call(world, &Call::Assign { eni: eni.clone(), count: Count::Addresses(1) }) {
        Reply::Assigned(nets) => match nets[0].addr() {
            IpAddr::V4(addr) => addr,
            IpAddr::V6(_) => unreachable!(),
        },
        other => panic!("{other:?}"),
    }
}

fn attach(world: &World, node: usize) -> (EniId, AttachmentId) {
    let identity = world.cloud.vpc().identity(&world.nodes[node].instance).unwrap();
    let created = call(
        world,
        &Call::Create(Create {
            subnet: identity.subnet,
            description: String::new(),
            groups: Vec::new(),
            count: Count::Addresses(1),
            conntrack: ConntrackTimeouts::default(),
            tags: Map::new(),
            client_token: format!("t{node}"),
        }),
    );
    let Reply::Created(eni) = created else { panic!("{created:?}") };
    let instance = identity.instance;
    let attached = call(world, &Call::Attach { eni: eni.id.clone(), instance, device: 1, card: 0 });
    let Reply::Attached(attachment) = attached else { panic!("{attached:?}") };
    (eni.id, attachment)
}

// Puts an address on a node's link, as if a pod had it.
fn wear(topology: &Topology, world: &World, node: usize, name: &str, address: impl Into<IpAddr>) {
    let place = &topology.node(&world.nodes[node].instance).unwrap().place;
    let mut socket = place.socket().unwrap();
    let dev = link::by_name(&mut socket, name).unwrap().unwrap().index;
    let address = Address { dev, addr: IpNet::from(address.into()), no_prefix_route: true, no_dad: true };
    socket.run(&[link::set_up(dev), addr::add(&address)]).unwrap();
    let end = clock::instant() + PATIENT;
    while !route::is_local(&mut socket, address.addr.addr()).unwrap() {
        assert!(clock::instant() < end, "{address} does not become usable");
        std::thread::sleep(Duration::from_millis(1));
    }
}

// From a node, bound to an address, to a host; the source that the host saw.
fn out(world: &World, node: usize, source: impl Into<IpAddr>, host: &str, timeout: Duration) -> Option<IpAddr> {
    let (topology, source) = (world.topology(), source.into());
    let to = HOSTS.iter().find(|found| found.name == host).unwrap();
    let at = SocketAddr::from((to.at(source.is_ipv6()), PORT));
    let flow = Flow {
        client: &topology.node(&world.nodes[node].instance).unwrap().place.net,
        source: Some(source),
        target: at,
        server: &topology.host(host).unwrap().net,
        listen: at,
    };
    flow.run(Proto::Udp, timeout).ok().map(|seen| seen.ip())
}

#[test]
fn nodes_and_hosts_reach_each_other() {
    let world = world("reach", 3);
    let topology = world.topology();
    let net = |index: usize| &topology.node(&world.nodes[index].instance).unwrap().place.net;
    for proto in [Proto::Tcp, Proto::Udp] {
        let check = |client, server, target: IpAddr, expect: IpAddr| {
            let at = SocketAddr::from((target, PORT));
            let seen = Flow { client, source: None, target: at, server, listen: at }.run(proto, PATIENT).unwrap();
            assert_eq!(seen.ip(), expect, "{proto:?} to {target}");
        };
        for v6 in [false, true] {
            // Another subnet, and the same subnet.
            for other in [1, 2] {
                check(net(0), net(other), world.nodes[other].at(v6), world.nodes[0].at(v6));
            }
            for host in HOSTS {
                let place = &topology.host(host.name).unwrap().net;
                check(net(0), place, host.at(v6), world.nodes[0].at(v6));
                check(place, net(0), world.nodes[0].at(v6), host.at(v6));
            }
        }
    }
}

#[test]
fn an_unassigned_source_is_dropped_and_an_assigned_one_passes() {
    let world = world("source", 1);
    let eni = primary(&world, 0);
    let address = assign(&world, &eni);
    wear(&world.topology(), &world, 0, "eth0", address);
    assert_eq!(out(&world, 0, address, "internet", PATIENT), Some(IpAddr::V4(address)));
    assert_eq!(out(&world, 0, address, "vpc-host", PATIENT), Some(IpAddr::V4(address)));
    call(&world, &Call::UnassignAddresses { eni: eni.clone(), addresses: vec![address] });
    assert_eq!(out(&world, 0, address, "vpc-host", QUICK), None, "it is not the ENI's any more");
    let stranger = Ipv4Addr::new(10, 20, 15, 77);
    wear(&world.topology(), &world, 0, "eth0", stranger);
    assert_eq!(out(&world, 0, stranger, "vpc-host", QUICK), None);
    let spoofed = Ipv4Addr::new(203, 0, 113, 10);
    wear(&world.topology(), &world, 0, "eth0", spoofed);
    assert_eq!(out(&world, 0, spoofed, "vpc-host", QUICK), None, "the internet is elsewhere");
    let Reply::Assigned(prefixes) = call(&world, &Call::Assign { eni, count: Count::Prefixes(1) }) else { panic!() };
    let IpNet::V4(prefix) = prefixes[0] else { panic!() };
    wear(&world.topology(), &world, 0, "eth0", prefix.broadcast());
    let last = prefix.broadcast();
    assert_eq!(out(&world, 0, last, "vpc-host", PATIENT), Some(IpAddr::V4(last)), "the prefix's last address counts");
}

#[test]
fn an_ipv6_source_is_checked_as_well() {
    let world = world("source-v6", 2);
    let eni = primary(&world, 0);
    let Reply::Assigned(prefixes) = call(&world, &Call::AssignIpv6Prefix(eni)) else { panic!() };
    for address in [prefixes[0].network(), prefixes[0].broadcast()] {
        wear(&world.topology(), &world, 0, "eth0", address);
        assert_eq!(out(&world, 0, address, "internet", PATIENT), Some(address), "an address of the prefix");
    }
    let strangers = ["2001:db8:20:0:8fff::7", "2001:db8:113::10", "fd00::7"];
    let other = world.nodes[1].address_v6;
    for stranger in strangers.map(|text| text.parse::<IpAddr>().unwrap()).into_iter().chain([other.into()]) {
        wear(&world.topology(), &world, 0, "eth0", stranger);
        assert_eq!(out(&world, 0, stranger, "vpc-host", QUICK), None, "{stranger} is not the ENI's");
    }
    // An address of the second ENI does not leave by the first.
    let (second, _) = attach(&world, 0);
    let Reply::Assigned(prefixes) = call(&world, &Call::AssignIpv6Prefix(second)) else { panic!() };
    wear(&world.topology(), &world, 0, "eth1", prefixes[0].network());
    assert_eq!(out(&world, 0, prefixes[0].network(), "vpc-host", QUICK), None);
}

#[test]
fn an_address_leaves_only_by_its_own_eni() {
    let world = world("own", 1);
    let (eni, _) = attach(&world, 0);
    let address = assign(&world, &eni);
    // The node's default route is through eth0, and nothing sends this source through eth1.
    wear(&world.topology(), &world, 0, "eth1", address);
    assert_eq!(out(&world, 0, address, "vpc-host", QUICK), None);
    let gateway = Ipv4Addr::new(10, 20, 0, 1);
    {
        let topology = world.topology();
        let place = &topology.node(&world.nodes[0].instance).unwrap().place;
        let mut socket = place.socket().unwrap();
        let dev = link::by_name(&mut socket, "eth1").unwrap().unwrap().index;
        let near = IpNet::from(IpAddr::V4(gateway));
        let route = |dst, gateway, scope| Route { table: 2, dst, gateway, dev, scope, prefsrc: None, metric: 0 };
        let all: IpNet = "0.0.0.0/0".parse().unwrap();
        let requests = [
            route::add(&route(near, None, Scope::Link)),
            route::add(&route(all, Some(gateway.into()), Scope::Universe)),
            rule::add(&Rule::from(IpNet::from(IpAddr::V4(address)), 1536, 2)),
        ];
        socket.run(&requests).unwrap();
    }
    assert_eq!(out(&world, 0, address, "vpc-host", PATIENT), Some(IpAddr::V4(address)), "by eth1 it passes");
}

#[test]
fn links_come_and_go_with_the_attachments() {
    let world = world("links", 1);
    let names = || {
        let topology = world.topology();
        topology.node(&world.nodes[0].instance).unwrap().place.links().unwrap()
    };
    assert_eq!(names().len(), 1);
    let (eni, attachment) = attach(&world, 0);
    let links = names();
    let second = links.iter().find(|link| link.name == "eth1").unwrap();
    let mac = world.cloud.vpc().interfaces().find(|found| found.id == eni).unwrap().mac;
    assert_eq!((second.mac, second.mtu, second.up), (mac, 9001, false));
    assert_eq!(world.topology().link_names(&world.nodes[0].instance)[&eni], "eth1");
    call(&world, &Call::Detach(attachment));
    assert_eq!(names().len(), 1);
}

#[test]
fn ec2_and_imds_answer_on_the_node() {
    let world = world("services", 2);
    for node in &world.nodes {
        // By its name in the run's directory, as an operator would.
        let net = Namespace::open(world.topology().run().path().join("netns").join(&node.name)).unwrap();
        let told = net.run(|| {
            let imds = Arc::new(imds::Client::new(imds::Config::at(format!("http://{IMDS}"))).unwrap());
            let told = imds.identity(false).unwrap();
            let chain = Arc::new(creds::Chain::from_env(|_| None, imds).unwrap());
            let client = ec2::Client::new(ec2::Config::at(format!("http://{EC2}"), REGION), chain).unwrap();
            let Reply::Interfaces(list) = client.execute(&Call::DescribeAttached(told.instance.clone())).unwrap()
            else {
                panic!()
            };
            assert_eq!(list.len(), 1);
            told
        });
        let told = told.unwrap();
        assert_eq!((told.instance, told.local_ipv4), (node.instance.clone(), node.address));
    }
    assert_eq!(world.cloud.complaints(), Vec::<String>::new());
}

#[test]
fn each_node_has_its_own_run_and_pods() {
    let world = world("run", 2);
    let topology = world.topology();
    let [first, second] = [0, 1].map(|index| topology.node(&world.nodes[index].instance).unwrap());
    first.inside(|| Ok(std::fs::write("/run/aws-node/mark", "x")?)).unwrap();
    assert!(second.inside(|| Ok(!std::path::Path::new("/run/aws-node/mark").exists())).unwrap());
    assert!(!std::path::Path::new("/run/aws-node/mark").exists());
    let pod = first.create_pod("cni-1").unwrap();
    assert!(first.inside(|| Ok(std::path::Path::new("/var/run/netns/cni-1").exists())).unwrap());
    assert!(pod.place.links().unwrap().is_empty());
    let output = first.command("/bin/sh").unwrap().args(["-c", "ls /run/netns /run/aws-node"]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "/run/aws-node:\nmark\n\n/run/netns:\ncni-1\n");
    first.delete_pod(pod).unwrap();
    assert!(first.inside(|| Ok(!std::path::Path::new("/run/netns/cni-1").exists())).unwrap());
}

#[test]
fn nothing_is_left() {
    let world = world("left", 1);
    let directory = world.topology().run().path().to_owned();
    assert!(directory.join("netns/node-1").exists(), "the name leads to the namespace");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("enibox-topology"), "nothing is mounted on the host");
    drop(world);
    assert!(!directory.exists());
    assert!(!home("left").exists());
}
