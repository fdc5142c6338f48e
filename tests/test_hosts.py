"""The hosts that tests build: what they reach, what a cut does, and that nothing of them remains."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.fixtures.host_cluster import wait_until
from tests.fixtures.hosts import Host, HostsUnavailable, Network, build_hosts, ip

_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3]))"
_BUILD_AND_WAIT = """
import sys, time
from tests.fixtures.hosts import build_hosts
with build_hosts("one") as network:
    host = network.hosts["one"]
    process = host.start(["sleep", "600"], {"PATH": "/usr/bin:/bin"}, network.folder / "log")
    print(host.namespace, network.switch, process.pid, network.folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        with build_hosts("one", "other") as network:
            yield network
    except HostsUnavailable as reason:
        pytest.skip(str(reason))


def connect(network: Network, host: Host, server: socket.socket, seconds: float) -> str:
    """What is said where `host` connects to `server`: nothing where that works."""
    log = network.folder / "connect.log"
    address, port = server.getsockname()
    arguments = [sys.executable, "-c", _CONNECT, address, str(port), str(seconds)]
    host.start(arguments, os.environ, log).wait(30)
    return log.read_text()


def test_a_host_reaches_this_machine_until_it_is_cut_off_and_again_when_it_is_back(network: Network) -> None:
    one, other = network.hosts.values()
    with socket.create_server((network.address, 0)) as server:
        assert connect(network, one, server, 10) == ""
        network.cut_off(one)
        assert "TimeoutError: timed out" in connect(network, one, server, 0.5)  # nobody refuses: packets vanish
        assert connect(network, other, server, 10) == ""
        network.plug_in(one)
        assert connect(network, one, server, 10) == ""


def test_each_host_has_an_address_and_a_loopback_of_its_own(network: Network) -> None:
    one, other = network.hosts.values()
    assert len({network.address, one.address, other.address}) == 3
    assert f"{one.address}/24" in ip("-n", one.namespace, "-4", "address", "show", "dev", "eth0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "ConnectionRefusedError" in connect(network, one, server, 10)


@pytest.mark.usefixtures("network")  # skips where there are none
def test_a_test_run_that_is_killed_leaves_nothing_behind() -> None:
    run = subprocess.Popen([sys.executable, "-c", _BUILD_AND_WAIT], stdout=subprocess.PIPE, text=True)
    assert run.stdout
    namespace, switch, process, folder = run.stdout.readline().split()
    assert {namespace, switch} <= set(ip("netns", "list").split())
    os.kill(int(process), 0)
    run.send_signal(signal.SIGKILL)
    run.communicate()

    def is_gone() -> bool:
        names = ip("netns", "list").split()
        return not (
            {namespace, switch} & set(names) or os.path.exists(folder) or os.path.exists(f"/proc/{process}/exe")
        )

    wait_until(is_gone, 30, "all of it is gone", lambda: ip("netns", "list"))
    assert namespace.rpartition("-")[0] not in ip("link", "show")


def test_without_root_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostsUnavailable, match="which only root may make"), build_hosts("one"):
        pass


def test_without_the_ip_command_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostsUnavailable, match="there is no `ip` here"), build_hosts("one"):
        pass
