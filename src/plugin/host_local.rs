//! Addresses that only this node knows, on the files and the lock of the reference plugin `host-local`
//! (`spec/egress.md` 7): both may work on one directory in turn, so that a node can go from one implementation to the other
//! and back with its pods running.
//!
//! Other than `host-local`, a second ADD of a container gets the address that it has; and those of containers that are gone
//! are taken back, by GC and when all addresses are taken. Such a file is recognised by two things together. It is minutes
//! old, so that no ADD is under way that has the file and not yet the rest; the runtime's own limits are shorter. And the
//! host has no route to the address: every living pod has one, because without it no answer would ever reach it, and it
//! goes with the pod's network namespace. For GC the runtime must not list the container either. The daemon takes no part:
//! its container does not see these files.

use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::cni::{Attachment, Range};
use crate::model::net::Family;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOCK: &str = "lock";
/// Of the first range set, which is the only one.
const LAST: &str = "last_reserved_ip.0";
/// How long the lock is waited for: others hold it for as long as it takes to read a thousand small files.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
const LOCK_EVERY: Duration = Duration::from_millis(1);
/// Longest content of a file that is looked at: a container id and an interface name.
const OWNER_BYTES_MAX: u64 = 512;
/// A file that is younger may belong to an ADD that is under way.
const YOUNG: Duration = Duration::from_mins(5);

/// Who has an address.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    /// Container id.
    pub container: &'a str,
    /// `CNI_IFNAME`.
    pub ifname: &'a str,
}

impl Owner<'_> {
    fn content(&self) -> String {
        format!("{}\r\n{}", self.container, self.ifname)
    }
}

/// An address that its owner has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: IpAddr,
    /// It was not there before this call.
    pub fresh: bool,
}

/// The directory of one network.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// That of a network, which may not be there yet.
    pub fn new(data_dir: &str, network: &str) -> Store {
        Store { directory: Path::new(data_dir).join(network) }
    }

    /// The addresses of an owner.
    pub fn find(&self, owner: &Owner<'_>) -> Result<Vec<IpAddr>> {
        let Some(_lock) = self.lock(false)? else { return Ok(Vec::new()) };
        Ok(self.owned(owner)?.into_iter().map(|(address, _)| address).collect())
    }

    /// Gives the owner an address, or the one that it has. When all are taken, `living` is asked for the addresses that the
    /// host has routes to.
    pub fn reserve(
        &self,
        range: &Range,
        owner: &Owner<'_>,
        living: &mut dyn FnMut() -> Result<Vec<IpAddr>>,
    ) -> Result<Lease> {
        let lock = self.lock(true)?;
        debug_assert!(lock.is_some(), "made if it was missing");
        let there = self.owned(owner)?.into_iter().find(|(address, _)| range.contains(*address));
        if let Some((address, path)) = there {
            // Young again: its route may come only after others have looked for it.
            File::options().write(true).open(path).and_then(|file| file.set_modified(clock::system_time())).ok();
            return Ok(Lease { address, fresh: false });
        }
        for again in [false, true] {
            if again && self.drop_dead(&|address, _| range.contains(address), &living()?)?.is_empty() {
                break;
            }
            let last = std::fs::read_to_string(self.directory.join(LAST)).ok();
            for address in range.after(last.and_then(|text| text.trim().parse().ok())) {
                if self.take(address, owner)? {
                    return Ok(Lease { address, fresh: true });
                }
            }
        }
        Err(Error::new(format!("no IP addresses available in range set: {}-{}", range.first, range.last)))
    }

    /// Gives the addresses of an owner back. Nothing to give back is no error.
    pub fn release(&self, owner: &Owner<'_>) -> Result<()> {
        let Some(_lock) = self.lock(false)? else { return Ok(()) };
        for (_, path) in self.owned(owner)? {
            std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Takes back the addresses of one family whose owners are not listed and that the host has no routes to, as `living` tells;
    /// the containers that had them.
    pub fn collect(
        &self,
        family: Family,
        listed: &[Attachment],
        living: &mut dyn FnMut() -> Result<Vec<IpAddr>>,
    ) -> Result<Vec<String>> {
        let Some(_lock) = self.lock(false)? else { return Ok(Vec::new()) };
        let is_listed = |content: &str| {
            listed.iter().any(|one| {
                let owner = Owner { container: &one.container, ifname: &one.ifname };
                content == owner.content() || content == owner.container
            })
        };
        self.drop_dead(&|address, content| Family::of(address) == family && !is_listed(content), &living()?)
    }

    /// Takes the lock; none if there is no directory and none is to be made.
    fn lock(&self, make: bool) -> Result<Option<File>> {
        let path = self.directory.join(LOCK);
        if make {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(&self.directory)
                .with_context(|| format!("create {}", self.directory.display()))?;
        } else if !self.directory.is_dir() {
            return Ok(None);
        }
        let what = || format!("lock {}", path.display());
        // The standard library creates only what it may write to; the flag goes to the kernel all the same.
        let file =
            OpenOptions::new().read(true).custom_flags(libc::O_CREAT).mode(0o750).open(&path).with_context(what)?;
        let end = clock::instant() + LOCK_TIMEOUT;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(std::fs::TryLockError::WouldBlock) if clock::instant() < end => std::thread::sleep(LOCK_EVERY),
                Err(error) => return Err(Error::from(std::io::Error::from(error)).context(what())),
            }
        }
    }

    /// Files with an address for their name.
    fn files(&self) -> Result<Vec<(IpAddr, PathBuf)>> {
        let entries =
            std::fs::read_dir(&self.directory).with_context(|| format!("read {}", self.directory.display()))?;
        let files = entries.filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, entry.path()))
        });
        Ok(files.collect())
    }

    /// The owner's files: those that name container and interface, or else those of old releases with the container alone.
    fn owned(&self, owner: &Owner<'_>) -> Result<Vec<(IpAddr, PathBuf)>> {
        let wanted = owner.content();
        let (mut whole, mut old) = (Vec::new(), Vec::new());
        for (address, path) in self.files()? {
            // One that cannot be read is nobody's.
            let Ok(content) = content(&path) else { continue };
            match content.trim() {
                content if content == wanted => whole.push((address, path)),
                content if content == owner.container => old.push((address, path)),
                _ => {}
            }
        }
        Ok(if whole.is_empty() { old } else { whole })
    }

    /// False if somebody has the address.
    fn take(&self, address: IpAddr, owner: &Owner<'_>) -> Result<bool> {
        let path = self.directory.join(address.to_string());
        let what = || format!("write {}", path.display());
        let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(false),
            file => file.with_context(what)?,
        };
        let written = file.write_all(owner.content().as_bytes()).and_then(|()| {
            let options =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(self.directory.join(LAST));
            options?.write_all(address.to_string().as_bytes())
        });
        if let Err(error) = written {
            let _ = std::fs::remove_file(&path); // the first error is the one to tell
            return Err(Error::from(error).context(what()));
        }
        Ok(true)
    }

    /// Removes those of the files that may go whose addresses no living pod can have; the containers that they name.
    fn drop_dead(&self, may_go: &dyn Fn(IpAddr, &str) -> bool, living: &[IpAddr]) -> Result<Vec<String>> {
        let mut dropped = Vec::new();
        for (address, path) in self.files()? {
            let owner = content(&path).unwrap_or_default();
            let owner = owner.trim();
            if !may_go(address, owner) || living.contains(&address) || is_young(&path) {
                continue;
            }
            std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
            log::warn!("took {address} back from container {owner:?}: the host has no route to it");
            dropped.push(owner.lines().next().unwrap_or_default().to_owned());
        }
        Ok(dropped)
    }
}

