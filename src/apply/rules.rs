//! Routing rules of a host plan, one by one. When the kernel compares rules it takes what a request leaves out for a wildcard:
//! an add is refused with EEXIST because of another rule, and a delete takes another rule that stands before the one that is
//! meant. So neither is believed: what is there is looked up.

use super::Host;
use super::host::Refused;
use crate::error::{Error, Result};
use crate::model::net::{Family, Rule, TABLE_LOCAL};
use crate::netlink::{KernelError, Outcome, Request, Socket, rule};
use crate::plan::host::{Action, Step, gateway_rule};

/// To be called with the outcomes of requests, and the rules that those were to add which are [`rule::add`]: afterwards EEXIST
/// says that this very rule is there. One that is missing all the same is added beside the one that was in its way; its outcome
/// is that of this attempt.
pub(super) fn confirm(socket: &mut Socket, rules: &[Option<&Rule>], outcomes: &mut [Outcome]) -> Result<()> {
    let exists = |outcome: &Outcome| outcome.as_ref().is_err_and(KernelError::exists);
    let pairs = rules.iter().zip(outcomes).filter(|(_, outcome)| exists(outcome));
    let mut doubtful = pairs.filter_map(|(rule, outcome)| Some(((*rule)?, outcome))).collect::<Vec<_>>();
    if doubtful.is_empty() {
        return Ok(());
    }
    let there = all(socket)?;
    doubtful.retain(|(rule, _)| !there.contains(rule));
    let hindered = |rule: &Rule| there.iter().any(|other| rule.deletes(other));
    let (doubtful, free) = doubtful.into_iter().partition::<Vec<_>, _>(|(rule, _)| hindered(rule));
    add_again(socket, free)?;
    if doubtful.is_empty() {
        return Ok(());
    }
    let requests = doubtful.iter().map(|(rule, _)| rule::add_beside(rule)).collect::<Vec<_>>();
    let answers = socket.batch(&requests)?;
    let there = all(socket)?;
    for (((rule, outcome), request), answer) in doubtful.into_iter().zip(requests).zip(answers) {
        *outcome = match answer {
            Ok(_) if !there.contains(rule) => {
                let text = Some("the kernel took it and does not show it".into());
                Err(KernelError { errno: libc::EAGAIN, text, what: request.what })
            }
            other => other,
        };
    }
    Ok(())
}

/// What was in the way of these has gone since, with a sweep, say, or a late DEL.
fn add_again(socket: &mut Socket, rules: Vec<(&Rule, &mut Outcome)>) -> Result<()> {
    let requests = rules.iter().map(|(rule, _)| rule::add(rule)).collect::<Vec<_>>();
    for ((_, outcome), answer) in rules.into_iter().zip(socket.batch(&requests)?) {
        *outcome = answer;
        if let Err(error) = outcome
            && error.exists()
        {
            // Beside one that is not seen, one more with each look would be added.
            error.errno = libc::EAGAIN;
            error.text = Some("the kernel has it and does not show it".into());
        }
    }
    Ok(())
}

/// All rules of both families, in the kernel's order within each.
pub(super) fn all(socket: &mut Socket) -> Result<Vec<Rule>> {
    let mut rules = rule::list(socket, Family::V4)?;
    rules.extend(rule::list(socket, Family::V6)?);
    Ok(rules)
}

/// What a delete comes to.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// These requests: the last one is the delete.
    Send(Vec<Request>),
    /// It is gone already.
    Gone,
    /// It must not be sent, for this reason.
    Hold(String),
}

/// How to delete `rule` and no other from `there`, which is afterwards as the kernel's list will be.
fn way(there: &mut Vec<Rule>, rule: &Rule) -> Way {
    let local = |other: &&Rule| **other == Rule::any(rule.family, other.priority, TABLE_LOCAL);
    if local(&rule) && there.contains(rule) && there.iter().filter(local).count() < 2 {
        return Way::Hold("no other rule would lead to local addresses".into());
    }
    let router = gateway_rule();
    let first = |rule: &Rule, there: &[Rule], but: Option<&Rule>| {
        there.iter().position(|other| rule.deletes(other) && Some(other) != but)
    };
    let mut at = match first(rule, there, Some(&router).filter(|router| *router != rule)) {
        Some(at) if there[at] == *rule => at,
        Some(at) if there.contains(rule) => return hidden(&there[at]),
        _ => return Way::Gone,
    };
    let mut requests = Vec::new();
    if *rule != router && rule.deletes(&router) && there[..at].contains(&router) {
        // Ours goes behind the rule that somebody has put after it, and is there all the time.
        match first(&router, there, None) {
            Some(at) if there[at] != router => return hidden(&there[at]),
            _ => {}
        }
        requests.push(rule::add_beside(&router));
        while let Some(early) = there[..at].iter().position(|other| *other == router) {
            there.remove(early);
            at -= 1;
            requests.push(rule::delete(&router));
        }
        there.insert(at + 1, router);
    }
    there.remove(at);
    requests.push(rule::delete(rule));
    Way::Send(requests)
}

fn hidden(by: &Rule) -> Way {
    Way::Hold(format!("the kernel would delete {:?} instead, which is not ours", by.to_string()))
}

