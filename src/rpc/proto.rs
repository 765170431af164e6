//! The protobuf form of the messages (`spec/plugin.md` 8.2, `spec/ipamd.md` 10.1), and the paths of the methods.
//!
//! Ten flat messages do not warrant a code generator: one line per message names its fields and their numbers, and the
//! wire form follows from the field's Rust type. Proto3 rules hold: defaults are not sent, the last of a repeated scalar
//! wins, unknown fields are skipped, and a known field of a foreign wire type counts as unknown.

use crate::model::wire::{
    AddNetworkReply, AddNetworkRequest, DelNetworkReply, DelNetworkRequest, DeleteNpRequest, EnforceNpRequest,
    IpAllocation, NetworkPolicyAgentConfig,
};
use std::fmt;

/// Paths of the methods, as `:path` carries them.
pub mod path {
    /// Plugin to daemon: give a pod its addresses.
    pub const ADD_NETWORK: &str = "/rpc.CNIBackend/AddNetwork";
    /// Plugin to daemon: take a pod's addresses back.
    pub const DEL_NETWORK: &str = "/rpc.CNIBackend/DelNetwork";
    /// Policy agent to daemon: how the node is set up.
    pub const GET_NETWORK_POLICY_CONFIGS: &str = "/rpc.ConfigServerBackend/GetNetworkPolicyConfigs";
    /// Plugin to policy agent: a pod was added.
    pub const ENFORCE_NP_TO_POD: &str = "/rpc.NPBackend/EnforceNpToPod";
    /// Plugin to policy agent: a pod was deleted.
    pub const DELETE_POD_NP: &str = "/rpc.NPBackend/DeletePodNp";
    /// Probes to daemon.
    pub const HEALTH_CHECK: &str = "/grpc.health.v1.Health/Check";
    /// All of the above.
    pub const ALL: &[&str] =
        &[ADD_NETWORK, DEL_NETWORK, GET_NETWORK_POLICY_CONFIGS, ENFORCE_NP_TO_POD, DELETE_POD_NP, HEALTH_CHECK];
}

/// A value with a protobuf form.
pub trait Message: Sized {
    /// The message without any framing.
    fn encode(&self) -> Vec<u8>;
    /// Reads a whole message.
    fn decode(bytes: &[u8]) -> Result<Self, DecodeError>;
}

/// Elements a repeated field may have. An empty element costs the sender two octets and us thirty times that; no reply
/// comes near (a VPC has a few CIDRs, a node a few cards).
pub const REPEATED_LIMIT: usize = 4096;

/// Depth to which unknown groups may nest.
const GROUP_DEPTH: usize = 32;

/// Why bytes are not the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// They end inside a field.
    Truncated,
    /// A number has more than ten octets or does not fit in 64 bits.
    Varint,
    /// Field number zero or too large, an unknown wire type, or a group that is not closed properly.
    Tag,
    /// A string is not UTF-8.
    Utf8,
    /// More than [`REPEATED_LIMIT`] elements, or groups nested too deeply.
    Limit,
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DecodeError::Truncated => "message truncated",
            DecodeError::Varint => "message has a number that is too long",
            DecodeError::Tag => "message has an invalid field tag",
            DecodeError::Utf8 => "message has a string that is not UTF-8",
            DecodeError::Limit => "message exceeds a limit",
        })
    }
}

impl std::error::Error for DecodeError {}

/// A field's value as it stands on the wire.
enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    /// Fixed 32 or 64 bits, or a group: no message of ours has one.
    Other,
}

/// A Rust type that is a field.
trait FieldType {
    fn put(&self, number: u32, out: &mut Vec<u8>);
    /// Takes a value over; one of a foreign wire type is passed by.
    fn take(&mut self, value: &Value<'_>) -> Result<(), DecodeError>;
}

const VARINT: u32 = 0;
const LENGTH_DELIMITED: u32 = 2;

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    loop {
        let low = u8::try_from(value & 0x7f).unwrap_or(0);
        value >>= 7;
        if value == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

fn put_tag(number: u32, wire_type: u32, out: &mut Vec<u8>) {
    put_varint(u64::from(number << 3 | wire_type), out);
}

fn put_bytes(number: u32, bytes: &[u8], out: &mut Vec<u8>) {
    put_tag(number, LENGTH_DELIMITED, out);
    put_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

fn text(bytes: &[u8]) -> Result<String, DecodeError> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| DecodeError::Utf8)
}

impl FieldType for String {
    fn put(&self, number: u32, out: &mut Vec<u8>) {
        if !self.is_empty() {
            put_bytes(number, self.as_bytes(), out);
        }
    }

