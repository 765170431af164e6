//! The chart as a whole: what Helm says to it, the schemas, what follows from values, and the manifests made from it.

use super::{Rendered, golden, root, text};
use serde_json::{Value, json};

/// Values that must not render: name of the case, values, a part of the message.
pub const REFUSED: &[(&str, &str, &str)] = &[
    ("refused-empty-conflist", "cniConfig: {enabled: true}", "cniConfig.fileContents is empty"),
    (
        "refused-eniconfig-without-subnet",
        "eniConfig: {create: true, subnets: {eu-west-1a: {securityGroups: [sg-1]}}}",
        "eniConfig.subnets.eu-west-1a.id is missing",
    ),
];

/// Files of `packaging/manifests` and the case that each is.
const MANIFESTS: &[(&str, &str)] = &[
    ("aws-vpc-cni", "manifest"),
    ("aws-vpc-cni-ipv6", "manifest-ipv6"),
    ("aws-vpc-cni-no-network-policy", "manifest-no-network-policy"),
];

/// Templates in the order in which `kubectl apply` should create what they hold.
const ORDER: &[&str] = &["serviceaccount.yaml", "clusterrole.yaml", "configmaps.yaml", "daemonset.yaml"];

#[test]
fn helm_lints_and_renders_every_values_file_and_the_schemas_accept_the_objects() {
    let Some(rendered) = Rendered::get() else { return };
    let cases = rendered.0["cases"].as_object().unwrap();
    let good: Vec<&String> = cases.keys().filter(|name| !name.starts_with("refused-")).collect();
    println!("Helm {}, {} values files", rendered.0["helm"], good.len());
    for name in &good {
        assert_eq!(rendered.0["lint"][name.as_str()], json!([]), "{name}");
        assert!(rendered.objects(name).len() >= 5, "{name}");
    }
    assert_eq!(rendered.0["invalid"], json!([]));
    for (name, _, message) in REFUSED {
        let error = cases[*name]["error"].as_str().unwrap_or_default();
        assert!(error.contains(message), "{name}: {error:?}");
    }
}

/// A validator that finds nothing may be one that looks at nothing.
#[test]
fn the_schemas_refuse_what_kubernetes_would() {
    let Some(rendered) = Rendered::get() else { return };
    let invalid = rendered.0["control"].as_array().unwrap();
    assert_eq!(invalid.len(), 3, "a misspelt field, a wrong type and a broken query are found: {invalid:?}");
}

#[test]
fn versions_are_those_of_the_program() {
    let chart = text("packaging/chart/Chart.yaml");
    for line in [format!("version: {}", enibox::VERSION), format!("appVersion: \"{}\"", enibox::VERSION)] {
        assert!(chart.lines().any(|found| found.starts_with(&line)), "Chart.yaml has no {line:?}");
    }
    assert!(chart.contains("\nname: aws-vpc-cni "), "releases of the original upgrade in place by this name");
}

/// A values file with everything that the original's chart has, as the original's own defaults: what is rendered is what
/// our own defaults give, but for the references of the images.
#[test]
fn values_of_the_original_render_the_same_daemonset() {
    let Some(rendered) = Rendered::get() else { return };
    let mut theirs = rendered.daemonset("original-defaults").0.clone();
    let pod = &mut theirs["spec"]["template"]["spec"];
    let ecr = "602401143452.dkr.ecr.us-west-2.amazonaws.com";
    assert_eq!(pod["containers"][0]["image"], format!("{ecr}/enibox:v1.23.1"));
    assert_eq!(pod["initContainers"][0]["image"], format!("{ecr}/enibox-init:v1.23.1"));
    pod["containers"][0]["image"] = json!(format!("enibox:{}", enibox::VERSION));
    pod["initContainers"][0]["image"] = json!(format!("enibox-init:{}", enibox::VERSION));
    assert_eq!(&theirs, rendered.daemonset("default").0);
    let notes = rendered.template("original-defaults", "NOTES.txt");
    assert_eq!(notes.matches("is one of amazon-vpc-cni-k8s").count(), 2, "the tags are told: {notes}");
    assert!(!rendered.template("default", "NOTES.txt").contains("WARNING"));
    for name in ["ClusterRole", "ClusterRoleBinding", "ServiceAccount"] {
        let ours = rendered.object("default", name, "aws-node").0;
        assert_eq!(rendered.object("original-defaults", name, "aws-node").0, ours);
    }
    let name = "amazon-vpc-cni";
    let ours = rendered.object("default", "ConfigMap", name).0;
    assert_eq!(rendered.object("original-defaults", "ConfigMap", name).0, ours);
}

fn check(rendered: &Rendered, case: &str, kind: &str, name: &str, wanted: &[(&str, Value)]) {
    let object = rendered.object(case, kind, name);
    for (path, value) in wanted {
        assert_eq!(object.at(path), value, "{case}: {kind} {name}: {path}");
    }
}

