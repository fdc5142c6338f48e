"""The tables of `jobs/benchmark.py data`."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.benchmarks.reading import missing
from pipelines.benchmarks.rounds import Figures, Rounds, Spread
from pipelines.benchmarks.table import Table


def preparing_table(rounds: Rounds, cores: int, bare: str, again: Mapping[str, float]) -> Table:
    """Images to pixels: rates, and shares of what the bare loop would do on every core."""
    rows = []
    for name in rounds.figures[0]:
        share = rounds.ratio(name, bare, "rows_per_s")
        # What the bare loop takes of a processor for a row, by what this takes: what is left are costs beside the work.
        useful = rounds.ratio(bare, name, "cpu_ms_per_row")
        rows.append(
            [
                name,
                f"{rounds.spread(name, 'rows_per_s').median:,.0f}",
                _percent(Spread(share.median / cores, share.low / cores, share.high / cores)) if name != bare else "",
                f"{rounds.spread(name, 'cpu_ms_per_row').median:.2f}",
                _percent(useful) if name != bare else "",
                f"{Spread.of([_busy(each[name]) for each in rounds.figures]).median:.2f}",
                _percent(share_of_cores_left(rounds, name, bare, cores)) if name != bare else "",
            ]
        )
    seconds = ", ".join(f"{name} {each:.2f} s" for name, each in again.items())
    return Table(
        title="Images to pixels and tokens",
        columns=[
            "who",
            "images/s",
            f"of {bare} x {cores} (lowest to highest)",
            "CPU ms/image",
            f"{bare}'s CPU by it",
            "cores busy",
            f"of {bare} x cores that others left",
        ],
        rows=rows,
        notes=[
            "A bare loop writes and hashes nothing; as the DataLoaders are, it is written with Pillow. One of these "
            "throws away what it is handed; the other writes it as Arrow files and hashes them, without receipts, and "
            "without waiting for the disk.",
            f"A second run over the finished corpus decodes nothing: {seconds}.",
            "CPU: of the process and all that it started, Ray's own processes included; a store's is not. Cores busy: "
            "with anything at all, a store on this machine included. Others: what was busy and is not of the "
            "contestant, such as that store.",
        ],
    )


def share_of_cores_left(rounds: Rounds, name: str, bare: str, cores: int) -> Spread:
    """The rate of `name` by that of `bare` x the cores that were not busy with others, such as a store that it uses."""

    def share(each: Mapping[str, Figures]) -> float:
        figures = each[name]
        others = (figures["machine_cpu_s"] - figures["cpu_s"]) / figures["seconds"]
        return figures["rows_per_s"] / (each[bare]["rows_per_s"] * (cores - max(others, 0.0)))

    return Spread.of([share(each) for each in rounds.figures])


def growth_table(rounds: Rounds) -> Table:
    """The cost of a row by the number of rows; the contestants are the numbers."""
    rows = []
    for name in rounds.figures[0]:
        rate, driver, worker = (rounds.spread(name, each) for each in ("rows_per_s", "driver_mib", "worker_mib"))
        times = f"{1000 / rate.median:.2f} ({1000 / rate.high:.2f} to {1000 / rate.low:.2f})"
        rows.append([name, times, f"{driver.median:,.0f}", f"{worker.median:,.0f}"])
    columns = ["rows", "ms/row (lowest to highest)", "driver's peak, MiB", "largest worker's peak, MiB"]
    return Table(title="More rows", columns=columns, rows=rows)


def sharing_table(num_rows: int, found: Mapping[str, Rounds]) -> Table:
    """What `share_images` changes, by the number of rows to an image."""
    rows = []
    for repeats, rounds in found.items():
        apart, shared = rounds.figures[0]
        for name in (apart, shared):
            cpu, size, rate = (
                rounds.spread(name, figure).median for figure in ("cpu_ms_per_row", "stored_bytes", "read_rows_per_s")
            )
            ratio = _percent(rounds.ratio(name, apart, "cpu_ms_per_row")) if name != apart else ""
            rows.append([f"{repeats}: {name}", f"{cpu:.2f}", ratio, f"{size / num_rows / 1e3:,.0f}", f"{rate:,.0f}"])
    columns = [
        "rows to an image",
        "CPU ms/row",
        "of that without (lowest to highest)",
        "kB/row",
        "random reads, rows/s",
    ]
    return Table(title=f"Images that rows share, {num_rows:,} rows", columns=columns, rows=rows)


def reading_table(where: str, found: Mapping[str, Rounds]) -> Table:
    """Rows and bytes per second of every format."""
    rows = []
    for title, rounds in found.items():
        own = next(iter(rounds.figures[0]))
        for name in rounds.figures[0]:
            rate, size = (rounds.spread(name, figure).median for figure in ("rows_per_s", "mb_per_s"))
            ratio = f"{rounds.ratio(own, name, 'rows_per_s').median:.2f}" if name != own else ""
            rows.append([f"{title}: {name}", f"{rate:,.0f}", f"{size:,.0f}", ratio])
    columns = ["order and reader", "rows/s", "MB/s", "shards by it"]
    notes = ["WebDataset's tars cannot be read at random.", *missing()]
    return Table(title=f"Reading rows from {where}", columns=columns, rows=rows, notes=notes)


def _busy(figures: Figures) -> float:
    return figures["machine_cpu_s"] / figures["seconds"]


def _percent(share: Spread) -> str:
    return f"{share.median:.0%} ({share.low:.0%} to {share.high:.0%})"
