//! The house rules that a machine can hold: who imports whom, where `unsafe` and the clock may stand, how long files and
//! functions may be. It reads the sources as text, so that it needs no compiler and says the line.
//!
//! Every exception stands here with its reason; none is made in the sources.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const FILE_LINES_MAX: usize = 800;
const FUNCTION_LINES_MAX: usize = 70;

/// Who may import whom, by top-level module. `error` is open to all; `main.rs` and `lib.rs` join everything.
const IMPORTS: &[(&str, &str)] = &[
    ("error", ""),
    ("model", ""),
    ("sys", ""),
    ("clock", "model sys"),
    ("logging", "model clock sys"),
    ("plan", "model"),
    ("sim", "model plan"),
    ("netlink", "model clock logging sys"),
    ("rpc", "model clock logging sys"),
    ("http", "model clock logging sys"),
    ("aws", "model http clock logging sys"),
    ("kube", "model http clock logging sys"),
    ("apply", "model plan netlink clock logging sys"),
    ("plugin", "model plan netlink apply rpc clock logging sys"),
    ("probe", "model rpc clock logging sys"),
    ("install", "model plan netlink apply rpc aws clock logging sys"),
    ("daemon", "model plan netlink apply rpc aws kube clock logging sys"),
    ("debug", "model plan sim netlink apply rpc aws kube clock logging sys"),
    ("sandbox", "model plan sim netlink apply rpc aws kube clock logging sys"),
];

/// Functions that are tables, not logic: file, function, reason.
const LONG_FUNCTIONS: &[(&str, &str, &str)] = &[("src/aws/form.rs", "form", "one arm per EC2 action")];

/// Words of code that may stand only in the files named: word, files, reason.
const PLACES: &[(&str, &[&str], &str)] = &[
    ("unsafe", &["src/sys.rs", "src/sys/lean.rs"], "the system calls are behind safe functions in one place"),
    ("Instant::now", &["src/clock.rs"], "time is read in one place"),
    ("SystemTime::now", &["src/clock.rs"], "time is read in one place"),
    ("clock_gettime", &["src/sys.rs"], "time is read in one place"),
    ("process::exit", &[], "only main ends the process, by returning a code"),
    ("todo!", &[], "nothing unfinished is merged"),
    ("unimplemented!", &[], "nothing unfinished is merged"),
    ("dbg!", &[], "a trace of debugging"),
    ("#[ignore", &["tests/image/main.rs"], "a test that cannot run says so when it runs; these run by tests/image/run"),
    ("allow(dead_code)", &[], "what nobody uses is removed"),
];

/// What model and plan may not touch: they are decided by their arguments alone, in an order that is always the same.
const PURE: &[&str] = &[
    "HashMap",
    "HashSet",
    "std::fs",
    "std::process",
    "std::thread",
    "std::env",
    "std::io::stdin",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "Instant",
    "SystemTime",
    "thread_rng",
    "println!",
    "eprintln!",
];

/// Names that say nothing.
const EMPTY_NAMES: &[&str] = &["manager", "handler", "util", "utils", "helper", "helpers", "common", "misc"];

struct Source {
    path: String,
    text: String,
    /// The text with comments, strings and character literals blanked out, line for line.
    code: String,
    /// First line (from 0) of the trailing test module, 0 for a file of tests, or the number of lines.
    tests_from: usize,
}

impl Source {
    fn module(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        let top = inside.split_once('/').map_or(inside, |(folder, _)| folder);
        let top = top.strip_suffix(".rs").unwrap_or(top);
        (!matches!(top, "main" | "lib")).then_some(top)
    }

    fn is_test(&self, line: usize) -> bool {
        line >= self.tests_from
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below a folder of the project, without what git does not keep.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() {
            if name != "target" && name != ".git" && name != "corpus" {
                files(&path, found);
            }
        } else {
            found.push(path);
        }
    }
    found.sort();
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    for folder in ["src", "tests", "benches"] {
        files(&root().join(folder), &mut paths);
    }
    let rust = paths.into_iter().filter(|path| path.extension().is_some_and(|ext| ext == "rs"));
    let mut sources: Vec<Source> = rust.map(|path| source(&path)).collect();
    let only_for_tests: Vec<String> = sources.iter().flat_map(test_files).collect();
    for source in &mut sources {
        if !source.path.starts_with("src/") || only_for_tests.contains(&source.path) {
            source.tests_from = 0;
        }
    }
    sources
}

