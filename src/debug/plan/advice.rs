//! What would run short, and which settings would do better.
//!
//! A setting is recommended only after it has been run like the one in question, with every pod served and no ADD refused,
//! and only with its figures beside those of the one in question.

use super::trial::{HOST_PODS, Story};
use super::{Question, seconds};
use crate::model::settings::Mode;
use crate::sim::vpc::RESERVED;

/// Less waiting than this is not worth a word, in milliseconds.
const WAIT_MS: u32 = 500;

/// What the operator should know.
pub(super) fn warnings(question: &Question, story: &Story) -> Vec<String> {
    let mut told = question.notes.clone();
    let scene = &question.scene;
    let (fit, asked) = (scene.max_pods.saturating_sub(HOST_PODS), question.asked_most());
    if asked > fit {
        told.push(format!(
            "max-pods: {asked} pods are asked for, and the kubelet takes {fit} beside the {HOST_PODS} on the host's \
             network; the others are not placed on this node"
        ));
    }
    let unserved = story.stages.iter().max_by_key(|stage| stage.unserved).filter(|stage| stage.unserved > 0);
    if let Some(stage) = unserved {
        let cause = if stage.cause.is_empty() { "their time was too short" } else { stage.cause.as_str() };
        told.push(format!("{} pods get no address: {cause}", stage.unserved));
    }
    let refused = story.stages.iter().map(|stage| stage.refused).sum::<u64>();
    let slowest = story.stages.iter().map(|stage| stage.last_ms).max().unwrap_or(0);
    if refused > 0 && unserved.is_none() {
        told.push(format!(
            "{refused} ADDs are refused after ENIBOX_ADD_WAIT={} s and repeated by the kubelet; the last pod waits {:.1} s",
            scene.settings.add_wait_s,
            seconds(slowest.into()),
        ));
    }
    let (at, most) = story.most();
    if unserved.is_none() && question.mode != Mode::Ipv6Prefixes && story.stages.get(at).is_some() {
        if most.free == 0 {
            told.push(format!("with {} pods no address is left: {} ENIs are attached", most.pods, most.enis));
        } else if most.enis >= u64::from(question.enis_max) {
            told.push(format!(
                "with {} pods all {} ENIs are attached, {} addresses are free",
                most.pods, most.enis, most.free
            ));
        }
    }
    subnet(question, story, &mut told);
    if let Some((replaced, stage)) = &story.churn {
        let why = format!("a freed address rests for {} s", scene.settings.ip_cooldown_s);
        let slowest = seconds(stage.last_ms.into());
        if stage.refused > 0 || stage.unserved > 0 {
            told.push(format!(
                "replacing {replaced} of {} pods at once runs out of addresses, since {why}: {} ADDs are refused, the \
                 last pod waits {slowest:.1} s",
                most.pods, stage.refused
            ));
        } else if stage.last_ms > WAIT_MS {
            told.push(format!(
                "replacing {replaced} of {} pods at once makes pods wait up to {slowest:.1} s: {why}",
                most.pods
            ));
        }
    }
    told
}

fn subnet(question: &Question, story: &Story, told: &mut Vec<String>) {
    if !question.subnet_told || question.mode == Mode::Ipv6Prefixes {
        return;
    }
    let bits = question.scene.subnet_bits;
    let room = (1_u64 << (32 - u32::from(bits))).saturating_sub(RESERVED.into());
    // With custom networking the primary ENI is in another subnet.
    let elsewhere = u64::from(question.scene.settings.custom_networking);
    let most = story.peak.taken.saturating_sub(elsewhere).max(1);
    let idle = story.idle.taken.saturating_sub(elsewhere).max(1);
    told.push(format!(
        "subnet: a /{bits} has {room} addresses; that is room for {} such nodes at peak ({most} addresses each) and {} \
         idle ones ({idle} each)",
        room / most,
        room / idle,
    ));
}

/// A run in short.
struct Score {
    fine: bool,
    pods: u64,
    wait_ms: u32,
    idle: u64,
    taken: u64,
    calls: u64,
}

fn score(story: &Story, asked: u32) -> Score {
    let pods = story.stages.iter().map(|stage| stage.held.pods).max().unwrap_or(0);
    let stages = || story.stages.iter().chain(story.churn.iter().map(|(_, stage)| stage));
    Score {
        fine: pods >= u64::from(asked) && stages().all(|stage| stage.unserved == 0 && stage.refused == 0),
        pods,
        wait_ms: stages().map(|stage| stage.last_ms).max().unwrap_or(0),
        idle: story.idle.taken,
        taken: story.most().1.taken,
        calls: story.calls.values().sum(),
    }
}

