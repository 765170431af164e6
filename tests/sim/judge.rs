//! What must hold after every step of every node, whatever happens to it, and what must hold at the end.

use crate::world::{held_by, managed};
use enibox::model::checkpoint::Checkpoint;
use enibox::model::ec2::{Attachment, Call, Interface};
use enibox::model::ids::{EniId, PodKey};
use enibox::model::kube::POD_ENI;
use enibox::model::naming;
use enibox::plan::core::Core;
use enibox::plan::host::Intent;
use enibox::sim::conditions::Lie;
use enibox::sim::fleet::Fleet;
use enibox::sim::kubelet::Stage;
use enibox::sim::node::{File, Happening, Node, carried, mutates};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// How long the daemon may go on giving out an address that somebody else has taken away in EC2: two observations, the
/// second at the next look of its own, with IMDS and EC2 late.
pub const FOREIGN: u64 = 15 * 60 * 1_000_000_000;

/// After this long the clean-up has come round to everything, be it on the second time.
const CLEANED: Duration = Duration::from_hours(5);

/// Remembers what the daemon promised.
#[derive(Default)]
pub struct Judge {
    // Who was given an address last, by a reply that left the daemon.
    given: BTreeMap<IpAddr, (u32, PodKey)>,
    // Sandboxes whose deletion has begun, and when.
    ended: BTreeMap<PodKey, u64>,
    // Addresses that somebody else took away in EC2, and when.
    foreign: BTreeMap<IpAddr, u64>,
    // The same for IPv6 prefixes, which nobody can count.
    foreign_prefixes: Vec<(IpNet, u64)>,
    // What is on disk was not compared with the pool yet.
    unread: bool,
    /// ENIs that are none of the node's: it may look at them, and that is all.
    pub strangers: BTreeSet<EniId>,
    // Tables of the pods' addresses as the kernel was told last, by node.
    tables: BTreeMap<u32, BTreeMap<IpAddr, u32>>,
    // What the node gave back, and when.
    given_back: Vec<(Vec<IpNet>, u64)>,
    /// ENIs that somebody else detached, and when.
    pub foreign_enis: BTreeMap<EniId, u64>,
    /// The intents went with a checkpoint: an ENI that was being made is found by the clean-up only.
    pub checkpoint_lost: bool,
}

impl Judge {
    /// Somebody else takes these away in EC2.
    pub fn taken_by_others(&mut self, nets: &[IpNet], nanos: u64) {
        for net in nets {
            match net {
                IpNet::V4(_) => self.foreign.extend(addresses(net).into_iter().map(|address| (address, nanos))),
                IpNet::V6(_) => self.foreign_prefixes.push((*net, nanos)),
            }
        }
    }

    /// The checkpoint is gone. What was given back stands there alone, as long as Describe lags: from now on it is as if
    /// others had taken it.
    pub fn lose_checkpoint(&mut self) {
        for (nets, nanos) in std::mem::take(&mut self.given_back) {
            self.taken_by_others(&nets, nanos);
        }
        if !std::mem::replace(&mut self.checkpoint_lost, true) {
            self.forget_cooldowns();
        }
    }

    /// The node cannot know any more what it released when: its checkpoint is lost.
    pub fn forget_cooldowns(&mut self) {
        for at in self.ended.values_mut() {
            *at = 0;
        }
    }

    /// Whether the checkpoint knows of every pod of a node.
    pub fn recorded(node: &Node) -> bool {
        let disk = on_disk(node);
        let mut pooled = node.kubelet.live().filter(|(sandbox, _)| !sandbox.branch);
        pooled.all(|(sandbox, address)| disk.get(&address) == Some(&sandbox.key))
    }

