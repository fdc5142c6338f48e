"""Exact-match accuracy of a checkpoint on a prepared split, per question type.

    python jobs/evaluate.py --checkpoint outputs/instruct/export --data outputs/heldout --output outputs/evaluation

With `--blank_images` every picture is replaced by grey: what a model scores then, it does not owe to seeing.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from pydantic import AliasChoices, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from pipelines import storage
from pipelines.exit_status import exit_status
from pipelines.ray_session import start_ray
from pipelines.settings import JobSettings, load_settings
from pipelines.shards.reader import ShardedDataset
from pipelines.training.model_settings import ModelSettings


class EvaluateSettings(JobSettings):
    """Let a checkpoint answer the questions of a prepared split, and count the answers that are exactly right."""

    checkpoint: str
    """`from_pretrained` folder, such as the export of a training run; local or s3://."""
    data: str
    """Prepared folder in the chat layout; local or s3://."""
    output: str
    """Folder or s3:// prefix for answers.jsonl and summary.json."""
    blank_images: bool = Field(False, validation_alias=AliasChoices("blank_images", "blank-image"))
    """Replace every picture by uniform grey."""
    majority_from: str | None = None
    """Prepared folder whose most frequent answers are the baseline; by default the evaluated one."""
    limit: PositiveInt | None = None
    """Rows to evaluate, from the first; by default all."""
    batch_size: PositiveInt = 128
    """Questions answered at once."""
    max_new_tokens: PositiveInt = 64
    """Longest answer, in tokens."""
    num_workers: NonNegativeInt = 0
    """Ray actors that answer; 0 answers in this process, without Ray."""
    cpus_per_worker: NonNegativeFloat = 1
    """CPUs that an actor reserves."""
    gpus_per_worker: NonNegativeFloat = 0
    """GPUs that an actor reserves."""
    cache_dir: str | None = None
    """Where shards of an object store are kept on disk."""


def main(argv: list[str] | None = None) -> int:
    """Parse, check, answer, report."""
    settings = load_settings(EvaluateSettings, argv, prog="evaluate.py")
    return exit_status(lambda: evaluate(settings), stopped="nothing was written")


def evaluate(settings: EvaluateSettings) -> int:
    """Answer, judge, write, print."""
    # The model's libraries take seconds to import; --help and a misspelt flag are answered before.
    from pipelines.evaluation import answering, questions, verdicts
    from pipelines.training.start import check_encoder

    started = time.monotonic()
    dataset = ShardedDataset(settings.data, cache_dir=settings.cache_dir)
    checkpoint = storage.resolve(settings.checkpoint)
    answering.check_processor(checkpoint, dataset)
    check_encoder(ModelSettings(checkpoint=checkpoint), {dataset.folder: dataset.manifest})
    asked = questions.read_questions(dataset, range(min(settings.limit or len(dataset), len(dataset))))
    arguments: dict[str, Any] = {
        "checkpoint": checkpoint,
        "folder": dataset.folder,
        "blank_images": settings.blank_images,
        "max_new_tokens": settings.max_new_tokens,
        "cache_dir": settings.cache_dir,
    }
    if settings.num_workers:
        start_ray()
        workers = (settings.num_workers, settings.cpus_per_worker, settings.gpus_per_worker)
        answers = answering.answer_on_ray(asked, settings.batch_size, *workers, arguments)
    else:
        answers = answering.answer_here(answering.CheckpointAnswerer(**arguments), asked, settings.batch_size)
    judged = verdicts.judge(dataset, asked, answering.with_progress(answers, len(asked)))
    baseline = asked
    if settings.majority_from:
        baseline = questions.read_questions(ShardedDataset(settings.majority_from, cache_dir=settings.cache_dir))
    summary = {
        "checkpoint": checkpoint,
        "data": dataset.folder,
        "manifest": dataset.manifest.identity(),
        "blank_images": settings.blank_images,
        "majority_from": settings.majority_from or "the evaluated split",
        **verdicts.summarize(judged, verdicts.majority_answers(baseline)),
        "seconds": time.monotonic() - started,
    }
    verdicts.write_evaluation(storage.resolve(settings.output), judged, summary)
    print_summary(summary)
    return 0


def print_summary(summary: dict) -> None:
    """The figures as a table."""
    print(f"{'question type':<20}{'questions':>10}{'exact':>9}{'majority':>10}")
    for name, score in [*summary["types"].items(), ("overall", summary)]:
        print(f"{name:<20}{score['questions']:>10}{score['accuracy']:>9.1%}{score['majority_accuracy']:>10.1%}")


if __name__ == "__main__":
    sys.exit(main())
