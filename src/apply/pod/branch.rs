//! A pod's branch ENI on the kernel (`spec/dataplane.md` 9.3, `spec/plugin.md` 13.3, 13.4): its VLAN device on the trunk, the
//! routes of its table, and their end.

use super::Made;
use crate::apply::{Host, make_link, routes_and_rules};
use crate::error::{Context, Error, List, Result};
use crate::model::naming::priority;
use crate::model::net::{Family, Link, Rule};
use crate::netlink::{link, route, rule, sysctl};
use crate::plan::branch::{Branch, is_vlan};
use crate::plan::pod::{PodBranch, RemovedBranch};

/// A branch pod's end on the host.
pub(super) struct Leaving {
    /// Selects the rules of its table in strict mode.
    rules: Rule,
    /// Index of the VLAN device, if it is there.
    device: Option<u32>,
}

impl Host {
    /// Makes the VLAN device and the ENI's own routes. Rules that an earlier sandbox of the pod has left for its veth go
    /// first: they may lead to another table.
    pub(super) fn add_branch(&mut self, branch: &PodBranch, veth: &str, made: &mut Made) -> Result<()> {
        let eni = &branch.eni;
        let family = Family::of(eni.gateway);
        let earlier = Branch::earlier_rules(family, veth);
        rule::delete_all(&mut self.route, &earlier, &|there| of_branch(&earlier, there))?;
        if !branch.strict {
            // Of a former pod in strict mode: it would send back to the ENI what comes from there.
            let strict = Rule::any(family, priority::BRANCH, eni.table);
            rule::delete_all(&mut self.route, &strict, &|there| of_branch(&strict, there))?;
        }
        let device = self.lay_vlan(eni, branch.parent)?;
        made.links.push(device.index);
        let [gateway, default] = eni.routes(device.index);
        self.route.run(&[link::set_up(device.index), route::replace(&gateway), route::replace(&default)])
    }

    /// Makes the device on the trunk's link of this index, ready to be set up.
    pub(in crate::apply) fn lay_vlan(&mut self, eni: &Branch, trunk: u32) -> Result<Link> {
        let device = self.make_vlan(eni, trunk)?;
        let ready = self.inside(|| vlan_sysctls(&device.name, eni.gateway.is_ipv6())).flatten();
        if ready.is_err() {
            _ = self.route.run(&[link::delete(device.index)]);
        }
        ready.map(|()| device)
    }

    /// Makes the device and reads it back. One of the name is of an earlier pod on this VLAN, possibly on a trunk that is gone.
    fn make_vlan(&mut self, eni: &Branch, parent: u32) -> Result<Link> {
        let name = eni.device();
        let requests = [link::create_vlan(&name, parent, eni.vlan, Some(eni.mac)), link::query(&name)];
        for again in [false, true] {
            match make_link(&mut self.route, &requests)? {
                Ok(link) => return Ok(link),
                Err(error) if error.exists() && !again => self.delete_vlan(&name)?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::new(format!("create VLAN device {name:?}: the trunk has that VLAN under another name")))
    }

    fn delete_vlan(&mut self, name: &str) -> Result<()> {
        match link::by_name(&mut self.route, name)? {
            Some(found) if is_vlan(&found) => self.route.run(&[link::delete(found.index).or_not_found()]),
            Some(_) => Err(Error::new(format!("interface {name:?} already exists on the host and is no VLAN device"))),
            None => Ok(()),
        }
    }

    /// What there is to take away of it; none if another pod has the VLAN by now.
    pub(super) fn look_at_branch(&mut self, branch: &RemovedBranch) -> Result<Option<Leaving>> {
        let device = link::by_name(&mut self.route, &branch.device)?.filter(is_vlan);
        let (routes, rules, _) = routes_and_rules(&mut self.route).context("look at the table of the branch ENI")?;
        let index = device.as_ref().map(|device| device.index);
        if branch.is_of_another(index, &routes, &rules) {
            log::info!("leave {} alone: another pod has that VLAN by now", branch.device);
            return Ok(None);
        }
        Ok(Some(Leaving {
            rules: Rule::any(Family::of(branch.address), priority::BRANCH, branch.table),
            device: index,
        }))
    }

    /// Takes the VLAN device away and the rules of its table, whichever mode they are of. The routes go with their links.
    pub(super) fn remove_branch(&mut self, branch: &Leaving) -> Result<()> {
        let mut errors = List::new();
        // The rules first: as long as they lead to a device, the daemon makes it again.
        let Leaving { rules, .. } = branch;
        errors.note(rule::delete_all(&mut self.route, rules, &|there| of_branch(rules, there)));
        if let Some(index) = branch.device {
            errors.note(self.route.run(&[link::delete(index).or_not_found()]));
        }
        errors.into_result()
    }
}

/// Whether a rule is one of a pod in strict mode: that of `selector`, for whichever link and table.
fn of_branch(selector: &Rule, there: &Rule) -> bool {
    *there == Rule { table: there.table, iif: there.iif.clone(), ..selector.clone() }
}

/// Written before the link goes up. Redirects of the VPC's router are taken, as the original does. Until the link-local address
/// is through with the check for duplicates the host cannot ask for the router's MAC, hence no check for an IPv6 pod.
fn vlan_sysctls(name: &str, v6: bool) -> Result<()> {
    let keys = [("accept_ra", "0"), ("accept_redirects", "1"), ("forwarding", "0"), ("accept_dad", "0")];
    for (key, value) in &keys[..if v6 { 4 } else { 3 }] {
        match sysctl::set(&format!("net/ipv6/conf/{name}/{key}"), value) {
            Err(error) if !sysctl::missing(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
