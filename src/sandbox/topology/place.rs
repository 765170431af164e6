//! Namespaces of the topology: hosts, nodes and pods. All are held by open descriptors, so that they end with the process
//! whatever happens to it; nothing is mounted in the host's mount namespace.

use crate::error::{Context, Result};
use crate::model::naming;
use crate::model::net::{Address, Family, Link, Route, Rule, Scope, TABLE_MAIN};
use crate::model::settings::Settings;
use crate::netlink::netns::Namespace;
use crate::netlink::socket::Socket;
use crate::netlink::{addr, link, route, rule, sysctl};
use crate::plan::egress;
use crate::sandbox::runs::Run;
use crate::sys;
use ipnet::IpNet;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A network namespace of its own.
#[derive(Debug)]
pub struct Place {
    /// Name, for people.
    pub name: String,
    /// The namespace.
    pub net: Namespace,
}

// Runs `work` on a thread of its own, for work that changes the thread's namespaces.
fn aside<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new().name("namespace".into()).spawn_scoped(scope, work)?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

impl Place {
    /// A fresh namespace with `lo` up, named in the run's directory.
    pub fn create(run: &Run, name: &str) -> Result<Place> {
        let what = || format!("create namespace {name}");
        let net = aside(|| {
            sys::unshare_netns()?;
            Namespace::own()
        })
        .with_context(what)?;
        run.name("netns", name, &net)?;
        let place = Place { name: name.to_owned(), net };
        place.set_lo_up().with_context(what)?;
        Ok(place)
    }

    fn set_lo_up(&self) -> Result<()> {
        let mut socket = self.socket()?;
        match link::by_name(&mut socket, "lo")? {
            Some(lo) => socket.run(&[link::set_up(lo.index)]),
            None => Ok(()),
        }
    }

    /// A handle of one's own on the namespace.
    pub fn handle(&self) -> Result<Namespace> {
        let path = format!("/proc/self/fd/{}", self.net.as_fd().as_raw_fd());
        Namespace::open(path).with_context(|| self.name.clone())
    }

    /// A route netlink socket inside.
    pub fn socket(&self) -> Result<Socket> {
        Socket::route_in(&self.net).with_context(|| format!("in {}", self.name))
    }

    /// The link of this name inside.
    pub fn link(&self, name: &str) -> Result<Option<Link>> {
        link::by_name(&mut self.socket()?, name).with_context(|| format!("in {}", self.name))
    }

    /// All links inside but `lo`.
    pub fn links(&self) -> Result<Vec<Link>> {
        let mut links = link::list(&mut self.socket()?).with_context(|| format!("in {}", self.name))?;
        links.retain(|link| link.name != "lo");
        Ok(links)
    }

    /// Sets sysctls inside; those that this kernel lacks are passed over.
    pub fn sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        let set = || {
            settings.iter().try_for_each(|(path, value)| match sysctl::set(path, value) {
                Err(error) if !sysctl::missing(&error) => Err(error),
                _ => Ok(()),
            })
        };
        self.net.run(set)?.with_context(|| format!("in {}", self.name))
    }

    /// Whether this kernel has IPv6; with `ipv6.disable=1` it has not.
    pub fn has_v6(&self) -> Result<bool> {
        self.net.run(|| sysctl::read("net/ipv6/conf/all/disable_ipv6").is_ok()).with_context(|| self.name.clone())
    }

    /// Gives a link that is there an address, sets it up, and makes it the default route (through `gateway`, or to
    /// everything as if it were on the link).
    pub fn configure(&self, name: &str, address: IpNet, gateway: Option<IpAddr>) -> Result<()> {
        let what = || format!("configure {name} in {}", self.name);
        let mut socket = self.socket()?;
        let dev = link::by_name(&mut socket, name)
            .and_then(|found| found.ok_or_else(|| crate::error::Error::new("no such link")))
            .with_context(what)?
            .index;
        let (dst, no_dad) = match address {
            IpNet::V4(_) => (IpNet::V4(ipnet::Ipv4Net::default()), false),
            IpNet::V6(_) => (IpNet::V6(ipnet::Ipv6Net::default()), true),
        };
        let address = Address { dev, addr: address, no_prefix_route: false, no_dad };
        let default = Route {
            table: TABLE_MAIN,
            dst,
            gateway,
            dev,
            scope: if gateway.is_some() { Scope::Universe } else { Scope::Link },
            prefsrc: None,
            metric: 0,
        };
        socket.run(&[addr::add(&address), link::set_up(dev), route::add(&default)]).with_context(what)
    }

    /// What the kernel still has about an address: links whose name starts with `prefix`, rules and routes. Also all that there
    /// is about branch ENIs.
    pub fn traces(&self, prefix: &str, addresses: &[impl Into<IpAddr> + Copy]) -> Result<Vec<String>> {
        let mut socket = self.socket()?;
        let ours = |net: &IpNet| {
            net.prefix_len() == net.max_prefix_len() && addresses.iter().any(|addr| (*addr).into() == net.addr())
        };
        let mut traces = Vec::new();
        let prefixes = [prefix, naming::VLAN_PREFIX];
        let ours_by_name = |link: &Link| {
            prefixes.iter().any(|prefix| link.name.starts_with(prefix))
                || egress::is_host_veth(&link.name, link.kind.as_deref())
        };
        let links = link::list(&mut socket)?.into_iter().filter(ours_by_name);
        traces.extend(links.map(|link| format!("{}: link {}", self.name, link.name)));
        for family in [Family::V4, Family::V6] {
            let rules = rule::list(&mut socket, family)?.into_iter();
            let branch = |rule: &Rule| rule.priority == naming::priority::BRANCH;
            let rules = rules.filter(|rule| branch(rule) || rule.src.iter().chain(&rule.dst).any(ours));
            traces.extend(rules.map(|rule| format!("{}: rule {rule}", self.name)));
            let routes = route::list(&mut socket, family, None)?.into_iter().filter(|route| ours(&route.dst));
            traces.extend(routes.map(|route| format!("{}: route {route}", self.name)));
        }
        Ok(traces)
    }
}