/// Every value that has an effect of its own, set to something else.
#[test]
fn each_value_of_the_pod_has_its_effect() {
    let Some(rendered) = Rendered::get() else { return };
    let case = "everything";
    let pod = "spec/template/spec";
    let wanted = [
        ("spec/template/metadata/annotations", json!({"team": "network"})),
        ("spec/template/metadata/labels/color", json!("green")),
        ("spec/selector/matchLabels/color", json!("green")),
        ("spec/updateStrategy", json!({"type": "OnDelete"})),
        (&format!("{pod}/imagePullSecrets"), json!([{"name": "pull"}])),
        (&format!("{pod}/priorityClassName"), json!("high")),
        (&format!("{pod}/serviceAccountName"), json!("cni")),
        (&format!("{pod}/securityContext"), json!({"fsGroup": 1})),
        (&format!("{pod}/nodeSelector"), json!({"pool": "blue"})),
        (&format!("{pod}/tolerations"), json!([{"key": "only"}])),
        (&format!("{pod}/affinity"), json!(null)),
        (&format!("{pod}/initContainers/0/image"), json!("registry.example/init@sha256:0123")),
        (&format!("{pod}/initContainers/0/imagePullPolicy"), json!("Always")),
        (&format!("{pod}/initContainers/0/resources"), json!({"limits": {"memory": "64Mi"}})),
        (&format!("{pod}/initContainers/0/volumeMounts/name=settings/mountPath"), json!("/host/etc/enibox")),
        (&format!("{pod}/containers/0/image"), json!("registry.example/cni:7")),
        (&format!("{pod}/containers/0/imagePullPolicy"), json!("Never")),
        (&format!("{pod}/containers/0/livenessProbe"), json!({"tcpSocket": {"port": 1}, "timeoutSeconds": 3})),
        (&format!("{pod}/containers/0/readinessProbe"), json!({"tcpSocket": {"port": 2}, "timeoutSeconds": 9})),
        (&format!("{pod}/containers/0/resources"), json!({"requests": {"cpu": "50m"}})),
        (&format!("{pod}/containers/0/securityContext"), json!({"privileged": true})),
        (&format!("{pod}/containers/0/volumeMounts/name=settings/readOnly"), json!(true)),
        (&format!("{pod}/containers/0/volumeMounts/name=cni-config/subPath"), json!("10-aws.conflist")),
        (&format!("{pod}/containers/0/volumeMounts/name=cni-config/mountPath"), json!("/app/10-aws.conflist")),
        (&format!("{pod}/containers/1/image"), json!("111122223333.dkr.ecr-fips.us-gov-west-1.aws/npa:v2")),
        (&format!("{pod}/containers/1/ports/0/containerPort"), json!(9162)),
        (&format!("{pod}/containers/1/resources"), json!({"requests": {"cpu": "50m"}})),
        (&format!("{pod}/volumes/name=settings/hostPath/path"), json!("/etc/enibox")),
        (&format!("{pod}/volumes/name=cni-config/configMap/name"), json!("aws-node")),
    ];
    check(rendered, case, "DaemonSet", "aws-node", &wanted);
}

#[test]
fn each_value_of_the_agent_the_environment_and_the_other_objects_has_its_effect() {
    let Some(rendered) = Rendered::get() else { return };
    let case = "everything";
    let args = rendered.daemonset(case).container("aws-eks-nodeagent").at("args");
    let flags = [
        "--enable-ipv6=true",
        "--enable-network-policy=true",
        "--enable-cloudwatch-logs=true",
        "--enable-policy-event-logs=true",
        "--log-file=/var/log/aws-routed-eni/agent.log",
        "--metrics-bind-addr=127.0.0.1:9162",
        "--health-probe-bind-addr=:9163",
        "--conntrack-cache-cleanup-period=60",
        "--conntrack-cache-table-size=1048576",
        "--log-level=info",
    ];
    assert_eq!(args, &json!(flags));
    let variables = rendered.daemonset(case);
    for (container, name, value) in [
        ("aws-node", "WARM_IP_TARGET", "5"),
        ("aws-node", "AWS_VPC_ENI_MTU", "1500"),
        ("aws-node", "ENABLE_V6_EGRESS", "true"),
        ("aws-vpc-cni-init", "ENABLE_V6_EGRESS", "true"),
        ("aws-vpc-cni-init", "HOST_CNI_BIN_PATH", "/host/usr/lib/cni"),
        ("aws-vpc-cni-init", "DISABLE_TCP_EARLY_DEMUX", "true"),
    ] {
        assert_eq!(variables.variable(container, name), Some(value), "{container}: {name}");
    }
    let data = [
        ("data/enable-network-policy-controller", json!("true")),
        ("data/enable-windows-ipam", json!("true")),
        ("data/enable-windows-prefix-delegation", json!("true")),
        ("data/warm-prefix-target", json!("4")),
        ("data/warm-ip-target", json!("5")),
        ("data/minimum-ip-target", json!("6")),
        ("data/branch-eni-cooldown", json!("30")),
    ];
    check(rendered, case, "ConfigMap", "amazon-vpc-cni", &data);
    // printf '{"plugins": []}\n' | base64
    let conflist = [("binaryData/10-aws.conflist", json!("eyJwbHVnaW5zIjogW119Cg=="))];
    check(rendered, case, "ConfigMap", "aws-node", &conflist);
    let role = "eks.amazonaws.com~role-arn";
    let annotation = [(&*format!("metadata/annotations/{role}"), json!("arn:aws:iam::111122223333:role/cni"))];
    check(rendered, case, "ServiceAccount", "cni", &annotation);
    check(rendered, case, "ClusterRoleBinding", "aws-node", &[("subjects/0/name", json!("cni"))]);
}

