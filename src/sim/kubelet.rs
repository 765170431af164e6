//! The pods of a node: a kubelet that starts and stops them, the runtime that asks for a sandbox's network and repeats
//! itself, and what the plugin does on the host (`spec/plugin.md` 9, 10).
//!
//! A pod whose sandbox failed gets another sandbox, with another container id, after the kubelet's pause. The failed one is
//! deleted like every other.

use super::fleet::Sky;
use super::node::{Happening, Item, Node, addresses};
use crate::model::checkpoint::{Allocation, Checkpoint};
use crate::model::ids::{PodKey, PodName};
use crate::model::kube;
use crate::model::map::Map;
use crate::model::naming;
use crate::model::spool::{RECORDS_MAX, Record};
use crate::model::wire::{AddNetworkRequest, DelNetworkRequest, IpAllocation, UNKNOWN_POD};
use crate::plan::core::{Answer, Event};
use std::net::IpAddr;
use std::time::Duration;

/// How often the kubelet looks whether the network has become ready for the first time.
const NETWORK_NOT_READY: Duration = Duration::from_secs(1);
/// Sandboxes that are gone are remembered, so that a DEL can come again.
const GONE_MAX: usize = 16;

/// Whose answer is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// ADD of this sandbox.
    Add(u64),
    /// ADD of this sandbox once more.
    AddAgain(u64),
    /// DEL of this sandbox.
    Del(u64),
}

/// How far a sandbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// ADD is on its way or waits.
    Asking,
    /// The plugin works on the host.
    Wiring,
    /// The pod has its network.
    Running,
    /// Given up or deleted: DEL is on its way.
    Ending,
    /// DEL is done.
    Gone,
}

/// A sandbox.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// Its allocation key.
    pub key: PodKey,
    /// Its pod's number.
    pub pod: u32,
    /// How far it is.
    pub stage: Stage,
    /// Its addresses, as the plugin was told: one, or one on every network card.
    pub addresses: Vec<IpAddr>,
    /// Its address is that of a branch ENI.
    pub branch: bool,
    /// When ADD left, in nanoseconds of virtual time.
    pub asked: u64,
    /// When the first DEL left.
    pub ended: Option<u64>,
}

/// A pod.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its name; the namespace is `default`.
    pub name: String,
    /// Not deleted.
    pub wanted: bool,
    /// It asks for an interface on every network card.
    pub every_card: bool,
    /// Its latest sandbox.
    pub sandbox: Option<u64>,
    /// When it was bound, in nanoseconds of virtual time.
    pub bound: u64,
    /// When its network stood.
    pub running: Option<u64>,
}

/// All pods and sandboxes of a node.
#[derive(Clone, Debug, Default)]
pub struct Kubelet {
    /// Pods by number.
    pub pods: Map<u32, Pod>,
    /// Sandboxes by number.
    pub sandboxes: Map<u64, Sandbox>,
    last_pod: u32,
    last_sandbox: u64,
}

impl Kubelet {
    /// Pods that want a network.
    pub fn bound(&self) -> usize {
        self.pods.values().filter(|pod| pod.wanted).count()
    }

    /// Pods that have one.
    pub fn running(&self) -> usize {
        self.sandboxes.values().filter(|s| matches!(s.stage, Stage::Running | Stage::Wiring)).count()
    }

    /// Sandboxes whose pods use their addresses, once for each address.
    pub fn live(&self) -> impl Iterator<Item = (&Sandbox, IpAddr)> {
        let held = |sandbox: &&Sandbox| matches!(sandbox.stage, Stage::Running | Stage::Wiring);
        self.sandboxes.values().filter(held).flat_map(|s| s.addresses.iter().map(move |address| (s, *address)))
    }

    fn forget_old(&mut self) {
        let gone = |sandbox: &Sandbox| sandbox.stage == Stage::Gone;
        if self.sandboxes.len() <= self.pods.len() + GONE_MAX {
            return;
        }
        let over = self.sandboxes.values().filter(|s| gone(s)).count().saturating_sub(GONE_MAX);
        let old: Vec<u64> = self.sandboxes.iter().filter(|(_, s)| gone(s)).map(|(id, _)| *id).take(over).collect();
        for id in old {
            self.sandboxes.remove(&id);
        }
    }
}

fn veth(pod: &str) -> String {
    naming::host_veth(naming::DEFAULT_VETH_PREFIX, "default", pod, 0).unwrap_or_default()
}

