//! Which versions of CNI the plugins of the list can, asked of the programs on this node (`CNI_COMMAND=VERSION`).
//!
//! A list in a version that one of its plugins does not know makes every pod fail, so that a plugin which does not answer
//! keeps the list at the floor. That one cannot be asked proves nothing else: the runtime may have further folders (CRI-O looks
//! into `/usr/libexec/cni` too), and a program of the host need not run in our container, which has no dynamic linker.
//! The runtime's own version is not asked at all: libcni from 1.2 on (containerd 2, CRI-O 1.31) takes the highest of
//! `cniVersions` that it knows, and an older one, which knows no such field, the one in `cniVersion`.

use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::cni::Version;
use crate::sys;
use serde_json::Value;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The version that every plugin of the last years knows; the template's.
pub const FLOOR: Version = Version::V0_4_0;
/// What can be pinned, and what is offered: older ones lack `prevResult` on DEL.
pub const OFFERED: [Version; 3] = [FLOOR, Version::V1_0_0, Version::V1_1_0];

/// All plugins together have so long to answer. One takes some milliseconds, and more on a node that is just starting up, which must
/// not get another version of the list for it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Between attempts to start a program that is just being written.
const START_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of an answer; a real one has a hundred.
const ANSWER_BYTES_MAX: usize = 16 << 10;

/// What the plugins of a list have in common.
#[derive(Clone, Debug)]
pub struct Answers {
    /// Versions that all of them know, oldest first; at least [`FLOOR`].
    pub common: Vec<Version>,
    /// Programs that are not in the folder.
    pub missing: Vec<String>,
    /// What else the operator should know.
    pub notes: Vec<String>,
}

/// Asks all at once and waits for the last one, at most five seconds.
pub fn ask(folder: &Path, names: &[&str]) -> Answers {
    ask_within(ANSWER_TIMEOUT, folder, names)
}

fn ask_within(limit: Duration, folder: &Path, names: &[&str]) -> Answers {
    let until = clock::instant() + limit;
    let asked: Vec<_> = names.iter().map(|name| (*name, start(&folder.join(name), until))).collect();
    let mut answers = Answers { common: OFFERED.to_vec(), missing: Vec::new(), notes: Vec::new() };
    for (name, started) in asked {
        let knows = match started.and_then(|mut child| {
            let answer = listen(&mut child, until, limit);
            // It has said what there is to say, or never will.
            child.kill().ok();
            child.wait().ok();
            answer
        }) {
            Ok(versions) => versions,
            Err(error) if error.errno() == Some(libc::ENOENT) && !folder.join(name).exists() => {
                answers.missing.push(name.to_owned());
                vec![FLOOR]
            }
            Err(error) => {
                answers
                    .notes
                    .push(format!("ask plugin {name} for its versions: {error}; it is taken to know {FLOOR} alone"));
                vec![FLOOR]
            }
        };
        if !knows.contains(&FLOOR) {
            answers.notes.push(format!("plugin {name} does not know CNI {FLOOR}"));
        }
        answers.common.retain(|version| *version == FLOOR || knows.contains(version));
    }
    answers
}

fn start(program: &Path, until: Instant) -> Result<Child> {
    // Libraries before CNI 0.3 insist on all variables (libcni sends the same).
    let dummy = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"].map(|name| (name, "dummy"));
    let mut command = Command::new(program);
    command.env_clear().env("CNI_COMMAND", "VERSION").envs(dummy);
    command.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = loop {
        match command.spawn() {
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && clock::instant() < until => {
                std::thread::sleep(START_PAUSE);
            }
            outcome => break outcome?,
        }
    };
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(br#"{"cniVersion":"0.4.0"}"#).ok(); // whoever does not read it answers all the same
    }
    Ok(child)
}