#[test]
fn objects_of_single_modes() {
    let Some(rendered) = Rendered::get() else { return };
    let subnet = |id: &str| json!({"subnet": id});
    check(rendered, "custom-networking", "ENIConfig", "eu-west-1b", &[("spec", subnet("subnet-0bbbbbbbbbbbbbbbb"))]);
    let spec = json!({"subnet": "subnet-0aaaaaaaaaaaaaaaa", "securityGroups": ["sg-0aaaaaaaaaaaaaaaa"]});
    check(rendered, "custom-networking", "ENIConfig", "eu-west-1a", &[("spec", spec)]);
    let endpoint = |port: &str| json!({"port": port, "path": "/metrics", "interval": "30s", "scrapeTimeout": "30s"});
    let monitor = [
        ("spec/podMetricsEndpoints", json!([endpoint("metrics"), endpoint("agentmetrics")])),
        ("spec/selector/matchLabels", json!({"k8s-app": "aws-node"})),
        ("metadata/labels/release", json!("prometheus")),
    ];
    check(rendered, "monitoring", "PodMonitor", "aws-node", &monitor);
    assert!(rendered.find("default", "PodMonitor", "aws-node").is_none());
    // IPv6 is told to all three containers although the values name it once.
    let ipv6 = rendered.daemonset("ipv6");
    for container in ["aws-vpc-cni-init", "aws-node"] {
        assert_eq!(ipv6.variable(container, "ENABLE_IPv6"), Some("true"), "{container}");
    }
    assert_eq!(ipv6.container("aws-eks-nodeagent").at("args/0"), "--enable-ipv6=true");
    // Without the agent nothing of it is left, and no pod waits for it.
    let without = rendered.daemonset("no-network-policy");
    assert!(without.container("aws-eks-nodeagent").0.is_null());
    assert_eq!(without.variable("aws-node", "NETWORK_POLICY_ENFORCING_MODE"), None);
    assert!(!without.0.to_string().contains("bpf"));
    let selector = rendered.daemonset("manifest").at("spec/selector/matchLabels");
    assert_eq!(selector, &json!({"k8s-app": "aws-node"}), "as EKS installs it");
}

/// Lines that only Helm needs are left out, so that the objects are not taken for a release of it.
fn manifest(rendered: &Rendered, case: &str) -> String {
    let crds = rendered.0["crd_texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap());
    let templates = ORDER.iter().map(|name| rendered.template(case, name));
    let mut all = String::from("# Made from packaging/chart: UPDATE=1 cargo test --test packaging\n");
    for document in crds.chain(templates) {
        all.push_str("---\n");
        for line in document.trim().lines() {
            if !line.contains("helm.sh/") && !line.contains("managed-by: Helm") {
                all.push_str(line.trim_end());
                all.push('\n');
            }
        }
    }
    all
}

#[test]
fn the_manifests_are_those_of_the_chart() {
    let Some(rendered) = Rendered::get() else { return };
    for (name, case) in MANIFESTS {
        let manifest = manifest(rendered, case);
        assert!(!manifest.contains("Helm") && manifest.contains("kind: DaemonSet"), "{name}");
        let objects = manifest.matches("\nkind: ").count() - manifest.matches("roleRef").count();
        assert_eq!(objects, rendered.objects(case).len(), "{name}: the CRD comes, the role's reference is no object");
        golden(&format!("packaging/manifests/{name}.yaml"), &manifest);
    }
}

/// Links of the guides and paths below `packaging/` lead somewhere.
#[test]
fn the_guides_name_what_there_is() {
    let mut links = 0;
    for path in ["docs/install.md", "docs/upgrade.md", "packaging/iam/README.md", "packaging/monitoring/README.md"] {
        let (guide, folder) = (text(path), root().join(path).parent().unwrap().to_owned());
        for link in guide.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            assert!(link.contains("://") || folder.join(link).exists(), "{path}: {link}");
            links += 1;
        }
        let named = guide.split(|c: char| c.is_whitespace() || "`()[]".contains(c));
        for file in
            named.filter(|word| word.starts_with("packaging/")).map(|word| word.trim_end_matches(['.', ',', ';']))
        {
            assert!(root().join(file).exists(), "{path}: {file}");
            links += 1;
        }
    }
    assert!(links > 15, "{links}");
    let guide = text("docs/install.md");
    for name in super::texts("packaging/values", "yaml").keys() {
        assert!(guide.contains(&format!("`{name}.yaml`")), "docs/install.md does not name {name}.yaml");
    }
}
