//! Settings of this node: read at the start, and kept current while the daemon runs.
//!
//! Annotations and labels come with the Node object, the file is looked at now and then. What takes effect at once becomes
//! new tunables for the core; what does not is told once, and counts at the next start. What the Node said last is kept in
//! a small file beside the checkpoint: a daemon that starts while the API server is away must not flip its mode, nor forget
//! the node's targets.

use super::introspect::Board;
use super::{End, files, spawn};
use crate::error::{Context, Error, Result};
use crate::logging;
use crate::model::imds::Identity;
use crate::model::kube::Node;
use crate::model::settings::layers::{FILE_BYTES_MAX, Layered, MEMORY, MEMORY_BYTES_MAX, Overlay, Texts, read_file};
use crate::model::settings::{Line, Settings};
use crate::plan::configure::tunables;
use crate::plan::core::{Event, Tunables};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How often the settings file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The settings as operators see them.
#[derive(Clone, Debug)]
pub(super) struct Known {
    /// What counts and from where.
    pub(super) layered: Layered,
    /// What will count after the next start.
    pub(super) pending: Vec<Line>,
    /// What could not be understood.
    pub(super) wrong: Vec<String>,
    /// Name of the node's ENIConfig; `None` until the Node was seen.
    pub(super) eni_config: Option<String>,
}

/// Where the Node is left for the thread that looks at settings.
#[derive(Clone, Default)]
pub(super) struct Notes(Arc<(Mutex<Option<Node>>, Condvar)>);

impl Notes {
    /// The Node was read or has changed. Never waits.
    pub(super) fn node_seen(&self, node: &Node) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(node.clone());
        self.0.1.notify_one();
    }

    fn wait(&self) -> Option<Node> {
        let node = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.1.wait_timeout_while(node, LOOK_EVERY, |node| node.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.take()
    }
}

/// The layers of this node and what comes of them.
pub(super) struct Tuner {
    file: PathBuf,
    memory: PathBuf,
    // What the memory holds; `None`: nothing that can be read.
    remembered: Option<String>,
    // As they were when the process started, and as they are.
    start: Overlay,
    now: Overlay,
    file_wrong: Vec<String>,
    known: Known,
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

impl Tuner {
    /// Reads what there is without the API server.
    pub(super) fn read() -> Tuner {
        let (plain, _) = Settings::parse(environment);
        let memory = Path::new(&plain.backing_store).with_file_name(MEMORY);
        Tuner::read_from(PathBuf::from(plain.settings_file), memory)
    }

    fn read_from(file: PathBuf, memory: PathBuf) -> Tuner {
        let (texts, file_wrong) = read_texts(&file);
        // One that cannot be read does no harm: the Node tells it again.
        let remembered = read_bounded(&memory, MEMORY_BYTES_MAX).ok().flatten();
        let said = remembered.as_deref().and_then(Overlay::from_memory).unwrap_or_default();
        let over = Overlay { file: texts, ..said };
        let layered = Layered::read(environment, &over);
        let known = Known { layered, pending: Vec::new(), wrong: Vec::new(), eni_config: None };
        let mut tuner =
            Tuner { file, memory, remembered, start: Overlay::default(), now: over.clone(), file_wrong, known };
        tuner.begin(over);
        tuner
    }

    // What the process starts with.
    fn begin(&mut self, over: Overlay) {
        self.known.layered = Layered::read(environment, &over);
        self.known.wrong = self.wrong(&self.known.layered);
        // A refusal would take the live ones with it for ever.
        self.start = if self.known.layered.refused { Overlay::default() } else { over.clone() };
        self.now = over;
    }

    /// Whether nothing is known of the Node from an earlier run.
    pub(super) fn is_first(&self) -> bool {
        self.remembered.is_none()
    }

    /// The Node as it is before anything has started.
    pub(super) fn begin_with(&mut self, node: &Node) {
        let over = said(node, &self.now);
        self.remember(&over);
        self.begin(over);
    }

    pub(super) fn known(&self) -> &Known {
        &self.known
    }

    fn wrong(&self, layered: &Layered) -> Vec<String> {
        let lines = self.file_wrong.iter().map(|line| format!("settings file {}: {line}", self.file.display()));
        lines.chain(layered.complaints.iter().map(ToString::to_string)).collect()
    }

