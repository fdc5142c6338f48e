"""What a person sees of the workers while a run goes on.

Ray streams everything that any process of the job writes, with a prefix per line, its own helpers' warnings among it:
on a cluster without a dashboard one of them complains every second. Here the workers' own lines remain. All of it
stays in Ray's log files.
"""

from __future__ import annotations

import sys
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

_HANDLER = "ray_print_logs"
_WORKER = "RayTrainWorker"


def show_worker_lines_only() -> None:
    """From now on, print the training workers' lines and no others. Where Ray streams nothing, nothing changes."""
    if any(name == _HANDLER for name, _ in dispatcher.handlers):
        dispatcher.remove_handler(_HANDLER)
        dispatcher.add_handler(_HANDLER, _print)


def _print(data: dict[str, Any]) -> None:
    if data.get("actor_name") != _WORKER:
        return
    if data["is_err"]:
        print("\n".join(f"[worker {data['pid']}] {line}" for line in data["lines"]), file=sys.stderr, flush=True)
    else:
        print("\n".join(data["lines"]), flush=True)
