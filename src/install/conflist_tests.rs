use super::*;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

fn settings(pairs: &[(&str, &str)]) -> Settings {
    let (settings, complaints) =
        Settings::parse(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()));
    assert!(complaints.is_empty(), "{complaints:?}");
    settings
}

fn node(v6: &str) -> NodeAddresses {
    NodeAddresses { v4: "10.0.0.5".into(), v6: v6.into() }
}

fn template(text: &str) -> Template {
    Template { text: text.into(), name: "mine".into() }
}

/// The file of this name in testdata/conflist; `UPDATE=1` writes it anew.
#[track_caller]
fn golden(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/conflist").join(format!("{name}.conflist"));
    if std::env::var_os("UPDATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
    }
    assert_eq!(fs::read_to_string(&path).unwrap_or_default(), text, "{}: UPDATE=1 writes it anew", path.display());
}

type Pairs = &'static [(&'static str, &'static str)];

const V6: Pairs = &[("ENABLE_IPv6", "true"), ("ENABLE_PREFIX_DELEGATION", "true")];

/// Every combination of `spec/install.md` 5, byte by byte.
#[test]
fn every_combination() {
    let families: &[(&str, &[Pairs], &str)] = &[
        ("v4", &[], "2001:db8::5"),
        ("v4-egress", &[&[("ENABLE_V6_EGRESS", "true")]], "2001:db8::5"),
        ("v4-egress-without-address", &[&[("ENABLE_V6_EGRESS", "true")]], ""),
        ("v6", &[V6], "2001:db8::5"),
        ("v6-without-egress", &[V6, &[("ENABLE_V4_EGRESS", "false")]], "2001:db8::5"),
    ];
    let options: &[(&str, Pairs)] = &[
        ("", &[]),
        ("-bandwidth", &[("ENABLE_BANDWIDTH_PLUGIN", "true")]),
        ("-tuning", &[("DISABLE_POD_V6", "true")]),
        ("-bandwidth-tuning", &[("ENABLE_BANDWIDTH_PLUGIN", "true"), ("DISABLE_POD_V6", "true")]),
    ];
    let mut names = BTreeSet::new();
    for (family, sets, address) in families {
        for (option, more) in options {
            let pairs: Vec<(&str, &str)> = sets.iter().copied().flatten().chain(*more).copied().collect();
            let filled = template(BUILT_IN).fill(&settings(&pairs), &node(address)).unwrap();
            let name = format!("{family}{option}");
            golden(&name, &filled.finish(None, &[Version::V0_4_0]));
            names.insert(format!("{name}.conflist"));
        }
    }
    let every: &[(&str, &str)] = &[
        ("AWS_VPC_K8S_CNI_VETHPREFIX", "azv"),
        ("AWS_VPC_ENI_MTU", "1500"),
        ("POD_MTU", "1400"),
        ("POD_SECURITY_GROUP_ENFORCING_MODE", "standard"),
        ("AWS_VPC_K8S_PLUGIN_LOG_FILE", "/var/log/with \"quotes\" and \\.log"),
        ("AWS_VPC_K8S_PLUGIN_LOG_LEVEL", "info"),
        ("AWS_VPC_K8S_EGRESS_V6_PLUGIN_LOG_FILE", ""),
        ("AWS_VPC_K8S_CNI_RANDOMIZESNAT", "hashrandom"),
    ];
    let filled = template(BUILT_IN).fill(&settings(every), &node("")).unwrap();
    golden("v4-every-value", &filled.finish(None, &[Version::V0_4_0, Version::V1_0_0]));
    let filled = template(BUILT_IN).fill(&settings(&[]), &node("")).unwrap();
    golden("v4-newest", &filled.finish(None, &[Version::V0_4_0, Version::V1_0_0, Version::V1_1_0]));
    golden("v4-pinned", &filled.finish(Some(Version::V1_0_0), &[Version::V0_4_0]));
    names.extend(["v4-every-value", "v4-newest", "v4-pinned"].map(|name| format!("{name}.conflist")));
    let there = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/conflist")).unwrap();
    let there: BTreeSet<String> = there.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(there, names, "a file of no combination");
}

