//! The host plan on the kernel (`spec/dataplane.md` 24, 29).

use super::{Host, netfilter, rules};
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::ids::EniId;
use crate::model::map::{Map, Set};
use crate::model::naming::{self, NFT_TABLE};
use crate::model::net::{Address, Family, Route};
use crate::model::nft::Table;
use crate::model::order::Gather as _;
use crate::netlink::{KernelError, Outcome, Request, addr, link, neigh, nft, route, rule, sysctl};
use crate::plan::host::{Action, HostEni, Intent, Observation, Plan, Step, What, diff, link_of, main_rules, regrets};
use crate::plan::ruleset;
use std::net::IpAddr;
use std::time::Duration;

/// Looks at the node in one call: deleting an address takes routes and other addresses with it, a VLAN device that was made has
/// none yet, and one that was deleted leaves its rules, which the second look finds; there is nothing that a third one could.
const PASSES: usize = 2;
/// How long tables are left alone that the kernel took but shows differently (`spec/dataplane.md` 24.4).
const STUCK: Duration = Duration::from_mins(10);

/// How often tables are set in one go that others change at the same time.
const COMMITS_MAX: usize = 5;

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
    /// What failed and concerns everything on the node.
    pub errors: Vec<(What, Error)>,
    /// What failed and concerns one pod, or keeps nothing from working (sysctls, which an unprivileged container cannot write), and
    /// what was left as it is for a reason.
    pub warnings: Vec<(What, Error)>,
    /// Whether our tables could be set, if that was tried.
    pub ruleset: Option<bool>,
    /// The node as it was before the last of these steps.
    pub seen: Observation,
}

/// What may strike steps out of a plan before it is carried out.
pub type Censor<'a> = &'a mut dyn FnMut(&Observation, &mut Plan);

/// Refused steps, and what they are about: nothing is taken away that stands in for what could not be added.
#[derive(Default)]
pub(super) struct Refused {
    pub(super) node: Vec<(What, Error)>,
    pub(super) warnings: Vec<(What, Error)>,
    enis: Map<EniId, Error>,
    addresses: Set<IpAddr>,
    classes: Set<What>,
    ruleset: Option<bool>,
}

/// What depends on each other among that which is not one address's.
fn class(what: What) -> Option<What> {
    match what {
        What::MarkRule | What::Ruleset => Some(What::MarkRule),
        What::LocalRule | What::GatewayRule => Some(What::LocalRule),
        What::ServiceRule => Some(What::ServiceRule),
        _ => None,
    }
}

impl Refused {
    pub(super) fn note(&mut self, step: &Step, error: Error) {
        self.addresses.extend(step.action.address());
        self.classes.extend(class(step.what));
        match (&step.eni, step.what) {
            (Some(eni), _) => drop(self.enis.entry(eni.clone()).or_insert(error)),
            (
                None,
                What::PrimaryMtu
                | What::MarkRule
                | What::LocalRule
                | What::MainRule
                | What::GatewayRule
                | What::Ruleset,
            ) => {
                self.node.push((step.what, error));
            }
            (None, _) => self.warnings.push((step.what, error)),
        }
    }

    /// The step is not made, which is bad enough for a warning.
    pub(super) fn hold(&mut self, step: &Step, why: Error) {
        self.classes.extend(class(step.what));
        self.warnings.push((step.what, why));
    }

