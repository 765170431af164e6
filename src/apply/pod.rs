//! A pod's network on the kernel: ADD, DEL, CHECK (`spec/plugin.md` 9, 10, 13, 14).
//!
//! ADD sends three batches: the veth, the host's side, the pod's side. It dumps nothing and, as long as nothing is in its
//! way, looks nothing up but the link it has made. A branch ENI (`branch`) takes two more, for its VLAN device. DEL lists
//! the tracked connections, and nothing that grows with the pods; the host's neighbour entry goes with the pod's link.

mod branch;

use super::mend::host_side;
use super::{Host, make_link, side};
use crate::clock;
use crate::error::{Context, Error, List, Result};
use crate::model::naming::{self, priority};
use crate::model::net::{Link, Rule, TABLE_MAIN};
use crate::netlink::netns::Namespace;
use crate::netlink::{KernelError, Outcome, Request, Socket, addr, conntrack, link, neigh, route, rule, sysctl};
use crate::plan::doctor::pods::check;
use crate::plan::pod::{Pod, PodInterface, Removal, RemovedAddress, link_route, pair};
use ipnet::IpNet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

/// How long IPv6 addresses may stay tentative.
const DAD_LIMIT: Duration = Duration::from_secs(10);
/// The first pause between two looks at them, and the longest: each is twice the one before.
const DAD_PAUSE: [Duration; 2] = [Duration::from_micros(50), Duration::from_millis(2)];

/// What an ADD has made so far.
#[derive(Default)]
struct Made {
    links: Vec<u32>,
    rules: Vec<Rule>,
}

impl Host {
    /// Wires the pod up. Repeating it for the same sandbox builds everything anew; on failure what this call made is gone
    /// again. A foreign interface of the name in the pod is an error that touches nothing.
    pub fn add_pod(&mut self, pod: &Pod, netns: &Namespace) -> Result<()> {
        let (mut inside, mut made) = (None, Made::default());
        for (number, interface) in pod.interfaces.iter().enumerate() {
            if let Err(error) = self.add_interface(number, interface, netns, &mut inside, &mut made) {
                return Err(match self.undo(&made) {
                    Ok(()) => error,
                    Err(also) => Error::new(format!("{error}; undo: {also}")),
                });
            }
        }
        Ok(())
    }

    fn add_interface(
        &mut self,
        number: usize,
        interface: &PodInterface,
        netns: &Namespace,
        inside: &mut Option<Socket>,
        made: &mut Made,
    ) -> Result<()> {
        let outer = self.make_veth(interface, netns)?;
        made.links.push(outer.index);
        let pod_index =
            outer.parent.ok_or_else(|| Error::new(format!("{:?} shows no other end", interface.host_veth)))?;
        let v6 = interface.address.is_ipv6();
        self.inside(|| host_sysctls(&interface.host_veth, v6))??;
        let sysctls = || if v6 { pod_sysctls(&interface.ifname) } else { Ok(()) };
        let inside = match inside {
            Some(socket) if v6 => {
                netns.run(sysctls)??;
                socket
            }
            Some(socket) => socket,
            // Both at once: on a busy machine each thread waits milliseconds for its turn.
            None => inside.insert(netns.run(|| sysctls().and_then(|()| Socket::route()))??),
        };
        if let Some(branch) = &interface.branch {
            self.add_branch(branch, &interface.host_veth, made)?;
        }
        self.host_side(interface, &outer, made)?;
        inside
            .run(&pod_side(number, interface, pod_index))
            .with_context(|| format!("in {}", netns.path().display()))?;
        if v6 { settled(inside, interface.address, &interface.ifname) } else { Ok(()) }
    }

    fn make_veth(&mut self, interface: &PodInterface, netns: &Namespace) -> Result<Link> {
        let veth = link::Veth {
            // Not up before its sysctls are written.
            up: false,
            end: link::End { name: &interface.host_veth, mac: Some(interface.host_mac), netns: None },
            peer: link::End { name: &interface.ifname, mac: None, netns: Some(netns.as_fd()) },
            mtu: interface.mtu,
        };
        if let Some(link) = self.create_veth(&veth)? {
            return Ok(link);
        }
        self.clear_the_way(interface, netns)?;
        let stays = || Error::new(format!("create veth {:?}: the name stays in use", interface.host_veth));
        self.create_veth(&veth)?.ok_or_else(stays)
    }

