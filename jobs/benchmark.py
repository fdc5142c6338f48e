"""Measure what is claimed of this software's speed; one command per subject, and a JSON file beside each printed table.

    python jobs/benchmark.py data                     # preparing images and reading shards, on a local disk
    python jobs/benchmark.py data --s3 s3://BUCKET/F  # and on an object store; AWS_ENDPOINT_URL names another than AWS
    python jobs/benchmark.py train                    # a step against the published forward, feed, overhead, padding
    python jobs/benchmark.py annotate                 # one annotation worker against the engine in it
    python jobs/benchmark.py serve                    # the service against a loop, static batching and its own engine
    python jobs/benchmark.py engine                   # the bare engine at full size, on a GPU
    python jobs/benchmark.py train --parts full_size  # the recipes at full size, on a GPU
    python jobs/benchmark.py data --quick             # small enough to see whether it runs; its figures mean nothing

Ends with status 0 where every bound is met, 1 where one is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.exit_status import exit_status
from pipelines.settings import load_settings

if TYPE_CHECKING:
    from pipelines.benchmarks.table import Report

# Subject -> where it is measured: the module, its settings, and what measures it with them. Each module imports what
# it measures, which takes seconds.
_SUBJECTS = {
    "annotate": ("annotating", "AnnotateBenchmark", "measure_annotate"),
    "data": ("data", "DataBenchmark", "measure_data"),
    "engine": ("engine", "EngineBenchmark", "measure_engine"),
    "serve": ("serving", "ServeBenchmark", "measure_serve"),
    "train": ("training", "TrainBenchmark", "measure_train"),
}


def main(argv: list[str] | None = None) -> int:
    """Measure one subject, print what was found and store it."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: benchmark.py {{{','.join(_SUBJECTS)}}} [--help]\n\n{__doc__}")
        return 0
    if not arguments or arguments[0] not in _SUBJECTS:
        print(f"error: name what to measure: benchmark.py {{{','.join(_SUBJECTS)}}} [--help]", file=sys.stderr)
        return 2
    settings_class, measure = _find(arguments[0])
    settings = load_settings(settings_class, arguments[1:], prog=f"benchmark.py {arguments[0]}")

    def work() -> int:
        report = measure(settings)
        path = report.save(settings.output)
        print(f"\n{report.text()}\n\n{path}")
        return 0 if all(bound.is_met for bound in report.bounds) else 1

    return exit_status(work, stopped="nothing was measured to the end")


def _find(subject: str) -> tuple[type[BenchmarkSettings], Callable[[Any], Report]]:
    module, settings_class, measure = _SUBJECTS[subject]
    found = import_module(f"pipelines.benchmarks.{module}")
    return getattr(found, settings_class), getattr(found, measure)


if __name__ == "__main__":
    sys.exit(main())
