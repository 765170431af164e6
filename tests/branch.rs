//! Pods with a branch ENI on a real kernel: a node whose trunk leads to a router that has the other end of the VLAN. They
//! need a kernel with VLAN devices; on one without they say so and end, and run in the virtual machine of `tests/vm`.

mod support;

use enibox::apply::Host;
use enibox::model::cni::EnforcingMode;
use enibox::model::net::{Address, Family, Link, Mac, Neighbour, Route, Rule, Scope, TABLE_MAIN};
use enibox::model::wire::{AddNetworkReply, IpAllocation};
use enibox::netlink::{addr, link, neigh, route, rule, sysctl};
use enibox::plan::branch::Branch;
use enibox::plan::host::{HostBranch, HostEni, Intent};
use enibox::plan::pod::{Pod, PodInterface, Removal, RemovedAddress, Request};
use ipnet::IpNet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Once;
use support::Netns;
use support::traffic::tcp;

const PRIMARY: Mac = Mac([2, 0, 0, 0, 11, 162]);
const TRUNK: Mac = Mac([2, 0, 0, 0, 12, 5]);
const BRANCH: Mac = Mac([2, 0, 0, 0, 13, 70]);
const VLAN: u16 = 7;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// Whether this kernel has VLAN devices; says so once if not.
fn has_vlan() -> bool {
    static SAID: Once = Once::new();
    let scratch = Netns::new("scratch");
    let mut socket = scratch.route();
    let end = |name| link::End { name, mac: None, netns: None };
    let veth = link::Veth { end: end("a"), peer: end("b"), mtu: 1500, up: false };
    socket.run(&[link::create_veth(&veth)]).unwrap();
    let lower = link::by_name(&mut socket, "a").unwrap().unwrap().index;
    let has = socket.run(&[link::create_vlan("a.1", lower, 1, None)]).is_ok();
    if !has {
        // Straight to the descriptor: a captured line would be a silent skip.
        let line = b"SKIP: no vlan device in this kernel\n";
        SAID.call_once(|| _ = std::io::Write::write_all(&mut std::io::stderr(), line));
    }
    has
}

/// What the two families call the same things.
struct Names {
    family: Family,
    node: &'static str,
    gateway: &'static str,
    pod: &'static str,
    next_pod: &'static str,
    /// Of the router, seen as the rest of the world.
    outside: &'static str,
    branch_gateway: &'static str,
}

const V4: Names = Names {
    family: Family::V4,
    node: "10.20.11.162/24",
    gateway: "10.20.11.1",
    pod: "10.20.13.70",
    next_pod: "10.20.13.71",
    outside: "203.0.113.10",
    branch_gateway: "10.20.13.1",
};

const V6: Names = Names {
    family: Family::V6,
    node: "2001:db8:11::162/64",
    gateway: "fe80:ec2::1",
    pod: "2001:db8:13::70",
    next_pod: "2001:db8:13::71",
    outside: "2001:db8:113::10",
    branch_gateway: "fe80:ec2::1",
};

/// A node with a primary ENI and a trunk, and the router that both lead to.
struct World {
    node: Netns,
    router: Netns,
    trunk: u32,
    names: &'static Names,
}

fn on(dev: u32, dst: &str) -> Route {
    Route { table: TABLE_MAIN, dst: net(dst), gateway: None, dev, scope: Scope::Link, prefsrc: None, metric: 0 }
}

fn plain(dev: u32, text: &str) -> Address {
    Address { dev, addr: net(text), no_prefix_route: false, no_dad: text.contains(':') }
}

fn single(text: &str) -> String {
    format!("{text}/{}", if text.contains(':') { 128 } else { 32 })
}

