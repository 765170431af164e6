//! The DaemonSet of the chart's defaults against the tables of `spec/install.md` 9.1, row by row.

use super::defaults::ENV;
use super::{Part, Rendered};
use serde_json::{Value, json};

const POD: &str = "spec/template/spec";

/// Volumes: name, path on the host, its type, and where they are in aws-vpc-cni-init, aws-node and aws-eks-nodeagent.
const VOLUMES: &[(&str, &str, &str, [&str; 3])] = &[
    ("cni-bin-dir", "/opt/cni/bin", "", ["/host/opt/cni/bin", "/host/opt/cni/bin", "/host/opt/cni/bin"]),
    ("cni-net-dir", "/etc/cni/net.d", "", ["", "/host/etc/cni/net.d", ""]),
    (
        "log-dir",
        "/var/log/aws-routed-eni",
        "DirectoryOrCreate",
        ["", "/host/var/log/aws-routed-eni", "/var/log/aws-routed-eni"],
    ),
    ("run-dir", "/var/run/aws-node", "DirectoryOrCreate", ["", "/var/run/aws-node", "/var/run/aws-node"]),
    ("xtables-lock", "/run/xtables.lock", "FileOrCreate", ["", "/run/xtables.lock", ""]),
    ("bpf-pin-path", "/sys/fs/bpf", "", ["", "", "/sys/fs/bpf"]),
];

const CONTAINERS: [&str; 3] = ["aws-vpc-cni-init", "aws-node", "aws-eks-nodeagent"];

fn check(part: Part<'_>, wanted: &[(&str, Value)]) {
    for (path, value) in wanted {
        assert_eq!(part.at(path), value, "{path}");
    }
}

#[test]
fn the_pod() {
    let Some(rendered) = Rendered::get() else { return };
    let daemonset = rendered.daemonset("default");
    let terms = json!([
        {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]},
        {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64", "arm64"]},
        {"key": "eks.amazonaws.com/compute-type", "operator": "NotIn", "values": ["fargate", "hybrid", "auto"]},
    ]);
    let affinity = "affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms";
    let selected = json!({"app.kubernetes.io/name": "aws-node", "app.kubernetes.io/instance": "aws-vpc-cni"});
    let wanted = [
        ("metadata/namespace", json!("kube-system")),
        ("metadata/labels/app.kubernetes.io~name", json!("aws-node")),
        ("metadata/labels/app.kubernetes.io~instance", json!("aws-vpc-cni")),
        ("metadata/labels/app.kubernetes.io~version", json!(enibox::VERSION)),
        ("metadata/labels/app.kubernetes.io~managed-by", json!("Helm")),
        ("metadata/labels/k8s-app", json!("aws-node")),
        ("metadata/labels/helm.sh~chart", json!(format!("aws-vpc-cni-{}", enibox::VERSION))),
        ("spec/selector/matchLabels", selected),
        ("spec/template/metadata/labels/k8s-app", json!("aws-node")),
        ("spec/updateStrategy", json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "10%"}})),
    ];
    check(daemonset, &wanted);
    let pod = Part(daemonset.at(POD));
    let wanted = [
        ("priorityClassName", json!("system-node-critical")),
        ("serviceAccountName", json!("aws-node")),
        ("hostNetwork", json!(true)),
        ("hostPID", Value::Null),
        ("terminationGracePeriodSeconds", json!(10)),
        ("tolerations", json!([{"operator": "Exists"}])),
        (affinity, json!([{"matchExpressions": terms}])),
        ("securityContext", Value::Null),
        ("nodeSelector", Value::Null),
        ("imagePullSecrets", Value::Null),
    ];
    check(pod, &wanted);
    assert_eq!(daemonset.at("spec/template/metadata/annotations"), &Value::Null);
    assert_eq!(pod.at("initContainers").as_array().map(Vec::len), Some(1));
    assert_eq!(pod.at("containers").as_array().map(Vec::len), Some(2));
}

