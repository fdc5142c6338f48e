"""The folder of a training run -> its report. Local or on an object store; a run that goes on is shown as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from pipelines import storage
from pipelines.report.run_contents import Attempt, History, RunReport
from pipelines.report.run_figures import stalls_of, throughput_of, time_uses, windows_of
from pipelines.report.run_findings import evaluation_of, findings_of, headlines_of
from pipelines.report.run_history import history_of
from pipelines.report.run_panels import panels_of
from pipelines.report.sources import data_facts
from pipelines.training.events import read_events
from pipelines.training.run_log import read_metrics
from pipelines.training.scores import read_scores

SETTINGS_NAME = "config.yaml"


def run_report(run_uri: str) -> RunReport:
    """Everything that the run's own files say.

    Raises:
        FileNotFoundError: There is no run in this folder.
    """
    run_uri = storage.resolve(run_uri)
    settings = storage.read_bytes(storage.join(run_uri, SETTINGS_NAME)).decode()
    lines = read_metrics(run_uri)
    times = [line["time"] for line in lines if "time" in line]
    history = history_of(read_events(run_uri), max(times, default=None))
    windows = windows_of(lines, history)
    stalls = stalls_of(windows)
    scores = read_scores(run_uri)
    evaluations = [
        {"step": each.step} | {f"eval_{name}": value for name, value in each.figures.items()} for each in scores
    ]
    newest = history.attempts[-1] if history.attempts else None
    return RunReport(
        name=run_uri.rpartition("/")[2],
        run_uri=run_uri,
        history=history,
        num_steps=newest.num_steps if newest else 0,
        step=windows[-1].last if windows else 0,
        headlines=headlines_of(windows, history),
        findings=[*findings_of(windows, stalls, history), *evaluation_of(scores)],
        time_uses=time_uses(windows, history),
        panels=panels_of([*lines, *evaluations], [attempt.step for attempt in history.attempts[1:]]),
        stalls=stalls,
        throughput=throughput_of(windows, history),
        data=_data(yaml.safe_load(settings)["data"]["folders"], newest.data if newest else []),
        settings=settings,
        environment=_environment(newest, history),
    )


def _data(folders: Sequence[str], identities: Sequence[str]) -> dict[str, dict[str, str]]:
    """Facts of each prepared folder. What the run itself read is what counts; folders may change or go."""
    found = {}
    for number, folder in enumerate(folders):
        read = identities[number] if number < len(identities) else None
        try:
            facts = data_facts(folder)
        except (OSError, ValueError) as error:
            facts = {"manifest": read or "unknown", "today": f"cannot be read: {error}"}
        if read and facts["manifest"] != read:
            facts |= {"manifest": read, "today": f"another manifest, {facts['manifest']}, is there"}
        found[folder] = facts
    return found


def _environment(attempt: Attempt | None, history: History) -> dict[str, Any]:
    if attempt is None:
        return {}
    machines: dict[tuple[str, str], int] = {}
    for machine in attempt.machines:
        machines[machine] = machines.get(machine, 0) + 1
    where = "; ".join(f"{name}: {count} x {device}" for (name, device), count in machines.items())
    hosts = len({name for name, _ in attempt.machines})
    workers = f"{attempt.world_size} on {hosts} machine{'s' if hosts > 1 else ''} ({where})"
    sizes = [each.world_size for each in history.attempts]
    if len(set(sizes)) > 1:
        workers += f"; over the attempts {', '.join(str(size) for size in sizes)}"
    return {"workers": workers, **attempt.environment}