    /// Makes both ends in one message and reads the host's back; none if one of the names is taken.
    pub(super) fn create_veth(&mut self, veth: &link::Veth<'_>) -> Result<Option<Link>> {
        let requests = [link::create_veth(veth), link::query(veth.end.name)];
        match make_link(&mut self.route, &requests)? {
            Ok(link) => Ok(Some(link)),
            Err(error) if error.exists() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// One of the two names is taken. The remains of an earlier ADD go; anything else is an error.
    fn clear_the_way(&mut self, interface: &PodInterface, netns: &Namespace) -> Result<()> {
        let outer = link::by_name(&mut self.route, &interface.host_veth)?;
        let inner = link::by_name(&mut Socket::route_in(netns)?, &interface.ifname)?;
        match (inner, outer) {
            (Some(inner), Some(outer)) if pair(&outer, &inner) => {
                self.route.run(&[link::delete(outer.index).or_not_found()])
            }
            (Some(_), _) => Err(Error::new(format!(
                "interface {:?} already exists in {}",
                interface.ifname,
                netns.path().display()
            ))),
            // Of an earlier sandbox of a pod of this name.
            (None, Some(outer)) if outer.kind.as_deref() == Some("veth") => {
                self.route.run(&[link::delete(outer.index).or_not_found()])
            }
            (None, Some(outer)) => {
                Err(Error::new(format!("interface {:?} already exists on the host and is no veth", outer.name)))
            }
            (None, None) => Ok(()),
        }
    }

    /// Route and rules of the host. Rules of an earlier owner of the address that lead to another table go first: the older
    /// of two wins.
    fn host_side(&mut self, interface: &PodInterface, outer: &Link, made: &mut Made) -> Result<()> {
        let earlier = Rule::from(interface.host_net(), priority::FROM_POD, 0);
        let stale = rule::delete_told(&earlier);
        let wanted = interface.host_rules();
        let alias = naming::veth_alias(interface.host_mac, interface.mtu, &interface.host_veth);
        // The host asks for an IPv6 pod's MAC from its link's own address: given before, it is there when the link is.
        let mut requests = interface.host_link_local(outer.index).iter().map(addr::add).collect::<Vec<_>>();
        // A link that is up and gets an alias counts as changed, and for that the kernel looks at every IPv6 route there is: a
        // millisecond beside a thousand pods.
        requests.push(link::set_alias(outer.index, &alias));
        let before = requests.len();
        // Nobody speaks IPv6 over an IPv4 pod's link, and its address and routes would cost a walk over those of all others,
        // while the pod's end waits for its own.
        let quiet = interface.address.is_ipv4();
        requests.extend(quiet.then(|| link::no_link_local(outer.index)));
        let route = route::replace(&interface.host_route(outer.index));
        requests.extend([link::set_up(outer.index), route, stale.clone()]);
        requests.extend(wanted.iter().map(rule::add));
        let mut outcomes = self.route.batch(&requests)?;
        // What was made is noted before anything is judged, so that all of it can be undone.
        let refused = added(&mut self.route, &wanted, outcomes.split_off(requests.len() - wanted.len()), made);
        for outcome in outcomes.drain(..before) {
            match outcome {
                // Somebody has set the link up, and with that it has its own address.
                Err(error) if !error.exists() => return Err(error.into()),
                _ => {}
            }
        }
        if quiet {
            outcomes.remove(0).ok(); // refused where there is no IPv6
        }
        let [up, route, deleted] =
            <[_; 3]>::try_from(outcomes).map_err(|_| Error::new("an answer for each request"))?;
        up?;
        route?;
        refused?;
        match deleted {
            Err(error) if error.not_found() => Ok(()),
            Err(error) => Err(error.into()),
            Ok(told) => {
                // There may be more of them, and ours may go with them; so it comes behind what is not ours, as ever.
                rule::delete_rest(&mut self.route, &earlier, &|there| from(&earlier, there), told)?;
                let again = self.route.batch(&wanted.iter().map(rule::add).collect::<Vec<_>>())?;
                added(&mut self.route, &wanted, again, made)
            }
        }
    }

    fn undo(&mut self, made: &Made) -> Result<()> {
        let mut errors = List::new();
        for rule in made.rules.iter().rev() {
            errors.note(rule::delete_all(&mut self.route, rule, &|there| there == rule));
        }
        // The pod's side and the host's routes go with the links.
        let links = made.links.iter().rev();
        let requests = links.map(|index| link::delete(*index).or_not_found()).collect::<Vec<_>>();
        for (request, outcome) in requests.iter().zip(self.route.batch(&requests)?) {
            if !outcome.as_ref().is_err_and(KernelError::not_found) {
                errors.note(outcome.map_err(|error| Error::from(error).context(request.what.clone())));
            }
        }
        errors.into_result()
    }

    /// Takes away what the host holds of a pod: as much as possible, and every failure told. What is not there is no
    /// failure. `netns` is the pod's namespace if it still can be opened.
    pub fn del_pod(&mut self, removal: &Removal, netns: Option<&Namespace>) -> Result<()> {
        let mut errors = List::new();
        // Rules and device of a branch pod go in one stroke: the daemon, which may look some milliseconds after the first, takes
        // what still has a part of both for a living pod's and puts back the rest.
        let branch = removal.branch.as_ref().and_then(|branch| errors.note(self.look_at_branch(branch)).flatten());
        for removed in &removal.addresses {
            errors.note(self.remove_address(removed));
        }
        if let Some(branch) = &branch {
            errors.note(self.remove_branch(branch));
        }
        for removed in &removal.addresses {
            self.forget_connections(removed.address);
        }
        if let Some(netns) = netns {
            errors.note(self.remove_veths(&removal.veths, netns));
        }
        errors.into_result()
    }

    fn remove_address(&mut self, removed: &RemovedAddress) -> Result<()> {
        let host = IpNet::from(removed.address);
        let mut selectors = vec![Rule::to(host, priority::TO_POD, TABLE_MAIN)];
        if removed.table != TABLE_MAIN {
            selectors.push(Rule::from(host, priority::FROM_POD, removed.table));
        }
        let mut requests = selectors.iter().map(rule::delete_told).collect::<Vec<_>>();
        // Whatever link it leads over: the veth's index is not known here.
        let any_link = 0;
        requests.push(route::delete(&link_route(TABLE_MAIN, removed.address, any_link)));
        let mut errors = List::new();
        let outcomes = self.route.batch(&requests)?;
        let selectors = selectors.iter().map(Some).chain([None]);
        for (outcome, selector) in outcomes.into_iter().zip(selectors) {
            match (outcome, selector) {
                (Ok(told), Some(selector)) => {
                    let ours = |there: &Rule| there == selector || (selector.src.is_some() && from(selector, there));
                    errors.note(rule::delete_rest(&mut self.route, selector, &ours, told));
                }
                (Ok(_), None) => {}
                (Err(error), _) if error.not_found() => {}
                (Err(error), _) => drop(errors.note::<()>(Err(error.into()))),
            }
        }
        errors.into_result()
    }

    /// The address's next owner must not get answers to this one's questions. A kernel that does not list its connections fails
    /// no DEL, which would fail again at each repetition: the pod would never be gone (`spec/plugin.md` 13.5: optional). What may
    /// be over by then is tried once more, on a socket that waits for no answer to the first try.
    pub(super) fn forget_connections(&mut self, address: IpAddr) {
        let mut outcome = self.delete_connections(address);
        if outcome.as_ref().is_err_and(may_pass) {
            self.netfilter = None;
            outcome = self.delete_connections(address);
        }
        if let Err(error) = outcome {
            log::warn!("connections of {address} stay until they time out: {error}");
        }
    }

    fn delete_connections(&mut self, address: IpAddr) -> Result<usize> {
        conntrack::delete_all(super::netfilter(&mut self.netfilter, &self.namespace)?, address)
    }

    fn remove_veths(&mut self, veths: &[(String, String)], netns: &Namespace) -> Result<()> {
        let mut inside = Socket::route_in(netns)?;
        let mut errors = List::new();
        for (outer, inner) in veths {
            errors.note(self.remove_veth(outer, inner, &mut inside));
        }
        errors.into_result()
    }

    fn remove_veth(&mut self, outer: &str, inner: &str, inside: &mut Socket) -> Result<()> {
        let Some(inner) = link::by_name(inside, inner)? else { return Ok(()) };
        match link::by_name(&mut self.route, outer)? {
            Some(outer) if pair(&outer, &inner) => self.route.run(&[link::delete(outer.index).or_not_found()]),
            _ => Ok(()),
        }
    }

    /// Bytes that the kernel has sent to the route socket so far.
    pub fn bytes_read(&self) -> usize {
        self.route.bytes_read()
    }

    /// What is missing or wrong of the pod's network, a line each.
    pub fn check_pod(&mut self, pod: &Pod, netns: &Namespace) -> Result<Vec<String>> {
        let host = host_side(&mut self.route).context("look at the host's network")?;
        let mut inside = Socket::route_in(netns)?;
        let inside = side(&mut inside).with_context(|| format!("look at {}", netns.path().display()))?;
        Ok(check(pod, &host, &inside))
    }
}

/// Whether the same may succeed the next moment: answers were lost or late, a list changed, memory was short. What the kernel
/// refuses for any other reason it refuses again.
fn may_pass(error: &Error) -> bool {
    let passing = [libc::EAGAIN, libc::EBUSY, libc::EINTR, libc::ENOBUFS, libc::ENOMEM];
    error.find::<KernelError>().is_none_or(|refusal| passing.contains(&refusal.errno))
}

/// Whether a rule is a pod's `from` rule: that of `selector`, whichever table it leads to. Old versions of the original made one
/// for each CIDR of the VPC.
fn from(selector: &Rule, there: &Rule) -> bool {
    *there == Rule { table: there.table, dst: there.dst, ..selector.clone() }
}

/// Notes the rules that were added; the first refusal but that of one that was there.
fn added(socket: &mut Socket, rules: &[Rule], mut outcomes: Vec<Outcome>, made: &mut Made) -> Result<()> {
    let looked = super::rules::confirm(socket, &rules.iter().map(Some).collect::<Vec<_>>(), &mut outcomes);
    let mut refused = Ok(());
    for (rule, outcome) in rules.iter().zip(outcomes) {
        match outcome {
            Ok(_) => made.rules.push(rule.clone()),
            Err(error) if error.exists() => {}
            Err(error) => refused = refused.and(Err(error)),
        }
    }
    refused?;
    looked
}

/// The pod's side in order: link, way to the gateway, default route, address, gateway's MAC.
fn pod_side(number: usize, interface: &PodInterface, index: u32) -> Vec<Request> {
    let [gateway, default] = interface.pod_routes(number, index);
    let mut requests = vec![link::set_up(index), route::replace(&gateway)];
    requests.extend(interface.pod_rule(number).map(|rule| rule::add(&rule).or_exists()));
    requests.push(route::add(&default));
    requests.push(addr::add(&interface.pod_address(index)));
    requests.push(neigh::add(&interface.pod_neighbour(index, interface.host_mac)));
    requests
}

/// Written before the link goes up. A kernel without IPv6 has none of them. A pod must not be able to redirect the host,
/// hence 0 where upstream writes 1. The host asks for an IPv6 pod's MAC from its link-local address: while that one is
/// being checked for duplicates it cannot answer the pod, for two seconds by default.
fn host_sysctls(name: &str, v6: bool) -> Result<()> {
    let keys = ["accept_ra", "accept_redirects", "forwarding", "accept_dad"];
    for key in &keys[..if v6 { 4 } else { 3 }] {
        match sysctl::set(&format!("net/ipv6/conf/{name}/{key}"), "0") {
            Err(error) if !sysctl::missing(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn pod_sysctls(ifname: &str) -> Result<()> {
    for name in [ifname, "lo"] {
        sysctl::set(&format!("net/ipv6/conf/{name}/disable_ipv6"), "0")?;
    }
    // The address is unique by construction, and so is the link-local one: duplicate detection would only cost a second.
    sysctl::set(&format!("net/ipv6/conf/{ifname}/accept_dad"), "0").map(drop)
}

/// Waits until the pod gets packets for its address. It needs no duplicate detection, so that is a matter of one work item of
/// the kernel's; the limit is for kernels that detect all the same. The link's own address is not waited for: the pod's
/// traffic does not need it, since the gateway has a fixed entry.
pub(super) fn settled(inside: &mut Socket, own: IpAddr, ifname: &str) -> Result<()> {
    let end = clock::instant() + DAD_LIMIT;
    let [mut pause, longest] = DAD_PAUSE;
    while !route::is_local(inside, own)? {
        if clock::instant() > end {
            return Err(Error::new(format!("link {ifname:?} still has tentative addresses after {DAD_LIMIT:?}")));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(longest);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::net::Family;
    use crate::model::nft::{self as nft_model, Base, Chain, ChainKind, Expr, Hook, Table};
    use crate::netlink::nft;

    #[test]
    fn an_answer_that_is_lost_leaves_no_connections() {
        let body = || {
            crate::sys::unshare_netns().unwrap();
            let mut host = Host::open().unwrap();
            host.route.run(&[link::set_up(1)]).unwrap();
            let [from, to] = [1, 2].map(|last| IpAddr::from([127, 0, 0, last]));
            let mut socket = Socket::netfilter().unwrap();
            nft::commit(&mut socket, &tracking()).unwrap();
            let receiver = std::net::UdpSocket::bind((to, 0)).unwrap();
            let sender = std::net::UdpSocket::bind((from, 0)).unwrap();
            sender.send_to(b"hello", receiver.local_addr().unwrap()).unwrap();
            receiver.recv(&mut [0; 8]).unwrap();
            // Nothing reaches this one.
            let deaf = Socket::netfilter().unwrap();
            crate::sys::set_filter(&deaf, &[crate::sys::Instruction::end(false)]).unwrap();
            crate::sys::set_receive_timeout(&deaf, Duration::from_millis(20)).unwrap();
            host.netfilter = Some(deaf);
            host.forget_connections(to);
            assert_eq!(conntrack::delete_all(&mut socket, from).unwrap(), 0, "it was forgotten");
        };
        std::thread::spawn(body).join().unwrap();
    }

    /// A rule that looks at connections: without one the kernel tracks none.
    fn tracking() -> Table {
        let rule = nft_model::Rule { exprs: vec![Expr::CtStateNew, Expr::COUNTER], comment: None };
        let base = Some(Base { kind: ChainKind::Filter, hook: Hook::Input, priority: 0 });
        let chains = vec![Chain { name: "in".into(), base, rules: vec![rule] }];
        Table { family: Family::V4, name: "track".into(), comment: None, chains }
    }

    #[test]
    fn only_refusals_are_final() {
        let refusal = |errno| Error::from(KernelError { errno, text: None, what: "list connections".into() });
        for errno in [libc::EINVAL, libc::EOPNOTSUPP, libc::EPERM, libc::ENOENT] {
            assert!(!may_pass(&refusal(errno)), "{errno}");
        }
        assert!(may_pass(&refusal(libc::ENOBUFS)) && may_pass(&Error::new("receive: no answer within 5 s")));
    }

    #[test]
    fn a_kernel_that_lists_no_connections_fails_no_del() {
        let body = || {
            crate::sys::unshare_netns().unwrap();
            let mut host = Host::open().unwrap();
            let address = IpAddr::from([10, 20, 12, 60]);
            let rule = Rule::to(address.into(), priority::TO_POD, TABLE_MAIN);
            host.route.run(&[rule::add(&rule)]).unwrap();
            // It refuses the list with EOPNOTSUPP, as nfnetlink does without nf_conntrack_netlink.
            host.netfilter = Some(Socket::route().unwrap());
            let socket = host.netfilter.as_mut().unwrap();
            let error = conntrack::delete_all(socket, address).unwrap_err();
            assert!(error.to_string().contains("not supported"), "{error}");
            let addresses = vec![RemovedAddress { address, table: 2 }];
            let removal = Removal { addresses, ..Removal::default() };
            host.del_pod(&removal, None).unwrap();
            assert!(!rule::list(&mut host.route, Family::V4).unwrap().contains(&rule), "the rest is done");
        };
        // A thread of its own takes its namespace with it when it ends.
        std::thread::spawn(body).join().unwrap();
    }
}
