//! What the API actions do to the model. Refusals carry EC2's codes and, where clients match on it, EC2's text
//! (`spec/aws.md` 11.1).

use super::describe::filters_of;
use super::{EniState, GROUPS_PER_ENI, Refusal, TAGS_PER_RESOURCE, Vpc, refuse};
use crate::model::ec2::{Attachment, Call, Count, Create, Interface, Reply};
use crate::model::ids::{AttachmentId, EniId, GroupId, InstanceId, SubnetId};
use crate::model::map::{Map, Set};
use crate::model::order::Gather as _;
use crate::model::time::{Mono, Now};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{Ipv4Addr, Ipv6Addr};

pub(super) type Done<T> = Result<T, Refusal>;

impl Vpc {
    pub(super) fn act(&mut self, now: Now, call: &Call) -> Done<Reply> {
        match call {
            Call::DescribeAttached(_) | Call::DescribeOne(_) | Call::DescribeLeaked { .. } => {
                let filters = filters_of(call);
                self.list(now, &[], &filters).map(Reply::Interfaces)
            }
            Call::DescribeInstanceType(name) => self.describe_type(name),
            Call::DescribeSubnets { vpc, zone } => Ok(Reply::Subnets(self.subnets_in(vpc, zone))),
            Call::Create(create) => self.create(create),
            Call::Attach { eni, instance, device, card } => self.attach(now.mono, eni, instance, (*device, *card)),
            Call::DeleteOnTermination { eni, attachment } => self.delete_on_termination(eni, attachment),
            Call::ModifyGroups { eni, groups } => self.modify_groups(eni, groups),
            Call::CreateTags { eni, tags } => self.create_tags(eni, tags),
            Call::Assign { eni, count } => self.assign(eni, *count),
            Call::AssignIpv6Prefix(eni) => self.assign_v6_prefix(eni),
            Call::UnassignAddresses { eni, addresses } => self.unassign_addresses(eni, addresses),
            Call::UnassignPrefixes { eni, prefixes } => self.unassign_prefixes(eni, prefixes),
            Call::Detach(attachment) => self.detach(now.mono, attachment),
            Call::Delete(eni) => self.delete(eni),
        }
    }

    fn describe_type(&self, name: &str) -> Done<Reply> {
        match self.instance_type(name) {
            Some(kind) => Ok(Reply::InstanceType(kind)),
            None => {
                refuse("InvalidInstanceType", format!("The following supplied instance types do not exist: [{name}]"))
            }
        }
    }

    fn known(&self, eni: &EniId) -> Done<()> {
        if self.enis.contains_key(eni) {
            return Ok(());
        }
        refuse("InvalidNetworkInterfaceID.NotFound", format!("The networkInterface ID '{eni}' does not exist"))
    }

    // The ENI, for a change of it that everybody shall see.
    fn change(&mut self, eni: &EniId) -> Done<&mut EniState> {
        self.known(eni)?;
        self.touched.insert(eni.clone());
        match self.enis.get_mut(eni) {
            Some(state) => Ok(state),
            None => refuse("InternalError", "unreachable: the ENI was looked up above"),
        }
    }

    fn check_groups(&self, groups: &[GroupId]) -> Done<()> {
        if groups.len() > GROUPS_PER_ENI {
            let text =
                format!("The maximum number of security groups per interface has been reached: {GROUPS_PER_ENI}");
            return refuse("SecurityGroupsPerInterfaceLimitExceeded", text);
        }
        match groups.iter().find(|group| !self.groups.contains(group)) {
            Some(group) => refuse("InvalidGroup.NotFound", format!("The security group '{group}' does not exist")),
            None => Ok(()),
        }
    }

