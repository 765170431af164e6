//! `enibox sandbox`: a cluster's network on this machine, with the real daemon and the real plugin, and every flow tried.
//! Data goes to standard output, progress to standard error; exit code 0 only if everything was as it should be.

use super::agents::{self, Agent, EVERY_CARD, Runtime, WiredPod};
use super::cluster::{self, ApiServer};
use super::controller::{self, BRANCHES_MAX, Trunk};
use super::egress::{self, Way};
use super::flows;
use super::given;
use super::kube::Kind;
use super::report::{NodeLine, PodLine, Report, count};
use super::runs;
use super::serve::kube::Kube;
use super::topology::{Node, Place};
use super::world::{Plan, World};
use crate::clock;
use crate::error::{Context, Error, List, Result, exit};
use crate::model::limits::{self, Limits};
use crate::model::order::Gather as _;
use crate::model::settings::{Mode, Settings};
use crate::sim::vpc::Wire;
use crate::sys;
use ipnet::IpNet;
use serde_json::json;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long the kernel may take to remove the links of namespaces that are gone.
const TEARDOWN_MAX: Duration = Duration::from_secs(5);

/// Pods on each node, at most; an instance type may carry fewer.
const PODS_MAX: u16 = 1000;

/// What the sandbox is asked to do.
#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Number of nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    nodes: u8,
    /// Pods on each node, up to 1000; flows are tried between some of them only where there are more than 100
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=i64::from(PODS_MAX)))]
    pods: u16,
    /// Instance type of the nodes
    #[arg(long, default_value = "m5.large")]
    instance_type: String,
    /// The pods' addresses
    #[arg(long, value_enum, default_value_t = Family::Ipv4)]
    family: Family,
    /// Chain the pods through egress-cni as well, as ENABLE_V6_EGRESS=true or ENABLE_V4_EGRESS=true does: they reach the other
    /// family through their node
    #[arg(long, value_enum)]
    egress: Option<Way>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Leave everything standing until Ctrl-C or `enibox sandbox down`
    #[arg(long)]
    keep: bool,
    /// A setting of the daemons, besides those of the sandbox; may be given several times
    #[arg(long = "set", value_name = "VAR=VALUE", value_parser = given::parse)]
    set: Vec<(String, String)>,
    /// The Kubernetes API server
    #[arg(long, value_enum, default_value_t = ApiServer::Answers)]
    api_server: ApiServer,
    /// Decides ids and addresses
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, clap::Subcommand)]
enum Command {
    /// End every sandbox of this machine and remove what killed ones have left
    Down,
}

/// The family of the pods' addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Family {
    /// IPv4
    Ipv4,
    /// IPv6
    Ipv6,
}

/// Runs the command; the exit code.
pub fn run(args: &Args) -> u8 {
    if sys::effective_uid() != 0 {
        eprintln!("enibox sandbox: needs root, for network namespaces: try sudo");
        return exit::FAILURE;
    }
    let result = match args.command {
        Some(Command::Down) => down(),
        None => demo(args),
    };
    match result {
        Ok(true) => exit::OK,
        Ok(false) => exit::FAILURE,
        Err(error) => {
            eprintln!("enibox sandbox: {error}");
            exit::FAILURE
        }
    }
}

fn down() -> Result<bool> {
    let home = Path::new(runs::HOME);
    let swept = runs::sweep(home)?;
    let ended = runs::down(home)?;
    say(&told_of(ended, swept));
    Ok(true)
}

// What `down` has done.
fn told_of(ended: usize, swept: usize) -> String {
    let ended = match ended {
        0 => "no sandbox was running".to_owned(),
        1 => "ended 1 sandbox".to_owned(),
        _ => format!("ended {ended} sandboxes"),
    };
    match swept {
        0 => ended,
        1 => format!("{ended}; removed what a killed one had left"),
        _ => format!("{ended}; removed what {swept} killed ones had left"),
    }
}

fn say(what: &str) {
    // Nobody need read it.
    let _ = writeln!(std::io::stderr(), "{what}");
}

// The signals are blocked in all threads, so one that came is found here and nowhere else.
fn going() -> Result<()> {
    match sys::wait_signal(Duration::ZERO)? {
        None => Ok(()),
        Some(_) => Err(Error::new("interrupted; everything is taken down")),
    }
}

