use super::*;
use proptest::prelude::*;

#[track_caller]
fn check<M: Message + PartialEq + fmt::Debug>(message: &M, bytes: &[u8]) {
    assert_eq!(message.encode(), bytes);
    assert_eq!(M::decode(bytes).as_ref(), Ok(message));
}

/// Field by field, so that a wrong number shows.
#[test]
fn fields_have_the_numbers_of_the_specification() {
    let s = |text: &str| text.to_owned();
    let add = AddNetworkRequest {
        pod_name: s("a"),
        pod_namespace: s("b"),
        infra_container_id: s("c"),
        netns: s("d"),
        if_name: s("e"),
        network_name: s("f"),
        container_id: s("g"),
        client_version: s("h"),
        requires_multi_nic: true,
    };
    check(&add, b"\x0a\x01a\x12\x01b\x1a\x01c\x22\x01d\x2a\x01e\x32\x01f\x3a\x01g\x42\x01h\x48\x01");
    let del = DelNetworkRequest {
        pod_name: s("a"),
        pod_namespace: s("b"),
        infra_container_id: s("c"),
        reason: s("d"),
        if_name: s("e"),
        network_name: s("f"),
        container_id: s("g"),
        client_version: s("h"),
        pod_uid: s("i"),
    };
    check(&del, b"\x0a\x01a\x12\x01b\x1a\x01c\x2a\x01d\x32\x01e\x3a\x01f\x42\x01g\x4a\x01h\x52\x01i");
    let allocation = IpAllocation { ipv4: s("4"), ipv6: s("6"), device_number: -1, route_table_id: 300 };
    let encoded = b"\x0a\x014\x12\x016\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x20\xac\x02";
    check(&allocation, encoded);
    let add_reply = AddNetworkReply {
        success: true,
        allocations: vec![allocation.clone(), IpAllocation::default()],
        use_external_snat: true,
        vpc_v4_cidrs: vec![s("x"), s("")],
        vpc_v6_cidrs: vec![s("y")],
        pod_vlan_id: 1,
        pod_eni_mac: s("m"),
        pod_eni_subnet_gw: s("g"),
        parent_if_index: 2,
        network_policy_mode: s("p"),
        failure: s("f"),
    };
    let tail = b"\x12\x00\x28\x01\x32\x01x\x32\x00\x38\x01\x42\x01m\x4a\x01g\x50\x02\x62\x01y\x6a\x01p\xa2\x06\x01f";
    check(&add_reply, &[b"\x08\x01\x12\x14", &encoded[..], tail].concat());
    let del_reply = DelNetworkReply {
        success: true,
        allocations: vec![IpAllocation { ipv4: s("4"), ..Default::default() }],
        pod_vlan_id: 7,
        network_policy_mode: s("p"),
    };
    check(&del_reply, b"\x08\x01\x12\x03\x0a\x014\x20\x07\x32\x01p");
    let config = NetworkPolicyAgentConfig {
        network_policy_mode: s("a"),
        multi_nic_enabled: true,
        node_ipv4: s("b"),
        node_ipv6: s("c"),
        instance_id: s("d"),
        region: s("e"),
    };
    check(&config, b"\x0a\x01a\x10\x01\x1a\x01b\x22\x01c\x2a\x01d\x32\x01e");
    let enforce =
        EnforceNpRequest { pod_name: s("a"), pod_namespace: s("b"), network_policy_mode: s("c"), interface_count: 1 };
    check(&enforce, b"\x0a\x01a\x12\x01b\x1a\x01c\x20\x01");
    check(&DeleteNpRequest { pod_name: s("a"), pod_namespace: s("b") }, b"\x0a\x01a\x12\x01b");
    check(&NpReply { success: true }, b"\x08\x01");
    check(&HealthCheckRequest { service: s("a") }, b"\x0a\x01a");
    check(&HealthCheckResponse { status: 1 }, b"\x08\x01");
    check(&Empty {}, b"");
    check(&AddNetworkReply::default(), b"");
}

