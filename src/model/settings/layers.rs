//! Settings of one node: what its Node object and a file on the host say, over the environment that all nodes share.
//!
//! From strongest to weakest: annotation, label, file, environment, default. In the layers of the node a value counts
//! whole or not at all: one that cannot be understood is told, and the next layer counts. Values of labels are restricted
//! by Kubernetes (63 bytes of letters, digits, `-`, `_` and `.`), so lists of CIDRs and JSON fit into annotations and the
//! file only.

use super::table::{Kind, Row};
use super::{Complaint, Line, Settings};
use crate::model::map::Map;
use serde_json::{Value, json};
use std::fmt;

/// What annotations and labels of a Node start with when they are settings: `enibox.io/WARM_IP_TARGET`.
pub const PREFIX: &str = "enibox.io/";

/// A larger settings file is not read.
pub const FILE_BYTES_MAX: usize = 64 << 10;

/// The file beside the checkpoint that keeps what the Node said last.
pub const MEMORY: &str = "enibox-node.json";

/// The file beside the checkpoint that keeps the environment with which the daemon was started last.
pub const ENVIRONMENT: &str = "enibox-environment.json";

/// A larger one is not read; labels and annotations of one object have at most 256 KiB.
pub const MEMORY_BYTES_MAX: usize = 1 << 20;

/// Where a value comes from, weakest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// The table.
    #[default]
    Default,
    /// The environment of the process.
    Environment,
    /// The settings file of the host.
    File,
    /// A label of the Node.
    Label,
    /// An annotation of the Node.
    Annotation,
}

impl Layer {
    /// One word for people and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Layer::Default => "default",
            Layer::Environment => "environment",
            Layer::File => "file",
            Layer::Label => "label",
            Layer::Annotation => "annotation",
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether a variable may be set for a single node, and when a new value takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// By the environment alone: the same on all nodes, or needed before anything else is read.
    Process,
    /// For a node; takes effect at the next start.
    Start,
    /// For a node; takes effect while the daemon runs.
    Live,
}

/// Texts by variable.
pub type Texts = Map<String, String>;

/// What is set for this node alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlay {
    /// Of the settings file.
    pub file: Texts,
    /// Of labels of the Node.
    pub labels: Texts,
    /// Of annotations of the Node.
    pub annotations: Texts,
}

impl Overlay {
    /// The settings among labels or annotations.
    pub fn marks(all: &Map<String, String>) -> Texts {
        let mut texts = Texts::new();
        for (key, value) in all {
            if let Some(variable) = key.strip_prefix(PREFIX) {
                texts.insert(variable.to_owned(), value.clone());
            }
        }
        texts
    }

    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self.file.is_empty() && self.labels.is_empty() && self.annotations.is_empty()
    }

    /// This one as it was at the start, with what takes effect at once as it is `now`.
    #[must_use]
    pub fn with_live_of(&self, now: &Overlay) -> Overlay {
        let mix = |then: &Texts, now: &Texts| {
            let (mut mixed, mut now) = (then.clone(), now.clone());
            mixed.retain(|variable, _| scope_of(variable) != Some(Scope::Live));
            now.retain(|variable, _| scope_of(variable) == Some(Scope::Live));
            mixed.extend(now);
            mixed
        };
        Overlay {
            file: mix(&self.file, &now.file),
            labels: mix(&self.labels, &now.labels),
            annotations: mix(&self.annotations, &now.annotations),
        }
    }

    /// What is kept of the Node for a start without the API server.
    pub fn to_memory(&self) -> String {
        json!({"labels": self.labels, "annotations": self.annotations}).to_string()
    }

    /// The other way round, without a file's layer; `None` for anything else.
    pub fn from_memory(text: &str) -> Option<Overlay> {
        let value: Value = serde_json::from_slice(text.as_bytes()).ok()?;
        let (labels, annotations) = (texts(&value["labels"])?, texts(&value["annotations"])?);
        Some(Overlay { file: Texts::new(), labels, annotations })
    }

    /// Weakest first.
    pub(super) fn layers(&self) -> [(Layer, &Texts); 3] {
        [(Layer::File, &self.file), (Layer::Label, &self.labels), (Layer::Annotation, &self.annotations)]
    }
}

fn texts(value: &Value) -> Option<Texts> {
    let mut texts = Texts::new();
    for (key, value) in value.as_object()? {
        texts.insert(key.clone(), value.as_str()?.to_owned());
    }
    Some(texts)
}

