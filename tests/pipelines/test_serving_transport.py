"""What Serve is told about the way of a request."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import pipelines.serving.transport as transport
from pipelines.serving.transport import ENVIRONMENT, find_haproxy, local_environment, set_environment, write_launcher

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"


@pytest.fixture(autouse=True)
def no_launcher_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BINARY, raising=False)


def test_the_launcher_starts_haproxy_without_splice(tmp_path: Path) -> None:
    haproxy = find_haproxy()
    assert haproxy is not None  # ray[serve] brings it
    launcher = write_launcher(haproxy, tmp_path / "launcher")
    said = subprocess.run([launcher, "-vv"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("HAProxy version 2.")
    arguments = tmp_path / "argu ments"
    arguments.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    arguments.chmod(0o700)
    launcher = write_launcher(str(arguments), tmp_path / "launcher")  # over the one that was there
    assert subprocess.check_output([launcher, "-f", "a b", "-sf", "1"], text=True) == "-dS|-f|a b|-sf|1|"


def test_two_services_on_one_machine_get_ports_of_their_own_and_files_that_nobody_else_reads() -> None:
    first, second = local_environment(), local_environment()
    for environment in (first, second):
        assert ENVIRONMENT.items() <= environment.items()
        assert Path(environment["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent.stat().st_mode & 0o777 == 0o700
    ports = [environment[name] for environment in (first, second) for name in first if name.endswith("_PORT")]
    assert len(ports) == 6
    assert len(set(ports[:3])) == 3


def test_a_folder_that_is_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    monkeypatch.setattr(transport, "_folder", lambda: folder)
    with pytest.raises(PermissionError, match=f"{folder} is open to other users"):
        local_environment()


def test_without_haproxy_serve_carries_requests_itself_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transport, "find_haproxy", lambda: None)
    assert local_environment() == {**ENVIRONMENT, "RAY_SERVE_ENABLE_HA_PROXY": "0"}
    assert "no HAProxy here" in caplog.text


def test_what_the_caller_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BINARY, "/opt/haproxy")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    environment = {BINARY: "/opt/haproxy", "RAY_SERVE_ENABLE_HA_PROXY": "0"}
    monkeypatch.setattr(transport.os, "environ", environment)
    set_environment()
    assert environment[BINARY] == "/opt/haproxy"
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert environment.keys() > ENVIRONMENT.keys()
