//! Network namespaces: handles, persistent names, running code inside.
//!
//! A namespace is entered only by threads made for it (`sys::in_netns`), never by the caller's.

use crate::error::{Context, Error, Result};
use crate::sys;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

/// The network namespace of the calling thread, as the kernel shows it.
const OWN: &str = "/proc/thread-self/ns/net";

/// An open network namespace. It lives at least as long as this handle, whatever becomes of the path.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    path: PathBuf,
}

impl Namespace {
    /// Opens a namespace by path. The file must lie on nsfs or procfs (`spec/plugin.md` 13.1): a plain file left behind
    /// where a namespace was mounted is refused with words that say so.
    pub fn open(path: impl Into<PathBuf>) -> Result<Namespace> {
        let path = path.into();
        let file = File::open(&path).with_context(|| format!("open network namespace {}", path.display()))?;
        let namespace = sys::is_on_nsfs_or_procfs(&file).with_context(|| format!("look at {}", path.display()))?;
        if namespace {
            Ok(Namespace { file, path })
        } else {
            Err(Error::new(format!(
                "open network namespace {}: the file is no namespace (not on nsfs or procfs)",
                path.display()
            )))
        }
    }

    /// The namespace of the calling thread.
    pub fn own() -> Result<Namespace> {
        Namespace::open(OWN)
    }

    /// Creates an empty namespace (its `lo` is down) that stays until [`Namespace::delete_named`], whoever ends, under
    /// `directory`, by the means of `ip netns`: a file with the namespace bind-mounted on it.
    pub fn create_named(directory: &Path, name: &str) -> Result<Namespace> {
        let path = directory.join(name);
        let what = || format!("create network namespace {}", path.display());
        if name.is_empty() || name.contains('/') || matches!(name, "." | "..") {
            return Err(Error::new("the name must be a plain file name").context(what()));
        }
        std::fs::create_dir_all(directory).with_context(what)?;
        File::options().write(true).create_new(true).open(&path).with_context(what)?;
        let mounted = std::thread::scope(|scope| {
            let worker = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                sys::unshare_netns()?;
                sys::bind_mount(Path::new(OWN), &path)
            })?;
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        match mounted.with_context(what).and_then(|()| Namespace::open(&path)) {
            Ok(namespace) => Ok(namespace),
            Err(error) => {
                Namespace::delete_named(directory, name).ok(); // the first error is the one to tell
                Err(error)
            }
        }
    }

    /// Removes the name. The namespace itself ends when its last process, socket and handle has gone. A name that is not
    /// there is no error.
    pub fn delete_named(directory: &Path, name: &str) -> Result<()> {
        let path = directory.join(name);
        // EINVAL: the file is no mount, as after a crash between the two steps of creation.
        match sys::unmount_lazily(&path) {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
                return Err(Error::from(error).context(format!("unmount network namespace {}", path.display())));
            }
            _ => {}
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::from(error).context(format!("remove network namespace {}", path.display())))
            }
            _ => Ok(()),
        }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode, which tell namespaces apart.
    pub fn id(&self) -> Result<(u64, u64)> {
        use std::os::unix::fs::MetadataExt;
        let metadata = self.file.metadata().with_context(|| format!("look at {}", self.path.display()))?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Runs `work` inside, on a thread of its own, and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        sys::in_netns(&self.file, work).with_context(|| format!("enter network namespace {}", self.path.display()))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
