//! The checkpoint on disk, the spool of DELs, and what the host shows at start.

use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::Draft;
use crate::model::map::Map;
use crate::model::net::{Family, TABLE_MAIN};
use crate::model::spool::{self, Record};
use crate::netlink::{link, route, rule, socket::Socket};
use crate::plan::core::{Event, Seen};
use serde_json::{Map as Object, Value};
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A larger checkpoint is not ours: 737 pods take 200 KiB.
const CHECKPOINT_BYTES_MAX: u64 = 64 << 20;
/// So much of it is written at a time. The allocator keeps a buffer of this size; one for the whole file would be mapped and
/// filled with zeros for each ADD.
const CHUNK: usize = 32 << 10;

/// Everything that the core wants to know before it starts.
pub(super) fn read_start(store: &Path, cards: impl Iterator<Item = u32>, v6: bool) -> Result<Event> {
    let mut checkpoints = Map::new();
    for card in cards {
        let store = store_of(store, card);
        sweep_temporaries(&store);
        if let Some(content) = read(&store)? {
            checkpoints.insert(card, content);
        }
    }
    let seen =
        look_at_family(if v6 { Family::V6 } else { Family::V4 }).context("look at the host's links and rules")?;
    Ok(Event::Started { checkpoints, seen, spool: read_spool() })
}

/// The checkpoint of a network card: card 0 has the configured name, card 1 `ipam-nic-1.json` (`spec/ipamd.md` 5.1).
pub(super) fn store_of(store: &Path, card: u32) -> PathBuf {
    if card == 0 {
        return store.to_owned();
    }
    let name = store.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = name.strip_suffix(".json").unwrap_or(&name);
    store.with_file_name(format!("{stem}-nic-{card}.json"))
}

/// `None`: there is none, a fresh node. Bytes that are no text are handed on as they can be read; the parser refuses them.
pub(super) fn read(store: &Path) -> Result<Option<String>> {
    let what = || format!("read checkpoint {}", store.display());
    let file = match File::open(store) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(what),
    };
    let mut bytes = Vec::new();
    file.take(CHECKPOINT_BYTES_MAX).read_to_end(&mut bytes).with_context(what)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Writes the file so that after a crash it is either the old or the new one, whole: temporary file, fsync, rename, fsync
/// of the directory (`spec/ipamd.md` 5.2, B17).
pub(super) fn write(path: &Path, content: &[u8]) -> Result<()> {
    replace(path, &mut |file| file.write_all(content))
}

/// [`write`] of a checkpoint.
pub(super) fn write_draft(path: &Path, draft: &Draft) -> Result<()> {
    replace(path, &mut |file| {
        let (mut out, mut result) = (BufWriter::with_capacity(CHUNK, file), Ok(()));
        draft.tell(&mut |piece| {
            if result.is_ok() {
                result = out.write_all(piece.as_bytes());
            }
        });
        result.and_then(|()| out.flush())
    })
}

fn replace(path: &Path, fill: &mut dyn FnMut(&mut File) -> std::io::Result<()>) -> Result<()> {
    let what = || format!("write {}", path.display());
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(what)?;
    let temporary = temporary_of(path);
    let result = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        fill(&mut file)?;
        file.sync_all()?;
        drop(file);
        fs::rename(&temporary, path)?;
        File::open(parent)?.sync_all()
    })();
    if result.is_err() {
        fs::remove_file(&temporary).ok(); // the failure itself is what is told
    }
    result.with_context(what)
}

fn temporary_of(path: &Path) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!("{name}.tmp{}", std::process::id()))
}

// Temporary files of runs that were killed while writing.
fn sweep_temporaries(store: &Path) {
    let (Some(parent), Some(name)) = (store.parent(), store.file_name()) else { return };
    let prefix = format!("{}.tmp", name.to_string_lossy());
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            fs::remove_file(entry.path()).ok(); // of no use, but also of no harm
        }
    }
}

/// What IMDS told, beside the checkpoint.
pub(super) fn metadata_of(store: &Path) -> PathBuf {
    store.with_file_name("imds.json")
}

// The kernel's name for the time since it was started: another boot may be of another instance of the same image.
fn boot() -> Option<Value> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| Value::String(id.trim().to_owned()))
}

/// What IMDS told an earlier run since the node was started; empty if there is nothing of use.
pub(super) fn read_metadata(store: &Path) -> Object<String, Value> {
    let text = read(&metadata_of(store)).ok().flatten();
    let Some(Value::Object(mut kept)) = text.and_then(|text| serde_json::from_slice(text.as_bytes()).ok()) else {
        return Object::new();
    };
    let same = boot().is_some_and(|boot| kept.get("boot") == Some(&boot));
    match kept.remove("told") {
        Some(Value::Object(told)) if same => told,
        _ => Object::new(),
    }
}

/// Keeps what IMDS told for the next run.
pub(super) fn write_metadata(store: &Path, told: Object<String, Value>) -> Result<()> {
    let Some(boot) = boot() else { return Ok(()) };
    let kept = Value::Object([("boot".into(), boot), ("told".into(), Value::Object(told))].into_iter().collect());
    write(&metadata_of(store), kept.to_string().as_bytes())
}

/// Keeps a checkpoint that cannot be read under another name (B19).
pub(super) fn set_aside(store: &Path) -> Result<()> {
    let name = store.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let aside = store.with_file_name(format!("{name}.corrupt-{}", clock::now().wall.as_unix_seconds()));
    fs::copy(store, &aside).with_context(|| format!("copy {} to {}", store.display(), aside.display()))?;
    log::error!("the unreadable checkpoint is kept as {}", aside.display());
    Ok(())
}

