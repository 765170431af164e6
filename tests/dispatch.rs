//! Which name starts which personality: symbolic links, hard links and copies do; look-alikes do not.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_enibox");

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        // Beside the program, because a hard link cannot lead to another file system.
        let path = Path::new(PROGRAM).with_file_name(format!("dispatch-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run(program: &Path, words: &[&str]) -> Output {
    Command::new(program).args(words).env_clear().env("CNI_COMMAND", "VERSION").stdin(Stdio::null()).output().unwrap()
}

// By a process of its own: a program that another test starts holds what this process has open to write until its exec, and what
// is open to write is not run.
fn copy_of_program(path: &Path) {
    assert!(Command::new("cp").arg(PROGRAM).arg(path).status().unwrap().success());
}

fn is_plugin(output: &Output) -> bool {
    output.status.code() == Some(0) && output.stdout.starts_with(b"{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[")
}

#[test]
fn the_exact_name_decides_however_it_came_about() {
    let directory = Directory::new("exact");
    let name = directory.0.join("aws-cni");
    std::os::unix::fs::symlink(PROGRAM, &name).unwrap();
    assert!(is_plugin(&run(&name, &[])), "symbolic link");
    fs::remove_file(&name).unwrap();
    fs::hard_link(PROGRAM, &name).unwrap();
    assert!(is_plugin(&run(&name, &[])), "hard link");
    fs::remove_file(&name).unwrap();
    copy_of_program(&name);
    assert!(is_plugin(&run(&name, &[])), "copy");
    assert!(is_plugin(&run(&name, &["--help"])), "a personality takes no words");
}

#[test]
fn look_alikes_are_the_command_line() {
    let directory = Directory::new("alike");
    for name in ["my-aws-cni", "aws-cni2", "aws-cni.sh", "aws", "AWS-CNI", "awscni", "enibox2", "aws-cni "] {
        let path = directory.0.join(name);
        std::os::unix::fs::symlink(PROGRAM, &path).unwrap();
        let output = run(&path, &[]);
        assert_eq!(output.status.code(), Some(2), "{name}");
        assert!(output.stdout.is_empty(), "{name}");
        assert!(is_plugin(&run(&path, &["aws-cni"])), "{name} aws-cni");
    }
}

#[test]
fn the_first_word_may_name_a_personality() {
    let program = Path::new(PROGRAM);
    assert!(is_plugin(&run(program, &["aws-cni"])));
    for words in [&["aws-cni2"][..], &["my-aws-cni"], &["AWS-CNI"], &["/opt/cni/bin/aws-cni"], &[""]] {
        let output = run(program, words);
        assert_eq!(output.status.code(), Some(2), "{words:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{words:?}");
    }
}

#[test]
fn the_command_line_explains_itself() {
    let program = Path::new(PROGRAM);
    for word in ["version", "--version"] {
        let version = run(program, &[word]);
        assert_eq!(String::from_utf8(version.stdout).unwrap(), format!("enibox {}\n", enibox::VERSION));
    }
    let help = run(program, &["--help"]);
    assert_eq!(help.status.code(), Some(0));
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(text.contains("aws-cni ") && text.contains("version"), "{text}");
}

#[test]
fn a_reader_that_went_away_aborts_nothing() {
    for words in [&["version"][..], &["--help"], &["aws-cni"]] {
        let mut child = Command::new(PROGRAM)
            .args(words)
            .env_clear()
            .env("CNI_COMMAND", "VERSION")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        drop(child.stdin.take());
        assert!(child.wait().unwrap().code().is_some(), "{words:?} was ended by a signal");
    }
}

#[test]
fn the_daemon_is_started_by_its_name() {
    let directory = Directory::new("daemon");
    let name = directory.0.join("aws-k8s-agent");
    std::os::unix::fs::symlink(PROGRAM, &name).unwrap();
    // Settings that it refuses before it touches anything.
    let output = Command::new(&name)
        .env_clear()
        .envs([("ENABLE_IPv4", "false"), ("ENABLE_IPv6", "false"), ("AWS_VPC_K8S_CNI_LOG_FILE", "stderr")])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("one of ENABLE_IPv4 and ENABLE_IPv6 must be true"), "{text}");
    assert!(output.stdout.is_empty());
}
