//! What the node's network should be, and what IMDS and EC2 say: from the daemon, or, when it is away, from the very core
//! that the daemon runs, started on the checkpoint and IMDS as at a restart. EC2 is only read.

use super::super::variables;
use crate::aws::{creds, ec2, imds};
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::ec2::{Call, Failure, Interface, Reply};
use crate::model::imds::{Answer, Eni, Identity, Query};
use crate::model::limits::{self, Limits};
use crate::model::map::Map;
use crate::model::net::Link;
use crate::model::settings::Settings;
use crate::model::time::Now;
use crate::plan::configure;
use crate::plan::core::{Applied, Core, Effect, Event, Seen};
use crate::plan::doctor::{Finding, cloud};
use crate::plan::host::{Intent, Observation};
use serde_json::{Map as Object, Value};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Waiting for IMDS, all attempts of one question.
const IMDS_MAX: Duration = Duration::from_secs(1);
/// Waiting for EC2's one answer.
const EC2_MAX: Duration = Duration::from_secs(5);
/// Events that the core is given until it must know what it wants; a start takes about ten.
const EVENTS_MAX: usize = 200;
/// The core's time goes on by this much when it has nothing to do, and by so much in all.
const TICK: Duration = Duration::from_secs(1);
const LATE: Duration = Duration::from_secs(10);
/// What IMDS tells of fifteen ENIs has some ten kilobytes.
const METADATA_BYTES_MAX: usize = 1 << 20;
/// A larger checkpoint is none: 737 pods take 200 KiB.
const CHECKPOINT_BYTES_MAX: usize = 64 << 20;

/// IMDS, and EC2 if it was asked.
pub(super) struct Cloud {
    imds: imds::Client,
    /// Who we are.
    pub(super) identity: Identity,
    /// What IMDS lists.
    enis: Vec<Eni>,
    /// It is silent, and that is what it told the daemon some time ago: addresses that pods got since are not in it.
    remembered: bool,
    /// What EC2 lists, or why it does not tell.
    listed: Option<std::result::Result<Vec<Interface>, Failure>>,
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn client() -> Result<imds::Client> {
    let mut config = imds::Config::from_env(variables());
    config.limits.operation = IMDS_MAX;
    config.limits.pause = IMDS_MAX / 5;
    imds::Client::new(config)
}

// What IMDS told the daemon since the node was started, beside the checkpoint; empty if there is nothing of use.
fn told_before(settings: &Settings) -> Object<String, Value> {
    let path = PathBuf::from(&settings.backing_store).with_file_name("imds.json");
    let text = super::super::read(&path, METADATA_BYTES_MAX).unwrap_or_default();
    let boot = super::super::read(Path::new("/proc/sys/kernel/random/boot_id"), METADATA_BYTES_MAX);
    let mut kept: Value = serde_json::from_slice(text.as_bytes()).unwrap_or_default();
    match kept["told"].take() {
        Value::Object(told) if boot.is_ok_and(|boot| kept["boot"] == boot.trim()) => told,
        _ => Object::new(),
    }
}

impl Cloud {
    /// While IMDS is silent what it told the daemon has to do; `silent` is told why.
    pub(super) fn ask(
        settings: &Settings,
        links: &[Link],
        with_ec2: bool,
        silent: impl FnOnce(String),
    ) -> Result<Cloud> {
        let mut imds = client()?;
        let asked = imds.get("mac");
        let remembered = asked.is_err();
        if let Err(error) = asked {
            silent(error.to_string());
            imds = imds.remembering(told_before(settings));
        }
        let identity = imds.identity(configure::needs_v6(settings, links))?;
        let enis = match imds.query(&Query::Scan)? {
            Answer::Enis(enis) => enis,
            other => return Err(Error::new(format!("IMDS answered {other:?}"))),
        };
        let mut cloud = Cloud { imds, identity, enis, remembered, listed: None };
        if with_ec2 && !settings.imds_only {
            let chain = Arc::new(creds::Chain::from_env(env, Arc::new(client()?))?);
            let config = ec2::Config::from_env(variables(), &cloud.identity.region);
            let config = ec2::Config { http_timeout: EC2_MAX, max_attempts: 1, ..config };
            let client = ec2::Client::new(config, chain)?;
            let call = Call::DescribeAttached(cloud.identity.instance.clone());
            cloud.listed = Some(client.execute(&call).map(|reply| match reply {
                Reply::Interfaces(interfaces) => interfaces,
                _ => Vec::new(),
            }));
        }
        Ok(cloud)
    }

    /// What differs.
    pub(super) fn findings(&self, intent: &Intent) -> Vec<Finding> {
        let imds = (!self.remembered).then_some(self.enis.as_slice());
        let mut found = cloud::findings(intent, &self.identity, imds, self.told_by_ec2());
        if let Some(Err(failure)) = &self.listed {
            let name = if failure.code == "UnauthorizedOperation" { "ec2-refused" } else { "ec2-unasked" };
            found.push(Finding::new(name, "", format!("{}: {} {}", failure.action, failure.code, failure.message)));
        }
        found
    }

