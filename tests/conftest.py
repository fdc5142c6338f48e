"""Fixtures shared by all rooms, one file per thing that is started or built."""

import os
import signal

import pytest

import tests.processes.sitecustomize  # noqa: F401 (this process starts like all others)

# Before anything imports torch: `make test` runs three processes on two cores, each with jobs of its own, and four busy
# threads of tiny matrices on two cores wait for each other more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each Ray that a test starts would start a worker per CPU beforehand, and most tests need others, with an environment.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_enable_worker_prestart", "0")
# Hundreds of processes that tests start import the project: the first of them compiles it for all others.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

pytest_plugins = [
    "tests.fixtures.ray_session",
    "tests.fixtures.s3",
    "tests.fixtures.fault_proxy",
    "tests.fixtures.small_disk",
    "tests.fixtures.tiny",
    "tests.fixtures.batches",
    "tests.fixtures.http_service",
]


def pytest_configure() -> None:
    # Jobs of a shell in the background ignore Ctrl-C, and so would every process that a test starts and interrupts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that start Ray take minutes, others seconds: these fill the gap at the end, where one process of `make test`
    # is done before the others.
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
