"""The other end of tests/policy.rs: Google's gRPC as network policy agent and as a client of the daemon's configuration.

Usage: policy_peer.py agent|config SOCKET. Fails with a traceback.

The agent answers by the pod's name and prints each call as it comes, a line of JSON.
"""

import json
import os
import sys
import threading
import time
from concurrent import futures

import grpc

ENFORCE = "/rpc.NPBackend/EnforceNpToPod"
DELETE = "/rpc.NPBackend/DeletePodNp"
CONFIG = "/rpc.ConfigServerBackend/GetNetworkPolicyConfigs"


def varint(data, at):
    value, shift = 0, 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if data[at - 1] < 0x80:
            return value, at


def decode(data):
    """The fields of a message by number: texts and numbers."""
    fields, at = {}, 0
    while at < len(data):
        tag, at = varint(data, at)
        value, at = varint(data, at)
        if tag & 7 == 2:
            value, at = data[at : at + value].decode(), at + value
        fields[str(tag >> 3)] = value
    return fields


def agent(path):
    lock = threading.Lock()

    def serve(what):
        def call(request, context):
            fields = decode(request)
            with lock:
                print(json.dumps({"call": what, "left": context.time_remaining() or 0, **fields}), flush=True)
            behaviour = fields.get("1", "").split("-")[0]
            if behaviour == "refused":
                return b""
            if behaviour == "aborted":
                context.abort(grpc.StatusCode.INTERNAL, "no map for this pod")
            if behaviour == "garbage":
                return b"\xff\xff\xff"
            if behaviour == "slow":
                time.sleep(13)
            if behaviour == "dies":
                os._exit(7)
            return b"\x08\x01"

        return grpc.unary_unary_rpc_method_handler(call)

    methods = {ENFORCE: serve("enforce"), DELETE: serve("delete")}

    class Generic(grpc.GenericRpcHandler):
        def service(self, details):
            return methods.get(details.method)

    if os.path.exists(path):
        os.remove(path)
    running = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    running.add_generic_rpc_handlers((Generic(),))
    running.add_insecure_port("unix:" + path)
    running.start()
    print(json.dumps({"call": "ready"}), flush=True)
    sys.stdin.read()
    running.stop(0)


def config(path):
    """Asks again and again while a crowd of other calls is none of its business; prints the answer."""
    channel = grpc.insecure_channel("unix:" + path, options=[("grpc.default_authority", "localhost")])
    ask = channel.unary_unary(CONFIG, request_serializer=None, response_deserializer=None)
    answers = {ask(b"", timeout=30, wait_for_ready=True) for _ in range(20)}
    assert len(answers) == 1, answers
    print(json.dumps(decode(answers.pop())))
    channel.close()


if __name__ == "__main__":
    {"agent": agent, "config": config}[sys.argv[1]](sys.argv[2])
