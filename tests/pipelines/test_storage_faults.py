"""Storage on a real S3 server behind a proxy that spoils answers: tried again, then an error that names the object."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.storage import faults as storage_faults
from pipelines.storage.states import ObjectFolder
from tests.fixtures.fault_proxy import Fault, FaultProxy

DATA = bytes(range(256)) * 1000


@pytest.fixture
def bucket(s3_uri: str, faults: FaultProxy) -> str:
    return s3_uri


REQUEST_FAULTS: list[Fault] = ["slow_down", "error", "silence", "reset"]
# As the fixture's settings say: the layers must not multiply. Only aiohttp itself repeats, once, what was reset.
NUM_REQUESTS = {"slow_down": 3, "error": 3, "silence": 3, "reset": 6}
BODY_FAULTS: list[Fault] = ["reset_body", "short_body", "stalled_body"]


@pytest.mark.s3
@pytest.mark.parametrize("fault", [*REQUEST_FAULTS, *BODY_FAULTS])
def test_passing_fault_of_a_read_is_survived(bucket: str, faults: FaultProxy, tmp_path: Path, fault: Fault) -> None:
    uri = storage.join(bucket, "shard.arrow")
    storage.write_bytes(uri, DATA)

    def download() -> bytes:
        storage.download(uri, tmp_path / "shard.arrow")
        return (tmp_path / "shard.arrow").read_bytes()

    for times, read in (
        (2, lambda: storage.read_bytes(uri)),
        (2, download),
        (2, lambda: ObjectFolder(bucket).read("shard.arrow")[0]),
        (1, lambda: storage.read_range(uri, 0, len(DATA))),
    ):
        faults.heal()
        faults.inject(fault, "GET", "shard.arrow", times)
        assert read() == DATA
        assert faults.served == [("GET", f"/{bucket[5:]}/shard.arrow")] * (times + 1)


@pytest.mark.s3
def test_an_expired_token_is_no_fault_of_the_object(bucket: str, faults: FaultProxy) -> None:
    """As a PermissionError, it would be taken for an object that is closed to everybody."""
    uri = storage.join(bucket, "shard.arrow")
    storage.write_bytes(uri, DATA)
    faults.inject("expired", "GET")
    message = rf"^{uri}: the store answers: The provided token has expired\. \(ExpiredToken, 1 attempt\)$"
    for read in (storage.read_bytes, lambda _: ObjectFolder(bucket).read("shard.arrow")):
        with pytest.raises(storage.StorageError, match=message):
            read(uri)


@pytest.mark.parametrize("package", ["gcsfs.retry", "google.auth.exceptions"])
def test_an_error_of_google_s_names_the_object(package: str) -> None:
    """They are no OSError."""
    error = type("HttpError", (Exception,), {"__module__": package})
    message = r"^gs://a/b: no whole answer from the store: Invalid Credentials$"
    with pytest.raises(storage.StorageError, match=message), storage_faults.naming("gs://a/b"):
        raise error("Invalid Credentials")
    with pytest.raises(PermissionError, match="'gs://a/b'"), storage_faults.naming("gs://a/b"):
        raise OSError("Forbidden: https://storage.googleapis.com/b")
    with pytest.raises(KeyError), storage_faults.naming("gs://a/b"):
        raise KeyError("a fault of ours")


@pytest.mark.s3
@pytest.mark.parametrize("fault", [*REQUEST_FAULTS, *BODY_FAULTS])
def test_lasting_fault_of_a_read_names_the_object(
    bucket: str, faults: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    uri = storage.join(bucket, "shard.arrow")
    storage.write_bytes(uri, DATA)
    for read in (storage.read_bytes, lambda uri: storage.download(uri, tmp_path / "shard.arrow")):
        faults.heal()
        faults.inject(fault, "GET")
        with pytest.raises(storage.StorageError, match=f"^{uri}: "):
            read(uri)
        assert len(faults.served) == NUM_REQUESTS.get(fault, storage_faults._BODY_TRIES)


@pytest.mark.s3
@pytest.mark.parametrize("fault", [*REQUEST_FAULTS, "lost_answer"])
def test_passing_fault_of_a_write_is_survived(bucket: str, faults: FaultProxy, fault: Fault) -> None:
    uri = storage.join(bucket, "shard.arrow")
    faults.inject(fault, "PUT", times=2)
    storage.write_bytes(uri, DATA)
    assert faults.count("PUT") == 3
    assert storage.read_bytes(uri) == DATA


@pytest.mark.s3
@pytest.mark.parametrize("fault", REQUEST_FAULTS)
def test_lasting_fault_of_a_write_leaves_nothing(bucket: str, faults: FaultProxy, fault: Fault) -> None:
    uri = storage.join(bucket, "shard.arrow")
    faults.inject(fault, "PUT")
    for write in (storage.write_bytes, storage.put_if_absent):
        with pytest.raises(storage.StorageError, match=f"^{uri}: "):
            write(uri, DATA)
    assert faults.count("PUT") == 2 * NUM_REQUESTS[fault]
    faults.heal()
    assert storage.list_names(bucket) == []


@pytest.mark.s3
def test_conditional_write_whose_answer_was_lost_is_ours(bucket: str, faults: FaultProxy) -> None:
    uri = storage.join(bucket, "receipt.json")
    faults.inject("lost_answer", "PUT", times=1)
    assert storage.put_if_absent(uri, b"mine")
    assert faults.count("PUT") == 2
    assert storage.read_bytes(uri) == b"mine"


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["lost_answer", "slow_down"])
def test_repeated_conditional_write_does_not_take_anothers_for_ours(
    bucket: str, faults: FaultProxy, fault: Fault
) -> None:
    uri = storage.join(bucket, "receipt.json")
    storage.write_bytes(uri, b"theirs")
    faults.inject(fault, "PUT", times=1)
    assert not storage.put_if_absent(uri, b"mine")
    assert storage.read_bytes(uri) == b"theirs"


@pytest.mark.s3
def test_look_for_conditional_writes_may_lose_an_answer(bucket: str, faults: FaultProxy) -> None:
    uri = storage.join(bucket, "plan.json")
    storage.write_bytes(uri, b"{}")
    faults.inject("lost_answer", "PUT", times=1)
    storage.require_conditional_writes(uri)
    assert faults.count("PUT") == 3


@pytest.mark.s3
def test_lasting_fault_of_a_look_names_the_object(bucket: str, faults: FaultProxy) -> None:
    uri = storage.join(bucket, "folder")
    for method in ("GET", "HEAD"):
        faults.inject("slow_down", method)
    for look in (storage.exists, storage.fingerprint, storage.list_names):
        with pytest.raises(storage.StorageError, match=f"^{uri}: "):
            look(uri)


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    random.seed(0)
    for attempt in range(1, 9):
        for _ in range(100):
            storage_faults.pause(attempt)
    rounds = [slept[start : start + 100] for start in range(0, 800, 100)]
    assert all(len(set(pauses)) == 100 for pauses in rounds)  # workers do not come back together
    means = [sum(pauses) / 100 for pauses in rounds]
    assert means[:6] == sorted(means[:6])
    assert max(slept) <= 5


def test_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    for write in (storage.write_bytes, storage.put_if_absent):
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/shard.arrow'"):
            write(str(tmp_path / "shard.arrow"), b"half")
    assert list(tmp_path.iterdir()) == []
