//! What operators see: the published view of the core, served over HTTP as the original does (`spec/ipamd.md` 11, 12).
//!
//! The view is a copy that the core's thread puts here when it has nothing else to do; whoever reads it never waits for the
//! core, and the core never for them.

use super::metrics::Metrics;
use super::tuning::Known;
use super::{End, spawn, status};
use crate::clock;
use crate::error::{Context, Result};
use crate::model::imds::Identity;
use crate::model::settings::{Mode, Settings};
use crate::model::time::{Mono, Now};
use crate::plan::core::Status;
use crate::plan::host::Intent;
use crate::plan::pool::{Cidr, Eni, Pool, Slot};
use crate::plan::sizing::PREFIX_ADDRESSES;
use crate::rpc::http1::{Limits, Listener, Method, Request, Response, Server, Verdict};
use serde_json::{Map, Value, json};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Where metrics are served, on all addresses.
const METRICS_PORT: u16 = 61678;
/// How long one request may take (`spec/ipamd.md` 11).
const TRANSFER_MAX: Duration = Duration::from_secs(5);
/// Pauses between attempts to bind a port that is taken.
const BIND_AGAIN: Duration = Duration::from_secs(10);
/// What is served besides `/`.
const PATHS: [&str; 7] = [
    "/v1/enis",
    "/v1/eni-configs",
    "/v1/networkutils-env-settings",
    "/v1/ipamd-env-settings",
    "/v1/enibox/status",
    "/v1/enibox/config",
    "/v1/enibox/intent",
];

/// A copy of what the core knows.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) pool: Pool,
    /// `None` until the core has said something.
    pub(super) status: Option<Status>,
    pub(super) at: Now,
    pub(super) mode: Mode,
    pub(super) eni_limit: usize,
    pub(super) slots: usize,
    /// What the host's network should be, once that is known.
    pub(super) intent: Option<Intent>,
}

impl Default for View {
    fn default() -> Self {
        View {
            pool: Pool::new(false, Duration::ZERO),
            status: None,
            at: Now::default(),
            mode: Mode::Ipv4Addresses,
            eni_limit: 0,
            slots: 0,
            intent: None,
        }
    }
}

impl View {
    /// Gauges without labels: name, help, value. Sums over all network cards (B53).
    pub(super) fn gauges(&self) -> [(&'static str, &'static str, usize); 6] {
        let all = self.pool.stats_of(self.at.mono, |_, _| true);
        let (per_slot, prefixes) = match self.mode {
            Mode::Ipv4Addresses => (1, all.prefixes),
            Mode::Ipv4Prefixes => (PREFIX_ADDRESSES, all.prefixes),
            Mode::Ipv6Prefixes => (0, 0),
        };
        [
            ("awscni_assigned_ip_addresses", "addresses that pods use", all.assigned),
            ("awscni_eni_allocated", "ENIs in the pool", self.pool.enis().count()),
            ("awscni_eni_max", "ENIs that the node may have", self.eni_limit),
            ("awscni_ip_max", "addresses that the node may have", self.eni_limit * self.slots * per_slot),
            ("awscni_total_ip_addresses", "addresses in the pool", all.total),
            ("awscni_total_ipv4_prefixes", "IPv4 prefixes in the pool", prefixes),
        ]
    }

