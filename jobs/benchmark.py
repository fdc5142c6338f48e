"""Measure what is claimed of this software's speed; one command per subject, and a JSON file beside each printed table.

    python jobs/benchmark.py data                     # preparing images and reading shards, on a local disk
    python jobs/benchmark.py data --s3 s3://BUCKET/F  # and on an object store; AWS_ENDPOINT_URL names another than AWS
    python jobs/benchmark.py train                    # a step against the published forward, feed, overhead, padding
    python jobs/benchmark.py annotate                 # one annotation worker against the engine in it
    python jobs/benchmark.py serve                    # the service against a loop, static batching and its own engine
    python jobs/benchmark.py data --quick             # small enough to see whether it runs; its figures mean nothing

Ends with status 0 where every bound is met, 1 where one is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pipelines.benchmarks.annotating import AnnotateBenchmark, measure_annotate
from pipelines.benchmarks.data import DataBenchmark, measure_data
from pipelines.benchmarks.serving import ServeBenchmark, measure_serve
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.benchmarks.table import Report
from pipelines.benchmarks.training import TrainBenchmark, measure_train
from pipelines.exit_status import exit_status
from pipelines.settings import load_settings

# Subject -> its settings, and what measures it with them.
_SUBJECTS: dict[str, tuple[type[BenchmarkSettings], Callable[[Any], Report]]] = {
    "annotate": (AnnotateBenchmark, measure_annotate),
    "data": (DataBenchmark, measure_data),
    "serve": (ServeBenchmark, measure_serve),
    "train": (TrainBenchmark, measure_train),
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
    settings_class, measure = _SUBJECTS[arguments[0]]
    settings = load_settings(settings_class, arguments[1:], prog=f"benchmark.py {arguments[0]}")

    def work() -> int:
        report = measure(settings)
        path = report.save(settings.output)
        print(f"\n{report.text()}\n\n{path}")
        return 0 if all(bound.is_met for bound in report.bounds) else 1

    return exit_status(work, stopped="nothing was measured to the end")


if __name__ == "__main__":
    sys.exit(main())
