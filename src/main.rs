//! Dispatch by the name the program is called under.
//!
//! One table maps the exact file name of `argv[0]` to a personality: a suffix match would take a wrapper called
//! `my-aws-cni` for the plugin. Every other name is the operator's command line, whose first word may name a personality. A
//! personality runs without any command-line parsing. Only here does the process get its exit code.

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use enibox::{VERSION, daemon, debug, error::exit, install, plugin, probe};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

struct Personality {
    name: &'static str,
    about: &'static str,
    run: fn() -> u8,
}

const PERSONALITIES: &[Personality] = &[
    Personality {
        name: "aws-cni",
        about: "CNI plugin: ADD, DEL, CHECK, STATUS, GC, VERSION as CNI_COMMAND says",
        run: || plugin::run(&plugin::aws_cni::PLUGIN),
    },
    Personality {
        name: "egress-cni",
        about: "CNI plugin: the other family's way out through the node, second in the chain",
        run: || plugin::run(&plugin::egress_cni::PLUGIN),
    },
    Personality {
        name: "egress-v4-cni",
        about: "the same under its name of old releases",
        run: || plugin::run(&plugin::egress_cni::PLUGIN),
    },
    Personality {
        name: "aws-vpc-cni-init",
        about: "init container: reference plugins and sysctls of the node, set by its environment",
        run: install::init::run,
    },
    Personality {
        name: "aws-vpc-cni",
        about: "entrypoint of the node's container: plugin, daemon, CNI configuration",
        run: || install::node::run(daemon::run_then),
    },
    Personality { name: "aws-k8s-agent", about: "IPAM daemon of the node, set by its environment", run: daemon::run },
    Personality {
        name: probe::NAME,
        about: "asks a gRPC server, the daemon for one, whether it serves",
        run: probe::run,
    },
];

fn personality(name: Option<&OsStr>) -> Option<&'static Personality> {
    PERSONALITIES.iter().find(|personality| name == Some(OsStr::new(personality.name)))
}

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    let called = words.next();
    let first = words.next();
    let by_name = personality(called.as_deref().and_then(|path| Path::new(path).file_name()));
    let code = match by_name.or_else(|| personality(first.as_deref())) {
        Some(personality) => (personality.run)(),
        None => operate(),
    };
    ExitCode::from(code)
}

/// The Amazon VPC CNI for Kubernetes as one executable
#[derive(Parser)]
#[command(name = "enibox", version = VERSION)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the program's version
    Version,
    /// Show what the node's pool holds, what the daemon is doing, and what went wrong
    Status(debug::Asking),
    /// Show the effective settings and which layer each comes from
    Config(debug::Asking),
    /// Say what is wrong with this node, what it breaks and how to mend it (needs root); exit code 3 if anything is
    Doctor(debug::doctor::Args),
    /// Show our rules, routes, settings and nf_tables in the tools' own syntax with their reasons (needs root)
    Rules(debug::rules::Args),
    /// Collect what somebody far away needs to understand this node, as a tar archive (needs root)
    SupportBundle(debug::support::Args),
    /// List what is ours on this node, and with --apply remove it
    Cleanup(debug::cleanup::Args),
    /// Say what a node of an instance type holds and what its pods cost, by running it in virtual time
    Plan(debug::plan::Args),
    /// Run many nodes against a model of EC2, in virtual time, and the original's algorithm beside
    Simulate(debug::simulate::Args),
    /// Run a cluster's network on this machine and try every flow (needs root)
    #[cfg(feature = "sandbox")]
    Sandbox(enibox::sandbox::demo::Args),
}

/// The operator's command line.
fn operate() -> u8 {
    let mut names = String::from("Under these names, or with one of them as its first word, it is:\n");
    for personality in PERSONALITIES {
        // Writing to a string cannot fail.
        let _ = writeln!(names, "  {:<18}{}", personality.name, personality.about);
    }
    let matches = Cli::command().after_help(names).try_get_matches();
    match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => match cli.command {
            Command::Version => print(&format!("enibox {VERSION}\n")),
            Command::Status(args) => debug::status::run(&args),
            Command::Doctor(args) => debug::doctor::run(&args),
            Command::Rules(args) => debug::rules::run(&args),
            Command::SupportBundle(args) => debug::support::run(&args),
            Command::Cleanup(args) => debug::cleanup::run(&args),
            Command::Plan(args) => debug::plan::run(&args),
            Command::Simulate(args) => debug::simulate::run(&args),
            Command::Config(args) => debug::config::run(&args),
            #[cfg(feature = "sandbox")]
            Command::Sandbox(args) => enibox::sandbox::demo::run(&args),
        },
        Err(error) => {
            // Help that nobody reads is no reason to fail differently.
            let _ = error.print();
            if error.use_stderr() { exit::USAGE } else { exit::OK }
        }
    }
}

/// Prints to standard output. The `println!` of the library would abort the process when the reader is gone.
fn print(text: &str) -> u8 {
    let mut stdout = io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => exit::OK,
        Err(_) => exit::FAILURE,
    }
}
