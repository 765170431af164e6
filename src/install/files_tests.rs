use super::*;
use std::os::unix::fs::symlink;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("enibox-install-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn inode(&self, name: &str) -> u64 {
        fs::symlink_metadata(self.0.join(name)).unwrap().ino()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

#[test]
fn a_file_is_written_once_with_its_mode() {
    let folder = Folder::new("put");
    let path = folder.0.join("plugin");
    let check = |content: &[u8], mode: u32, wanted: Placed| {
        assert_eq!(put(&folder.0, "plugin", content, mode).unwrap(), wanted, "{mode:o}");
        assert_eq!(fs::read(&path).unwrap(), content);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode);
        assert_eq!(folder.names(), ["plugin"]);
    };
    check(b"one", 0o755, Placed::Written);
    let inode = folder.inode("plugin");
    check(b"one", 0o755, Placed::Unchanged);
    assert_eq!(folder.inode("plugin"), inode);
    check(b"two", 0o755, Placed::Written);
    check(b"two", 0o644, Placed::Written);
    check(b"", 0o600, Placed::Written);
    check(b"", 0o600, Placed::Unchanged);
    let long = vec![7; 3 * CHUNK + 5];
    check(&long, 0o755, Placed::Written);
    check(&long, 0o755, Placed::Unchanged);
    let mut other = long.clone();
    *other.last_mut().unwrap() = 8;
    check(&other, 0o755, Placed::Written);
}

#[test]
fn a_copy_of_a_file_is_the_same_to_the_last_byte() {
    let folder = Folder::new("copy");
    for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 3] {
        let content: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let source = folder.0.join("source");
        fs::write(&source, &content).unwrap();
        for wanted in [Placed::Written, Placed::Unchanged] {
            assert_eq!(put_file(&folder.0, "target", &source, 0o755).unwrap(), wanted, "{length}");
            assert_eq!(fs::read(folder.0.join("target")).unwrap(), content);
        }
        assert_eq!(put(&folder.0, "target", &content, 0o755).unwrap(), Placed::Unchanged, "{length}");
    }
}

#[test]
fn what_cannot_be_a_source_is_refused() {
    let folder = Folder::new("source");
    let text = |source: &Path| put_file(&folder.0, "target", source, 0o755).unwrap_err().to_string();
    assert!(text(&folder.0).ends_with("not a regular file"), "{}", text(&folder.0));
    assert!(text(Path::new("/dev/null")).ends_with("not a regular file"));
    assert!(text(&folder.0.join("none")).contains("No such file"));
    assert!(folder.names().is_empty());
}

#[test]
fn a_link_is_replaced_and_what_it_points_to_stays() {
    let folder = Folder::new("symlink");
    fs::write(folder.0.join("elsewhere"), "theirs").unwrap();
    for points_to in ["elsewhere", "nowhere", "plugin"] {
        let path = folder.0.join("plugin");
        fs::remove_file(&path).ok();
        symlink(points_to, &path).unwrap();
        // Even if what it points to were right already: runtimes follow it to a file that is not ours.
        assert_eq!(put(&folder.0, "plugin", b"theirs", 0o644).unwrap(), Placed::Written);
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
        assert_eq!(folder.names(), ["elsewhere", "plugin"]);
    }
    assert_eq!(fs::read(folder.0.join("elsewhere")).unwrap(), b"theirs");
}

#[test]
fn a_folder_in_the_way_is_told_and_left_alone() {
    let folder = Folder::new("folder");
    fs::create_dir_all(folder.0.join("plugin/inside")).unwrap();
    let error = put(&folder.0, "plugin", b"one", 0o755).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EISDIR), "{error}");
    assert!(error.to_string().starts_with(&format!("install {}/plugin: rename ", folder.0.display())), "{error}");
    assert_eq!(folder.names(), ["plugin"]);
    fs::write(folder.0.join("one"), "one").unwrap();
    assert_eq!(link(&folder.0, "plugin", "one").unwrap_err().errno(), Some(libc::EISDIR));
    assert_eq!(folder.names(), ["one", "plugin"]);
    let error = put(&folder.0.join("none"), "plugin", b"", 0o755).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOENT), "{error}");
}

