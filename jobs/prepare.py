"""Corpora of images and conversations -> shards that training reads.

    python jobs/prepare.py --config jobs/recipes/prepare-llava-pretrain.yaml
    python jobs/prepare.py --config RECIPE --dry-run          # the plan with its counts; nothing is written
    python jobs/prepare.py verify FOLDER                      # hash every shard again

Killed and run again, it goes on where it was; run on a finished folder, it says so and ends.
"""

from __future__ import annotations

import argparse
import sys

from botocore.exceptions import BotoCoreError

from pipelines.preparation.settings import PrepareSettings
from pipelines.preparation.verify import verify
from pipelines.prepare import prepare
from pipelines.settings import load_settings


def main(argv: list[str] | None = None) -> int:
    """Prepare, or verify what was prepared. Returns the exit status: 0, or 1 after one line on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _verify(arguments[1:]) if arguments[:1] == ["verify"] else _prepare(arguments)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, BotoCoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _prepare(arguments: list[str]) -> int:
    settings = load_settings(PrepareSettings, arguments, prog="prepare.py")
    manifest = prepare(settings)
    if manifest is None:
        print("dry run: nothing is written")
        return 0
    print(f"{settings.output}: {manifest.planned:,} rows planned, {manifest.written:,} written in ", end="")
    print(f"{len(manifest.shards):,} shards, {manifest.quarantined:,} quarantined")
    for reason, count in manifest.quarantine_reasons.items():
        print(f"  {reason}: {count:,}")
    print(f"manifest {manifest.identity()}")
    return 0


def _verify(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="prepare.py verify", description="Hash every shard of a dataset again.")
    parser.add_argument("folder", help="a prepared folder or URI")
    folder = parser.parse_args(arguments).folder
    faults = verify(folder)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        print(f"{folder}: every shard is as it was written")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
