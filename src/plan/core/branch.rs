//! Requests that need the pod's object: branch ENIs (`spec/ipamd.md` 10.2 step 2, 10.3 step 4) and the annotation with the
//! pod's address (13.2). Only with these two features does a request wait for the API server.

use super::saver::Undo;
use super::{Answer, CallId, Core, Effect, Level, Op};
use crate::model::ids::{PodKey, PodName};
use crate::model::kube::{self, BranchEni, Call, POD_ENI, POD_IPS, Pod, Reply};
use crate::model::naming;
use crate::model::wire::{AddNetworkReply, DelNetworkReply, DelNetworkRequest, IpAllocation, UNKNOWN_POD};
use crate::plan::branch::Branch;
use crate::plan::host::HostBranch;
use crate::plan::pool::{Kind, Owner, Released};
use std::net::IpAddr;

/// A request that waits for the pod's object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lookup {
    call: CallId,
    key: PodKey,
    wants: Wants,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Wants {
    /// An address; `waited`: the API server was already asked to wait for the annotation.
    Add { owner: Owner, every_card: bool, waited: bool },
    /// To be deleted, and unknown to the pool.
    Del { uid: String },
}

/// An ADD whose address is being written into the pod's annotation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Annotated {
    call: CallId,
    key: PodKey,
    reply: AddNetworkReply,
    fresh: Vec<u32>,
}

fn bare(address: IpAddr) -> IpAllocation {
    let mut allocation = IpAllocation { device_number: -1, ..IpAllocation::default() };
    match address {
        IpAddr::V4(ip) => allocation.ipv4 = ip.to_string(),
        IpAddr::V6(ip) => allocation.ipv6 = ip.to_string(),
    }
    allocation
}

impl Core {
    /// Reads the pod before it gets an address: it may want a branch ENI.
    pub(super) fn look_up(&mut self, call: CallId, owner: Owner, every_card: bool) {
        if !self.pool.cards_of(&owner.key).is_empty() {
            return self.add_ordinary(call, owner, every_card);
        }
        let (namespace, name) = (owner.pod.namespace.clone(), owner.pod.name.clone());
        let key = owner.key.clone();
        let lookup = Lookup { call, key, wants: Wants::Add { owner, every_card, waited: false } };
        self.ask_kube(Op::Lookup(lookup), Call::Pod { namespace, name });
    }

    /// A pod that the pool does not know may have had a branch ENI.
    pub(super) fn look_up_deleted(&mut self, call: CallId, request: &DelNetworkRequest) {
        let key = PodKey {
            network: request.network_name.clone(),
            container: request.container_id.clone(),
            ifname: request.if_name.clone(),
        };
        let pod = Call::Pod { namespace: request.pod_namespace.clone(), name: request.pod_name.clone() };
        let lookup = Lookup { call, key, wants: Wants::Del { uid: request.pod_uid.clone() } };
        self.ask_kube(Op::Lookup(lookup), pod);
    }

    pub(super) fn looked_up(&mut self, lookup: Lookup, result: Result<Reply, kube::Failure>) {
        let Lookup { call, key, wants } = lookup;
        match (wants, result) {
            (Wants::Add { owner, every_card, waited }, Ok(Reply::Pod(pod))) => {
                self.add_looked_up(call, owner, every_card, waited, &pod);
            }
            (Wants::Add { .. }, result) => {
                let why = result.map_or_else(|failure| failure.to_string(), |reply| format!("{reply:?}"));
                self.refuse(call, &key, &format!("read the pod from the API server: {why}"));
            }
            (Wants::Del { uid }, Ok(Reply::Pod(pod))) => {
                let answer = self.branch_deleted(&uid, &pod).map_or_else(Answer::Error, Answer::Del);
                self.when_durable(Effect::Reply(call, answer), Undo::Nothing);
            }
            // The pod is gone, and with it its branch ENI (B50).
            (Wants::Del { .. }, Err(failure)) if failure.status == 404 => {
                let reply = DelNetworkReply {
                    success: true,
                    network_policy_mode: self.config.network_policy_mode.clone(),
                    ..DelNetworkReply::default()
                };
                // An earlier DEL may have released an address a moment ago.
                self.when_durable(Effect::Reply(call, Answer::Del(reply)), Undo::Nothing);
            }
            (Wants::Del { .. }, result) => {
                let why = result.map_or_else(|failure| failure.to_string(), |reply| format!("{reply:?}"));
                let text = format!("read the pod from the API server: {why}");
                self.out.push(Effect::Reply(call, Answer::Error(text)));
            }
        }
    }

