//! What operators see: the published view of the core, served over HTTP as the original does (`spec/ipamd.md` 11, 12).
//!
//! The view is a copy that the core's thread puts here when it has nothing else to do; whoever reads it never waits for the
//! core, and the core never for them.

use super::metrics::Metrics;
use super::{End, spawn};
use crate::error::{Context, Result};
use crate::model::settings::Settings;
use crate::model::time::{Mono, Now};
use crate::plan::pool::{Eni, Pool, Slot};
use crate::rpc::http1::{Limits, Method, Request, Response, Server, Verdict};
use serde_json::{Map, Value, json};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Where metrics are served, on all addresses.
const METRICS_PORT: u16 = 61678;
/// How long one request may take (`spec/ipamd.md` 11).
const TRANSFER_MAX: Duration = Duration::from_secs(5);
/// Pauses between attempts to bind a port that is taken.
const BIND_AGAIN: Duration = Duration::from_secs(10);

/// A copy of what the core knows.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) pool: Pool,
    pub(super) at: Now,
    pub(super) eni_limit: usize,
    pub(super) slots: usize,
}

impl Default for View {
    fn default() -> Self {
        View { pool: Pool::new(false, Duration::ZERO), at: Now::default(), eni_limit: 0, slots: 0 }
    }
}

impl View {
    /// Gauges without labels: name, help, value.
    pub(super) fn gauges(&self) -> [(&'static str, &'static str, usize); 6] {
        let all = self.pool.stats_of(self.at.mono, |_, _| true);
        [
            ("awscni_assigned_ip_addresses", "addresses that pods use", all.assigned),
            ("awscni_eni_allocated", "ENIs in the pool", self.pool.enis().count()),
            ("awscni_eni_max", "ENIs that the node may have", self.eni_limit),
            ("awscni_ip_max", "addresses that the node may have", self.eni_limit * self.slots),
            ("awscni_total_ip_addresses", "addresses in the pool", all.total),
            ("awscni_total_ipv4_prefixes", "IPv4 prefixes in the pool", all.prefixes),
        ]
    }

    // `/v1/enis`: by card. Container ids are blanked: they would suffice to forge a DEL.
    fn enis(&self) -> Value {
        let stats = self.pool.stats_of(self.at.mono, |_, _| true);
        let enis: Map<String, Value> =
            self.pool.enis().map(|(id, eni)| (id.0.clone(), self.eni(id.as_str(), eni))).collect();
        json!({"0": {"TotalIPs": stats.total, "AssignedIPs": stats.assigned, "ENIs": enis}})
    }