fn demo(args: &Args) -> Result<bool> {
    let limits = limits::of(&args.instance_type)
        .ok_or_else(|| Error::new(format!("instance type {:?} is not known", args.instance_type)))?;
    let given = given(args);
    let settings = given::settings(&given);
    let egress = given::egress(&given, &settings, args.egress)?;
    if settings.needs_api_server() && args.api_server != ApiServer::Answers {
        let which = "ENABLE_POD_ENI, AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG and ANNOTATE_POD_IP";
        return Err(Error::new(format!("{which} need an API server that answers")));
    }
    // With custom networking the primary ENI serves no pods.
    let reserved = u32::from(settings.custom_networking);
    let room = match settings.mode_wished() {
        Mode::Ipv4Addresses => limits.pod_addresses(reserved, false),
        Mode::Ipv4Prefixes => limits.pod_addresses(reserved, true),
        Mode::Ipv6Prefixes => PODS_MAX.into(),
    };
    if u32::from(args.pods) > room {
        return Err(Error::new(format!("{} holds at most {room} pods", args.instance_type)));
    }
    // Before any thread is there. What is started gets an empty mask.
    sys::block_signals().context("block signals")?;
    // A pod takes several: its namespace, and again while flows are sent.
    sys::open_many_files().context("raise the limit of open files")?;
    let begin = clock::now().mono;
    let mut report = Report { skipped: given::untried(&given, &settings), ..Report::default() };
    let mut stage = Stage::build(args, &settings, &limits, egress)?;
    let mut result = stage.play(args, &settings, &mut report);
    if result.is_ok() && args.keep {
        report.took_s = clock::now().mono.since(begin).as_secs_f64();
        report.ok = report.flows.iter().all(|flow| flow.ok) && report.problems.is_empty();
        print(args, &report)?;
        stage.explain();
        while sys::wait_signal(Duration::from_hours(1))?.is_none() {}
        say("taking everything down");
    }
    // What went wrong first is what counts; the rest of the way down is gone all the same.
    let torn = stage.tear_down(&mut report);
    if result.is_ok() {
        result = torn;
    }
    result?;
    report.took_s = clock::now().mono.since(begin).as_secs_f64();
    report.ok = report.flows.iter().all(|flow| flow.ok) && report.problems.is_empty();
    if args.keep {
        for problem in &report.problems {
            say(&format!("PROBLEM  {problem}"));
        }
    } else {
        print(args, &report)?;
    }
    Ok(report.ok)
}

// The daemons' settings, as far as they are given here: what is set by name comes later and counts.
fn given(args: &Args) -> Vec<(String, String)> {
    let family = match args.family {
        Family::Ipv4 => &[][..],
        Family::Ipv6 => &["ENABLE_IPv6", "ENABLE_PREFIX_DELEGATION"],
    };
    let family = family.iter().map(|name| ((*name).to_owned(), "true".to_owned()));
    // What the guides of strict mode ask for; without pods of it, it changes nothing.
    let strict = args.set.iter().any(|(name, _)| name == "ENABLE_POD_ENI");
    let strict = strict.then(|| ("DISABLE_TCP_EARLY_DEMUX".to_owned(), "true".to_owned()));
    let egress = args.egress.map(|way| (way.setting().to_owned(), "true".to_owned()));
    family.chain(strict).chain(egress).chain(args.set.iter().cloned()).collect()
}

// What they mean for the source that others see.
fn expectation(settings: &Settings) -> flows::Expectation {
    let v6 = settings.mode_wished() == Mode::Ipv6Prefixes;
    let strict = settings.pod_security_groups_strict();
    flows::Expectation {
        v6,
        strict,
        snat: !settings.external_snat,
        excluded: settings.exclude_snat_cidrs.clone(),
        services: settings.external_service_cidrs.clone(),
        node_port: settings.node_port,
    }
}

fn print(args: &Args, report: &Report) -> Result<()> {
    let text = if args.json { format!("{}\n", serde_json::to_string_pretty(report)?) } else { format!("\n{report}") };
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("print the result")
}

/// Everything that stands while the demo runs. Dropped on an error, it takes daemons and network with it.
struct Stage {
    program: PathBuf,
    settings: Settings,
    egress: Option<Way>,
    // Daemons end before the world does.
    agents: Vec<Agent>,
    pods: Vec<Vec<WiredPod>>,
    nodes: Vec<Arc<Node>>,
    kube: Option<Arc<Kube>>,
    // Of each node, if pods get branch ENIs.
    trunks: Vec<Trunk>,
    world: World,
}