/// The versions in the answer, of those that we know.
fn listen(child: &mut Child, until: Instant, limit: Duration) -> Result<Vec<Version>> {
    let mut stdout = child.stdout.take().ok_or_else(|| Error::new("no pipe"))?;
    let (mut answer, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let left = until.saturating_duration_since(clock::instant());
        if !sys::poll_readable(&[stdout.as_fd()], left)?.contains(&true) {
            if left.is_zero() {
                return Err(Error::new(format!("no answer within {limit:?}")));
            }
            continue; // a signal, or the time is up
        }
        match stdout.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) if answer.len() + count > ANSWER_BYTES_MAX => return Err(Error::new("the answer has no end")),
            Ok(count) => answer.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read the answer"),
        }
    }
    let document: Value = serde_json::from_slice(&answer).context("read the answer")?;
    let versions =
        document["supportedVersions"].as_array().ok_or_else(|| Error::new("the answer names no versions"))?;
    Ok(versions.iter().filter_map(|version| Version::parse(version.as_str()?)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    fn of(texts: &[&str]) -> Vec<Version> {
        texts.iter().map(|text| Version::parse(text).unwrap()).collect()
    }

    #[track_caller]
    fn check(folder: &Path, names: &[&str], common: &[&str], missing: &[&str], notes: &[&str]) {
        // Shells have time on a loaded machine; what hangs is waited for all the time.
        let hangs = names.contains(&"hanging");
        let answers = if hangs { ask(folder, names) } else { ask_within(Duration::from_secs(30), folder, names) };
        assert_eq!(answers.common, of(common), "{names:?}: {answers:?}");
        assert_eq!(answers.missing, missing, "{names:?}");
        assert_eq!(answers.notes.len(), notes.len(), "{names:?}: {answers:?}");
        assert!(answers.notes.iter().zip(notes).all(|(note, part)| note.contains(part)), "{answers:?}");
    }

    #[test]
    fn plugins_are_asked() {
        let folder = std::env::temp_dir().join(format!("enibox-chain-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        // By a process of its own: a program that another test starts holds what this process has open to write until its
        // exec, and what is open to write is not run.
        let put = |name: &str, text: &str| {
            let draft = folder.join("draft");
            fs::write(&draft, text).unwrap();
            fs::set_permissions(&draft, Permissions::from_mode(0o755)).unwrap();
            assert!(Command::new("cp").arg(draft).arg(folder.join(name)).status().unwrap().success());
        };
        let script = |name: &str, body: &str| put(name, &format!("#!/bin/sh\n{body}\n"));
        script("new", r#"echo '{"cniVersion":"9.9.9","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0","9.9.9"]}'"#);
        script("recent", r#"read x; echo '{"supportedVersions":["0.4.0","1.0.0"]}'"#);
        script("old", r#"echo '{"supportedVersions":["0.3.1"]}'"#);
        script(
            "picky",
            r#"[ "$CNI_COMMAND$CNI_PATH$HOME" = VERSIONdummy ] && echo '{"supportedVersions":["0.4.0","1.1.0"]}'"#,
        );
        script("hanging", "exec sleep 60");
        script("mute", "exit 1");
        script("endless", "exec yes");
        put("broken", "\u{7f}ELF");
        put("lost", "#!/nonexistent/linker\n");

        check(&folder, &[], &["0.4.0", "1.0.0", "1.1.0"], &[], &[]);
        check(&folder, &["new"], &["0.4.0", "1.0.0", "1.1.0"], &[], &[]);
        check(&folder, &["new", "recent"], &["0.4.0", "1.0.0"], &[], &[]);
        check(&folder, &["recent", "picky"], &["0.4.0"], &[], &[]);
        check(&folder, &["old"], &["0.4.0"], &[], &["plugin old does not know CNI 0.4.0"]);
        check(&folder, &["new", "absent"], &["0.4.0"], &["absent"], &[]);
        check(&folder, &["mute"], &["0.4.0"], &[], &["ask plugin mute"]);
        check(&folder, &["broken", "endless"], &["0.4.0"], &[], &["Exec format error", "has no end"]);
        check(&folder, &["lost"], &["0.4.0"], &[], &["No such file"]);
        // Somebody writes it: it is asked when he is done.
        put("written", "#!/bin/sh\necho '{\"supportedVersions\":[\"0.4.0\",\"1.0.0\"]}'\n");
        let writer = fs::File::options().append(true).open(folder.join("written")).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(300));
                drop(writer);
            });
            check(&folder, &["written"], &["0.4.0", "1.0.0"], &[], &[]);
        });
        let begin = clock::instant();
        check(
            &folder,
            &["hanging", "new", "hanging"],
            &["0.4.0"],
            &[],
            &["no answer within 5s", "no answer within 5s"],
        );
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
        fs::remove_dir_all(&folder).unwrap();
    }
}