    fn create(&mut self, create: &Create) -> Done<Reply> {
        if let Some((earlier, eni)) = self.tokens.get(&create.client_token) {
            if earlier != create {
                let text = "The client token has been used with other parameters.";
                return refuse("IdempotentParameterMismatch", text);
            }
            // EC2 answers a repeated token with the ENI as it is now; once deleted the token stands for nothing.
            return match self.enis.get(eni) {
                Some(state) => Ok(Reply::Created(Box::new(state.interface.clone()))),
                None => refuse(
                    "InvalidNetworkInterfaceID.NotFound",
                    format!("The networkInterface ID '{eni}' does not exist"),
                ),
            };
        }
        check_tags(&create.tags)?;
        let id = self.new_interface(&create.subnet, &create.description, &create.groups, &create.tags)?;
        if let Err(refusal) = self.fill(&id, create.count) {
            // All or nothing: the ENI goes again with the one address that it got.
            self.remove(&id);
            return Err(refusal);
        }
        let state = self.change(&id)?;
        state.interface.conntrack = create.conntrack;
        let created = state.interface.clone();
        if !create.client_token.is_empty() {
            self.tokens.insert(create.client_token.clone(), (create.clone(), id));
        }
        Ok(Reply::Created(Box::new(created)))
    }

    /// A new ENI with its own address and nothing else.
    pub(super) fn new_interface(
        &mut self,
        subnet: &SubnetId,
        description: &str,
        groups: &[GroupId],
        tags: &Map<String, String>,
    ) -> Done<EniId> {
        if self.enis.len() >= self.eni_quota {
            let text = format!("You have exceeded the limit of network interfaces ({}).", self.eni_quota);
            return refuse("NetworkInterfaceLimitExceeded", text);
        }
        self.check_groups(groups)?;
        let dice = self.dice();
        let Some(place) = self.subnets.get_mut(subnet) else {
            return refuse("InvalidSubnetID.NotFound", format!("The subnet ID '{subnet}' does not exist"));
        };
        let Some(own) = place.space.take(dice) else { return exhausted() };
        let groups = if groups.is_empty() { vec![self.default_group.clone()] } else { groups.to_vec() };
        let id = EniId(self.new_id("eni"));
        let interface = Interface {
            id: id.clone(),
            mac: Some(self.new_mac()),
            description: description.to_owned(),
            interface_type: "interface".into(),
            subnet: subnet.clone(),
            status: "available".into(),
            primary_ipv4: Some(own),
            groups,
            tags: tags.clone(),
            ..Interface::default()
        };
        self.enis.insert(id.clone(), EniState { interface, attached_at: None, detached_at: None });
        self.touched.insert(id.clone());
        Ok(id)
    }

    pub(super) fn attach(&mut self, now: Mono, eni: &EniId, instance: &InstanceId, place: (u32, u32)) -> Done<Reply> {
        let (device, card) = place;
        self.known(eni)?;
        let Some(host) = self.instances.get(instance) else {
            return refuse("InvalidInstanceID.NotFound", format!("The instance ID '{instance}' does not exist"));
        };
        let state = &self.enis[eni];
        if state.interface.attachment.is_some() {
            return refuse("InvalidNetworkInterface.InUse", format!("Network interface '{eni}' is already in use."));
        }
        if self.subnets.get(&state.interface.subnet).is_none_or(|subnet| subnet.zone != host.zone) {
            let text = format!("Network interface '{eni}' and instance '{instance}' are not in the same zone.");
            return refuse("InvalidParameterCombination", text);
        }
        let Some(limit) = host.enis_on(card) else {
            let text = format!("Instance type {} has no network card with index {card}.", host.kind.name);
            return refuse("InvalidParameterValue", text);
        };
        let on_card = self.attachments(instance).filter(|at| at.card == card).collect::<Vec<_>>();
        if on_card.iter().any(|at| at.device == device) {
            let text = format!("Instance '{instance}' already has an interface attached at device index '{device}'.");
            return refuse("InvalidParameterValue", text);
        }
        if on_card.len() >= limit as usize {
            let text = format!("Interface count {} exceeds the limit for {}", on_card.len() + 1, host.kind.name);
            return refuse("AttachmentLimitExceeded", text);
        }
        if slots(&state.interface) > host.kind.ipv4_per_eni as usize {
            return too_many_addresses();
        }
        let id = self.bind(now, eni, instance, place, false);
        Ok(Reply::Attached(id))
    }

