"""A caption or an answer for every row of a dataset, by a checkpoint or by a running service.

    python jobs/annotate.py --config jobs/recipes/caption.yaml
    python jobs/annotate.py --config RECIPE --dry-run          # the plan with its counts; nothing is written
    python jobs/annotate.py verify FOLDER                      # hash everything again, count every input once

Killed and run again, it goes on where it was; run on a finished folder, it says so and ends. What it writes is a
corpus: `parts/SOURCE/*.parquet` (format parquet) or `*.jsonl` (format messages) feed jobs/prepare.py.
"""

from __future__ import annotations

import argparse
import sys

from pipelines import storage
from pipelines.annotation.settings import AnnotateSettings
from pipelines.exit_status import exit_status
from pipelines.settings import load_settings


def main(argv: list[str] | None = None) -> int:
    """Annotate, or check what was written. Returns the exit status: 0, or 1 after one line on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: _verify(arguments[1:]) if arguments[:1] == ["verify"] else _annotate(arguments))


def _annotate(arguments: list[str]) -> int:
    settings = load_settings(AnnotateSettings, arguments, prog="annotate.py")
    # Here and below: the model's libraries take seconds to import; --help and a misspelt flag are answered before.
    from pipelines.annotate import annotate
    from pipelines.annotation.parts import PART_FOLDER

    manifest = annotate(settings)
    if manifest is None:
        print("dry run: nothing is written")
        return 0
    folder = storage.join(settings.output, PART_FOLDER)
    print(f"{folder}: {manifest.rows:,} rows in {len(manifest.parts):,} parts, ", end="")
    print(f"{manifest.answer_tokens:,} tokens, {sum(manifest.errors.values()):,} rows without an answer")
    for reason, count in manifest.errors.items():
        print(f"  {reason}: {count:,}")
    print(f"model {manifest.model}")
    return 0


def _verify(arguments: list[str]) -> int:
    text = "Hash every part again, and check that it holds every input of its chunk once."
    parser = argparse.ArgumentParser(prog="annotate.py verify", description=text)
    parser.add_argument("folder", metavar="FOLDER", help="an annotated folder or URI")
    folder = parser.parse_args(arguments).folder
    from pipelines.annotation.verify import verify

    faults = verify(folder)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        print(f"{folder}: every part is as it was written, with one row for every input")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