impl Node {
    /// A pod is bound to this node; its number.
    pub(super) fn bind(&mut self, sky: &mut Sky, name: &str) -> u32 {
        self.kubelet.last_pod += 1;
        let number = self.kubelet.last_pod;
        let pod =
            Pod { name: name.into(), wanted: true, every_card: false, sandbox: None, bound: sky.nanos, running: None };
        self.kubelet.pods.insert(number, pod);
        self.api.pods.insert(name.into(), kube::Pod { uid: format!("uid-{number}"), ..kube::Pod::default() });
        self.tell_pods(sky);
        self.later(sky, self.setup.latencies.sandbox, Item::Sandbox(number));
        number
    }

    /// A pod is deleted. `impatient`: an ADD that is under way is not waited for.
    pub(super) fn delete(&mut self, sky: &mut Sky, number: u32, impatient: bool) {
        let Some(pod) = self.kubelet.pods.get_mut(&number).filter(|pod| pod.wanted) else { return };
        pod.wanted = false;
        self.api.pods.remove(&pod.name);
        let sandbox = pod.sandbox;
        match sandbox.and_then(|id| Some((id, self.kubelet.sandboxes.get(&id)?.stage))) {
            Some((id, Stage::Running)) => self.end(sky, id),
            Some((id, Stage::Asking)) if impatient => self.end(sky, id),
            Some((_, Stage::Asking | Stage::Wiring | Stage::Ending)) => {} // deleted when that is over
            Some((_, Stage::Gone)) | None => {
                self.kubelet.pods.remove(&number);
            }
        }
        self.tell_pods(sky);
    }

    /// The kubelet starts a sandbox for a pod.
    pub(super) fn sandbox(&mut self, sky: &mut Sky, number: u32) {
        let Some(pod) = self.kubelet.pods.get_mut(&number).filter(|pod| pod.wanted) else { return };
        if !self.was_ready {
            return self.later(sky, NETWORK_NOT_READY, Item::Sandbox(number));
        }
        self.kubelet.last_sandbox += 1;
        let id = self.kubelet.last_sandbox;
        pod.sandbox = Some(id);
        let container = format!("n{}-s{id}", self.index);
        let key = PodKey { network: "aws-cni".into(), container, ifname: "eth0".into() };
        let (stage, asked) = (Stage::Asking, sky.nanos);
        self.kubelet
            .sandboxes
            .insert(id, Sandbox { key, pod: number, stage, addresses: Vec::new(), branch: false, asked, ended: None });
        self.kubelet.forget_old();
        self.later(sky, self.setup.latencies.rpc, Item::Add(id));
    }

    /// ADD reaches the daemon.
    pub(super) fn add(&mut self, sky: &mut Sky, id: u64) {
        let Some(sandbox) = self.kubelet.sandboxes.get(&id) else { return };
        let first = sandbox.stage == Stage::Asking && !self.open.values().any(|asked| *asked == Asked::Add(id));
        let asked = if first { Asked::Add(id) } else { Asked::AddAgain(id) };
        if self.brain.is_none() || !self.ready {
            return self.replied(sky, asked, Answer::Error("connection refused".into()));
        }
        let key = sandbox.key.clone();
        self.disk.spool.retain(|record| record.key != key); // as the plugin does
        let pod = self.kubelet.pods.get(&sandbox.pod);
        let request = AddNetworkRequest {
            pod_name: pod.map(|pod| pod.name.clone()).unwrap_or_default(),
            requires_multi_nic: pod.is_some_and(|pod| pod.every_card),
            pod_namespace: "default".into(),
            network_name: key.network,
            container_id: key.container,
            if_name: key.ifname,
            ..AddNetworkRequest::default()
        };
        self.last_call += 1;
        self.open.insert(self.last_call, asked);
        self.feed(sky, Event::Add(self.last_call, request));
    }

    /// DEL reaches the daemon, if there is one.
    pub(super) fn del(&mut self, sky: &mut Sky, id: u64) {
        let Some(sandbox) = self.kubelet.sandboxes.get(&id) else { return };
        if self.brain.is_none() || !self.ready {
            return self.replied(sky, Asked::Del(id), Answer::Error("connection refused".into()));
        }
        let request = DelNetworkRequest {
            pod_name: self.kubelet.pods.get(&sandbox.pod).map(|pod| pod.name.clone()).unwrap_or_default(),
            pod_namespace: "default".into(),
            pod_uid: format!("uid-{}", sandbox.pod),
            network_name: sandbox.key.network.clone(),
            container_id: sandbox.key.container.clone(),
            if_name: sandbox.key.ifname.clone(),
            reason: "PodDeleted".into(),
            ..DelNetworkRequest::default()
        };
        self.last_call += 1;
        self.open.insert(self.last_call, Asked::Del(id));
        self.feed(sky, Event::Del(self.last_call, request));
    }

