//! The host plan on the kernel (`spec/dataplane.md` 24, 29).

use super::{Host, netfilter};
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::ids::EniId;
use crate::model::map::Map;
use crate::model::naming::{self, NFT_TABLE};
use crate::model::net::{Address, Family, Route};
use crate::model::nft::Table;
use crate::model::order::Gather as _;
use crate::netlink::{KernelError, Outcome, Request, addr, link, nft, route, rule, sysctl};
use crate::plan::host::{Action, HostEni, Intent, Observation, Plan, Step, What, diff};
use crate::plan::ruleset;
use std::time::Duration;

/// Looks at the node in one call: deleting an address takes routes and other addresses with it, and a VLAN device that was made
/// has none yet, which the second look finds; there is nothing that a third one could.
const PASSES: usize = 2;
/// How long tables are left alone that the kernel took but shows differently (`spec/dataplane.md` 24.4).
const STUCK: Duration = Duration::from_mins(10);

/// What became of a host plan.
#[derive(Debug, Default)]
pub struct HostReport {
    /// Name of the primary ENI's link.
    pub primary: String,
    /// Its index.
    pub primary_index: u32,
    /// Every ENI of the intent: set up, or why not.
    pub enis: Map<EniId, Result<()>>,
    /// Indexes of the links of trunk ENIs.
    pub trunks: Map<EniId, u32>,
    /// What was done; empty when all was right.
    pub steps: Vec<Step>,
    /// What failed and concerns the node rather than one ENI.
    pub errors: Vec<Error>,
    /// What failed and keeps nothing from working: sysctls, which an unprivileged container cannot write.
    pub warnings: Vec<Error>,
    /// The node as it was before the last of these steps.
    pub seen: Observation,
}

/// What may strike steps out of a plan before it is carried out.
pub type Censor<'a> = &'a mut dyn FnMut(&Observation, &mut Plan);

/// Refused steps: those of the node, and those of ENIs.
#[derive(Default)]
pub(super) struct Refused {
    pub(super) node: Vec<Error>,
    warnings: Vec<Error>,
    enis: Map<EniId, Error>,
}

impl Refused {
    fn note(&mut self, step: &Step, error: Error) {
        match &step.eni {
            Some(eni) => drop(self.enis.entry(eni.clone()).or_insert(error)),
            None => self.node.push(error),
        }
    }

    fn covers(&self, step: &Step) -> bool {
        match &step.eni {
            Some(eni) => self.enis.contains_key(eni),
            None => !self.node.is_empty(),
        }
    }
}

impl Host {
    /// Makes the host's network what `intent` says. An error when it cannot be looked at or planned; what the kernel refuses
    /// is told in the report, and does not stop the rest.
    pub fn host(&mut self, intent: &Intent) -> Result<HostReport> {
        self.host_with(intent, &mut |_, _| {})
    }

    /// The same without the steps that `censor` strikes out.
    pub fn host_with(&mut self, intent: &Intent, censor: Censor<'_>) -> Result<HostReport> {
        let mut report = HostReport::default();
        for _ in 0..PASSES {
            let seen = self.observe_for(intent)?;
            let mut plan = diff(intent, &seen)?;
            censor(&seen, &mut plan);
            (report.primary_index, report.primary) = plan.primary;
            let refused = self.carry_out(&plan.steps, &mut report.steps)?;
            let mut failed = refused.enis;
            failed.extend(plan.failed.into_iter().map(|(eni, why)| (eni, Error::new(why))));
            report.enis =
                intent.enis.iter().map(|eni| (eni.id.clone(), failed.remove(&eni.id).map_or(Ok(()), Err))).gather();
            report.errors = refused.node;
            report.warnings = refused.warnings;
            let link = |eni: &HostEni| seen.links.iter().find(|link| link.mac == Some(eni.mac)).map(|link| link.index);
            let trunks = intent.enis.iter().filter(|eni| eni.trunk);
            report.trunks = trunks.filter_map(|eni| Some((eni.id.clone(), link(eni)?))).gather();
            report.seen = seen;
            if !plan.steps.iter().any(|step| matches!(step.action, Action::DeleteAddress(_) | Action::AddVlan(..))) {
                break;
            }
        }
        Ok(report)
    }