impl World {
    fn new(names: &'static Names) -> World {
        let (node, router) = (Netns::new("node"), Netns::new("router"));
        for netns in [&node, &router] {
            netns.run(|| {
                sysctl::set("net/ipv4/ip_forward", "1").unwrap();
                // Without it TCP of the node to a pod in strict mode finds its socket before the rules have a say.
                sysctl::set("net/ipv4/tcp_early_demux", "0").unwrap();
                sysctl::set("net/ipv6/conf/default/accept_dad", "0").unwrap();
                sysctl::set("net/ipv6/conf/all/forwarding", "1").unwrap();
            });
        }
        let (mut inside, mut outside) = (node.route(), router.route());
        let mut plug = |name: &str, peer: &str, mac: Mac| {
            let end = |name, mac, netns| link::End { name, mac, netns };
            let far = end(peer, None, Some(router.handle().as_fd()));
            let veth = link::Veth { end: end(name, Some(mac), None), peer: far, mtu: 1500, up: false };
            inside.run(&[link::create_veth(&veth)]).unwrap();
            let link = link::by_name(&mut inside, name).unwrap().unwrap();
            inside.run(&[link::set_up(link.index)]).unwrap();
            (link.index, link.parent.unwrap())
        };
        let ((eth0, near), (eth1, far)) = (plug("eth0", "near", PRIMARY), plug("eth1", "far", TRUNK));
        outside.run(&[link::set_up(near), link::set_up(far), link::create_vlan("branch", far, VLAN, None)]).unwrap();
        let branch = link::by_name(&mut outside, "branch").unwrap().unwrap().index;
        let lo = link::by_name(&mut outside, "lo").unwrap().unwrap().index;
        // As in a VPC, frames go to the ENI that has the address, and nobody is asked for a MAC.
        let known =
            |dev, addr: &str, mac| Neighbour { dev, addr: ip(addr), mac: Some(mac), permanent: true, noarp: false };
        let own = names.node.split('/').next().unwrap();
        outside
            .run(&[
                link::set_up(branch),
                addr::add(&plain(near, &single(names.gateway))),
                addr::add(&plain(branch, &single(names.branch_gateway))),
                addr::add(&plain(lo, &single(names.outside))),
                route::replace(&on(near, &single(own))),
                neigh::replace(&known(near, own, PRIMARY)),
                route::replace(&on(branch, &single(names.pod))),
                neigh::replace(&known(branch, names.pod, BRANCH)),
                route::replace(&on(branch, &single(names.next_pod))),
                neigh::replace(&known(branch, names.next_pod, BRANCH)),
            ])
            .unwrap();
        let everything = if names.family == Family::V4 { "0.0.0.0/0" } else { "::/0" };
        let default = Route { gateway: Some(ip(names.gateway)), scope: Scope::Universe, ..on(eth0, everything) };
        inside.run(&[addr::add(&plain(eth0, names.node)), route::add(&default)]).unwrap();
        World { node, router, trunk: eth1, names }
    }

    fn node_ip(&self) -> IpAddr {
        self.names.node.split('/').next().unwrap().parse().unwrap()
    }

    fn intent(&self, strict: bool, pods: &[(&str, &str)]) -> Intent {
        let v6 = self.names.family == Family::V6;
        let own = net(if v6 { "2001:db8:12::5/64" } else { "10.20.12.5/24" });
        let gateway = ip(if v6 { "fe80:ec2::1" } else { "10.20.12.1" });
        let trunk = HostEni { id: "eni-2".into(), mac: TRUNK, card: 0, device: 1, own, gateway, table: 2, trunk: true };
        let branches = pods.iter().map(|(name, address)| HostBranch {
            address: ip(address),
            eni: Branch::new(VLAN, BRANCH, ip(self.names.branch_gateway)).unwrap(),
            name: format!("default/{name}"),
            veth: enibox::model::naming::suffix("default", name, 0),
        });
        Intent {
            v6,
            node_ip: self.node_ip(),
            primary_mac: PRIMARY,
            eni_mtu: 1500,
            vpc_cidrs: vec![net(if v6 { "2001:db8::/32" } else { "10.20.0.0/16" })],
            enis: vec![trunk],
            branches: branches.collect(),
            strict_branches: strict,
            ..Intent::default()
        }
    }

    /// The daemon's part; what it did.
    fn host(&self, intent: &Intent) -> Vec<String> {
        let report = self.node.run(|| Host::open()?.host(intent)).unwrap();
        assert!(report.errors.is_empty(), "{:?}", report.errors);
        for (eni, result) in &report.enis {
            assert!(result.is_ok(), "{eni}: {result:?}");
        }
        report.steps.into_iter().map(|step| step.text).collect()
    }

    fn pod(&self, name: &str, address: &str, mode: EnforcingMode) -> Pod {
        self.pod_on(name, address, mode, self.trunk)
    }

