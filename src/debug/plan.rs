//! `enibox plan`: what a node of some type will hold with some settings and pods, what it costs, and what would do better.
//!
//! Nothing is worked out by formulas that could differ from the daemon's: the real core runs in virtual time against the
//! model of EC2 ([`trial`]), and each setting that is recommended has been run in the same way ([`advice`]). Nothing
//! outside is asked or changed.

mod advice;
mod trial;

use super::{complain, print, read};
use crate::error::exit;
use crate::model::limits::{self, Limits};
use crate::model::map::Map;
use crate::model::settings::{Mode, Settings};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{Read as _, stdin};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use trial::{DELAYS, HOST_PODS, Held, IMDS, Scene, Story, mode_name};

/// Kubelets are not run with more pods than this (`--max-pods`).
const PODS_MAX: u32 = 1000;
/// Lines of a curve, and its length: a day.
const CURVE_LINES_MAX: usize = 1000;
const CURVE_SECONDS_MAX: u64 = 86_400;
/// A larger file is no curve.
const CURVE_BYTES_MAX: usize = 64 << 10;
/// EC2 that takes longer is not planned for.
const DELAY_SECONDS_MAX: f64 = 600.0;

/// What to plan.
#[derive(clap::Args, Debug, Clone, Default)]
pub struct Args {
    /// Instance type of the node
    #[arg(long, value_name = "TYPE")]
    instance_type: String,
    /// Pods that want an address, all asked at once [default: as many as fit]
    #[arg(long, conflicts_with = "curve")]
    pods: Option<u32>,
    /// File with lines "SECONDS PODS": how the number of pods changes; - reads standard input
    #[arg(long, value_name = "FILE")]
    curve: Option<PathBuf>,
    /// A setting of the daemon, may be repeated
    #[arg(long, value_name = "VAR=VALUE")]
    set: Vec<String>,
    /// Seconds that EC2 takes: create=1.0,attach=3.0,...
    #[arg(long, value_name = "NAME=SECONDS", value_delimiter = ',')]
    ec2_delays: Vec<String>,
    /// The kubelet's --max-pods [default: by convention]
    #[arg(long)]
    max_pods: Option<u32>,
    /// Prefix length of the subnet for pods, 16 to 28 [default: more than enough room]
    #[arg(long, value_name = "BITS")]
    subnet_size: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The question, understood.
#[derive(Clone, Debug)]
struct Question {
    scene: Scene,
    mode: Mode,
    /// ENIs that the node may have, on all cards that are managed.
    enis_max: u32,
    /// The settings by which it differs from the defaults.
    set: Map<String, String>,
    /// Pods as they were asked for.
    asked: Vec<(u64, u32)>,
    curve: bool,
    subnet_told: bool,
    max_pods_told: Option<u32>,
    notes: Vec<String>,
}

/// The answer of the simulation.
struct Answer {
    story: Story,
    ready: Option<Duration>,
}

impl Question {
    // Of the pods that are asked for, those that the kubelet takes beside the host's own.
    fn steps(&self) -> Vec<(u64, usize)> {
        let most = self.scene.max_pods.saturating_sub(HOST_PODS);
        self.asked.iter().map(|(at, pods)| (*at, (*pods).min(most) as usize)).collect()
    }

    fn asked_most(&self) -> u32 {
        self.asked.iter().map(|(_, pods)| *pods).max().unwrap_or(0)
    }

    fn answer(&self) -> Result<Answer, String> {
        let story = self.scene.run(&self.steps(), !self.curve, false)?;
        Ok(Answer { ready: self.scene.ready()?, story })
    }