    /// Every attachment of an instance, those being detached included.
    pub(super) fn attachments(&self, instance: &InstanceId) -> impl Iterator<Item = &Attachment> {
        self.attached_to(instance).filter_map(|interface| interface.attachment.as_ref())
    }

    pub(super) fn bind(
        &mut self,
        now: Mono,
        eni: &EniId,
        instance: &InstanceId,
        (device, card): (u32, u32),
        delete_on_termination: bool,
    ) -> AttachmentId {
        let id = self.new_attachment();
        self.touched.insert(eni.clone());
        self.touched_instances.insert(instance.clone());
        self.attachments.insert(id.clone(), eni.clone());
        if let Some(host) = self.instances.get_mut(instance) {
            host.enis.insert(eni.clone());
        }
        if let Some(state) = self.enis.get_mut(eni) {
            let instance = instance.clone();
            state.attached_at = Some(now);
            state.interface.status = "in-use".into();
            state.interface.attachment =
                Some(Attachment { id: id.clone(), instance, device, card, delete_on_termination });
        }
        id
    }

    fn delete_on_termination(&mut self, eni: &EniId, attachment: &AttachmentId) -> Done<Reply> {
        let state = self.change(eni)?;
        match &mut state.interface.attachment {
            Some(found) if found.id == *attachment => {
                found.delete_on_termination = true;
                Ok(Reply::Done)
            }
            _ => refuse("InvalidAttachmentID.NotFound", format!("The attachment ID '{attachment}' does not exist")),
        }
    }

    fn modify_groups(&mut self, eni: &EniId, groups: &[GroupId]) -> Done<Reply> {
        self.known(eni)?;
        if groups.is_empty() {
            return refuse("MissingParameter", "The request must contain the parameter SecurityGroupId");
        }
        self.check_groups(groups)?;
        self.change(eni)?.interface.groups = groups.to_vec();
        Ok(Reply::Done)
    }

    fn create_tags(&mut self, eni: &EniId, tags: &Map<String, String>) -> Done<Reply> {
        self.known(eni)?;
        let mut all = self.enis[eni].interface.tags.clone();
        all.extend(tags.clone());
        check_tags(&all)?;
        self.change(eni)?.interface.tags = all;
        Ok(Reply::Done)
    }

    fn assign(&mut self, eni: &EniId, count: Count) -> Done<Reply> {
        self.known(eni)?;
        self.fill(eni, count).map(Reply::Assigned)
    }

    // Gives an ENI all that is asked for, or nothing.
    fn fill(&mut self, eni: &EniId, count: Count) -> Done<Vec<IpNet>> {
        let state = &self.enis[eni];
        let subnet = state.interface.subnet.clone();
        let limit = match &state.interface.attachment {
            Some(at) => self.instances.get(&at.instance).map_or(u32::MAX, |host| host.kind.ipv4_per_eni),
            None => 64, // no type has more; the attach checks the rest
        };
        let used = slots(&state.interface);
        let within = |wanted: u32| used.saturating_add(wanted as usize) <= limit as usize;
        let mut given = Vec::new();
        match count {
            Count::Addresses(wanted) | Count::Prefixes(wanted) if !within(wanted) => too_many_addresses(),
            Count::Addresses(wanted) => {
                if self.subnets[&subnet].space.free() < wanted {
                    return exhausted();
                }
                for _ in 0..wanted {
                    let dice = self.dice();
                    let taken = self.subnets.get_mut(&subnet).and_then(|place| place.space.take(dice));
                    let Some(addr) = taken else { return exhausted() };
                    given.push(addr);
                }
                self.change(eni)?.interface.secondary_ipv4s.extend(&given);
                Ok(given.into_iter().map(|addr| IpNet::from(std::net::IpAddr::V4(addr))).collect())
            }
            Count::Prefixes(wanted) => self.fill_prefixes(eni, &subnet, wanted),
            Count::Ipv6Addresses(wanted) => self.fill_v6(eni, &subnet, wanted),
        }
    }