    /// Looks at everything that happened in the last step.
    pub fn look(&mut self, fleet: &mut Fleet) {
        let blind = |node: &Node| match node.faults.imds {
            Lie::None => node.faults.ec2_down,
            Lie::Stale(_) => true,
            Lie::Empty | Lie::OmitEni(_) | Lie::OmitAddresses | Lie::Down => {
                node.faults.ec2_down || node.setup.settings.imds_only
            }
        };
        if fleet.nodes.iter().any(blind) {
            self.hold_foreign(fleet.nanos());
        }
        for (index, happening) in std::mem::take(&mut fleet.sky.happened) {
            let node = &fleet.nodes[index as usize];
            match happening {
                Happening::Handed(key, addresses) => {
                    assert!(!addresses.is_empty(), "an ADD succeeds without an address");
                    for address in addresses {
                        self.handed(fleet, node, &key, address);
                    }
                }
                Happening::Released(key, addresses) => self.released(node, &key, &addresses),
                Happening::Ended(key) => {
                    let at = if self.knows(node, &key) { fleet.nanos() } else { 0 };
                    self.ended.entry(key).or_insert(at);
                }
                Happening::Took(nets) => {
                    self.took(&nets);
                    self.given_back.push((nets, fleet.nanos()));
                    if self.checkpoint_lost {
                        self.lose_checkpoint();
                    }
                }
                Happening::Branch(key, address) => branched(node, &key, address),
                Happening::Applied(intent) => self.applied(fleet, node, &intent),
                Happening::Called(call) => self.called(fleet, node, &call),
                Happening::Saved => self.unread = true,
                Happening::Refused(..) | Happening::Crashed => {}
            }
            self.forget_foreign(fleet.nanos());
            // An address that others took away and a pod uses is kept beside what came in its place.
            if let Some(core) = fleet.nodes[index as usize]
                .core()
                .filter(|_| self.foreign.is_empty() && self.foreign_prefixes.is_empty())
            {
                let detached = |id: &EniId| self.foreign_enis.get(id).is_some_and(|at| fleet.nanos() - at < FOREIGN);
                limits(core, &fleet.nodes[index as usize], &detached);
            }
        }
        for node in &fleet.nodes {
            if let Some(core) = node.core().filter(|core| self.unread && core.quiet()) {
                self.unread = false;
                let pool: BTreeMap<IpAddr, PodKey> =
                    core.pool().allocations().map(|held| (held.address, held.owner.key.clone())).collect();
                assert_eq!(pool, on_disk(node), "the pool (left) and the checkpoint of a node at rest");
            }
        }
    }

    // As long as nobody can ask EC2, or IMDS tells what was and gives no reason to ask, or tells little and is all there
    // is, nobody can know what others took away: no time passes for that.
    fn hold_foreign(&mut self, nanos: u64) {
        let prefixes = self.foreign_prefixes.iter_mut().map(|(_, at)| at);
        for at in self.foreign.values_mut().chain(self.foreign_enis.values_mut()).chain(prefixes) {
            if nanos - *at < FOREIGN {
                *at = nanos;
            }
        }
    }

    // What others took away is an excuse for a while, and for as long as a pod uses it.
    fn forget_foreign(&mut self, nanos: u64) {
        if self.foreign.values().any(|at| nanos - at >= FOREIGN) {
            let mut foreign = std::mem::take(&mut self.foreign);
            foreign.retain(|address, at| nanos - *at < FOREIGN || self.in_use(*address).is_some());
            self.foreign = foreign;
        }
    }

    // Nothing of others is touched, and what must not be called is not.
    fn called(&self, fleet: &Fleet, node: &Node, call: &Call) {
        let settings = &node.setup.settings;
        assert!(!settings.imds_only, "{call:?} in IMDS-only mode");
        assert!(!settings.read_only() || !mutates(call), "{call:?} with provisioning disabled");
        let of_attachment = |attachment| fleet.sky.vpc.attachment(attachment);
        let touched = match call {
            Call::Detach(attachment) => of_attachment(attachment),
            Call::Attach { eni, .. }
            | Call::DeleteOnTermination { eni, .. }
            | Call::ModifyGroups { eni, .. }
            | Call::CreateTags { eni, .. }
            | Call::Assign { eni, .. }
            | Call::AssignIpv6Prefix(eni)
            | Call::UnassignAddresses { eni, .. }
            | Call::UnassignPrefixes { eni, .. }
            | Call::Delete(eni) => Some(eni),
            _ => None,
        };
        let Some(eni) = touched else { return };
        assert!(!self.strangers.contains(eni), "{call:?}: the ENI is none of ours");
        let trunk = fleet.sky.vpc.interface(eni).is_some_and(|eni| eni.interface_type == "trunk");
        // What somebody has assigned to it is of no use to pods, and may be given back.
        let harmless = matches!(call, Call::UnassignAddresses { .. } | Call::UnassignPrefixes { .. });
        assert!(!trunk || harmless, "{call:?}: the trunk is the resource controller's");
    }

