//! `enibox config`: what counts of the settings, and which layer says so.
//!
//! The running daemon knows; without it, environment, settings file and what the Node said last are read here, which
//! is what the daemon would start with.

use super::{Asking, complain, environment, items, print, read, status, text, variables};
use crate::model::settings::Settings;
use crate::model::settings::layers::{FILE_BYTES_MAX, Layered, MEMORY, MEMORY_BYTES_MAX, Overlay, read_file};
use serde_json::Value;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::Path;

/// Runs the subcommand; the exit code.
pub fn run(args: &Asking) -> u8 {
    let settings = environment();
    let document = args.ask(&settings, "/v1/enibox/config").unwrap_or_else(|error| {
        complain(&format!(
            "{error}; this is what the daemon would start with, by what is set here or was when it started last"
        ));
        without_daemon(&settings)
    });
    print(&if args.json { format!("{document:#}\n") } else { page(&document) })
}

fn without_daemon(settings: &Settings) -> Value {
    let (layered, wrong) = layered(settings);
    layered.document(&[], &wrong)
}

// The settings of a daemon that would start now, and what was not understood.
pub(super) fn layered(settings: &Settings) -> (Layered, Vec<String>) {
    let file = Path::new(&settings.settings_file);
    let (texts, mut wrong) = match read(file, FILE_BYTES_MAX) {
        Ok(text) => read_file(&text),
        Err(error) if error.kind() == ErrorKind::NotFound => <_>::default(),
        Err(error) => (<_>::default(), vec![format!("read settings file {}: {error}", file.display())]),
    };
    let said = read(&Path::new(&settings.backing_store).with_file_name(MEMORY), MEMORY_BYTES_MAX);
    let said = said.ok().and_then(|text| Overlay::from_memory(&text)).unwrap_or_default();
    let layered = Layered::read(variables(), &Overlay { file: texts, ..said });
    wrong.extend(layered.complaints.iter().map(ToString::to_string));
    (layered, wrong)
}

fn page(document: &Value) -> String {
    let mut page = String::new();
    for setting in items(document, "settings") {
        let value = setting["value"].as_str().map_or_else(|| " (unset)".to_owned(), |value| format!("={value}"));
        let per_node = Some(text(setting, "per_node")).filter(|when| !when.is_empty());
        let per_node = per_node.map_or_else(String::new, |when| format!("; per node, {when}"));
        // Writing to a string cannot fail.
        let _ = writeln!(page, "{}{value}  # {}{per_node}", text(setting, "variable"), text(setting, "layer"));
    }
    status::notes(&mut page, document);
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_page_for_people() {
        let document = json!({
            "settings": [
                {"variable": "WARM_IP_TARGET", "value": "5", "layer": "annotation", "per_node": "at once"},
                {"variable": "MAX_ENI", "value": null, "layer": "default", "per_node": "at start"},
                {"variable": "CLUSTER_NAME", "value": "blue", "layer": "environment", "per_node": ""},
            ],
            "pending": ["MAX_ENI=2"], "wrong": [],
        });
        let expected = "\
WARM_IP_TARGET=5  # annotation; per node, at once
MAX_ENI (unset)  # default; per node, at start
CLUSTER_NAME=blue  # environment
next start MAX_ENI=2
";
        assert_eq!(page(&document), expected);
    }
}
