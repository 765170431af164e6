//! The Describe actions: filters, and answers that may lag behind the truth.

use super::{Refusal, Vpc, refuse};
use crate::model::ec2::{Call, Interface, Subnet};
use crate::model::ids::{EniId, InstanceId, VpcId};
use crate::model::map::Set;
use crate::model::order::{self, Gather as _};
use crate::model::time::Now;
use std::time::Duration;

/// One filter: a name and the values of which one must match; `*` and `?` stand for any text and any character.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Name, as in the API.
    pub name: String,
    /// Values.
    pub values: Vec<String>,
}

impl Filter {
    /// A filter with one value.
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Filter {
        Filter { name: name.into(), values: vec![value.into()] }
    }
}

// EC2's wildcards. Recursion on the pattern; patterns are short.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, _) => text.is_empty(),
        (Some((b'*', rest)), _) => (0..=text.len()).any(|skip| matches(rest, &text[skip..])),
        (Some((b'?', rest)), Some((_, tail))) => matches(rest, tail),
        (Some((want, rest)), Some((have, tail))) => want == have && matches(rest, tail),
        (Some(_), None) => false,
    }
}

/// The filters that a call of the core stands for (`spec/aws.md` 7.2, `spec/ipamd.md` 9.6).
pub(super) fn filters_of(call: &Call) -> Vec<Filter> {
    match call {
        Call::DescribeAttached(instance) => vec![Filter::new("attachment.instance-id", instance.as_str())],
        Call::DescribeOne(eni) => vec![Filter::new("network-interface-id", eni.as_str())],
        Call::DescribeLeaked { vpc, tags } => {
            let by_tag = tags.iter().map(|(key, value)| match value {
                Some(value) => Filter::new(format!("tag:{key}"), value.as_str()),
                None => Filter::new("tag-key", key.as_str()),
            });
            let fixed = [Filter::new("status", "available"), Filter::new("vpc-id", vpc.as_str())];
            fixed.into_iter().chain(by_tag).collect()
        }
        _ => Vec::new(),
    }
}

impl Vpc {
    pub(super) fn list(&mut self, now: Now, ids: &[EniId], filters: &[Filter]) -> Result<Vec<Interface>, Refusal> {
        let vpc = self.id.clone();
        let mut found = Vec::new();
        let mut known = Set::new();
        for id in self.candidates(ids, filters) {
            let told = self.described.get_mut(&id).and_then(|lagged| lagged.seen(now.mono)?.as_ref());
            let Some(interface) = told else { continue };
            known.insert(id);
            let mut all = true;
            for filter in filters {
                all &= passes(interface, filter, &vpc)?;
            }
            if all {
                found.push(interface.clone());
            }
        }
        let missing = ids.iter().filter(|id| !known.contains(*id)).collect::<Vec<_>>();
        match missing.as_slice() {
            [] => {}
            [one] => {
                let text = format!("The networkInterface ID '{one}' does not exist");
                return refuse("InvalidNetworkInterfaceID.NotFound", text);
            }
            several => {
                let list = several.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let text = format!("The networkInterface IDs '{list}' do not exist");
                return refuse("InvalidNetworkInterfaceID.NotFound", text);
            }
        }
        Ok(found)
    }

    // The ENIs that may pass, so that an account with thousands need not be gone through for the few of one instance.
    fn candidates(&mut self, ids: &[EniId], filters: &[Filter]) -> Set<EniId> {
        if !ids.is_empty() {
            return ids.iter().cloned().gather();
        }
        let exact = |name: &str| {
            let filter = filters.iter().find(|filter| filter.name == name)?;
            filter.values.iter().all(|value| !value.contains(['*', '?'])).then_some(&filter.values)
        };
        if let Some(values) = exact("network-interface-id") {
            return values.iter().map(|id| EniId(id.clone())).gather();
        }
        let described = &self.described;
        let told = |id: &EniId, fits: &dyn Fn(&Interface) -> bool| {
            described.get(id).is_some_and(|lagged| lagged.stages().any(|state| state.as_ref().is_some_and(fits)))
        };
        if let Some(values) = exact("attachment.instance-id") {
            let mut all = Set::new();
            for value in values {
                let Some(host) = self.instances.get_mut(&InstanceId(value.clone())) else { continue };
                let here = |i: &Interface| i.attachment.as_ref().is_some_and(|at| at.instance.as_str() == value);
                host.described.retain(|id| told(id, &here));
                all.extend(host.described.iter().cloned());
            }
            return all;
        }
        if exact("status").is_some_and(|values| values.iter().all(|value| value == "available")) {
            self.loose.retain(|id| told(id, &|interface| interface.attachment.is_none()));
            return self.loose.clone();
        }
        self.described.keys().cloned().gather()
    }