    pub(super) fn carry_out(&mut self, steps: &[Step], done: &mut Vec<Step>) -> Result<Refused> {
        let mut refused = Refused::default();
        let (deletes, adds) = steps.iter().partition::<Vec<_>, _>(|step| {
            matches!(step.action, Action::DeleteAddress(_) | Action::DeleteRoute(_) | Action::DeleteRule(_))
        });
        for tables in [false, true] {
            // A link on which IPv6 is off takes no address, so sysctls come first.
            if tables {
                self.send(&adds, done, &mut refused)?;
            }
            for step in &adds {
                let outcome = match &step.action {
                    Action::SetTables(wanted) if tables => self.set_tables(wanted),
                    Action::AddVlan(eni, trunk) if !tables => self.lay_vlan(eni, *trunk).map(drop),
                    Action::SetSysctl(path, value) if !tables => {
                        self.inside(|| sysctl::set(path, value)).flatten().map(drop)
                    }
                    _ => continue,
                };
                match outcome.with_context(|| step.text.clone()) {
                    Ok(()) => done.push((*step).clone()),
                    Err(error) if step.what == What::Sysctl => refused.warnings.push(error),
                    Err(error) => refused.note(step, error),
                }
            }
        }
        // What stood in for something that could not be added stays.
        let deletes = deletes.into_iter().filter(|step| !refused.covers(step)).collect::<Vec<_>>();
        self.send(&deletes, done, &mut refused)?;
        Ok(refused)
    }

    /// Sends the route messages of `steps` together.
    fn send(&mut self, steps: &[&Step], done: &mut Vec<Step>, refused: &mut Refused) -> Result<()> {
        let messages = steps.iter().filter_map(|step| Some((*step, request(&step.action)?)));
        let (steps, requests): (Vec<_>, Vec<_>) = messages.unzip();
        let outcomes = self.route.batch(&requests)?;
        for ((step, request), outcome) in steps.into_iter().zip(&requests).zip(outcomes) {
            let outcome = match (outcome, &step.action) {
                (Err(error), Action::AddAddress(Address { dev, .. }) | Action::ReplaceRoute(Route { dev, .. }))
                    if error.errno == libc::EACCES =>
                {
                    self.again_with_v6(*dev, request, error)?
                }
                (outcome, _) => outcome,
            };
            match outcome {
                Err(error) if !tolerable(&step.action, &error) => {
                    refused.note(step, Error::from(error).context(step.text.clone()));
                }
                _ => done.push(step.clone()),
            }
        }
        Ok(())
    }

    /// Once more, after IPv6 was switched on again on that link.
    fn again_with_v6(&mut self, dev: u32, request: &Request, error: KernelError) -> Result<Outcome> {
        let Some(path) = super::v6_switch(&mut self.route, dev)? else { return Ok(Err(error)) };
        match self.inside(|| sysctl::set(&path, "0"))? {
            Ok(_) => Ok(self.route.batch(std::slice::from_ref(request))?.pop().unwrap_or(Err(error))),
            Err(_) => Ok(Err(error)),
        }
    }

    /// Makes our tables exactly `wanted`, each in one transaction, and reads them back.
    fn set_tables(&mut self, wanted: &[Table]) -> Result<()> {
        if let Some((tables, since)) = &self.stuck
            && tables == wanted
            && clock::instant().duration_since(*since) < STUCK
        {
            return Err(Error::new("the kernel shows other rules than it was given; not tried again yet"));
        }
        self.stuck = None;
        self.known = None;
        let socket = netfilter(&mut self.netfilter, &self.namespace)?;
        for family in [Family::V4, Family::V6] {
            match wanted.iter().find(|table| table.family == family) {
                Some(table) => nft::commit(socket, table)?,
                None => nft::delete(socket, family, NFT_TABLE)?,
            }
        }
        let differences = ruleset::differences(wanted, &self.tables()?);
        if differences.is_empty() {
            return Ok(());
        }
        self.stuck = Some((wanted.to_vec(), clock::instant()));
        Err(Error::new(format!("the kernel shows other rules than it was given: {}", differences.join("; "))))
    }
}

fn request(action: &Action) -> Option<Request> {
    Some(match action {
        Action::SetMtu(index, mtu) => link::set_mtu(*index, *mtu),
        Action::SetUp(index) => link::set_up(*index),
        Action::SetMac(index, mac) => link::set_mac(*index, *mac),
        Action::NoteVeth(index, mac, mtu) => link::set_alias(*index, &naming::veth_alias(*mac, *mtu)),
        Action::AddAddress(address) => addr::add(address),
        Action::DeleteAddress(address) => addr::delete(address),
        Action::ReplaceRoute(route) => route::replace(route),
        Action::DeleteRoute(route) => route::delete(route),
        Action::AddRule(rule) => rule::add(rule),
        Action::DeleteRule(rule) => rule::delete(rule),
        Action::SetTables(_) | Action::SetSysctl(..) | Action::AddVlan(..) => return None,
    })
}

/// Somebody else was faster, with the same aim.
fn tolerable(action: &Action, error: &crate::netlink::KernelError) -> bool {
    match action {
        Action::AddAddress(_) | Action::AddRule(_) => error.exists(),
        Action::DeleteAddress(_) | Action::DeleteRoute(_) | Action::DeleteRule(_) => error.not_found(),
        _ => false,
    }
}
