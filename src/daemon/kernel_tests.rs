//! The thread that owns the host's network, on a kernel with VLAN devices: what pods with branch ENIs leave, and the end of one
//! while it is being mended.

use super::*;
use crate::model::cni::EnforcingMode;
use crate::model::net::{Family, Link, Mac, Rule, TABLE_MAIN};
use crate::model::wire::{AddNetworkReply, IpAllocation};
use crate::netlink::netns::Namespace;
use crate::netlink::{Socket, link, route, rule};
use crate::plan::branch::{Branch, link_route};
use crate::plan::host::{HostBranch, HostEni, HostPod};
use crate::plan::pod::{Pod, Removal, RemovedAddress, Request};

const PRIMARY: Mac = Mac([2, 0, 0, 0, 11, 162]);
const TRUNK: Mac = Mac([2, 0, 0, 0, 12, 5]);

/// The namespace of the calling thread: the links of a primary ENI and of a trunk.
fn node(socket: &mut Socket) -> (Intent, Link) {
    let end = |name, mac| link::End { name, mac, netns: None };
    for (name, peer, mac) in [("eth0", "near", PRIMARY), ("eth1", "far", TRUNK)] {
        let veth = link::Veth { end: end(name, Some(mac)), peer: end(peer, None), mtu: 1500, up: true };
        socket.run(&[link::create_veth(&veth)]).unwrap();
    }
    let trunk = HostEni {
        id: "eni-2".into(),
        mac: TRUNK,
        card: 0,
        device: 1,
        own: "10.20.12.5/24".parse().unwrap(),
        gateway: "10.20.12.1".parse().unwrap(),
        table: 2,
        trunk: true,
    };
    let intent = Intent {
        node_ip: "10.20.11.162".parse().unwrap(),
        primary_mac: PRIMARY,
        eni_mtu: 1500,
        external_snat: true,
        node_port: false,
        enis: vec![trunk],
        ..Intent::default()
    };
    (intent, link::by_name(socket, "eth1").unwrap().unwrap())
}

/// What a strict pod on VLAN 7 has left; false where the kernel knows no VLAN devices.
fn leave_behind(socket: &mut Socket, trunk: &Link) -> bool {
    if socket.run(&[link::create_vlan("vlan.eth.7", trunk.index, 7, None)]).is_err() {
        // Straight to the descriptor: a captured line would be a silent skip.
        let line = b"SKIP: no vlan device in this kernel\n";
        _ = Write::write_all(&mut std::io::stderr(), line);
        return false;
    }
    let iif = |name: &str| Rule { iif: Some(name.into()), ..Rule::any(Family::V4, 10, 107) };
    let rules = ["vlan.eth.7", "vlan0000000000c"].map(|name| rule::add(&iif(name)));
    socket.run(&rules).unwrap();
    true
}

/// Whether the device is there, and how many rules lead to its table.
fn left(socket: &mut Socket) -> (bool, usize) {
    let rules = rule::list(socket, Family::V4).unwrap();
    let device = link::by_name(socket, "vlan.eth.7").unwrap();
    (device.is_some(), rules.iter().filter(|rule| rule.table == 107).count())
}

#[test]
fn a_vlan_device_without_a_pod_goes_after_its_time_and_its_rules_with_it() {
    let body = || {
        crate::sys::unshare_netns().unwrap();
        let mut socket = Socket::route().unwrap();
        let (intent, trunk) = node(&mut socket);
        if !leave_behind(&mut socket, &trunk) {
            return;
        }
        let metrics = Metrics::new();
        let mut keeper = Keeper::open(&metrics).unwrap();
        let (sender, events) = sync_channel(1);
        let at = |seconds: u64| Mono::from_nanos(seconds * 1_000_000_000);
        // What the core asks for every half minute, and what the kernel's notices lead to.
        let apply = |keeper: &mut Keeper<'_>, seconds: u64| {
            keeper.work(at(seconds), Work::Apply(seconds, Box::new(intent.clone())), &sender).unwrap();
            match events.recv().unwrap() {
                Event::Kernel(op, result) => assert!(op == seconds && result.is_ok(), "{result:?}"),
                other => panic!("{other:?}"),
            }
        };
        let never_longer = Idle::MIN.as_secs();
        for (first, by_notice) in [(1000, false), (5000, true)] {
            for seconds in [first, first + 30, first + never_longer - 1] {
                apply(&mut keeper, seconds);
                keeper.look(at(seconds));
                assert_eq!(left(&mut socket), (true, 2), "{seconds} s");
            }
            let due = first + never_longer;
            if by_notice {
                keeper.look(at(due));
            } else {
                apply(&mut keeper, due);
            }
            assert_eq!(left(&mut socket), (false, 0), "{due} s");
            assert!(leave_behind(&mut socket, &trunk), "the next pod's");
        }
        // Its time counts from when it was seen first.
        apply(&mut keeper, 9000);
        assert_eq!(left(&mut socket), (true, 2));
    };
    std::thread::spawn(body).join().unwrap();
}