    // Takes what the Node says and what the file holds now; whether anything is different.
    fn look(&mut self, node: Option<&Node>) -> bool {
        let mut over = self.now.clone();
        let mut named = self.known.eni_config.clone();
        if let Some(node) = node {
            over = said(node, &over);
            self.remember(&over);
            let Settings { eni_config_annotation, eni_config_label, .. } = &self.known.layered.settings;
            named = Some(node.eni_config(eni_config_annotation, eni_config_label).to_owned());
        }
        let (texts, file_wrong) = read_texts(&self.file);
        over.file = texts;
        if over == self.now && named == self.known.eni_config && file_wrong == self.file_wrong {
            return false;
        }
        (self.now, self.known.eni_config, self.file_wrong) = (over, named, file_wrong);
        self.settle();
        true
    }

    // Works out what counts now, and tells what is new.
    fn settle(&mut self) {
        let layered = Layered::read(environment, &self.start.with_live_of(&self.now));
        let wished = Layered::read(environment, &self.now);
        let wrong = self.wrong(&wished);
        for line in wrong.iter().filter(|line| !self.known.wrong.contains(line)) {
            log::warn!("{line}");
        }
        self.known.wrong = wrong;
        // Refused as a whole: what counts goes on to count.
        if !layered.refused && !wished.refused {
            for line in layered.differing(&self.known.layered) {
                log::info!("setting {line} ({}) counts from now on", layered.source(line.variable));
            }
            self.known.layered = layered;
        }
        let pending = wished.differing(&self.known.layered);
        for line in pending.iter().filter(|line| !self.known.pending.contains(line)) {
            log::warn!("setting {line} ({}) takes effect at the next start", wished.source(line.variable));
        }
        self.known.pending = pending;
    }