impl Host {
    /// Carries out those of the steps that delete rules. One that would meet another rule is not made, but told.
    pub(super) fn delete_rules(&mut self, steps: &[&Step], done: &mut Vec<Step>, refused: &mut Refused) -> Result<()> {
        let deletes = steps.iter().filter_map(|step| match &step.action {
            Action::DeleteRule(rule) => Some((*step, rule)),
            _ => None,
        });
        let deletes = deletes.collect::<Vec<_>>();
        if deletes.is_empty() {
            return Ok(());
        }
        let mut there = all(&mut self.route)?;
        let (mut requests, mut owners) = (Vec::new(), Vec::new());
        for (step, rule) in deletes {
            match way(&mut there, rule) {
                Way::Gone => {}
                Way::Hold(why) => refused.hold(step, Error::new(why).context(step.text.clone())),
                Way::Send(more) => {
                    owners.resize(owners.len() + more.len() - 1, None);
                    owners.push(Some(step));
                    requests.extend(more);
                }
            }
        }
        let outcomes = self.route.batch(&requests)?;
        for (step, outcome) in owners.into_iter().zip(outcomes) {
            match (outcome, step) {
                (Ok(_), Some(step)) => done.push(step.clone()),
                (Err(error), Some(step)) if !error.not_found() => {
                    refused.note(step, Error::from(error).context(step.text.clone()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::net::TABLE_MAIN;

    fn rule(text: &str, priority: u32, table: u32) -> Rule {
        Rule::from(text.parse().unwrap(), priority, table)
    }

    fn check(there: &[&Rule], delete: &Rule, expected: Result<&[&str], Option<&str>>, left: &[&Rule]) {
        let mut list = there.iter().map(|rule| (*rule).clone()).collect();
        let found = way(&mut list, delete);
        match (&found, expected) {
            (Way::Send(requests), Ok(texts)) => {
                assert_eq!(requests.iter().map(|request| request.what.as_str()).collect::<Vec<_>>(), texts);
            }
            (Way::Hold(why), Err(Some(part))) => assert!(why.contains(part), "{why}"),
            (Way::Gone, Err(None)) => {}
            _ => panic!("{found:?} instead of {expected:?}"),
        }
        assert_eq!(list.iter().collect::<Vec<_>>(), left);
    }

    #[test]
    fn a_rule_whose_double_has_gone_meanwhile_is_added() {
        let body = || {
            crate::sys::unshare_netns().unwrap();
            let mut socket = Socket::route().unwrap();
            let ours = rule("10.20.12.60/32", 1536, 3);
            // What the kernel said while there was another.
            let refused = || Err(KernelError { errno: libc::EEXIST, text: None, what: "add".into() });
            for round in 0..2 {
                let mut outcomes = [refused()];
                confirm(&mut socket, &[Some(&ours)], &mut outcomes).unwrap();
                assert_eq!(outcomes, [if round == 0 { Ok(Vec::new()) } else { refused() }]);
                let there = all(&mut socket).unwrap();
                assert_eq!(there.iter().filter(|other| **other == ours).count(), 1);
            }
        };
        std::thread::spawn(body).join().unwrap();
    }

    #[test]
    fn only_the_very_rule_is_deleted() {
        let ours = rule("10.20.12.60/32", 1536, 3);
        let tcp = Rule { ipproto: Some(6), ..ours.clone() };
        let odd = Rule { foreign: true, ..ours.clone() };
        let elsewhere = rule("10.20.12.60/32", 1536, 4);
        let sent: Result<&[&str], _> = Ok(&["delete rule 1536 from 10.20.12.60 lookup 3"]);
        check(&[&ours], &ours, sent, &[]);
        check(&[&elsewhere, &ours, &tcp, &ours], &ours, sent, &[&elsewhere, &tcp, &ours]);
        check(&[&tcp, &ours], &ours, Err(Some("ipproto 6")), &[&tcp, &ours]);
        check(&[&odd, &ours], &ours, Err(Some("1536")), &[&odd, &ours]);
        check(&[&tcp], &ours, Err(None), &[&tcp]);
        check(&[], &ours, Err(None), &[]);
        let mark = |bits| Rule { fwmark: Some((bits, bits)), ..Rule::any(Family::V4, 1024, TABLE_MAIN) };
        let wider = Rule { src: Some("10.9.0.0/16".parse().unwrap()), ..mark(0x100) };
        check(
            &[&mark(0x80), &wider, &mark(0x100)],
            &mark(0x100),
            Err(Some("10.9.0.0/16")),
            &[&mark(0x80), &wider, &mark(0x100)],
        );
    }

    #[test]
    fn the_last_way_to_local_addresses_stays() {
        let local = |family, priority| Rule::any(family, priority, TABLE_LOCAL);
        let (own, moved) = (local(Family::V4, 0), local(Family::V4, 20));
        let part = rule("10.9.9.9/32", 20, TABLE_LOCAL);
        check(&[&own, &moved], &own, Ok(&["delete rule 0 lookup 255"]), &[&moved]);
        check(&[&own, &part], &own, Err(Some("no other rule")), &[&own, &part]);
        check(&[&own, &local(Family::V6, 20)], &own, Err(Some("no other rule")), &[&own, &local(Family::V6, 20)]);
    }

    #[test]
    fn the_rule_for_the_router_makes_way() {
        let (own, moved) = (Rule::any(Family::V6, 0, TABLE_LOCAL), Rule::any(Family::V6, 20, TABLE_LOCAL));
        let router = gateway_rule();
        let (add, delete) = (
            "add rule 0 from fe80:ec2::1 ipproto 58 lookup 255",
            "delete rule 0 from fe80:ec2::1 ipproto 58 lookup 255",
        );
        let texts = [add, delete, "delete rule 0 lookup 255"];
        check(&[&router, &own, &moved], &own, Ok(&texts), &[&router, &moved]);
        check(&[&own, &router, &moved], &own, Ok(&texts[2..]), &[&router, &moved]);
        let part = Rule { src: Some("2001:db8::/32".parse().unwrap()), ..own.clone() };
        let found = [&router, &part, &own, &moved];
        check(&found, &own, Err(Some("2001:db8::/32")), &found);
    }
}
