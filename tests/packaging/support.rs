//! The support script as an operator runs it on a host: no daemon, the executable under the plugin's name, any directory.

use super::root;
use enibox::sys;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory that is removed.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// A host with the files that are looked for, with the script and the plugin where the installer puts them.
fn host() -> Scratch {
    let host = Scratch(std::env::temp_dir().join(format!("enibox-packaging-{}", std::process::id())));
    for (path, content) in [
        ("opt/cni/bin/portmap", "a plugin"),
        ("etc/cni/net.d/10-aws.conflist", "{\n\"name\": \"aws-cni\"\n}\n"),
        ("etc/cni/net.d/calico-kubeconfig", "server: https://x\ntoken: abcdef\n"),
        ("var/run/aws-node/ipam.json", "{\"version\": \"vpc-cni-ipam/1\"}"),
        ("run/cni/v4pd/egress-v6-ipam/fd00::ac:2", "a container"),
        ("var/log/aws-routed-eni/ipamd.log", "{\"msg\": \"token refused\"}\n"),
        ("var/log/aws-routed-eni/plugin.log", "{}\n"),
    ] {
        let path = host.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let old = fs::File::open(host.0.join("var/log/aws-routed-eni/plugin.log")).unwrap();
    old.set_modified(std::time::UNIX_EPOCH).unwrap();
    symlink("/etc/shadow", host.0.join("var/log/aws-routed-eni/elsewhere")).unwrap();
    // By a process of its own: a file that this one has open for writing is open in every child that another test's thread
    // makes meanwhile, until that one has its own program, and cannot be run so long (`ETXTBSY`).
    let script = root().join("packaging/aws-cni-support.sh");
    for (program, name) in
        [(script.as_path(), "aws-cni-support.sh"), (Path::new(env!("CARGO_BIN_EXE_enibox")), "aws-cni")]
    {
        assert!(Command::new("cp").arg(program).arg(host.0.join("opt/cni/bin").join(name)).status().unwrap().success());
    }
    host
}

fn run(host: &Path, options: &[&str]) -> Output {
    let mut command = Command::new(host.join("opt/cni/bin/aws-cni-support.sh"));
    // No route leads to IMDS or to a daemon from here; the addresses are those of nobody.
    command.args(options).arg("--root").arg(host).arg("--address").arg("127.0.0.1:9");
    command.env("ENIBOX_SUPPORT_FOLDER", host).env("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9");
    command.output().unwrap()
}

/// The archive that a run has named, unpacked.
fn unpacked(host: &Path, output: &Output, into: &str) -> PathBuf {
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let path = PathBuf::from(String::from_utf8(output.stdout.clone()).unwrap().trim_end());
    let name = path.file_name().unwrap().to_str().unwrap();
    let end = format!("_{}.tar.gz", enibox::VERSION);
    assert!(name.starts_with("eks_") && name.ends_with(&end), "{name}");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "nobody else's to read");
    let folder = host.join(into);
    fs::create_dir(&folder).unwrap();
    let status = Command::new("tar").arg("-xzf").arg(&path).arg("-C").arg(&folder).status().unwrap();
    assert!(status.success());
    fs::remove_file(path).unwrap();
    folder.join("enibox-support")
}

#[test]
fn the_support_script_collects_from_a_host_without_a_daemon() {
    let host = host();
    std::thread::scope(|scope| {
        let body = || {
            sys::unshare_netns().expect("the tests run as root");
            whole_bundle(&host.0);
            part_of_it(&host.0);
        };
        scope.spawn(body).join().unwrap();
    });
}

fn whole_bundle(host: &Path) {
    let bundle = unpacked(host, &run(host, &[]), "whole");
    let has = |name: &str, part: &str| {
        let text = fs::read_to_string(bundle.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(text.contains(part), "{part:?} is not in {name}:\n{text}");
        text
    };
    has("doctor.txt", "daemon-silent");
    has("status.txt", "(exit status: ");
    has("config.txt", "WARM_ENI_TARGET=1");
    has("rules.txt", "(exit status: ");
    has("network.txt", "link 1 lo ");
    has("network.txt", "rule ");
    has("sysctl.txt", "/proc/sys/net/ipv4/ip_forward = ");
    // printf 'a plugin' | sha1sum
    has("plugins.txt", "100644 8 sha1 58e13b9dde1c7a9988b49147f9dbc440fdbb7535 portmap");
    has("host/proc/version", "Linux");
    has("host/etc/cni/net.d/10-aws.conflist", "\"name\": \"aws-cni\"");
    let hidden = has("host/etc/cni/net.d/calico-kubeconfig", "server: https://x\n(hidden)\n");
    assert!(!hidden.contains("abcdef"));
    has("host/var/run/aws-node/ipam.json", "vpc-cni-ipam/1");
    has("host/run/cni/v4pd/egress-v6-ipam/fd00::ac:2", "a container");
    has("host/var/log/aws-routed-eni/ipamd.log", "token refused");
    has("host/var/log/aws-routed-eni/plugin.log", "{}");
    has("notes.txt", "introspection/enis.json: ask the daemon at 127.0.0.1:9");
    assert!(!bundle.join("host/var/log/aws-routed-eni/elsewhere").exists(), "links are not followed");
}

fn part_of_it(host: &Path) {
    let options = ["--ignore_introspection", "--ignore_metrics", "--since", "1"];
    let bundle = unpacked(host, &run(host, &options), "part");
    let logs = bundle.join("host/var/log/aws-routed-eni");
    assert!(logs.join("ipamd.log").exists() && !logs.join("plugin.log").exists(), "one is old");
    let notes = fs::read_to_string(bundle.join("notes.txt")).unwrap();
    assert!(!notes.contains("introspection") && !notes.contains("metrics"), "{notes}");
    let failed = run(host, &["--no-such-option"]);
    assert!(!failed.status.success() && failed.stdout.is_empty());
}