    // Whether a node can know that the address of a pod which ends must rest. Without its checkpoint, and with a disk too
    // full for what the plugin notes, nobody tells it.
    fn knows(&self, node: &Node, key: &PodKey) -> bool {
        let held = |core: &Core| {
            let its = |address: &IpAddr| self.given.get(address).is_some_and(|(_, owner)| owner == key);
            let cidrs = core.pool().enis().flat_map(|(_, eni)| eni.cidrs());
            let mut slots = cidrs.flat_map(|(_, cidr)| cidr.slots());
            slots.any(|(address, slot)| its(address) && slot.freed.is_some())
                || core.pool().allocations().any(|held| held.owner.key == *key)
        };
        !self.checkpoint_lost || on_disk(node).values().any(|owner| owner == key) || node.core().is_some_and(held)
    }

    fn in_use(&self, address: IpAddr) -> Option<&PodKey> {
        self.given.get(&address).map(|(_, key)| key).filter(|key| !self.ended.contains_key(*key))
    }

    fn handed(&mut self, fleet: &Fleet, node: &Node, key: &PodKey, address: IpAddr) {
        let nanos = fleet.nanos();
        if let Some((other_node, other)) = self.given.get(&address).filter(|(_, other)| other != key) {
            let Some(ended) = self.ended.get(other) else {
                panic!("{address} is given to {key} while {other} on node {other_node} has it");
            };
            let cooldown = u64::from(node.setup.settings.ip_cooldown_s) * 1_000_000_000;
            let rested = nanos.saturating_sub(*ended);
            let same_node = *other_node == node.index;
            assert!(!same_node || *ended == 0 || rested >= cooldown, "{address} of {other} rested only {rested} ns");
        }
        let listed = fleet.sky.vpc.attached_to(&node.instance).filter(|eni| eni.status != "detaching");
        let known = listed.flat_map(carried).any(|net| net.contains(&address));
        let lately = |at: &u64| nanos - at < FOREIGN;
        let detached = self.foreign_enis.iter().filter(|(_, at)| lately(at));
        let mut detached = detached.filter_map(|(id, _)| fleet.sky.vpc.interface(id));
        let prefix = self.foreign_prefixes.iter().any(|(net, at)| net.contains(&address) && lately(at));
        let lately =
            prefix || self.foreign.get(&address).is_some_and(lately) || detached.any(|eni| holds(eni, address));
        // Who asks again is told the same again: a pod that runs keeps what others took.
        let again = self.given.get(&address).is_some_and(|(_, had)| had == key);
        assert!(known || lately || again, "EC2 does not have {address} on this node, which is given to {key}");
        // An ADD that was given up meanwhile may be answered when its release is durable already.
        let durable = on_disk(node).get(&address).is_some_and(|owner| owner == key);
        assert!(durable || self.ended.contains_key(key), "{address} is given to {key}, but not durably");
        self.given.insert(address, (node.index, key.clone()));
    }

