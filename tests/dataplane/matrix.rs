//! The flow matrix: every kind of flow, over TCP and UDP, for every combination of SNAT and node ports, beside every kind
//! of kube-proxy, whose rules come before ours or after.

use crate::proxy::{self, Backend, Kind, Service};
use crate::support::Netns;
use crate::talk::{BOTH, Flow, IMPATIENCE, PATIENCE};
use crate::world::*;
use enibox::apply::Host;
use enibox::plan::host::Intent;
use std::net::{IpAddr, SocketAddr};

/// The source that the server sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// The client's own address.
    Own,
    /// The node's primary address.
    P,
    /// Nothing arrives, or no answer does.
    X,
}
use Cell::{Own, P, X};

/// How the client addresses the server.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    Direct,
    Cluster,
    Local(&'static str),
    Masqueraded(&'static str),
}
use Way::{Cluster, Direct, Local, Masqueraded};

const TO_INTERNET: [Cell; 4] = [P, P, Own, Own];
const SAME: [Cell; 4] = [Own; 4];
const ALWAYS_P: [Cell; 4] = [P; 4];
const NEVER: [Cell; 4] = [X; 4];
const WITH_NODE_PORTS: [Cell; 4] = [Own, X, Own, X];

/// Client's address, way, server's address; SNAT with node ports, SNAT without, external SNAT with and without.
const ROWS: &[Row] = &[
    (POD1, Direct, INTERNET, TO_INTERNET),
    (POD2, Direct, INTERNET, TO_INTERNET),
    (POD2, Direct, PEERED, TO_INTERNET),
    (POD1, Direct, EXCLUDED, SAME),
    (POD2, Direct, EXCLUDED, SAME),
    (POD1, Direct, VPC, SAME),
    (POD2, Direct, VPC, SAME),
    (POD2, Direct, SECOND_CIDR, SAME),
    (POD2, Direct, POD1, SAME),
    (POD1, Direct, POD2, SAME),
    (POD2, Direct, NODE_IP, SAME),
    (NODE_IP, Direct, POD2, SAME),
    (NODE_IP, Direct, INTERNET, ALWAYS_P),
    (ENI_IP, Direct, INTERNET_FROM_ENI, [X, X, Own, Own]),
    (POD3, Direct, INTERNET, SAME),
    (POD3, Direct, VPC, SAME),
    (VPC, Direct, POD2, SAME),
    (PEERED, Direct, POD2, SAME),
    (VPC, Direct, POD3, SAME),
    (INTERNET, Local(NODE_IP), POD2, WITH_NODE_PORTS),
    (VPC, Local(NODE_IP), POD2, WITH_NODE_PORTS),
    (INTERNET, Local(NODE_IP), POD1, SAME),
    (INTERNET, Masqueraded(NODE_IP), POD2, [P, X, P, X]),
    (INTERNET, Masqueraded(NODE_IP), VPC, ALWAYS_P),
    (POD2, Cluster, POD1, SAME),
    (POD2, Cluster, VPC, SAME),
    (POD2, Cluster, EXCLUDED, SAME),
    (POD1, Cluster, INTERNET, TO_INTERNET),
    (POD2, Cluster, INTERNET, TO_INTERNET),
    (POD3, Cluster, VPC, SAME),
    (POD3, Cluster, POD2, SAME),
    (POD3, Cluster, INTERNET, SAME),
    (POD2, Direct, NODE_LOCAL, SAME),
    (INTERNET, Local(ENI_IP), POD2, SAME),
    (INTERNET, Local(ENI_IP), POD1, NEVER),
];

/// External SNAT, node ports.
const COLUMNS: [(bool, bool); 4] = [(false, true), (false, false), (true, true), (true, false)];

fn place<'a>(world: &'a World, address: &str) -> &'a Netns {
    match address {
        NODE_IP | ENI_IP | NODE_LOCAL => &world.node,
        POD1 => &world.pod1,
        POD2 => &world.pod2,
        POD3 => &world.pod3,
        INTERNET | INTERNET_FROM_ENI => &world.internet,
        PEERED => &world.peered,
        VPC => &world.vpc,
        SECOND_CIDR => &world.second,
        EXCLUDED => &world.excluded,
        other => panic!("nobody has {other}"),
    }
}

// Ports tell rows and columns apart, so that no connection of one meets that of another.
fn port(base: usize, column: usize, row: usize) -> u16 {
    u16::try_from(base + 100 * column + row).unwrap()
}

fn ends(column: usize, row: usize) -> (Option<Service>, SocketAddr, SocketAddr) {
    let (_, way, server, _) = ROWS[row];
    let endpoint = SocketAddr::new(ip(server), port(8000, column, row));
    let service = |kind, at: &str, base| {
        let at = SocketAddr::new(ip(at), port(base, column, row));
        (Some(Service { kind, at, endpoint }), at, endpoint)
    };
    match way {
        Direct => (None, endpoint, endpoint),
        Cluster => service(Kind::ClusterIp, "172.20.0.10", 9000),
        Local(at) => service(Kind::NodePortLocal, at, 30000),
        Masqueraded(at) => service(Kind::NodePortCluster, at, 30000),
    }
}

/// Runs all flows of a column at once; a line for each that went differently.
pub fn differences(world: &World, column: usize) -> Vec<String> {
    differences_of(world, column, |row| Some(row.3[column]))
}

pub type Row = (&'static str, Way, &'static str, [Cell; 4]);

/// What IPVS makes of a row: it routes answers by the address that they leave from, so that node ports need no mark. Packets
/// of a strict pod go out by its branch ENI before they could be local (the rules at 10 and 20), so that IPVS never sees them.
fn beside_ipvs(row: &Row, column: usize) -> Cell {
    match (row.0, row.1, row.3[column]) {
        (_, Local(_), X) => Own,
        (_, Masqueraded(_), X) => P,
        (POD3, Cluster, _) => X,
        (.., cell) => cell,
    }
}

