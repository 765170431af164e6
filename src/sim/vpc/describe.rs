//! The Describe actions: filters, and answers that may lag behind the truth.

use super::{Refusal, Vpc, refuse};
use crate::model::ec2::{Call, Interface, Subnet};
use crate::model::ids::{EniId, VpcId};
use crate::model::order;
use crate::model::time::Now;

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
        let seen = self.described.values_mut().filter_map(|lagged| lagged.seen(now.mono)?.clone());
        let seen = seen.filter(|interface| ids.is_empty() || ids.contains(&interface.id)).collect::<Vec<_>>();
        let missing = ids.iter().filter(|id| seen.iter().all(|interface| interface.id != **id)).collect::<Vec<_>>();
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
        let mut found = Vec::new();
        for interface in seen {
            let mut all = true;
            for filter in filters {
                all &= passes(&interface, filter, &vpc)?;
            }
            if all {
                found.push(interface);
            }
        }
        Ok(found)
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
            if let Some(attachment) = state.as_ref().and_then(|interface| interface.attachment.as_ref()) {
                self.touched_instances.insert(attachment.instance.clone());
            }
            self.described.entry(id).or_default().set(visible, state);
        }
        self.described.retain(|_, lagged| lagged.seen(now.mono) != Some(&None));
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
