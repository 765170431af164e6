//! The least that the plugin takes for a daemon: real gRPC on the real socket, addresses from a counter, no pool behind it.
//! It lets the plugin be tried and timed by itself.

use enibox::model::naming::DAEMON_SOCKET;
use enibox::model::wire::{
    AddNetworkReply, AddNetworkRequest, DelNetworkReply, DelNetworkRequest, IpAllocation, UNKNOWN_POD,
};
use enibox::rpc::grpc::{BindOptions, Code, Server, Status};
use enibox::rpc::proto::{Message, path};
use enibox::rpc::stop::Stop;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Mutex;
use std::thread::JoinHandle;

/// A daemon that gives out addresses; it ends when dropped.
pub struct StandIn {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Given {
    next: u32,
    pods: BTreeMap<(String, String), Ipv4Addr>,
}

impl StandIn {
    /// Serves on the daemon's socket, giving `first` and what follows, on the ENI of the route table.
    pub fn start(first: Ipv4Addr, route_table_id: i32) -> StandIn {
        let server = Server::bind(Path::new(DAEMON_SOCKET), BindOptions::default()).unwrap();
        let stop = Stop::new();
        let given = Mutex::new(Given { next: first.to_bits(), ..Given::default() });
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let serve = move |call: &enibox::rpc::grpc::Call| {
                let mut given = given.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                given.answer(call.method, &call.body, route_table_id)
            };
            server.serve(serve, &stopped).unwrap();
        });
        StandIn { stop, thread: Some(thread) }
    }
}

impl Given {
    fn answer(&mut self, method: &str, body: &[u8], route_table_id: i32) -> Result<Vec<u8>, Status> {
        let malformed = |error| Status::new(Code::INVALID_ARGUMENT, format!("{error:?}"));
        let allocation = |address: Ipv4Addr| IpAllocation {
            ipv4: address.to_string(),
            device_number: route_table_id - 1,
            route_table_id,
            ..IpAllocation::default()
        };
        match method {
            path::ADD_NETWORK => {
                let request = AddNetworkRequest::decode(body).map_err(malformed)?;
                let next = &mut self.next;
                let address = *self.pods.entry((request.container_id, request.if_name)).or_insert_with(|| {
                    *next += 1;
                    Ipv4Addr::from_bits(*next - 1)
                });
                let allocations = vec![allocation(address)];
                Ok(AddNetworkReply { success: true, allocations, ..AddNetworkReply::default() }.encode())
            }
            path::DEL_NETWORK => {
                let request = DelNetworkRequest::decode(body).map_err(malformed)?;
                let address = self
                    .pods
                    .remove(&(request.container_id, request.if_name))
                    .ok_or_else(|| Status::new(Code::UNKNOWN, UNKNOWN_POD))?;
                let allocations = vec![allocation(address)];
                Ok(DelNetworkReply { success: true, allocations, ..DelNetworkReply::default() }.encode())
            }
            _ => Err(Status::new(Code::UNIMPLEMENTED, method)),
        }
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}
