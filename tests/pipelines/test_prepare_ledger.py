"""The ledger without Ray: receipts are put once, resumed from, and added up before anything is published."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.preparation.chunks import Chunk
from pipelines.preparation.collection import find_garbage
from pipelines.preparation.ledger import Ledger
from pipelines.preparation.plan import Plan, Terms, check_terms, load_plan
from pipelines.preparation.receipt_book import PublishError
from pipelines.preparation.sources import PlanError, SourceTerms
from pipelines.preparation.verify import verify
from pipelines.shards import Manifest
from pipelines.shards.receipts import (
    AccountingError,
    ChunkFacts,
    QuarantinedRow,
    Receipt,
    describe_done,
    keys_digest,
    load_receipts,
)
from pipelines.shards.schema import SAMPLE_SCHEMA
from pipelines.shards.writer import write_shard
from tests.shards import sample

PLACES = ["local", pytest.param("s3", marks=pytest.mark.s3)]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_uri")


def make_plan(layout: str = "chat", chunks: int = 3) -> Plan:
    source = SourceTerms(name="corpus", format="llava", path="c.json", image_root=None, limit=None, fingerprint="1-1")
    terms = Terms(
        sources=[source],
        layout=layout,
        payload="pixels",
        max_length=500,
        chunk_rows=2,
        tiling="base",
        num_image_tokens=9,
        image_shape=[1, 3, 4, 4],
        processor_identity="p",
        encoder_identity=None,
        code="c",
    )
    cut = [Chunk(source=0, start=0, stop=1, first_row=2 * i, rows=2, first_line=1) for i in range(chunks)]
    return Plan(terms=terms, chunks=cut)


def make_receipt(place: str, plan: Plan, chunk: int, bad: int = 0) -> Receipt:
    numbers = [2 * chunk, 2 * chunk + 1]
    good = [sample(number, "pixels") for number in numbers[: 2 - bad]]
    rejected = [
        QuarantinedRow(key=key, id="", source="corpus", location="c.json:1", reason="image_missing", detail="gone")
        for key in plan.keys(plan.chunks[chunk])[2 - bad :]
    ]
    keys = keys_digest(plan.keys(plan.chunks[chunk]))
    shard = write_shard(place, pa.Table.from_pylist(good, schema=SAMPLE_SCHEMA)) if good else None
    return Receipt(plan=plan.identity(), chunk=chunk, planned=2, keys=keys, shard=shard, quarantined=rejected)


def test_resumes_where_its_receipts_end(place: str) -> None:
    plan = make_plan()
    ledger = Ledger(place, plan, 0.5)
    assert ledger.pending == [0, 1, 2]
    ledger.commit(make_receipt(place, plan, 1, bad=1))
    resumed = Ledger(place, plan, 0.5)
    assert resumed.pending == [0, 2]
    assert (resumed.num_done, resumed.num_bad) == (2, 1)
    with pytest.raises(AccountingError, match="2 of 3 chunks have no receipt"):
        resumed.publish()
    for chunk in (2, 0):  # in any order
        resumed.commit(make_receipt(place, plan, chunk))
    manifest = resumed.publish()
    assert Manifest.load(place) == manifest
    assert (manifest.planned, manifest.written, manifest.quarantined) == (6, 5, 1)
    assert manifest.quarantine_reasons == {"image_missing": 1}
    assert [shard.rows for shard in manifest.shards] == [2, 1, 2]
    assert Ledger(place, plan, 0.5).publish() == manifest  # killed after the manifest: the same again


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_chunk_whose_shard_is_lost_is_done_anew(place: str, is_cut: bool) -> None:
    plan = make_plan()
    ledger = Ledger(place, plan, 0.5)
    receipts = [make_receipt(place, plan, chunk) for chunk in range(3)]
    for receipt in receipts:
        ledger.commit(receipt)
    lost = receipts[1].shard
    assert lost
    uri = storage.join(place, lost.name)
    whole = storage.read_bytes(uri)
    damage(uri, whole[:-10] if is_cut else None)
    with pytest.raises(
        PublishError, match=rf"{lost.name}: expected .* bytes, found .*run the job again: chunk 1 is then"
    ):
        ledger.publish()
    resumed = Ledger(place, plan, 0.5)
    assert resumed.pending == [1]
    assert f"{len(whole):,} bytes, found {f'{len(whole) - 10:,}' if is_cut else 'no such file'}" in resumed.lost[1]
    resumed.commit(make_receipt(place, plan, 1))
    assert storage.read_bytes(uri) == whole
    assert list(load_receipts(Receipt, place)) == receipts  # what the first one says is true again
    assert resumed.publish().written == 6


def test_a_chunk_whose_shard_is_lost_may_come_to_another_one(place: str) -> None:
    """As where features are encoded on a GPU, or an image that is not pinned has gone."""
    plan = make_plan()
    ledger = Ledger(place, plan, 0.5)
    for chunk in range(3):
        ledger.commit(make_receipt(place, plan, chunk))
    lost = ledger.receipts[1].shard
    assert lost
    damage(storage.join(place, lost.name), b"cut")
    first, second = Ledger(place, plan, 0.5), Ledger(place, plan, 0.5)
    first.commit(make_receipt(place, plan, 1, bad=1))
    second.commit(make_receipt(place, plan, 1, bad=1).model_copy(update={"facts": ChunkFacts(seconds={"other": 1})}))
    third = Ledger(place, plan, 0.5)
    assert (first.pending, second.pending, third.pending) == ([], [], [])
    manifest = first.publish()
    assert manifest == second.publish() == third.publish()
    assert (manifest.written, manifest.quarantined) == (5, 1)
    assert verify(place) == []
    assert describe_done(place, 3) == "3 of 3 chunks are done already"
    [garbage] = find_garbage(place)
    assert garbage.path.endswith(lost.name)


def test_a_receipt_of_another_plan_is_refused_before_any_work_even_where_its_shard_is_lost(tmp_path: Path) -> None:
    place, plan = str(tmp_path), make_plan()
    Ledger(place, plan, 0.5)
    foreign = make_receipt(place, make_plan(layout="caption"), 1)
    storage.write_bytes(storage.join(place, foreign.name), foreign.model_dump_json().encode())
    assert foreign.shard
    damage(storage.join(place, foreign.shard.name), None)
    with pytest.raises(PlanError, match="a receipt of plan"):
        Ledger(place, plan, 0.5)


def damage(uri: str, data: bytes | None) -> None:
    """Put `data` where an object is, or nothing."""
    if data is not None:
        storage.write_bytes(uri, data)
        return
    file_system, path = storage.filesystem(uri)
    file_system.rm(path)


def test_quarantine_is_a_table(tmp_path: Path) -> None:
    plan = make_plan(chunks=1)
    ledger = Ledger(str(tmp_path), plan, 0.5)
    ledger.commit(make_receipt(str(tmp_path), plan, 0, bad=1))
    entry = ledger.publish().quarantine
    [bad] = pq.read_table(tmp_path / entry.name).to_pylist()
    location = {"source": "corpus", "location": "c.json:1"}
    assert bad == {"key": "corpus:1", "id": "", **location, "reason": "image_missing", "detail": "gone"}
    assert entry.sha256 == storage.sha256((tmp_path / entry.name).read_bytes())


def test_second_driver_takes_the_first_ones_receipt(place: str) -> None:
    plan = make_plan(chunks=1)
    first, second = Ledger(place, plan, 0.9), Ledger(place, plan, 0.9)
    first.commit(make_receipt(place, plan, 0))
    second.commit(make_receipt(place, plan, 0, bad=1))  # it saw one of the rows fail
    assert first.publish() == second.publish()
    assert second.num_bad == 0


def test_folder_belongs_to_one_plan(tmp_path: Path) -> None:
    Ledger(str(tmp_path), make_plan(), 0.5)
    with pytest.raises(PlanError, match=r"plan\.json: another driver"):
        Ledger(str(tmp_path), make_plan(layout="caption"), 0.5)
    assert load_plan(str(tmp_path)) == make_plan()


def test_a_plan_from_before_there_were_sizes_keeps_its_identity() -> None:
    stored = {"source": 0, "start": 0, "stop": 9, "first_row": 0, "rows": 1, "first_line": 1, "repeat": 0}
    assert Chunk(**stored).model_dump_json() == json.dumps(stored, separators=(",", ":"))
    assert Chunk(**stored, size=9).model_dump()["size"] == 9


def test_receipt_of_another_plan_is_refused(tmp_path: Path) -> None:
    other = make_plan(layout="caption")
    receipt = make_receipt(str(tmp_path), other, 0)
    storage.write_bytes(storage.join(str(tmp_path), receipt.name), receipt.model_dump_json().encode())
    with pytest.raises(PlanError, match="a receipt of plan"):
        Ledger(str(tmp_path), make_plan(), 0.5)


def test_differing_terms_are_listed() -> None:
    mine, theirs = make_plan().terms, make_plan(layout="caption").terms
    changed = theirs.model_copy(update={"sources": [theirs.sources[0].model_copy(update={"fingerprint": "2-2"})]})
    differences = mine.differences(changed)
    assert differences == [
        f"source 'corpus' ({mine.sources[0].path}): fingerprint: was '1-1', now '2-2'",
        "layout: was 'chat', now 'caption'",
    ]
    assert mine.differences(mine) == []


def test_a_file_that_came_or_went_is_one_difference() -> None:
    terms = make_plan().terms
    files = [terms.sources[0].model_copy(update={"name": f"mix/{n}", "path": f"{n}.jsonl"}) for n in range(50)]
    planned = terms.model_copy(update={"sources": files})

    def differences(sources: list[SourceTerms]) -> list[str]:
        return planned.differences(terms.model_copy(update={"sources": sources}))

    new = files[0].model_copy(update={"name": "mix/0a", "path": "0a.jsonl"})
    assert differences([files[0], new, *files[1:]]) == ["source 'mix/0a' (0a.jsonl): was not there"]
    assert differences(files[1:]) == ["source 'mix/0' (0.jsonl): was there, now missing"]
    assert differences(files[::-1]) == ["sources: now in another order"]
    others = terms.model_copy(update={"sources": [each.model_copy(update={"limit": 5}) for each in files]})
    with pytest.raises(PlanError, match=r"\(19\.jsonl\): limit: was None, now 5; and 30 more\. Run it with the terms"):
        check_terms("out", planned, others)


def test_too_many_bad_rows_publish_nothing(tmp_path: Path) -> None:
    plan = make_plan()
    ledger = Ledger(str(tmp_path), plan, max_quarantined_share=0.2)
    ledger.commit(make_receipt(str(tmp_path), plan, 0, bad=1))
    ledger.check_share()
    ledger.commit(make_receipt(str(tmp_path), plan, 1, bad=1))
    with pytest.raises(PublishError, match=r"2 of 6 rows.*image_missing 2.*c\.json:1: image_missing: gone"):
        ledger.check_share()  # before the work is done: it cannot get better
    assert Ledger(str(tmp_path), plan, 0.4).pending == [2]  # the receipts stay, a larger share goes on


def test_all_rows_bad_is_an_error_at_any_share(tmp_path: Path) -> None:
    plan = make_plan(chunks=1)
    ledger = Ledger(str(tmp_path), plan, max_quarantined_share=1.0)
    ledger.commit(make_receipt(str(tmp_path), plan, 0, bad=2))
    with pytest.raises(PublishError, match=r"2 of 2 rows are quarantined .*so no row is left to publish") as raised:
        ledger.publish()
    assert "Raise the share" not in str(raised.value) and "1 allows" not in str(raised.value)
    assert "for example c.json:1: image_missing: gone" in str(raised.value)
    assert not (tmp_path / "manifest.json").exists()


def test_lost_row_is_found(tmp_path: Path) -> None:
    plan = make_plan(chunks=1)
    ledger = Ledger(str(tmp_path), plan, 0.5)
    receipt = make_receipt(str(tmp_path), plan, 0, bad=1)
    ledger.commit(receipt.model_copy(update={"quarantined": []}))
    with pytest.raises(AccountingError, match="chunk 0: 2 rows planned, 1 written, 0 quarantined"):
        ledger.publish()


def test_rows_that_were_not_planned_are_found_and_nothing_is_kept_of_them(tmp_path: Path) -> None:
    plan = make_plan(chunks=2)
    ledger = Ledger(str(tmp_path), plan, 0.5)
    again = make_receipt(str(tmp_path), plan, 0).model_copy(update={"chunk": 1})  # the rows of the other chunk
    with pytest.raises(AccountingError, match=r"chunk 1: 2 rows planned from row 2 on, 2 written and 0 quar.* others"):
        ledger.commit(again)
    assert Ledger(str(tmp_path), plan, 0.5).pending == [0, 1]


def test_rows_that_were_planned_twice_are_found(tmp_path: Path) -> None:
    plan = make_plan(chunks=2)
    plan = plan.model_copy(update={"chunks": [plan.chunks[0], plan.chunks[1].model_copy(update={"first_row": 1})]})
    ledger = Ledger(str(tmp_path), plan, 0.5)
    for chunk in (0, 1):
        keys = keys_digest(plan.keys(plan.chunks[chunk]))
        ledger.commit(make_receipt(str(tmp_path), plan, chunk).model_copy(update={"keys": keys}))
    with pytest.raises(AccountingError, match="chunk 1 begins at row 1, one before it ends at 2"):
        ledger.publish()


def test_another_manifest_is_not_overwritten(tmp_path: Path) -> None:
    plan = make_plan(chunks=1)
    ledger = Ledger(str(tmp_path), plan, 0.5)
    ledger.commit(make_receipt(str(tmp_path), plan, 0))
    storage.write_bytes(str(tmp_path / "manifest.json"), b"{}")
    with pytest.raises(PublishError, match="a different manifest"):
        ledger.publish()