/// The same for chosen flows, with what is expected of each.
pub fn differences_of(world: &World, column: usize, expected: impl Fn(&Row) -> Option<Cell>) -> Vec<String> {
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for (number, row) in ROWS.iter().enumerate() {
            let (client, way, server, _) = row;
            let (_, target, listen) = ends(column, number);
            let wanted = match expected(row) {
                None => continue,
                Some(Own) => Some(ip(client)),
                Some(P) => Some(ip(NODE_IP)),
                Some(X) => None,
            };
            for proto in BOTH {
                let flow = Flow { client: place(world, client), target, server: place(world, server), listen };
                let work = move || {
                    let seen = flow.run(proto, if wanted.is_some() { PATIENCE } else { IMPATIENCE });
                    let right = seen.as_ref().ok() == wanted.as_ref();
                    let wanted = wanted.map_or_else(|| "no answer".to_owned(), |source: IpAddr| source.to_string());
                    (!right).then(|| format!("{proto:?} {client} {way:?} {server}: {seen:?} instead of {wanted}"))
                };
                running.push(scope.spawn(work));
            }
        }
        running.into_iter().filter_map(|flow| flow.join().unwrap()).collect()
    })
}

pub fn services(column: usize) -> Vec<Service> {
    (0..ROWS.len()).filter_map(|row| ends(column, row).0).collect()
}

/// With sources left alone where SNAT does nothing but harm, processes of the node reach the outside by the second ENI.
fn with_kept_sources(row: &Row, cell: Cell) -> Cell {
    match (row.0, row.2, cell) {
        (ENI_IP, INTERNET_FROM_ENI, X) => Own,
        _ => cell,
    }
}

fn column_intent(column: usize) -> Intent {
    let (external_snat, node_port) = COLUMNS[column];
    Intent { external_snat, node_port, ..intent() }
}

fn matrix(backend: Backend, proxy_first: bool) {
    matrix_with(backend, proxy_first, |intent| intent, |_, cell| cell);
}

fn matrix_with_kept_sources(backend: Backend, proxy_first: bool) {
    let kept = |intent| Intent { keep_host_source: true, ..intent };
    matrix_with(backend, proxy_first, kept, with_kept_sources);
}

/// The whole matrix with something changed: the intent, and the cells that follow.
fn matrix_with(
    backend: Backend,
    proxy_first: bool,
    change: impl Fn(Intent) -> Intent,
    expected: impl Fn(&Row, Cell) -> Cell,
) {
    if !proxy::here(backend) {
        return;
    }
    let world = World::bare();
    let mut host = world.node.run(Host::open).unwrap();
    let mut wrong = Vec::new();
    for (column, names) in COLUMNS.iter().enumerate() {
        let intent = change(column_intent(column));
        if proxy_first {
            proxy::start(backend, &world.node, &services(column));
        }
        well(&host.host(&intent).unwrap());
        if !proxy_first {
            proxy::start(backend, &world.node, &services(column));
            if backend == Backend::Ipvs {
                // The daemon's watch sees the new link.
                assert_eq!(host.host(&intent).unwrap().steps.len(), usize::from(!intent.external_snat), "{names:?}");
            }
        }
        if column == 0 {
            world.wire_pods();
        }
        let found = differences_of(&world, column, |row| {
            let cell = if backend == Backend::Ipvs { beside_ipvs(row, column) } else { row.3[column] };
            Some(expected(row, cell))
        });
        wrong.extend(found.into_iter().map(|line| format!("column {names:?}: {line}")));
        let steps = host.host(&intent).unwrap().steps;
        assert!(steps.is_empty(), "beside {backend:?}: {steps:?}");
        proxy::stop(backend, &world.node);
    }
    assert!(wrong.is_empty(), "beside {backend:?}, first: {proxy_first}:\n  {}", wrong.join("\n  "));
}

#[test]
fn beside_kube_proxy_in_iptables_nft_started_before() {
    matrix(Backend::IptablesNft, true);
}

#[test]
fn beside_kube_proxy_in_iptables_nft_started_after() {
    matrix(Backend::IptablesNft, false);
}

#[test]
fn beside_kube_proxy_in_iptables_legacy_started_before() {
    matrix(Backend::IptablesLegacy, true);
}

#[test]
fn beside_kube_proxy_in_iptables_legacy_started_after() {
    matrix(Backend::IptablesLegacy, false);
}

#[test]
fn beside_kube_proxy_in_nftables_started_before() {
    matrix(Backend::Nftables, true);
}

#[test]
fn beside_kube_proxy_in_nftables_started_after() {
    matrix(Backend::Nftables, false);
}

#[test]
fn beside_kube_proxy_in_ipvs_started_before() {
    matrix(Backend::Ipvs, true);
}

#[test]
fn beside_kube_proxy_in_ipvs_started_after() {
    matrix(Backend::Ipvs, false);
}

#[test]
fn with_kept_sources_beside_kube_proxy_in_iptables_nft() {
    matrix_with_kept_sources(Backend::IptablesNft, true);
}

#[test]
fn with_kept_sources_beside_kube_proxy_in_iptables_legacy() {
    matrix_with_kept_sources(Backend::IptablesLegacy, false);
}

#[test]
fn with_kept_sources_beside_kube_proxy_in_nftables() {
    matrix_with_kept_sources(Backend::Nftables, true);
}

#[test]
fn with_kept_sources_beside_kube_proxy_in_ipvs() {
    matrix_with_kept_sources(Backend::Ipvs, false);
}
