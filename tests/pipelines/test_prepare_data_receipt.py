"""The data receipt: its figures against counts made another way, and a page that no corpus can break out of."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.preparation.data_receipt import DataReceipt, LastRun, histogram, render
from pipelines.shards import Manifest, ShardedDataset
from tests.corpus import bad_rows, row, write_corpus, write_processor
from tests.preparation import begin, do_chunk, prepare_here, prepare_settings


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good rows whose ids repeat, three bad ones; answer 4 tries to be markup."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "images").mkdir()
    rows = [row(number) for number in range(12)]
    rows[4]["conversations"][1]["value"] = "<script>alert(1)</script> & <b>"
    bad = bad_rows(folder)
    path = write_corpus(folder, [*rows, bad["image_missing"], bad["image_missing"], bad["row_malformed"]])
    write_processor(folder)
    prepare_here(prepare_settings(folder, max_quarantined_share=0.5))
    assert path.exists()
    return folder / "out"


@pytest.fixture
def receipt(prepared: Path) -> DataReceipt:
    return DataReceipt.model_validate_json((prepared / "receipt.json").read_bytes())


def test_counts_are_those_of_the_dataset(prepared: Path, receipt: DataReceipt) -> None:
    dataset = ShardedDataset(str(prepared))
    rows = [dataset.read(index) for index in range(len(dataset))]
    assert (receipt.planned, receipt.written, receipt.quarantined) == (15, 12, 3)
    assert receipt.tokens == sum(len(each["input_ids"]) for each in rows)
    assert receipt.loss_tokens == sum(int((each["labels"] != -100).sum()) for each in rows)
    [source] = receipt.sources
    assert (source.name, source.planned, source.written, source.quarantined) == ("corpus", 15, 12, 3)
    assert source.with_image == 9
    # Ids own-0, own-1, own-2 over twelve good rows, own-0 in the two without an image file; the cut line has none.
    assert source.repeated_ids == 14 - 3
    lengths = Counter(len(each["input_ids"]) for each in rows)
    for each in receipt.token_lengths:
        assert each.count == sum(count for length, count in lengths.items() if each.low <= length < each.high)
    assert sum(each.count for each in receipt.token_lengths) == 12
    assert sum(each.count for each in receipt.image_sides) == 9  # all 60 x 40
    assert all(each.low <= 60 < each.high for each in receipt.image_sides)


def test_quarantine_hashes_and_times(prepared: Path, receipt: DataReceipt) -> None:
    manifest = Manifest.load(str(prepared))
    assert [(each.reason, each.count) for each in receipt.reasons] == [("image_missing", 2), ("row_malformed", 1)]
    assert [row.key for row in receipt.reasons[0].examples] == ["corpus:12", "corpus:13"]
    assert receipt.identities["manifest"] == manifest.identity()
    assert receipt.identities["plan"] == storage.sha256((prepared / "plan.json").read_bytes())
    assert receipt.identities["processor"] == manifest.processor_identity
    seconds = {step.step: step.seconds for step in receipt.steps}
    assert list(seconds) == ["read", "decode", "tokenize", "encode", "write"]
    assert all(seconds[step] > 0 for step in ("read", "decode", "tokenize", "write"))
    assert seconds["encode"] == 0


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_page_escapes_and_needs_nothing_from_outside(prepared: Path) -> None:
    page = (prepared / "receipt.html").read_text()
    links = _Links()
    links.feed(page)
    assert links.tags["script"] == links.tags["b"] == links.tags["link"] == 0
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in page
    assert links.tags["img"] == 3  # the first image of each chunk; the last chunk has none
    assert links.urls and all(url.startswith("data:image/jpeg;base64,") for url in links.urls)
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert "15 rows planned = 12 written + 3 quarantined" in page


def test_resumed_run_has_the_same_manifest_and_a_whole_receipt(prepared: Path, tmp_path: Path) -> None:
    corpus = prepared.parent
    source = {"path": str(corpus / "corpus.jsonl"), "image_root": str(corpus)}
    settings = prepare_settings(corpus, sources=[source], output=str(tmp_path / "out"), max_quarantined_share=0.5)
    for number in (2, 0):  # two runs that were killed after one chunk each
        ledger, maker = begin(settings)
        ledger.commit(do_chunk(ledger, maker, number))
    ledger, maker = begin(settings)
    assert ledger.pending == [1, 3]
    for number in ledger.pending:
        ledger.commit(do_chunk(ledger, maker, number))
    manifest = ledger.publish(LastRun(rows=8, seconds=2.0))
    assert manifest == Manifest.load(str(prepared))
    resumed, whole = (json.loads((folder / "receipt.json").read_bytes()) for folder in (tmp_path / "out", prepared))
    assert resumed.pop("run") == {"rows": 8, "seconds": 2.0}
    for each in (resumed, whole):
        each.pop("steps")
    whole.pop("run")
    assert resumed == whole
    assert "8 rows in 2.0 s, 4 rows/s" in (tmp_path / "out" / "receipt.html").read_text()


def test_a_source_of_which_nothing_is_left_is_said_beside_larger_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path, 30)
    (tmp_path / "bad.jsonl").write_text('{"id": "1"}\n{"id": "2"}\n')
    write_processor(tmp_path)
    names = ("corpus", "bad")
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "image_root": str(tmp_path), "name": name} for name in names]
    prepare_here(prepare_settings(tmp_path, sources=sources))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert said == ["warning: source 'bad': all 2 rows are quarantined"]


def test_manifest_comes_after_the_receipt(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sees a manifest finds the receipt beside it."""
    written: list[str] = []
    put, write = storage.put_if_absent, storage.write_bytes
    monkeypatch.setattr(storage, "put_if_absent", lambda uri, data: written.append(uri) or put(uri, data))
    monkeypatch.setattr(
        storage, "write_bytes", lambda uri, data, *digest: written.append(uri) or write(uri, data, *digest)
    )
    prepare_here(prepare_settings(prepared.parent, output=str(tmp_path / "out"), max_quarantined_share=0.5))
    names = [uri.rpartition("/")[2] for uri in written]
    assert names[-4:] == ["quarantine.parquet", "receipt.json", "receipt.html", "manifest.json"]


@pytest.mark.parametrize(
    ("values", "edges"),
    [([5], [(5, 6)]), ([0, 3], [(0, 1), (1, 2), (2, 3), (3, 4)]), ([100, 2090], [(0, 200), (2000, 2200)]), ([], [])],
)
def test_histogram_has_round_bins_that_cover_all(values: list[int], edges: list[tuple[int, int]]) -> None:
    bins = histogram(Counter(values))
    assert [(each.low, each.high) for each in bins][:: 1 if len(edges) != 2 else len(bins) - 1] == edges
    assert sum(each.count for each in bins) == len(values)
    assert len(bins) <= 20


def test_a_dataset_without_images_has_a_page(receipt: DataReceipt) -> None:
    page = render("out", receipt.model_copy(update={"image_sides": [], "examples": [], "reasons": []}))
    assert "No row went there." in page
    assert not re.search(r"<img|Longer side", page)
