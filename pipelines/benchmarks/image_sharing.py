"""What `share_images` costs and saves: rows prepared with and without it, and read at random from a local disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipelines import storage
from pipelines.benchmarks.preparing import PrepareContestant
from pipelines.benchmarks.reading import OURS, Copies, read_all
from pipelines.benchmarks.rounds import Figures, Rounds, take_turns
from pipelines.shards.images import ImageStore
from pipelines.shards.manifest import Manifest

APART, SHARED = "an image for each row", "shared images"


def measure_sharing(
    corpus: Path, rows: Path, few: Path, warm: Path, output: str, rounds: int, say: Callable[[str], None]
) -> Rounds:
    """Prepare the corpus file `rows` in both ways, in turns, into folders below the local folder `output`.

    Figures: those of PrepareContestant, `stored_bytes` of shards and images, `read_rows_per_s` of one worker.
    """
    contestants = {
        name: PrepareContestant(corpus, rows, few, storage.join(output, name.replace(" ", "-")), name == SHARED)
        for name in (APART, SHARED)
    }
    for each in contestants.values():
        each.warm_up(warm)
    measured = {name: _Sharing(contestant, rows) for name, contestant in contestants.items()}
    found = take_turns(measured, rounds, say)
    for each in contestants.values():
        each.drop()
    return found


class _Sharing:
    def __init__(self, prepare: PrepareContestant, rows: Path) -> None:
        self._prepare, self._rows = prepare, rows

    def __call__(self) -> Figures:
        prepared = self._prepare()
        folder = self._prepare.settings(self._rows).output
        manifest = Manifest.load(folder)
        stored = sum(shard.bytes for shard in manifest.shards) + ImageStore(folder).total()[1]
        copies = Copies(folder, None, None, manifest.written)
        # Twice: files that were read before, since disks are not what is compared.
        read = [read_all(copies, OURS, is_random=True, num_workers=1, seed=0) for _ in range(2)]
        return {**prepared, "stored_bytes": stored, "read_rows_per_s": read[-1]["rows_per_s"]}
