//! A Kubernetes API server in memory: the objects that the daemon knows, their versions and the changes that watches tell.
//! No I/O; [`super::serve::kube`] serves it.
//!
//! Objects are kept as JSON, as they are sent. Nothing is defaulted or validated, and only the field selectors are
//! understood that the daemon uses.

use crate::model::map::Map;
use serde_json::{Map as Object, Value, json};
use std::collections::VecDeque;

/// Changes kept for watches; older ones are compacted away.
const CHANGES_LIMIT: usize = 10_000;

/// The kinds that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "Kubernetes' own names")]
pub enum Kind {
    Node,
    Pod,
    EniConfig,
    CniNode,
    Event,
}

impl Kind {
    /// Group and version, kind, plural, and whether it lives in namespaces.
    pub fn facts(self) -> (&'static str, &'static str, &'static str, bool) {
        match self {
            Kind::Node => ("v1", "Node", "nodes", false),
            Kind::Pod => ("v1", "Pod", "pods", true),
            Kind::EniConfig => ("crd.k8s.amazonaws.com/v1alpha1", "ENIConfig", "eniconfigs", false),
            Kind::CniNode => ("vpcresources.k8s.aws/v1alpha1", "CNINode", "cninodes", false),
            Kind::Event => ("events.k8s.io/v1", "Event", "events", true),
        }
    }

    /// All of them.
    pub const ALL: [Kind; 5] = [Kind::Node, Kind::Pod, Kind::EniConfig, Kind::CniNode, Kind::Event];
}

/// Which object: kind, namespace (empty without), name.
pub type Key = (Kind, String, String);

/// A refusal: status, reason, message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal(pub u16, pub &'static str, pub String);

struct Change {
    version: u64,
    kind: Kind,
    before: Option<Value>,
    after: Option<Value>,
}

/// The API server.
#[derive(Default)]
pub struct Api {
    version: u64,
    oldest: u64, // changes up to this version are forgotten
    objects: Map<Key, Value>,
    changes: VecDeque<Change>,
}

fn key(kind: Kind, object: &Value) -> Key {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or("").to_owned();
    (kind, text("/metadata/namespace"), text("/metadata/name"))
}