    fn take(&mut self, value: &Value<'_>) -> Result<(), DecodeError> {
        if let Value::Bytes(bytes) = value {
            *self = text(bytes)?;
        }
        Ok(())
    }
}

impl FieldType for bool {
    fn put(&self, number: u32, out: &mut Vec<u8>) {
        if *self {
            put_tag(number, VARINT, out);
            out.push(1);
        }
    }

    fn take(&mut self, value: &Value<'_>) -> Result<(), DecodeError> {
        if let Value::Varint(value) = value {
            *self = *value != 0;
        }
        Ok(())
    }
}

impl FieldType for i32 {
    fn put(&self, number: u32, out: &mut Vec<u8>) {
        if *self != 0 {
            put_tag(number, VARINT, out);
            // Sign-extended to 64 bits: a negative int32 takes ten octets (protobuf encoding, "signed integers").
            put_varint(i64::from(*self).cast_unsigned(), out);
        }
    }

    fn take(&mut self, value: &Value<'_>) -> Result<(), DecodeError> {
        if let Value::Varint(value) = value {
            #[expect(clippy::cast_possible_truncation, reason = "protobuf truncates an int32 to its low 32 bits")]
            let low = *value as u32;
            *self = low.cast_signed();
        }
        Ok(())
    }
}

impl FieldType for Vec<String> {
    fn put(&self, number: u32, out: &mut Vec<u8>) {
        for item in self {
            put_bytes(number, item.as_bytes(), out);
        }
    }

    fn take(&mut self, value: &Value<'_>) -> Result<(), DecodeError> {
        if let Value::Bytes(bytes) = value {
            within_limit(self.len())?;
            self.push(text(bytes)?);
        }
        Ok(())
    }
}

impl FieldType for Vec<IpAllocation> {
    fn put(&self, number: u32, out: &mut Vec<u8>) {
        for item in self {
            put_bytes(number, &item.encode(), out);
        }
    }

    fn take(&mut self, value: &Value<'_>) -> Result<(), DecodeError> {
        if let Value::Bytes(bytes) = value {
            within_limit(self.len())?;
            self.push(IpAllocation::decode(bytes)?);
        }
        Ok(())
    }
}

fn within_limit(count: usize) -> Result<(), DecodeError> {
    if count < REPEATED_LIMIT { Ok(()) } else { Err(DecodeError::Limit) }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let (octet, rest) = self.rest.split_first().ok_or(DecodeError::Truncated)?;
            self.rest = rest;
            if shift == 63 && *octet > 1 {
                break;
            }
            value |= u64::from(octet & 0x7f) << shift;
            if octet & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(DecodeError::Varint)
    }

    fn bytes(&mut self, length: u64) -> Result<&'a [u8], DecodeError> {
        let length = usize::try_from(length).map_err(|_| DecodeError::Truncated)?;
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn tag(&mut self) -> Result<(u32, u32), DecodeError> {
        let tag = u32::try_from(self.varint()?).map_err(|_| DecodeError::Tag)?;
        if tag >> 3 == 0 { Err(DecodeError::Tag) } else { Ok((tag >> 3, tag & 7)) }
    }

    /// The next field, `None` at the end.
    fn field(&mut self) -> Result<Option<(u32, Value<'a>)>, DecodeError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (number, wire_type) = self.tag()?;
        let value = self.value(wire_type)?;
        if wire_type == GROUP_START {
            self.skip_group(number)?;
        }
        Ok(Some((number, value)))
    }

    fn value(&mut self, wire_type: u32) -> Result<Value<'a>, DecodeError> {
        match wire_type {
            VARINT => Ok(Value::Varint(self.varint()?)),
            1 => self.bytes(8).map(|_| Value::Other),
            LENGTH_DELIMITED => {
                let length = self.varint()?;
                Ok(Value::Bytes(self.bytes(length)?))
            }
            GROUP_START => Ok(Value::Other),
            5 => self.bytes(4).map(|_| Value::Other),
            _ => Err(DecodeError::Tag),
        }
    }

    /// Passes by a group and those in it, without recursion.
    fn skip_group(&mut self, number: u32) -> Result<(), DecodeError> {
        let mut open = vec![number];
        while let Some(innermost) = open.last().copied() {
            match self.tag()? {
                (number, GROUP_END) if number == innermost => drop(open.pop()),
                (number, GROUP_START) if open.len() < GROUP_DEPTH => open.push(number),
                (_, GROUP_START) => return Err(DecodeError::Limit),
                (_, wire_type) => {
                    self.value(wire_type)?;
                }
            }
        }
        Ok(())
    }
}

