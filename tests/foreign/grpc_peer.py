"""The other end of tests/grpc_foreign.rs: Google's gRPC as client and as server, with messages coded by hand.

Usage: grpc_peer.py client|server|health|stranger SOCKET. Fails with a traceback.
"""

import os
import socket
import sys
import threading
import time
from concurrent import futures

ADD = "/rpc.CNIBackend/AddNetwork"
DEL = "/rpc.CNIBackend/DelNetwork"
HEALTH = "/grpc.health.v1.Health/Check"
MESSAGE = "datastore: unknown pod (100% sure \u2603)"


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def text(number, value):
    value = value.encode()
    return varint(number << 3 | 2) + varint(len(value)) + value


def add_request(pod_name, sleep_ms=0):
    return text(1, pod_name) + text(5, str(sleep_ms))


def add_reply(mac):
    """AddNetworkReply {success, pod_eni_mac}, the default left out as proto3 wants it."""
    return b"\x08\x01" + (text(8, mac) if mac else b"")


def options():
    return [("grpc.default_authority", "localhost"), ("grpc.enable_retries", 0)]


def unary(channel, method):
    return channel.unary_unary(method, request_serializer=None, response_deserializer=None)


def code_of(call):
    import grpc

    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details()
    raise AssertionError("call succeeded")


def client(path):
    import grpc

    channel = grpc.insecure_channel("unix:" + path, options=options())
    add, remove = unary(channel, ADD), unary(channel, DEL)
    assert add(add_request("first"), timeout=20, wait_for_ready=True) == add_reply("first")

    started = time.monotonic()
    for n in range(500):
        assert add(add_request(str(n)), timeout=20) == add_reply(str(n))
    print("foreign client, one channel: %d calls/s" % (500 / (time.monotonic() - started)))

    calls = [add.future(add_request("c%d" % n, n % 3), timeout=60) for n in range(100)]
    for n, call in enumerate(calls):
        assert call.result() == add_reply("c%d" % n)

    errors = []

    def several(channel, name):
        try:
            call = unary(channel, ADD)
            for n in range(50):
                assert call(add_request(name + str(n)), timeout=60) == add_reply(name + str(n))
        except Exception as error:
            errors.append(error)

    separate = [
        grpc.insecure_channel("unix:" + path, options=options() + [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(4)
    ]
    threads = [threading.Thread(target=several, args=(c, "t%d-" % n)) for n, c in enumerate(separate + [channel] * 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors

    health = unary(channel, HEALTH)
    assert health(b"", timeout=20) == b"\x08\x01"
    assert health(text(1, "grpc.health.v1.aws-node"), timeout=20) == b"\x08\x01"
    assert code_of(lambda: health(text(1, "other"), timeout=20))[0] == grpc.StatusCode.NOT_FOUND
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
    assert code_of(lambda: list(watch(b"", timeout=20)))[0] == grpc.StatusCode.UNIMPLEMENTED
    # A stream whose client never ends its side, as grpcurl does for reflection.
    held = threading.Event()

    def requests():
        yield b"x"
        held.wait(30)

    info = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    assert code_of(lambda: list(info(requests(), timeout=20)))[0] == grpc.StatusCode.UNIMPLEMENTED
    held.set()

    assert code_of(lambda: remove(b"", timeout=20)) == (grpc.StatusCode.UNKNOWN, MESSAGE)
    started = time.monotonic()
    assert code_of(lambda: add(add_request("slow", 1500), timeout=0.2))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 1.4

    large = "x" * (900 * 1024)
    for _ in range(5):
        assert add(add_request(large), timeout=60) == add_reply(large)
    too_large = add_request("x" * (1 << 20))
    assert code_of(lambda: add(too_large, timeout=60))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED

    # Enough different metadata to turn the header tables over several times.
    for n in range(200):
        metadata = [("k%d" % (n % 50), "value-%d-%s" % (n, "y" * (n % 90))), ("b-bin", bytes(range(n)))]
        assert add(add_request("m"), timeout=20, metadata=metadata) == add_reply("m")
    channel.close()
    for c in separate:
        c.close()


def server(path):
    import grpc

    def add(request, context):
        # Field 1 is the pod's name: a tag, a length, the text.
        length, shift, at = 0, 0, 1
        while True:
            length |= (request[at] & 0x7F) << shift
            shift += 7
            at += 1
            if request[at - 1] < 0x80:
                break
        name = request[at : at + length]
        return add_reply(name.decode())

    def remove(request, context):
        context.abort(grpc.StatusCode.UNKNOWN, MESSAGE)

    def slow(request, context):
        time.sleep(5)
        return b""

    def huge(request, context):
        return b"\x0a" * (2 << 20)

    methods = {
        ADD: add,
        DEL: remove,
        "/rpc.NPBackend/EnforceNpToPod": slow,
        "/rpc.NPBackend/DeletePodNp": huge,
        HEALTH: lambda request, context: b"\x08\x01",
    }

    class Generic(grpc.GenericRpcHandler):
        def service(self, details):
            handler = methods.get(details.method)
            return handler and grpc.unary_unary_rpc_method_handler(handler)

    running = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    running.add_generic_rpc_handlers((Generic(),))
    running.add_insecure_port("unix:" + path)
    running.start()
    print("ready", flush=True)
    sys.stdin.read()
    running.stop(0).wait()


def health(path):
    """The health service by hand, on the socket and on a port of its own, which is printed."""
    import grpc

    def check(request, context):
        # Field 1 is the service's name.
        name = request[2:].decode()
        if name == "missing":
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        if name == "slow":
            time.sleep(5)
        if name == "agent":
            return varint(1 << 3) + varint(len(dict(context.invocation_metadata())["user-agent"]))
        return {"down": b"\x08\x02", "nobody": b"\x08\x03", "silent": b""}.get(name, b"\x08\x01")

    class Generic(grpc.GenericRpcHandler):
        def service(self, details):
            return details.method == HEALTH and grpc.unary_unary_rpc_method_handler(check) or None

    running = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    running.add_generic_rpc_handlers((Generic(),))
    running.add_insecure_port("unix:" + path)
    port = running.add_insecure_port("127.0.0.1:0")
    other = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    other.add_insecure_port("unix:" + path + ".other")
    running.start()
    other.start()
    print(port, flush=True)
    sys.stdin.read()
    running.stop(0)
    other.stop(0).wait()


def stranger(path):
    """Neither root nor the server's user: the connection is closed without a word."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(20)
    peer.connect(path)
    try:
        assert peer.recv(1) == b"", "served"
    except ConnectionResetError:
        pass


if __name__ == "__main__":
    {"client": client, "server": server, "health": health, "stranger": stranger}[sys.argv[1]](sys.argv[2])