/// What [`ENVIRONMENT`] holds: our settings among the variables. Those of the AWS SDKs may be secret.
pub fn environment_to_text(lookup: impl Fn(&str) -> Option<String>) -> String {
    let ours = Settings::rows().filter(|row| !matches!(row.kind, Kind::Inherited { .. }));
    let set = ours.filter_map(|row| Some((row.variable.to_owned(), Value::from(lookup(row.variable)?))));
    Value::Object(set.collect()).to_string()
}

/// The other way round; empty for anything else.
pub fn environment_from_text(text: &str) -> Texts {
    serde_json::from_slice(text.as_bytes()).ok().and_then(|value| texts(&value)).unwrap_or_default()
}

/// Reads `KEY=VALUE` lines; blanks around both and one pair of quotes around the value do not count. Empty lines and those
/// that start with `#` are skipped. The second value tells what is wrong with other lines.
pub fn read_file(text: &str) -> (Texts, Vec<String>) {
    let (mut texts, mut wrong) = (Texts::new(), Vec::new());
    for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((key, value)) = line.split_once('=').filter(|(key, _)| is_name(key.trim())) else {
            wrong.push(format!("line {number} is not KEY=VALUE and is skipped"));
            continue;
        };
        let value = value.trim();
        let quoted = |quote: char| value.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
        let value = quoted('"').or_else(|| quoted('\'')).unwrap_or(value);
        if texts.insert(key.trim().to_owned(), value.to_owned()).is_some() {
            wrong.push(format!("line {number} sets {} again and counts", key.trim()));
        }
    }
    (texts, wrong)
}

fn is_name(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn scope_of(variable: &str) -> Option<Scope> {
    Settings::rows().find(|row| row.variable == variable).map(|row| row.scope)
}

/// Settings and where each comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layered {
    /// What counts.
    pub settings: Settings,
    /// What was not taken as it stands.
    pub complaints: Vec<Complaint>,
    /// Everything that is set for this node was left out, because of the combination.
    pub refused: bool,
    /// Layers by variable; one that is not here has its default.
    pub(super) sources: Map<&'static str, Layer>,
}

impl Layered {
    /// Environment and node together. A combination that would stop the start is refused as a whole if the environment
    /// alone is sound: nobody takes a node down with an annotation.
    pub fn read(lookup: impl Fn(&str) -> Option<String>, over: &Overlay) -> Layered {
        let layered = Layered::merge(&lookup, over);
        let Err(what) = layered.settings.check() else { return layered };
        let mut plain = Layered::merge(&lookup, &Overlay::default());
        if over.is_empty() || plain.settings.check().is_err() {
            return layered;
        }
        plain.refused = true;
        plain.complaints = layered.complaints;
        plain.complaints.push(Complaint {
            variable: "(all)".into(),
            layer: over.layers().iter().rev().find(|(_, texts)| !texts.is_empty()).map_or(Layer::File, |found| found.0),
            value: String::new(),
            what: format!("{what}; nothing that is set for this node alone counts"),
            fatal: false,
        });
        plain
    }

    /// Where the value of a variable comes from.
    pub fn source(&self, variable: &str) -> Layer {
        self.sources.get(variable).copied().unwrap_or_default()
    }

    /// Variables whose value differs from that of `other`, with this one's line.
    pub fn differing(&self, other: &Layered) -> Vec<Line> {
        self.settings
            .effective()
            .zip(other.settings.effective())
            .filter(|(a, b)| a.value != b.value)
            .map(|(a, _)| a)
            .collect()
    }

    /// The effective configuration as JSON: every variable that has an effect, without secrets; with what will count after
    /// the next start, and what is wrong.
    pub fn document(&self, pending: &[Line], wrong: &[String]) -> Value {
        let lines = self.settings.effective().map(|line| {
            let mut value = self.line(&line);
            value["per_node"] = json!(match scope_of(line.variable) {
                Some(Scope::Live) => "at once",
                Some(Scope::Start) => "at start",
                Some(Scope::Process) | None => "",
            });
            value
        });
        let settings = Value::Array(lines.collect());
        let pending: Vec<String> = pending.iter().map(ToString::to_string).collect();
        json!({"settings": settings, "pending": pending, "wrong": wrong})
    }

    /// One variable of that.
    pub fn line(&self, line: &Line) -> Value {
        json!({"variable": line.variable, "value": line.value, "layer": self.source(line.variable).as_str()})
    }

    fn merge(lookup: &dyn Fn(&str) -> Option<String>, over: &Overlay) -> Layered {
        let mut layered = Settings::parse_sourced(lookup, over);
        for (layer, texts) in over.layers() {
            for (variable, value) in texts {
                let what = match scope_of(variable) {
                    None => "no such setting",
                    Some(Scope::Process) => "cannot be set for a single node",
                    Some(_) => continue,
                };
                layered.complaints.push(complaint(variable, layer, value, what.to_owned()));
            }
        }
        layered
    }
}

