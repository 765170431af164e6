//! `enibox cleanup`: lists what this program has made on the node, and with `--apply` removes it (`spec/operations.md` 11).
//! The only subcommand here that changes anything.
//!
//! Files and secondary ENIs, which EC2 deletes with the instance, stay unless asked for.

mod enis;

use super::{complain, environment, print};
use crate::apply::Host;
use crate::error::{Context, Error, Result, exit};
use crate::model::naming::DAEMON_SOCKET;
use crate::model::settings::Settings;
use crate::plan::cleanup::enis::{Enis, living, sort};
use crate::plan::cleanup::{Cleanup, cleanup};
use serde_json::json;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Name of the CNI configuration that the daemon's container writes.
const CONFLIST: &str = "10-aws.conflist";

/// What to clean up, and how.
#[derive(clap::Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub struct Args {
    /// Remove what is listed without it
    #[arg(long)]
    apply: bool,
    /// Do so although a daemon runs, or pods are alive, which lose their network
    #[arg(long)]
    force: bool,
    /// The nf_tables rules only: what a node needs that goes back to the original while its pods live on
    #[arg(long)]
    packet_filter: bool,
    /// Files too: the CNI configuration, first of all, and the checkpoints
    #[arg(long, conflicts_with = "packet_filter")]
    files: bool,
    /// Secondary ENIs too: detach and delete those that were made for this node and serve no pod
    #[arg(long, conflicts_with = "packet_filter")]
    enis: bool,
    /// Where the CNI configuration is
    #[arg(long, value_name = "DIRECTORY", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand; the exit code: 3 when something is there and was not to be removed.
pub fn run(args: &Args) -> u8 {
    match work(args) {
        Ok(code) => code,
        Err(error) => {
            complain(&error.to_string());
            exit::FAILURE
        }
    }
}

fn work(args: &Args) -> Result<u8> {
    let settings = environment();
    let mut host = Host::open()?;
    let seen = host.observe()?;
    let found = cleanup(&seen, &settings.veth_prefix, args.packet_filter);
    if found.needed {
        complain("pods have addresses of egress-cni: the table that translates them stays as long as they live");
    }
    let files = if args.files { files(&args.conf_dir, &settings) } else { Vec::new() };
    let ec2 = args.enis.then(|| enis::Ec2::open(&settings)).transpose()?;
    let enis = match &ec2 {
        Some(ec2) => {
            let pods = living(&seen, &found.pods);
            sort(&ec2.list()?, &ec2.identity.instance, &ec2.identity.primary_eni, &pods)
        }
        None => Enis::default(),
    };
    let stays = [enis.kept.as_slice(), &found.stays].concat();
    if !args.json {
        for line in &stays {
            complain(line);
        }
    }
    if args.apply && !args.force {
        refuse(&found)?;
    }
    let mut errors = Vec::new();
    if args.apply {
        // Without its configuration the runtime calls the plugin for no new pod.
        errors.extend(files.iter().filter_map(|file| remove(file).err()));
        errors.extend(host.clean_up(&found)?);
        errors.extend(ec2.iter().flat_map(|ec2| enis.spare.iter().filter_map(|spare| ec2.give_back(spare).err())));
    }
    let mut texts = files.iter().map(|file| format!("delete {}", file.display())).collect::<Vec<_>>();
    texts.extend(found.texts());
    texts.extend(enis.spare.iter().map(|spare| spare.text.clone()));
    let code = match (texts.is_empty(), args.apply) {
        (true, _) => exit::OK,
        (false, false) => exit::DIFFERS,
        (false, true) if errors.is_empty() => exit::OK,
        (false, true) => exit::FAILURE,
    };
    let errors = errors.iter().map(ToString::to_string).collect::<Vec<_>>();
    let printed = if args.json {
        let document = json!({"applied": args.apply, "steps": texts, "errors": errors,
            "live_pods": found.pods, "stays": stays});
        print(&format!("{document:#}\n"))
    } else {
        for error in &errors {
            complain(error);
        }
        texts.push(String::new());
        print(&texts.join("\n"))
    };
    Ok(if printed == exit::OK { code } else { printed })
}

fn refuse(found: &Cleanup) -> Result<()> {
    // What the original has put into our table's place is the work of its daemon, and ours does not run then.
    let given_back = found.tables.is_empty() && !found.chains.is_empty();
    if !given_back && UnixStream::connect(DAEMON_SOCKET).is_ok() {
        return Err(Error::new("a daemon runs and would make everything anew: stop it first, or use --force"));
    }
    match found.pods.as_slice() {
        [] => Ok(()),
        pods => {
            let pods = format!("{} pods are alive and would lose their network ({})", pods.len(), pods.join(", "));
            Err(Error::new(format!("{pods}: drain the node first, or use --force")))
        }
    }
}

/// The files that are there.
fn files(conf_dir: &Path, settings: &Settings) -> Vec<PathBuf> {
    let store = Path::new(&settings.backing_store);
    let stem = store.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let mut found = vec![conf_dir.join(CONFLIST), store.to_owned()];
    let beside = store.parent().and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let of_card = |name: &str| {
        let number = name.strip_prefix(&stem).and_then(|rest| rest.strip_prefix("-nic-"));
        number.and_then(|rest| rest.strip_suffix(".json")).is_some_and(|number| number.parse::<u32>().is_ok())
    };
    found.extend(beside.filter(|entry| of_card(&entry.file_name().to_string_lossy())).map(|entry| entry.path()));
    found.retain(|file| file.exists());
    found
}

fn remove(file: &Path) -> Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| format!("delete {}", file.display())),
    }
}
