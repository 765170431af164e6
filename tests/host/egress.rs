//! The host's end of a way out in the other family, made while others are at work on it.

use super::{World, ip};
use enibox::apply::Host;
use enibox::clock;
use enibox::netlink::{addr, link};
use enibox::plan::egress::{Egress, host_veth};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long ADDs are made until somebody was faster once; who is first differs from one to the next.
const LIMIT: Duration = Duration::from_mins(1);

// As the daemon does when it looks at an end whose ADD is not over.
#[test]
fn an_address_that_is_there_already_does_not_fail_an_add() {
    let (world, pod) = (World::new(), crate::support::Netns::new("pod"));
    let mut socket = world.node.route();
    let mut faster = |number: u8| {
        let range = "169.254.172.7/22".parse().unwrap();
        let egress = Egress::new(range, Some(ip("169.254.172.1")), "eth0", 1500, [number; 16]).unwrap();
        let name = host_veth(egress.number);
        let over = AtomicBool::new(false);
        let (added, first) = std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                let mut socket = world.node.route();
                while !over.load(Ordering::Relaxed) {
                    if let Some(link) = link::by_name(&mut socket, &name).unwrap() {
                        let address = egress.host_end(&name).address(link.index);
                        return socket.run(&[addr::add_for_link(&address)]).is_ok();
                    }
                }
                false
            });
            let added = world.node.run(|| Host::open()?.add_egress(&egress, pod.handle()));
            over.store(true, Ordering::Relaxed);
            (added, other.join().unwrap())
        });
        assert_eq!(added.unwrap(), name, "somebody was faster: {first}");
        let (seen, link) = (world.observe(), link::by_name(&mut socket, &name).unwrap().unwrap());
        let end = egress.host_end(&name);
        assert!(seen.addresses.contains(&end.address(link.index)), "{:?}", seen.addresses);
        assert!(seen.routes.contains(&end.route(link.index)), "{:?}", seen.routes);
        socket.run(&[link::delete(link.index)]).unwrap();
        first
    };
    let end = clock::instant() + LIMIT;
    let mut tries = 1;
    while !faster(u8::try_from(tries % 250).unwrap()) {
        assert!(clock::instant() < end, "never in {tries} ADDs: what is tested did not happen");
        tries += 1;
    }
    println!("somebody was faster at ADD number {tries}");
}
