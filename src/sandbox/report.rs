//! What a run has shown, for people and for programs.

use super::flows::Outcome;
use crate::model::map::Map;
use crate::model::order;
use serde::Serialize;
use std::fmt;

/// One node.
#[derive(Clone, Debug, Serialize)]
pub struct NodeLine {
    /// Name.
    pub name: String,
    /// Instance type.
    pub instance_type: String,
    /// Primary address.
    pub address: String,
    /// From the daemon's start until it served, in milliseconds.
    pub ready_ms: f64,
    /// ENIs at the end.
    pub enis: usize,
    /// Addresses that pods may have, at the end.
    pub addresses: u64,
}

/// One pod.
#[derive(Clone, Debug, Serialize)]
pub struct PodLine {
    /// Its node.
    pub node: String,
    /// Name.
    pub name: String,
    /// Address.
    pub ip: String,
    /// The ENI that has the address.
    pub eni: String,
    /// The ADD as a process, in milliseconds.
    pub add_ms: f64,
}

/// A whole run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Everything as it should be.
    pub ok: bool,
    /// Nodes.
    pub nodes: Vec<NodeLine>,
    /// Pods.
    pub pods: Vec<PodLine>,
    /// Flows.
    pub flows: Vec<Outcome>,
    /// Calls per action.
    pub ec2_calls: Map<String, u64>,
    /// Requests to IMDS.
    pub imds_requests: u64,
    /// What else was wrong: requests that EC2 would not expect, leftovers.
    pub problems: Vec<String>,
    /// What was asked for and not tried, with the reason.
    pub skipped: Vec<String>,
    /// The whole run, in seconds.
    pub took_s: f64,
}

/// Failed flows that the table shows; the JSON has all.
const SHOWN: usize = 10;

fn middle(mut values: Vec<f64>) -> (f64, f64) {
    order::sort_by(&mut values, f64::total_cmp);
    let median = values.get(values.len() / 2).copied().unwrap_or(0.0);
    (median, values.last().copied().unwrap_or(0.0))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.nodes_table(f)?;
        self.flows_table(f)?;
        let calls = self.ec2_calls.iter().map(|(action, count)| format!("{action} {count}")).collect::<Vec<_>>();
        writeln!(f, "\nEC2 calls: {}", if calls.is_empty() { "none".into() } else { calls.join(", ") })?;
        writeln!(f, "IMDS requests: {}", self.imds_requests)?;
        for problem in &self.problems {
            writeln!(f, "PROBLEM  {problem}")?;
        }
        for skipped in &self.skipped {
            writeln!(f, "SKIP  {skipped}")?;
        }
        writeln!(f, "\n{}", self.verdict())
    }
}

/// A number of things: `1 node`, `2 nodes`.
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

impl Report {
    fn verdict(&self) -> String {
        let all = self.flows.len();
        let good = self.flows.iter().filter(|flow| flow.ok).count();
        let took = self.took_s;
        if self.ok {
            return format!("Everything is as it should be: {good} of {}, {took:.1} s.", count(all, "flow"));
        }
        let flows = match all - good {
            0 => format!("all {} are right", count(all, "flow")),
            wrong => format!("{wrong} of {} failed", count(all, "flow")),
        };
        let problems = match self.problems.len() {
            0 => String::new(),
            number => format!("{}, ", count(number, "problem")),
        };
        format!("NOT as it should be: {problems}{flows}, {took:.1} s.")
    }

