//! Prometheus metrics in the text format 0.0.4, under the original's names (`spec/ipamd.md` 12, `spec/aws.md` 13).
//!
//! Counters are kept here; gauges of the pool come from the published view when somebody asks. The metrics library would
//! rename every counter; the format itself is a page.

use super::introspect::View;
use crate::aws::{ec2, imds};
use crate::plan::core::Tally;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Series of one metric: a runaway label must not eat the memory.
const SERIES_MAX: usize = 1000;

/// Name, type and help of what is counted.
const COUNTERS: &[(&str, &str)] = &[
    ("awscni_add_ip_req_count", "requests for an address"),
    ("awscni_aws_api_error_count", "errors of AWS and IMDS calls by code"),
    ("awscni_connmark_reconcile_total", "updates of the host's SNAT and connmark rules"),
    ("awscni_del_ip_req_count", "requests to give an address back"),
    ("awscni_ec2api_error_count", "failed EC2 requests by action"),
    ("awscni_ec2api_req_count", "EC2 requests by action"),
    ("awscni_force_removed_enis", "ENIs removed while pods used them"),
    ("awscni_force_removed_ips", "addresses taken away from pods"),
    ("awscni_ipamd_error_count", "errors of the daemon by place"),
    ("awscni_no_available_ip_addresses", "requests that found no address"),
    ("awscni_reconcile_count", "ENIs and addresses taken in or dropped by the reconciliation"),
];