    // The same question with other settings.
    fn with(&self, changes: &[(&str, String)]) -> Result<Question, String> {
        let mut set = self.set.clone();
        for (variable, value) in changes {
            set.insert((*variable).to_owned(), value.clone());
        }
        let mut other = question(&self.scene.kind, &self.scene.limits, set, self.max_pods_told)?;
        other.scene.delays.clone_from(&self.scene.delays);
        other.scene.subnet_bits = self.scene.subnet_bits;
        other.asked.clone_from(&self.asked);
        (other.curve, other.subnet_told) = (self.curve, self.subnet_told);
        Ok(other)
    }
}

impl Story {
    /// The change that leaves most pods; with none, the idle node.
    fn most(&self) -> (usize, Held) {
        let most = self.stages.iter().enumerate().max_by_key(|(at, stage)| (stage.held.pods, usize::MAX - at));
        most.map_or((0, self.idle), |(at, stage)| (at, stage.held))
    }
}

fn settings(words: &[String]) -> Result<Map<String, String>, String> {
    let mut set = Map::new();
    for word in words {
        let (name, value) = word.split_once('=').ok_or_else(|| format!("--set {word}: not VAR=VALUE"))?;
        if Settings::docs().all(|doc| doc.variable != name) {
            return Err(format!("--set {word}: there is no such setting; `enibox config` lists them"));
        }
        set.insert(name.to_owned(), value.to_owned());
    }
    Ok(set)
}

fn delays(words: &[String]) -> Result<Map<&'static str, u64>, String> {
    let mut delays = Map::from([IMDS]);
    for (name, _, millis) in DELAYS {
        delays.insert(name, millis);
    }
    for word in words {
        let (name, seconds) = word.split_once('=').ok_or_else(|| format!("--ec2-delays {word}: not NAME=SECONDS"))?;
        let known = DELAYS.iter().find(|(short, action, _)| [*short, *action].contains(&name)).map(|row| row.0);
        let Some(name) = known.or((name == IMDS.0).then_some(IMDS.0)) else {
            let names: Vec<&str> = DELAYS.iter().map(|row| row.0).chain([IMDS.0]).collect();
            return Err(format!("--ec2-delays {word}: no such action; allowed are {}", names.join(", ")));
        };
        let seconds = seconds.parse::<f64>().ok().filter(|s| (0.0..=DELAY_SECONDS_MAX).contains(s));
        let seconds = seconds
            .ok_or_else(|| format!("--ec2-delays {word}: seconds from 0 to {DELAY_SECONDS_MAX}, such as 1.5"))?;
        let millis = Duration::from_secs_f64(seconds).as_millis();
        delays.insert(name, u64::try_from(millis).unwrap_or(u64::MAX));
    }
    Ok(delays)
}

fn curve(text: &str, name: &str) -> Result<Vec<(u64, u32)>, String> {
    let mut steps: Vec<(u64, u32)> = Vec::new();
    for (number, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line.trim())) {
        let wrong = |what: &str| Err(format!("--curve {name}, line {number}: {line:?}: {what}"));
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split_ascii_whitespace();
        let [Some(seconds), Some(pods), None] = [words.next(), words.next(), words.next()] else {
            return wrong("not \"SECONDS PODS\"");
        };
        let Some(seconds) = seconds.parse().ok().filter(|seconds| *seconds <= CURVE_SECONDS_MAX) else {
            return wrong(&format!("seconds must be a whole number from 0 to {CURVE_SECONDS_MAX}"));
        };
        let Some(pods) = pods.parse().ok().filter(|pods| *pods <= PODS_MAX) else {
            return wrong(&format!("pods must be a whole number from 0 to {PODS_MAX}"));
        };
        if steps.last().is_some_and(|(last, _)| *last >= seconds) {
            return wrong("seconds must grow from line to line");
        }
        if steps.len() == CURVE_LINES_MAX {
            return wrong(&format!("more than {CURVE_LINES_MAX} lines"));
        }
        steps.push((seconds, pods));
    }
    if steps.is_empty() {
        return Err(format!("--curve {name}: no line \"SECONDS PODS\""));
    }
    Ok(steps)
}

fn curve_of(path: &Path) -> Result<Vec<(u64, u32)>, String> {
    let name = path.display().to_string();
    let text = if name == "-" {
        let mut text = String::new();
        let read = stdin().take(CURVE_BYTES_MAX as u64 + 1).read_to_string(&mut text);
        read.map(|_| text)
    } else {
        read(path, CURVE_BYTES_MAX + 1)
    };
    let text = text.map_err(|error| format!("--curve {name}: {error}"))?;
    if text.len() > CURVE_BYTES_MAX {
        return Err(format!("--curve {name}: more than {CURVE_BYTES_MAX} bytes"));
    }
    curve(&text, &name)
}

