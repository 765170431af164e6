//! Prometheus metrics in the text format 0.0.4, under the original's names (`spec/ipamd.md` 12, `spec/aws.md` 13).
//!
//! Counters are kept here; gauges of the pool come from the published view when somebody asks. The metrics library would
//! rename every counter; the format itself is a page.

use super::introspect::View;
use super::pulse::Pulse;
use crate::aws::{ec2, imds};
use crate::clock;
use crate::model::map::Map;
use crate::model::time::{Mono, Now, Wall};
use crate::plan::core::Tally;
use crate::plan::host::What;
use crate::plan::pool::Cidr;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Series of one metric: a runaway label must not eat the memory.
const SERIES_MAX: usize = 1000;
/// Causes of errors that are kept apart.
const CAUSES_MAX: usize = 64;
/// Repairs that operators are shown.
const REPAIRS_MAX: usize = 16;

/// Name and help of what is counted, and the labels that are there from the start with 0, so that a rate can be taken of
/// the first event.
const COUNTERS: &[(&str, &str, Start)] = &[
    ("awscni_add_ip_req_count", "requests for an address", Start::Plain),
    ("awscni_aws_api_error_count", "errors of AWS and IMDS calls by code", Start::Absent),
    ("awscni_aws_utils_error_count", "unhandled errors of EC2 by place and code", Start::Absent),
    ("awscni_connmark_reconcile_total", "updates of the host's SNAT and connmark rules", Start::Results),
    ("awscni_del_ip_req_count", "requests to give an address back", Start::Absent),
    ("awscni_ec2api_error_count", "failed EC2 requests by action", Start::Absent),
    ("awscni_ec2api_req_count", "EC2 requests by action", Start::Absent),
    ("awscni_force_removed_enis", "ENIs removed while pods used them", Start::Plain),
    ("awscni_force_removed_ips", "addresses taken away from pods", Start::Plain),
    ("awscni_ipamd_error_count", "errors of the daemon by place", Start::Absent),
    ("awscni_no_available_ip_addresses", "requests that found no address", Start::Plain),
    ("awscni_pod_eni_error_count", "errors with ENIs of pods by place", Start::Absent),
    ("awscni_reconcile_count", "ENIs and addresses taken in or dropped by the reconciliation", Start::Absent),
    ("awscni_repairs_total", "what others had changed of the host's network and was put back", Start::Absent),
    ("enibox_add_refused_total", "requests that found no address by cause", Start::Absent),
    ("enibox_host_looks_total", "looks at the host's whole network by cause", Start::Absent),
    (
        "enibox_repairs_failed_total",
        "changes of the host's network that could not be made, or must not be",
        Start::Absent,
    ),
    ("enibox_repairs_held_total", "repairs left to the next regular look because others undo them", Start::Absent),
];

#[derive(Clone, Copy)]
enum Start {
    Absent,
    Plain,
    Results,
}

/// Name and help of what is measured in seconds.
const HISTOGRAMS: &[(&str, &str)] = &[
    ("awscni_ipamd_node_initialization_duration_seconds", "from the first look at the node to the readiness to serve"),
    ("awscni_ipamd_startup_duration_seconds", "from the start of the process to the readiness to serve"),
    ("enibox_add_wait_seconds", "from a request for an address to its answer"),
];

/// Upper bounds in seconds; the original's, and three for starts that wait (`spec/operations.md` 2.2).
const BOUNDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// Places of [`Tally::Error`] that belong to ENIs of pods.
const POD_ENI_PLACES: [&str; 2] = ["nodeInit", "tryEnableSecurityGroupsForPods"];

