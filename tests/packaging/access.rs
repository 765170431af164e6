//! What the program may do: the ClusterRole against its requests to the API server, the IAM policies against its calls to
//! EC2. Both are found in the sources, so that a new one does not go unnoticed.

use super::{Rendered, root, text, texts};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Requests of the program: how the path stands in the sources, group, resource, verbs, and whether the right is only there
/// with `ANNOTATE_POD_IP`.
const REQUESTS: &[(&str, &str, &str, &[&str])] = &[
    ("/api/v1/nodes", "", "nodes", &["list", "watch"]),
    ("/api/v1/nodes/{}", "", "nodes", &["get"]),
    ("/api/v1/pods", "", "pods", &["list", "watch"]),
    ("/api/v1/namespaces/{}/pods/{}", "", "pods", &["get"]),
    ("/api/v1/namespaces/{}/pods", "", "pods", &["watch"]),
    ("/apis/crd.k8s.amazonaws.com/v1alpha1/eniconfigs/{}", "crd.k8s.amazonaws.com", "eniconfigs", &["get"]),
    ("/apis/vpcresources.k8s.aws/v1alpha1/cninodes/{}", "vpcresources.k8s.aws", "cninodes", &["get", "patch"]),
    ("/apis/events.k8s.io/v1/namespaces/{}/events", "events.k8s.io", "events", &["create"]),
    ("/apis/events.k8s.io/v1/namespaces/{}/events/{}", "events.k8s.io", "events", &["patch"]),
];

/// The ClusterRole of `spec/install.md` 9.2; the second part only with the network policy agent.
const RULES: &[(&str, &str, &[&str])] = &[
    ("crd.k8s.amazonaws.com", "eniconfigs", &["list", "watch", "get"]),
    ("", "pods", &["list", "watch", "get"]),
    ("", "nodes", &["list", "watch", "get"]),
    ("", "events", &["create", "patch", "list"]),
    ("events.k8s.io", "events", &["create", "patch", "list"]),
    ("vpcresources.k8s.aws", "cninodes", &["get", "list", "watch", "patch"]),
];
const AGENT_RULES: &[(&str, &str, &[&str])] = &[
    ("", "namespaces", &["list", "watch", "get"]),
    ("networking.k8s.aws", "policyendpoints", &["get", "list", "watch"]),
    ("networking.k8s.aws", "clusterpolicyendpoints", &["get", "list", "watch"]),
    ("networking.k8s.aws", "policyendpoints/status", &["get"]),
    ("networking.k8s.aws", "clusterpolicyendpoints/status", &["get"]),
];

/// Rights: group, resource, verb.
type Rights = BTreeSet<(String, String, String)>;

fn words(value: &Value) -> impl Iterator<Item = &str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str)
}

fn granted(rendered: &Rendered, case: &str) -> Rights {
    let role = rendered.object(case, "ClusterRole", "aws-node");
    let mut rights = Rights::new();
    for rule in role.at("rules").as_array().unwrap() {
        for group in words(&rule["apiGroups"]) {
            for resource in words(&rule["resources"]) {
                rights.extend(words(&rule["verbs"]).map(|verb| (group.into(), resource.into(), verb.into())));
            }
        }
    }
    rights
}

fn rights(rules: &[(&str, &str, &[&str])]) -> Rights {
    let each = |(group, resource, verbs): &(&str, &str, &[&str])| {
        let one = |verb: &&str| ((*group).to_owned(), (*resource).to_owned(), (*verb).to_owned());
        verbs.iter().map(one).collect::<Vec<_>>()
    };
    rules.iter().flat_map(each).collect()
}

/// Paths in the sources without their tests, up to the query.
fn paths_of_the_program() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (name, source) in texts("src/kube", "rs").into_iter().chain([("daemon".into(), text("src/daemon/kube.rs"))]) {
        if name == "tests" {
            continue;
        }
        let code = source.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        for word in code.split('"').filter(|word| word.starts_with("/api")) {
            found.insert(word.split('?').next().unwrap_or_default().to_owned());
        }
    }
    found
}

#[test]
fn the_cluster_role_allows_what_the_program_asks_for() {
    let wanted: BTreeSet<String> = REQUESTS.iter().map(|(path, ..)| (*path).to_owned()).collect();
    assert_eq!(paths_of_the_program(), wanted, "src/kube asks for something else: change the table and the chart");
    let Some(rendered) = Rendered::get() else { return };
    for case in ["default", "no-network-policy", "everything"] {
        let granted = granted(rendered, case);
        for (path, group, resource, verbs) in REQUESTS {
            for verb in *verbs {
                let right = ((*group).to_owned(), (*resource).to_owned(), (*verb).to_owned());
                assert!(granted.contains(&right), "{case}: {verb} {path}");
            }
        }
    }
}