    fn remember(&mut self, over: &Overlay) {
        let said = over.to_memory();
        if self.remembered.as_ref() == Some(&said) {
            return;
        }
        match files::write(&self.memory, said.as_bytes()) {
            Ok(()) => self.remembered = Some(said),
            Err(error) => log::warn!("remember the node's settings: {error}"), // tried again when the Node changes
        }
    }
}

fn said(node: &Node, over: &Overlay) -> Overlay {
    Overlay {
        file: over.file.clone(),
        labels: Overlay::marks(&node.labels),
        annotations: Overlay::marks(&node.annotations),
    }
}

fn read_texts(file: &Path) -> (Texts, Vec<String>) {
    match read_bounded(file, FILE_BYTES_MAX) {
        Ok(Some(text)) => read_file(&text),
        Ok(None) => <_>::default(),
        Err(error) => (Texts::new(), vec![error.to_string()]),
    }
}

// `None`: there is none.
fn read_bounded(path: &Path, bytes_max: usize) -> Result<Option<String>> {
    let what = || format!("read {}", path.display());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(error).with_context(what),
    };
    let mut bytes = Vec::new();
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX);
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).with_context(what)?;
    if bytes.len() > bytes_max {
        return Err(Error::new(format!("more than {bytes_max} bytes")).context(what()));
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Keeps settings current on a thread of their own.
pub(super) fn start(
    mut tuner: Tuner,
    identity: Identity,
    board: Board,
    events: SyncSender<Event>,
    ended: &SyncSender<End>,
) -> Result<Notes> {
    let notes = Notes::default();
    let from = notes.clone();
    let mut tuned: Tunables = tunables(&tuner.known.layered.settings, &identity);
    spawn("settings", ended, move || {
        loop {
            let node = from.wait();
            if !tuner.look(node.as_ref()) {
                continue;
            }
            let settings = &tuner.known.layered.settings;
            logging::set_level(&settings.log_level);
            let wanted = tunables(settings, &identity);
            if wanted != tuned {
                tuned = wanted.clone();
                events.send(Event::Retuned(Box::new(wanted))).context("tell the core")?;
            }
            board.tell(tuner.known.clone());
        }
    })?;
    Ok(notes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::map::Map;
    use std::fs;

    fn texts(pairs: &[(&str, &str)]) -> Map<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn node(labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> Node {
        Node { labels: texts(labels), annotations: texts(annotations), ..Node::default() }
    }

    fn pending(tuner: &Tuner) -> Vec<String> {
        tuner.known.pending.iter().map(ToString::to_string).collect()
    }

    /// Runs with a folder of its own: the settings file and the memory in it.
    fn inside(name: &str, test: impl FnOnce(&Path, &Path)) {
        let folder = std::env::temp_dir().join(format!("enibox-tuning-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        test(&folder.join("settings.env"), &folder.join(MEMORY));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_the_node_says_counts_and_is_remembered() {
        inside("node", |file, memory| {
            let mut tuner = Tuner::read_from(file.to_owned(), memory.to_owned());
            assert!(tuner.is_first() && !tuner.look(None), "nothing is there");
            let said = node(&[("enibox.io/WARM_IP_TARGET", "3")], &[("enibox.io/MAX_ENI", "2"), ("other/KEY", "x")]);
            assert!(tuner.look(Some(&said)));
            let settings = &tuner.known.layered.settings;
            assert_eq!((settings.warm_ip_target, settings.max_eni), (3, None));
            assert_eq!(pending(&tuner), ["MAX_ENI=2"]);
            assert_eq!(tuner.known.eni_config.as_deref(), Some("default"));
            assert!(!tuner.look(Some(&said)), "nothing is new");

            let again = Tuner::read_from(file.to_owned(), memory.to_owned());
            assert!(!again.is_first());
            let settings = &again.known.layered.settings;
            assert_eq!((settings.warm_ip_target, settings.max_eni), (3, Some(2)));

            assert!(tuner.look(Some(&node(&[], &[]))));
            assert_eq!(tuner.known.layered.settings.warm_ip_target, 0);
            assert!(pending(&tuner).is_empty());
            assert!(
                !Tuner::read_from(file.to_owned(), memory.to_owned()).is_first(),
                "a Node without settings is known"
            );
        });
    }

    #[test]
    fn the_first_start_takes_the_node_whole() {
        inside("first", |file, memory| {
            let mut tuner = Tuner::read_from(file.to_owned(), memory.to_owned());
            tuner.begin_with(&node(&[], &[("enibox.io/MAX_ENI", "2")]));
            assert_eq!(tuner.known.layered.settings.max_eni, Some(2));
            assert!(!tuner.is_first() && pending(&tuner).is_empty());
        });
    }

    #[test]
    fn what_would_stop_the_start_is_refused_and_the_rest_goes_on() {
        inside("refused", |file, memory| {
            let bad = node(&[("enibox.io/ENABLE_PREFIX_DELEGATION", "true")], &[("enibox.io/WARM_IP_TARGET", "0")]);
            let mut tuner = Tuner::read_from(file.to_owned(), memory.to_owned());
            fs::write(file, "WARM_IP_TARGET=4\n").unwrap();
            assert!(tuner.look(None));
            assert!(tuner.look(Some(&bad)));
            assert_eq!(tuner.known.layered.settings.warm_ip_target, 4, "what counts goes on to count");
            assert!(
                tuner.known.wrong.iter().any(|line| line.contains("WARM_PREFIX_TARGET")),
                "{:?}",
                tuner.known.wrong
            );

            let mut tuner = Tuner::read_from(file.to_owned(), memory.to_owned());
            assert!(!tuner.known.layered.settings.prefix_delegation);
            let good = node(&[("enibox.io/ENABLE_PREFIX_DELEGATION", "true")], &[]);
            assert!(tuner.look(Some(&good)));
            assert_eq!(tuner.known.layered.settings.warm_ip_target, 4);
            assert_eq!(pending(&tuner), ["ENABLE_PREFIX_DELEGATION=true"]);
        });
    }

    #[test]
    fn a_file_comes_and_goes() {
        inside("file", |file, memory| {
            let mut tuner = Tuner::read_from(file.to_owned(), memory.to_owned());
            fs::write(file, "WARM_IP_TARGET=4\nnonsense\n").unwrap();
            assert!(tuner.look(None));
            assert_eq!(tuner.known.layered.settings.warm_ip_target, 4);
            assert!(tuner.known.wrong[0].contains("line 2"), "{:?}", tuner.known.wrong);
            assert!(!tuner.look(None));
            fs::write(file, vec![b'#'; FILE_BYTES_MAX + 1]).unwrap();
            assert!(tuner.look(None));
            assert_eq!(tuner.known.layered.settings.warm_ip_target, 0);
            assert!(tuner.known.wrong[0].contains("more than"), "{:?}", tuner.known.wrong);
            fs::remove_file(file).unwrap();
            assert!(tuner.look(None));
            assert!(tuner.known.wrong.is_empty());
        });
    }
}
