//! The README's list of settings is the table that the program reads; `UPDATE=1` writes it anew.

use enibox::model::settings::Settings;
use std::fmt::Write as _;
use std::fs;

const START: &str = "<!-- settings: made from src/model/settings/table.rs; UPDATE=1 cargo test --test readme -->\n";
const END: &str = "<!-- settings end -->\n";

fn settings_as_markdown() -> String {
    let mut text = String::new();
    let mut group = "";
    for doc in Settings::docs() {
        if doc.group != group {
            group = doc.group;
            _ = write!(text, "\n### {group}\n\n| variable | default | |\n|---|---|---|\n");
        }
        let default = if doc.default.is_empty() { String::new() } else { format!("`{}`", doc.default) };
        _ = writeln!(text, "| `{}` | {default} | {} |", doc.variable, doc.help);
    }
    text.push('\n');
    text
}

#[test]
fn the_settings_in_the_readme_are_those_of_the_program() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let readme = fs::read_to_string(path).unwrap();
    let (before, rest) = readme.split_once(START).expect("the README has lost the start mark of the settings");
    let (listed, after) = rest.split_once(END).expect("the README has lost the end mark of the settings");
    let expected = settings_as_markdown();
    if std::env::var_os("UPDATE").is_some() {
        fs::write(path, format!("{before}{START}{expected}{END}{after}")).unwrap();
    } else {
        assert_eq!(listed, expected, "write it anew: UPDATE=1 cargo test --test readme");
    }
}