impl Stage {
    fn build(args: &Args, settings: &Settings, limits: &Limits, egress: Option<Way>) -> Result<Stage> {
        say(&format!("building a VPC with {} of type {}", count(args.nodes.into(), "node"), args.instance_type));
        let home = Path::new(runs::HOME);
        let plan = Plan { nodes: args.nodes.into(), instance_type: &args.instance_type, seed: args.seed, home };
        let mut world = World::create(&plan)?;
        let kube = cluster::prepare(&mut world, settings, limits, (args.api_server, args.pods.into()))?;
        let nodes = (0..world.nodes.len()).map(|index| world.node(index)).collect::<Result<Vec<_>>>()?;
        nodes.iter().try_for_each(|node| node.prepare(settings))?;
        // What runs is this very file, whatever happens to its name meanwhile.
        let program = PathBuf::from("/proc/self/exe");
        let settings = settings.clone();
        let (agents, pods, trunks) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Stage { program, settings, egress, agents, pods, nodes, kube, trunks, world })
    }

    fn play(&mut self, args: &Args, settings: &Settings, report: &mut Report) -> Result<()> {
        say("starting the daemon on each node");
        let logs = self.world.topology().run().logs();
        // What is given on the command line comes later and counts.
        let api_server = self.kube.as_ref().map(|_| cluster::endpoint());
        let env = api_server.into_iter().chain(given(args)).collect::<Vec<_>>();
        for node in &self.nodes {
            self.agents.push(Agent::start(&self.program, &logs, node, &env)?);
        }
        let mut ready = Vec::new();
        for (agent, node) in self.agents.iter_mut().zip(&self.nodes) {
            ready.push(agent.wait_ready(node, &going)?);
        }
        self.attach_trunks(args, report)?;
        let pods = usize::from(args.pods);
        say(&format!("adding {} to each node", count(pods, "pod")));
        let added = self.add_pods(pods)?;
        let mut errors = List::new();
        for (pods, error) in added {
            self.pods.push(pods);
            errors.note(error);
        }
        errors.into_result()?;
        self.check_addresses(report);
        say("sending tcp and udp along every path");
        if pods > flows::SAMPLE {
            let of = flows::SAMPLE;
            report
                .skipped
                .push(format!("flows: between {of} of the {pods} pods of each node, spread evenly among them"));
        }
        report.flows = flows::run(&self.world, &self.pods, &expectation(settings), &going)?;
        if let Some(way) = self.egress {
            say("sending tcp, udp and icmp through the node in the other family");
            report.flows.extend(egress::run(&self.world, &self.pods, way, &going)?);
        }
        self.describe(args, &ready, report);
        say("asking the doctor");
        for (node, pods) in self.nodes.iter().zip(&self.pods) {
            let found = agents::doctor(&self.program, node, &env, pods.len())?;
            // What is wrong with a setting that was given here is told once, and no fault of the network.
            let told = |found: &String| report.skipped.iter().any(|skipped| found.ends_with(skipped));
            let found = found.into_iter().filter(|found| !told(found)).collect::<Vec<_>>();
            report.problems.extend(found);
        }
        Ok(())
    }

    // For security groups of pods. Without VLAN links in the kernel there are none.
    fn attach_trunks(&mut self, args: &Args, report: &mut Report) -> Result<()> {
        let Some(kube) = self.kube.as_ref().filter(|_| self.settings.pod_eni) else {
            return Ok(());
        };
        let mut skip = |why: String| report.skipped.push(format!("ENABLE_POD_ENI: {why}, so no pod gets a branch ENI"));
        if !limits::takes_trunk(&args.instance_type) {
            skip(format!("{} takes no trunk ENI", args.instance_type));
            return Ok(());
        }
        let takes_branches = self.world.topology().takes_branches()?;
        if !takes_branches {
            skip("there is no vlan device in this kernel".into());
        }
        say("attaching a trunk ENI to each node, for every second pod");
        for node in &self.world.nodes {
            let trunk = controller::attach(&self.world, kube, node, &going)?;
            self.trunks.extend(takes_branches.then_some(trunk));
        }
        Ok(())
    }

    fn runtime<'a>(&'a self, logs: &'a Path, at: usize, node: &'a Node) -> Runtime<'a> {
        let egress = self.egress.map(|way| self.world.nodes[at].at(way.is_v6()));
        Runtime { program: &self.program, logs, node, settings: &self.settings, egress }
    }

    // On nodes with several network cards every second pod wants them all.
    fn annotations(&self, number: usize) -> &[(&str, &str)] {
        if self.settings.multi_nic && number % 2 == 1 { &[EVERY_CARD] } else { &[] }
    }

    // All nodes at once, the pods of a node one after the other. A failure leaves the pods that are there.
    fn add_pods(&self, count: usize) -> Result<Vec<(Vec<WiredPod>, Result<()>)>> {
        let logs = self.world.topology().run().logs();
        let add = |(at, node): (usize, &Node)| {
            let runtime = self.runtime(&logs, at, node);
            let mut pods = Vec::new();
            for number in 1..=count {
                let name = format!("pod-{number}");
                let trunk = self.trunks.get(at).filter(|_| number % 2 == 0 && number <= 2 * BRANCHES_MAX);
                if let Some(kube) = &self.kube {
                    let spec = trunk.map_or_else(|| json!({}), |_| controller::wish());
                    kube.change(|api| api.add_pod(&node.place.name, &name, &node.place.name, &spec));
                }
                let branch = trunk.map_or(Ok(()), |trunk| trunk.branch(&node.place.name, &name));
                match branch.and_then(|()| going()).and_then(|()| runtime.add(&name, self.annotations(number))) {
                    Ok(pod) => pods.push(pod),
                    Err(error) => return (pods, Err(error)),
                }
            }
            (pods, Ok(()))
        };
        std::thread::scope(|scope| {
            let workers = self.nodes.iter().enumerate();
            let workers = workers.map(|(at, node)| scope.spawn(move || add((at, node)))).collect::<Vec<_>>();
            let finish = |worker: std::thread::ScopedJoinHandle<'_, _>| {
                worker.join().map_err(|_| Error::new("adding pods panicked"))
            };
            workers.into_iter().map(finish).collect()
        })
    }

    // An address belongs to one pod, and EC2 has assigned it to the pod's node; the interfaces of a pod are on network
    // cards in ascending order.
    fn check_addresses(&self, report: &mut Report) {
        let mut seen = crate::model::map::Map::new();
        let wires = self.world.cloud.vpc().wires();
        for (node, pods) in self.world.nodes.iter().zip(&self.pods) {
            for pod in pods {
                let name = format!("{}/{}", node.name, pod.name);
                let mut cards = Vec::new();
                for address in addresses_of(pod) {
                    let here = |wire: &&Wire| wire.instance == node.instance && has(wire, address);
                    match wires.iter().find(here) {
                        Some(wire) => cards.push(wire.card),
                        None => report.problems.push(format!("{name} has {address}, which is not its node's")),
                    }
                    if let Some(other) = seen.insert(address, name.clone()) {
                        report.problems.push(format!("{name} and {other} have the same address {address}"));
                    }
                }
                if !cards.is_sorted_by(|one, next| one < next) {
                    report.problems.push(format!("{name} has interfaces on network cards {cards:?}"));
                }
            }
        }
    }

    fn describe(&self, args: &Args, ready: &[Duration], report: &mut Report) {
        let millis = |duration: &Duration| (duration.as_secs_f64() * 10_000.0).round() / 10.0;
        let vpc = self.world.cloud.vpc();
        let wires = vpc.wires();
        let v6 = self.settings.mode_wished() == Mode::Ipv6Prefixes;
        let of_pods = |net: &&IpNet| net.addr().is_ipv6() == v6;
        let size = |net: &IpNet| 1_u64 << (net.max_prefix_len() - net.prefix_len()).min(63);
        for (node, ready) in self.world.nodes.iter().zip(ready) {
            let here = wires.iter().filter(|wire| wire.instance == node.instance && wire.trunk.is_none());
            let here = here.collect::<Vec<_>>();
            let addresses = here.iter().flat_map(|wire| &wire.assigned).filter(of_pods).map(size).sum::<u64>();
            let own = here.iter().filter(|wire| !v6 || wire.own_v6.is_some()).count() as u64;
            report.nodes.push(NodeLine {
                name: node.name.clone(),
                instance_type: args.instance_type.clone(),
                address: node.at(v6).to_string(),
                ready_ms: millis(ready),
                enis: here.len(),
                addresses: addresses - own,
            });
        }
        for (node, pods) in self.world.nodes.iter().zip(&self.pods) {
            for pod in pods {
                let wire = wires.iter().find(|wire| has(wire, pod.address));
                report.pods.push(PodLine {
                    node: node.name.clone(),
                    name: pod.name.clone(),
                    ip: pod.address.to_string(),
                    eni: wire.map(|wire| wire.eni.to_string()).unwrap_or_default(),
                    add_ms: millis(&pod.add),
                });
            }
        }
        report.ec2_calls = vpc.journal().counts().iter().map(|(action, count)| ((*action).to_owned(), *count)).gather();
        report.imds_requests = self.world.cloud.imds_requests();
    }

    // Deletes the pods, looks for what is left of them, ends the daemons.
    fn tear_down(&mut self, report: &mut Report) -> Result<()> {
        say("deleting the pods and looking for leftovers");
        let logs = self.world.topology().run().logs();
        let mut errors = List::new();
        for (at, pods) in std::mem::take(&mut self.pods).into_iter().enumerate() {
            let node = &self.nodes[at];
            let egress = pods.iter().filter_map(|pod| pod.egress);
            let addresses = pods.iter().flat_map(addresses_of).chain(egress).collect::<Vec<_>>();
            let runtime = self.runtime(&logs, at, node);
            for pod in pods {
                if let Some(kube) = &self.kube {
                    kube.change(|api| api.remove(Kind::Pod, &node.place.name, &pod.name));
                }
                errors.note(runtime.delete(pod));
            }
            let traces =
                errors.note(traces_that_stay(&node.place, &self.settings.veth_prefix, &addresses)).unwrap_or_default();
            report.problems.extend(traces.into_iter().map(|trace| format!("left over on {trace}")));
            if let Some(way) = self.egress {
                let files = errors.note(egress::files(node, way)).unwrap_or_default();
                report
                    .problems
                    .extend(files.iter().map(|file| format!("left over on {}: file {file}", node.place.name)));
            }
        }
        for agent in self.agents.drain(..) {
            errors.note(agent.stop());
        }
        report.problems.extend(self.world.cloud.complaints());
        errors.into_result()
    }

    fn explain(&self) {
        let topology = self.world.topology();
        let run = topology.run().path().display();
        say("\nIt stands until Ctrl-C, or until `enibox sandbox down` from elsewhere. To look around:");
        for (node, agent) in self.world.nodes.iter().zip(&self.agents) {
            let name = &node.name;
            say(&format!(
                "  nsenter --net={run}/netns/{name} --mount={run}/mnt/{name} sh   # {name}, daemon {}",
                agent.pid()
            ));
        }
        if let Some((node, pod)) = self.world.nodes.first().zip(self.pods.first().and_then(|pods| pods.first())) {
            let (name, path) = (&node.name, pod.pod.path.display());
            say(&format!(
                "  nsenter --mount={run}/mnt/{name} nsenter --net={path} sh   # pod {name}/{} with {}",
                pod.name, pod.address
            ));
        }
        say(&format!("  nsenter --net={run}/netns/router sh   # the VPC's router\n  ls {run}/log"));
    }
}

fn has(wire: &Wire, address: IpAddr) -> bool {
    wire.assigned.iter().any(|net| net.contains(&address))
}

fn addresses_of(pod: &WiredPod) -> impl Iterator<Item = IpAddr> + '_ {
    std::iter::once(pod.address).chain(pod.further.iter().map(|(_, address)| *address))
}

/// What is left of pods once the kernel had time to take down their namespaces, and with them their veths.
fn traces_that_stay(node: &Place, prefix: &str, addresses: &[IpAddr]) -> Result<Vec<String>> {
    let end = clock::instant() + TEARDOWN_MAX;
    loop {
        let traces = node.traces(prefix, addresses)?;
        if traces.is_empty() || clock::instant() > end {
            return Ok(traces);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::told_of;

    #[test]
    fn what_down_has_done_reads_well() {
        for (ended, swept, expected) in [
            (0, 0, "no sandbox was running"),
            (1, 0, "ended 1 sandbox"),
            (0, 1, "no sandbox was running; removed what a killed one had left"),
            (2, 3, "ended 2 sandboxes; removed what 3 killed ones had left"),
        ] {
            assert_eq!(told_of(ended, swept), expected);
        }
    }
}
