//! The operator's subcommands. They look and tell, and change nothing unless they are told to; each works without the
//! daemon as far as it can.
//!
//! Data goes to standard output, everything else to standard error; `--json` is for programs.

mod ask;
pub mod cleanup;
pub mod config;
pub mod doctor;
pub mod plan;
pub mod rules;
pub mod simulate;
pub mod status;
pub mod support;

use crate::error::{Result, exit};
use crate::model::settings::Settings;
use crate::model::settings::layers::{ENVIRONMENT, MEMORY_BYTES_MAX, environment_from_text};
use serde_json::Value;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

// Where the daemon's metrics are.
const METRICS: &str = "127.0.0.1:61678";

/// Where the daemon answers, for every subcommand that asks it.
#[derive(clap::Args, Debug)]
pub struct Asking {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Introspection address of the daemon, address:port or unix:path [default: INTROSPECTION_BIND_ADDRESS]
    #[arg(long, value_name = "ADDRESS")]
    address: Option<String>,
}

impl Asking {
    // What the daemon says at this path.
    fn ask(&self, settings: &Settings, path: &str) -> Result<Value> {
        let address = self.address.as_ref().unwrap_or(&settings.introspection_address);
        ask::get(address, path)
    }
}

// The settings of the daemon's container. On the host itself nobody has set them: what is not set here counts as it did when
// the daemon was started last.
fn environment() -> Settings {
    Settings::parse(variables()).0
}

fn variables() -> impl Fn(&str) -> Option<String> {
    let own = |name: &str| std::env::var(name).ok();
    let store = Settings::parse(own).0.backing_store;
    let kept = read(&Path::new(&store).with_file_name(ENVIRONMENT), MEMORY_BYTES_MAX);
    let kept = environment_from_text(&kept.unwrap_or_default());
    move |name| own(name).or_else(|| kept.get(name).cloned())
}

// A file of at most so many bytes, and the start of a longer one.
fn read(path: &Path, bytes_max: usize) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(u64::try_from(bytes_max).unwrap_or(u64::MAX)).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

// Prints to standard output; a reader that has gone is a failure and no reason to abort.
fn print(text: &str) -> u8 {
    let mut stdout = io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => exit::OK,
        Err(_) => exit::FAILURE,
    }
}

fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "enibox: {text}"); // nobody may be reading
}

// A text member of a document; empty when it is not there.
fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

fn items<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}
