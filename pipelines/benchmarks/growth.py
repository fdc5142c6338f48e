"""Does a row cost the same, in time and memory, whatever the number of rows? Every size in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ray

from pipelines.benchmarks.preparing import PrepareContestant, start_warm_ray
from pipelines.benchmarks.processes import process_tree
from pipelines.benchmarks.rounds import Figures

_SECONDS = 1800


def grown(corpus: Path, rows: Path, few: Path, output: str, warm: Path) -> Figures:
    """Prepare the corpus file `rows` in a new process, after `warm`: a row's time, and the peak memory of the driver
    and of the largest worker, in MiB."""
    arguments = [sys.executable, "-m", "pipelines.benchmarks.growth", *map(str, (corpus, rows, few, output, warm))]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=_SECONDS)
    if run.returncode:
        raise RuntimeError(f"preparing {rows} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main(arguments: Sequence[str]) -> None:
    """Measure in this process, and print the figures as the last line."""
    corpus, rows, few = map(Path, arguments[:3])
    start_warm_ray()
    contestant = PrepareContestant(corpus, rows, few, arguments[3])
    contestant.warm_up(Path(arguments[4]))
    figures = contestant()
    tree = process_tree()
    workers = [process.peak_mib for process in tree if process.is_ray_worker]
    print(json.dumps({**figures, "driver_mib": tree[0].peak_mib, "worker_mib": max(workers)}))
    contestant.drop()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
