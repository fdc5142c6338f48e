"""Sources of a plan: files and their fingerprints, limits and weights, and the same file listed twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines import corpora, prepare, storage
from pipelines.annotation.plan import make_terms
from pipelines.preparation import plan
from pipelines.preparation.chunks import Chunk, check_rows, index_files, read_chunk, scans
from pipelines.preparation.code import code_files, code_identity
from pipelines.preparation.plan import check_terms
from pipelines.preparation.processor import load_processor
from pipelines.preparation.settings import PrepareSettings, SourceSettings
from pipelines.preparation.sources import PlanError, SourceTerms, check_output, source_terms
from tests.annotation import annotate_settings
from tests.corpus import write_corpus, write_processor
from tests.preparation import begin, prepare_settings


def write(folder: Path, name: str, rows: int) -> Path:
    """A corpus of text whose rows have the ids NAME-0, NAME-1, ..."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    lines = [json.dumps({"id": f"{name}-{number}", "conversations": turns}) for number in range(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def plan_of(*sources: SourceSettings, chunk_rows: int = 4) -> tuple[list[SourceTerms], list[Chunk]]:
    terms = source_terms(sources)
    lots = [index_files(lot, terms, [term.path for term in terms], chunk_rows) for lot in scans(terms)]
    chunks = [chunk for lot in lots for chunk in lot]
    check_rows(terms, chunks)
    return terms, chunks


def ids(terms: list[SourceTerms], chunks: list[Chunk]) -> list[str]:
    rows = [row for chunk in chunks for row in read_chunk(terms[chunk.source], terms[chunk.source].path, chunk)]
    return [row.content.id for row in rows]


def keys(terms: list[SourceTerms], chunks: list[Chunk]) -> list[str]:
    planned = plan.CorpusPlan(terms=plan.SourcedTerms(sources=terms), chunks=chunks)
    return [key for chunk in chunks for key in planned.keys(chunk)]


def test_a_pattern_stands_for_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, rows in (("data/b.jsonl", 2), ("data/a.jsonl", 5), ("data/none.txt", 9)):
        write(tmp_path, name, rows)
    terms, chunks = plan_of(SourceSettings(path=f"{tmp_path}/data/*.jsonl", name="mix"))
    assert [(term.name, term.corpus) for term in terms] == [("mix/a.jsonl", "mix"), ("mix/b.jsonl", "mix")]
    assert [(chunk.source, chunk.rows) for chunk in chunks] == [(0, 4), (0, 1), (1, 2)]
    assert keys(terms, chunks) == [*(f"mix/a.jsonl:{n}" for n in range(5)), "mix/b.jsonl:0", "mix/b.jsonl:1"]
    assert len({term.fingerprint for term in terms}) == 2


def test_a_path_with_two_colons_is_a_file_like_any_other(tmp_path: Path) -> None:
    path = write(tmp_path, "d::e/a::b.jsonl", 2)
    for spelling in (str(path), f"file://{path}", f"{tmp_path}/d::e/*.jsonl"):
        terms, chunks = plan_of(SourceSettings(path=spelling, name="a"))
        assert ids(terms, chunks) == ["d::e/a::b.jsonl-0", "d::e/a::b.jsonl-1"]


@pytest.mark.parametrize(("limit", "expected"), [(3, [3]), (5, [4, 1]), (7, [4, 1, 2]), (99, [4, 1, 4, 2])])
def test_a_limit_counts_the_rows_of_all_files(tmp_path: Path, limit: int, expected: list[int]) -> None:
    for name, rows in (("a.jsonl", 5), ("b.jsonl", 6)):
        write(tmp_path, name, rows)
    terms, chunks = plan_of(SourceSettings(path=f"{tmp_path}/?.jsonl", name="mix", limit=limit))
    assert [chunk.rows for chunk in chunks] == expected
    assert ids(terms, chunks) == [*(f"a.jsonl-{n}" for n in range(5)), *(f"b.jsonl-{n}" for n in range(6))][:limit]


