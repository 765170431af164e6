//! What a cluster has ready for the settings of its daemons: the API server with the nodes, subnets and ENIConfigs of custom
//! networking, and ENIs that an operator attached where the daemon may not.

use super::kube::{Api, Kind};
use super::serve::kube::Kube;
use super::topology::KUBE;
use super::world::{World, WorldNode};
use crate::clock;
use crate::error::{Context, Error, Result};
use crate::model::ec2::{Call, ConntrackTimeouts, Count, Create, Reply};
use crate::model::limits::Limits;
use crate::model::map::Map;
use crate::model::settings::{Mode, Settings};
use crate::plan::doctor::room;
use ipnet::Ipv4Net;
use serde_json::json;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// Subnets for pods, in the VPC's second CIDR: zone and CIDR. Nodes have none of their addresses.
const POD_SUBNETS: [(&str, Ipv4Net); 2] = [
    ("eu-west-1a", Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 64, 0), 20)),
    ("eu-west-1b", Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 96, 0), 20)),
];

/// Addresses of a prefix.
const PREFIX: u32 = 16;

/// The API server of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ApiServer {
    /// It is there
    Answers,
    /// It takes connections and never answers
    Silent,
    /// There is none
    None,
}

/// What the daemons are told to find the API server by.
pub fn endpoint() -> (String, String) {
    ("CLUSTER_ENDPOINT".into(), format!("http://{KUBE}"))
}

/// Prepares everything but the daemons. With [`ApiServer::None`] nothing is served.
pub fn prepare(
    world: &mut World,
    settings: &Settings,
    limits: &Limits,
    (api_server, pods): (ApiServer, usize),
) -> Result<Option<Arc<Kube>>> {
    let mut api = Api::new();
    for node in &world.nodes {
        let most = room::of(settings, limits, None).map_or(u32::MAX, |room| room.pods);
        let wanted = u32::try_from(pods).unwrap_or(u32::MAX);
        api.add_node(&node.name, limits.kubelet_pods.max(limits.max_pods()).min(most).max(wanted));
    }
    if settings.pod_eni {
        for node in &world.nodes {
            api.add_cni_node(&node.name);
        }
    }
    if settings.custom_networking {
        add_eni_configs(world, &mut api)?;
    }
    if settings.read_only() {
        for node in &world.nodes {
            provide(world, node, settings, limits, pods).with_context(|| format!("attach ENIs to {}", node.name))?;
        }
        // The operator's calls are none of the daemon's.
        world.cloud.vpc().forget_calls();
    }
    if api_server == ApiServer::None {
        return Ok(None);
    }
    let kube = world.serve_kube(api)?;
    kube.tune(|knobs| knobs.black_hole = api_server == ApiServer::Silent);
    Ok(Some(kube))
}

// One ENIConfig per zone, and each node names its own, as AWS' guides have it.
fn add_eni_configs(world: &World, api: &mut Api) -> Result<()> {
    world.cloud.change(|vpc| {
        for (zone, cidr) in POD_SUBNETS {
            let (subnet, group) = (vpc.add_subnet(zone, cidr, None, &[]), vpc.add_group());
            api.add_eni_config(zone, subnet.as_str(), &[group.as_str()]);
        }
    });
    for node in &world.nodes {
        let identity = world.cloud.vpc().identity(&node.instance).ok_or_else(|| Error::new("the instance is gone"))?;
        let labels = json!({"metadata": {"labels": {"k8s.amazonaws.com/eniConfig": identity.zone}}});
        api.patch(Kind::Node, "", &node.name, &labels).map_err(|refusal| Error::new(refusal.2))?;
    }
    Ok(())
}

// As many addresses as the pods need, on as many ENIs, the primary one first.
fn provide(world: &World, node: &WorldNode, settings: &Settings, limits: &Limits, pods: usize) -> Result<()> {
    let prefixes = settings.mode_wished() == Mode::Ipv4Prefixes;
    let slots = limits.slots_per_eni() * if prefixes { PREFIX } else { 1 };
    let identity = world.cloud.vpc().identity(&node.instance).ok_or_else(|| Error::new("the instance is gone"))?;
    let mut missing = u32::try_from(pods).unwrap_or(u32::MAX);
    for device in 0..limits.enis {
        let count = missing.min(slots);
        if count == 0 {
            break;
        }
        missing -= count;
        let count = if prefixes { Count::Prefixes(count.div_ceil(PREFIX)) } else { Count::Addresses(count) };
        if device == 0 {
            call(world, &Call::Assign { eni: identity.primary_eni.clone(), count })?;
            continue;
        }
        let created = call(
            world,
            &Call::Create(Create {
                subnet: identity.subnet.clone(),
                description: "attached by the operator".into(),
                groups: Vec::new(),
                count,
                conntrack: ConntrackTimeouts::default(),
                tags: Map::new(),
                client_token: format!("{}-{device}", node.name),
            }),
        )?;
        let Reply::Created(eni) = created else { return Err(Error::new(format!("EC2 answered {created:?}"))) };
        call(world, &Call::Attach { eni: eni.id, instance: node.instance.clone(), device, card: 0 })?;
    }
    Ok(())
}

fn call(world: &World, call: &Call) -> Result<Reply> {
    let outcome = world.cloud.change(|vpc| vpc.execute(clock::now(), call));
    outcome.result.map_err(|failure| Error::new(failure.to_string()))
}