fn source(path: &Path) -> Source {
    let text = fs::read_to_string(path).unwrap();
    let code = code_only(&text);
    let lines: Vec<&str> = code.lines().collect();
    let tests_from = (1..lines.len())
        .find(|&at| lines[at].starts_with("mod ") && lines[at].ends_with('{') && lines[at - 1] == "#[cfg(test)]")
        .unwrap_or(lines.len());
    Source { path: relative(path), text, code, tests_from }
}

/// The files of modules that a source declares for tests alone: `#[cfg(test)] mod name;`.
fn test_files(source: &Source) -> Vec<String> {
    let lines: Vec<&str> = source.code.lines().collect();
    let texts: Vec<&str> = source.text.lines().collect();
    let folder = source.path.strip_suffix("/mod.rs").or_else(|| source.path.strip_suffix(".rs")).unwrap_or_default();
    let sibling = source.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut found = Vec::new();
    for at in 1..lines.len() {
        let Some(name) = lines[at].rsplit_once("mod ").and_then(|(_, rest)| rest.trim().strip_suffix(';')) else {
            continue;
        };
        let attributes = &lines[at.saturating_sub(2)..at];
        if attributes.contains(&"#[cfg(test)]") {
            let path = texts[at - 1].trim().strip_prefix("#[path = \"").and_then(|rest| rest.strip_suffix("\"]"));
            found.push(path.map_or_else(|| format!("{folder}/{name}.rs"), |path| format!("{sibling}/{path}")));
        }
    }
    found
}

/// Blanks comments, strings and character literals, keeping every line break, so that words and braces can be counted.
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut at = 0;
    let mut blank = |from: usize, to: usize| {
        for byte in &mut code[from..to.min(bytes.len())] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    };
    while at < bytes.len() {
        let end = literal_end(bytes, at);
        if end > at {
            blank(at, end);
            at = end;
        } else {
            at += 1;
        }
    }
    String::from_utf8(code).unwrap()
}

/// Where the comment or literal that starts at `at` ends; `at` itself when none starts there.
fn literal_end(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    let find = |needle: &[u8], from: usize| {
        rest[from..].windows(needle.len()).position(|window| window == needle).map_or(rest.len(), |i| from + i)
    };
    let in_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    if rest.starts_with(b"//") {
        return at + find(b"\n", 0);
    }
    if rest.starts_with(b"/*") {
        return at + find(b"*/", 2) + 2;
    }
    let raw = if rest[0] == b'r' { 1 } else { 2 };
    if !in_word && (rest[0] == b'r' || rest.starts_with(b"br")) {
        let hashes = rest[raw.min(rest.len())..].iter().take_while(|&&byte| byte == b'#').count();
        if rest.get(raw + hashes) == Some(&b'"') {
            let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
            return at + find(&close, raw + hashes + 1) + close.len();
        }
    }
    if rest[0] == b'"' {
        let mut end = 1;
        while end < rest.len() && rest[end] != b'"' {
            end += if rest[end] == b'\\' { 2 } else { 1 };
        }
        return at + end + 1;
    }
    if rest[0] == b'\'' {
        // A lifetime has no closing quote right after one character.
        let text = std::str::from_utf8(&rest[1..rest.len().min(12)])
            .or_else(|error| std::str::from_utf8(&rest[1..=error.valid_up_to()]));
        let first = text.ok().and_then(|text| text.chars().next()).map_or(1, char::len_utf8);
        if rest.get(1) == Some(&b'\\') {
            return at + find(b"'", 3) + 1;
        }
        if rest.get(1 + first) == Some(&b'\'') {
            return at + first + 2;
        }
    }
    at
}

fn fail_with(rule: &str, wrong: &[String]) {
    assert!(wrong.is_empty(), "{rule}:\n  {}\n", wrong.join("\n  "));
}

/// Names right below the crate's root that a line of code mentions: `crate::a::b` and `use crate::{a, b::c}`.
fn crate_names(code: &str, line: &str, start: usize) -> Vec<String> {
    let mut names = Vec::new();
    let mut from = 0;
    while let Some(found) = line[from..].find("crate::") {
        let at = from + found + "crate::".len();
        from = at;
        let rest = &code[start + at..];
        if let Some(group) = rest.strip_prefix('{') {
            names.extend(group_heads(group));
        } else {
            names.push(first_word(rest));
        }
    }
    names
}

