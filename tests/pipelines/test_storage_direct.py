"""Pictures of S3 by the client that takes little CPU: the same bytes and states, and s3fs where it does not answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import storage
from pipelines.storage.direct import DirectS3
from pipelines.storage.states import ObjectFolder, TooLargeError
from tests.fixtures.fault_proxy import FaultProxy

# The last two are what a client might make of the two before.
NAMES = ["a.jpg", "b/c-1_2.jpg", "d e.jpg", "\u00e9.jpg", "100%.jpg", "f#1.jpg", "100%25.jpg", "f%231.jpg"]


@pytest.mark.s3
def test_bytes_and_states_are_those_of_the_listing(s3_uri: str) -> None:
    for name in NAMES:
        storage.write_bytes(storage.join(s3_uri, name), name.encode() * 100)
    folder = ObjectFolder(s3_uri)
    listed = dict(folder.states(""))
    for name in NAMES:
        data, state = folder.read(name)
        assert data == name.encode() * 100
        if "/" not in name:
            assert state == listed[name]
    with pytest.raises(FileNotFoundError, match=r"g\.jpg"):
        folder.read("g.jpg")


@pytest.mark.s3
def test_one_request_brings_an_object_and_none_the_content_of_one_that_is_too_large(
    s3_uri: str, faults: FaultProxy
) -> None:
    storage.write_bytes(storage.join(s3_uri, "a.jpg"), b"x" * 1000)
    folder = ObjectFolder(s3_uri)
    faults.heal()
    assert folder.read("a.jpg", 1000)[0] == b"x" * 1000
    assert faults.served == [("GET", f"/{s3_uri[5:]}/a.jpg")]
    with pytest.raises(TooLargeError, match="1,000 bytes; at most 999"):
        folder.read("a.jpg", 999)
    assert len(faults.served) == 2
    assert DirectS3.of(folder._file_system, s3_uri[5:].partition("/")[0])._has_answered  # not s3fs


def test_where_it_never_answers_it_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = SimpleNamespace(endpoint_url="http://127.0.0.1:9", region_name="us-east-1")  # nothing listens there
    limits = {"connect_timeout": 1, "read_timeout": 1}
    direct = DirectS3(SimpleNamespace(s3=SimpleNamespace(meta=meta), config_kwargs=limits), "bucket")
    keys = {"access_key_id": "a", "secret_access_key": "b", "token": None, "expires_at": None}
    monkeypatch.setattr(direct, "_credential", lambda: keys)
    asked: list[str] = []
    store = direct._store

    def get(key: str) -> Any:
        asked.append(key)
        return store.get(key)

    monkeypatch.setattr(direct, "_store", SimpleNamespace(get=get))
    assert [direct.get("a.jpg", None) for _ in range(5)] == [None] * 5
    assert asked == ["a.jpg"] * 3


@pytest.mark.s3
def test_an_environment_that_it_does_not_understand_is_left_to_s3fs(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(storage.join(s3_uri, "a.jpg"), b"x")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "perhaps")
    monkeypatch.setattr(DirectS3, "of", DirectS3)  # a new one, whatever this process has
    assert ObjectFolder(s3_uri).read("a.jpg")[0] == b"x"
