//! Notifications: what others change in the kernel, as it happens.
//!
//! One monitor has a route socket and, if asked for, a netfilter socket. The kernel drops notifications when nobody reads
//! them in time; that is told as [`Notice::Overrun`], after which the caller must read everything anew.
//!
//! Of neighbours only entries are told for which the kernel asks nobody: none of ours on the host is such a one. Every step of every
//! ARP entry would wake up an idle node all the time; a filter on the socket keeps those from its queue ([`neigh::filter`]).

use super::attr::Attrs;
use super::netns::Namespace;
use super::socket::{Message, Socket, messages};
use super::{addr, link, neigh, nft, route, rule};
use crate::error::{Context, Result};
use crate::model::map::Set;
use crate::model::net::Family;
pub use crate::model::notice::Notice;
use crate::{clock, sys};
use neli::consts::rtnl::Rtm;
use neli::consts::socket::NlFamily;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Receive queue of each socket in bytes: thousands of notifications.
const QUEUE: usize = 1024 * 1024;

/// A subscription to the changes of one namespace.
#[derive(Debug)]
pub struct Monitor {
    route: Socket,
    nft: Option<Socket>,
    touched: Set<String>,
    ready: VecDeque<Notice>,
}

impl Monitor {
    /// Subscribes in the calling thread's namespace to links, addresses, routes, rules, fixed neighbour entries and settings of
    /// interfaces of both families, and to nf_tables if `nft` is set. Subscribe first and read the state then: so nothing is missed between.
    pub fn open(nft: bool) -> Result<Monitor> {
        let groups = [
            libc::RTNLGRP_LINK,
            libc::RTNLGRP_IPV4_IFADDR,
            libc::RTNLGRP_IPV6_IFADDR,
            libc::RTNLGRP_IPV4_ROUTE,
            libc::RTNLGRP_IPV6_ROUTE,
            libc::RTNLGRP_IPV4_RULE,
            libc::RTNLGRP_IPV6_RULE,
            libc::RTNLGRP_IPV4_NETCONF,
            libc::RTNLGRP_IPV6_NETCONF,
        ];
        let open = |family, groups: &[u32], what: &str| {
            let socket = Socket::open(family, groups).with_context(|| format!("subscribe to {what}"))?;
            socket.allow_receive(QUEUE)?;
            Ok::<_, crate::error::Error>(socket)
        };
        let group = libc::NFNLGRP_NFTABLES.cast_unsigned();
        let route = open(NlFamily::Route, &groups, "links, addresses, routes and rules")?;
        // The filter first: all that comes before it would be in the queue.
        sys::set_filter(&route, &neigh::filter()).context("filter notifications of neighbours")?;
        let neighbours = libc::RTNLGRP_NEIGH.cast_signed();
        sys::set_int_option(&route, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, neighbours)
            .context("subscribe to neighbours")?;
        Ok(Monitor {
            route,
            nft: if nft { Some(open(NlFamily::Netfilter, &[group], "nf_tables")?) } else { None },
            touched: Set::new(),
            ready: VecDeque::new(),
        })
    }

    /// Subscribes in `namespace`.
    pub fn open_in(namespace: &Namespace, nft: bool) -> Result<Monitor> {
        namespace.run(|| Monitor::open(nft))?
    }