#[test]
fn what_the_kernel_refuses_is_not_fought_over() {
    let body = || {
        crate::sys::unshare_netns().unwrap();
        let (mut intent, _) = node(&mut Socket::route().unwrap());
        // More than a veth takes.
        intent.eni_mtu = 70_000;
        let metrics = Metrics::new();
        let mut keeper = Keeper::open(&metrics).unwrap();
        let (sender, events) = sync_channel(1);
        let at = |seconds: u64| Mono::from_nanos(seconds * 1_000_000_000);
        for round in 0..2 * u64::from(Quarrels::TIMES_MAX) {
            let work = Work::Apply(round, Box::new(intent.clone()));
            keeper.work(at(1000 + 30 * round), work, &sender).unwrap();
            let Event::Kernel(_, Err(error)) = events.recv().unwrap() else { panic!("the kernel takes everything") };
            assert!(error.contains("set mtu 70000 on eth0"), "{error}");
        }
        let steps = diff(&intent, &keeper.host.observe().unwrap()).unwrap().steps;
        let step = steps.iter().find(|step| step.what == What::PrimaryMtu).unwrap();
        assert_eq!(keeper.quarrels.judge(at(1275), step, false), Verdict::Mend);
    };
    std::thread::spawn(body).join().unwrap();
}

#[test]
fn a_core_without_room_is_told_of_a_repair_later() {
    let body = || {
        crate::sys::unshare_netns().unwrap();
        let metrics = Metrics::new();
        let mut keeper = Keeper::open(&metrics).unwrap();
        let (sender, events) = sync_channel(1);
        let at = |seconds: u64| Mono::from_nanos(seconds * 1_000_000_000);
        let mend = |keeper: &mut Keeper<'_>, seconds: u64, number: u32| {
            let text = format!("add rule {number}");
            let action = Action::AddRule(Rule::any(Family::V4, 512, 254));
            let step = Step { what: What::ToPodRule, eni: None, action, text: text.clone() };
            let report = HostReport { steps: vec![step], ..HostReport::default() };
            keeper.tell(at(seconds), &report, &[text].into_iter().gather());
            keeper.pass_on(at(seconds), &sender);
        };
        let told = |event| match event {
            Ok(Event::Repaired(_, text)) => text,
            other => panic!("{other:?}"),
        };
        sender.send(Event::Seen(Err("something else".into()))).unwrap();
        mend(&mut keeper, 1000, 1);
        // The same again: one of a kind is enough.
        mend(&mut keeper, 1001, 2);
        events.try_recv().unwrap();
        keeper.pass_on(at(1002), &sender);
        assert_eq!(told(events.try_recv()), "add rule 1");
        keeper.pass_on(at(1003), &sender);
        mend(&mut keeper, 1002 + TELL_EVERY.as_secs() - 1, 3);
        assert!(events.try_recv().is_err(), "the core has heard of such a one");
        mend(&mut keeper, 1002 + TELL_EVERY.as_secs(), 4);
        assert_eq!(told(events.try_recv()), "add rule 4");
    };
    std::thread::spawn(body).join().unwrap();
}

const POD: &str = "10.20.13.70";

/// A pod on VLAN 7.
fn pod(trunk: &Link, mode: EnforcingMode) -> Pod {
    let request = Request {
        namespace: "default".into(),
        name: "sample-pod".into(),
        netns: "/var/run/netns/cni-test".into(),
        ifname: "eth0".into(),
        veth_prefix: "eni".into(),
        mtu: 1500,
        enforcing_mode: mode,
    };
    let allocation = IpAllocation { ipv4: POD.into(), device_number: -1, ..IpAllocation::default() };
    let reply = AddNetworkReply {
        success: true,
        allocations: vec![allocation],
        pod_vlan_id: 7,
        pod_eni_mac: Mac([2, 0, 0, 0, 13, 70]).to_string(),
        pod_eni_subnet_gw: "10.20.13.1".into(),
        parent_if_index: i32::try_from(trunk.index).unwrap(),
        ..AddNetworkReply::default()
    };
    Pod::from_reply(&reply, &request, || Ok([2, 1, 2, 3, 4, 5])).unwrap()
}