    fn eni(&self, id: &str, eni: &Eni) -> Value {
        let cidrs: Map<String, Value> = eni
            .cidrs()
            .map(|(net, cidr)| {
                let known: Map<String, Value> =
                    cidr.slots().map(|(ip, slot)| (ip.to_string(), self.address(*ip, slot))).collect();
                let value = json!({
                    "Cidr": {"IP": net.addr(), "Mask": mask(net)},
                    "IPAddresses": known, "IsPrefix": cidr.prefix, "AddressFamily": "",
                });
                (net.to_string(), value)
            })
            .collect();
        json!({
            "ID": id, "IsPrimary": eni.primary, "IsTrunk": eni.kind == crate::plan::pool::Kind::Trunk,
            "IsEFA": eni.kind == crate::plan::pool::Kind::Efa, "DeviceNumber": eni.device, "AvailableIPv4Cidrs": cidrs,
            "IPv6Cidrs": {}, "IsExcludedForPodIPs": eni.excluded, "RouteTableID": eni.table, "SubnetID": eni.subnet,
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

/// Where the core's thread puts its view.
#[derive(Clone, Default)]
pub(super) struct Board(Arc<Mutex<Arc<View>>>);

impl Board {
    pub(super) fn publish(&self, view: View) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(view);
    }

    fn read(&self) -> Arc<View> {
        Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Serves metrics and introspection as far as the settings want them, on a thread that binds their ports for as long as it
/// takes: a port that another program holds is no reason to leave pods without addresses.
pub(super) fn start(settings: &Settings, board: Board, metrics: &Arc<Metrics>, ended: &SyncSender<End>) -> Result<()> {
    let mut wanted: Vec<(&'static str, Vec<SocketAddr>, Page)> = Vec::new();
    if !settings.metrics_disabled {
        let (board, metrics) = (board.clone(), Arc::clone(metrics));
        let page: Page = Arc::new(move |request: &Request| match request.path.as_str() {
            "/metrics" => Response::new(200, "text/plain; version=0.0.4", metrics.page(&board.read())),
            _ => Response::text(404, "Not Found\n"),
        });
        // Both families on one socket; on a kernel without IPv6 the other one alone.
        let all = [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)];
        wanted.push(("metrics", all.map(|ip| SocketAddr::new(ip, METRICS_PORT)).to_vec(), page));
    }
    if !settings.introspection_disabled {
        let environment = environment(settings);
        match settings.introspection_address.parse::<SocketAddr>() {
            Ok(address) => {
                let page: Page = Arc::new(move |request: &Request| answer(request, &board, &environment));
                wanted.push(("introspect", vec![address], page));
            }
            // No reason to leave pods without addresses.
            Err(_) => log::error!(
                "INTROSPECTION_BIND_ADDRESS={:?}: only address:port is supported; not served",
                settings.introspection_address
            ),
        }
    }
    spawn("http", ended, move || {
        let mut servers = Vec::new();
        while !wanted.is_empty() {
            wanted.retain(|(name, address, page)| match serve(name, address, Arc::clone(page)) {
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

fn serve(name: &'static str, addresses: &[SocketAddr], page: Page) -> Result<Server> {
    let listener = TcpListener::bind(addresses).with_context(|| format!("serve {name} on {addresses:?}"))?;
    let limits = Limits { connections: 16, transfer: TRANSFER_MAX, ..Limits::default() };
    let handler = move |request: &Request| match request.method {
        Method::Get => Verdict::Answer(page(request)),
        Method::Put | Method::Post => Verdict::Answer(Response::text(405, "Method Not Allowed\n")),
    };
    Server::start(name, listener, limits, Arc::new(handler))
}

// The two environment documents of the original (`spec/ipamd.md` 11).
fn environment(settings: &Settings) -> (Value, Value) {
    let cidrs = |nets: &[ipnet::Ipv4Net]| if nets.is_empty() { Value::Null } else { json!(nets) };
    let ports = match settings.snat_ports {
        crate::model::nft::SnatPorts::Keep => 0,
        crate::model::nft::SnatPorts::Random => 1,
        crate::model::nft::SnatPorts::FullyRandom => 2,
    };
    let network = json!({
        "AWS_EXTERNAL_SERVICE_CIDRS": cidrs(&settings.external_service_cidrs),
        "AWS_VPC_CNI_NODE_PORT_SUPPORT": settings.node_port, "AWS_VPC_ENI_MTU": settings.eni_mtu,
        "AWS_VPC_K8S_CNI_CONNMARK": settings.connmark,
        "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS": cidrs(&settings.exclude_snat_cidrs),
        "AWS_VPC_K8S_CNI_EXTERNALSNAT": settings.external_snat, "AWS_VPC_K8S_CNI_RANDOMIZESNAT": ports,
        "AWS_VPC_K8S_CNI_VETHPREFIX": settings.veth_prefix,
    });
    let daemon = json!({
        "AWS_MANAGE_ENIS_NON_SCHEDULABLE": settings.manage_non_schedulable,
        "AWS_VPC_K8S_CNI_CUSTOM_NETWORK_CFG": settings.custom_networking,
        "ENABLE_SUBNET_DISCOVERY": settings.subnet_discovery, "WARM_ENI_TARGET": settings.warm_eni_target,
        "WARM_IP_TARGET": settings.warm_ip_target,
    });
    (network, daemon)
}

fn answer(request: &Request, board: &Board, (network, daemon): &(Value, Value)) -> Response {
    let body = match request.path.as_str() {
        "/v1/enis" => board.read().enis(),
        "/v1/networkutils-env-settings" => network.clone(),
        "/v1/ipamd-env-settings" => daemon.clone(),
        _ => json!({"AvailableCommands": ["/v1/enis", "/v1/networkutils-env-settings", "/v1/ipamd-env-settings"]}),
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