fn content(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(OWNER_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// A file whose age is not known, or that comes from the future, counts as young.
fn is_young(path: &Path) -> bool {
    let written = std::fs::metadata(path).and_then(|metadata| metadata.modified());
    let age = written.ok().and_then(|written| clock::system_time().duration_since(written).ok());
    age.is_none_or(|age| age < YOUNG)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let path = std::env::temp_dir().join(format!("enibox-host-local-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Directory(path)
        }

        fn store(&self) -> Store {
            Store::new(self.0.to_str().unwrap(), "aws-cni")
        }

        fn names(&self) -> Vec<String> {
            let entries = std::fs::read_dir(self.0.join("aws-cni")).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::create_dir_all(self.0.join("aws-cni")).unwrap();
            std::fs::write(self.0.join("aws-cni").join(name), text).unwrap();
        }

        fn age(&self, name: &str, age: Duration) {
            let file = File::options().write(true).open(self.0.join("aws-cni").join(name)).unwrap();
            file.set_modified(clock::system_time() - age).unwrap();
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn range() -> Range {
        let ip = |text: &str| text.parse().unwrap();
        Range {
            subnet: "10.0.0.0/29".parse().unwrap(),
            first: ip("10.0.0.1"),
            last: ip("10.0.0.6"),
            gateway: ip("10.0.0.1"),
        }
    }

    fn owner(container: &str) -> Owner<'_> {
        Owner { container, ifname: "eth0" }
    }

    #[track_caller]
    fn reserve(store: &Store, container: &str) -> (String, bool) {
        let lease = store.reserve(&range(), &owner(container), &mut || panic!("not all are taken")).unwrap();
        (lease.address.to_string(), lease.fresh)
    }

    #[test]
    fn addresses_are_given_kept_and_given_back() {
        let directory = Directory::new("life");
        let store = directory.store();
        assert_eq!(store.find(&owner("a")).unwrap(), Vec::<IpAddr>::new());
        store.release(&owner("a")).unwrap();
        assert!(!store.directory.exists(), "nothing is made for nothing");
        assert_eq!(reserve(&store, "a"), ("10.0.0.2".into(), true));
        assert_eq!(reserve(&store, "a"), ("10.0.0.2".into(), false));
        assert_eq!(reserve(&store, "b"), ("10.0.0.3".into(), true));
        let path = store.directory.join("10.0.0.3");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "b\r\neth0");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let other = Owner { container: "b", ifname: "net1" };
        assert_eq!(store.find(&other).unwrap(), Vec::<IpAddr>::new(), "another interface is another owner");
        store.release(&other).unwrap();
        store.release(&owner("a")).unwrap();
        store.release(&owner("a")).unwrap();
        assert_eq!(directory.names(), ["10.0.0.3", "last_reserved_ip.0", "lock"]);
        assert_eq!(reserve(&store, "c"), ("10.0.0.4".into(), true), "round and round, not the first free one");
        assert_eq!(std::fs::read_to_string(store.directory.join(LAST)).unwrap(), "10.0.0.4");
    }

    #[test]
    fn files_of_old_releases_count() {
        let directory = Directory::new("old");
        let store = directory.store();
        directory.write("10.0.0.5", "a\n");
        directory.write("10.0.9.9", "b");
        directory.write("10.0.0.4", "");
        assert_eq!(reserve(&store, "a"), ("10.0.0.5".into(), false));
        assert_eq!(reserve(&store, "b"), ("10.0.0.2".into(), true), "an address of another range is none of this one");
        store.release(&owner("a")).unwrap();
        assert_eq!(store.find(&owner("a")).unwrap(), Vec::<IpAddr>::new());
        assert!(directory.names().contains(&"10.0.0.4".to_owned()), "nobody's file stays");
    }

    #[test]
    fn what_is_dead_is_taken_back_when_all_are_taken() {
        let directory = Directory::new("dead");
        let store = directory.store();
        for number in 2..=6 {
            directory.write(&format!("10.0.0.{number}"), "x\r\neth0");
        }
        let exhausted = "no IP addresses available in range set: 10.0.0.1-10.0.0.6";
        let ask = |living: &[&str]| {
            let living: Vec<IpAddr> = living.iter().map(|text| text.parse().unwrap()).collect();
            let lease = store.reserve(&range(), &owner("new"), &mut || Ok(living.clone()));
            lease.map(|lease| lease.address.to_string()).map_err(|error| error.to_string())
        };
        assert_eq!(ask(&[]), Err(exhausted.into()), "all are young");
        for number in 2..=6 {
            directory.age(&format!("10.0.0.{number}"), YOUNG * 2);
        }
        directory.age("10.0.0.4", Duration::ZERO);
        let living = ["10.0.0.2", "10.0.0.3", "10.0.0.5", "10.0.0.6"];
        assert_eq!(ask(&living), Err(exhausted.into()), "the others live");
        assert_eq!(ask(&living[..3]), Ok("10.0.0.6".into()));
    }

    #[test]
    fn what_is_asked_for_again_is_young() {
        let directory = Directory::new("again");
        let store = directory.store();
        directory.write("10.0.0.2", "a\r\neth0");
        directory.write("10.0.0.3", "b");
        directory.write("10.0.0.4", "");
        directory.write("10.0.0.5", "c\r\neth0");
        directory.write("fd00::5", "c\r\neth0");
        directory.write("10.0.0.6", "c\r\neth1");
        for name in ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", "fd00::5"] {
            directory.age(name, YOUNG * 2);
        }
        let listed = [Attachment { container: "c".into(), ifname: "eth0".into() }];
        let collect = || store.collect(Family::V4, &listed, &mut || Ok(vec!["10.0.0.3".parse().unwrap()])).unwrap();
        assert_eq!(reserve(&store, "a"), ("10.0.0.2".into(), false));
        let mut gone = collect();
        gone.sort();
        assert_eq!(gone, ["", "c"], "a was asked for again, b has a route, c is listed with the other interface");
        directory.age("10.0.0.2", YOUNG * 2);
        assert_eq!(collect(), ["a"]);
        assert_eq!(directory.names(), ["10.0.0.3", "10.0.0.5", "fd00::5", "lock"]);
    }

    #[test]
    fn a_lock_of_another_is_waited_for() {
        let directory = Directory::new("lock");
        let store = directory.store();
        let held = store.lock(true).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| reserve(&store, "a"));
            std::thread::sleep(Duration::from_millis(30));
            assert!(!waiting.is_finished());
            drop(held);
            assert_eq!(waiting.join().unwrap(), ("10.0.0.2".into(), true));
        });
    }
}
