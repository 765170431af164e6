//! Alerts and dashboard: they ask for metrics and labels that the program has.

use super::{Rendered, text};
use serde_json::Value;
use std::collections::BTreeSet;

/// What Prometheus itself adds: the scrape's labels, `le` of histograms, `fn` and the like are the program's.
const LABELS: &[&str] = &["instance", "job", "endpoint", "le"];

/// Expressions of the alerts and of the dashboard.
pub fn queries() -> Vec<String> {
    let mut found = alerts().into_iter().map(|(_, expression)| expression).collect::<Vec<_>>();
    let board: Value = serde_json::from_str(&text("packaging/monitoring/dashboard.json")).unwrap();
    for panel in board["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            found.push(target["expr"].as_str().unwrap().replace("$__rate_interval", "5m").replace("$node", ".*"));
        }
    }
    found
}

/// Names and expressions of the rules: one line, or the lines after `>-`.
fn alerts() -> Vec<(String, String)> {
    let text = text("packaging/monitoring/alerts.yaml");
    let mut found = Vec::new();
    for rule in text.split("- alert: ").skip(1) {
        let name = rule.lines().next().unwrap().to_owned();
        let (_, rest) = rule.split_once("expr: ").unwrap_or_else(|| panic!("{name} has no expression"));
        let mut lines = rest.lines();
        let mut expression = lines.next().unwrap().to_owned();
        if expression == ">-" {
            let folded = lines.take_while(|line| line.starts_with("            "));
            expression = folded.map(str::trim).collect::<Vec<_>>().join(" ");
        }
        found.push((name, expression));
    }
    found
}

/// Metrics that the program's page can have: the names in the sources that write it.
fn metrics() -> BTreeSet<String> {
    let mut names = BTreeSet::from(["up".to_owned()]);
    for path in ["src/daemon/metrics.rs", "src/daemon/introspect.rs"] {
        for word in
            text(path).split('"').filter(|word| ["awscni_", "enibox_", "process_"].iter().any(|p| word.starts_with(p)))
        {
            if word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_') {
                names.insert(word.to_owned());
            }
        }
    }
    names
}

/// Words of an expression outside of quotes.
fn identifiers(expression: &str) -> Vec<&str> {
    let outside = expression.split('"').step_by(2);
    let is_word = |byte: char| byte.is_ascii_alphanumeric() || byte == '_';
    outside.flat_map(|part| part.split(move |byte| !is_word(byte))).filter(|word| !word.is_empty()).collect()
}

/// Labels between braces and after `by`.
fn labels(expression: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (open, close) in [("{", "}"), ("by (", ")")] {
        for part in expression.split(open).skip(1) {
            let inside = part.split(close).next().unwrap_or_default();
            let names = inside.split(',').map(|item| item.split(['=', '!', '~']).next().unwrap_or_default().trim());
            found.extend(names.filter(|name| !name.is_empty()).map(str::to_owned));
        }
    }
    found
}

#[test]
fn every_metric_and_label_is_one_of_the_program() {
    let metrics = metrics();
    assert!(metrics.len() > 30, "{metrics:?}");
    let source = text("src/daemon/metrics.rs");
    let queries = queries();
    assert!(queries.len() > 40, "{}", queries.len());
    for query in &queries {
        let mut named = 0;
        for word in identifiers(query) {
            let ours = word == "up" || ["awscni_", "enibox_", "process_"].iter().any(|prefix| word.starts_with(prefix));
            if ours {
                let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
                assert!(metrics.contains(word) || metrics.contains(base), "{word} in {query}");
                named += 1;
            }
        }
        assert!(named > 0, "{query} asks for nothing of the program");
        for label in labels(query) {
            let known = LABELS.contains(&&*label) || source.contains(&format!("(\"{label}\", "));
            assert!(known, "label {label} in {query}");
        }
    }
}

#[test]
fn every_alert_says_what_and_what_to_do() {
    let text = text("packaging/monitoring/alerts.yaml");
    let names: Vec<String> = alerts().into_iter().map(|(name, _)| name).collect();
    let distinct: BTreeSet<&String> = names.iter().collect();
    assert_eq!(distinct.len(), names.len());
    for rule in text.split("- alert: ").skip(1) {
        for part in ["severity: ", "summary: ", "action: "] {
            assert!(rule.contains(part), "no {part} in {rule}");
        }
    }
}

/// What is left of a pod that has gone is tried once an hour, whenever the links are listed: two tries must fit into the window
/// of the alert at any time, twice an hour and 150 seconds. The rest is tried at every regular look, several times within five minutes.
#[test]
fn the_alert_of_what_cannot_be_mended_goes_by_how_often_it_is_tried() {
    let (_, expression) = alerts().into_iter().find(|(name, _)| name == "CniHostNetworkNotMended").unwrap();
    let sources = ["src/plan/core.rs", "src/plan/core/pods.rs", "src/plan/host.rs"].map(text).concat();
    for constant in [
        "const WATCH: Duration = Duration::from_secs(30);",
        "const LINK_CHECK: Duration = Duration::from_secs(150);",
        "const SWEEP_AGAIN: Duration = Duration::from_hours(1);",
    ] {
        assert!(sources.contains(constant), "the alert goes by {constant}");
    }
    let failed = "enibox_repairs_failed_total{what";
    assert!(expression.contains(&format!("(changes({failed}=\"gone-pod\"}}[130m])) > 1")), "{expression}");
    let (rest, _) = expression.split_once("}[5m])) > 0 or ").unwrap();
    let (_, others) = rest.split_once(&format!("increase({failed}!~\"")).unwrap();
    let others: Vec<_> = others.trim_end_matches('"').split('|').collect();
    assert!(others.contains(&"gone-pod"), "{others:?}");
    for kind in others {
        assert!(sources.contains(&format!("=> \"{kind}\",")), "no kind {kind}");
    }
}

/// The rule file is YAML of the operator's form; the queries are parsed with the chart's rendering.
#[test]
fn the_queries_are_promql() {
    let Some(rendered) = Rendered::get() else { return };
    let invalid = rendered.0["invalid"].as_array().unwrap();
    assert!(invalid.is_empty(), "{invalid:?}");
}