    /// The subnets of a zone, most free addresses first.
    pub(super) fn subnets_in(&self, vpc: &VpcId, zone: &str) -> Vec<Subnet> {
        let mut found = self
            .subnets
            .iter()
            .filter(|(_, subnet)| *vpc == self.id && subnet.zone == zone)
            .map(|(id, subnet)| Subnet { id: id.clone(), free: subnet.space.free(), tags: subnet.tags.clone() })
            .collect::<Vec<_>>();
        order::sort_by_key(&mut found, |subnet| std::cmp::Reverse(subnet.free));
        found
    }

    /// Makes the changes since the last time visible, each after its lag.
    pub(super) fn publish(&mut self, now: Now) {
        let visible = now.mono.plus(self.knobs.describe_lag);
        for id in std::mem::take(&mut self.touched) {
            let state = self.enis.get(&id).map(|state| state.interface.clone());
            match state.as_ref().map(|interface| &interface.attachment) {
                Some(Some(attachment)) => {
                    self.touched_instances.insert(attachment.instance.clone());
                    if let Some(host) = self.instances.get_mut(&attachment.instance) {
                        host.described.insert(id.clone());
                    }
                }
                Some(None) => {
                    self.loose.insert(id.clone());
                }
                None => {
                    self.vanishing.insert((visible, id.clone()));
                }
            }
            let told = self.described.entry(id).or_default();
            told.set(visible, state);
            told.seen(now.mono);
        }
        while self.vanishing.first().is_some_and(|(at, _)| *at <= now.mono) {
            let Some((_, id)) = self.vanishing.pop_first() else { break };
            // A lag that was made shorter lets a later state wait for an earlier one.
            if self.described.get_mut(&id).is_some_and(|lagged| lagged.seen(now.mono) == Some(&None)) {
                self.described.remove(&id);
            } else if self.described.contains_key(&id) {
                self.vanishing.insert((now.mono.plus(Duration::from_secs(1)), id));
            }
        }
        let visible = now.mono.plus(self.knobs.imds_lag);
        for id in std::mem::take(&mut self.touched_instances) {
            let truth = self.imds_truth(&id);
            if let Some(instance) = self.instances.get_mut(&id) {
                instance.seen.set(visible, truth);
            }
        }
    }
}

fn passes(interface: &Interface, filter: &Filter, vpc: &VpcId) -> Result<bool, Refusal> {
    let any = |text: &str| filter.values.iter().any(|value| matches(value.as_bytes(), text.as_bytes()));
    let attachment = interface.attachment.as_ref();
    Ok(match filter.name.as_str() {
        "network-interface-id" => any(interface.id.as_str()),
        "attachment.instance-id" => attachment.is_some_and(|at| any(at.instance.as_str())),
        "attachment.attachment-id" => attachment.is_some_and(|at| any(at.id.as_str())),
        "status" => any(&interface.status),
        "vpc-id" => any(vpc.as_str()),
        "subnet-id" => any(interface.subnet.as_str()),
        "description" => any(&interface.description),
        "interface-type" => any(&interface.interface_type),
        "mac-address" => interface.mac.is_some_and(|mac| any(&mac.to_string())),
        "group-id" => interface.groups.iter().any(|group| any(group.as_str())),
        "tag-key" => interface.tags.keys().any(|key| any(key)),
        name => match name.strip_prefix("tag:") {
            Some(key) => interface.tags.get(key).is_some_and(|value| any(value)),
            None => return refuse("InvalidParameterValue", format!("The filter '{name}' is invalid")),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn wildcards() {
        for (pattern, text, expect) in [
            ("", "", true),
            ("a", "a", true),
            ("a", "ab", false),
            ("aws-K8S-*", "aws-K8S-i-1", true),
            ("*", "", true),
            ("*-i-?", "aws-i-1", true),
            ("*-i-?", "aws-i-12", false),
            ("?", "", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), expect, "{pattern} {text}");
        }
    }
}