    // The runtime begins to take a sandbox down.
    fn end(&mut self, sky: &mut Sky, id: u64) {
        let Some(sandbox) = self.kubelet.sandboxes.get_mut(&id) else { return };
        sandbox.stage = Stage::Ending;
        sandbox.ended.get_or_insert(sky.nanos);
        let key = sandbox.key.clone();
        sky.tell(self.index, Happening::Ended(key));
        self.later(sky, self.setup.latencies.rpc, Item::Del(id));
    }

    /// An answer reaches the plugin, or its connection breaks.
    pub(super) fn replied(&mut self, sky: &mut Sky, asked: Asked, answer: Answer) {
        match (asked, answer) {
            (Asked::Add(id), Answer::Add(reply)) if reply.success => {
                self.handed(sky, id, &reply.allocations, reply.pod_vlan_id != 0);
            }
            (Asked::Add(id), Answer::Add(reply)) => self.refused(sky, id, &reply.failure),
            (Asked::Add(id), Answer::Error(text)) => self.refused(sky, id, &text),
            (Asked::Del(id), Answer::Del(reply)) if reply.success => {
                self.torn_down(sky, id, addresses(&reply.allocations));
            }
            (Asked::Del(id), Answer::Error(text)) if text.contains(UNKNOWN_POD) => {
                // Only what the checkpoint gives to nobody else.
                let free = self.not_given_on_disk(id);
                self.torn_down(sky, id, free);
            }
            (Asked::Del(id), Answer::Error(_)) => self.spooled(sky, id),
            (Asked::Del(id), _) => self.later(sky, self.setup.latencies.again, Item::Del(id)),
            (Asked::Add(_) | Asked::AddAgain(_), _) => {}
        }
    }

    // The addresses of a sandbox that no checkpoint gives to somebody else; none if that cannot be known.
    fn not_given_on_disk(&self, id: u64) -> Vec<IpAddr> {
        let Some(sandbox) = self.kubelet.sandboxes.get(&id) else { return Vec::new() };
        let others = |a: &&Allocation| a.container != sandbox.key.container;
        let mut free: Vec<IpAddr> = sandbox.addresses.iter().copied().filter(|_| !self.disk.files.is_empty()).collect();
        for file in self.disk.files.values() {
            let Ok(checkpoint) = Checkpoint::parse(&file.text()) else { return Vec::new() };
            let given = |address: &IpAddr| {
                let mut entries = checkpoint.allocations.iter().filter(others);
                entries.any(|a| a.address() == Some(*address))
            };
            free.retain(|address| !given(address));
        }
        free
    }

    fn handed(&mut self, sky: &mut Sky, id: u64, given: &[IpAllocation], branch: bool) {
        let Some(sandbox) = self.kubelet.sandboxes.get_mut(&id) else { return };
        if sandbox.stage != Stage::Asking {
            return; // the runtime has given up this ADD
        }
        sky.waited(sandbox.asked);
        let given = addresses(given);
        if given.is_empty() {
            return self.refused(sky, id, "no address");
        }
        sandbox.stage = Stage::Wiring;
        (sandbox.addresses, sandbox.branch) = (given, branch);
        self.later(sky, self.setup.latencies.plugin, Item::Wired(id));
    }

    /// The pod's network stands.
    pub(super) fn wired(&mut self, sky: &mut Sky, id: u64) {
        let Some(sandbox) = self.kubelet.sandboxes.get_mut(&id).filter(|s| s.stage == Stage::Wiring) else { return };
        sandbox.stage = Stage::Running;
        let (number, own) = (sandbox.pod, sandbox.addresses.clone());
        if !sandbox.branch {
            // A branch ENI's rules go by its link and lead to no address.
            self.host.linked.extend(sandbox.addresses.iter().copied());
            self.host.routed.extend(sandbox.addresses.iter().copied());
        }
        let Some(pod) = self.kubelet.pods.get_mut(&number) else { return };
        let former = self.host.links.insert(veth(&pod.name), id);
        if let Some(former) = former.and_then(|former| self.kubelet.sandboxes.get(&former)) {
            // This ADD has taken the veth of an earlier sandbox away, and the kernel its routes.
            for address in former.addresses.iter().filter(|address| !own.contains(address)) {
                self.host.linked.remove(address);
            }
        }
        pod.running = Some(sky.nanos);
        sky.started(pod.bound);
        if !pod.wanted {
            self.end(sky, id);
        }
    }