    // An ADD that arrived after this DEL and before its answer, repeated by the runtime, may have been given another
    // address and be durable already: the key stands on disk, but not with anything that it was told of before.
    fn released(&self, node: &Node, key: &PodKey, addresses: &[IpAddr]) {
        // A pod with a branch ENI is gone with it.
        assert!(!addresses.is_empty() || node.setup.settings.pod_eni, "a DEL of {key} succeeds without an address");
        let told = |address: &IpAddr| self.given.get(address).is_some_and(|(_, owner)| owner == key);
        let left = on_disk(node)
            .into_iter()
            .find(|(address, owner)| owner == key && (addresses.contains(address) || told(address)));
        assert!(left.is_none(), "{key} is released, but not durably: {left:?}");
    }

    fn took(&self, nets: &[IpNet]) {
        for net in nets {
            let used = self.given.keys().find(|address| net.contains(*address) && self.in_use(**address).is_some());
            assert!(
                used.is_none(),
                "{net} is taken from EC2 while {:?} uses {used:?}",
                used.map(|ip| self.in_use(*ip))
            );
        }
    }

    // Every pod's table is that of the ENI that EC2 has its address on, and no living pod loses its rules. What others took
    // from under a pod, EC2 may put on another ENI of the node at any time: the node can only follow, which `at_rest` checks.
    fn applied(&mut self, fleet: &Fleet, node: &Node, intent: &Intent) {
        let lately = |address: &IpAddr| self.foreign.get(address).is_some_and(|at| fleet.nanos() - at < FOREIGN);
        for pod in intent.pods.iter().filter(|pod| !lately(&pod.address)) {
            tabled(fleet, node, pod.address, pod.table);
        }
        self.tables.insert(node.index, intent.pods.iter().map(|pod| (pod.address, pod.table)).collect());
        for address in &intent.gone {
            let user = node.kubelet.live().find(|(_, held)| held == address).map(|(sandbox, _)| &sandbox.key);
            assert!(user.is_none(), "the rules of {address} are swept, which {user:?} uses");
        }
    }

    /// What must hold once all trouble is over and the node has come to rest.
    pub fn at_rest(&mut self, fleet: &mut Fleet) {
        self.rests(fleet);
        self.no_orphans(fleet);
    }

    fn rests(&self, fleet: &Fleet) {
        for node in &fleet.nodes {
            let core = node.core().expect("the daemon runs");
            let waiting: Vec<_> =
                node.kubelet.pods.values().filter(|pod| pod.wanted && pod.running.is_none()).collect();
            assert!(waiting.is_empty(), "pods without a network: {waiting:?}");
            let pooled = node.kubelet.live().filter(|(sandbox, _)| !sandbox.branch);
            let living: BTreeMap<IpAddr, PodKey> =
                pooled.map(|(sandbox, address)| (address, sandbox.key.clone())).collect();
            let pool: BTreeMap<IpAddr, PodKey> =
                core.pool().allocations().map(|held| (held.address, held.owner.key.clone())).collect();
            assert_eq!(named(pool, &living), living, "the pool (left) and the living pods");
            assert_eq!(named(on_disk(node), &living), living, "the checkpoint (left) and the living pods");
            let tables = self.tables.get(&node.index).into_iter().flatten();
            for (address, table) in tables.filter(|(address, _)| living.contains_key(*address)) {
                tabled(fleet, node, *address, *table);
            }
            let ending = node.kubelet.sandboxes.values().find(|s| !matches!(s.stage, Stage::Running | Stage::Gone));
            assert!(ending.is_none(), "a sandbox is not done with: {ending:?}");
            let v6 = node.setup.settings.enable_ipv6;
            let mut held: BTreeSet<(String, IpNet)> =
                core.pool().enis().flat_map(|(id, eni)| eni.cidrs().map(|(net, _)| (id.0.clone(), *net))).collect();
            let mut truth: BTreeSet<(String, IpNet)> = BTreeSet::new();
            for eni in fleet.sky.vpc.attached_to(&node.instance) {
                if managed(eni, node) && (!v6 || !eni.ipv6s.is_empty()) {
                    truth.extend(held_by(eni, v6).into_iter().map(|net| (eni.id.0.clone(), net)));
                    // Of several IPv6 prefixes any one will do, and all in which pods have lived.
                    let before = held.len();
                    held.retain(|(id, net)| *id != eni.id.0 || !eni.v6_prefixes.contains(net));
                    if held.len() < before {
                        held.extend(held_by(eni, v6).into_iter().map(|net| (eni.id.0.clone(), net)));
                    }
                    assert!(
                        core.pool().eni(&eni.id).is_some() || !node.ready,
                        "{} is attached and not in the pool",
                        eni.id
                    );
                }
            }
            assert_eq!(held, truth, "the pool (left) and EC2");
            assert!(node.disk.spool.is_empty(), "records are left in the spool");
            let text = node.disk.files.get(&0).map(File::text).unwrap_or_default();
            let own = Checkpoint::parse(&text).unwrap().enibox.unwrap_or_default();
            assert!(own.creating.is_empty() && own.freeing.is_empty(), "an intent is left: {own:?}");
        }
    }