/// DELs that could not reach us. A file that is no record is moved out of the way, so that it is told once.
pub(super) fn read_spool() -> Vec<Record> {
    let mut records = Vec::new();
    for entry in fs::read_dir(spool::DIRECTORY).into_iter().flatten().flatten().take(spool::RECORDS_MAX) {
        let path = entry.path();
        if !entry.file_name().to_string_lossy().ends_with(spool::SUFFIX) {
            continue;
        }
        match read_record(&path) {
            Ok(record) => records.push(record),
            Err(error) => {
                log::error!("spool: {error}");
                fs::rename(&path, path.with_extension("bad")).ok(); // else it is told again
            }
        }
    }
    records
}

fn read_record(path: &Path) -> Result<Record> {
    let what = || format!("read {}", path.display());
    let mut bytes = Vec::new();
    let limit = u64::try_from(spool::RECORD_BYTES_MAX).unwrap_or(u64::MAX);
    File::open(path).with_context(what)?.take(limit + 1).read_to_end(&mut bytes).with_context(what)?;
    Record::parse(&bytes).map_err(Error::new).with_context(what)
}

/// A record is done with. One that a later DEL has put in its place stays: it tells of a later allocation.
pub(super) fn remove_record(folder: &Path, record: &Record) {
    let path = folder.join(Record::file_name(&record.key));
    if read_record(&path).is_ok_and(|found| found.time != record.time) {
        return;
    }
    if let Err(error) = fs::remove_file(&path)
        && error.kind() != ErrorKind::NotFound
    {
        log::warn!("remove {}: {error}", path.display());
    }
}

/// Links, pod rules and routes of the host, in either family.
pub(super) fn look_at_host() -> Result<Seen> {
    let mut seen = look_at_family(Family::V4)?;
    let v6 = look_at_family(Family::V6)?;
    seen.routed.extend(v6.routed);
    seen.linked.extend(v6.linked);
    seen.ruled.extend(v6.ruled);
    Ok(seen)
}

fn look_at_family(family: Family) -> Result<Seen> {
    let mut socket = Socket::route()?;
    let links = link::list(&mut socket)?;
    let rules = rule::list(&mut socket, family)?;
    Ok(Seen::of(&links, &route::list(&mut socket, family, Some(TABLE_MAIN))?, &rules))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::{PodKey, PodName};
    use crate::model::time::Wall;

    #[test]
    fn each_card_has_its_file() {
        for (store, card, file) in [
            ("/var/run/aws-node/ipam.json", 0, "/var/run/aws-node/ipam.json"),
            ("/var/run/aws-node/ipam.json", 2, "/var/run/aws-node/ipam-nic-2.json"),
            ("/tmp/pool", 1, "/tmp/pool-nic-1.json"),
        ] {
            assert_eq!(store_of(Path::new(store), card), Path::new(file));
        }
    }

    #[test]
    fn a_newer_record_under_the_same_key_stays() {
        let folder = std::env::temp_dir().join(format!("enibox-records-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let key = PodKey { network: "aws-cni".into(), container: "6f2c".into(), ifname: "eth0".into() };
        let path = folder.join(Record::file_name(&key));
        let at = |time| Record {
            key: key.clone(),
            pod: PodName::default(),
            uid: String::new(),
            time: Wall::from_unix_seconds(time),
        };
        fs::write(&path, at(6).to_bytes()).unwrap();
        remove_record(&folder, &at(5));
        assert_eq!(read_record(&path).unwrap(), at(6));
        remove_record(&folder, &at(6));
        assert!(!path.exists());
        remove_record(&folder, &at(6));
        fs::remove_dir(&folder).unwrap();
    }

    #[test]
    fn what_imds_told_is_good_for_one_boot() {
        let folder = std::env::temp_dir().join(format!("enibox-metadata-{}", std::process::id()));
        let store = folder.join("ipam.json");
        assert!(read_metadata(&store).is_empty());
        let told: Object<_, _> = [("mac".to_owned(), Value::from("02:00:00:00:00:01"))].into_iter().collect();
        write_metadata(&store, told.clone()).unwrap();
        assert_eq!(read_metadata(&store), told);
        let text = fs::read_to_string(metadata_of(&store)).unwrap();
        let other = r#""boot":"00000000-0000-0000-0000-000000000000""#;
        let boot = boot().unwrap();
        for wrong in [text.replace(&format!("\"boot\":{boot}"), other), "{".into(), "[]".into(), "{}".into()] {
            assert_ne!(wrong, text);
            fs::write(metadata_of(&store), wrong).unwrap();
            assert!(read_metadata(&store).is_empty());
        }
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_checkpoint_is_replaced_whole_and_leaves_no_temporary() {
        let folder = std::env::temp_dir().join(format!("enibox-files-{}", std::process::id()));
        let store = folder.join("run/ipam.json");
        assert_eq!(read(&store).unwrap(), None);
        write(&store, b"one").unwrap();
        fs::write(folder.join("run/ipam.json.tmp99"), b"torn").unwrap();
        write(&store, b"two").unwrap();
        assert_eq!(read(&store).unwrap().as_deref(), Some("two"));
        sweep_temporaries(&store);
        let names: Vec<_> = fs::read_dir(folder.join("run")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["ipam.json"]);
        set_aside(&store).unwrap();
        assert_eq!(fs::read_dir(folder.join("run")).unwrap().count(), 2);
        let blocked = folder.join("run/ipam.json/below");
        assert!(write(&blocked, b"x").unwrap_err().to_string().contains("below"));
        fs::remove_dir_all(&folder).unwrap();
    }
}
