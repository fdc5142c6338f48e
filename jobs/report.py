"""Make the report of a training run again, from the run's own files: `python jobs/report.py --run outputs/align`.

`jobs/train.py` leaves one when it ends, however it ends; this is for a job that was killed, and for one that goes on.
The run's folder may be local or on an object store. It writes report.html into it, and says where.
"""

from __future__ import annotations

import sys

from pipelines.settings import JobSettings, load_settings


class ReportSettings(JobSettings):
    """Make the report of a training run again."""

    run: str
    """Folder of the run, `run.storage`/`run.name` of its settings; local or s3://."""


def main(argv: list[str] | None = None) -> int:
    """Parse, read, write."""
    settings = load_settings(ReportSettings, argv, prog="report.py")
    from pipelines.report.run_page import write_run_report  # takes seconds; --help and a misspelt flag do without

    try:
        print(f"the report is {write_run_report(settings.run)}")
    except FileNotFoundError as error:
        print(f"error: there is no training run in {settings.run}: {error.filename} is missing", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