/// Links by name, IPv4 rules and routes.
fn state(socket: &mut Socket) -> Vec<String> {
    let mut lines: Vec<_> = link::list(socket).unwrap().into_iter().map(|link| link.name).collect();
    lines.extend(rule::list(socket, Family::V4).unwrap().iter().map(ToString::to_string));
    lines.extend(route::list(socket, Family::V4, None).unwrap().iter().map(ToString::to_string));
    lines.sort();
    lines
}

/// What a runtime and the core do with a pod beside the thread at its work: the DEL comes sooner or later after a fault that the
/// thread mends.
fn live_and_die(socket: &mut Socket, queue: &Queue, intents: [&Intent; 2], pod: &Pod, round: u64) {
    let [without, with] = intents;
    let directory = std::env::temp_dir().join(format!("enibox-kernel-{}", std::process::id()));
    let sandbox = Namespace::create_named(&directory, "pod").unwrap();
    let interface = &pod.interfaces[0];
    apply::Host::open().unwrap().add_pod(pod, &sandbox).unwrap();
    let give = |work| assert!(queue.try_send(work).is_ok());
    give(Work::Apply(round, Box::new(with.clone())));
    let device = link::by_name(socket, "vlan.eth.7").unwrap().unwrap().index;
    let rules = rule::list(socket, Family::V4).unwrap();
    let ours = |rule: &&Rule| rule.table == 107 || rule.priority == 512;
    let fault = match round % 3 {
        0 => rules.iter().filter(ours).map(rule::delete).collect::<Vec<_>>(),
        1 => vec![link::set_down(device)],
        _ => vec![link::delete(device)],
    };
    // A change that leads to a look comes when the one before it is over, or while it is under way.
    std::thread::sleep(Duration::from_millis(round % 7 * 5));
    socket.run(&fault).unwrap();
    std::thread::sleep(Duration::from_millis(round % 20));
    give(Work::Released(vec![interface.address], clock::now().mono));
    let removal = Removal {
        addresses: vec![RemovedAddress { address: interface.address, table: interface.table }],
        branch: interface.removed_branch(),
        ..Removal::default()
    };
    apply::Host::open().unwrap().del_pod(&removal, Some(&sandbox)).unwrap();
    // The API server has not told yet that it is gone.
    give(Work::Apply(round, Box::new(with.clone())));
    std::thread::sleep(Duration::from_millis(round % 5 * 4));
    drop(sandbox);
    Namespace::delete_named(&directory, "pod").unwrap();
    std::fs::remove_dir(&directory).unwrap();
    give(Work::Apply(round, Box::new(without.clone())));
}

fn done(events: &Receiver<Event>) {
    // What was put back meanwhile is told as well.
    let told = events.iter().find(|event| !matches!(event, Event::Repaired(..))).unwrap();
    assert!(matches!(told, Event::Kernel(_, Ok(_))), "{told:?}");
}

