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
        let good = self.flows.iter().filter(|flow| flow.ok).count();
        let verdict = if self.ok { "Everything is as it should be" } else { "NOT as it should be" };
        writeln!(f, "\n{verdict}: {good} of {} flows, {:.1} s.", self.flows.len(), self.took_s)
    }
}

impl Report {
    fn nodes_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<10} {:<12} {:<15} {:>9} {:>5} {:>5} {:>11} {:>9}",
            "NODE", "TYPE", "ADDRESS", "READY", "ENIS", "PODS", "ADD MEDIAN", "SLOWEST"
        )?;
        for node in &self.nodes {
            let adds = self.pods.iter().filter(|pod| pod.node == node.name).map(|pod| pod.add_ms).collect::<Vec<_>>();
            let count = adds.len();
            let (median, slowest) = middle(adds);
            writeln!(
                f,
                "{:<10} {:<12} {:<15} {:>6.0} ms {:>5} {:>5} {:>8.1} ms {:>6.1} ms",
                node.name, node.instance_type, node.address, node.ready_ms, node.enis, count, median, slowest
            )?;
        }
        Ok(())
    }

    fn flows_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: Vec<&str> = Vec::new();
        for flow in &self.flows {
            if !kinds.contains(&flow.kind) {
                kinds.push(flow.kind);
            }
        }
        writeln!(f, "\n{:<32} {:>9} {:>9}  SOURCE SEEN", "FLOW", "TCP", "UDP")?;
        for kind in kinds {
            let of = |proto: &str| {
                let all = self.flows.iter().filter(|flow| flow.kind == kind && flow.proto == proto);
                let (good, count) = all.fold((0, 0), |(good, count), flow| (good + usize::from(flow.ok), count + 1));
                (format!("{good}/{count}"), good == count)
            };
            let ((tcp, tcp_ok), (udp, udp_ok), (icmp, icmp_ok)) = (of("tcp"), of("udp"), of("icmp"));
            let one = self.flows.iter().find(|flow| flow.kind == kind);
            let mark = if tcp_ok && udp_ok && icmp_ok { one.map_or("", |flow| flow.source) } else { "FAILED" };
            let icmp = if icmp == "0/0" { String::new() } else { format!(", icmp {icmp}") };
            writeln!(f, "{kind:<32} {tcp:>9} {udp:>9}  {mark}{icmp}")?;
        }
        for flow in self.flows.iter().filter(|flow| !flow.ok).take(SHOWN) {
            let Outcome { from, to, proto, expect, seen, .. } = flow;
            writeln!(f, "FAILED  {from} to {to} over {proto}: expected {expect}, got: {seen}")?;
        }
        Ok(())
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
        assert!(text.contains("NOT as it should be: 2 of 3"), "{text}");
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