fn first_word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The first words of the entries of a `{a, b::{c, d}}` group whose opening brace has been read.
fn group_heads(text: &str) -> Vec<String> {
    let (mut heads, mut depth, mut entry) = (Vec::new(), 0, String::new());
    for c in text.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(std::mem::take(&mut entry)),
            c if depth == 0 => entry.push(c),
            _ => {}
        }
    }
    heads.push(entry);
    heads.iter().map(|entry| first_word(entry.trim())).filter(|word| !word.is_empty()).collect()
}

#[test]
fn modules_import_only_what_stands_below_them() {
    let allowed: BTreeMap<&str, BTreeSet<&str>> =
        IMPORTS.iter().map(|(module, names)| (*module, names.split_whitespace().collect())).collect();
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.path.starts_with("src/")) {
        let Some(module) = source.module() else { continue };
        let Some(open) = allowed.get(module) else {
            wrong.push(format!("{}: module {module} has no line in IMPORTS", source.path));
            continue;
        };
        let mut start = 0;
        for (number, line) in source.code.lines().enumerate() {
            for name in crate_names(&source.code, line, start) {
                let root_item = name.starts_with(char::is_uppercase); // crate::VERSION
                let for_tests = name == "sandbox" && source.is_test(number);
                if !root_item && !for_tests && name != module && name != "error" && !open.contains(name.as_str()) {
                    wrong.push(format!("{}:{}: {module} imports {name}", source.path, number + 1));
                }
            }
            let depth = source.path.matches('/').count() - usize::from(source.path.ends_with("/mod.rs"));
            let climbs = "super::".repeat(depth);
            if let Some(at) = line.find(&climbs) {
                let name = first_word(line[at..].trim_start_matches("super::"));
                if name != module && allowed.contains_key(name.as_str()) && !source.is_test(number) {
                    wrong.push(format!("{}:{}: {name} is reached by super, write crate::", source.path, number + 1));
                }
            }
            start += line.len() + 1;
        }
    }
    fail_with("who may import whom", &wrong);
}

#[test]
fn words_stand_where_they_may() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (number, line) in source.code.lines().enumerate() {
            for (word, places, reason) in PLACES {
                let Some(at) = line.find(word) else { continue };
                let before = line[..at].chars().next_back();
                let after = line[at + word.len()..].chars().next();
                let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
                let whole = !part(before) && (!part(after) || word.ends_with('['));
                // Tests may measure and wait with the clock of the standard library.
                let exempt = word.contains("::now") && source.is_test(number);
                if whole && !exempt && !places.contains(&source.path.as_str()) {
                    wrong.push(format!("{}:{}: {word} ({reason})", source.path, number + 1));
                }
            }
            if line.contains(".unwrap()") && !source.is_test(number) {
                wrong.push(format!("{}:{}: unwrap outside tests", source.path, number + 1));
            }
        }
    }
    fail_with("words out of place", &wrong);
}

#[test]
fn model_and_plan_are_pure() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| matches!(source.module(), Some("model" | "plan"))) {
        for (number, line) in source.code.lines().enumerate() {
            for word in PURE {
                if line.contains(word) && !source.is_test(number) {
                    wrong.push(format!("{}:{}: {word}", source.path, number + 1));
                }
            }
        }
    }
    fail_with("model and plan touch nothing outside, and keep their order", &wrong);
}

#[test]
fn files_are_short_and_have_a_header() {
    let mut wrong = Vec::new();
    for source in sources() {
        let lines = source.text.lines().count();
        if lines > FILE_LINES_MAX {
            wrong.push(format!("{}: {lines} lines", source.path));
        }
        let part_of_tests = source.tests_from == 0 && source.path.starts_with("src/");
        if !source.text.starts_with("//!") && !part_of_tests {
            wrong.push(format!("{}: no //! header", source.path));
        }
        let stem = Path::new(&source.path).file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if EMPTY_NAMES.contains(&stem) {
            wrong.push(format!("{}: the name says nothing", source.path));
        }
        for (number, line) in source.code.lines().enumerate() {
            for keyword in ["struct ", "enum ", "trait "] {
                let Some(at) = line.find(keyword) else { continue };
                let name = first_word(&line[at + keyword.len()..]).to_lowercase();
                if EMPTY_NAMES.iter().any(|empty| name.ends_with(empty)) {
                    wrong.push(format!("{}:{}: the name {name} says nothing", source.path, number + 1));
                }
            }
        }
    }
    fail_with("files", &wrong);
}

