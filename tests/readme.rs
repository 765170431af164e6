//! The README's list of settings is the table that the program reads; `UPDATE=1` writes it anew.

use enibox::model::settings::Settings;
use enibox::model::settings::layers::Scope;
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
            _ = write!(text, "\n### {group}\n\n| variable | default | per node | |\n|---|---|---|---|\n");
        }
        let default = if doc.default.is_empty() { String::new() } else { format!("`{}`", doc.default) };
        let not_yet = if doc.not_yet { " *Not yet.*" } else { "" };
        let per_node = match doc.scope {
            Scope::Process => "",
            Scope::Start => "at start",
            Scope::Live => "at once",
        };
        _ = writeln!(text, "| `{}` | {default} | {per_node} | {}{not_yet} |", doc.variable, doc.help);
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

/// Variables that the AWS part looks up by name, against the table.
#[test]
fn what_is_looked_up_is_in_the_table() {
    let known: Vec<&str> = Settings::docs().map(|doc| doc.variable).collect();
    let mut folders = vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src/aws"))];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap_or_default();
            for word in text.split('"').filter(|word| word.starts_with("AWS_") || word.ends_with("_PROXY")) {
                if word.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_') {
                    assert!(known.contains(&word), "{}: {word} is in no row of the table", path.display());
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 20, "only {seen} variables found: this test no longer reads the sources as they are");
}