type Labels = Vec<(&'static str, String)>;

#[derive(Default)]
struct Kept {
    counters: BTreeMap<&'static str, BTreeMap<Labels, u64>>,
    // Sum in milliseconds and count of calls.
    latencies: BTreeMap<Labels, (f64, u64)>,
}

/// What the daemon has counted since its start.
#[derive(Default)]
pub(super) struct Metrics(Mutex<Kept>);

impl Metrics {
    pub(super) fn new() -> Metrics {
        let metrics = Metrics::default();
        // Present from the start with 0, so that a rate can be taken of the first one.
        for name in ["awscni_add_ip_req_count", "awscni_no_available_ip_addresses"] {
            metrics.add(name, Vec::new(), 0);
        }
        for name in ["awscni_force_removed_enis", "awscni_force_removed_ips"] {
            metrics.add(name, Vec::new(), 0);
        }
        for result in ["success", "error"] {
            metrics.add("awscni_connmark_reconcile_total", vec![("result", result.to_owned())], 0);
        }
        metrics
    }

    fn add(&self, name: &'static str, labels: Labels, by: u64) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let series = kept.counters.entry(name).or_default();
        if series.len() < SERIES_MAX || series.contains_key(&labels) {
            *series.entry(labels).or_default() += by;
        }
    }

    /// Something that the core counts.
    pub(super) fn count(&self, tally: Tally) {
        match tally {
            Tally::Add => self.add("awscni_add_ip_req_count", Vec::new(), 1),
            Tally::Del(reason) => self.add("awscni_del_ip_req_count", vec![("reason", reason)], 1),
            Tally::NoAddress(_) => self.add("awscni_no_available_ip_addresses", Vec::new(), 1),
            Tally::Error(place) => self.add("awscni_ipamd_error_count", vec![("fn", place.to_owned())], 1),
            Tally::Reconcile(what) => self.add("awscni_reconcile_count", vec![("fn", what.to_owned())], 1),
        }
    }

    /// The rules of the host were brought up to date, or could not be.
    pub(super) fn rules(&self, success: bool) {
        let result = if success { "success" } else { "error" };
        self.add("awscni_connmark_reconcile_total", vec![("result", result.to_owned())], 1);
    }

    /// A call to EC2 has ended.
    pub(super) fn ec2(&self, seen: &ec2::Observed<'_>) {
        let action = || vec![("fn", seen.action.to_owned())];
        self.add("awscni_ec2api_req_count", action(), 1);
        let code = seen.failure.map(|failure| failure.code.clone());
        if let Some(code) = &code {
            self.add("awscni_ec2api_error_count", action(), 1);
            let labels = vec![("api", seen.action.to_owned()), ("error", code.clone())];
            self.add("awscni_aws_api_error_count", labels, 1);
        }
        self.latency(seen.action, code, seen.took);
    }

    /// A read of IMDS has ended.
    pub(super) fn imds(&self, seen: &imds::Observed<'_>) {
        if seen.error.is_some() {
            let labels = vec![("api", "GetMetadata".to_owned()), ("error", "IMDSRequestError".to_owned())];
            self.add("awscni_aws_api_error_count", labels, 1);
        }
        self.latency("GetMetadata", seen.error.map(|_| String::new()), seen.took);
    }

    fn latency(&self, api: &str, error: Option<String>, took: Duration) {
        let failed = error.is_some().to_string();
        let status = error.unwrap_or_else(|| "200".to_owned());
        let labels = vec![("api", api.to_owned()), ("error", failed), ("status", status)];
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.latencies.len() < SERIES_MAX || kept.latencies.contains_key(&labels) {
            let (sum, count) = kept.latencies.entry(labels).or_default();
            *sum += took.as_secs_f64() * 1000.0;
            *count += 1;
        }
    }

    /// The page that Prometheus reads.
    pub(super) fn page(&self, view: &View) -> String {
        let mut page = String::new();
        {
            let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            for (name, help) in COUNTERS {
                head(&mut page, name, "counter", help);
                for (labels, value) in kept.counters.get(name).into_iter().flatten() {
                    line(&mut page, name, labels, value);
                }
            }
            let name = "awscni_aws_api_latency_ms";
            head(&mut page, name, "summary", "duration of AWS and IMDS calls in milliseconds");
            for (labels, (sum, count)) in &kept.latencies {
                line(&mut page, "awscni_aws_api_latency_ms_sum", labels, sum);
                line(&mut page, "awscni_aws_api_latency_ms_count", labels, count);
            }
        }
        for (name, help, value) in view.gauges() {
            head(&mut page, name, "gauge", help);
            line(&mut page, name, &[], &value);
        }
        head(&mut page, "awscni_assigned_ip_per_eni", "gauge", "addresses of the ENI that pods use");
        for (id, eni) in view.pool.enis() {
            line(&mut page, "awscni_assigned_ip_per_eni", &[("eni", id.0.clone())], &eni.assigned());
        }
        head(&mut page, "awscni_build_info", "gauge", "version of the program");
        let build = [("goversion", String::new()), ("version", crate::VERSION.to_owned())];
        line(&mut page, "awscni_build_info", &build, &1);
        head(&mut page, "awscni_connmark_backend", "gauge", "what holds the SNAT and connmark rules");
        line(&mut page, "awscni_connmark_backend", &[("backend", "nftables".to_owned())], &1);
        page
    }
}

// Writing to a string cannot fail.
fn head(page: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(page: &mut String, name: &str, labels: &[(&'static str, String)], value: &dyn std::fmt::Display) {
    let escape = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
    let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
    let _ = writeln!(page, "{name}{labels} {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_in_the_text_format() {
        let metrics = Metrics::new();
        metrics.count(Tally::Add);
        metrics.count(Tally::Del("Pod\"Deleted\n".into()));
        metrics.imds(&imds::Observed { path: "mac", error: None, took: Duration::from_millis(2) });
        let page = metrics.page(&View::default());
        for want in [
            "# TYPE awscni_add_ip_req_count counter\nawscni_add_ip_req_count 1\n",
            "awscni_del_ip_req_count{reason=\"Pod\\\"Deleted\\n\"} 1\n",
            "awscni_no_available_ip_addresses 0\n",
            "awscni_aws_api_latency_ms_sum{api=\"GetMetadata\",error=\"false\",status=\"200\"} 2\n",
            "awscni_aws_api_latency_ms_count{api=\"GetMetadata\",error=\"false\",status=\"200\"} 1\n",
            "# TYPE awscni_total_ip_addresses gauge\nawscni_total_ip_addresses 0\n",
        ] {
            assert!(page.contains(want), "{want:?} is missing in\n{page}");
        }
        let comments = page.lines().filter(|line| line.starts_with('#'));
        assert!(comments.clone().count() % 2 == 0 && page.ends_with('\n'));
    }

    #[test]
    fn labels_from_outside_have_a_bound() {
        let metrics = Metrics::new();
        for n in 0..2 * SERIES_MAX {
            metrics.count(Tally::Del(format!("reason {n}")));
        }
        let page = metrics.page(&View::default());
        assert_eq!(page.matches("awscni_del_ip_req_count{").count(), SERIES_MAX);
    }
}