#[test]
fn names_become_links_of_one_file() {
    let folder = Folder::new("link");
    put(&folder.0, "aws-cni", b"new", 0o755).unwrap();
    let path = folder.0.join("egress-cni");
    let check = |wanted: Placed| {
        assert_eq!(link(&folder.0, "egress-cni", "aws-cni").unwrap(), wanted);
        assert_eq!(folder.inode("egress-cni"), folder.inode("aws-cni"));
        assert_eq!(folder.names(), ["aws-cni", "egress-cni"]);
    };
    check(Placed::Written);
    check(Placed::Unchanged);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "old").unwrap();
    check(Placed::Written);
    fs::remove_file(&path).unwrap();
    symlink("aws-cni", &path).unwrap();
    check(Placed::Written);
    // A new binary leaves the link with the old one until it is made anew.
    put(&folder.0, "aws-cni", b"newer", 0o755).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    check(Placed::Written);
    assert!(link(&folder.0, "x", "none").unwrap_err().to_string().contains("No such file"));
    symlink("aws-cni", folder.0.join("soft")).unwrap();
    assert!(link(&folder.0, "x", "soft").unwrap_err().to_string().ends_with("soft is not a regular file"));
}

/// Takes a file's mark away again, without which its folder could not be removed.
struct Immutable(PathBuf);

impl Immutable {
    fn mark(&self, mark: &str) -> bool {
        let status = std::process::Command::new("chattr").arg(mark).arg(&self.0).status();
        status.expect("chattr (Debian: e2fsprogs) plays the file system that refuses").success()
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        self.mark("-i");
    }
}

/// link(2) of a file that cannot be changed fails with EPERM, as everywhere on a file system without hard links (vfat).
#[test]
fn where_no_link_can_be_made_there_is_a_copy() {
    let folder = Folder::new("refused");
    put(&folder.0, "aws-cni", b"plugin", 0o755).unwrap();
    let immutable = Immutable(folder.0.join("aws-cni"));
    assert!(immutable.mark("+i"), "chattr +i {}", immutable.0.display());
    let refused = fs::hard_link(folder.0.join("aws-cni"), folder.0.join("x")).unwrap_err();
    assert!(has_no_links(&refused), "{refused}");
    for wanted in [Placed::Written, Placed::Unchanged] {
        assert_eq!(link(&folder.0, "egress-cni", "aws-cni").unwrap(), wanted);
        assert_ne!(folder.inode("egress-cni"), folder.inode("aws-cni"));
        assert_eq!(fs::read(folder.0.join("egress-cni")).unwrap(), b"plugin");
        assert_eq!(fs::metadata(folder.0.join("egress-cni")).unwrap().mode() & 0o7777, 0o755);
        assert_eq!(folder.names(), ["aws-cni", "egress-cni"]);
    }
    drop(immutable);
    // Where links can be made again the copy becomes one.
    assert_eq!(link(&folder.0, "egress-cni", "aws-cni").unwrap(), Placed::Written);
    assert_eq!(folder.inode("egress-cni"), folder.inode("aws-cni"));
}

#[test]
fn only_temporaries_of_the_dead_are_swept() {
    let folder = Folder::new("sweep");
    let stray = ".enibox-0123456789abcdef.tmp";
    let others = [
        ".enibox-0123456789abcde.tmp",
        ".enibox-0123456789abcdeg.tmp",
        ".enibox-0123456789abcdef.tmp2",
        "aws-cni.tmp",
        "0123456789abcdef.tmp",
    ];
    for name in others.iter().chain([&stray]) {
        fs::write(folder.0.join(name), "half").unwrap();
    }
    symlink("aws-cni.tmp", folder.0.join(".enibox-aaaaaaaaaaaaaaaa.tmp")).unwrap();
    fs::create_dir(folder.0.join(".enibox-bbbbbbbbbbbbbbbb.tmp")).unwrap();
    let (alive, _file, _locked) = create_temporary(&folder.0).unwrap();
    assert_eq!(sweep(&folder.0), [stray]);
    assert_eq!(sweep(&folder.0), [""; 0]);
    assert!(alive.0.exists());
    drop(alive);
    assert_eq!(folder.names().len(), others.len() + 2);
    assert!(sweep(&folder.0.join("none")).is_empty());
}

#[test]
fn many_at_once_and_a_sweeper_leave_whole_files() {
    const WRITERS: usize = 12;
    let folder = Folder::new("many");
    let content: Vec<Vec<u8>> = (0..2).map(|one| vec![one; CHUNK + 1]).collect();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (folder, content) = (&folder, &content);
            scope.spawn(move || {
                for round in 0..10 {
                    put(&folder.0, "aws-cni", &content[(writer + round) % 2], 0o755).unwrap();
                    link(&folder.0, "egress-cni", "aws-cni").unwrap();
                    sweep(&folder.0);
                    for name in ["aws-cni", "egress-cni"] {
                        let seen = fs::read(folder.0.join(name)).unwrap();
                        assert!(content.contains(&seen), "{name} has {} bytes", seen.len());
                    }
                }
            });
        }
    });
    assert_eq!(folder.names(), ["aws-cni", "egress-cni"]);
}