    fn nodes_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As wide as the widest; addresses of IPv6 are longer than others.
        let wide =
            |text: fn(&NodeLine) -> &str, least| self.nodes.iter().map(|node| text(node).len()).fold(least, usize::max);
        let (kind, address) = (wide(|node| &node.instance_type, 12), wide(|node| &node.address, 15));
        writeln!(
            f,
            "{:<10} {:<kind$} {:<address$} {:>9} {:>5} {:>5} {:>11} {:>9}",
            "NODE", "TYPE", "ADDRESS", "READY", "ENIS", "PODS", "ADD MEDIAN", "SLOWEST"
        )?;
        for node in &self.nodes {
            let adds = self.pods.iter().filter(|pod| pod.node == node.name).map(|pod| pod.add_ms).collect::<Vec<_>>();
            let count = adds.len();
            let (median, slowest) = middle(adds);
            writeln!(
                f,
                "{:<10} {:<kind$} {:<address$} {:>6.0} ms {:>5} {:>5} {:>8.1} ms {:>6.1} ms",
                node.name, node.instance_type, node.address, node.ready_ms, node.enis, count, median, slowest
            )?;
        }
        Ok(())
    }

    fn flows_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Lines of a kind stand together, one for each source.
        let mut lines: Vec<(&str, &str)> = Vec::new();
        for flow in &self.flows {
            let line = (flow.kind, flow.source);
            if !lines.contains(&line) {
                let at = lines.iter().rposition(|(kind, _)| *kind == flow.kind);
                lines.insert(at.map_or(lines.len(), |at| at + 1), line);
            }
        }
        writeln!(f, "\n{:<32} {:>9} {:>9}  SOURCE SEEN", "FLOW", "TCP", "UDP")?;
        for (kind, source) in lines {
            let of = |proto: &str| {
                let all = self.flows.iter().filter(|flow| (flow.kind, flow.source) == (kind, source));
                let all = all.filter(|flow| flow.proto == proto);
                let (good, count) = all.fold((0, 0), |(good, count), flow| (good + usize::from(flow.ok), count + 1));
                (format!("{good}/{count}"), good == count)
            };
            let ((tcp, tcp_ok), (udp, udp_ok), (icmp, icmp_ok)) = (of("tcp"), of("udp"), of("icmp"));
            let mark = if tcp_ok && udp_ok && icmp_ok { source } else { "FAILED" };
            let icmp = if icmp == "0/0" { String::new() } else { format!(", icmp {icmp}") };
            writeln!(f, "{kind:<32} {tcp:>9} {udp:>9}  {mark}{icmp}")?;
        }
        let failed = self.flows.iter().filter(|flow| !flow.ok).collect::<Vec<_>>();
        for flow in failed.iter().take(SHOWN) {
            let Outcome { from, to, proto, expect, seen, .. } = flow;
            writeln!(f, "FAILED  {from} to {to} over {proto}: expected {expect}, got: {seen}")?;
        }
        match failed.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => writeln!(f, "FAILED  {more} more; --json has them all"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(ok: bool, proto: &'static str) -> Outcome {
        Outcome {
            kind: "pod to internet",
            source: "the node's primary address",
            from: "node-1/pod-1".into(),
            to: "internet".into(),
            proto,
            expect: "10.20.0.5".into(),
            seen: if ok { "10.20.0.5" } else { "timed out" }.into(),
            ok,
        }
    }

    #[test]
    fn failures_stand_out() {
        let mut report = Report { flows: vec![flow(true, "tcp"), flow(true, "udp")], ok: true, ..Report::default() };
        let text = report.to_string();
        assert!(text.contains("1/1       1/1  the node's primary address"), "{text}");
        assert!(text.contains("Everything is as it should be: 2 of 2 flows"), "{text}");
        report.flows.push(flow(false, "udp"));
        report.ok = false;
        let text = report.to_string();
        assert!(text.contains("1/1       1/2  FAILED"), "{text}");
        assert!(text.contains("node-1/pod-1 to internet over udp: expected 10.20.0.5, got: timed out"), "{text}");
        assert!(text.contains("NOT as it should be: 1 of 3 flows failed, 0.0 s."), "{text}");
        report.flows.extend((0..=SHOWN).map(|_| flow(false, "tcp")));
        report.problems.push("node-1: a fault".into());
        report.skipped.push("no vlan".into());
        let text = report.to_string();
        assert_eq!(text.matches("\nFAILED  node-1").count(), SHOWN, "{text}");
        assert!(text.contains("\nFAILED  2 more; --json has them all\n"), "{text}");
        assert!(text.contains("\nSKIP  no vlan\n"), "{text}");
        assert!(text.contains("NOT as it should be: 1 problem, 12 of 14 flows failed"), "{text}");
    }

    #[test]
    fn a_problem_is_not_told_as_a_failed_flow() {
        let problems = vec!["node-1: one".into(), "node-1: two".into()];
        let report = Report { flows: vec![flow(true, "tcp"), flow(true, "udp")], problems, ..Report::default() };
        let text = report.to_string();
        assert!(text.contains("NOT as it should be: 2 problems, all 2 flows are right"), "{text}");
    }

    #[test]
    fn each_source_of_a_kind_has_its_line() {
        let silent = Outcome { source: "no answer, by the settings", ..flow(true, "tcp") };
        let other = Outcome { kind: "node to its pod", ..flow(true, "tcp") };
        let flows = vec![flow(true, "tcp"), other, silent, flow(true, "udp")];
        let text = Report { flows, ..Report::default() }.to_string();
        let lines = text.lines().filter(|line| line.starts_with("pod to internet")).collect::<Vec<_>>();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(
            lines[0].contains("1/1       1/1  the node's") && lines[1].contains("1/1       0/0  no answer"),
            "{text}"
        );
        assert!(text.find("node to its pod") > text.find("no answer"), "{text}");
    }

    #[test]
    fn columns_are_as_wide_as_their_addresses() {
        for address in ["10.20.0.5", "2001:db8:20:1:a1b2:c3d4:e5f6:789a"] {
            let node = NodeLine {
                name: "node-1".into(),
                instance_type: "u7in-24tb.224xlarge".into(),
                address: address.into(),
                ready_ms: 1.0,
                enis: 1,
                addresses: 1,
            };
            let text = Report { nodes: vec![node], ..Report::default() }.to_string();
            let mut lines = text.lines();
            let (head, line) = (lines.next().unwrap(), lines.next().unwrap());
            assert_eq!((head.len(), head.find("ADDRESS")), (line.len(), line.find(address)), "{text}");
        }
    }

    #[test]
    fn json_has_the_promised_fields() {
        let report = Report { flows: vec![flow(true, "tcp")], ..Report::default() };
        let json = serde_json::to_value(&report).unwrap();
        for field in ["ok", "nodes", "pods", "flows", "ec2_calls"] {
            assert!(json.get(field).is_some(), "{field}");
        }
        for field in ["from", "to", "proto", "expect", "seen", "ok"] {
            assert!(json["flows"][0].get(field).is_some(), "{field}");
        }
    }
}
