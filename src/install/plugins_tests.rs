use super::*;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

/// The image's folder and the host's.
struct Folders(PathBuf);

impl Folders {
    fn new(name: &str) -> Folders {
        let path = std::env::temp_dir().join(format!("enibox-plugins-{}-{name}", std::process::id()));
        for folder in ["image", "host"] {
            fs::create_dir_all(path.join(folder)).unwrap();
        }
        Folders(path)
    }

    fn image(&self) -> PathBuf {
        self.0.join("image")
    }

    fn host(&self) -> PathBuf {
        self.0.join("host")
    }

    fn ship(&self, name: &str, content: &str) {
        write(&self.image().join(name), content, 0o755);
    }

    fn find(&self, name: &str, content: &str) {
        write(&self.host().join(name), content, 0o755);
    }

    fn copy(&self) {
        copy(&self.image(), &self.host()).unwrap();
    }

    #[track_caller]
    fn check(&self, files: &[(&str, &str)]) {
        let entries = fs::read_dir(self.host()).unwrap().map(|entry| entry.unwrap());
        let mut got: Vec<_> = entries
            .map(|entry| (entry.file_name().into_string().unwrap(), fs::read_to_string(entry.path()).unwrap()))
            .filter(|(name, _)| name != RECORD)
            .collect();
        got.sort();
        let wanted: Vec<_> = files.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect();
        assert_eq!(got, wanted);
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn write(path: &Path, content: &str, mode: u32) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn executables_are_copied_and_nothing_else() {
    let folders = Folders::new("which");
    for name in ["portmap", "bandwidth", SUPPORT, OWN] {
        folders.ship(name, name);
    }
    write(&folders.image().join("LICENSE"), "text", 0o644);
    fs::create_dir(folders.image().join("folder")).unwrap();
    symlink("portmap", folders.image().join("link")).unwrap();
    folders.copy();
    folders.check(&[(SUPPORT, SUPPORT), ("bandwidth", "bandwidth"), ("portmap", "portmap")]);
    fs::remove_dir_all(folders.image()).unwrap();
    assert!(copy(&folders.image(), &folders.host()).unwrap_err().to_string().starts_with("list the working directory"));
}

#[test]
fn ours_is_renewed_and_anybody_elses_is_left() {
    let folders = Folders::new("whose");
    for name in ["bridge", "loopback", "portmap", "ptp", "tuning", SUPPORT] {
        folders.ship(name, "version one of it");
    }
    folders.find("bridge", "another's, and newer");
    folders.find("loopback", "version one of it"); // another's, and the same
    folders.find("ptp", "version o"); // never finished
    folders.find("tuning", "");
    folders.find(SUPPORT, "another version");
    folders.copy();
    let of = |portmap: &'static str, support: &'static str, others: &'static str| {
        [
            (SUPPORT, support),
            ("bridge", "another's, and newer"),
            ("loopback", "version one of it"),
            ("portmap", portmap),
            ("ptp", others),
            ("tuning", others),
        ]
    };
    folders.check(&of("version one of it", "version one of it", "version one of it"));

    // An administrator changes one of ours: it is theirs from then on.
    folders.find("portmap", "patched");
    for name in ["bridge", "loopback", "portmap", "ptp", "tuning", SUPPORT] {
        folders.ship(name, "version two");
    }
    folders.copy();
    folders.check(&of("patched", "version two", "version two"));

    // Down again: what we wrote earlier is ours as well.
    for name in ["ptp", "tuning", SUPPORT] {
        folders.ship(name, "version one of it");
    }
    folders.copy();
    folders.check(&of("patched", "version one of it", "version one of it"));

    // Without the record only what differs is in doubt.
    fs::remove_file(folders.host().join(RECORD)).unwrap();
    folders.ship("ptp", "version three");
    fs::remove_file(folders.host().join("portmap")).unwrap();
    folders.copy();
    folders.check(&of("version two", "version one of it", "version one of it"));
}

#[test]
fn a_second_start_writes_nothing() {
    let folders = Folders::new("again");
    folders.ship("portmap", "one");
    folders.find("bridge", "foreign");
    folders.ship("bridge", "one");
    folders.copy();
    let state = || {
        use std::os::unix::fs::MetadataExt;
        let names = ["", RECORD, "portmap", "bridge"];
        names.map(|name| {
            let metadata = fs::metadata(folders.host().join(name)).unwrap();
            (metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.ctime_nsec())
        })
    };
    let before = state();
    folders.copy();
    assert_eq!(state(), before);
}

#[test]
fn what_is_no_file_is_judged_by_its_kind() {
    let folders = Folders::new("kinds");
    folders.ship("portmap", "one");
    folders.ship(SUPPORT, "one");
    // A link of the host is the host's, wherever it leads; the support script is ours.
    symlink("/nowhere/at/all", folders.host().join("portmap")).unwrap();
    symlink("/nowhere/at/all", folders.host().join(SUPPORT)).unwrap();
    folders.copy();
    assert!(folders.host().join("portmap").is_symlink());
    assert_eq!(fs::read_to_string(folders.host().join(SUPPORT)).unwrap(), "one");
    fs::remove_file(folders.host().join("portmap")).unwrap();
    fs::create_dir(folders.host().join("portmap")).unwrap();
    let error = copy(&folders.image(), &folders.host()).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EISDIR), "{error}");
    assert!(error.to_string().contains("/host/portmap: "), "{error}");
}

#[test]
fn large_files_are_compared_and_hashed_whole() {
    let folders = Folders::new("large");
    let content = "0123456789abcdef".repeat(3 * CHUNK / 16) + "end";
    folders.ship("portmap", &content);
    let (source, target) = (folders.image().join("portmap"), folders.host().join("portmap"));
    let empty = Record(Vec::new());
    let judge = |there: &str| {
        write(&target, there, 0o755);
        look("portmap", &source, &target, &empty)
    };
    assert_eq!(judge(&content), There::Same);
    assert_eq!(judge(&content[..2 * CHUNK]), There::Ours);
    assert_eq!(judge(&content[..2 * CHUNK + 7]), There::Ours);
    assert_eq!(judge(&(content.clone() + "x")), There::Foreign);
    assert_eq!(judge(&content.replace("end", "END")), There::Foreign);
    write(&target, "abc", 0o755);
    assert_eq!(hash(&target).unwrap(), "a9993e364706816aba3e25717850c26c9cd0d89d"); // FIPS 180-2, appendix A.1
}

#[test]
fn a_record_stays_short() {
    let folders = Folders::new("record");
    let mut record = Record::read(&folders.host());
    for number in 0..2000 {
        assert!(record.add("portmap", &format!("{number:040}")));
    }
    assert!(!record.add("portmap", &format!("{:040}", 7)));
    record.write(&folders.host()).unwrap();
    let again = Record::read(&folders.host());
    assert!(again.0.len() > 1000 && again.has("portmap", &format!("{:040}", 1999)));
    assert!(!again.has("portmap", &format!("{:040}", 0)));
    assert!(again.0.iter().all(|line| line.len() == 48));
    fs::write(folders.host().join(RECORD), [0xff; 8]).unwrap();
    assert!(Record::read(&folders.host()).0.is_empty());
}
