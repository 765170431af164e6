//! What the plugin knows and leaves behind on the host without the daemon: the checkpoint file, which it only reads, and
//! the spool of DELs.

use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::{Allocation, Checkpoint};
use crate::model::ids::{PodKey, PodName};
use crate::model::order;
use crate::model::spool::{self, Record};
use crate::plan::pod::Removal;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Where the daemon keeps its checkpoints: `ipam.json` for the first network card, `ipam-nic-<n>.json` for the others.
const CHECKPOINT_DIRECTORY: &str = "/var/run/aws-node";
/// Longest checkpoint; one with every address of the largest instance has a few hundred kilobytes.
const CHECKPOINT_BYTES_MAX: u64 = 16 << 20;

/// What the daemon wrote down last: who has which address.
#[derive(Clone, Debug, Default)]
pub struct Allocations(Vec<Allocation>);

impl Allocations {
    /// Reads the checkpoints. `None` when there is none: the daemon never ran, or keeps them elsewhere.
    pub fn load() -> Result<Option<Allocations>> {
        Self::load_from(Path::new(CHECKPOINT_DIRECTORY))
    }

    fn load_from(directory: &Path) -> Result<Option<Allocations>> {
        let entries = match std::fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", directory.display())),
        };
        let mut paths: Vec<PathBuf> = Vec::new();
        for entry in entries {
            let entry = entry.with_context(|| format!("read {}", directory.display()))?;
            if is_checkpoint(&entry.file_name().to_string_lossy()) {
                paths.push(entry.path());
            }
        }
        if paths.is_empty() {
            return Ok(None);
        }
        order::sort(&mut paths);
        let mut all = Vec::new();
        for path in paths {
            let read = read_checkpoint(&path).with_context(|| format!("read checkpoint {}", path.display()))?;
            all.extend(read.allocations);
        }
        Ok(Some(Allocations(all)))
    }

    /// The allocations of a key, one per network card.
    pub fn of(&self, key: &PodKey) -> impl Iterator<Item = &Allocation> {
        self.0.iter().filter(move |allocation| is_of(allocation, key))
    }

    /// The allocations of a network.
    pub fn of_network(&self, network: &str) -> impl Iterator<Item = &Allocation> {
        self.0.iter().filter(move |allocation| allocation.network == network)
    }

    fn belongs_to_another(&self, address: IpAddr, key: &PodKey) -> bool {
        self.0.iter().any(|allocation| allocation.address() == Some(address) && !is_of(allocation, key))
    }

    /// Takes out of a removal what by now belongs to somebody else: a cached result may be old, and the address given to
    /// the next pod whose rules must stay.
    pub fn spare_others(&self, removal: &mut Removal, key: &PodKey) {
        removal.addresses.retain(|removed| {
            let other = self.belongs_to_another(removed.address, key);
            if other {
                log::info!("leave {} alone: it belongs to another pod than {key}", removed.address);
            }
            !other
        });
    }
}

fn is_of(allocation: &Allocation, key: &PodKey) -> bool {
    (&allocation.network, &allocation.container, &allocation.ifname) == (&key.network, &key.container, &key.ifname)
}

