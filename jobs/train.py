"""Train FlashSloth on prepared shards: `python jobs/train.py --config jobs/recipes/align.yaml [--run.name mine ...]`.

The same command with the same `run.name` continues the run from its last checkpoint that verifies, on as many workers
as there are now. What it leaves in `run.storage`/`run.name`: checkpoints, metrics.jsonl, tensorboard/, config.yaml,
events/, report.html however it ends (`jobs/report.py` makes it at any time), and
at the end the model in export/; with `evaluation` also evaluations.jsonl, best.json and, where the best checkpoint is
not the last one, its model in best/. With `--dry-run` it checks what can be checked without a cluster, and says what
memory each ZeRO stage needs.

Exit codes: 0 the model is exported; 1 an error, which the last line names; 2 settings that contradict each other; 75 it
was stopped by SIGTERM with a checkpoint of its last step; 130 it was stopped by Ctrl-C, without one.
"""

from __future__ import annotations

import sys

from pipelines.ray_session import start_ray
from pipelines.settings import load_settings
from pipelines.training.settings import TrainSettings

STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, try again."""


def main(argv: list[str] | None = None) -> int:
    """Parse, check, run, report."""
    settings = load_settings(TrainSettings, argv, prog="train.py")
    # torch and DeepSpeed take seconds to import; --help and a misspelt flag are answered before.
    from pipelines.training import launch
    from pipelines.training.forecast import forecast

    settings = launch.resolve_settings(settings)
    try:
        launch.check_inputs(settings)
        if settings.dry_run:
            print(f"{forecast(settings)}\ndry run: nothing is trained")
            return 0
        start_ray(num_cpus=None)
        launch.check_cluster(settings.scaling, settings.evaluation)
        exported = launch.train(settings)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    except launch.TrainingStopped as stop:
        print(f"{stop}; run the same command again to go on from there", file=sys.stderr)
        return STOPPED_EXIT_CODE
    except (ValueError, OSError, launch.TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"trained {settings.run.name}: the model is in {exported}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