#[test]
fn the_containers() {
    let Some(rendered) = Rendered::get() else { return };
    let daemonset = rendered.daemonset("default");
    let version = enibox::VERSION;
    let npa = "602401143452.dkr.ecr.us-west-2.amazonaws.com/amazon/aws-network-policy-agent:v1.4.2";
    let command = json!([
        "/app/grpc-health-probe",
        "-addr=unix:///var/run/aws-node/ipamd.sock",
        "-connect-timeout=5s",
        "-rpc-timeout=5s",
    ]);
    let probe = |delay: u32| json!({"exec": {"command": command}, "initialDelaySeconds": delay, "timeoutSeconds": 10});
    let requests = ("resources", json!({"requests": {"cpu": "25m"}}));
    let pull = ("imagePullPolicy", json!("IfNotPresent"));
    let init = [
        ("image", json!(format!("enibox-init:{version}"))),
        ("securityContext", json!({"privileged": true})),
        ("ports", Value::Null),
        ("livenessProbe", Value::Null),
        pull.clone(),
        requests.clone(),
    ];
    check(daemonset.container(CONTAINERS[0]), &init);
    let node = [
        ("image", json!(format!("enibox:{version}"))),
        ("securityContext", json!({"capabilities": {"add": ["NET_ADMIN", "NET_RAW"]}})),
        ("ports", json!([{"name": "metrics", "containerPort": 61678}])),
        ("livenessProbe", probe(60)),
        ("readinessProbe", probe(1)),
        ("command", Value::Null),
        ("args", Value::Null),
        pull.clone(),
        requests.clone(),
    ];
    check(daemonset.container(CONTAINERS[1]), &node);
    let flags = "--enable-ipv6=false --enable-network-policy=false --enable-cloudwatch-logs=false \
        --enable-policy-event-logs=false --log-file=/var/log/aws-routed-eni/network-policy-agent.log \
        --metrics-bind-addr=:8162 --health-probe-bind-addr=:8163 --conntrack-cache-cleanup-period=300 \
        --conntrack-cache-table-size=524288 --log-level=debug";
    let agent = [
        ("image", json!(npa)),
        ("securityContext", json!({"capabilities": {"add": ["NET_ADMIN"]}, "privileged": true})),
        ("ports", json!([{"name": "agentmetrics", "containerPort": 8162}])),
        ("args", json!(flags.split_whitespace().collect::<Vec<_>>())),
        ("livenessProbe", Value::Null),
        pull,
        requests,
    ];
    check(daemonset.container(CONTAINERS[2]), &agent);
}

#[test]
fn volumes_and_mounts() {
    let Some(rendered) = Rendered::get() else { return };
    let daemonset = rendered.daemonset("default");
    let volumes = Part(daemonset.at(&format!("{POD}/volumes")));
    assert_eq!(volumes.0.as_array().map(Vec::len), Some(VOLUMES.len()));
    for (name, path, kind, mounts) in VOLUMES {
        let mut host = json!({"path": path});
        if !kind.is_empty() {
            host["type"] = json!(kind);
        }
        assert_eq!(volumes.at(&format!("name={name}/hostPath")), &host, "{name}");
        for (container, mount) in CONTAINERS.iter().zip(mounts) {
            let found = daemonset.container(container).at(&format!("volumeMounts/name={name}/mountPath"));
            let wanted = if mount.is_empty() { Value::Null } else { json!(mount) };
            assert_eq!(found, &wanted, "{name} in {container}");
        }
    }
    for (at, container) in CONTAINERS.iter().enumerate() {
        let wanted = VOLUMES.iter().filter(|(.., mounts)| !mounts[at].is_empty()).count();
        let found = daemonset.container(container).at("volumeMounts").as_array().map(Vec::len);
        assert_eq!(found, Some(wanted), "{container}");
    }
}

#[test]
fn the_environment() {
    let Some(rendered) = Rendered::get() else { return };
    let daemonset = rendered.daemonset("default");
    let mut wanted: Vec<_> = ENV.iter().map(|(name, value)| (*name, Some(*value))).collect();
    wanted.extend([("MY_NODE_NAME", None), ("MY_POD_NAME", None)]);
    assert_eq!(daemonset.env("aws-node"), wanted);
    let init = [("DISABLE_TCP_EARLY_DEMUX", Some("false")), ("ENABLE_IPv6", Some("false"))];
    assert_eq!(daemonset.env("aws-vpc-cni-init"), init);
    assert_eq!(daemonset.env("aws-eks-nodeagent"), [("MY_NODE_NAME", None)]);
    for (container, name, field) in [
        ("aws-node", "MY_NODE_NAME", "spec.nodeName"),
        ("aws-node", "MY_POD_NAME", "metadata.name"),
        ("aws-eks-nodeagent", "MY_NODE_NAME", "spec.nodeName"),
    ] {
        let path = format!("env/name={name}/valueFrom/fieldRef/fieldPath");
        assert_eq!(daemonset.container(container).at(&path), field, "{container}: {name}");
    }
}

/// Each variable of the chart is one that the program reads.
#[test]
fn the_program_knows_every_variable_of_the_chart() {
    let Some(rendered) = Rendered::get() else { return };
    let known: Vec<&str> = enibox::model::settings::Settings::docs().map(|doc| doc.variable).collect();
    for case in rendered.0["cases"].as_object().unwrap().keys().filter(|name| !name.starts_with("refused-")) {
        let daemonset = rendered.daemonset(case);
        for (name, _) in daemonset.env("aws-node").into_iter().chain(daemonset.env("aws-vpc-cni-init")) {
            assert!(known.contains(&name), "{case}: {name}");
        }
    }
}