    /// What is going on, by the original's names.
    pub(super) fn doing(&self) -> [(&'static str, usize); 4] {
        let doing = |of: fn(&Status) -> usize| self.status.as_ref().map_or(0, of);
        [
            ("decreaseDatastorePool", doing(|status| status.freeing.len())),
            ("increaseDatastorePool", doing(|status| status.growing)),
            ("nodeIPPoolReconcile", doing(|status| usize::from(status.observing))),
            ("nodeInit", doing(|status| usize::from(matches!(status.phase, "starting" | "booting")))),
        ]
    }

    // `/v1/enis`: by card. Container ids are blanked: they would suffice to forge a DEL.
    fn enis(&self) -> Value {
        let mut cards = Map::new();
        for (id, eni) in self.pool.enis() {
            let card = cards.entry(eni.card.to_string()).or_insert_with(|| {
                let stats = self.pool.stats_of(self.at.mono, |_, other| other.card == eni.card);
                json!({"TotalIPs": stats.total, "AssignedIPs": stats.assigned, "ENIs": {}})
            });
            card["ENIs"][id.as_str()] = self.eni(id.as_str(), eni);
        }
        Value::Object(cards)
    }

    fn eni(&self, id: &str, eni: &Eni) -> Value {
        let (mut v4, mut v6) = (Map::new(), Map::new());
        for (net, cidr) in eni.cidrs() {
            let family = if net.addr().is_ipv4() { &mut v4 } else { &mut v6 };
            family.insert(net.to_string(), self.cidr(net, cidr));
        }
        json!({
            "ID": id, "IsPrimary": eni.primary, "IsTrunk": eni.kind == crate::plan::pool::Kind::Trunk,
            "IsEFA": eni.kind == crate::plan::pool::Kind::Efa, "DeviceNumber": eni.device, "AvailableIPv4Cidrs": v4,
            "IPv6Cidrs": v6, "IsExcludedForPodIPs": eni.excluded, "RouteTableID": eni.table, "SubnetID": eni.subnet,
        })
    }

    fn cidr(&self, net: &ipnet::IpNet, cidr: &Cidr) -> Value {
        let mut known = Map::new();
        for (ip, slot) in cidr.slots() {
            known.insert(ip.to_string(), self.address(*ip, slot));
        }
        json!({
            "Cidr": {"IP": net.addr(), "Mask": mask(net)},
            "IPAddresses": known, "IsPrefix": cidr.prefix, "AddressFamily": "",
        })
    }

    fn address(&self, ip: IpAddr, slot: &Slot) -> Value {
        let owner = slot.owner.as_ref();
        let never = || "0001-01-01T00:00:00Z".to_owned();
        let ago = |at: Mono| {
            let nanos = i64::try_from(self.at.mono.since(at).as_nanos()).unwrap_or(i64::MAX);
            format!(
                "{:#}",
                crate::model::time::Wall::from_unix_nanos(self.at.wall.as_unix_nanos().saturating_sub(nanos))
            )
        };
        json!({
            "Address": ip,
            "IPAMKey": {"networkName": owner.map_or("", |owner| owner.key.network.as_str()), "containerID": "", "ifName": ""},
            "IPAMMetadata": owner.map_or_else(|| json!({}), |owner| json!({
                "k8sPodNamespace": owner.pod.namespace, "k8sPodName": owner.pod.name, "interfacesCount": owner.interfaces,
            })),
            "AssignedTime": owner.map_or_else(never, |owner| format!("{:#}", owner.since)),
            "UnassignedTime": slot.freed.map_or_else(never, ago),
        })
    }
}

// The raw mask in base64, as the original's encoder writes byte slices.
fn mask(net: &ipnet::IpNet) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = match net.netmask() {
        IpAddr::V4(mask) => mask.octets().to_vec(),
        IpAddr::V6(mask) => mask.octets().to_vec(),
    };
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = usize::try_from(word >> (18 - 6 * place) & 63).unwrap_or(0);
            text.push(if place <= chunk.len() { char::from(DIGITS[digit]) } else { '=' });
        }
    }
    text
}

/// The instance, once IMDS has told.
#[derive(Clone, Debug)]
pub(super) struct About {
    pub(super) node: String,
    pub(super) instance: Option<(Identity, Mode)>,
}

/// What operators are shown.
#[derive(Clone)]
pub(super) struct Shown {
    pub(super) view: Arc<View>,
    pub(super) known: Arc<Known>,
    pub(super) about: Arc<About>,
}

/// Where the threads put what operators are shown.
#[derive(Clone)]
pub(super) struct Board(Arc<Mutex<Shown>>);

impl Board {
    pub(super) fn new(settings: &Settings, known: Known) -> Board {
        let about = About { node: settings.node_name.clone(), instance: None };
        let shown = Shown { view: Arc::default(), known: Arc::new(known), about: Arc::new(about) };
        Board(Arc::new(Mutex::new(shown)))
    }