    /// The next change; none if there was none within `timeout`.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Notice>> {
        let end = clock::instant() + timeout;
        loop {
            if let Some(notice) = self.ready.pop_front() {
                return Ok(Some(notice));
            }
            let left = end.saturating_duration_since(clock::instant());
            let fds = std::iter::once(&self.route).chain(&self.nft).map(AsFd::as_fd).collect::<Vec<_>>();
            let readable = sys::poll_readable(&fds, left).context("wait for kernel notifications")?;
            drop(fds);
            if readable.first() == Some(&true) {
                self.read_route()?;
            }
            if readable.get(1) == Some(&true) {
                self.read_nft()?;
            }
            if left.is_zero() && self.ready.is_empty() {
                return Ok(None);
            }
        }
    }

    /// Waits until there is a change, `other` is readable, or `timeout` has passed; whether `other` is. The changes are for
    /// [`Monitor::next`].
    pub fn wait(&self, other: BorrowedFd<'_>, timeout: Duration) -> Result<bool> {
        let timeout = if self.ready.is_empty() { timeout } else { Duration::ZERO };
        let sockets = std::iter::once(&self.route).chain(&self.nft).map(AsFd::as_fd);
        let fds = std::iter::once(other).chain(sockets).collect::<Vec<_>>();
        let readable = sys::poll_readable(&fds, timeout).context("wait for kernel notifications")?;
        Ok(readable.first() == Some(&true))
    }

    fn read_route(&mut self) -> Result<()> {
        match self.route.receive() {
            Ok(length) => {
                self.ready.extend(messages(self.route.received(length)).filter_map(|message| notice(&message)));
                Ok(())
            }
            Err(error) => self.overrun(error),
        }
    }

    fn read_nft(&mut self) -> Result<()> {
        let Some(socket) = &mut self.nft else { return Ok(()) };
        match socket.receive() {
            Ok(length) => {
                for message in messages(socket.received(length)) {
                    self.ready.extend(ruleset(&message, &mut self.touched));
                }
                Ok(())
            }
            Err(error) => self.overrun(error),
        }
    }

    fn overrun(&mut self, error: crate::error::Error) -> Result<()> {
        if error.errno() == Some(libc::ENOBUFS) {
            self.touched.clear();
            self.ready.push_back(Notice::Overrun);
            Ok(())
        } else {
            Err(error.context("read kernel notifications"))
        }
    }
}

fn notice(message: &Message<'_>) -> Option<Notice> {
    let body = message.body;
    match Rtm::from(message.kind) {
        Rtm::Newlink => link::decode(body).map(Notice::Link),
        Rtm::Dellink => link::decode(body).map(Notice::LinkGone),
        Rtm::Newaddr => addr::decode(body).map(Notice::Address),
        Rtm::Deladdr => addr::decode(body).map(Notice::AddressGone),
        Rtm::Newroute => {
            route::decode_told(body).map(Notice::Route).or_else(|| route::decode_barrier(body).map(Notice::Barrier))
        }
        Rtm::Delroute => route::decode(body).map(Notice::RouteGone),
        Rtm::Newneigh => neigh::decode(body).filter(neigh::is_static).map(Notice::Neighbour),
        Rtm::Newrule => rule::decode(body).map(Notice::Rule),
        Rtm::Delrule => rule::decode(body).map(Notice::RuleGone),
        Rtm::Newnetconf => conf(body),
        _ => None,
    }
}

/// `struct netconfmsg` is the family in one byte, padded; NETCONFA_IFINDEX, NETCONFA_FORWARDING and NETCONFA_RP_FILTER
/// (`linux/netconf.h`).
fn conf(body: &[u8]) -> Option<Notice> {
    let attrs = Attrs::after(body, 4);
    let value = |kind: u16| attrs.clone().find(kind).and_then(|value| value.u32());
    let family = if i32::from(*body.first()?) == libc::AF_INET6 { Family::V6 } else { Family::V4 };
    Some(Notice::Conf { family, dev: value(1)?.cast_signed(), forwarding: value(2), rp_filter: value(3) })
}

/// The changes of a transaction come one by one, each with the table's name as its first attribute, and then the new
/// generation.
fn ruleset(message: &Message<'_>, touched: &mut Set<String>) -> Option<Notice> {
    let attrs = Attrs::after(message.body, nft::HEADER);
    if message.kind != nft::NEW_GEN {
        if message.kind & 0xff00 == nft::SUBSYSTEM {
            touched.extend(attrs.find(1u16).map(|name| name.text()));
        }
        return None;
    }
    Some(Notice::Ruleset {
        generation: attrs.clone().find(1u16)?.u32_be()?,
        tables: std::mem::take(touched),
        process: attrs.find(3u16).map(|name| name.text()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hostile_notifications_never_panic(kind in 0u16..130, bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let message = Message { kind, flags: 0, sequence: 0, port: 0, body: &bytes };
            notice(&message);
            ruleset(&Message { kind: nft::SUBSYSTEM | kind, ..message }, &mut Set::new());
        }
    }
}