    // Only what others detached and what an intent was lost for is left to the clean-up, which comes round every hour or
    // so, where there is one.
    fn no_orphans(&mut self, fleet: &mut Fleet) {
        let orphans = |fleet: &Fleet| {
            let ours = |at: &Attachment| fleet.nodes.iter().any(|node| node.instance == at.instance);
            let made = fleet.sky.vpc.interfaces().filter(|eni| eni.description.starts_with("aws-K8S-"));
            made.filter(|eni| !eni.attachment.as_ref().is_some_and(ours)).map(|eni| eni.id.clone()).collect::<Vec<_>>()
        };
        let found = orphans(fleet);
        let explained = |id: &EniId| self.checkpoint_lost || self.foreign_enis.contains_key(id);
        let leaked: Vec<_> = found.iter().filter(|id| !explained(id)).collect();
        assert!(leaked.is_empty(), "leaked ENIs: {leaked:?}");
        if !found.is_empty() && fleet.nodes.iter().all(|node| node.ready && node.setup.settings.cleans_leaked_enis()) {
            self.pass(fleet, CLEANED);
            let left = orphans(fleet);
            assert!(left.is_empty(), "ENIs that no clean-up deletes: {left:?}");
        }
    }

    fn pass(&mut self, fleet: &mut Fleet, time: Duration) {
        let until = fleet.nanos() + u64::try_from(time.as_nanos()).unwrap();
        while fleet.step(until) {
            self.look(fleet);
        }
    }

    /// Nothing happens in EC2 any more, but for the hourly look for leaked ENIs.
    pub fn peace(&mut self, fleet: &mut Fleet, time: Duration) {
        assert!(time < Duration::from_mins(30), "at most one look falls into it");
        if fleet.nodes.iter().any(|node| !node.ready) {
            return; // others hold the slot of the ENI that it needs, for which it tries every half hour
        }
        let calls = |fleet: &Fleet| {
            let mut calls = fleet.sky.vpc.journal().counts().clone();
            let looks = calls.remove("DescribeNetworkInterfaces").unwrap_or(0);
            (calls, looks)
        };
        let (before, looks) = calls(fleet);
        self.pass(fleet, time);
        let (mut after, looked) = calls(fleet);
        // A subnet without room for a prefix is asked again about every half hour: with one look at the subnets and one call.
        let full = |subnet| !fleet.sky.vpc.takes_prefix(subnet);
        if fleet.nodes.iter().any(|node| node.setup.settings.prefix_delegation)
            && fleet.sky.vpc.subnets().iter().any(full)
        {
            let more = |action: &str| after.get(action) > before.get(action);
            let ask = ["AssignPrivateIpAddresses", "CreateNetworkInterface"].into_iter().find(|action| more(action));
            for action in ask.into_iter().chain(["DescribeSubnets"]) {
                if let (Some(after), Some(before)) = (after.get_mut(action), before.get(action)) {
                    *after -= u64::from(*after == before + 1);
                }
            }
        }
        assert_eq!(after, before, "calls to EC2 although nothing happens");
        let cleans = fleet.nodes.iter().filter(|node| node.setup.settings.cleans_leaked_enis()).count() as u64;
        assert!(looked <= looks + cleans, "{} looks at EC2 although nothing happens", looked - looks);
    }
}

