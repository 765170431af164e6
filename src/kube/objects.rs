//! Objects of the API as they come, read for the fields that are used (`spec/kubernetes.md` 4).
//!
//! They are looked into as JSON values: a structure for each would cost more code than the few fields are worth. What is
//! missing or of another type counts as absent; unknown fields are passed over.

use crate::model::kube::{EniConfig, Feature, Node, POD_ENI, Pod};
use crate::model::map::Map;
use crate::model::order::Gather as _;
use serde_json::{Value, json};

/// A text inside an object, by JSON pointer; empty if it is not there.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

/// `metadata.resourceVersion`: opaque.
pub fn version(object: &Value) -> &str {
    text(object, "/metadata/resourceVersion")
}

fn items<'a>(object: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    object.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn map(object: &Value, pointer: &str) -> Map<String, String> {
    let map = object.pointer(pointer).and_then(Value::as_object).into_iter().flatten();
    map.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).gather()
}

/// The node.
pub fn node(object: &Value) -> Node {
    let cordoned = |taint: &Value| {
        text(taint, "/key") == "node.kubernetes.io/unschedulable" && text(taint, "/effect") == "NoSchedule"
    };
    Node {
        labels: map(object, "/metadata/labels"),
        annotations: map(object, "/metadata/annotations"),
        unschedulable: items(object, "/spec/taints").any(cordoned),
        max_pods: quantity(text(object, "/status/capacity/pods")).filter(|pods| *pods > 0),
    }
}

/// A Kubernetes quantity that is a whole number: `110`, `1k`, `2Ki`.
fn quantity(text: &str) -> Option<u32> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    let factor = match suffix {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        _ => return None,
    };
    number.parse::<u32>().ok()?.checked_mul(factor)
}

/// A pod.
pub fn pod(object: &Value) -> Pod {
    Pod {
        uid: text(object, "/metadata/uid").to_owned(),
        annotations: map(object, "/metadata/annotations"),
        wants_branch: wants_branch(object),
    }
}

fn wants_branch(pod: &Value) -> bool {
    let limits = |container: &Value| {
        let limits = container.pointer("/resources/limits").and_then(Value::as_object);
        limits.is_some_and(|limits| limits.keys().any(|name| name.starts_with(POD_ENI)))
    };
    items(pod, "/spec/containers").any(limits)
}

/// Whether a pod has or will want an address of the pool: not on the host's network, not ended, no branch ENI.
pub fn needs_address(pod: &Value) -> bool {
    pod.pointer("/spec/hostNetwork") != Some(&Value::Bool(true))
        && !matches!(text(pod, "/status/phase"), "Succeeded" | "Failed")
        && !wants_branch(pod)
}

/// What is told of the branch ENI of a pod that has not ended.
pub fn branch(pod: &Value) -> Option<&str> {
    let ended = matches!(text(pod, "/status/phase"), "Succeeded" | "Failed");
    let annotation = pod.pointer("/metadata/annotations").and_then(|all| all.get(POD_ENI)).and_then(Value::as_str);
    annotation.filter(|_| !ended && wants_branch(pod))
}

/// An ENIConfig; `None` without a subnet.
pub fn eni_config(object: &Value) -> Option<EniConfig> {
    let subnet = Some(text(object, "/spec/subnet")).filter(|subnet| !subnet.is_empty())?;
    let groups = items(object, "/spec/securityGroups").filter_map(Value::as_str);
    Some(EniConfig { subnet: subnet.into(), groups: groups.map(Into::into).gather() })
}

/// The features of a CNINode.
pub fn features(object: &Value) -> Vec<Feature> {
    let read = |feature: &Value| Feature {
        name: text(feature, "/name").to_owned(),
        value: text(feature, "/value").to_owned(),
    };
    items(object, "/spec/features").map(read).gather()
}

/// The merge patch that sets them, good for one version of the object only.
pub fn features_patch(version: &str, features: &[Feature]) -> Value {
    let write = |feature: &Feature| match feature.value.as_str() {
        "" => json!({"name": feature.name}),
        value => json!({"name": feature.name, "value": value}),
    };
    let list = Value::Array(features.iter().map(write).gather());
    json!({"metadata": {"resourceVersion": version}, "spec": {"features": list}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        for (text, expect) in [
            ("110", Some(110)),
            ("1k", Some(1000)),
            ("1Ki", Some(1024)),
            ("", None),
            ("k", None),
            ("1.5", None),
            ("-1", None),
            ("100m", None),
            ("5000M", None),
        ] {
            assert_eq!(quantity(text), expect, "{text:?}");
        }
    }

    #[test]
    fn nodes() {
        let taint = |key: &str, effect: &str| json!({"key": key, "effect": effect});
        let check = |taint: Value, pods: Value, expect: (bool, Option<u32>)| {
            let object = json!({"metadata": {"labels": {"a": "b", "bad": 1}, "annotations": null},
                "spec": {"taints": [taint]}, "status": {"capacity": {"pods": pods}}});
            let node = node(&object);
            assert_eq!((node.unschedulable, node.max_pods), expect, "{object}");
            assert_eq!(node.labels, Map::from([("a".to_owned(), "b".to_owned())]));
            assert!(node.annotations.is_empty());
        };
        check(taint("node.kubernetes.io/unschedulable", "NoSchedule"), json!("58"), (true, Some(58)));
        check(taint("node.kubernetes.io/unschedulable", "NoExecute"), json!("0"), (false, None));
        check(taint("node.kubernetes.io/not-ready", "NoSchedule"), json!(7), (false, None));
        assert_eq!(node(&json!({"spec": []})), Node::default());
    }

    #[test]
    fn pods_that_need_an_address() {
        let limits = json!([{}, {"resources": {"limits": {"vpc.amazonaws.com/pod-eni": "1"}}}]);
        for (object, expect) in [
            (json!({}), true),
            (json!({"spec": {"hostNetwork": false}, "status": {"phase": "Pending"}}), true),
            (json!({"spec": {"hostNetwork": true}}), false),
            (json!({"status": {"phase": "Succeeded"}}), false),
            (json!({"status": {"phase": "Failed"}}), false),
            (json!({"spec": {"containers": limits}}), false),
        ] {
            assert_eq!(needs_address(&object), expect, "{object}");
            assert_eq!(pod(&object).wants_branch, object.pointer("/spec/containers").is_some());
        }
    }

    #[test]
    fn custom_resources() {
        let object = json!({"spec": {"subnet": "subnet-1", "securityGroups": ["sg-1", 5]}});
        let expect = EniConfig { subnet: "subnet-1".into(), groups: vec!["sg-1".into()] };
        assert_eq!(eni_config(&object), Some(expect));
        assert_eq!(eni_config(&json!({"spec": {"subnet": ""}})), None);
        let object = json!({"spec": {"features": [{"name": "A"}, {"name": "B", "value": "c"}], "managedBy": "x"}});
        let patch = features_patch("4711", &features(&object));
        let expect =
            r#"{"metadata":{"resourceVersion":"4711"},"spec":{"features":[{"name":"A"},{"name":"B","value":"c"}]}}"#;
        assert_eq!(patch.to_string(), expect);
    }
}
