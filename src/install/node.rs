//! The entrypoint of the node's container (`spec/install.md` 4): checks, the plugin's files, then the daemon in this very
//! process, and the CNI configuration last.
//!
//! The presence of a configuration is what makes the kubelet call the node ready. Hence it is written once the daemon can
//! serve an ADD, and never taken away: a configuration from before a restart keeps the node ready, and pods that start
//! meanwhile are tried again. There is no child to watch: when the daemon ends, so does the container, with its exit code.

use super::chain::{self, Answers};
use super::conflist::{self, NodeAddresses};
use super::environment::{self, Site};
use super::files::{self, Placed};
use crate::error::{Context, Error, Result, exit};
use crate::logging::tell;
use crate::model::imds::Identity;
use crate::model::naming::DAEMON_SOCKET;
use crate::model::settings::Settings;
use crate::rpc::grpc::{Client, Code, Status};
use crate::rpc::health::SERVING;
use crate::rpc::proto::{HealthCheckRequest, HealthCheckResponse, path};
use crate::sys;
use log::Level;
use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// What is to be done once the daemon serves, with the settings that count and the node's identity; an error ends the daemon.
pub type Ready = Box<dyn FnOnce(&Settings, &Identity) -> Result<()> + Send>;

/// This program, under whatever name it lies in the image.
const SELF: &str = "/proc/self/exe";
/// The one copy of it on the host, and its further names: the second is what configurations of former versions call.
const PLUGIN: &str = "aws-cni";
const LINKS: [&str; 2] = ["egress-cni", "egress-v4-cni"];
const PLUGIN_MODE: u32 = 0o755;
const CONFLIST_MODE: u32 = 0o644;
/// How long the daemon may take to answer a health check; it has said already that it serves.
const HEALTH_LIMIT: Duration = Duration::from_secs(5);
/// When it is told first that the daemon does not serve yet, and how seldom at last; the pause doubles in between.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_mins(1);

/// Runs the entrypoint with this daemon; the exit code.
pub fn run(daemon: fn(Ready) -> u8) -> u8 {
    // A first process has no default action for signals: one that comes before the daemon waits for them waits too.
    if let Err(error) = sys::block_signals() {
        tell(Level::Error, &format!("block signals: {error}"));
        return exit::FAILURE;
    }
    tell(Level::Info, "Validating env variables ...");
    let site = match environment::check(|name| std::env::var(name).ok(), Path::new("")) {
        Ok(site) => site,
        Err(mistakes) => {
            for mistake in &mistakes {
                tell(Level::Error, mistake);
            }
            return exit::FAILURE;
        }
    };
    for warning in &site.warnings {
        tell(Level::Warn, warning);
    }
    tell(Level::Info, "Install CNI binaries ...");
    let asking = match install_plugin(Path::new(&site.settings.cni_bin_path)).and_then(|()| ask_chain(&site)) {
        Ok(asking) => asking,
        Err(error) => {
            tell(Level::Error, &format!("Failed to install CNI binaries: {error}"));
            return exit::FAILURE;
        }
    };
    tell(Level::Info, "Starting IPAM daemon ...");
    tell(Level::Info, "Checking for IPAM connectivity ...");
    let waiting = match Waiting::start(site.settings.log_file.clone()) {
        Ok(waiting) => waiting,
        Err(error) => {
            tell(Level::Error, &error.to_string());
            return exit::FAILURE;
        }
    };
    let code = daemon(Box::new(move |settings, identity| finish(&site, waiting, asking, settings, identity)));
    tell(if code == exit::OK { Level::Info } else { Level::Error }, "IPAMD stopped hence exiting ...");
    code
}

/// One copy with several names: a plugin that the runtime finds under any of them is of the daemon's own build.
fn install_plugin(folder: &Path) -> Result<()> {
    for stray in files::sweep(folder) {
        tell(Level::Info, &format!("Removed {}, left by a start that was cut off", folder.join(stray).display()));
    }
    files::put_file(folder, PLUGIN, Path::new(SELF), PLUGIN_MODE)?;
    told(folder, PLUGIN);
    for name in LINKS {
        files::link(folder, name, PLUGIN)?;
        told(folder, name);
    }
    Ok(())
}

