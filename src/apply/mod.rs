//! Carries out plans on the kernel: observe, apply, undo. Decisions are made in `plan`; here is only the order of messages,
//! few of them, and what to do when one is refused.
//!
//! A [`Host`] acts in the network namespace of the thread that opened it, whichever thread calls it; it never switches a
//! caller's namespace. Pods are reached through sockets that are opened inside for one call.

mod cleanup;
mod egress;
mod former;
mod host;
mod mend;
mod pod;
mod rules;

pub use host::{Censor, HostReport};
pub use mend::{mend, side};

use crate::error::{Context, Error, Result};
use crate::model::map::Map;
use crate::model::naming::NFT_TABLE;
use crate::model::net::{Barrier, Family, Link, Route, Rule};
use crate::model::nft::Table;
use crate::netlink::netns::Namespace;
use crate::netlink::sysctl;
use crate::netlink::{KernelError, Request, Socket, addr, link, neigh, nft, route, rule};
use crate::plan::host::{Intent, Observation, link_of, sysctls};
use std::thread::ThreadId;
use std::time::Instant;

/// The network of the namespace it was opened in.
#[derive(Debug)]
pub struct Host {
    namespace: Namespace,
    /// The thread that opened it, and is therefore in the namespace.
    thread: ThreadId,
    route: Socket,
    /// Opened when first needed, in the namespace of the route socket whoever asks: a plugin's ADD never does.
    netfilter: Option<Socket>,
    /// Our tables as last read, and the kernel's generation then.
    known: Option<(u32, Vec<Table>)>,
    /// How often a former installation may still be looked for.
    looks: u32,
    /// Tables that the kernel took but shows differently, and when that was seen.
    stuck: Option<(Vec<Table>, Instant)>,
}

impl Host {
    /// Opens the route socket in the calling thread's namespace.
    pub fn open() -> Result<Host> {
        let thread = std::thread::current().id();
        let (namespace, route) = (Namespace::own()?, Socket::route()?);
        Ok(Host { namespace, thread, route, netfilter: None, known: None, looks: former::LOOKS_MAX, stuck: None })
    }

    /// What the namespace holds: seven dumps, and our nf_tables tables unless the kernel says that no table has changed. The
    /// sysctls are left out; see [`Host::observe_for`].
    pub fn observe(&mut self) -> Result<Observation> {
        // In this order, because plugins are at work: an ADD sets the veth up, makes the route and then the rules; a DEL
        // takes the rules away and then the route. So none of them looks like a pod that has lost only a part.
        let links = link::list(&mut self.route)?;
        let addresses = addr::list(&mut self.route, None)?;
        let (routes, rules, barriers) = routes_and_rules(&mut self.route)?;
        let neighbours = neigh::list_static(&mut self.route)?;
        let mut peers = Map::new();
        for entry in &neighbours {
            let is_veth = |link: &Link| link.index == entry.dev && link.kind.as_deref() == Some("veth");
            if links.iter().any(is_veth)
                && !peers.contains_key(&entry.dev)
                && let Some(mac) = link::mac_of_peer(&mut self.route, entry.dev)?
            {
                peers.insert(entry.dev, mac);
            }
        }
        let tables = self.tables()?;
        let sysctls = Map::new();
        Ok(Observation { links, addresses, routes, barriers, neighbours, peers, rules, tables, sysctls })
    }

    /// The same with the sysctls that `intent` wants.
    pub fn observe_for(&mut self, intent: &Intent) -> Result<Observation> {
        let mut seen = self.observe()?;
        if let Some(primary) = link_of(&seen.links, intent.primary_mac) {
            let wanted = sysctls(intent, &primary.name, &seen.links);
            // One that cannot be read is as good as missing: nothing can be said of it.
            let read = || wanted.into_iter().filter_map(|(path, _)| Some((sysctl::read(&path).ok()?, path)));
            let values = self.inside(|| read().collect::<Vec<_>>())?;
            seen.sysctls.extend(values.into_iter().map(|(value, path)| (path, value)));
        }
        Ok(seen)
    }

    /// `/proc/sys/net` is that of the thread that looks.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        if std::thread::current().id() == self.thread { Ok(work()) } else { self.namespace.run(work) }
    }

    /// Our tables; one message when the generation is still that of the last look.
    fn tables(&mut self) -> Result<Vec<Table>> {
        let socket = netfilter(&mut self.netfilter, &self.namespace)?;
        let generation = nft::generation(socket)?;
        if let Some((known, tables)) = &self.known
            && *known == generation
        {
            return Ok(tables.clone());
        }
        let mut tables = Vec::new();
        for family in [Family::V4, Family::V6] {
            tables.extend(nft::table(socket, family, NFT_TABLE)?);
        }
        // What changed during the dump has a newer generation and is read again next time.
        self.known = Some((generation, tables.clone()));
        Ok(tables)
    }
}

/// Puts back the way to the main table where it is missing, before a start asks anybody anything: who has flushed all rules while no
/// daemon ran has cut the node off, and nobody else would mend it. What was done, or failed, is told in the log alone.
pub fn find_a_way(v6: bool) {
    let host = Host::open().and_then(|mut host| host.restore_main(v6));
    match host.context("look for the way to the main route table") {
        Ok(steps) => steps.iter().for_each(|step| log::warn!("repair {}: {}", step.what.name(), step.text)),
        Err(error) => log::warn!("{error}"),
    }
}

fn netfilter<'a>(socket: &'a mut Option<Socket>, namespace: &Namespace) -> Result<&'a mut Socket> {
    match socket {
        Some(socket) => Ok(socket),
        None => Ok(socket.insert(Socket::netfilter_in(namespace)?)),
    }
}

/// Sends what makes a link and what asks for it; the link, or the kernel's refusal to make it.
fn make_link(socket: &mut Socket, requests: &[Request; 2]) -> Result<std::result::Result<Link, KernelError>> {
    let mut outcomes = socket.batch(requests)?.into_iter();
    let (Some(made), Some(found)) = (outcomes.next(), outcomes.next()) else {
        return Err(Error::new("two answers for two requests"));
    };
    if let Err(refused) = made {
        return Ok(Err(refused));
    }
    let link = found?.iter().find_map(|body| link::decode(body));
    link.map(Ok).ok_or_else(|| Error::new(format!("{}: no answer", requests[1].what)))
}

/// The sysctl that says whether IPv6 is off on a link: then it takes neither addresses nor routes (EACCES).
fn v6_switch(socket: &mut Socket, dev: u32) -> Result<Option<String>> {
    let name = link::by_index(socket, dev)?.map(|link| link.name);
    Ok(name.map(|name| format!("net/ipv6/conf/{name}/disable_ipv6")))
}

/// Unicast routes of all tables, all rules, and the routes that let nothing through, of both families.
fn routes_and_rules(socket: &mut Socket) -> Result<(Vec<Route>, Vec<Rule>, Vec<Barrier>)> {
    let (mut routes, mut rules, mut barriers) = (Vec::new(), Vec::new(), Vec::new());
    for family in [Family::V4, Family::V6] {
        rules.extend(rule::list(socket, family)?);
        let (open, closed) = route::list_all(socket, family, None)?;
        routes.extend(open);
        barriers.extend(closed);
    }
    Ok((routes, rules, barriers))
}