type Labels = Vec<(&'static str, String)>;

#[derive(Default)]
struct Histogram {
    below: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

/// The last error with one cause.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    pub(super) count: u64,
    pub(super) last: Wall,
    pub(super) text: String,
}

/// Something of the host's network that others had changed.
#[derive(Clone, Debug)]
pub(super) struct Repair {
    pub(super) at: Wall,
    pub(super) what: &'static str,
    pub(super) text: String,
}

#[derive(Default)]
struct Kept {
    counters: Map<&'static str, Map<Labels, u64>>,
    // Sum in milliseconds and count of calls.
    latencies: Map<Labels, (f64, u64)>,
    histograms: Map<(&'static str, Labels), Histogram>,
    troubles: Map<String, Trouble>,
    repairs: VecDeque<Repair>,
    initialising: Option<Mono>,
    legacy: bool,
}

/// What the daemon has counted since its start.
pub(super) struct Metrics {
    kept: Mutex<Kept>,
    pub(super) start: Now,
    pub(super) pulse: Pulse,
}

impl Metrics {
    pub(super) fn new() -> Metrics {
        let metrics = Metrics { kept: Mutex::default(), start: clock::now(), pulse: Pulse::default() };
        for (name, _, start) in COUNTERS {
            match start {
                Start::Absent => {}
                Start::Plain => metrics.add(name, Vec::new(), 0),
                Start::Results => {
                    metrics.add(name, vec![("result", "error".to_owned())], 0);
                    metrics.add(name, vec![("result", "success".to_owned())], 0);
                }
            }
        }
        metrics
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, name: &'static str, labels: Labels, by: u64) {
        let mut kept = self.kept();
        let series = kept.counters.entry(name).or_default();
        if series.len() < SERIES_MAX || series.contains_key(&labels) {
            *series.entry(labels).or_default() += by;
        }
    }

    fn measure(&self, name: &'static str, labels: Labels, took: Duration) {
        let mut kept = self.kept();
        let histogram = kept.histograms.entry((name, labels)).or_default();
        let seconds = took.as_secs_f64();
        histogram.count += 1;
        histogram.sum += seconds;
        for (below, bound) in histogram.below.iter_mut().zip(BOUNDS) {
            *below += u64::from(seconds <= bound);
        }
    }

    /// Something that the core counts.
    pub(super) fn count(&self, tally: Tally) {
        match tally {
            Tally::Add => self.add("awscni_add_ip_req_count", Vec::new(), 1),
            Tally::Del(reason) => self.add("awscni_del_ip_req_count", vec![("reason", reason)], 1),
            Tally::NoAddress(cause) => {
                self.add("awscni_no_available_ip_addresses", Vec::new(), 1);
                self.add("enibox_add_refused_total", vec![("cause", cause.to_owned())], 1);
                self.trouble(format!("refused: {cause}"), "a new pod got no address".into());
            }
            Tally::Error(place) => {
                let pods = POD_ENI_PLACES.contains(&place);
                let name = if pods { "awscni_pod_eni_error_count" } else { "awscni_ipamd_error_count" };
                self.add(name, vec![("fn", place.to_owned())], 1);
            }
            Tally::Reconcile(what) => self.add("awscni_reconcile_count", vec![("fn", what.to_owned())], 1),
        }
    }

    /// The core begins to look at the node.
    pub(super) fn initialising(&self) {
        self.kept().initialising = Some(clock::now().mono);
    }

    /// Requests are served from now on; whether the API server had told of our node by then.
    pub(super) fn started(&self, with_api_server: bool) {
        let now = clock::now().mono;
        let since = self.kept().initialising.unwrap_or(now);
        let success = || ("success", "true".to_owned());
        self.measure("awscni_ipamd_node_initialization_duration_seconds", vec![success()], now.since(since));
        let api_server = ("with_api_server", with_api_server.to_string());
        let labels = vec![success(), api_server, ("failure_reason", String::new())];
        self.measure("awscni_ipamd_startup_duration_seconds", labels, now.since(self.start.mono));
    }

    /// A request for an address was answered.
    pub(super) fn answered(&self, success: bool, took: Duration) {
        self.measure("enibox_add_wait_seconds", vec![("success", success.to_string())], took);
    }

    /// The tables of the packet filter were set, or could not be.
    pub(super) fn rules(&self, success: bool) {
        let result = if success { "success" } else { "error" };
        self.add("awscni_connmark_reconcile_total", vec![("result", result.to_owned())], 1);
    }

    /// The host's network could not be made what it should be.
    pub(super) fn host_failed(&self, error: String) {
        self.trouble("host network".into(), error);
    }

    /// Whether rules of a former installation are in `iptables-legacy`.
    pub(super) fn legacy(&self, present: bool) {
        self.kept().legacy = present;
    }

    /// The host's network is looked at, because the core asked for it or the kernel told of a change.
    pub(super) fn host_look(&self, regular: bool) {
        let cause = if regular { "core" } else { "notice" };
        self.add("enibox_host_looks_total", vec![("cause", cause.to_owned())], 1);
    }

    /// Something of ours that others had changed was put back.
    pub(super) fn repaired(&self, what: What, text: &str) {
        self.add("awscni_repairs_total", vec![("what", what.name().to_owned())], 1);
        let mut kept = self.kept();
        if kept.repairs.len() >= REPAIRS_MAX {
            kept.repairs.pop_front();
        }
        kept.repairs.push_back(Repair { at: clock::now().wall, what: what.name(), text: text.to_owned() });
    }

    /// Something was not put back, because others undo it again and again.
    pub(super) fn repair_held(&self, what: What) {
        self.add("enibox_repairs_held_total", vec![("what", what.name().to_owned())], 1);
    }

    /// A change for one pod failed, or would have met what is not ours.
    pub(super) fn repair_failed(&self, what: What) {
        self.add("enibox_repairs_failed_total", vec![("what", what.name().to_owned())], 1);
    }

    /// The last repairs, the oldest first.
    pub(super) fn repairs(&self) -> Vec<Repair> {
        self.kept().repairs.iter().cloned().collect()
    }

    /// A call to EC2 has ended.
    pub(super) fn ec2(&self, seen: &ec2::Observed<'_>) {
        let action = || vec![("fn", seen.action.to_owned())];
        self.add("awscni_ec2api_req_count", action(), 1);
        let code = seen.failure.map(|failure| failure.code.clone());
        if let (Some(code), Some(failure)) = (&code, seen.failure) {
            self.add("awscni_ec2api_error_count", action(), 1);
            let labels = vec![("api", seen.action.to_owned()), ("error", code.clone())];
            self.add("awscni_aws_api_error_count", labels, 1);
            if seen.action == "DeleteNetworkInterface" {
                let labels = vec![("fn", "FreeENIDeleteErr".to_owned()), ("error", code.clone())];
                self.add("awscni_aws_utils_error_count", labels, 1);
            }
            self.trouble(format!("ec2: {} {code}", seen.action), failure.message.clone());
        }
        let api = match seen.action {
            "AssignIpv6Addresses" => "AssignIpv6AddressesWithContext",
            action => action,
        };
        self.latency(api, code, seen.took);
    }

    /// A read of IMDS has ended.
    pub(super) fn imds(&self, seen: &imds::Observed<'_>) {
        if let Some(error) = seen.error {
            let labels = vec![("api", getter(seen.path).to_owned()), ("error", "IMDSRequestError".to_owned())];
            self.add("awscni_aws_api_error_count", labels, 1);
            self.trouble("imds".into(), error.to_string());
        }
        self.latency("GetMetadata", seen.error.map(|_| String::new()), seen.took);
    }

    fn latency(&self, api: &str, error: Option<String>, took: Duration) {
        let failed = error.is_some().to_string();
        let status = error.unwrap_or_else(|| "200".to_owned());
        let labels = vec![("api", api.to_owned()), ("error", failed), ("status", status)];
        let mut kept = self.kept();
        if kept.latencies.len() < SERIES_MAX || kept.latencies.contains_key(&labels) {
            let (sum, count) = kept.latencies.entry(labels).or_default();
            *sum += took.as_secs_f64() * 1000.0;
            *count += 1;
        }
    }

    fn trouble(&self, cause: String, text: String) {
        let mut kept = self.kept();
        if kept.troubles.len() < CAUSES_MAX || kept.troubles.contains_key(&cause) {
            let count = kept.troubles.get(&cause).map_or(0, |trouble| trouble.count) + 1;
            kept.troubles.insert(cause, Trouble { count, last: clock::now().wall, text });
        }
    }

    /// Tells of threads that make no progress.
    pub(super) fn look_after_threads(&self) {
        for line in self.pulse.look(clock::now().mono) {
            log::error!("{line}");
            self.trouble("threads".into(), line);
        }
    }

    /// The last error of each cause.
    pub(super) fn troubles(&self) -> Map<String, Trouble> {
        self.kept().troubles.clone()
    }

    /// The page that Prometheus reads.
    pub(super) fn page(&self, view: &View) -> String {
        let mut page = String::new();
        {
            let kept = self.kept();
            for (name, help, _) in COUNTERS {
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
            let name = "awscni_legacy_rules_present";
            head(&mut page, name, "gauge", "rules of a former installation are in iptables-legacy");
            line(&mut page, name, &[], &u8::from(kept.legacy));
            for (name, help) in HISTOGRAMS {
                head(&mut page, name, "histogram", help);
                for ((_, labels), histogram) in kept.histograms.iter().filter(|((kind, _), _)| kind == name) {
                    histogram.print(&mut page, name, labels);
                }
            }
        }
        let name = "enibox_thread_held_seconds";
        head(&mut page, name, "gauge", "for how long the thread has had work and made no progress");
        for (thread, held) in self.pulse.held(clock::now().mono) {
            line(&mut page, name, &[("thread", thread.to_owned())], &held.as_secs_f64());
        }
        for (name, help, value) in view.gauges() {
            head(&mut page, name, "gauge", help);
            line(&mut page, name, &[], &value);
        }
        labelled(&mut page, view);
        process(&mut page, self.start.wall);
        page
    }
}

impl Histogram {
    fn print(&self, page: &mut String, name: &str, labels: &Labels) {
        let bounds = BOUNDS.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        for (bound, below) in bounds.zip(self.below.iter().chain([&self.count])) {
            let mut labels = labels.clone();
            labels.push(("le", bound));
            line(page, &format!("{name}_bucket"), &labels, below);
        }
        line(page, &format!("{name}_sum"), labels, &self.sum);
        line(page, &format!("{name}_count"), labels, &self.count);
    }
}

// Gauges with labels, all of them from the view: a series goes with its object.
fn labelled(page: &mut String, view: &View) {
    head(page, "awscni_assigned_ip_per_eni", "gauge", "addresses of the ENI that pods use");
    for (id, eni) in view.pool.enis() {
        line(page, "awscni_assigned_ip_per_eni", &[("eni", id.0.clone())], &eni.assigned());
    }
    let name = "awscni_assigned_ip_per_cidr";
    head(page, name, "gauge", "addresses of the CIDR that pods use; CIDRs that were never used are left out");
    let cidrs = view.pool.enis().flat_map(|(_, eni)| eni.cidrs());
    for (net, cidr) in cidrs.filter(|(_, cidr)| Cidr::slots(cidr).next().is_some()) {
        line(page, name, &[("cidr", net.to_string())], &cidr.assigned());
    }
    let name = "awscni_ipamd_action_inprogress";
    head(page, name, "gauge", "what the daemon is doing");
    for (doing, count) in view.doing() {
        line(page, name, &[("fn", doing.to_owned())], &count);
    }
    let name = "enibox_subnet_free_addresses";
    head(page, name, "gauge", "free addresses of the subnet when EC2 last told");
    for (subnet, free, _) in view.status.iter().flat_map(|status| &status.subnets) {
        line(page, name, &[("subnet", subnet.0.clone())], free);
    }
    head(page, "awscni_build_info", "gauge", "version of the program");
    let build = [("goversion", String::new()), ("version", crate::VERSION.to_owned())];
    line(page, "awscni_build_info", &build, &1);
    head(page, "awscni_connmark_backend", "gauge", "what holds the SNAT and connmark rules");
    line(page, "awscni_connmark_backend", &[("backend", "nftables".to_owned())], &1);
}

// What the client libraries of Prometheus tell of a process. A figure that cannot be read is left out.
fn process(page: &mut String, start: Wall) {
    const TICKS: f64 = 100.0; // USER_HZ of every architecture (proc(5))
    let mut tell = |name, kind, help, value: Option<f64>| {
        if let Some(value) = value {
            head(page, name, kind, help);
            line(page, name, &[], &value);
        }
    };
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name of the program, in parentheses, may hold blanks; utime and stime are fields 14 and 15 (proc(5)).
    let mut times = text.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11);
    let mut time = || times.next()?.parse::<f64>().ok();
    let cpu = time().zip(time()).map(|(user, system)| (user + system) / TICKS);
    tell("process_cpu_seconds_total", "counter", "CPU time in seconds", cpu);
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let rss =
        text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    tell("process_resident_memory_bytes", "gauge", "resident memory in bytes", rss.map(|kib| kib * 1024.0));
    let files = fs::read_dir("/proc/self/fd").ok().and_then(|files| u32::try_from(files.count()).ok());
    tell("process_open_fds", "gauge", "open files", files.map(f64::from));
    let start = Duration::from_nanos(u64::try_from(start.as_unix_nanos()).unwrap_or(0));
    tell("process_start_time_seconds", "gauge", "start of the process in Unix time", Some(start.as_secs_f64()));
}

// The original's names for what is read of IMDS (`spec/operations.md` 2.1).
fn getter(path: &str) -> &'static str {
    match path.rsplit('/').find(|part| !part.is_empty()).unwrap_or_default() {
        "availability-zone" => "GetAZ",
        "local-ipv4" => "GetLocalIPv4",
        "local-ipv4s" => "GetLocalIPv4s",
        "ipv6" => "GetLocalIPv6",
        "ipv6s" => "GetIPv6s",
        "instance-id" => "GetInstanceID",
        "instance-type" => "GetInstanceType",
        "mac" => "GetMAC",
        "macs" => "GetMACs",
        "interface-id" => "GetInterfaceID",
        "subnet-id" => "GetSubnetID",
        "vpc-id" => "GetVpcID",
        "device-number" => "GetDeviceNumber",
        "network-card" => "GetNetworkCard",
        "subnet-ipv4-cidr-block" => "GetSubnetIPv4CIDRBlock",
        "subnet-ipv6-cidr-blocks" => "GetSubnetIPv6CIDRBlocks",
        "ipv4-prefix" => "GetIPv4Prefixes",
        "ipv6-prefix" => "GetIPv6Prefixes",
        "security-group-ids" => "GetSecurityGroupIDs",
        "vpc-ipv4-cidr-blocks" => "GetVPCIPv4CIDRBlocks",
        "vpc-ipv6-cidr-blocks" => "GetVPCIPv6CIDRBlocks",
        last if last.matches(':').count() == 5 => "GetMACImdsFields",
        _ => "GetMetadata",
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
        let lost = imds::ImdsError { path: "macs".into(), status: 0, what: "no answer".into() };
        metrics.imds(&imds::Observed { path: "network/interfaces/macs/", error: Some(&lost), took: Duration::ZERO });
        metrics.count(Tally::NoAddress("eni_limit"));
        metrics.count(Tally::Error("tryEnableSecurityGroupsForPods"));
        metrics.count(Tally::Error("decreaseIPPool"));
        metrics.answered(true, Duration::from_millis(200));
        metrics.answered(true, Duration::from_secs(200));
        let page = metrics.page(&View::default());
        for want in [
            "# TYPE awscni_add_ip_req_count counter\nawscni_add_ip_req_count 1\n",
            "awscni_del_ip_req_count{reason=\"Pod\\\"Deleted\\n\"} 1\n",
            "awscni_no_available_ip_addresses 1\n",
            "awscni_aws_api_latency_ms_sum{api=\"GetMetadata\",error=\"false\",status=\"200\"} 2\n",
            "awscni_aws_api_latency_ms_count{api=\"GetMetadata\",error=\"false\",status=\"200\"} 1\n",
            "# TYPE awscni_total_ip_addresses gauge\nawscni_total_ip_addresses 0\n",
            "enibox_add_refused_total{cause=\"eni_limit\"} 1\n",
            "awscni_pod_eni_error_count{fn=\"tryEnableSecurityGroupsForPods\"} 1\n",
            "awscni_ipamd_error_count{fn=\"decreaseIPPool\"} 1\n",
            "# TYPE enibox_add_wait_seconds histogram\nenibox_add_wait_seconds_bucket{success=\"true\",le=\"0.005\"} 0\n",
            "enibox_add_wait_seconds_bucket{success=\"true\",le=\"0.25\"} 1\n",
            "enibox_add_wait_seconds_bucket{success=\"true\",le=\"+Inf\"} 2\n",
            "enibox_add_wait_seconds_sum{success=\"true\"} 200.2\nenibox_add_wait_seconds_count{success=\"true\"} 2\n",
            "awscni_ipamd_action_inprogress{fn=\"increaseDatastorePool\"} 0\n",
            "enibox_thread_held_seconds{thread=\"kernel\"} 0\n",
            "awscni_aws_api_error_count{api=\"GetMACs\",error=\"IMDSRequestError\"} 1\n",
            "# TYPE process_resident_memory_bytes gauge\n",
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
