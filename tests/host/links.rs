//! What others set on the host's ends of pods' veths: neighbour entries that the kernel believes for good, and settings.

use super::{NODE_IP, OUTSIDE, World, intent, ip, texts, warnings};
use crate::support::Netns;
use crate::support::pods::{add, pod_of};
use crate::support::traffic::tcp;
use enibox::apply::Host;
use enibox::model::net::{Mac, Neighbour};
use enibox::netlink::{link, neigh, sysctl};
use enibox::plan::host::What;

const WRONG: Mac = Mac([2, 0, 0, 0, 0, 0x96]);

#[test]
fn what_others_set_on_a_pods_veth_is_put_back() {
    let (world, netns) = (World::new(), Netns::new("pod"));
    world.host(&intent());
    world.assign("10.20.12.60");
    let wired = pod_of("two", &[("10.20.12.60", 2)]);
    add(&world.node, &wired, &netns).unwrap();
    let name = &wired.interfaces[0].host_veth;
    let mut wanted = intent();
    wanted.pods[1].veth = name[name.len() - 11..].to_owned();
    let mut host = world.node.run(Host::open).unwrap();
    assert_eq!(texts(&host.host(&wanted).unwrap()), Vec::<&str>::new());
    let mut socket = world.node.route();
    let [veth, eth1] = [name, "eth1"].map(|name| link::by_name(&mut socket, name).unwrap().unwrap());
    let right = link::mac_of_peer(&mut socket, veth.index).unwrap().unwrap();

    // One that tells the truth, one of another address and one on another link are nobody's business.
    let entry =
        |dev, address: &str, mac| Neighbour { dev, addr: ip(address), mac: Some(mac), permanent: true, noarp: false };
    let others = [
        entry(veth.index, "10.20.12.60", right),
        entry(veth.index, "10.20.12.61", WRONG),
        entry(eth1.index, "10.20.12.60", WRONG),
    ];
    socket.run(&others.map(|entry| neigh::replace(&entry))).unwrap();
    assert_eq!(texts(&host.host(&wanted).unwrap()), Vec::<&str>::new());

    for noarp in [false, true] {
        let wrong = Neighbour { noarp, permanent: !noarp, ..entry(veth.index, "10.20.12.60", WRONG) };
        socket.run(&[neigh::replace(&wrong)]).unwrap();
        assert!(tcp(&world.node, &netns, ip("10.20.12.60")).is_err(), "nothing reaches the pod");
        let report = host.host(&wanted).unwrap();
        assert_eq!(texts(&report), [format!("delete neighbour 10.20.12.60 lladdr {WRONG} dev {name}")]);
        assert_eq!((report.steps[0].what, warnings(&report)), (What::PodNeighbour, String::new()));
        assert_eq!(tcp(&netns, &world.router, ip(OUTSIDE)).unwrap(), ip(NODE_IP));
        tcp(&world.node, &netns, ip("10.20.12.60")).unwrap();
    }
    let left = neigh::list_static(&mut socket).unwrap();
    assert!(others[1..].iter().all(|entry| left.contains(entry)), "{left:?}");

    // Whoever was faster has done no harm.
    socket.run(&[neigh::replace(&entry(veth.index, "10.20.12.60", WRONG))]).unwrap();
    let report = host.host_with(&wanted, &mut |_, plan| {
        assert_eq!(plan.steps.len(), 1);
        world.node.route().run(&[neigh::delete(veth.index, ip("10.20.12.60"))]).unwrap();
    });
    let report = report.unwrap();
    assert_eq!((texts(&report), warnings(&report)), (Vec::new(), String::new()));

    for key in ["accept_ra", "accept_redirects", "forwarding"] {
        let path = format!("net/ipv6/conf/{name}/{key}");
        world.node.run(|| sysctl::set(&path, "1")).unwrap();
        assert_eq!(texts(&host.host(&wanted).unwrap()), [format!("set sysctl {path} to 0 instead of 1")]);
        assert_eq!(world.node.run(|| sysctl::read(&path)).unwrap(), "0");
    }
    // That of all links is nobody's single one.
    world.node.run(|| sysctl::set("net/ipv6/conf/all/forwarding", "1")).unwrap();
    assert_eq!(world.node.run(|| sysctl::read(&format!("net/ipv6/conf/{name}/forwarding"))).unwrap(), "1");
    assert_eq!(texts(&host.host(&wanted).unwrap()), Vec::<&str>::new());
}