#[test]
fn a_branch_pod_that_goes_while_it_is_mended_leaves_nothing() {
    let body = || {
        crate::sys::unshare_netns().unwrap();
        let mut socket = Socket::route().unwrap();
        let (without, trunk) = node(&mut socket);
        if !leave_behind(&mut socket, &trunk) {
            return;
        }
        let device = link::by_name(&mut socket, "vlan.eth.7").unwrap().unwrap().index;
        socket.run(&[link::delete(device)]).unwrap();
        rule::delete_all(&mut socket, &Rule::any(Family::V4, 10, 107), &|_| true).unwrap();
        let eni = Branch::new(7, Mac([2, 0, 0, 0, 13, 70]), "10.20.13.1".parse().unwrap()).unwrap();
        let veth = crate::model::naming::suffix("default", "sample-pod", 0);
        let address = POD.parse().unwrap();
        let branch = HostBranch { address, eni, name: "default/sample-pod".into(), veth };
        let mut with = without.clone();
        with.branches.push(branch);
        let metrics = Metrics::new();
        let (queue, inbox) = queue().unwrap();
        let (sender, events) = sync_channel(1024);
        std::thread::scope(|scope| {
            let metrics = &metrics;
            let keeper = scope.spawn(move || run(&inbox, &sender, metrics));
            assert!(queue.try_send(Work::Apply(0, Box::new(without.clone()))).is_ok());
            done(&events);
            let before = state(&mut socket);
            for round in 0..120 {
                let mode = if round % 2 == 0 { EnforcingMode::Strict } else { EnforcingMode::Standard };
                live_and_die(&mut socket, &queue, [&without, &with], &pod(&trunk, mode), round);
                for _ in 0..3 {
                    done(&events);
                }
                let (end, mut looks) = (clock::instant() + Duration::from_secs(20), 0);
                while state(&mut socket) != before {
                    let now = state(&mut socket);
                    assert!(clock::instant() < end, "{round}, {mode:?}: {before:#?}, not {now:#?}");
                    std::thread::sleep(Duration::from_millis(50));
                    // A device that was being made again when the DEL looked for it is the sweep's, after its five minutes. Its
                    // rules must be gone by then.
                    let of_device = |line: &&String| *line == "vlan.eth.7" || line.contains(" table 107");
                    looks += 1;
                    if looks == 20 && now.iter().filter(|line| !of_device(line)).eq(&before) {
                        println!("{round}, {mode:?}: the device was made again");
                        socket.run(&[link::delete_by_name("vlan.eth.7").or_not_found()]).unwrap();
                    }
                    // The kernel takes the veth down in its own time; then it is for the core's regular look.
                    assert!(queue.try_send(Work::Apply(round, Box::new(without.clone()))).is_ok());
                    done(&events);
                }
            }
            drop(queue);
            keeper.join().unwrap().unwrap();
        });
    };
    std::thread::spawn(body).join().unwrap();
}

#[test]
fn what_was_put_back_for_a_pod_goes_only_while_it_cannot_be_the_next_ones() {
    let body = || {
        crate::sys::unshare_netns().unwrap();
        let mut socket = Socket::route().unwrap();
        let (without, _) = node(&mut socket);
        let address = "10.20.11.50".parse().unwrap();
        let eth0 = link::by_name(&mut socket, "eth0").unwrap().unwrap().index;
        socket.run(&[route::replace(&link_route(TABLE_MAIN, address, eth0))]).unwrap();
        let pod = HostPod { address, table: TABLE_MAIN, name: "default/one".into(), veth: String::new() };
        let with = Intent { pods: vec![pod], ..without.clone() };
        let broken = Intent { primary_mac: Mac([2, 0, 0, 0, 0, 9]), ..with.clone() };
        let way_in = Rule::to(address.into(), 512, TABLE_MAIN);
        let metrics = Metrics::new();
        let mut keeper = Keeper::open(&metrics).unwrap();
        let (sender, events) = sync_channel(1);
        // How long after the DEL the thread hears of it, and how long after it a round succeeds; and whether the rules go with that.
        for (case, (heard, round, gone)) in [(0, 1000, true), (0, 1900, true), (0, 2000, false), (2500, 2500, false)]
            .into_iter()
            .chain([(1900, 31_000, false)])
            .enumerate()
        {
            for regular in [false, true] {
                let begin = 1000 + 200 * case as u64 + 100 * u64::from(regular);
                let at = |millis: u64| Mono::from_nanos(begin * 1_000_000_000 + millis * 1_000_000);
                let apply = |keeper: &mut Keeper<'_>, now, intent: &Intent| {
                    keeper.work(now, Work::Apply(0, Box::new(intent.clone())), &sender).unwrap();
                    let Event::Kernel(_, result) = events.recv().unwrap() else { panic!("another event") };
                    result.is_ok()
                };
                socket.run(&[rule::delete(&way_in).or_not_found()]).unwrap();
                assert!(apply(&mut keeper, at(0), &with));
                keeper.work(at(heard), Work::Released(vec![address], at(0)), &sender).unwrap();
                assert!(!apply(&mut keeper, at(heard), &broken), "no link has that MAC");
                if regular {
                    assert!(apply(&mut keeper, at(round), &without));
                } else {
                    keeper.look(at(round));
                }
                let there = rule::list(&mut socket, Family::V4).unwrap().contains(&way_in);
                assert_eq!(there, !gone, "heard of after {heard} ms, a round after {round} ms, regular: {regular}");
            }
        }
    };
    std::thread::spawn(body).join().unwrap();
}