#[test]
fn what_a_foreign_encoder_may_do_is_understood() {
    let check = |bytes: &[u8], expected: Result<IpAllocation, DecodeError>| {
        assert_eq!(IpAllocation::decode(bytes), expected, "{bytes:?}");
    };
    let with = |ipv4: &str, device_number: i32| IpAllocation { ipv4: ipv4.into(), device_number, ..Default::default() };
    check(b"\x0a\x01a\x0a\x01b", Ok(with("b", 0))); // the last wins
    check(b"\x18\xff\xff\xff\xff\x0f", Ok(with("", -1))); // five octets: truncated to 32 bits
    check(b"\x18\x83\x00", Ok(with("", 3))); // longer than need be
    check(b"\x08\x05\x0a\x01a", Ok(with("a", 0))); // a string's number with a varint: unknown
    check(b"\x1a\x01x", Ok(with("", 0)));
    check(b"\xa0\x06\x05\xa9\x06abcdefgh\xaa\x06\x02xy\xad\x06abcd\x0a\x01a", Ok(with("a", 0))); // field 100, all types
    check(b"\xa3\x06\x08\x01\xab\x06\x12\x01x\xac\x06\xa4\x06\x0a\x01a", Ok(with("a", 0))); // nested groups
    check(b"\x0b\x0c\x0a\x01a", Ok(with("a", 0))); // a known number as a group
    check(b"\x0a", Err(DecodeError::Truncated));
    check(b"\x0a\x05a", Err(DecodeError::Truncated));
    check(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", Err(DecodeError::Truncated));
    check(b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", Err(DecodeError::Varint));
    check(b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", Err(DecodeError::Varint));
    check(b"\x18\xff", Err(DecodeError::Truncated));
    check(b"\xa9\x06abc", Err(DecodeError::Truncated));
    check(b"\xad\x06abc", Err(DecodeError::Truncated));
    check(b"\x0a\x01\xff", Err(DecodeError::Utf8));
    check(b"\x00\x01", Err(DecodeError::Tag));
    check(b"\x0e", Err(DecodeError::Tag));
    check(b"\x0c", Err(DecodeError::Tag)); // an end without its start
    check(b"\xa3\x06\x0c", Err(DecodeError::Tag)); // the end of another group
    check(b"\xa3\x06", Err(DecodeError::Truncated));
    check(&[0x0b; 33], Err(DecodeError::Limit));
}

#[test]
fn repeated_fields_are_bounded() {
    let most = b"\x12\x00".repeat(REPEATED_LIMIT);
    assert_eq!(AddNetworkReply::decode(&most).unwrap().allocations.len(), REPEATED_LIMIT);
    let more = b"\x12\x00".repeat(REPEATED_LIMIT + 1);
    assert_eq!(AddNetworkReply::decode(&more), Err(DecodeError::Limit));
    let more = b"\x32\x00".repeat(REPEATED_LIMIT + 1);
    assert_eq!(AddNetworkReply::decode(&more), Err(DecodeError::Limit));
}

prop_compose! {
    fn allocation()(ipv4 in ".{0,20}", ipv6 in ".{0,40}", device_number: i32, route_table_id: i32) -> IpAllocation {
        IpAllocation { ipv4, ipv6, device_number, route_table_id }
    }
}

prop_compose! {
    fn add_reply()(
        flags: (bool, bool),
        allocations in prop::collection::vec(allocation(), 0..4),
        cidrs in prop::array::uniform2(prop::collection::vec(".{0,20}", 0..4)),
        numbers: (i32, i32),
        texts in prop::array::uniform4(".{0,30}"),
    ) -> AddNetworkReply {
        let [vpc_v4_cidrs, vpc_v6_cidrs] = cidrs;
        let [pod_eni_mac, pod_eni_subnet_gw, network_policy_mode, failure] = texts;
        AddNetworkReply {
            success: flags.0, use_external_snat: flags.1, allocations, vpc_v4_cidrs, vpc_v6_cidrs,
            pod_vlan_id: numbers.0, parent_if_index: numbers.1, pod_eni_mac, pod_eni_subnet_gw, network_policy_mode, failure,
        }
    }
}

prop_compose! {
    fn add_request()(t in prop::collection::vec(".{0,200}", 8), requires_multi_nic: bool) -> AddNetworkRequest {
        AddNetworkRequest {
            pod_name: t[0].clone(), pod_namespace: t[1].clone(), infra_container_id: t[2].clone(), netns: t[3].clone(),
            if_name: t[4].clone(), network_name: t[5].clone(), container_id: t[6].clone(), client_version: t[7].clone(),
            requires_multi_nic,
        }
    }
}

prop_compose! {
    fn del_request()(t in prop::collection::vec(".{0,200}", 9)) -> DelNetworkRequest {
        DelNetworkRequest {
            pod_name: t[0].clone(), pod_namespace: t[1].clone(), infra_container_id: t[2].clone(), reason: t[3].clone(),
            if_name: t[4].clone(), network_name: t[5].clone(), container_id: t[6].clone(), client_version: t[7].clone(),
            pod_uid: t[8].clone(),
        }
    }
}

fn round_trip<M: Message + PartialEq + fmt::Debug>(message: &M) -> Result<(), TestCaseError> {
    let decoded = M::decode(&message.encode());
    prop_assert_eq!(decoded.as_ref(), Ok(message));
    Ok(())
}

proptest! {
    #[test]
    fn messages_survive_the_wire(
        add_reply in add_reply(), add in add_request(), del in del_request(), vlan: i32, count: i32, status: i32,
        t in prop::array::uniform5(".{0,50}"), flag: bool,
    ) {
        let [a, b, c, d, e] = t;
        round_trip(&add)?;
        round_trip(&del)?;
        let AddNetworkReply { allocations, .. } = add_reply.clone();
        round_trip(&add_reply)?;
        round_trip(&DelNetworkReply {
            success: flag, allocations, pod_vlan_id: vlan, network_policy_mode: a.clone(),
        })?;
        round_trip(&EnforceNpRequest {
            pod_name: a.clone(), pod_namespace: b.clone(), network_policy_mode: c.clone(), interface_count: count,
        })?;
        round_trip(&DeleteNpRequest { pod_name: b.clone(), pod_namespace: a.clone() })?;
        round_trip(&HealthCheckRequest { service: e.clone() })?;
        round_trip(&HealthCheckResponse { status })?;
        round_trip(&NpReply { success: flag })?;
        round_trip(&NetworkPolicyAgentConfig {
            network_policy_mode: a, multi_nic_enabled: flag, node_ipv4: b, node_ipv6: c, instance_id: d, region: e,
        })?;
    }

    #[test]
    fn foreign_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz_proto(&bytes);
    }

    #[test]
    fn damaged_messages_do_no_harm(reply in add_reply(), at: prop::sample::Index, value: u8, cut: prop::sample::Index) {
        let mut bytes = reply.encode();
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = value;
            fuzz_proto(&bytes);
            bytes.truncate(cut.index(bytes.len()));
            fuzz_proto(&bytes);
        }
    }
}