def test_a_weight_below_one_takes_a_share_that_is_always_the_same(tmp_path: Path) -> None:
    path = str(write(tmp_path, "a.jsonl", 2000))
    taken = {
        weight: ids(*plan_of(SourceSettings(path=path, weight=weight), chunk_rows=chunk))
        for weight, chunk in ((0.1, 7), (0.25, 100), (1.0, 500))
    }
    assert set(taken[0.1]) < set(taken[0.25]) < set(taken[1.0])
    assert len(taken[1.0]) == 2000
    # Five standard deviations of a draw with replacement.
    assert abs(len(taken[0.25]) - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5
    assert abs(len(taken[0.1]) - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5
    assert taken[0.25] == ids(*plan_of(SourceSettings(path=path, weight=0.25), chunk_rows=3))


def test_a_chunk_of_few_rows_in_many_spans_no_large_part_of_the_file(tmp_path: Path) -> None:
    path = str(write(tmp_path, "a.jsonl", 5000))
    terms, chunks = plan_of(SourceSettings(path=path, weight=0.02), chunk_rows=50)
    longest = len((tmp_path / "a.jsonl").read_text().splitlines()[-1]) + 1
    assert max(chunk.stop - chunk.start for chunk in chunks) <= 4 * 50 * longest
    taken = keys(terms, chunks)
    assert taken == [f"a:{n}" for n in range(5000) if plan.is_taken(terms[0], n, 0)]
    assert len(ids(terms, chunks)) == len(taken) > 50


def test_a_weight_above_one_takes_rows_again_under_keys_of_their_own(tmp_path: Path) -> None:
    path = str(write(tmp_path, "a.jsonl", 40))
    terms, chunks = plan_of(SourceSettings(path=path, weight=2.5))
    found = keys(terms, chunks)
    assert found[:80] == [f"a:{n}" for n in range(40)] + [f"a:{n}+1" for n in range(40)]
    again = found[80:]
    assert 5 < len(again) < 35 and all(key.endswith("+2") for key in again)
    assert len(set(found)) == len(found)
    read = ids(terms, chunks)
    assert read == [f"a.jsonl-{key.split(':')[1].split('+')[0]}" for key in found]
    half = plan_of(SourceSettings(path=path, weight=0.5))
    assert [key.removesuffix("+2") for key in again] == keys(*half)


def test_a_weight_goes_with_a_limit(tmp_path: Path) -> None:
    path = str(write(tmp_path, "a.jsonl", 40))
    found = ids(*plan_of(SourceSettings(path=path, weight=2, limit=3)))
    assert found == [f"a.jsonl-{n}" for n in (0, 1, 2, 0, 1, 2)]


def test_a_file_that_two_sources_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "data/a.jsonl", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link.jsonl").symlink_to(path)
    others = ("data/../data/a.jsonl", f"{tmp_path}/data/a.jsonl", "data/*.jsonl", "link.jsonl")
    for other in (*others, "~/data/a.jsonl", f"file://{path}", f"local://{tmp_path}/link.jsonl"):
        sources = [SourceSettings(path="data/a.jsonl"), SourceSettings(path=other, name="second")]
        with pytest.raises(
            PlanError, match=r"source 'second': .*\.jsonl belongs to source 'a' too; list each file once"
        ):
            source_terms(sources)
    with pytest.raises(ValueError, match=r"two sources have the path 'data/a\.jsonl'"):
        recipe({"path": "data/a.jsonl"}, {"path": "data/a.jsonl", "name": "b"})
    with pytest.raises(ValueError, match="two sources have the name 'a'"):
        recipe({"path": "data/a.jsonl"}, {"path": "other/a.jsonl"})


def test_an_object_that_two_sources_spell_differently_is_named() -> None:
    sources = [SourceSettings(path=f"{protocol}://bucket/a.jsonl", name=protocol) for protocol in ("s3", "s3a")]
    with pytest.raises(PlanError, match=r"source 's3a': s3a://bucket/a\.jsonl belongs to source 's3' too"):
        source_terms(sources)


def test_a_pattern_that_matches_what_is_written_is_named(tmp_path: Path) -> None:
    def check(pattern: str, output: str) -> None:
        write = ("manifest.json", "receipts/00000000.json", "quarantine.parquet")
        check_output([SourceSettings(path=pattern, name="mix")], output, write)

    out = f"{tmp_path}/out"
    for pattern, taken in (
        (f"{out}/*.json", "manifest.json"),
        (f"{out}/*", "manifest.json"),
        (f"file://{out}/*.parquet", "quarantine.parquet"),
        (f"{tmp_path}/**/*.json", "manifest.json"),
        (f"{tmp_path}/*/*/0*.json", "receipts/00000000.json"),
    ):
        message = re.escape(f"source 'mix': {pattern} matches {out}/{taken}, which will be written there")
        with pytest.raises(PlanError, match=message):
            check(pattern, out)
    with pytest.raises(PlanError, match=r"matches s3://bucket/data/manifest\.json"):
        check("s3a://bucket/data/*.json", "s3://bucket/data")
    for pattern in (f"{out}/*.jsonl", f"{tmp_path}/*.json", f"{tmp_path}/other/*.json", f"{out}/[m]*.json"):
        check(pattern, out)


def test_the_parts_of_an_annotation_are_no_corpus_of_its_own(tmp_path: Path) -> None:
    source = {"path": f"{tmp_path}/**/*.jsonl", "name": "mix"}
    with pytest.raises(PlanError, match=rf"source 'mix': .* matches {tmp_path}/out/parts/any/00000000\.jsonl, which"):
        make_terms(annotate_settings(tmp_path, sources=[source], format="jsonl"), "model")


def recipe(*sources: dict[str, Any]) -> PrepareSettings:
    return PrepareSettings(sources=list(sources), output="out", processor="p")


def test_mistakes_in_a_source_are_named(tmp_path: Path) -> None:
    for fields, message in (
        ({"path": "."}, r"'\.' gives the source no name for its rows' keys: give it one"),
        ({"path": "../.."}, r"'\.\./\.\.' gives the source no name"),
        ({"path": "a/*.tar"}, r"a/\*\.tar stands for several files: give the source a name"),
        ({"path": "a.json", "name": "x/y"}, "name is 'x/y'"),
        ({"path": "a.json", "weight": 0}, "greater than 0"),
        ({"path": "a.json", "weight": 101}, "less than or equal to 100"),
        ({"path": "a.json", "format": "csv"}, "no such corpus format; there are: images, llava, messages, parquet"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(fields)
    with pytest.raises(PlanError, match=r"source 'mix': no file matches .*\*\.tar"):
        source_terms([SourceSettings(path=f"{tmp_path}/*.tar", name="mix")])
    hub = SourceSettings(path="hf://nobody", name="hub", format="llava")
    with pytest.raises(PlanError, match=r"source 'hub': hf://nobody: .*'namespace/name'"):
        source_terms([hub])
    with pytest.raises(PlanError, match=r"source 'a': .*a\.json cannot be read \(FileNotFoundError\)"):
        source_terms([SourceSettings(path=f"{tmp_path}/a.json")])


@pytest.mark.s3
@pytest.mark.parametrize(("form", "files"), [("llava", "*.json"), ("parquet", "*.parquet"), ("webdataset", "*.tar")])
def test_a_prefix_or_a_bucket_is_a_folder(s3_uri: str, form: str, files: str) -> None:
    storage.write_bytes(f"{s3_uri}/data/a.jsonl", b"{}")
    for path in (f"{s3_uri}/data", f"{s3_uri}/data/", s3_uri, f"{s3_uri}/"):
        message = f"source 'mix': {path} is a folder; for all of its files write a pattern, such as "
        message += f"{path.rstrip('/')}/{files}"
        with pytest.raises(PlanError, match=re.escape(message)):
            source_terms([SourceSettings(path=path, name="mix", format=form)])
    with pytest.raises(storage.StorageError, match=r"^s3://bucket\*/a\.jsonl: cannot be looked for \(Cannot traverse"):
        source_terms([SourceSettings(path="s3://bucket*/a.jsonl", name="mix")])


def test_a_file_whose_name_is_no_text_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", 2)
    write(tmp_path, "b\udcff.jsonl", 2)
    message = f"source 'mix': the name of '{tmp_path}/b\\udcff.jsonl' is not UTF-8, as a row's key is; rename it"
    with pytest.raises(PlanError, match=re.escape(message)) as raised:
        source_terms([SourceSettings(path=f"{tmp_path}/*.jsonl", name="mix")])
    str(raised.value).encode()


def test_a_path_that_goes_through_a_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", 2)
    with pytest.raises(PlanError, match=rf"source 'a': {path}/b\.jsonl is not below a folder, or none itself$"):
        source_terms([SourceSettings(path=f"{path}/b.jsonl", name="a")])
    with pytest.raises(PlanError, match=rf"source 'a': {path} is not .*itself; images are read from a folder$"):
        source_terms([SourceSettings(path=str(path), name="a", format="images", image_root=str(path))])


def test_a_source_without_rows_is_named(tmp_path: Path) -> None:
    good, empty = write(tmp_path, "a.jsonl", 2), write(tmp_path, "b.jsonl", 0)
    with pytest.raises(PlanError, match=rf"source 'b': {empty} holds no rows"):
        plan_of(SourceSettings(path=str(good)), SourceSettings(path=str(empty)))
    with pytest.raises(PlanError, match=rf"source 'a': {good} holds no rows, or too few for its weight of 0\.0001"):
        plan_of(SourceSettings(path=str(good), weight=0.0001))
    terms, chunks = plan_of(SourceSettings(path=f"{tmp_path}/*.jsonl", name="mix"))  # one of its files may be empty
    assert len(ids(terms, chunks)) == 2


def test_the_identity_of_the_code_covers_all_that_decides_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    before, files = code_identity(), code_files()
    assert code_identity() == before
    names = {"/".join(file.parts[-2:]) for file in files}
    assert names > {"corpora/" + file.name for file in Path(corpora.__path__[0]).glob("*.py")}
    assert names > {"preparation/samples.py", "preparation/features.py", "pipelines/encode.py", "shards/writer.py"}
    assert names > {"flashsloth/image_processing_flashsloth.py", "flashsloth/processing_flashsloth.py"}
    read = Path.read_bytes
    for file in files:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, file=file: read(path) + b"#" * (path == file))
            assert code_identity() != before, file


def test_a_run_with_another_library_goes_on_with_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, 4)
    write_processor(tmp_path)
    settings = prepare_settings(tmp_path)
    planned = begin(settings)[0].plan.terms
    monkeypatch.setattr("pipelines.preparation.code.version", lambda name: "0.1")
    now = prepare.make_terms(settings, load_processor(settings))
    with pytest.raises(PlanError, match=r"libraries\.pillow: was '[\d.]+', now '0\.1'; libraries\.tokenizers: was"):
        check_terms(settings.output, planned, now)