/// A node: a network namespace, and a mount namespace in which `/run` is its own.
#[derive(Debug)]
pub struct Node {
    /// The network.
    pub place: Place,
    mounts: File,
}

/// Where pods' namespaces have their names inside a node, as containerd has it.
const POD_NAMES: &str = "/run/netns";

impl Node {
    /// A fresh node without any link. The run's directory stays visible inside.
    pub fn create(run: &Run, name: &str) -> Result<Node> {
        let place = Place::create(run, name)?;
        let mounts = aside(|| private_run(run.path())).with_context(|| format!("mount /run of {name}"))?;
        run.name("mnt", name, &mounts)?;
        place.sysctls(&[
            // What the kubelet or kube-proxy sets on a node.
            ("net/ipv4/ip_forward", "1"),
            // What the init container sets on a node with IPv6 pods (`spec/dataplane.md` 4), the daemon never.
            ("net/ipv6/conf/all/disable_ipv6", "0"),
            ("net/ipv6/conf/default/disable_ipv6", "0"),
            ("net/ipv6/conf/all/forwarding", "1"),
        ])?;
        Ok(Node { place, mounts })
    }

    /// What the init container sets for these settings besides (`spec/dataplane.md` 4).
    pub fn prepare(&self, settings: &Settings) -> Result<()> {
        let early_demux = if settings.tcp_early_demux_disabled { "0" } else { "1" };
        if settings.enable_ipv6 || settings.v6_egress {
            self.place.sysctls(&[("net/ipv6/conf/eth0/accept_ra", "2")])?;
        }
        if settings.tcp_early_demux_disabled {
            // Answers to a connected UDP socket of the node are forwarded once before they arrive when they come from a pod
            // in strict mode, and what early demultiplexing has given to a socket is not forwarded (`ip_forward` in
            // net/ipv4/ip_forward.c). Both families look at this one.
            self.place.sysctls(&[("net/ipv4/udp_early_demux", early_demux)])?;
        }
        self.place.sysctls(&[("net/ipv4/conf/eth0/rp_filter", "2"), ("net/ipv4/tcp_early_demux", early_demux)])
    }

    /// Runs `work` where the node's files are seen.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        aside(|| {
            sys::enter_mounts(&self.mounts)?;
            work()
        })
        .with_context(|| format!("in {}", self.place.name))
    }

    /// A command that will run on the node and end with the thread that starts it.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        let dup = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
        let namespaces: Vec<OwnedFd> = vec![dup(self.place.net.as_fd())?, dup(self.mounts.as_fd())?];
        sys::start_inside(&mut command, namespaces);
        command.current_dir("/");
        Ok(command)
    }

    /// Makes a pod's network namespace as a runtime does: named in the node's `/run/netns`, with nothing but `lo`, which the
    /// loopback plugin has set up.
    pub fn create_pod(&self, name: &str) -> Result<Pod> {
        let path = Path::new(POD_NAMES).join(name);
        let net = self.inside(|| Namespace::create_named(Path::new(POD_NAMES), name))?;
        let place = Place { name: format!("{}/{name}", self.place.name), net };
        place.set_lo_up()?;
        Ok(Pod { path, place })
    }

    /// Removes a pod's namespace.
    pub fn delete_pod(&self, pod: Pod) -> Result<()> {
        let name = pod.path.file_name().and_then(|name| name.to_str()).unwrap_or("").to_owned();
        drop(pod);
        self.inside(|| Namespace::delete_named(Path::new(POD_NAMES), &name))
    }
}

/// A pod: a network namespace on a node.
#[derive(Debug)]
pub struct Pod {
    /// `CNI_NETNS`, as seen on the node.
    pub path: PathBuf,
    /// The namespace.
    pub place: Place,
}

// A mount namespace in which /run is empty but for the directory of the run.
fn private_run(run: &Path) -> Result<File> {
    sys::unshare_mounts()?;
    // Opened in the new namespace: a directory of another one cannot be bound here.
    let kept = File::open(run)?;
    sys::mount_tmpfs(Path::new("/run"))?;
    fs::create_dir_all(run)?;
    sys::bind_mount(Path::new(&format!("/proc/self/fd/{}", kept.as_raw_fd())), run)?;
    let var_run = Path::new("/var/run");
    if fs::canonicalize(var_run).is_ok_and(|real| real != Path::new("/run")) {
        sys::bind_mount(Path::new("/run"), var_run)?;
    }
    fs::create_dir_all(POD_NAMES)?;
    fs::create_dir_all("/run/aws-node")?;
    Ok(File::open("/proc/thread-self/ns/mnt")?)
}