// Without a checkpoint the daemon knows the addresses of living pods, but not their names (B19).
fn named(mut held: BTreeMap<IpAddr, PodKey>, living: &BTreeMap<IpAddr, PodKey>) -> BTreeMap<IpAddr, PodKey> {
    for (address, key) in &mut held {
        if let Some(known) = living.get(address).filter(|_| key.network == "unknown") {
            key.clone_from(known);
        }
    }
    held
}

fn addresses(net: &IpNet) -> Vec<IpAddr> {
    match net {
        IpNet::V4(net) => {
            let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
            (first..=last).map(|ip| IpAddr::V4(ip.into())).collect()
        }
        IpNet::V6(_) => Vec::new(), // too many to count
    }
}

fn holds(eni: &Interface, address: IpAddr) -> bool {
    carried(eni).iter().any(|net| net.contains(&address))
}

// A pod's table is that of the ENI that EC2 has its address on. To an ENI of another card no pod can follow.
fn tabled(fleet: &Fleet, node: &Node, address: IpAddr, table: u32) {
    let card = card_of(node, address);
    let holder = fleet.sky.vpc.attached_to(&node.instance).find(|eni| holds(eni, address));
    if let Some(at) =
        holder.and_then(|eni| eni.attachment.as_ref()).filter(|at| card.is_none_or(|card| at.card == card))
    {
        assert_eq!(table, naming::table_of(at.card, at.device).unwrap(), "table of {address}");
    }
}

/// The network card of the pod's interface that has this address.
pub fn card_of(node: &Node, address: IpAddr) -> Option<u32> {
    let mut held = node.core().into_iter().flat_map(|core| core.pool().allocations());
    held.find(|held| held.address == address).map(|held| held.card)
}

// Addresses and their owners in the checkpoint files.
fn on_disk(node: &Node) -> BTreeMap<IpAddr, PodKey> {
    let mut all = BTreeMap::new();
    for file in node.disk.files.values() {
        let Ok(checkpoint) = Checkpoint::parse(&file.text()) else { continue };
        for entry in checkpoint.allocations {
            let Some(address) = entry.address() else { continue };
            let key = PodKey { network: entry.network, container: entry.container, ifname: entry.ifname };
            let twice = all.insert(address, key);
            assert!(twice.is_none(), "the checkpoint gives {address} to two pods");
        }
    }
    all
}

// A branch ENI is told of as the pod's annotation describes it, as long as there is the pod.
fn branched(node: &Node, key: &PodKey, address: IpAddr) {
    let sandbox = node.kubelet.sandboxes.values().find(|sandbox| sandbox.key == *key);
    let name = sandbox.and_then(|sandbox| node.kubelet.pods.get(&sandbox.pod)).map(|pod| &pod.name);
    if let Some(pod) = name.and_then(|name| node.api.pods.get(name)) {
        let told = pod.annotations.get(POD_ENI).is_some_and(|text| text.contains(&format!("\"{address}\"")));
        assert!(pod.wants_branch && told, "{key} is given the branch ENI of {address}: {pod:?}");
    }
}

// An ENI that others detached is counted until it was looked at again.
fn limits(core: &Core, node: &Node, detached: &dyn Fn(&EniId) -> bool) {
    let (enis, slots) = core.room();
    let most = enis.max(node.limits.cards.iter().sum::<u32>() as usize);
    let held = core.pool().enis().filter(|(id, eni)| !eni.missing && !detached(id)).count();
    assert!(held <= most, "more ENIs than the type takes");
    for (id, eni) in core.pool().enis() {
        // One that is barred is kept until EC2 has spoken. Of IPv6 prefixes the node takes what is there.
        let open = eni.cidrs().filter(|(_, cidr)| !cidr.barred).count();
        assert!(open <= slots || node.setup.settings.enable_ipv6, "more CIDRs on {id} than fit");
    }
}