// The node and its settings, with nothing said yet about pods and conditions.
fn question(
    kind: &str,
    limits: &Limits,
    set: Map<String, String>,
    max_pods_told: Option<u32>,
) -> Result<Question, String> {
    let (settings, complaints) = Settings::parse(|name| set.get(name).cloned());
    if let Some(complaint) = complaints.first() {
        return Err(format!("--set: {complaint}"));
    }
    let valid = settings.validate(limits).map_err(|error| format!("--set: {error}"))?;
    let mut notes = valid.warnings.clone();
    for doc in Settings::docs().filter(|doc| doc.not_yet && set.contains_key(doc.variable)) {
        notes.push(format!("{} has no effect in this version", doc.variable));
    }
    let managed = if settings.multi_nic { valid.enis_per_card.len() } else { 1 };
    let enis_max = valid.enis_per_card.iter().take(managed).sum();
    let mut scene = Scene {
        kind: kind.to_owned(),
        limits: limits.clone(),
        settings: Rc::new(settings),
        max_pods: 0,
        delays: Map::new(),
        subnet_bits: 16,
    };
    // Limits under MAX_ENI.
    let capped = Limits { enis: valid.enis_per_card.first().copied().unwrap_or(0).min(limits.enis), ..limits.clone() };
    let reserved = u32::from(scene.settings.custom_networking) + u32::from(scene.trunk());
    scene.max_pods = max_pods_told.unwrap_or_else(|| match valid.mode {
        Mode::Ipv6Prefixes => limits.kubelet_pods,
        mode => capped.max_pods_with(reserved, mode == Mode::Ipv4Prefixes),
    });
    let (asked, curve, subnet_told) = (Vec::new(), false, false);
    Ok(Question { scene, mode: valid.mode, enis_max, set, asked, curve, subnet_told, max_pods_told, notes })
}

fn understand(args: &Args) -> Result<Question, String> {
    let kind = args.instance_type.trim();
    let limits = limits::of(kind).ok_or_else(|| {
        let like = limits::like(kind, 5);
        let like = if like.is_empty() { String::new() } else { format!("; near it are {}", like.join(", ")) };
        format!("--instance-type {kind:?}: no such type is known{like}")
    })?;
    if args.max_pods.is_some_and(|pods| !(1..=PODS_MAX).contains(&pods)) {
        return Err(format!("--max-pods: from 1 to {PODS_MAX}"));
    }
    if args.pods.is_some_and(|pods| pods > PODS_MAX) {
        return Err(format!("--pods: from 0 to {PODS_MAX}"));
    }
    let mut question = question(kind, &limits, settings(&args.set)?, args.max_pods)?;
    question.scene.delays = delays(&args.ec2_delays)?;
    if let Some(size) = &args.subnet_size {
        let bits = size.trim_start_matches('/').parse().ok().filter(|bits| (16..=28).contains(bits));
        let bits = bits.ok_or_else(|| format!("--subnet-size {size}: a prefix length from 16 to 28, such as 24"))?;
        (question.scene.subnet_bits, question.subnet_told) = (bits, true);
    }
    if let Some(path) = &args.curve {
        (question.asked, question.curve) = (curve_of(path)?, true);
    } else {
        let fit = question.scene.max_pods.saturating_sub(HOST_PODS).min(PODS_MAX);
        question.asked = vec![(0, args.pods.unwrap_or(fit))];
    }
    Ok(question)
}

/// Runs the subcommand; the exit code.
pub fn run(args: &Args) -> u8 {
    match understand(args).and_then(|question| report(&question, args.json)) {
        Ok(text) => print(&text),
        Err(error) => {
            complain(&error);
            exit::USAGE
        }
    }
}

fn report(question: &Question, as_json: bool) -> Result<String, String> {
    let answer = question.answer()?;
    let warnings = advice::warnings(question, &answer.story);
    let advice = advice::advice(question, &answer.story)?;
    Ok(if as_json {
        format!("{:#}\n", document(question, &answer, &warnings, &advice))
    } else {
        page(question, &answer, &warnings, &advice)
    })
}