/// Merges a patch into a value (RFC 7396).
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Object::new());
    }
    let Value::Object(map) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            map.remove(key);
        } else {
            merge(map.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// Whether an object is one that a watch or list of this namespace (empty: all) and field selector is about.
fn matches(object: &Value, namespace: &str, selector: &str) -> bool {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or("");
    let wanted = |term: &str| {
        let (field, value) = term.split_once('=').unwrap_or((term, ""));
        text(&format!("/{}", field.replace('.', "/"))) == value
    };
    (namespace.is_empty() || text("/metadata/namespace") == namespace)
        && selector.split(',').filter(|term| !term.is_empty()).all(wanted)
}

impl Api {
    /// An empty one.
    pub fn new() -> Api {
        Api { version: 100, oldest: 100, ..Api::default() }
    }

    /// The version of the last change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// An object.
    pub fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<&Value> {
        self.objects.get(&(kind, namespace.to_owned(), name.to_owned()))
    }

    /// Adds an object or replaces the one of that name; it gets its version, and a uid if it has none.
    pub fn put(&mut self, kind: Kind, mut object: Value) {
        let (group_version, name, ..) = kind.facts();
        let place = key(kind, &object);
        self.version += 1;
        object["apiVersion"] = group_version.into();
        object["kind"] = name.into();
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = format!("uid-{}", self.version).into();
        }
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let before = self.objects.insert(place, object.clone());
        self.note(kind, before, Some(object));
    }

    /// Takes an object away, if it is there.
    pub fn remove(&mut self, kind: Kind, namespace: &str, name: &str) {
        if let Some(mut object) = self.objects.remove(&(kind, namespace.to_owned(), name.to_owned())) {
            self.version += 1;
            object["metadata"]["resourceVersion"] = self.version.to_string().into();
            self.note(kind, Some(object), None);
        }
    }

    fn note(&mut self, kind: Kind, before: Option<Value>, after: Option<Value>) {
        self.changes.push_back(Change { version: self.version, kind, before, after });
        if self.changes.len() > CHANGES_LIMIT {
            self.oldest = self.changes.pop_front().map_or(self.oldest, |change| change.version);
        }
    }

    /// Merges a patch into an object; one that names a version is good for that one alone.
    pub fn patch(&mut self, kind: Kind, namespace: &str, name: &str, patch: &Value) -> Result<Value, Refusal> {
        let Some(mut object) = self.get(kind, namespace, name).cloned() else {
            return Err(Refusal(404, "NotFound", format!("{} {name:?} not found", kind.facts().2)));
        };
        let wanted = patch.pointer("/metadata/resourceVersion");
        if wanted.is_some_and(|wanted| *wanted != object["metadata"]["resourceVersion"]) {
            return Err(Refusal(409, "Conflict", format!("{name:?}: the object has been modified")));
        }
        let before = object.clone();
        merge(&mut object, patch);
        if object != before {
            self.put(kind, object); // what changes nothing makes no version
        }
        self.get(kind, namespace, name).cloned().ok_or(Refusal(500, "InternalError", "the patch renamed it".into()))
    }

    /// Objects of a kind.
    pub fn list(&self, kind: Kind, namespace: &str, selector: &str) -> Vec<Value> {
        let ours = self.objects.iter().filter(|((of, ..), object)| *of == kind && matches(object, namespace, selector));
        ours.map(|(_, object)| object.clone()).collect()
    }

    /// What a watch tells of the changes after a version: type and object. `None` if some of them are forgotten.
    pub fn since(&self, kind: Kind, namespace: &str, selector: &str, version: u64) -> Option<Vec<(&str, &Value)>> {
        if version < self.oldest {
            return None;
        }
        let mut told = Vec::new();
        for change in self.changes.iter().filter(|change| change.kind == kind && change.version > version) {
            let ours = |object: &&Value| matches(object, namespace, selector);
            match (change.before.as_ref().filter(ours), change.after.as_ref().filter(ours)) {
                (None, Some(object)) => told.push(("ADDED", object)),
                (Some(_), Some(object)) => told.push(("MODIFIED", object)),
                (Some(object), None) => told.push(("DELETED", object)),
                (None, None) => {}
            }
        }
        Some(told)
    }

    /// Forgets all changes, as a compaction of the store does: watches that are behind get 410.
    pub fn compact(&mut self) {
        // A version that no watch can have seen.
        self.version += 1;
        self.oldest = self.version;
        self.changes.clear();
    }

    /// A node.
    pub fn add_node(&mut self, name: &str, max_pods: u32) {
        let capacity = json!({"capacity": {"pods": max_pods.to_string()}});
        self.put(Kind::Node, json!({"metadata": {"name": name, "labels": {}}, "spec": {}, "status": capacity}));
    }

    /// `kubectl cordon` and `uncordon`, as the node controller carries them on to the taint.
    pub fn cordon(&mut self, node: &str, cordoned: bool) {
        let taint = json!([{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]);
        let taints = if cordoned { taint } else { Value::Null };
        self.patch(Kind::Node, "", node, &json!({"spec": {"unschedulable": cordoned, "taints": taints}})).ok();
    }

    /// A pod bound to a node; `spec` is merged into its own.
    pub fn add_pod(&mut self, namespace: &str, name: &str, node: &str, spec: &Value) {
        let mut object = json!({
            "metadata": {"namespace": namespace, "name": name},
            "spec": {"nodeName": node, "containers": [{"name": "main"}]},
            "status": {"phase": "Pending"},
        });
        merge(&mut object["spec"], spec);
        self.put(Kind::Pod, object);
    }

    /// Sets an annotation, if the object is there.
    pub fn annotate(&mut self, kind: Kind, namespace: &str, name: &str, key: &str, value: &str) {
        self.patch(kind, namespace, name, &json!({"metadata": {"annotations": {key: value}}})).ok();
    }

    /// An ENIConfig.
    pub fn add_eni_config(&mut self, name: &str, subnet: &str, groups: &[&str]) {
        let spec = json!({"subnet": subnet, "securityGroups": groups});
        self.put(Kind::EniConfig, json!({"metadata": {"name": name}, "spec": spec}));
    }

    /// A CNINode as the resource controller makes it.
    pub fn add_cni_node(&mut self, node: &str) {
        self.put(Kind::CniNode, json!({"metadata": {"name": node}, "spec": {}}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_merge() {
        for (target, patch, expect) in [
            (json!({"a": 1}), json!({"b": {"c": null, "d": 2}}), json!({"a": 1, "b": {"d": 2}})),
            (json!({"a": [1, 2]}), json!({"a": [3]}), json!({"a": [3]})),
            (json!({"a": 1}), json!({"a": null}), json!({})),
        ] {
            let mut got = target.clone();
            merge(&mut got, &patch);
            assert_eq!(got, expect);
        }
    }

    #[test]
    fn changes_are_told_by_selector() {
        let mut api = Api::new();
        let check = |api: &Api, version, expect: Option<&[&str]>| {
            let told = api.since(Kind::Pod, "", "spec.nodeName=n1", version);
            let line = |(what, pod): (&str, &Value)| format!("{what} {}", pod["metadata"]["name"]);
            let got: Option<Vec<String>> = told.map(|told| told.into_iter().map(line).collect());
            let expect: Option<Vec<String>> = expect.map(|lines| lines.iter().map(ToString::to_string).collect());
            assert_eq!(got, expect);
        };
        api.add_pod("a", "p", "", &json!({}));
        api.add_pod("a", "q", "n2", &json!({}));
        check(&api, 100, Some(&[]));
        api.patch(Kind::Pod, "a", "p", &json!({"spec": {"nodeName": "n1"}})).unwrap();
        check(&api, 100, Some(&["ADDED \"p\""]));
        api.annotate(Kind::Pod, "a", "p", "k", "v");
        let version = api.version();
        api.annotate(Kind::Pod, "a", "p", "k", "v");
        assert_eq!(api.version(), version, "nothing changed");
        api.remove(Kind::Pod, "a", "p");
        check(&api, 103, Some(&["MODIFIED \"p\"", "DELETED \"p\""]));
        api.compact();
        check(&api, 103, None);
        check(&api, api.version(), Some(&[]));
    }

    #[test]
    fn a_patch_of_an_old_version_conflicts() {
        let mut api = Api::new();
        api.add_cni_node("n");
        let patch = |version: &str| json!({"metadata": {"resourceVersion": version}, "spec": {"features": []}});
        assert_eq!(api.patch(Kind::CniNode, "", "n", &patch("1")).unwrap_err().0, 409);
        assert_eq!(api.patch(Kind::CniNode, "", "x", &patch("1")).unwrap_err().0, 404);
        let version = api.version().to_string();
        assert!(api.patch(Kind::CniNode, "", "n", &patch(&version)).is_ok());
    }
}
