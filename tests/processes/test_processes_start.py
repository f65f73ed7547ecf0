"""Processes that were started wrongly: the pieces that find out, each by itself. Nothing here trains."""

import json
import os
import select
import socket
import threading
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from support.processes.several import free_port

from deltaformer_jax.config import Config, Mixer, ModelConfig
from deltaformer_jax.config.saved import everywhere_the_same
from deltaformer_jax.host import code
from deltaformer_jax.processes import agreement, child, common, connect, coordinator
from deltaformer_jax.processes.coordinator import Coordinator
from deltaformer_jax.processes.hub import Hub, Member, Verdict
from deltaformer_jax.processes.place import Place
from deltaformer_jax.processes.relay import Relay
from deltaformer_jax.training import setup, workdir


def turned(hub, until=50):
    """The first verdict of a few turns of the hub, each after whatever can be read."""
    for _ in range(until):
        ready, _, _ = select.select(hub.sockets(), [], [], 0.02)
        for verdict in hub.turn({one.fileno() for one in ready}):
            return verdict
    return None


def test_a_fault_that_comes_with_the_hello_is_heard():
    """A process may fail as soon as all have met, before its supervisor has joined."""
    place, fault = Place("127.0.0.1:1", 2, 1, "flags"), Verdict("what is wrong", 2, 1, False)
    hub = Hub(place._replace(index=0))
    hub.begin()
    with socket.create_connection(("127.0.0.1", hub.port)) as scanner, socket.socket() as silent:
        scanner.sendall(b"GET / HTTP/1.1\n\n")
        assert turned(hub, 3) is None
        silent.connect(("127.0.0.1", hub.port))
        member = Member(place, "host", hub.port, hub.token)
        member.tell(fault=fault)
        assert turned(hub) == fault
    ours = [*hub._strangers, *(lines for lines, _ in hub._members.values()), member._lines, hub._server]
    for lines in ours:
        lines.close()


def test_the_port_of_the_coordinator_is_taken_once():
    address = f"127.0.0.1:{free_port()}"
    first = Coordinator(address)
    assert first.take_port() is None
    assert f"--coordinator {address}: port" in Coordinator(address).take_port()
    # gRPC's way of listening is still open, and so is that of a coordinator of before.
    with socket.socket() as grpc:
        grpc.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        grpc.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        grpc.listen()
        first._held.close()
        assert "cannot be used" in Coordinator(address).take_port()


