//! One directory per run of the sandbox, `/run/enibox-sandbox/<pid>`: names of the namespaces, logs. What a killed run
//! leaves behind is only that directory, because namespaces and processes end with it; the next run removes it.

use crate::clock;
use crate::error::{Context, Error, List, Result};
use crate::model::order;
use crate::sys;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where runs have their directories.
pub const HOME: &str = "/run/enibox-sandbox";

/// How long a run may take to end after it was told to.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// The directory of this run; removed when dropped.
#[derive(Debug)]
pub struct Run {
    path: PathBuf,
}

// When a process started, in clock ticks since boot: with the pid it names one process for good (proc_pid_stat(5),
// field 22). The name in field 2 may hold anything, so the fields are counted from its closing bracket.
fn started(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19).map(str::to_owned)
}

impl Run {
    /// Makes the directory of this process, after removing those of dead ones. `home` is [`HOME`] but in tests.
    pub fn start(home: &Path) -> Result<Run> {
        sweep(home)?;
        let pid = std::process::id();
        // Several runs of one process (tests) stand side by side.
        for number in 0..1000 {
            let name = if number == 0 { pid.to_string() } else { format!("{pid}-{number}") };
            let path = home.join(name);
            match fs::create_dir_all(home).and_then(|()| fs::create_dir(&path)) {
                Ok(()) => {
                    let run = Run { path };
                    run.sign(&started(pid).unwrap_or_default())?;
                    fs::create_dir(run.path.join("netns")).context("create directory of names")?;
                    fs::create_dir(run.path.join("mnt")).context("create directory of names")?;
                    fs::create_dir(run.path.join("log")).context("create directory of logs")?;
                    return Ok(run);
                }
                // The name is taken; or another run, the last one, has just removed the directory above.
                Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => {}
                Err(error) => {
                    return Err(Error::from(error).context(format!("create run directory {}", path.display())));
                }
            }
        }
        Err(Error::new(format!("create run directory in {}: too many runs of process {pid}", home.display())))
    }

    // Says whose directory this is. In one step: who finds the file while it is still empty takes the run for a dead one
    // and removes it.
    fn sign(&self, started: &str) -> Result<()> {
        self.write("signing", started)?;
        let signed = fs::rename(self.path.join("signing"), self.path.join("started"));
        signed.with_context(|| format!("sign {}", self.path.display()))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where logs go.
    pub fn logs(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Writes a file into the directory.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Gives an open namespace of this process a name: a link into `/proc`, which dies with the process.
    pub fn name(&self, kind: &str, name: &str, namespace: impl std::os::fd::AsFd) -> Result<()> {
        use std::os::fd::AsRawFd;
        let target = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_fd().as_raw_fd());
        let link = self.path.join(kind).join(name);
        std::os::unix::fs::symlink(target, &link).with_context(|| format!("name namespace {}", link.display()))
    }

    /// Takes a name away.
    pub fn forget(&self, kind: &str, name: &str) -> Result<()> {
        let link = self.path.join(kind).join(name);
        fs::remove_file(&link).with_context(|| format!("remove {}", link.display()))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // What stays is removed by the next run.
        let _ = fs::remove_dir_all(&self.path);
        // Only an empty directory goes.
        let _ = self.path.parent().map(fs::remove_dir);
    }
}

// Runs in `home`: directory, pid, and whether the process is alive and the same.
fn runs(home: &Path) -> Result<Vec<(PathBuf, u32, bool)>> {
    let entries = match fs::read_dir(home) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::from(error).context(format!("list {}", home.display()))),
    };
    let mut runs = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("list {}", home.display()))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
        // Anything else in there is not ours.
        let Ok(pid) = name.split('-').next().unwrap_or("").parse::<u32>() else { continue };
        let then = fs::read_to_string(path.join("started")).ok();
        // A directory without the file is being made by a process of that pid, or its maker died early.
        let alive = started(pid).is_some_and(|now| then.is_none_or(|then| then == now));
        runs.push((path, pid, alive));
    }
    order::sort(&mut runs);
    Ok(runs)
}

/// Removes what dead runs have left; says how many.
pub fn sweep(home: &Path) -> Result<usize> {
    let mut errors = List::new();
    let mut swept = 0;
    for (path, ..) in runs(home)?.into_iter().filter(|(.., alive)| !alive) {
        match fs::remove_dir_all(&path) {
            Ok(()) => swept += 1,
            // Another run sweeps at the same time.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                errors.note::<()>(Err(Error::from(error).context(format!("remove {}", path.display()))));
            }
        }
    }
    errors.into_result()?;
    Ok(swept)
}

/// Ends every run but our own, waits until it is gone, and sweeps. Says how many were ended.
pub fn down(home: &Path) -> Result<usize> {
    let own = std::process::id();
    let living = runs(home)?.into_iter().filter(|(_, pid, alive)| *alive && *pid != own).collect::<Vec<_>>();
    let mut errors = List::new();
    for (path, pid, _) in &living {
        errors.note(sys::signal(*pid, libc::SIGTERM).with_context(|| format!("end run {}", path.display())));
    }
    let deadline = clock::instant() + END_TIMEOUT;
    for (path, pid, _) in &living {
        while runs(home)?.iter().any(|(other, _, alive)| other == path && *alive) {
            if clock::instant() > deadline {
                errors
                    .note::<()>(Err(Error::new(format!("run {} does not end; its process is {pid}", path.display()))));
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    errors.note(sweep(home));
    errors.into_result()?;
    Ok(living.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("enibox-runs-{}-{name}", std::process::id()))
    }

    #[test]
    fn a_run_has_a_directory_while_it_lives() {
        let home = home("one");
        let run = Run::start(&home).unwrap();
        let second = Run::start(&home).unwrap();
        assert_ne!(run.path(), second.path());
        run.name("netns", "here", fs::File::open("/proc/thread-self/ns/net").unwrap()).unwrap();
        assert!(fs::read_link(run.path().join("netns/here")).unwrap().starts_with("/proc"));
        assert_eq!(sweep(&home).unwrap(), 0);
        drop(second);
        drop(run);
        assert!(!home.exists());
    }

    #[test]
    fn runs_that_start_at_once_leave_each_other_alone() {
        let home = home("many");
        let start_and_end = || {
            for _ in 0..200 {
                let run = Run::start(&home).unwrap();
                assert!(["netns", "mnt", "log", "started"].iter().all(|name| run.path().join(name).exists()));
            }
        };
        std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(start_and_end))));
        assert!(!home.exists());
    }

    #[test]
    fn dead_runs_are_swept_and_strangers_are_left() {
        let home = home("two");
        for (name, file) in [("4194304", "started"), ("4194303-2", "x"), ("stranger", "x")] {
            fs::create_dir_all(home.join(name)).unwrap();
            fs::write(home.join(name).join(file), "1").unwrap();
        }
        // The same pid, another process.
        let reused = home.join(std::process::id().to_string());
        fs::create_dir_all(&reused).unwrap();
        fs::write(reused.join("started"), "1").unwrap();
        assert_eq!(sweep(&home).unwrap(), 3);
        assert!(home.join("stranger").exists());
        fs::remove_dir_all(&home).unwrap();
    }
}