    // What EC2 lists, if that is this node.
    fn told_by_ec2(&self) -> Option<&[Interface]> {
        let listed = self.listed.as_ref()?.as_ref().ok()?;
        listed.iter().any(|eni| eni.id == self.identity.primary_eni).then_some(listed.as_slice())
    }

    /// Whether EC2 lists a trunk ENI on the instance.
    pub(super) fn has_trunk(&self) -> bool {
        let listed = self.listed.iter().flatten().flatten();
        listed.into_iter().any(|eni| eni.interface_type == "trunk")
    }

    /// What the instance can carry: by the table, or as EC2 told the daemon, which keeps it beside the checkpoint.
    pub(super) fn limits(&self, settings: &Settings) -> Option<Limits> {
        let kind = self.identity.instance_type.as_str();
        let path = PathBuf::from(&settings.backing_store).with_file_name("instance-type.json");
        limits::of(kind).or_else(|| {
            let kept = super::super::read(&path, METADATA_BYTES_MAX).ok()?;
            limits::from_ec2(&limits::from_json(&kept, kind)?)
        })
    }

    // What the daemon would want, were it started now.
    fn intent(&self, settings: &Settings, seen: &Observation) -> Result<(Intent, Vec<Finding>)> {
        let limits = self.limits(settings).unwrap_or_else(|| limits::unknown(&self.identity.instance_type));
        let valid = settings.validate(&limits).map_err(Error::new).context("settings")?;
        let config = configure::config(settings, &valid, &limits, &self.identity, 0);
        let mut checkpoints = Map::new();
        for card in config.cards.keys() {
            let path = store_of(&settings.backing_store, *card);
            match super::super::read(&path, CHECKPOINT_BYTES_MAX) {
                Ok(text) => drop(checkpoints.insert(*card, text)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("read checkpoint {}", path.display())),
            }
        }
        let seen = Seen::of(&seen.links, &seen.routes, &seen.rules);
        let mut core = Core::new(config);
        let mut events = VecDeque::from([Event::Started { checkpoints, seen, spool: Vec::new() }]);
        let (start, mut late) = (clock::now(), Duration::ZERO);
        for _ in 0..EVENTS_MAX {
            let event = match events.pop_front() {
                Some(event) => event,
                // An EC2 that does not answer is waited for before what it told earlier counts.
                None if late < LATE => {
                    late += TICK;
                    Event::Tick
                }
                None => break,
            };
            for effect in core.step(Now { mono: start.mono.plus(late), ..start }, event) {
                events.extend(self.answer(effect));
            }
        }
        let intent = core.intent(Duration::ZERO);
        let intent = intent.ok_or_else(|| Error::new("IMDS does not tell the VPC's CIDRs or the primary ENI"))?;
        // Pods whose address is nowhere are not in it. What IMDS told earlier does not say where a newer one is.
        let known = !self.remembered || self.told_by_ec2().is_some();
        let homeless = core.pool().allocations().filter(|held| known && held.table.is_none());
        let found = homeless.map(|held| {
            let text = format!("{} is on no ENI that is listed", held.address);
            Finding::new("address-lost", held.owner.pod.to_string(), text)
        });
        Ok((intent, found.collect()))
    }

    // Questions are answered; nothing is done.
    fn answer(&self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Imds(op, Query::Scan) => Some(Event::Imds(op, Ok(Answer::Enis(self.enis.clone())))),
            Effect::Imds(op, query) => {
                Some(Event::Imds(op, self.imds.query(&query).map_err(|error| error.to_string())))
            }
            Effect::Ec2(op, call) => {
                let listed = self.listed.clone().filter(|_| matches!(call, Call::DescribeAttached(_)));
                Some(Event::Ec2(op, listed.map_or_else(|| Err(unasked(&call)), |told| told.map(Reply::Interfaces))))
            }
            // The host is as wanted, so that the core goes on and knows every pod's place.
            Effect::Kernel(op, _) => Some(Event::Kernel(op, Ok(Applied::default()))),
            _ => None,
        }
    }
}

fn unasked(call: &Call) -> Failure {
    Failure {
        action: call.action(),
        code: String::new(),
        message: "not asked".into(),
        status: 0,
        request_id: String::new(),
        maybe_applied: false,
    }
}

/// The checkpoint of a network card: where the daemon has it, whatever the root of the host's files is.
pub(super) fn store_of(store: &str, card: u32) -> PathBuf {
    let store = PathBuf::from(store);
    if card == 0 {
        return store;
    }
    let name = store.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = name.strip_suffix(".json").unwrap_or(&name);
    store.with_file_name(format!("{stem}-nic-{card}.json"))
}

/// The intent of a daemon that is away, and what it would find wrong.
pub(super) fn without_daemon(cloud: &Cloud, settings: &Settings, seen: &Observation) -> Result<(Intent, Vec<Finding>)> {
    cloud.intent(settings, seen).context("work out what the daemon wants")
}