fn seconds(millis: u128) -> f64 {
    // Whole milliseconds of at most days: exact.
    f64::from(u32::try_from(millis).unwrap_or(u32::MAX)) / 1000.0
}

fn document(question: &Question, answer: &Answer, warnings: &[String], advice: &[String]) -> Value {
    let story = &answer.story;
    let at = |held: &Held| {
        json!({
            "pods": held.pods, "enis": held.enis, "addresses": held.addresses, "prefixes": held.prefixes,
            "free": held.free,
        })
    };
    let held = |held: &Held| json!({"enis": held.enis, "addresses": held.addresses, "prefixes": held.prefixes});
    let (most, at_most) = story.most();
    let stage = story.stages.get(most);
    let mut document = json!({
        "instance_type": question.scene.kind, "max_pods": question.scene.max_pods, "enis_max": question.enis_max,
        "mode": mode_name(question.mode), "idle": held(&story.idle), "at": at(&at_most), "ec2_calls": story.calls,
        "ready_s": answer.ready.map(|ready| seconds(ready.as_millis())),
        "pods_s": stage.map(|stage| seconds(stage.last_ms.into())),
        "adds_refused": story.stages.iter().map(|stage| stage.refused).sum::<u64>(),
        "pods_asked": question.asked_most(),
        "peak": held(&story.peak),
        "subnet_addresses": {"idle": story.idle.taken, "at": at_most.taken, "peak": story.peak.taken},
        "warnings": warnings, "advice": advice,
    });
    if question.curve {
        document["curve"] = story.stages.iter().map(|stage| at(&stage.held)).collect();
    }
    document
}

fn page(question: &Question, answer: &Answer, warnings: &[String], advice: &[String]) -> String {
    let (scene, story) = (&question.scene, &answer.story);
    let mut page = String::new();
    let mut line = |name: &str, what: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(page, "{name:<12}{what}");
    };
    let slots = scene.limits.slots_per_eni();
    let each = if question.mode == Mode::Ipv4Addresses { "addresses" } else { "prefixes" };
    let enis = question.enis_max;
    line("node", &format!("{}, {}: {enis} ENIs with {slots} {each} each", scene.kind, mode_name(question.mode)));
    let fit = scene.max_pods.saturating_sub(HOST_PODS);
    line("max-pods", &format!("{}: {fit} with an address, {HOST_PODS} on the host's network", scene.max_pods));
    line("idle", &figures(&story.idle));
    for ((at, _), stage) in question.asked.iter().zip(&story.stages) {
        let pods = format!("{} pods", stage.held.pods);
        let when = if question.curve { format!("from {at} s: {pods}, ") } else { format!("{pods}: ") };
        let free = format!("{when}{}; {} free", figures(&stage.held), stage.held.free);
        let waited = format!("the last new pod had its network after {:.1} s", seconds(stage.last_ms.into()));
        let refused = match stage.refused {
            0 => String::new(),
            refused => format!(", {refused} ADDs were refused and repeated"),
        };
        let slowest = if stage.last_ms > 0 { format!("; {waited}{refused}") } else { refused };
        line("at", &format!("{free}{slowest}"));
    }
    line("peak", &figures(&story.peak));
    let calls: Vec<String> = story.calls.iter().map(|(action, count)| format!("{action} {count}")).collect();
    line("EC2 calls", &format!("{}: {}", story.calls.values().sum::<u64>(), calls.join(", ")));
    match answer.ready {
        Some(ready) => line("ready", &format!("first pod served {:.1} s after the start", ready.as_secs_f64())),
        None => line("ready", "no pod is served"),
    }
    for warning in warnings {
        line("warning", warning);
    }
    for advice in advice {
        line("advice", advice);
    }
    page
}

fn figures(held: &Held) -> String {
    let prefixes = match held.prefixes {
        0 => String::new(),
        1 => " in 1 prefix".to_owned(),
        prefixes => format!(" in {prefixes} prefixes"),
    };
    let enis = if held.enis == 1 { "1 ENI".to_owned() } else { format!("{} ENIs", held.enis) };
    format!("{enis}, {} addresses for pods{prefixes}, {} taken from the subnets", held.addresses, held.taken)
}

#[cfg(test)]
mod tests;