    fn add_looked_up(&mut self, call: CallId, owner: Owner, every_card: bool, waited: bool, pod: &Pod) {
        if !pod.wants_branch {
            return self.add_ordinary(call, owner, every_card);
        }
        let trunk = self.pool.enis().find(|(_, eni)| eni.card == 0 && eni.kind == Kind::Trunk);
        let Some(parent) = trunk.and_then(|(id, _)| self.trunks.get(id)).copied() else {
            return self.refuse(call, &owner.key, "the pod wants a branch ENI, but the node has no trunk ENI yet");
        };
        let Some(annotation) = pod.annotations.get(POD_ENI) else {
            if waited {
                return self.refuse(call, &owner.key, "the pod has no branch ENI yet: its annotation is missing");
            }
            let (namespace, name) = (owner.pod.namespace.clone(), owner.pod.name.clone());
            let lookup = Lookup { call, key: owner.key.clone(), wants: Wants::Add { owner, every_card, waited: true } };
            return self.ask_kube(Op::Lookup(lookup), Call::PodWithBranch { namespace, name });
        };
        let branch = match BranchEni::parse(annotation, self.config.v6) {
            Ok(branch) => branch,
            Err(why) => return self.refuse(call, &owner.key, &format!("annotation {POD_ENI}: {why}")),
        };
        self.log(Level::Info, format!("branch eni {branch:?} for {} ({})", owner.pod, owner.key));
        let mut reply = self.add_reply(&[]);
        reply.allocations = vec![bare(branch.address)];
        reply.pod_vlan_id = branch.vlan.into();
        reply.pod_eni_mac = branch.mac.to_string();
        reply.pod_eni_subnet_gw = branch.gateway.to_string();
        reply.parent_if_index = i32::try_from(parent).unwrap_or(i32::MAX);
        self.confirm(call, &owner, reply, Undo::Nothing);
    }

    /// What the host has for these pods is kept right from now on. What the API server does not tell any more, or not yet
    /// again, stays as it was known.
    pub(super) fn branches_seen(&mut self, pods: &[(PodName, String)]) {
        let mut branches = Vec::new();
        for (pod, annotation) in pods {
            let read = BranchEni::parse(annotation, self.config.v6).and_then(|branch| {
                let eni = Branch::new(branch.vlan, branch.mac, branch.gateway).map_err(|error| error.to_string())?;
                let veth = naming::suffix(&pod.namespace, &pod.name, 0);
                Ok(HostBranch { address: branch.address, eni, name: pod.to_string(), veth })
            });
            match read {
                Ok(branch) => branches.push(branch),
                Err(why) => self.log(Level::Warn, format!("annotation {POD_ENI} of {pod}: {why}")),
            }
        }
        if branches != self.branches {
            self.branches = branches;
            self.host_dirty = true;
        }
    }

    fn branch_deleted(&self, uid: &str, pod: &Pod) -> Result<DelNetworkReply, String> {
        if pod.uid != uid {
            return Err(format!("pod UID mismatch: got {uid}, expected {}", pod.uid));
        }
        let annotation = pod.annotations.get(POD_ENI).ok_or(UNKNOWN_POD)?;
        let branch =
            BranchEni::parse(annotation, self.config.v6).map_err(|why| format!("annotation {POD_ENI}: {why}"))?;
        let mut allocation = bare(branch.address);
        allocation.device_number = 0;
        Ok(DelNetworkReply {
            success: true,
            allocations: vec![allocation],
            pod_vlan_id: branch.vlan.into(),
            network_policy_mode: self.config.network_policy_mode.clone(),
        })
    }

    /// Sends the reply to an ADD once it is durable, and told to the API server where that is wanted.
    pub(super) fn confirm(&mut self, call: CallId, owner: &Owner, reply: AddNetworkReply, undo: Undo) {
        let first = reply.allocations.first().map(|first| format!("{}{}", first.ipv4, first.ipv6));
        let Some(value) = first.filter(|_| self.config.annotate_pod_ip) else {
            return self.when_durable(Effect::Reply(call, Answer::Add(reply)), undo);
        };
        let fresh = if let Undo::Assign(_, cards) = &undo { cards.clone() } else { Vec::new() };
        let (namespace, name) = (owner.pod.namespace.clone(), owner.pod.name.clone());
        let op = self.begin(Op::Annotate(Annotated { call, key: owner.key.clone(), reply, fresh }));
        let annotate = Call::Annotate { namespace, name, key: POD_IPS.into(), value };
        self.when_durable(Effect::Kube(op, annotate), undo);
    }

    pub(super) fn annotated(&mut self, annotated: Annotated, failure: Option<kube::Failure>) {
        let Annotated { call, key, reply, fresh } = annotated;
        let branch = reply.pod_vlan_id != 0;
        let Some(failure) = failure else {
            if branch || !self.pool.cards_of(&key).is_empty() {
                return self.out.push(Effect::Reply(call, Answer::Add(reply)));
            }
            return self.refuse(call, &key, "deleted while its annotation was written");
        };
        // Nobody has used it: it needs no rest (B46).
        for card in fresh {
            self.pool.undo_assign(&key, card);
        }
        self.changed();
        self.refuse(call, &key, &format!("annotate the pod: {failure}"));
    }

    /// The annotation of a pod that has lost its address is emptied; nobody waits for that.
    pub(super) fn unannotate(&mut self, released: &Released) {
        let (namespace, name) = (released.owner.pod.namespace.clone(), released.owner.pod.name.clone());
        if !namespace.is_empty() && !name.is_empty() {
            let op = Op::Unannotate { namespace: namespace.clone(), name: name.clone(), address: released.address };
            self.ask_kube(op, Call::Pod { namespace, name });
        }
    }

    /// Gives up requests of a key that wait for the API server; the runtime has deleted the pod.
    pub(super) fn cancel_lookups(&mut self, key: &PodKey) {
        let adds = |op: &Op| match op {
            Op::Lookup(Lookup { call, key: waiting, wants: Wants::Add { .. } }) if waiting == key => Some(*call),
            _ => None,
        };
        let given_up: Vec<_> = self.ops.iter().filter_map(|(id, op)| adds(op).map(|call| (*id, call))).collect();
        for (id, call) in given_up {
            self.ops.remove(&id);
            self.refuse(call, key, "deleted while it waited for the API server");
        }
    }
}