// What may be tried: more of the same kind, exact figures for the load, prefixes.
fn candidates(question: &Question) -> Vec<Vec<(&'static str, String)>> {
    let pods = question.asked_most();
    let (warm, minimum) = ("WARM_IP_TARGET", "MINIMUM_IP_TARGET");
    let few = pods.div_ceil(10).max(2);
    let mut tries = vec![
        vec![(warm, "1".to_owned()), (minimum, pods.to_string())],
        vec![(warm, few.to_string()), (minimum, pods.saturating_add(few).to_string())],
        vec![(warm, few.to_string()), (minimum, pods.div_ceil(2).max(few).to_string())],
        vec![(warm, "2".to_owned()), (minimum, "0".to_owned())],
        vec![(warm, few.to_string()), (minimum, "0".to_owned())],
    ];
    let prefixes = || ("ENABLE_PREFIX_DELEGATION", "true".to_owned());
    let none = |variable| (variable, "0".to_owned());
    let able = question.scene.limits.takes_prefixes();
    if able {
        for targets in &tries.clone()[..2] {
            let mut with = targets.clone();
            with.push(prefixes());
            tries.push(with);
        }
        tries.push(vec![prefixes(), ("WARM_PREFIX_TARGET", "1".to_owned()), none(warm), none(minimum)]);
    } else {
        tries.push(vec![("WARM_ENI_TARGET", "1".to_owned()), none(warm), none(minimum)]);
    }
    if question.scene.settings.max_eni.is_some() {
        tries.push(vec![("MAX_ENI", "0".to_owned())]);
    }
    tries
}

/// Sentences about settings that do better, with the figures.
pub(super) fn advice(question: &Question, story: &Story) -> Result<Vec<String>, String> {
    let asked = question.asked_most();
    let settings = &question.scene.settings;
    if question.mode == Mode::Ipv6Prefixes || asked == 0 || settings.read_only() {
        return Ok(Vec::new()); // there is nothing to size
    }
    let mine = score(story, asked);
    let mut tried = Vec::new();
    for changes in candidates(question) {
        let other = question.with(&changes)?;
        let changes: Vec<_> = changes.into_iter().filter(|(name, value)| differs(question, name, value)).collect();
        if changes.is_empty() {
            continue;
        }
        let score = score(&other.scene.run(&other.steps(), !other.curve, true)?, asked);
        if score.fine {
            tried.push((changes, other.scene.max_pods, score));
        }
    }
    let mut told = Vec::new();
    let patient = mine.wait_ms.max(WAIT_MS);
    let mut tell = |reason: &str, (changes, max_pods, score): &(Vec<(&str, String)>, u32, Score)| {
        let sets: Vec<String> = changes.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let kubelet = if *max_pods == question.scene.max_pods {
            String::new()
        } else {
            format!(" with the kubelet's max-pods at {max_pods}")
        };
        told.push(format!(
            "{}{kubelet} {reason}: with {} pods (now {}) {} addresses of the subnets are taken (now {}), idle {} (now \
             {}); the slowest pod start takes {:.1} s (now {:.1} s); {} EC2 calls (now {})",
            sets.join(" "),
            score.pods,
            mine.pods,
            score.taken,
            mine.taken,
            score.idle,
            mine.idle,
            seconds(score.wait_ms.into()),
            seconds(mine.wait_ms.into()),
            score.calls,
            mine.calls,
        ));
    };
    let fastest =
        tried.iter().min_by_key(|(_, _, score)| (score.wait_ms / WAIT_MS, score.taken, score.idle, score.calls));
    if !mine.fine {
        if let Some(best) = fastest {
            tell("serves all pods and refuses no ADD, also when a tenth of them is replaced at once", best);
        }
    } else if let Some(best) = fastest.filter(|(_, _, score)| score.wait_ms + WAIT_MS <= mine.wait_ms) {
        tell("lets pods wait less", best);
    }
    if mine.fine {
        let thrifty = tried.iter().filter(|(_, _, score)| score.wait_ms <= patient && score.idle <= mine.idle);
        let best = thrifty.min_by_key(|(_, _, score)| (score.taken, score.idle, score.calls));
        if let Some(best) = best.filter(|(_, _, score)| score.taken + mine.taken.div_ceil(10) <= mine.taken) {
            tell("holds fewer addresses", best);
        }
    }
    if told.is_empty() {
        told.push(match tried.len() {
            0 => "none of the other settings that were tried serves these pods without a refused ADD".to_owned(),
            count => format!("of {count} other settings that serve these pods none does clearly better"),
        });
    }
    Ok(told)
}

// Whether the value is another one than what counts now.
fn differs(question: &Question, name: &str, value: &str) -> bool {
    let now = question.scene.settings.effective().find(|line| line.variable == name).and_then(|line| line.value);
    now.as_deref().unwrap_or("0") != value
}