#[test]
fn the_cluster_role_allows_no_more_than_the_original() {
    let Some(rendered) = Rendered::get() else { return };
    let (mut ours, agent) = (rights(RULES), rights(AGENT_RULES));
    assert_eq!(granted(rendered, "default"), ours.union(&agent).cloned().collect());
    assert_eq!(granted(rendered, "no-network-policy"), ours);
    let urls = |case: &str| {
        let rules = rendered.object(case, "ClusterRole", "aws-node").at("rules").as_array().unwrap();
        rules.iter().filter_map(|rule| rule.get("nonResourceURLs")).cloned().collect::<Vec<_>>()
    };
    assert_eq!(urls("default"), [json!(["/apis/networking.k8s.aws", "/apis/networking.k8s.aws/*"])]);
    assert!(urls("no-network-policy").is_empty());
    // As the original's chart: any value of ANNOTATE_POD_IP, "false" too.
    ours.extend(agent);
    ours.insert((String::new(), "pods".into(), "patch".into()));
    assert_eq!(granted(rendered, "everything"), ours);
}

/// Actions of a policy, without the service's name.
fn actions(name: &str) -> BTreeSet<String> {
    let policy: Value = serde_json::from_str(&text(&format!("packaging/iam/{name}.json"))).unwrap();
    assert_eq!(policy["Version"], "2012-10-17", "{name}");
    let mut actions = BTreeSet::new();
    for statement in policy["Statement"].as_array().unwrap() {
        assert_eq!(statement["Effect"], "Allow", "{name}");
        assert!(!statement["Resource"].is_null(), "{name}");
        let one = statement["Action"].as_str();
        actions.extend(words(&statement["Action"]).chain(one).map(str::to_owned));
    }
    actions
        .iter()
        .map(|action| action.strip_prefix("ec2:").unwrap_or_else(|| panic!("{name}: {action}")).into())
        .collect()
}

/// Actions that the program can call, from the arms of `Call::action`.
fn actions_of_the_program() -> BTreeSet<String> {
    let source = text("src/model/ec2.rs");
    let arms = source.split("pub fn action(").nth(1).unwrap().split("\n    }\n").next().unwrap();
    arms.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_policies_allow_what_the_program_calls() {
    let set = |names: &str| names.split_whitespace().map(str::to_owned).collect::<BTreeSet<String>>();
    let eni_life = "AttachNetworkInterface CreateNetworkInterface DeleteNetworkInterface DetachNetworkInterface \
        ModifyNetworkInterfaceAttribute";
    let looking = "DescribeInstanceTypes DescribeNetworkInterfaces DescribeSubnets";
    let v4 = "AssignPrivateIpAddresses UnassignPrivateIpAddresses";
    let all = set(&format!("{eni_life} {looking} {v4} AssignIpv6Addresses CreateTags"));
    assert_eq!(actions_of_the_program(), all, "src/model/ec2.rs calls something else: change the policies");
    // What the program does not call, but the original does: the way back.
    let back = "DescribeInstances";
    for (name, wanted) in [
        ("ipv4", format!("{eni_life} {looking} {v4} CreateTags {back}")),
        ("ipv4-cluster-scoped", format!("{eni_life} {looking} {v4} CreateTags {back}")),
        ("ipv6", format!("{looking} AssignIpv6Addresses CreateTags {back}")),
        ("ipv6-more-enis", format!("{eni_life} {looking} AssignIpv6Addresses UnassignIpv6Addresses CreateTags {back}")),
        ("read-only", looking.to_owned()),
    ] {
        assert_eq!(actions(name), set(&wanted), "{name}");
    }
    let listed = text("packaging/iam/README.md");
    for name in texts("packaging/iam", "json").keys() {
        assert!(listed.contains(&format!("`{name}.json`")), "packaging/iam/README.md does not name {name}.json");
    }
}

/// What may be changed is limited to the cluster: no statement that changes something has neither condition nor reason.
#[test]
fn the_scoped_policy_changes_what_is_the_clusters() {
    let policy: Value = serde_json::from_str(&text("packaging/iam/ipv4-cluster-scoped.json")).unwrap();
    let open: Vec<&str> = policy["Statement"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|statement| statement["Condition"].is_null())
        .map(|statement| statement["Sid"].as_str().unwrap())
        .collect();
    assert_eq!(open, ["Look", "Tags", "SecurityGroupsOfEnis"], "spec/operations.md 12.3");
}

#[test]
fn values_files_name_policies_that_exist() {
    for (name, values) in texts("packaging/values", "yaml") {
        for word in values.split_whitespace().filter(|word| word.starts_with("packaging/iam/")) {
            let path = word.trim_end_matches(['.', ';', ',']);
            assert!(root().join(path).exists(), "{name}: {path}");
        }
    }
}
