"""The whole road on one machine: a corpus in, answers over HTTP out, and a report. `make quickstart` runs this.

    python jobs/quickstart.py                                  # about twelve minutes on two CPU cores
    python jobs/quickstart.py --scenes 200 --align.max_steps 4 --instruct.max_steps 4    # does every step work?

It runs the jobs as anyone would, with recipes and flags, and prints each command; they share one Ray cluster, which
would otherwise start and end with each of them. Run again, it skips what is finished and continues what was cut off; a
change of the code, a recipe or a setting starts the steps that it touches anew.
"""

from __future__ import annotations

import sys

from openai import OpenAIError

from pipelines.exit_status import INTERRUPTED, terminate_as_interrupt
from pipelines.quickstart import Quickstart, QuickstartSettings
from pipelines.settings import load_settings
from pipelines.steps import StepFailed


def main(argv: list[str] | None = None) -> int:
    """Run all steps; the exit status says whether the goals are met."""
    settings = load_settings(QuickstartSettings, argv, prog="quickstart.py")
    try:
        with terminate_as_interrupt():
            return Quickstart(settings).run()
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on from here", file=sys.stderr)
        return INTERRUPTED
    except (StepFailed, ValueError, OSError, OpenAIError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