    fn pod_on(&self, name: &str, address: &str, mode: EnforcingMode, trunk: u32) -> Pod {
        let (ipv4, ipv6) = if address.contains(':') { ("", address) } else { (address, "") };
        let allocation = IpAllocation { ipv4: ipv4.into(), ipv6: ipv6.into(), device_number: -1, route_table_id: 0 };
        let reply = AddNetworkReply {
            success: true,
            allocations: vec![allocation],
            pod_vlan_id: VLAN.into(),
            pod_eni_mac: BRANCH.to_string(),
            pod_eni_subnet_gw: self.names.branch_gateway.into(),
            parent_if_index: i32::try_from(trunk).unwrap(),
            ..AddNetworkReply::default()
        };
        let request = Request {
            namespace: "default".into(),
            name: name.into(),
            netns: "/var/run/netns/cni-test".into(),
            ifname: "eth0".into(),
            veth_prefix: "eni".into(),
            mtu: 1500,
            enforcing_mode: mode,
        };
        Pod::from_reply(&reply, &request, || Ok([0x02, 1, 2, 3, 4, u8::try_from(name.len()).unwrap()])).unwrap()
    }

    fn add(&self, pod: &Pod, sandbox: &Netns) -> enibox::error::Result<()> {
        self.node.run(|| Host::open()?.add_pod(pod, sandbox.handle()))
    }

    fn del(&self, pod: &Pod) {
        let branch = pod.interfaces.iter().find_map(PodInterface::removed_branch);
        let gone = |one: &PodInterface| RemovedAddress { address: one.address, table: one.table };
        let removal = Removal { addresses: pod.interfaces.iter().map(gone).collect(), branch, ..Removal::default() };
        self.node.run(|| Host::open()?.del_pod(&removal, None)).unwrap();
    }

    fn check(&self, pod: &Pod, sandbox: &Netns) -> Vec<String> {
        self.node.run(|| Host::open()?.check_pod(pod, sandbox.handle())).unwrap()
    }

    fn link(&self, name: &str) -> Option<Link> {
        link::by_name(&mut self.node.route(), name).unwrap()
    }

    /// Names of links, rules, and routes of all tables, a line each; what the kernel makes for link-local addresses aside.
    fn state(&self) -> Vec<String> {
        let mut socket = self.node.route();
        let links = link::list(&mut socket).unwrap();
        let mut lines: Vec<_> = links.iter().map(|link| link.name.clone()).collect();
        lines.extend(rule::list(&mut socket, self.names.family).unwrap().iter().map(ToString::to_string));
        for route in route::list(&mut socket, self.names.family, None).unwrap() {
            let name = links.iter().find(|link| link.index == route.dev).map_or("", |link| &link.name);
            lines.push(route.to_string().replace(&format!("dev if{}", route.dev), &format!("dev {name}")));
        }
        lines.retain(|line| !line.starts_with("fe80::/"));
        lines.sort();
        lines
    }

    fn to_world(&self, sandbox: &Netns) -> std::io::Result<IpAddr> {
        tcp(sandbox, &self.router, ip(self.names.outside))
    }

    /// What the router does not send to the branch ENI any more.
    fn cut(&self, pod: &str, cut: bool) {
        let mut socket = self.router.route();
        let dev = link::by_name(&mut socket, "branch").unwrap().unwrap().index;
        let route = on(dev, &single(pod));
        socket.run(&[if cut { route::delete(&route) } else { route::replace(&route) }]).unwrap();
    }
}

fn sandbox() -> Netns {
    Netns::new("pod")
}

