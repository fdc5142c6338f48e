"""Corpora of images and conversations -> shards that training reads.

    python jobs/prepare.py --config jobs/recipes/prepare-llava-pretrain.yaml
    python jobs/prepare.py --config RECIPE --dry-run          # the plan with its counts; nothing is written
    python jobs/prepare.py verify FOLDER                      # hash everything again
    python jobs/prepare.py inspect FOLDER --key corpus:12     # a row as a person reads it
    python jobs/prepare.py gc FOLDER --dry-run                # what killed runs have left

Killed and run again, it goes on where it was; run on a finished folder, it says so and ends.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable

from pipelines import storage
from pipelines.exit_status import exit_status
from pipelines.preparation.settings import PrepareSettings
from pipelines.settings import load_settings


def main(argv: list[str] | None = None) -> int:
    """Prepare, or look after what was prepared. Returns the exit status: 0, or 1 after one line on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    command = _COMMANDS.get(arguments[0]) if arguments else None
    return exit_status(lambda: command(_parser().parse_args(arguments)) if command else _prepare(arguments))


def _prepare(arguments: list[str]) -> int:
    settings = load_settings(PrepareSettings, arguments, prog="prepare.py")
    # Here and below: the model's libraries take seconds to import; --help and a misspelt flag are answered before.
    from pipelines.preparation.data_receipt import RECEIPT_PAGE
    from pipelines.prepare import prepare

    manifest = prepare(settings)
    if manifest is None:
        print("dry run: nothing is written")
        return 0
    print(f"{settings.output}: {manifest.planned:,} rows planned, {manifest.written:,} written in ", end="")
    print(f"{len(manifest.shards):,} shards, {manifest.quarantined:,} quarantined")
    for reason, count in manifest.quarantine_reasons.items():
        print(f"  {reason}: {count:,}")
    print(f"manifest {manifest.identity()}, receipt {storage.join(settings.output, RECEIPT_PAGE)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from pipelines.preparation.verify import verify

    faults = verify(arguments.folder)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        print(f"{arguments.folder}: every shard is as it was written")
    return 1 if faults else 0


def _inspect(arguments: argparse.Namespace) -> int:
    from pipelines.preparation.inspection import Inspector

    inspector = Inspector(arguments.folder)
    if inspector.note:
        print(inspector.note, file=sys.stderr)
    shown: Iterable[str] = inspector.rows(arguments.rows)
    if arguments.key:
        shown = [inspector.row(arguments.key)]
    elif arguments.quarantined:
        shown = inspector.quarantined() if inspector.manifest.quarantined else ["no row is quarantined"]
    try:
        for number, text in enumerate(shown):
            print("\n" * (number > 0) + _CONTROL.sub(lambda found: repr(found[0])[1:-1], text), flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python says so once more when it ends
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    from pipelines.preparation.collection import find_garbage, remove

    garbage = find_garbage(arguments.folder, arguments.older_than)
    for each in garbage:
        print(f"  {each.path}  {each.bytes:,} bytes, {each.age_hours:,.1f} h old")
    if not arguments.dry_run:
        garbage = remove(arguments.folder, garbage)
    total = sum(each.bytes for each in garbage) / 1e6
    verb = "would be removed" if arguments.dry_run else "removed"
    print(f"{arguments.folder}: {len(garbage):,} object{'' if len(garbage) == 1 else 's'} {verb}, {total:,.1f} MB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare.py", description="Look after what was prepared.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("folder", metavar="FOLDER", help="a prepared folder or URI")

    text = "Hash every shard, the quarantine table and the plan again, and check the receipts against them."
    commands.add_parser("verify", parents=[folder], help=text, description=text)

    text = "Show rows as a person reads them: the turns, what the model is given and what it learns."
    inspect = commands.add_parser("inspect", parents=[folder], help=text, description=text)
    which = inspect.add_mutually_exclusive_group()
    which.add_argument("--rows", type=_count, default=3, metavar="N", help="the first N rows (default: 3)")
    which.add_argument("--key", help="the row with this key, such as corpus:12, be it written or quarantined")
    which.add_argument("--quarantined", action="store_true", help="the rows that could not become samples")

    text = "Remove what killed runs have left: shards that no receipt names, half-written temporary files."
    gc = commands.add_parser("gc", parents=[folder], help=text, description=text)
    gc.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    unfinished = "only what was written HOURS ago or earlier; lets a folder be collected that is not finished"
    gc.add_argument("--older-than", type=_hours, metavar="HOURS", help=unfinished)
    return parser


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1
    if not hours >= 0:  # nor is "nan"
        raise argparse.ArgumentTypeError(f"{text} hours is no age: give 0 or more")
    return hours


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is no number of rows: give 1 or more")
    return int(text)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a corpus may hold what a terminal takes for a command
_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"verify": _verify, "inspect": _inspect, "gc": _gc}


if __name__ == "__main__":
    sys.exit(main())
