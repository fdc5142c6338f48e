"""Corpora that are larger than memory should be: they are found, planned and read without being held."""

from __future__ import annotations

import json
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlparse

import pytest
from s3fs import S3FileSystem

from pipelines.corpora import llava
from pipelines.corpora.spans import Span, group
from pipelines.preparation.chunks import check_rows, index_files
from pipelines.preparation.image_pins import ImagePins
from pipelines.preparation.pinning import find_pins
from pipelines.preparation.plan import Plan
from pipelines.preparation.row_images import SourceFiles
from pipelines.preparation.settings import SourceSettings
from pipelines.preparation.sources import source_terms
from pipelines.storage.states import ObjectFolder, State
from tests.memory import peak_growth
from tests.preparation import plan_terms

MB = 10**6
NUM_IMAGES = 66_530  # a tenth of the LLaVA mix


def write_llava(path: Path, rows: int, row_bytes: int) -> Path:
    """A LLaVA array of made-up rows of about this many bytes, as json.dump writes them; ids repeat."""
    text = 'The picture shows a street with three buses, of which the first is \\"red\\" [sic]. '
    answer = (text * (row_bytes // len(text) + 1))[: row_bytes - 240].rstrip("\\")
    question = '{"from": "human", "value": "<image>\\nDescribe the picture, please."}'
    with path.open("w") as file:
        for number in range(rows):
            head = f'{"," if number else "["} {{"id": "{number % 1000:012d}", "image": "coco/{number:012d}.jpg", '
            file.write(head + f'"conversations": [{question}, {{"from": "gpt", "value": "{answer}"}}]}}')
        file.write("]")
    return path


def find(path: Path) -> list[Span]:
    return list(group(llava.scan(str(path)), 500))


def read(path: Path, spans: list[Span]) -> int:
    """Rows of all `spans`, read one span after the other, as a worker does."""
    return sum(len(deque(llava.read(str(path), span), maxlen=500)) for span in spans)


def test_a_json_array_is_found_and_read_without_holding_it(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "corpus.json", 25_000, 3000)
    assert path.stat().st_size > 70 * MB
    spans: list[Span] = []
    assert peak_growth(lambda: spans.extend(find(path))) < 30 * MB
    assert sum(span.rows for span in spans) == 25_000
    assert peak_growth(lambda: read(path, spans[::5])) < 30 * MB
    # What holds the file goes over the bound, so the bound can fail.
    assert peak_growth(lambda: json.loads(path.read_bytes())) > 70 * MB


@pytest.mark.slow
def test_665k_rows_in_a_gigabyte(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "llava_v1_5_mix665k.json", 665_298, 1500)
    assert path.stat().st_size > 950 * MB
    spans: list[Span] = []
    growth = peak_growth(lambda: spans.extend(find(path)))
    print(f"\n{path.stat().st_size / MB:,.0f} MB: {growth / MB:,.0f} MB to find the rows")
    assert growth < 50 * MB
    assert sum(span.rows for span in spans) == 665_298
    assert read(path, spans[-2:]) == spans[-2].rows + spans[-1].rows


@pytest.mark.slow
def test_the_plan_of_ten_million_rows(tmp_path: Path) -> None:
    """With 62 rows to a chunk, as for features of fp16: the smallest chunks that a recipe makes by itself."""
    path = tmp_path / "corpus.jsonl"
    line = '{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}\n'
    with path.open("w") as file:
        for _ in range(1000):
            file.write(line * 10_000)
    plans: list[Plan] = []

    def make() -> None:
        sources = source_terms([SourceSettings(path=str(path))])
        chunks = index_files(range(1), sources, [str(path)], 62)
        check_rows(sources, chunks)
        plans.append(Plan(terms=plan_terms(sources, 62), chunks=chunks))
        plans[0].identity()
        plans[0].describe("made up")

    growth = peak_growth(make)
    print(f"\n10 million rows in {len(plans[0].chunks):,} chunks: {growth / MB:,.0f} MB")
    assert plans[0].num_rows == 10_000_000
    assert growth < 4000 * MB


@pytest.mark.slow
def test_the_pins_of_66k_images(tmp_path: Path) -> None:
    """Made-up files in one folder."""
    path = write_llava(tmp_path / "corpus.json", NUM_IMAGES, 1500)
    (tmp_path / "coco").mkdir()
    for number in range(NUM_IMAGES):
        (tmp_path / "coco" / f"{number:012d}.jpg").touch()
    sources = source_terms([SourceSettings(path=str(path), image_root=str(tmp_path))])
    chunks = index_files(range(1), sources, [str(path)], 113)
    pins: list[ImagePins] = []
    start = time.perf_counter()

    def find() -> None:
        found = find_pins(sources, [SourceFiles(str(path), str(tmp_path))], chunks)
        assert found
        pins.append(found)
        found.store(str(tmp_path / "out"))

    growth = peak_growth(find)
    seconds = time.perf_counter() - start
    facts = pins[0].facts()
    size = (tmp_path / "out" / facts.name).stat().st_size
    print(f"\n{facts.images:,} images pinned in {seconds:.1f} s by one process, {growth / MB:,.0f} MB, {size:,} bytes")
    assert (facts.images, facts.absent, facts.unpinned) == (NUM_IMAGES, 0, 0)
    assert size < 25 * NUM_IMAGES
    assert growth < 150 * MB
    state = (tmp_path / "coco" / f"{7:012d}.jpg").stat()
    pins[0].check(str(tmp_path), f"coco/{7:012d}.jpg", State(state.st_size, state.st_mtime_ns))


@pytest.mark.slow
def test_a_store_lists_images_in_a_thousandth_of_the_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up store that lists a folder of that many, and knows nothing else."""
    requests = []

    class Listing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlparse(self.path).query)
            first = int(query.get("continuation-token", ["0"])[0])
            requests.append(first)
            stop = min(first + int(query["max-keys"][0]), NUM_IMAGES)
            body = "".join(
                f"<Contents><Key>coco/{n:012d}.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>&quot;{n:032x}&quot;</ETag><Size>{n % 1000}</Size></Contents>"
                for n in range(first, stop)
            )
            more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < NUM_IMAGES else ""
            head = f"<ListBucketResult><IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}"
            data = f"{head}{body}</ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        names = {"ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "ACCESS_KEY_ID": "a", "DEFAULT_REGION": "x"}
        for name, value in {**names, "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        S3FileSystem.clear_instance_cache()
        start, cpu = time.perf_counter(), time.process_time()
        found = sum(1 for _ in ObjectFolder("s3://made-up").states("coco"))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    finally:
        server.shutdown()
        S3FileSystem.clear_instance_cache()
    print(
        f"\n{found:,} objects listed in {len(requests)} requests, {seconds:.1f} s, {cpu:.1f} s of CPU with the store's"
    )
    assert found == NUM_IMAGES and len(requests) == -(-NUM_IMAGES // 1000)