fn told(folder: &Path, name: &str) {
    // Whoever started us may have closed it.
    let _ = writeln!(std::io::stdout(), "Installed {}", folder.join(name).display());
}

/// Starts asking the other plugins of the list while the daemon starts.
fn ask_chain(site: &Site) -> Result<JoinHandle<Answers>> {
    let filled = site.template.fill(&site.settings, &NodeAddresses::default())?;
    let folder = site.settings.cni_bin_path.clone();
    let ask = move || chain::ask(Path::new(&folder), &filled.foreign());
    std::thread::Builder::new().name("plugins".into()).spawn(ask).context("start thread plugins")
}

/// Tells that the daemon does not serve yet until it is dropped, ever more rarely: whoever looks at a node that does not become
/// ready finds where to look next.
struct Waiting {
    _until: SyncSender<()>,
}

impl Waiting {
    fn start(log_file: String) -> Result<Waiting> {
        let (until, over) = sync_channel(0);
        let body = move || {
            let (mut pause, mut waited) = (RETRY_FIRST, Duration::ZERO);
            while over.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                waited += pause;
                pause = (pause * 2).min(RETRY_MOST);
                let seconds = waited.as_secs();
                tell(
                    Level::Info,
                    &format!("Retrying waiting for IPAM-D, {seconds} s by now; its log says for what: {log_file}"),
                );
            }
        };
        std::thread::Builder::new().name("waiting".into()).spawn(body).context("start thread waiting")?;
        Ok(Waiting { _until: until })
    }
}

/// The last step: the daemon answers, the configuration is written.
fn finish(
    site: &Site,
    waiting: Waiting,
    asking: JoinHandle<Answers>,
    settings: &Settings,
    identity: &Identity,
) -> Result<()> {
    drop(waiting);
    check_health().map_err(|status| Error::new(status.to_string()).context("check the daemon's health"))?;
    let answers = asking.join().map_err(|_| Error::new("thread plugins ended"))?;
    for name in &answers.missing {
        tell(
            Level::Error,
            &format!(
                "plugin {name} is not in {}: unless the runtime has another folder with it, no pod will start",
                settings.cni_bin_path
            ),
        );
    }
    for note in &answers.notes {
        tell(Level::Warn, note);
    }
    tell(Level::Info, "Copying config file ...");
    let folder = Path::new(&settings.cni_conf_path);
    files::sweep(folder);
    let filled = site.template.fill(settings, &NodeAddresses::of(identity))?;
    let text = filled.finish(environment::pinned(settings), &answers.common);
    let placed = files::put(folder, conflist::NAME, text.as_bytes(), CONFLIST_MODE)?;
    let versions: Vec<&str> = answers.common.iter().map(|version| version.as_str()).collect();
    log::info!(
        "{} {placed:?}; all its plugins know CNI {}",
        folder.join(conflist::NAME).display(),
        versions.join(", ")
    );
    tell(
        Level::Info,
        match placed {
            Placed::Written => "Successfully copied CNI plugin binary and config file.",
            Placed::Unchanged => "Successfully copied CNI plugin binary; the config file is as it was.",
        },
    );
    Ok(())
}

/// Whether the daemon answers on the socket that plugins use.
fn check_health() -> Result<(), Status> {
    let mut client = Client::connect(Path::new(DAEMON_SOCKET), HEALTH_LIMIT)?;
    let request = HealthCheckRequest { service: String::new() };
    let reply: HealthCheckResponse = client.call(path::HEALTH_CHECK, &request, HEALTH_LIMIT)?;
    if reply.status == SERVING {
        Ok(())
    } else {
        Err(Status::new(Code::UNAVAILABLE, format!("it is {}", reply.status)))
    }
}