const GROUP_START: u32 = 3;
const GROUP_END: u32 = 4;

macro_rules! message {
    ($($name:ty { $($number:literal $field:ident),* })*) => {$(
        impl Message for $name {
            #[allow(unused_mut, reason = "the empty message has no field")]
            fn encode(&self) -> Vec<u8> {
                let mut out = Vec::new();
                $(self.$field.put($number, &mut out);)*
                out
            }

            #[allow(unused_mut, reason = "the empty message has no field")]
            fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
                let mut message = <$name>::default();
                let mut reader = Reader { rest: bytes };
                while let Some((number, value)) = reader.field()? {
                    match (number, value) {
                        $(($number, value) => message.$field.take(&value)?,)*
                        _ => {}
                    }
                }
                Ok(message)
            }
        }
    )*};
}

/// `google.protobuf.Empty`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Empty {}

/// `rpc.EnforceNpReply` and `rpc.DeleteNpReply`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NpReply {
    /// The policy agent did it.
    pub success: bool,
}

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthCheckRequest {
    /// Name of the service asked for; empty for the server as a whole.
    pub service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthCheckResponse {
    /// 0 unknown, 1 serving, 2 not serving, 3 service unknown.
    pub status: i32,
}

message! {
    AddNetworkRequest {
        1 pod_name, 2 pod_namespace, 3 infra_container_id, 4 netns, 5 if_name, 6 network_name, 7 container_id,
        8 client_version, 9 requires_multi_nic
    }
    IpAllocation { 1 ipv4, 2 ipv6, 3 device_number, 4 route_table_id }
    AddNetworkReply {
        1 success, 2 allocations, 5 use_external_snat, 6 vpc_v4_cidrs, 7 pod_vlan_id, 8 pod_eni_mac, 9 pod_eni_subnet_gw,
        10 parent_if_index, 12 vpc_v6_cidrs, 13 network_policy_mode, 100 failure
    }
    DelNetworkRequest {
        1 pod_name, 2 pod_namespace, 3 infra_container_id, 5 reason, 6 if_name, 7 network_name, 8 container_id,
        9 client_version, 10 pod_uid
    }
    DelNetworkReply { 1 success, 2 allocations, 4 pod_vlan_id, 6 network_policy_mode }
    NetworkPolicyAgentConfig {
        1 network_policy_mode, 2 multi_nic_enabled, 3 node_ipv4, 4 node_ipv6, 5 instance_id, 6 region
    }
    EnforceNpRequest { 1 pod_name, 2 pod_namespace, 3 network_policy_mode, 4 interface_count }
    DeleteNpRequest { 1 pod_name, 2 pod_namespace }
    NpReply { 1 success }
    HealthCheckRequest { 1 service }
    HealthCheckResponse { 1 status }
    Empty {}
}

/// Decodes foreign bytes as every message. For fuzzing: what decodes must survive being encoded and decoded again.
#[doc(hidden)]
pub fn fuzz_proto(bytes: &[u8]) {
    fn check<M: Message + PartialEq + fmt::Debug>(bytes: &[u8]) {
        if let Ok(message) = M::decode(bytes) {
            assert_eq!(M::decode(&message.encode()).as_ref(), Ok(&message), "encode and decode are inverse");
        }
    }
    check::<AddNetworkRequest>(bytes);
    check::<AddNetworkReply>(bytes);
    check::<DelNetworkRequest>(bytes);
    check::<DelNetworkReply>(bytes);
    check::<NetworkPolicyAgentConfig>(bytes);
    check::<EnforceNpRequest>(bytes);
    check::<DeleteNpRequest>(bytes);
    check::<NpReply>(bytes);
    check::<HealthCheckRequest>(bytes);
    check::<HealthCheckResponse>(bytes);
    check::<Empty>(bytes);
}

#[cfg(test)]
#[path = "proto_tests.rs"]
mod tests;