/// One life in both families: ADD, packets, CHECK, DEL, and nothing is left.
fn life(mode: EnforcingMode) {
    for names in [&V4, &V6] {
        let world = World::new(names);
        let strict = mode == EnforcingMode::Strict;
        let intent = world.intent(strict, &[("sample-pod", names.pod)]);
        world.host(&intent);
        let before = world.state();
        let (pod, sandbox) = (world.pod("sample-pod", names.pod, mode), sandbox());
        world.add(&pod, &sandbox).unwrap();
        assert_eq!(world.check(&pod, &sandbox), Vec::<String>::new());
        let veth = &pod.interfaces[0].host_veth;
        assert_eq!(veth, if strict { "vlancc21c2d7785" } else { "enicc21c2d7785" });
        let device = world.link("vlan.eth.7").unwrap();
        let got = (device.kind.as_deref(), device.mac, device.up, device.parent, device.mtu);
        assert_eq!(got, (Some("vlan"), Some(BRANCH), true, Some(world.trunk), 1500));
        let sysctl = |key: &str| world.node.run(|| sysctl::read(&format!("net/ipv6/conf/vlan.eth.7/{key}"))).unwrap();
        assert_eq!(["accept_ra", "accept_redirects", "forwarding"].map(sysctl), ["0", "1", "0"]);

        assert_eq!(world.host(&intent), Vec::<String>::new(), "the daemon wants what the plugin has made");
        let (pod_ip, node_ip) = (ip(names.pod), world.node_ip());
        // IPv4 in standard mode is SNATed to the node when it leaves the VPC, as an ordinary pod's.
        let seen = if strict || names.family == Family::V6 { pod_ip } else { node_ip };
        assert_eq!(world.to_world(&sandbox).unwrap(), seen);
        assert_eq!(tcp(&world.router, &sandbox, pod_ip).unwrap(), ip(names.branch_gateway_seen()), "from the VPC");
        // Over the veth, which has no global address, IPv6 takes any of the node's.
        let from_node = tcp(&world.node, &sandbox, pod_ip).unwrap();
        assert!(from_node == node_ip || (!strict && from_node == intent.enis[0].own.addr()), "{from_node}");
        assert_eq!(tcp(&sandbox, &world.node, node_ip).unwrap(), pod_ip);
        // Only in strict mode the node's own traffic goes through the VPC.
        world.cut(names.pod, true);
        assert_eq!(tcp(&world.node, &sandbox, pod_ip).is_err(), strict);
        world.cut(names.pod, false);

        world.del(&pod);
        drop(sandbox);
        wait_for(|| world.link(veth).is_none());
        assert_eq!(world.state(), before);
        world.del(&pod);
        assert_eq!(world.state(), before);
    }
}

impl Names {
    /// The address that the router itself sends from towards a pod.
    fn branch_gateway_seen(&self) -> &'static str {
        if self.family == Family::V4 { self.branch_gateway } else { self.outside }
    }
}