/// Functions with a body: line where it starts (from 0), name, lines.
fn functions(code: &str) -> Vec<(usize, String, usize)> {
    let lines: Vec<&str> = code.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some(at) = line.find("fn ").filter(|&at| at == 0 || line.as_bytes()[at - 1] == b' ') else { continue };
        let name = first_word(&line[at + 3..]);
        if name.is_empty() {
            continue; // a type such as `fn (u8)`
        }
        let (mut depth, mut opened, mut brackets) = (0_i32, false, 0_i32);
        'body: for (offset, line) in lines[start..].iter().enumerate() {
            for c in line[if offset == 0 { at } else { 0 }..].chars() {
                match c {
                    '(' | '[' => brackets += 1,
                    ')' | ']' => brackets -= 1,
                    ';' if !opened && brackets == 0 => break 'body, // no body
                    '{' => (depth, opened) = (depth + 1, true),
                    '}' => depth -= 1,
                    _ => {}
                }
                if opened && depth == 0 {
                    found.push((start, name, offset + 1));
                    break 'body;
                }
            }
        }
    }
    found
}

#[test]
fn functions_are_short() {
    let mut wrong = Vec::new();
    let mut excused = BTreeSet::new();
    for source in sources() {
        for (line, name, lines) in functions(&source.code) {
            if lines <= FUNCTION_LINES_MAX || source.is_test(line) && source.path.starts_with("src/") {
                continue;
            }
            match LONG_FUNCTIONS.iter().position(|(path, function, _)| *path == source.path && *function == name) {
                Some(index) => _ = excused.insert(index),
                None => wrong.push(format!("{}:{}: fn {name} has {lines} lines", source.path, line + 1)),
            }
        }
    }
    for (index, (path, function, _)) in LONG_FUNCTIONS.iter().enumerate() {
        if !excused.contains(&index) {
            wrong.push(format!("{path}: fn {function} needs its exception no longer"));
        }
    }
    fail_with("long functions", &wrong);
}

#[test]
fn text_is_clean() {
    // In two halves, so that this file does not hold what it looks for.
    let foreign = [concat!("/wo", "rk/"), concat!("/fa", "rm/"), concat!(".lib", "rary"), concat!("bash_", "jobs")];
    let mut wrong = Vec::new();
    let mut paths = Vec::new();
    files(root(), &mut paths);
    for path in paths {
        let Ok(text) = fs::read_to_string(&path) else { continue }; // not a text
        let name = relative(&path);
        if name == "Cargo.lock" || name == "LICENSE" || name == ".git" {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            if line.ends_with([' ', '\t', '\r']) {
                wrong.push(format!("{name}:{}: trailing blanks", number + 1));
            }
            if let Some(word) = foreign.iter().find(|word| line.contains(**word)) {
                wrong.push(format!("{name}:{}: {word:?} is a place of one machine", number + 1));
            }
        }
        if !text.is_empty() && !text.ends_with('\n') {
            wrong.push(format!("{name}: no line break at the end"));
        }
    }
    fail_with("text", &wrong);
}

#[test]
fn every_dependency_has_its_reason() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let (mut inside, mut spoken_for, mut wrong) = (false, 0, Vec::new());
    for line in manifest.lines() {
        if line.starts_with('[') {
            (inside, spoken_for) = (line.contains("dependencies"), 0);
        } else if line.starts_with('#') {
            spoken_for = 2; // a comment may speak for two crates that come together
        } else if inside && let Some((name, _)) = line.split_once('=').filter(|_| !line.starts_with(' ')) {
            if spoken_for == 0 {
                wrong.push(format!("{}: no comment above it", name.trim()));
            }
            spoken_for = usize::saturating_sub(spoken_for, 1);
        }
    }
    fail_with("dependencies", &wrong);
}

#[test]
fn the_reader_of_code_knows_literals_and_functions() {
    let code = code_only("let a = \"x // {\"; // y {\nlet b = 'c'; let d: &'e str = r#\"{\"#; /* { */ f('{', b'\\'')");
    assert!(!code.contains(['{', '"']) && code.contains("&'e str") && code.contains("let b"), "{code}");
    assert_eq!(code.lines().count(), 2);
    let long =
        functions("trait T { fn none(&self); }\nfn one() {\n  if x { }\n}\nfn two(f: fn(u8) -> [u8; 3]) -> u8 { 1 }\n");
    assert_eq!(long, vec![(1, "one".into(), 3), (4, "two".into(), 1)]);
    assert_eq!(group_heads("a, b::{c, d}, e as f};"), ["a", "b", "e"]);
}