    fn change(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn publish(&self, view: View) {
        self.change(|shown| shown.view = Arc::new(view));
    }

    /// The settings have changed.
    pub(super) fn tell(&self, known: Known) {
        self.change(|shown| shown.known = Arc::new(known));
    }

    /// The instance is known.
    pub(super) fn introduce(&self, identity: &Identity, mode: Mode) {
        self.change(|shown| {
            let node = shown.about.node.clone();
            shown.about = Arc::new(About { node, instance: Some((identity.clone(), mode)) });
        });
    }

    fn read(&self) -> Shown {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Where to listen.
enum Place {
    Tcp(Vec<SocketAddr>),
    Unix(String),
}

/// Serves metrics and introspection as far as the settings want them, on a thread that binds their ports for as long as it
/// takes: a port that another program holds is no reason to leave pods without addresses.
pub(super) fn start(settings: &Settings, board: &Board, metrics: &Arc<Metrics>, ended: &SyncSender<End>) -> Result<()> {
    let mut wanted: Vec<(&'static str, Place, Page)> = Vec::new();
    if !settings.metrics_disabled {
        let (board, metrics) = (board.clone(), Arc::clone(metrics));
        let page: Page = Arc::new(move |request: &Request| match request.path.as_str() {
            "/metrics" => Response::new(200, "text/plain; version=0.0.4", metrics.page(&board.read().view)),
            _ => Response::text(404, "Not Found\n"),
        });
        // Both families on one socket; on a kernel without IPv6 the other one alone.
        let all = [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)];
        wanted.push(("metrics", Place::Tcp(all.map(|ip| SocketAddr::new(ip, METRICS_PORT)).to_vec()), page));
    }
    if !settings.introspection_disabled {
        let (board, metrics) = (board.clone(), Arc::clone(metrics));
        let page: Page = Arc::new(move |request: &Request| answer(request, &board.read(), &metrics));
        let text = settings.introspection_address.as_str();
        match (text.strip_prefix("unix:"), text.replace("localhost:", "127.0.0.1:").parse::<SocketAddr>()) {
            (Some(path), _) => wanted.push(("introspect", Place::Unix(path.to_owned()), page)),
            (None, Ok(address)) => wanted.push(("introspect", Place::Tcp(vec![address]), page)),
            // No reason to leave pods without addresses.
            (None, Err(_)) => log::error!(
                "INTROSPECTION_BIND_ADDRESS={text:?} is neither address:port nor unix:path; introspection is not served"
            ),
        }
    }
    spawn("http", ended, move || {
        let mut servers = Vec::new();
        while !wanted.is_empty() {
            wanted.retain(|(name, place, page)| match serve(name, place, Arc::clone(page)) {
                Ok(server) => {
                    servers.push(server);
                    false
                }
                Err(error) => {
                    log::warn!("{error}; trying again");
                    true
                }
            });
            std::thread::sleep(if wanted.is_empty() { Duration::ZERO } else { BIND_AGAIN });
        }
        loop {
            std::thread::park(); // the servers have threads of their own, and go with this one
        }
    })?;
    Ok(())
}

type Page = Arc<dyn Fn(&Request) -> Response + Send + Sync>;

fn serve(name: &'static str, place: &Place, page: Page) -> Result<Server> {
    let listener = match place {
        Place::Tcp(addresses) => {
            let bound = TcpListener::bind(addresses.as_slice());
            Listener::Tcp(bound.with_context(|| format!("serve {name} on {addresses:?}"))?)
        }
        Place::Unix(path) => Listener::unix(Path::new(path)).with_context(|| format!("serve {name}"))?,
    };
    let limits = Limits { connections: 16, transfer: TRANSFER_MAX, ..Limits::default() };
    let handler = move |request: &Request| match request.method {
        Method::Get => Verdict::Answer(page(request)),
        Method::Put | Method::Post | Method::Patch => Verdict::Answer(Response::text(405, "Method Not Allowed\n")),
    };
    Server::serve(name, listener, limits, Arc::new(handler))
}

// The two environment documents of the original (`spec/ipamd.md` 11).
fn network_settings(settings: &Settings) -> Value {
    let cidrs = |nets: &[ipnet::Ipv4Net]| if nets.is_empty() { Value::Null } else { json!(nets) };
    let ports = match settings.snat_ports {
        crate::model::nft::SnatPorts::Keep => 0,
        crate::model::nft::SnatPorts::Random => 1,
        crate::model::nft::SnatPorts::FullyRandom => 2,
    };
    json!({
        "AWS_EXTERNAL_SERVICE_CIDRS": cidrs(&settings.external_service_cidrs),
        "AWS_VPC_CNI_NODE_PORT_SUPPORT": settings.node_port, "AWS_VPC_ENI_MTU": settings.eni_mtu,
        "AWS_VPC_K8S_CNI_CONNMARK": settings.connmark,
        "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS": cidrs(&settings.exclude_snat_cidrs),
        "AWS_VPC_K8S_CNI_EXTERNALSNAT": settings.external_snat, "AWS_VPC_K8S_CNI_RANDOMIZESNAT": ports,
        "AWS_VPC_K8S_CNI_VETHPREFIX": settings.veth_prefix,
    })
}

fn daemon_settings(settings: &Settings) -> Value {
    json!({
        "AWS_MANAGE_ENIS_NON_SCHEDULABLE": settings.manage_non_schedulable,
        "AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG": settings.custom_networking,
        "ENABLE_SUBNET_DISCOVERY": settings.subnet_discovery, "WARM_ENI_TARGET": settings.warm_eni_target,
        "WARM_IP_TARGET": settings.warm_ip_target,
    })
}

fn answer(request: &Request, shown: &Shown, metrics: &Metrics) -> Response {
    log::debug!("introspection: {}", request.path);
    let settings = &shown.known.layered.settings;
    let body = match request.path.as_str() {
        "/v1/enis" => shown.view.enis(),
        "/v1/eni-configs" => match &shown.known.eni_config {
            Some(name) => json!(name),
            None => return Response::text(404, "Not Found\n"),
        },
        "/v1/networkutils-env-settings" => network_settings(settings),
        "/v1/ipamd-env-settings" => daemon_settings(settings),
        "/v1/enibox/status" => status::document(shown, metrics, clock::now()),
        "/v1/enibox/config" => shown.known.layered.document(&shown.known.pending, &shown.known.wrong),
        "/v1/enibox/intent" => json!(shown.view.intent),
        path if path.starts_with("/v1/") => return Response::text(404, "Not Found\n"),
        _ => json!({"AvailableCommands": PATHS}),
    };
    Response::new(200, "application/json", body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_as_the_original_writes_them() {
        for (net, want) in
            [("10.0.0.0/28", "////8A=="), ("10.0.0.1/32", "/////w=="), ("2001:db8::/80", "/////////////wAAAAAAAA==")]
        {
            assert_eq!(mask(&net.parse().unwrap()), want, "{net}");
        }
    }

    #[test]
    fn container_ids_are_not_told() {
        let mut pool = Pool::new(false, Duration::from_secs(30));
        let eni = Eni::new(
            crate::model::net::Mac([2; 6]),
            (0, 0),
            true,
            crate::plan::pool::Kind::Plain,
            254,
            "subnet-1".into(),
            "10.0.0.4/24".parse().unwrap(),
            Mono::default(),
        );
        pool.add_eni("eni-1".into(), eni).unwrap();
        pool.add_cidr(&"eni-1".into(), "10.0.0.9/32".parse().unwrap()).unwrap();
        let owner = crate::plan::pool::Owner {
            key: crate::model::ids::PodKey {
                network: "aws-cni".into(),
                container: "secret".into(),
                ifname: "eth0".into(),
            },
            pod: crate::model::ids::PodName { namespace: "default".into(), name: "web-0".into() },
            interfaces: 1,
            since: crate::model::time::Wall::from_unix_seconds(1_785_571_200),
        };
        pool.assign(Now::default(), 0, owner).unwrap();
        let enis = View { pool, ..View::default() }.enis();
        assert!(!enis.to_string().contains("secret"));
        let address = &enis["0"]["ENIs"]["eni-1"]["AvailableIPv4Cidrs"]["10.0.0.9/32"]["IPAddresses"]["10.0.0.9"];
        assert_eq!(address["IPAMMetadata"]["k8sPodName"], "web-0");
        assert_eq!(address["AssignedTime"], "2026-08-01T08:00:00.000000000Z");
        assert_eq!((&enis["0"]["TotalIPs"], &enis["0"]["AssignedIPs"]), (&json!(1), &json!(1)));
    }
}