    fn fill_prefixes(&mut self, eni: &EniId, subnet: &SubnetId, wanted: u32) -> Done<Vec<IpNet>> {
        if self.subnets[subnet].space.free_blocks() < wanted as usize {
            let text = "There are not enough free cidr blocks in the specified subnet to satisfy the request.";
            return refuse("InsufficientCidrBlocks", text);
        }
        let mut given = Vec::new();
        for _ in 0..wanted {
            let dice = self.dice();
            let taken = self.subnets.get_mut(subnet).and_then(|place| place.space.take_block(dice));
            let Some(block) = taken else { return exhausted() };
            given.push(block);
        }
        self.change(eni)?.interface.v4_prefixes.extend(&given);
        Ok(given.into_iter().map(IpNet::V4).collect())
    }

    fn next_v6(&mut self, subnet: &SubnetId) -> Done<(Ipv6Net, u64)> {
        match self.subnets.get_mut(subnet) {
            Some(place) if place.v6.is_some() => {
                place.v6_given += 1;
                Ok((place.v6.unwrap_or_default(), place.v6_given))
            }
            _ => refuse("InvalidParameterValue", format!("Subnet '{subnet}' has no IPv6 CIDR block.")),
        }
    }

    pub(super) fn fill_v6(&mut self, eni: &EniId, subnet: &SubnetId, wanted: u32) -> Done<Vec<IpNet>> {
        let mut given = Vec::new();
        for _ in 0..wanted {
            let (net, nth) = self.next_v6(subnet)?;
            // The lower half of the /64 holds addresses, the upper half prefixes.
            given.push(Ipv6Addr::from(u128::from(net.network()) + 0x100 + u128::from(nth)));
        }
        self.change(eni)?.interface.ipv6s.extend(&given);
        Ok(given.into_iter().map(|addr| IpNet::from(std::net::IpAddr::V6(addr))).collect())
    }

    fn assign_v6_prefix(&mut self, eni: &EniId) -> Done<Reply> {
        self.known(eni)?;
        let subnet = self.enis[eni].interface.subnet.clone();
        let (net, nth) = self.next_v6(&subnet)?;
        let first = Ipv6Addr::from(u128::from(net.network()) + (1 << 63) + (u128::from(nth) << 48));
        let Ok(prefix) = Ipv6Net::new(first, 80) else { return refuse("InternalError", "bad prefix length") };
        self.change(eni)?.interface.v6_prefixes.push(IpNet::V6(prefix));
        Ok(Reply::Assigned(vec![IpNet::V6(prefix)]))
    }

    fn unassign_addresses(&mut self, eni: &EniId, addresses: &[Ipv4Addr]) -> Done<Reply> {
        self.known(eni)?;
        let interface = &self.enis[eni].interface;
        if addresses.is_empty() {
            return refuse("MissingParameter", "The request must contain the parameter PrivateIpAddress or Ipv4Prefix");
        }
        let gone = addresses.iter().copied().gather::<Set<_>>();
        if let Some(stranger) = gone.iter().find(|addr| !interface.secondary_ipv4s.contains(addr)) {
            let text = if interface.primary_ipv4 == Some(*stranger) {
                format!("The primary private IP address {stranger} of a network interface cannot be unassigned.")
            } else {
                format!("Some of the specified addresses are not assigned to interface {eni}: {stranger}")
            };
            return refuse("InvalidParameterValue", text);
        }
        let subnet = interface.subnet.clone();
        if let Some(place) = self.subnets.get_mut(&subnet) {
            for addr in &gone {
                place.space.release(*addr);
            }
        }
        self.change(eni)?.interface.secondary_ipv4s.retain(|addr| !gone.contains(addr));
        Ok(Reply::Done)
    }

    fn unassign_prefixes(&mut self, eni: &EniId, prefixes: &[Ipv4Net]) -> Done<Reply> {
        self.known(eni)?;
        let interface = &self.enis[eni].interface;
        if prefixes.is_empty() {
            return refuse("MissingParameter", "The request must contain the parameter PrivateIpAddress or Ipv4Prefix");
        }
        let gone = prefixes.iter().copied().gather::<Set<_>>();
        if let Some(stranger) = gone.iter().find(|prefix| !interface.v4_prefixes.contains(prefix)) {
            let text = format!("Some of the specified prefixes are not assigned to interface {eni}: {stranger}");
            return refuse("InvalidParameterValue", text);
        }
        let subnet = interface.subnet.clone();
        if let Some(place) = self.subnets.get_mut(&subnet) {
            for prefix in &gone {
                place.space.release_block(*prefix);
            }
        }
        self.change(eni)?.interface.v4_prefixes.retain(|prefix| !gone.contains(prefix));
        Ok(Reply::Done)
    }

