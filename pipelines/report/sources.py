"""What a report says about training and data, read from what the jobs left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.evaluation.verdicts import read_answers
from pipelines.report.contents import Picture, Reply, Stage
from pipelines.shards.manifest import Manifest
from pipelines.training.run_log import read_metrics


def stage_of(name: str, run: Path, note: str) -> Stage:
    """The loss curve of a training run."""
    lines = read_metrics(str(run))
    return Stage(name, [line["step"] for line in lines], [line["loss"] for line in lines], note)


def data_facts(folder: Path | str) -> dict[str, str]:
    """What a prepared folder holds, local or not, and the hash that stands for all of it."""
    manifest = Manifest.load(str(folder))
    rejected = ", ".join(f"{reason} {count}" for reason, count in manifest.quarantine_reasons.items())
    tokens = sum(sum(shard.num_tokens) for shard in manifest.shards)
    return {
        "rows": f"{manifest.written:,} of {manifest.planned:,}" + (f" (quarantined: {rejected})" if rejected else ""),
        "tokens": f"{tokens:,}",
        "shards": f"{len(manifest.shards)}, {sum(shard.bytes for shard in manifest.shards) / 2**20:.0f} MiB",
        "images": f"{manifest.payload}, {manifest.num_image_tokens} tokens each",
        "manifest": manifest.identity(),
        "processor": manifest.processor_identity,
    }


def replies_of(evaluation: Path) -> list[tuple[str, Reply]]:
    """What an evaluation wrote, each answer with the id of its row, in the order of the questions."""
    answers = read_answers(str(evaluation))
    return [(a.id, Reply(a.question, a.answer, a.truth, a.correct, a.type)) for a in answers]


def pictures_of(replies: Sequence[tuple[str, Reply]], images: Path) -> list[Picture]:
    """Replies, each with the name of its picture, gathered by picture in order of first appearance."""
    gathered: dict[str, list[Reply]] = {}
    for name, reply in replies:
        gathered.setdefault(name, []).append(reply)
    return [Picture(name, (images / f"{name}.jpg").read_bytes(), rows) for name, rows in gathered.items()]