    fn refused(&mut self, sky: &mut Sky, id: u64, text: &str) {
        let Some(sandbox) = self.kubelet.sandboxes.get(&id) else { return };
        let (key, pod, asking) = (sandbox.key.clone(), sandbox.pod, sandbox.stage == Stage::Asking);
        sky.refused();
        self.note(|| format!("ADD {key} refused: {text}"), sky.nanos);
        if asking {
            self.end(sky, id);
            let again = self.setup.latencies.again;
            let again =
                again + Duration::from_millis(self.dice.below(u64::try_from(again.as_millis() / 2).unwrap_or(0)));
            self.later(sky, again, Item::Sandbox(pod));
        }
    }

    fn torn_down(&mut self, sky: &mut Sky, id: u64, cleared: Vec<IpAddr>) {
        for address in cleared {
            self.host.routed.remove(&address);
        }
        let Some(sandbox) = self.kubelet.sandboxes.get_mut(&id) else { return };
        sandbox.stage = Stage::Gone;
        sandbox.ended.get_or_insert(sky.nanos);
        let (held, number) = (std::mem::take(&mut sandbox.addresses), sandbox.pod);
        let Some(pod) = self.kubelet.pods.get(&number) else { return };
        let link = veth(&pod.name);
        if self.host.links.get(&link) == Some(&id) {
            self.host.links.remove(&link);
            for address in held {
                self.host.linked.remove(&address); // the kernel takes the route with the veth
            }
        }
        if !pod.wanted && pod.sandbox == Some(id) {
            self.kubelet.pods.remove(&number);
        }
    }

    // The plugin does without the daemon: it clears the host and leaves a record.
    fn spooled(&mut self, sky: &mut Sky, id: u64) {
        let Some(sandbox) = self.kubelet.sandboxes.get(&id) else { return };
        let (key, time) = (sandbox.key.clone(), super::node::moment(sky.nanos, self.wall_shift).wall);
        let own = self.not_given_on_disk(id);
        if self.disk.spool.len() < RECORDS_MAX {
            self.disk.spool.retain(|record| record.key != key);
            self.disk.spool.push(Record { key, pod: PodName::default(), uid: String::new(), time });
        }
        self.torn_down(sky, id, own);
        self.watch_spool(sky);
    }

    /// The host went down with every sandbox. The runtime deletes those that it still knows of; the kubelet starts the pods
    /// anew.
    pub(super) fn sandboxes_died(&mut self, sky: &mut Sky) {
        let alive = |sandbox: &Sandbox| matches!(sandbox.stage, Stage::Asking | Stage::Wiring | Stage::Running);
        let dead: Vec<u64> = self.kubelet.sandboxes.iter().filter(|(_, s)| alive(s)).map(|(id, _)| *id).collect();
        for id in dead {
            let Some(number) = self.kubelet.sandboxes.get(&id).map(|sandbox| sandbox.pod) else { continue };
            self.end(sky, id);
            if self.dice.below(2) == 0 {
                self.kubelet.sandboxes.remove(&id); // the runtime's own memory is lost
            }
            let Some(pod) = self.kubelet.pods.get_mut(&number).filter(|pod| pod.sandbox == Some(id)) else { continue };
            (pod.running, pod.sandbox) = (None, None);
            if pod.wanted {
                self.later(sky, self.setup.latencies.again, Item::Sandbox(number));
            } else {
                self.kubelet.pods.remove(&number);
            }
        }
    }

    /// The runtime asks for a sandbox's network or for its end once more; `running`: also for the network of a pod that
    /// runs. `true` if there was such a sandbox.
    pub(super) fn repeat(&mut self, sky: &mut Sky, pick: usize, running: bool) -> bool {
        let ids: Vec<u64> = self.kubelet.sandboxes.keys().copied().collect();
        let Some(id) = ids.get(pick % ids.len().max(1)).copied() else { return false };
        match self.kubelet.sandboxes[&id].stage {
            Stage::Running if !running => return false,
            Stage::Asking | Stage::Wiring | Stage::Running => self.later(sky, self.setup.latencies.rpc, Item::Add(id)),
            Stage::Ending | Stage::Gone => self.later(sky, self.setup.latencies.rpc, Item::Del(id)),
        }
        true
    }
}
