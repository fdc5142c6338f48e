"""What a report says about training, data and machine, read from what the jobs left behind."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from pipelines.evaluation import read_answers
from pipelines.report.contents import Picture, Reply, Stage
from pipelines.shards.manifest import Manifest
from pipelines.training.metrics import read_metrics

_LIBRARIES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "pillow")


def stage_of(name: str, run: Path, note: str) -> Stage:
    """The loss curve of a training run."""
    lines = read_metrics(str(run))
    return Stage(name, [line["step"] for line in lines], [line["loss"] for line in lines], note)


def data_facts(folder: Path) -> dict[str, str]:
    """What a prepared folder holds, and the hash that stands for all of it."""
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


def environment_facts() -> dict[str, str]:
    """Machine, interpreter, libraries and, in a git checkout, the commit."""
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{library: version(library) for library in _LIBRARIES},
    }
    commit = _commit()
    return facts | {"commit": commit} if commit else facts


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


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""  # no git, or not a checkout: an installed package
    return f"{commit} with local changes" if changed.strip() else commit