/// The kernel takes down the links of a namespace that is gone in its own time.
fn wait_for(done: impl Fn() -> bool) {
    let end = enibox::clock::instant() + std::time::Duration::from_secs(20);
    while !done() {
        assert!(enibox::clock::instant() < end, "it does not happen");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn a_strict_pod_lives_behind_its_own_eni() {
    if has_vlan() {
        life(EnforcingMode::Strict);
    }
}

#[test]
fn a_standard_pod_is_near_its_node() {
    if has_vlan() {
        life(EnforcingMode::Standard);
    }
}

#[test]
fn what_others_take_away_comes_back_while_packets_flow() {
    if !has_vlan() {
        return;
    }
    for names in [&V4, &V6] {
        let world = World::new(names);
        let intent = world.intent(true, &[("sample-pod", names.pod)]);
        world.host(&intent);
        let (pod, sandbox) = (world.pod("sample-pod", names.pod, EnforcingMode::Strict), sandbox());
        world.add(&pod, &sandbox).unwrap();
        let whole = world.state();
        let mut socket = world.node.route();
        for rule in rule::list(&mut socket, names.family).unwrap().iter().filter(|rule| rule.priority <= 20) {
            socket.run(&[rule::delete(rule)]).unwrap();
        }
        let device = world.link("vlan.eth.7").unwrap().index;
        // Takes the routes over the device with it.
        socket.run(&[link::set_down(device), link::set_mac(device, Mac([2, 0, 0, 0, 0, 1]))]).unwrap();
        let veth = world.link(&pod.interfaces[0].host_veth).unwrap().index;
        let eni = Branch::new(VLAN, BRANCH, ip(names.branch_gateway)).unwrap();
        socket.run(&[route::delete(&eni.pod_route(ip(names.pod), veth))]).unwrap();
        assert!(!world.check(&pod, &sandbox).is_empty());
        // A route over a link that is down is refused: the second round makes it.
        world.node.run(|| Host::open()?.host(&intent)).unwrap();
        world.host(&intent);
        assert_eq!(world.state(), whole);
        assert_eq!(world.host(&intent), Vec::<String>::new());
        assert_eq!(world.check(&pod, &sandbox), Vec::<String>::new());
        assert_eq!(world.to_world(&sandbox).unwrap(), ip(names.pod));
    }
}

#[test]
fn adding_again_and_taking_a_vlan_over() {
    if !has_vlan() {
        return;
    }
    let world = World::new(&V4);
    world.host(&world.intent(true, &[]));
    let before = world.state();
    let (first, second) = (sandbox(), sandbox());
    let pod = world.pod("sample-pod", V4.pod, EnforcingMode::Strict);
    world.add(&pod, &first).unwrap();
    let whole = world.state();
    world.add(&pod, &first).unwrap();
    assert_eq!(world.state(), whole, "the same sandbox again");
    // The plugin did not hear of the first one's end; its VLAN goes to another pod, in another mode.
    drop(first);
    wait_for(|| world.link(&pod.interfaces[0].host_veth).is_none());
    let other = world.pod("other", V4.next_pod, EnforcingMode::Standard);
    world.add(&other, &second).unwrap();
    let taken = world.state();
    world.del(&pod);
    let late = world.state();
    assert_eq!(late, taken, "the VLAN is another pod's by now");
    assert_eq!(world.check(&other, &second), Vec::<String>::new());
    world.del(&other);
    drop(second);
    wait_for(|| world.link(&other.interfaces[0].host_veth).is_none());
    assert_eq!(world.state(), before);
}

/// Before Linux 6.2 a link must be down for another name, whoever gives it, and loses its routes and IPv6 addresses twice.
#[test]
fn a_renamed_veth_gets_its_name_and_all_its_ways_back() {
    if !has_vlan() {
        return;
    }
    for (names, mode) in
        [&V4, &V6].into_iter().flat_map(|names| [(names, EnforcingMode::Strict), (names, EnforcingMode::Standard)])
    {
        let world = World::new(names);
        let intent = world.intent(mode == EnforcingMode::Strict, &[("sample-pod", names.pod)]);
        world.host(&intent);
        let (pod, sandbox) = (world.pod("sample-pod", names.pod, mode), sandbox());
        world.add(&pod, &sandbox).unwrap();
        let (whole, seen) = (world.state(), world.to_world(&sandbox).unwrap());
        let name = &pod.interfaces[0].host_veth;
        let index = world.link(name).unwrap().index;
        let mut socket = world.node.route();
        for down in [false, true] {
            let live = socket.batch(&[link::rename(index, "odd0")]).unwrap().remove(0);
            let refused = live.is_err_and(|error| error.errno == libc::EBUSY);
            if down || refused {
                socket.run(&[link::set_down(index), link::rename(index, "odd0"), link::set_up(index)]).unwrap();
            }
            let done = world.host(&intent);
            println!(
                "{mode:?} {}: renaming what is up is {}: {done:?}",
                names.pod,
                if refused { "refused" } else { "done" }
            );
            assert!(done.contains(&format!("set name {name} on odd0")), "{done:?}");
            assert_eq!(world.state(), whole);
            assert_eq!(world.host(&intent), Vec::<String>::new());
            assert_eq!(world.check(&pod, &sandbox), Vec::<String>::new());
            assert_eq!(world.to_world(&sandbox).unwrap(), seen);
            tcp(&world.node, &sandbox, ip(names.pod)).unwrap();
            tcp(&world.router, &sandbox, ip(names.pod)).unwrap();
        }
    }
}

/// What a pod has left of which no DEL came goes; a pod that lives stays, and so does one whose ADD is not over. Nobody has
/// told of any of them: the API server is away.
#[test]
fn what_a_former_pod_has_left_goes_and_living_pods_stay() {
    if !has_vlan() {
        return;
    }
    for (names, mode) in
        [&V4, &V6].into_iter().flat_map(|names| [(names, EnforcingMode::Strict), (names, EnforcingMode::Standard)])
    {
        let world = World::new(names);
        let strict = mode == EnforcingMode::Strict;
        let unknown = world.intent(strict, &[]);
        world.host(&unknown);
        let before = world.state();
        let (pod, first) = (world.pod("sample-pod", names.pod, mode), sandbox());
        world.add(&pod, &first).unwrap();
        let (whole, seen) = (world.state(), world.to_world(&first).unwrap());
        let kept = |what: &str| {
            assert_eq!(world.host(&unknown), Vec::<String>::new(), "{what}");
            assert_eq!(world.state(), whole, "{what}");
        };
        kept("a living pod");
        assert_eq!(world.check(&pod, &first), Vec::<String>::new());
        assert_eq!(world.to_world(&first).unwrap(), seen);

        // Its routes and rules are flushed, as networkd does: the veth alone is left.
        let mut socket = world.node.route();
        let device = world.link("vlan.eth.7").unwrap();
        let table = 100 + u32::from(VLAN);
        let ours = |rule: &Rule| rule.table == table || rule.dst == Some(IpNet::from(ip(names.pod)));
        let rules = rule::list(&mut socket, names.family).unwrap();
        for rule in rules.iter().filter(|rule| ours(rule)) {
            socket.run(&[rule::delete(rule)]).unwrap();
        }
        for route in route::list(&mut socket, names.family, None).unwrap() {
            if route.table == table || route.dst == IpNet::from(ip(names.pod)) {
                socket.run(&[route::delete(&route)]).unwrap();
            }
        }
        assert!(!world.host(&unknown).iter().any(|step| step.starts_with("delete VLAN")), "a pod that was flushed");
        assert_eq!(world.link("vlan.eth.7").map(|link| link.index), Some(device.index));
        world.add(&pod, &first).unwrap();
        kept("it is whole again");

        // An ADD that has come as far as the device.
        drop(first);
        wait_for(|| world.link(&pod.interfaces[0].host_veth).is_none());
        let other = world.pod("other", names.next_pod, mode);
        let end = |name, mac, netns| link::End { name, mac, netns };
        let half = sandbox();
        let peer = end("eth0", None, Some(half.handle().as_fd()));
        let veth = link::Veth { end: end(&other.interfaces[0].host_veth, None, None), peer, mtu: 1500, up: false };
        socket.run(&[link::create_veth(&veth)]).unwrap();
        let half_way = world.state();
        world.host(&unknown);
        assert_eq!(world.state(), half_way, "an ADD is under way");
        drop(half);
        wait_for(|| world.link(&other.interfaces[0].host_veth).is_none());

        let done = world.host(&unknown);
        assert!(done[0].starts_with("delete VLAN device vlan.eth.7 (index "), "{done:?}");
        assert!(world.link("vlan.eth.7").is_none());
        let gone: Vec<_> = world.state().into_iter().filter(|line| !before.contains(line)).collect();
        // The way in to an address that nobody has leads nowhere; the doctor tells of it.
        let left = if strict { Vec::new() } else { vec![format!("512: from all to {} lookup main", names.pod)] };
        assert_eq!(gone, left);
        assert_eq!(world.host(&unknown), Vec::<String>::new());
    }
}

/// What a strict pod has left does not divert the pod that gets its VLAN in standard mode.
#[test]
fn a_standard_pod_takes_the_vlan_of_a_strict_one_over() {
    if !has_vlan() {
        return;
    }
    for names in [&V4, &V6] {
        let world = World::new(names);
        world.host(&world.intent(false, &[]));
        let (first, second) = (sandbox(), sandbox());
        let strict = world.pod("sample-pod", names.pod, EnforcingMode::Strict);
        world.add(&strict, &first).unwrap();
        drop(first);
        wait_for(|| world.link(&strict.interfaces[0].host_veth).is_none());
        let pod = world.pod("other", names.next_pod, EnforcingMode::Standard);
        world.add(&pod, &second).unwrap();
        let rules = rule::list(&mut world.node.route(), names.family).unwrap();
        assert!(!rules.iter().any(|rule| rule.priority == 10), "{rules:?}");
        assert_eq!(world.host(&world.intent(false, &[("other", names.next_pod)])), Vec::<String>::new());
        tcp(&world.router, &second, ip(names.next_pod)).unwrap();
    }
}

#[test]
fn a_name_that_is_no_vlan_device_is_left_alone() {
    let node = Netns::new("node");
    let mut socket = node.route();
    let end = |name| link::End { name, mac: None, netns: None };
    let veth = link::Veth { end: end("vlan.eth.7"), peer: end("far"), mtu: 1500, up: false };
    socket.run(&[link::create_veth(&veth)]).unwrap();
    let world = World { node, router: Netns::new("router"), trunk: 1, names: &V4 };
    let before = world.state();
    let pod = world.pod("sample-pod", V4.pod, EnforcingMode::Strict);
    world.add(&pod, &sandbox()).unwrap_err();
    assert_eq!(world.state(), before, "what a failed ADD made is undone");
    let stray = Rule { iif: Some("vlan.eth.7".into()), ..Rule::any(Family::V4, 10, 107) };
    socket.run(&[rule::add(&stray)]).unwrap();
    world.del(&pod);
    assert_eq!(world.state(), before, "the link stays, the rules of the table go");
}
