//! Python environments for the foreign sides of tests, made below `target/` on the first run.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Says so aloud, past the capture of the test's output; where everything must be tried it is a failure.
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    _ = std::io::Write::write_all(&mut std::io::stderr(), format!("SKIP: {why}\n").as_bytes());
}

/// The interpreter of an environment of that name with the packages; `None` where there is no python3, so that `what` is
/// not tried. Any other obstacle is a failure.
pub fn environment(name: &str, packages: &[&str], what: &str) -> Option<PathBuf> {
    if Command::new("python3").arg("--version").output().is_err() {
        skip(&format!("no python3 here, {what}"));
        return None;
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(target).unwrap();
    let lock = File::create(target.join(format!("{name}.lock"))).unwrap();
    enibox::sys::lock_exclusive(&lock).unwrap();
    let environment = target.join(name);
    let (interpreter, complete) = (environment.join("bin/python"), environment.join("complete"));
    if !complete.exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&environment));
        run(Command::new(&interpreter).args(["-m", "pip", "install", "--quiet"]).args(packages));
        File::create(complete).unwrap();
    }
    Some(interpreter)
}

/// Runs a program that must succeed.
pub fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}