fn is_checkpoint(name: &str) -> bool {
    let card = name.strip_prefix("ipam-nic-").and_then(|rest| rest.strip_suffix(".json"));
    name == "ipam.json" || card.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

fn read_checkpoint(path: &Path) -> Result<Checkpoint> {
    let mut bytes = Vec::new();
    File::open(path)?.take(CHECKPOINT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > CHECKPOINT_BYTES_MAX {
        return Err(Error::new(format!("more than {CHECKPOINT_BYTES_MAX} bytes")));
    }
    Ok(serde_json::from_slice(&bytes)?)
}

/// Leaves word of a DEL that the daemon did not hear of.
pub fn leave_record(key: &PodKey, pod: &PodName, uid: &str) -> Result<()> {
    let record = Record { key: key.clone(), pod: pod.clone(), uid: uid.to_owned(), time: clock::now().wall };
    write_record(Path::new(spool::DIRECTORY), &record)
}

fn write_record(directory: &Path, record: &Record) -> Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    let path = directory.join(Record::file_name(&record.key));
    let count = std::fs::read_dir(directory)?.take(spool::RECORDS_MAX).count();
    if count >= spool::RECORDS_MAX && !path.exists() {
        return Err(Error::new(format!("{} holds {count} records already", directory.display())));
    }
    // Another name until it is whole; the process id keeps concurrent writers apart.
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    let written = (|| -> Result<()> {
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        file.write_all(&record.to_bytes())?;
        file.sync_all()?;
        std::fs::rename(&partial, &path)?;
        Ok(())
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&partial); // the first error is the one to tell
    }
    written.with_context(|| format!("write {}", path.display()))
}

/// Removes the record of a key that is about to be used again.
pub fn forget_record(key: &PodKey) {
    let path = Path::new(spool::DIRECTORY).join(Record::file_name(key));
    match std::fs::remove_file(&path) {
        Ok(()) => log::info!("removed the spooled DEL of {key}: it is added again"),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => log::warn!("remove {}: {error}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::time::Wall;
    use crate::plan::pod::RemovedAddress;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let path = std::env::temp_dir().join(format!("enibox-local-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Directory(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn key(container: &str) -> PodKey {
        PodKey { network: "aws-cni".into(), container: container.into(), ifname: "eth0".into() }
    }

    fn record(container: &str) -> Record {
        let pod = PodName { namespace: "default".into(), name: "web-0".into() };
        Record { key: key(container), pod, uid: "7c0e".into(), time: Wall::from_unix_seconds(5) }
    }

    #[test]
    fn records_are_whole_and_one_per_key() {
        let directory = Directory::new("spool");
        let spool = directory.0.join("spool");
        for _ in 0..2 {
            write_record(&spool, &record("a")).unwrap();
        }
        write_record(&spool, &record("b")).unwrap();
        let names: Vec<_> = std::fs::read_dir(&spool).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2);
        let bytes = std::fs::read(spool.join(Record::file_name(&key("a")))).unwrap();
        assert_eq!(Record::parse(&bytes), Ok(record("a")));
    }

    #[test]
    fn the_spool_is_bounded() {
        let directory = Directory::new("bound");
        write_record(&directory.0, &record("a")).unwrap();
        for number in 1..spool::RECORDS_MAX {
            File::create(directory.0.join(format!("{number}.json"))).unwrap();
        }
        assert!(write_record(&directory.0, &record("b")).is_err());
        write_record(&directory.0, &record("a")).unwrap();
    }

    #[test]
    fn checkpoints_of_all_cards_are_read() {
        let directory = Directory::new("checkpoint");
        assert!(Allocations::load_from(&directory.0).unwrap().is_none());
        assert!(Allocations::load_from(&directory.0.join("nowhere")).unwrap().is_none());
        let entry = |network: &str, container: &str, address: &str| {
            format!(
                r#"{{"version":"vpc-cni-ipam/1","allocations":[{{"networkName":"{network}","containerID":"{container}",
                "ifName":"eth0","ipv4":"{address}","allocationTimestamp":1,"metadata":{{}}}}]}}"#
            )
        };
        std::fs::write(directory.0.join("ipam.json"), entry("aws-cni", "a", "10.0.0.1")).unwrap();
        std::fs::write(directory.0.join("ipam-nic-1.json"), entry("aws-cni", "a", "10.1.0.1")).unwrap();
        std::fs::write(directory.0.join("ipam-nic-2.json"), entry("other", "b", "10.2.0.1")).unwrap();
        std::fs::write(directory.0.join("ipam.json.tmp123"), "half").unwrap();
        let allocations = Allocations::load_from(&directory.0).unwrap().unwrap();
        let addresses: Vec<_> = allocations.of(&key("a")).filter_map(Allocation::address).collect();
        assert_eq!(addresses, ["10.1.0.1".parse::<IpAddr>().unwrap(), "10.0.0.1".parse().unwrap()]);
        assert_eq!(allocations.of_network("other").count(), 1);

        let removed = |text: &str| RemovedAddress { address: text.parse().unwrap(), table: 0 };
        let all = vec![removed("10.0.0.1"), removed("10.2.0.1"), removed("10.9.0.1")];
        let mut removal = Removal { addresses: all, ..Removal::default() };
        allocations.spare_others(&mut removal, &key("a"));
        assert_eq!(removal.addresses, [removed("10.0.0.1"), removed("10.9.0.1")]);

        std::fs::write(directory.0.join("ipam.json"), "{").unwrap();
        assert!(Allocations::load_from(&directory.0).is_err());
    }
}