    fn detach(&mut self, now: Mono, attachment: &AttachmentId) -> Done<Reply> {
        let state = self.attachments.get(attachment).and_then(|eni| self.enis.get(eni));
        let found = state.and_then(|state| {
            let at = state.interface.attachment.as_ref()?;
            Some((state.interface.id.clone(), at.device, at.card, state.detached_at))
        });
        let Some((eni, device, card, under_way)) = found else {
            let text = format!("The attachment ID '{attachment}' does not exist");
            return refuse("InvalidAttachmentID.NotFound", text);
        };
        if (device, card) == (0, 0) {
            let text = "The network interface at device index 0 cannot be detached.";
            return refuse("OperationNotPermitted", text);
        }
        if under_way.is_some() {
            return refuse("IncorrectState", format!("Attachment '{attachment}' is in state 'detaching'."));
        }
        let done = now.plus(self.knobs.detach_time);
        let state = self.change(&eni)?;
        state.interface.status = "detaching".into();
        state.detached_at = Some(done);
        self.detaching.insert((done, eni));
        self.finish_detaches(now);
        Ok(Reply::Done)
    }

    pub(super) fn finish_detaches(&mut self, now: Mono) {
        while self.detaching.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, id)) = self.detaching.pop_first() else { return };
            let Some(state) = self.enis.get_mut(&id) else { continue };
            state.detached_at = None;
            state.interface.status = "available".into();
            if let Some(attachment) = state.interface.attachment.take() {
                self.attachments.remove(&attachment.id);
                if let Some(host) = self.instances.get_mut(&attachment.instance) {
                    host.enis.remove(&id);
                }
                self.touched_instances.insert(attachment.instance);
            }
            self.touched.insert(id);
        }
    }

    fn delete(&mut self, eni: &EniId) -> Done<Reply> {
        self.known(eni)?;
        if self.enis[eni].interface.attachment.is_some() {
            return refuse("InvalidParameterValue", format!("Network interface '{eni}' is currently in use."));
        }
        self.remove(eni);
        Ok(Reply::Done)
    }

    pub(super) fn remove(&mut self, eni: &EniId) {
        let Some(EniState { interface, .. }) = self.enis.remove(eni) else { return };
        self.touched.insert(eni.clone());
        let Some(place) = self.subnets.get_mut(&interface.subnet) else { return };
        for addr in interface.primary_ipv4.iter().chain(&interface.secondary_ipv4s) {
            place.space.release(*addr);
        }
        for prefix in interface.v4_prefixes {
            place.space.release_block(prefix);
        }
    }
}

/// IPv4 slots that an ENI uses: each address and each prefix is one (`spec/aws.md` 15.1).
fn slots(interface: &Interface) -> usize {
    usize::from(interface.primary_ipv4.is_some()) + interface.secondary_ipv4s.len() + interface.v4_prefixes.len()
}

fn check_tags(tags: &Map<String, String>) -> Done<()> {
    if let Some(key) = tags.keys().find(|key| key.starts_with("aws:")) {
        return refuse(
            "InvalidParameterValue",
            format!(
                "Value ( {key} ) for parameter key is invalid. Tag keys starting with 'aws:' are reserved for internal use"
            ),
        );
    }
    if tags.len() > TAGS_PER_RESOURCE {
        return refuse("TagLimitExceeded", "The maximum number of Tags for a resource has been reached.");
    }
    Ok(())
}

fn exhausted<T>() -> Done<T> {
    let text = "The specified subnet does not have enough free addresses to satisfy the request.";
    refuse("InsufficientFreeAddressesInSubnet", text)
}

fn too_many_addresses<T>() -> Done<T> {
    refuse("PrivateIpAddressLimitExceeded", "Number of private addresses will exceed limit.")
}