#[test]
fn templates_of_operators_keep_what_they_are() {
    #[track_caller]
    fn check(text: &str, pairs: &[(&str, &str)], pinned: Option<Version>, expected: &str) {
        let filled = template(text).fill(&settings(pairs), &node("")).unwrap();
        let done = filled.finish(pinned, &[Version::V0_4_0, Version::V1_0_0]);
        assert_eq!(done, expected);
        serde_json::from_slice::<Value>(done.as_bytes()).unwrap();
    }
    const BANDWIDTH: &[(&str, &str)] = &[("ENABLE_BANDWIDTH_PLUGIN", "true")];
    // Compact, with fields that nobody knows, numbers as they are written, and a value outside of a string.
    check(
        r#"{"x":1.50,"cniVersion":"0.4.0","name":"n","plugins":[{"type":"aws-cni","mtu":__MTU__,"y":{"b":1,"a":2}}],"z":[]}"#,
        BANDWIDTH,
        None,
        r#"{"x":1.50,"cniVersion":"0.4.0","cniVersions": ["0.4.0", "1.0.0"],"name":"n","plugins":[{"type":"aws-cni","mtu":9001,"y":{"b":1,"a":2}},{"type": "bandwidth", "capabilities": {"bandwidth": true}}],"z":[]}"#,
    );
    // One that has the plugin already, and a version of its own.
    check(
        r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"aws-cni"},{"type":"bandwidth"}]}"#,
        BANDWIDTH,
        None,
        r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"aws-cni"},{"type":"bandwidth"}]}"#,
    );
    check(
        r#"{"cniVersion":"0.3.1","cniVersions":["0.3.1"],"name":"n","plugins":[{"type":"aws-cni"}]}"#,
        &[],
        None,
        r#"{"cniVersion":"0.3.1","cniVersions":["0.3.1"],"name":"n","plugins":[{"type":"aws-cni"}]}"#,
    );
    check(
        r#"{"cniVersions":["0.3.1"],"name":"n","plugins":[{"type":"aws-cni"}], "cniVersion":"0.3.1"}"#,
        &[],
        Some(Version::V1_0_0),
        r#"{"cniVersions":["1.0.0"],"name":"n","plugins":[{"type":"aws-cni"}], "cniVersion":"1.0.0"}"#,
    );
    check(
        "{\n \"name\": \"n\", \"plugins\": [{\"type\": \"aws-cni\"}]}",
        &[],
        Some(Version::V0_4_0),
        "{\n \"cniVersion\": \"0.4.0\",\n \"name\": \"n\", \"plugins\": [{\"type\": \"aws-cni\"}]}",
    );
    check(
        r#"{"name":"n","plugins":[{"type":"aws-cni"}]}"#,
        &[],
        None,
        r#"{"name":"n","plugins":[{"type":"aws-cni"}]}"#,
    );
}

#[test]
fn mistakes_are_told_with_their_place() {
    #[track_caller]
    fn check(text: &str, expected: &str) {
        let error = template(text).fill(&settings(&[]), &node("")).unwrap_err().to_string();
        assert!(error.starts_with("fill in mine: ") && error.contains(expected), "{error}");
    }
    check("", "line 1 column 0");
    check("{\n  \"name\": \"n\"\n  \"plugins\": []\n}", "line 3 column 3: \"plugins\": []");
    check("{\"name\": \"n\", \"mtu\": __NODEIP__}", "line 1 column 22");
    check("[]", "\"name\" is not a text");
    check(r#"{"plugins": [{"type": "a"}]}"#, "\"name\" is not a text");
    check(r#"{"name": "n"}"#, "\"plugins\" is not a list");
    check(r#"{"name": "n", "plugins": []}"#, "\"plugins\" is not a list");
    check(r#"{"name": "n", "plugins": {}}"#, "\"plugins\" is not a list");
    check(r#"{"name": "n", "plugins": [{"type": "a"}, {}]}"#, "plugin 2 has no \"type\"");
    check(r#"{"name": "n", "plugins": [{"type": "../a"}]}"#, "plugin 1 has no \"type\"");
    check(&format!("{{\"name\": \"n\", \"plugins\": {}", "[".repeat(10_000)), "recursion limit");
    // What cannot be appended must not be missing in silence.
    let hidden = template("{\"name\": \"n\", \"plug\\u0069ns\": [{\"type\": \"a\"}]}");
    assert!(hidden.fill(&settings(&[]), &node("")).is_ok());
    let error = hidden.fill(&settings(&[("DISABLE_POD_V6", "true")]), &node("")).unwrap_err().to_string();
    assert_eq!(error, "fill in mine: cannot see where \"plugins\" stands");
}

#[test]
fn plugins_to_ask_are_the_others() {
    let text = r#"{"name": "n", "plugins": [{"type": "aws-cni"}, {"type": "egress-cni", "ipam": {"type": "host-local"}},
        {"type": "portmap"}, {"type": "macvlan", "ipam": {"type": "dhcp"}}, {"type": "portmap"}]}"#;
    assert_eq!(template(text).fill(&settings(&[]), &node("")).unwrap().foreign(), ["portmap", "macvlan", "dhcp"]);
}

#[test]
fn the_template_is_the_operators_or_ours() {
    let folder = std::env::temp_dir().join(format!("enibox-conflist-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let read = || Template::read(&folder).map(|template| template.text).map_err(|error| error.to_string());
    assert_eq!(read().unwrap(), BUILT_IN);
    fs::write(folder.join(NAME), "mine").unwrap();
    assert_eq!(read().unwrap(), "mine");
    fs::write(folder.join(NAME), b"\xff").unwrap();
    assert!(read().unwrap_err().contains("10-aws.conflist: invalid utf-8"), "{:?}", read());
    fs::write(folder.join(NAME), vec![b' '; usize::try_from(TEMPLATE_BYTES_MAX).unwrap() + 1]).unwrap();
    assert!(read().unwrap_err().ends_with("more than 1048576 bytes"));
    fs::remove_file(folder.join(NAME)).unwrap();
    fs::create_dir(folder.join(NAME)).unwrap();
    assert!(read().unwrap_err().contains("10-aws.conflist: "), "{:?}", read());
    fs::remove_dir_all(&folder).unwrap();
}