pub(super) fn complaint(variable: &str, layer: Layer, value: &str, what: String) -> Complaint {
    Complaint { variable: variable.to_owned(), layer, value: super::parse::shorten(value), what, fatal: false }
}

/// Whether a row takes part in the layers of the node.
pub(super) fn per_node(row: &Row) -> bool {
    row.scope != Scope::Process
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(pairs: &[(&str, &str)]) -> Texts {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn read(env: &[(&str, &str)], over: &Overlay) -> Layered {
        Layered::read(|name| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()), over)
    }

    /// Environment, file, label, annotation of one variable; its effective value, the layer, and who is complained of.
    #[test]
    fn the_strongest_layer_counts() {
        #[track_caller]
        fn check(variable: &str, set: [&str; 4], effective: &str, source: Layer, complaints: &[Layer]) {
            let one = |at: usize| if set[at] == "-" { Texts::new() } else { texts(&[(variable, set[at])]) };
            let over = Overlay { file: one(1), labels: one(2), annotations: one(3) };
            let env: Vec<_> = one(0).into_iter().collect();
            let env: Vec<_> = env.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            let layered = read(&env, &over);
            let line = layered.settings.effective().find(|line| line.variable == variable).unwrap();
            assert_eq!(line.value.as_deref().unwrap_or_default(), effective, "{variable} {set:?}");
            assert_eq!(layered.source(variable), source, "{variable} {set:?}");
            let told: Vec<Layer> = layered.complaints.iter().map(|complaint| complaint.layer).collect();
            assert_eq!(told, complaints, "{variable} {set:?}: {:?}", layered.complaints);
        }
        use Layer::{Annotation, Default, Environment, File, Label};
        const WARM: &str = "WARM_IP_TARGET";
        check(WARM, ["-", "-", "-", "-"], "0", Default, &[]);
        check(WARM, ["1", "-", "-", "-"], "1", Environment, &[]);
        check(WARM, ["1", "2", "-", "-"], "2", File, &[]);
        check(WARM, ["1", "2", "3", "-"], "3", Label, &[]);
        check(WARM, ["1", "2", "3", "4"], "4", Annotation, &[]);
        check(WARM, ["1", "-", "-", " 4 "], "4", Annotation, &[]);
        check(WARM, ["1", "2", "3", "four"], "3", Label, &[Annotation]);
        check(WARM, ["1", "2", "-3", "four"], "2", File, &[Label, Annotation]);
        check(WARM, ["one", "two", "-", "-"], "0", Default, &[Environment, File]);
        check(WARM, ["1", "", "-", ""], "1", Environment, &[]);
        check(WARM, ["1", "99999999999", "-", "-"], "1", Environment, &[File]);
        check("IP_COOLDOWN_PERIOD", ["-", "-", "-", "soon"], "30", Default, &[Annotation]);
        check(
            "AWS_EXTERNAL_SERVICE_CIDRS",
            ["10.0.0.0/8", "-", "-", "10.1.0.0/16,x"],
            "10.0.0.0/8",
            Environment,
            &[Annotation],
        );
        check("AWS_EXTERNAL_SERVICE_CIDRS", ["10.0.0.0/8,x", "-", "-", "-"], "10.0.0.0/8", Environment, &[Environment]);
        check("ADDITIONAL_ENI_TAGS", ["-", r#"{"a":"b"}"#, "-", "-"], r#"{"a":"b"}"#, File, &[]);
        check("CLUSTER_NAME", ["blue", "red", "-", "green"], "blue", Environment, &[File, Annotation]);
        check("ENABLE_IPv6", ["-", "-", "true", "-"], "false", Default, &[Label]);
        check("AWS_SECRET_ACCESS_KEY", ["-", "-", "-", "x"], "", Default, &[Annotation]);
    }

    #[test]
    fn what_is_no_setting_is_told() {
        let over = Overlay { annotations: texts(&[("WARM_IP_TRAGET", "3")]), ..Overlay::default() };
        let layered = read(&[], &over);
        assert_eq!(layered.complaints[0].to_string(), r#"setting WARM_IP_TRAGET="3" (annotation): no such setting"#);
    }

    #[test]
    fn a_combination_that_stops_the_start_is_refused_as_a_whole() {
        let over = Overlay {
            labels: texts(&[("ENABLE_PREFIX_DELEGATION", "true")]),
            file: texts(&[("WARM_ENI_TARGET", "2")]),
            ..Overlay::default()
        };
        let layered = read(&[], &over);
        assert_eq!((layered.settings.prefix_delegation, layered.settings.warm_eni_target), (false, 1));
        assert!(layered.complaints.iter().any(|complaint| complaint.what.contains("WARM_PREFIX_TARGET")));
        let sound = Overlay { annotations: texts(&[("WARM_PREFIX_TARGET", "1")]), ..over.clone() };
        let layered = read(&[], &sound);
        assert!(layered.settings.prefix_delegation && layered.complaints.is_empty(), "{:?}", layered.complaints);
        // What is wrong without the node as well is not the node's fault.
        assert!(read(&[("ENABLE_IPv4", "false")], &over).settings.check().is_err());
    }

    #[test]
    fn only_live_settings_follow() {
        let then = Overlay {
            annotations: texts(&[("MAX_ENI", "2"), ("WARM_IP_TARGET", "1"), ("MINIMUM_IP_TARGET", "9")]),
            ..Overlay::default()
        };
        let now = Overlay {
            annotations: texts(&[("MAX_ENI", "3"), ("WARM_IP_TARGET", "5")]),
            file: texts(&[("MANAGE_UNTAGGED_ENI", "false"), ("WARM_ENI_TARGET", "0")]),
            ..Overlay::default()
        };
        let mixed = then.with_live_of(&now);
        assert_eq!(mixed.annotations, texts(&[("MAX_ENI", "2"), ("WARM_IP_TARGET", "5")]));
        assert_eq!(mixed.file, texts(&[("WARM_ENI_TARGET", "0")]));
        let pending: Vec<String> =
            read(&[], &now).differing(&read(&[], &mixed)).iter().map(ToString::to_string).collect();
        assert_eq!(pending, ["MAX_ENI=3", "MANAGE_UNTAGGED_ENI=false"]);
    }

    #[test]
    fn files() {
        #[track_caller]
        fn check(text: &str, expected: &[(&str, &str)], wrong: &[&str]) {
            let (found, told) = read_file(text);
            assert_eq!(found, texts(expected), "{text:?}");
            assert_eq!(told.len(), wrong.len(), "{text:?}: {told:?}");
            assert!(told.iter().zip(wrong).all(|(told, part)| told.contains(part)), "{text:?}: {told:?}");
        }
        check("", &[], &[]);
        check("# comment\n\nA=1\n  B = 2 \r\n", &[("A", "1"), ("B", "2")], &[]);
        check("A=\"1\"\nB='x y'\nC=\"", &[("A", "1"), ("B", "x y"), ("C", "\"")], &[]);
        check("A=b=c\nTAGS={\"k\":\"v\"}", &[("A", "b=c"), ("TAGS", "{\"k\":\"v\"}")], &[]);
        check("A", &[], &["line 1"]);
        check("=1\nA B=1\nA=", &[("A", "")], &["line 1", "line 2"]);
        check("A=1\nA=2", &[("A", "2")], &["line 2"]);
    }

    #[test]
    fn the_memory_keeps_what_the_node_said() {
        let over = Overlay {
            labels: texts(&[("MAX_ENI", "2")]),
            annotations: texts(&[("ADDITIONAL_ENI_TAGS", r#"{"a":"b"}"#)]),
            file: texts(&[("WARM_IP_TARGET", "1")]),
        };
        let kept = Overlay { file: Texts::new(), ..over.clone() };
        assert_eq!(Overlay::from_memory(&over.to_memory()), Some(kept));
        for bad in ["", "{}", "null", r#"{"labels":{},"annotations":{"A":1}}"#, r#"{"labels":{}}"#] {
            assert_eq!(Overlay::from_memory(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_environment_is_kept_as_far_as_it_is_ours() {
        let set = texts(&[("ENABLE_IPv6", "true"), ("AWS_SECRET_ACCESS_KEY", "no"), ("WARM_IP_TARGET", "")]);
        let text = environment_to_text(|name| set.get(name).cloned());
        assert_eq!(environment_from_text(&text), texts(&[("ENABLE_IPv6", "true"), ("WARM_IP_TARGET", "")]));
        for bad in ["", "[]", r#"{"A":1}"#] {
            assert!(environment_from_text(bad).is_empty(), "{bad:?}");
        }
    }

    #[test]
    fn marks_are_those_with_our_prefix() {
        let all = texts(&[("enibox.io/WARM_IP_TARGET", "3"), ("kubernetes.io/hostname", "n"), ("enibox.ioX", "y")]);
        assert_eq!(Overlay::marks(&all), texts(&[("WARM_IP_TARGET", "3")]));
    }
}