def test_a_coordinator_that_was_there_is_missed(monkeypatch):
    monkeypatch.setattr(coordinator, "LOOK", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen = Coordinator(f"127.0.0.1:{server.getsockname()[1]}")
        assert seen.look(100.0) is None
    assert seen.look(101.0) is None
    assert "process 0 was there, and has ended" in seen.look(100.5 + coordinator.GONE)
    assert Coordinator(f"127.0.0.1:{free_port()}").look(1000.0) is None  # it may still come


@pytest.mark.parametrize(
    ("text", "index", "number"),
    [
        ("E1128 15:21:33.07 4801 coordination_service.cc:518] [1] 3 unexpectedly tried to connect with a different "
         "incarnation. It has likely restarted.\nF1128 client.h:80] Terminating\n", 0, 3),
        ("W1128 15:20:30.35 3525 coordination_service.cc:388] [1] ConnectAfterBarrierPasses: CANCELLED: Cancelled "
         "because there's a more recent barrier call for [Init] from the same task.\n", 2, 2),
        ("E1128 15:21:33.07 4809 coordination_service_agent.cc:289] Polled an error\n", 0, None),
    ],
)  # fmt: skip
def test_a_number_that_two_have_is_named(text, index, number):
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    relay = Relay(reader)
    relay.turn()
    os.close(reader)
    assert relay.held == text.encode() and relay.came_twice(index) == number


@pytest.mark.parametrize("index", [0, 1])
def test_another_number_of_processes_than_process_0_was_told(index, monkeypatch):
    store, told = {"deltaformer/place": json.dumps({"count": 2, "hub": [1, "token"]})}, []
    client = types.SimpleNamespace(key_value_set=store.__setitem__, blocking_key_value_get=lambda key, _: store[key])
    monkeypatch.setattr(common, "_client", lambda: client)
    monkeypatch.setattr(connect.jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(connect.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(connect.child, "where_the_parent_listens", lambda: [1, "token"])
    monkeypatch.setattr(connect.child, "connected", told.append)
    connect.connect(Place("a:1", 2, index, "flags"))
    if index == 1:
        with pytest.raises(ValueError, match="--processes 3: process 0 was started with --processes 2; start every"):
            connect.connect(Place("a:1", 3, 1, "flags"))
        assert told == [[1, "token"]] * 2  # the parents are connected before, so that all hear of it


def test_a_workdir_that_is_not_shared(tmp_path, monkeypatch):
    """Both processes are told so, and neither if it is the same folder, or an address."""
    here, barrier, gathered = threading.local(), threading.Barrier(2), {}

    def gather(_, value):
        gathered[here.index] = value
        barrier.wait(10)
        return [gathered[0], gathered[1]]

    def first(_, function):
        if here.index == 0:
            gathered["text"] = function()
        barrier.wait(10)
        return gathered["text"]

    monkeypatch.setattr(workdir, "SHARED_SECONDS", 0.3)
    monkeypatch.setattr(workdir.processes, "count", lambda: 2)
    monkeypatch.setattr(workdir.common, "gather", gather)
    monkeypatch.setattr(workdir.common, "first", first)
    for name, text in (("a", "process 0"), ("b", "an older one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.lock").write_text(text)
    said = {}

    def process(index, folder):
        here.index = index
        try:
            workdir.check_shared(folder)
        except ValueError as error:
            said[index] = str(error)

    def both(*folders):
        said.clear()
        threads = [threading.Thread(target=process, args=pair) for pair in enumerate(folders)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return said

    assert both(str(tmp_path / "a"), str(tmp_path / "a")) == {} == both("gs://bucket/a", "gs://bucket/a")
    for folder in ("b", "missing/folder"):
        found = both(str(tmp_path / "a"), str(tmp_path / folder))
        assert len(found) == 2 and all("process 1 does not see the file train.lock" in text for text in found.values())


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ((2, 2), []),
        ((2, 1), ["number of devices = 1 in process 1, 2 in process 0; give every process"] * 2),
    ],
)
def test_a_host_that_has_fewer_devices(devices, words, monkeypatch):
    """As one whose eighth card is broken: all are told so, before anything is compiled."""
    here, store, written, said = threading.local(), {}, threading.Condition(), {}

    def write(key, value):
        with written:
            store[key] = value
            written.notify_all()

    def read(key, _):
        with written:
            assert written.wait_for(lambda: key in store, 10)
            return store[key]

    client = types.SimpleNamespace(key_value_set=write, blocking_key_value_get=read)
    monkeypatch.setattr(common, "_client", lambda: client)
    monkeypatch.setattr(common, "_key", str)
    monkeypatch.setattr(common.processes, "count", lambda: 2)
    monkeypatch.setattr(common.processes, "index", lambda: here.index)
    one = types.SimpleNamespace(device_kind="a kind")
    monkeypatch.setattr(setup.jax, "local_devices", lambda: [one] * devices[here.index])

    def process(index):
        here.index = index
        try:
            setup._check_same_devices()
        except ValueError as error:
            said[index] = str(error)

    threads = [threading.Thread(target=process, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [said[index][: len(text)] for index, text in enumerate(words)] == words and len(said) == len(words)


def test_a_vote_has_no_limit(monkeypatch):
    """The first one is compiled, and is where the devices of all hosts meet: neither may be taken for a hang."""
    limits, written = [], types.SimpleNamespace(write=lambda *_: None)

    def begin(*_):
        limits.append(child._link.now[1])
        return np.array([1, 0])

    monkeypatch.setattr(agreement.Together, "_begin", begin)
    monkeypatch.setattr(child, "_link", types.SimpleNamespace(now=("training", child.TRAINING), board=written))
    together = agreement.Together(types.SimpleNamespace(requested=False), Mesh(np.array(jax.devices()[:1]), ("data",)))
    together.vote()
    assert together.requested and limits == [0, 0] and child._link.now == ("training", child.TRAINING)


def test_the_users_own_modules_are_compared(tmp_path, monkeypatch):
    """Of which the settings have only the names."""
    monkeypatch.syspath_prepend(tmp_path)
    config = Config(model=ModelConfig(mixers=("delta_former", Mixer("own_mixer_of_a_host:One", width=3))))
    found = []
    for text in ("class One: ...\n", "class One: pass\n"):
        (tmp_path / "own_mixer_of_a_host.py").write_text(text)
        found.append(everywhere_the_same(config))
    differing = [name for name in found[0] if found[0][name] != found[1][name]]
    assert differing == ["hash of the module own_mixer_of_a_host"] and "none" not in found[0][differing[0]]


def test_the_variables_that_change_what_is_compiled():
    found = code.variables({"XLA_FLAGS": "--xla_dump_to=/a --xla_b=1", "JAX_ENABLE_X64": "1", "JAX_PROCESS_ID": "1"})
    assert {"version of triton", "version of libtpu"} <= code.code().keys()
    assert found.pop("$XLA_FLAGS") == "--xla_b=1" and found.pop("$JAX_ENABLE_X64") == "1"
    assert set(found.values()) == {""} and "$JAX_PROCESS_ID" not in found