    fn covers(&self, step: &Step) -> bool {
        step.eni.as_ref().is_some_and(|eni| self.enis.contains_key(eni))
            || step.action.address().is_some_and(|address| self.addresses.contains(&address))
            || class(step.what).is_some_and(|class| self.classes.contains(&class))
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
            let mut refused = self.carry_out(&plan.steps, &mut report.steps)?;
            self.put_back(intent, &plan.steps, &mut report.steps, &mut refused)?;
            let mut failed = refused.enis;
            failed.extend(plan.failed.into_iter().map(|(eni, why)| (eni, Error::new(why))));
            report.enis =
                intent.enis.iter().map(|eni| (eni.id.clone(), failed.remove(&eni.id).map_or(Ok(()), Err))).gather();
            report.errors = refused.node;
            report.warnings = refused.warnings;
            report.ruleset = refused.ruleset.or(report.ruleset);
            let link = |eni: &HostEni| link_of(&seen.links, eni.mac).map(|link| link.index);
            let trunks = intent.enis.iter().filter(|eni| eni.trunk);
            report.trunks = trunks.filter_map(|eni| Some((eni.id.clone(), link(eni)?))).gather();
            report.seen = seen;
            let again = |step: &Step| {
                use Action::{AddVlan, DeleteAddress, DeleteLink, Rename};
                matches!(step.action, DeleteAddress(_) | AddVlan(..) | DeleteLink(_) | Rename(..))
            };
            if !plan.steps.iter().any(again) {
                break;
            }
        }
        Ok(report)
    }

    /// Puts back the kernel's own way to the main table where it is missing, before anything else is known: without it nobody could be
    /// asked what the node is. What was done.
    pub fn restore_main(&mut self, v6: bool) -> Result<Vec<Step>> {
        let steps = main_rules(&rules::all(&mut self.route)?, v6);
        let mut done = Vec::new();
        let refused = self.carry_out(&steps, &mut done)?;
        refused.node.into_iter().next().map_or(Ok(done), |(_, error)| Err(error))
    }

    /// No rule that a pod needs may go with what a former one has left (`plan::host::regrets`).
    fn put_back(&mut self, intent: &Intent, steps: &[Step], done: &mut Vec<Step>, refused: &mut Refused) -> Result<()> {
        let deleted = steps.iter().filter_map(|step| match &step.action {
            Action::DeleteRule(rule) if step.what == What::BranchRule => Some(rule),
            _ => None,
        });
        let deleted = deleted.collect::<Vec<_>>();
        if deleted.is_empty() {
            return Ok(());
        }
        let steps = regrets(intent, &self.observe()?, &deleted);
        let mut more = self.carry_out(&steps, done)?;
        refused.node.append(&mut more.node);
        refused.warnings.append(&mut more.warnings);
        Ok(())
    }

    pub(super) fn carry_out(&mut self, steps: &[Step], done: &mut Vec<Step>) -> Result<Refused> {
        let mut refused = Refused::default();
        let (deletes, adds) = steps.iter().partition::<Vec<_>, _>(|step| step.action.deletes());
        // From that rule on an ENI's own address serves; the tables must know the ENI before.
        let (last, adds) = adds.into_iter().partition::<Vec<_>, _>(|step| step.what == What::EniRule);
        for tables in [false, true] {
            // A link on which IPv6 is off takes no address, so sysctls come first.
            if tables {
                self.send(&adds, done, &mut refused)?;
            }
            for step in &adds {
                let outcome = match &step.action {
                    Action::SetTables(wanted) if tables && self.is_stuck(wanted) => {
                        Err(Error::new("the kernel shows other rules than it was given; not tried again yet"))
                    }
                    Action::SetTables(wanted) if tables => {
                        let outcome = self.set_tables(wanted);
                        refused.ruleset = Some(outcome.is_ok());
                        outcome
                    }
                    Action::AddVlan(eni, trunk) if !tables => self.lay_vlan(eni, *trunk).map(drop),
                    Action::SetSysctl(path, value) if !tables => {
                        self.inside(|| sysctl::set(path, value)).flatten().map(drop)
                    }
                    _ => continue,
                };
                match outcome.with_context(|| step.text.clone()) {
                    Ok(()) => done.push((*step).clone()),
                    // It has gone with its link and its pod.
                    Err(error) if step.what == What::LinkSysctl && sysctl::missing(&error) => {}
                    Err(error) if matches!(step.action, Action::SetSysctl(..)) => refused.hold(step, error),
                    Err(error) if step.what == What::Ruleset && self.stuck.is_some() => refused.hold(step, error),
                    Err(error) => refused.note(step, error),
                }
            }
        }
        self.send(&last, done, &mut refused)?;
        // What stood in for something that could not be added stays.
        let deletes = deletes.into_iter().filter(|step| !refused.covers(step)).collect::<Vec<_>>();
        self.delete_rules(&deletes, done, &mut refused)?;
        self.send(&deletes, done, &mut refused)?;
        Ok(refused)
    }

    /// Sends the route messages of `steps` together.
    fn send(&mut self, steps: &[&Step], done: &mut Vec<Step>, refused: &mut Refused) -> Result<()> {
        let messages = steps.iter().filter_map(|step| Some((*step, request(step)?)));
        let (steps, requests): (Vec<_>, Vec<_>) = messages.unzip();
        let mut outcomes = self.route.batch(&requests)?;
        let rules = steps.iter().map(|step| match &step.action {
            Action::AddRule(rule) => Some(rule),
            _ => None,
        });
        rules::confirm(&mut self.route, &rules.collect::<Vec<_>>(), &mut outcomes)?;
        for ((step, request), outcome) in steps.into_iter().zip(&requests).zip(outcomes) {
            let outcome = match (outcome, &step.action) {
                (Err(error), Action::AddAddress(Address { dev, .. }) | Action::ReplaceRoute(Route { dev, .. }))
                    if error.errno == libc::EACCES =>
                {
                    self.again_with_v6(*dev, request, error)?
                }
                (Err(error), Action::DeleteAddress(address)) if error.not_found() => {
                    match addr::delete_beside_peer(&mut self.route, address)? {
                        Some(request) => self.route.batch(&[request])?.pop().unwrap_or(Err(error)),
                        None => Err(error),
                    }
                }
                (Err(error), Action::Rename(index, name)) if error.errno == libc::EBUSY => {
                    self.rename_down(*index, name, error)?
                }
                (outcome, _) => outcome,
            };
            match outcome {
                Ok(_) => done.push(step.clone()),
                Err(error) if tolerable(step, &error) => {}
                Err(error) => refused.note(step, Error::from(error).context(step.text.clone())),
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

    /// Kernels before 6.2 rename nothing that is up (EBUSY), and look at the name only when the link is down. What goes with it the
    /// next look finds. A link may have the name as its alternative one, which no list of links shows: then nobody is cut off for
    /// nothing.
    fn rename_down(&mut self, index: u32, name: &str, busy: KernelError) -> Result<Outcome> {
        if link::by_name(&mut self.route, name)?.is_some() {
            return Ok(Err(KernelError { errno: libc::EEXIST, ..busy }));
        }
        let requests = [link::set_down(index), link::rename(index, name), link::set_up(index)];
        Ok(self.route.batch(&requests)?.into_iter().nth(1).unwrap_or(Err(busy)))
    }

    fn is_stuck(&self, wanted: &[Table]) -> bool {
        let stuck = self.stuck.as_ref().filter(|(tables, _)| tables == wanted);
        stuck.is_some_and(|(_, since)| clock::instant().duration_since(*since) < STUCK)
    }

    /// Makes our tables exactly `wanted`, each that differs in one transaction, and reads them back. What others change
    /// meanwhile is set once more.
    fn set_tables(&mut self, wanted: &[Table]) -> Result<()> {
        self.stuck = None;
        let mut shown = self.tables()?;
        for _ in 0..COMMITS_MAX {
            let before = self.known.as_ref().map(|(generation, _)| *generation);
            let socket = netfilter(&mut self.netfilter, &self.namespace)?;
            let mut commits = 0;
            for family in [Family::V4, Family::V6] {
                let [wanted, shown] = [wanted, &shown]
                    .map(|tables| tables.iter().filter(|table| table.family == family).cloned().collect::<Vec<_>>());
                if ruleset::differences(&wanted, &shown).is_empty() {
                    continue;
                }
                match wanted.first() {
                    Some(table) => nft::commit(socket, table)?,
                    None => nft::delete(socket, family, NFT_TABLE)?,
                }
                commits += 1;
            }
            if commits == 0 {
                return Ok(());
            }
            shown = self.tables()?;
            // Each transaction, whoever makes it, raises the generation by one.
            let socket = netfilter(&mut self.netfilter, &self.namespace)?;
            let alone =
                before.is_some_and(|before| Ok(before.wrapping_add(commits)) == nft::generation(socket).map_err(drop));
            let differences = ruleset::differences(wanted, &shown);
            if !differences.is_empty() && alone {
                let text = |tables: &[Table]| tables.iter().map(ToString::to_string).collect::<String>();
                log::error!("the kernel was given these rules: {}and shows these: {}", text(wanted), text(&shown));
                self.stuck = Some((wanted.to_vec(), clock::instant()));
                let differences = differences.join("; ");
                return Err(Error::new(format!("the kernel shows other rules than it was given: {differences}")));
            }
        }
        match ruleset::differences(wanted, &shown).first() {
            None => Ok(()),
            Some(first) => Err(Error::new(format!("others change them at once, {COMMITS_MAX} times: {first}"))),
        }
    }
}

fn request(step: &Step) -> Option<Request> {
    Some(match &step.action {
        Action::DeleteLink(index) => link::delete(*index),
        Action::SetMtu(index, mtu) => link::set_mtu(*index, *mtu),
        Action::SetUp(index) => link::set_working(*index),
        Action::SetMac(index, mac) => link::set_mac(*index, *mac),
        Action::NoteEgress(index, end) => link::set_alias(*index, &end.alias()),
        // As the plugin gives it: nobody is to choose it as the source of what leaves by other links.
        Action::AddAddress(address) if step.what == What::EgressAddress && address.addr.addr().is_ipv4() => {
            addr::add_for_link(address)
        }
        Action::NoteVeth(index, mac, mtu, name) => link::set_alias(*index, &naming::veth_alias(*mac, *mtu, name)),
        Action::Rename(index, name) => link::rename(*index, name),
        Action::AddAddress(address) => addr::add(address),
        Action::DeleteAddress(address) => addr::delete(address),
        Action::ReplaceRoute(route) => route::replace(route),
        Action::DeleteRoute(route) => route::delete(route),
        Action::DeleteBarrier(barrier) => route::delete_barrier(barrier),
        Action::DeleteNeighbour(dev, address) => neigh::delete(*dev, *address),
        Action::AddRule(rule) => rule::add(rule),
        Action::DeleteRule(_) | Action::SetTables(_) | Action::SetSysctl(..) | Action::AddVlan(..) => return None,
    })
}

/// Nothing was to be done after all: somebody else was faster, with the same aim; or the link is gone, with its pod. The plugin
/// takes that apart while we look, and of a DEL of `egress-cni` nobody tells.
fn tolerable(step: &Step, error: &KernelError) -> bool {
    use What::{
        BranchLink, BranchRoute, EgressAddress, EgressLink, EgressRoute, PodLink, PodMac, PodMtu, PodNote, PodRoute,
    };
    let of_pod = matches!(
        step.what,
        BranchLink
            | BranchRoute
            | EgressAddress
            | EgressLink
            | EgressRoute
            | PodLink
            | PodMac
            | PodMtu
            | PodNote
            | PodRoute
    );
    match step.action {
        _ if of_pod && error.errno == libc::ENODEV => true,
        Action::AddAddress(_) | Action::AddRule(_) => error.exists(),
        Action::DeleteAddress(_)
        | Action::DeleteRoute(_)
        | Action::DeleteBarrier(_)
        | Action::DeleteNeighbour(..)
        | Action::DeleteLink(_) => error.not_found(),
        // Or somebody has taken the name.
        Action::Rename(..) => error.errno == libc::ENODEV || error.exists(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::nft::{Chain, Expr, Rule};
    use crate::netlink::attr::Writer;

    /// `ip link property add dev if<index> altname <name>`: RTM_NEWLINKPROP, IFLA_PROP_LIST, IFLA_ALT_IFNAME.
    fn alternative_name(index: u32, name: &str) -> Request {
        let mut header = [0; 16]; // struct ifinfomsg
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut writer = Writer::new(&header);
        writer.nest_flagged(52u16, |writer| writer.text(53u16, name));
        Request::new(108u16, 0x600, writer.finish(), "add an alternative name".into()) // NLM_F_CREATE | NLM_F_EXCL
    }

    #[test]
    fn a_link_is_not_taken_down_for_a_name_that_is_taken() {
        let body = || {
            crate::sys::unshare_netns().unwrap();
            let mut host = Host::open().unwrap();
            let end = |name| link::End { name, mac: None, netns: None };
            let veth = link::Veth { end: end("odd0"), peer: end("other"), mtu: 0, up: true };
            host.route.run(&[link::create_veth(&veth), alternative_name(1, "eni1")]).unwrap();
            let index = link::by_name(&mut host.route, "odd0").unwrap().unwrap().index;
            // Goes when the link goes down.
            let (table, dst) = (300, "10.20.12.60/32".parse().unwrap());
            let scope = crate::model::net::Scope::Link;
            let way = Route { table, dst, gateway: None, dev: index, scope, prefsrc: None, metric: 0 };
            host.route.run(&[route::add(&way)]).unwrap();
            let ways = |host: &mut Host| route::list(&mut host.route, Family::V4, Some(table)).unwrap();
            // As a kernel answers that looks at the name last.
            let busy = || KernelError { errno: libc::EBUSY, text: None, what: "rename".into() };
            for taken in ["eni1", "other"] {
                let refused = host.rename_down(index, taken, busy()).unwrap().unwrap_err();
                assert!(refused.exists(), "{taken}: {refused}");
                assert_eq!(ways(&mut host), [way], "{taken}: nothing was touched");
            }
            host.rename_down(index, "eni2", busy()).unwrap().unwrap();
            assert_eq!(ways(&mut host), []);
            let link = link::by_index(&mut host.route, index).unwrap().unwrap();
            assert!(link.name == "eni2" && link.up, "{link:?}");
        };
        std::thread::spawn(body).join().unwrap();
    }

    #[test]
    fn tables_that_read_back_differently_are_left_for_a_while() {
        let body = || {
            crate::sys::unshare_netns().unwrap();
            let mut host = Host::open().unwrap();
            let generation =
                |host: &mut Host| nft::generation(netfilter(&mut host.netfilter, &host.namespace).unwrap()).unwrap();
            let chain = || {
                let rules = vec![Rule { exprs: vec![Expr::COUNTER, Expr::Return], comment: None }];
                Chain { name: "one".into(), base: None, rules }
            };
            let table = |chains| Table { family: Family::V4, name: NFT_TABLE.into(), comment: None, chains };
            let step = |tables: Vec<Table>| Step {
                what: What::Ruleset,
                eni: None,
                action: Action::SetTables(tables),
                text: "set nf_tables rules".into(),
            };
            // The kernel makes one of two chains of the same name.
            let odd = [step(vec![table(vec![chain(), chain()])])];
            for told in ["the kernel shows other rules than it was given: ", "not tried again yet"] {
                let before = generation(&mut host);
                let refused = host.carry_out(&odd, &mut Vec::new()).unwrap();
                let first = told.ends_with(' ');
                assert_eq!((refused.ruleset, refused.node.len()), (first.then_some(false), 0), "{:?}", refused.node);
                assert!(refused.warnings[0].1.to_string().contains(told), "{}", refused.warnings[0].1);
                assert_eq!(generation(&mut host), before + u32::from(first));
            }
            // Other rules are another matter.
            let refused = host.carry_out(&[step(vec![table(vec![chain()])])], &mut Vec::new()).unwrap();
            assert_eq!((refused.ruleset, refused.node.len(), refused.warnings.len()), (Some(true), 0, 0));
        };
        std::thread::spawn(body).join().unwrap();
    }
}
