"""A model of a few thousand weights and six steps of training, for tests of runs; with Ray or on plain ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothImageProcessor, FlashSlothProcessor
from pipelines.training.run_log import read_metrics
from pipelines.training.settings import TrainSettings
from tests.fixtures.tiny import train_tokenizer
from tests.prepared import coloured_rows, write_prepared

RECIPES = Path(__file__).parents[1] / "jobs" / "recipes"
PARTS = ["vision_tower", "pooling", "projector", "query_tokens", "embedded_query", "language_model"]
TINY = {
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    "query_hidden_size": 16,
    "pooling_dropout": 0.0,  # dropout draws per rank, so it would tell one worker from two
}
NUM_STEPS = 6


def published_recipe(name: str, **changes: Any) -> TrainSettings:
    """The recipe of this name in `jobs/recipes`, with whole sections changed."""
    return TrainSettings.model_validate(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) | changes)


def write_data(root: Path, rows: int = 20, text_only_every: int = 3) -> Path:
    """A processor and `rows` rows in `root`; with 20: three batches of 8 an epoch, the last one short and mixed."""
    processor = FlashSlothProcessor(FlashSlothImageProcessor(size=126), train_tokenizer(), num_image_tokens=9)
    processor.save_pretrained(root / "processor")
    write_prepared(root / "data", coloured_rows(rows, text_only_every), processor)
    return root


def recipe(prepared: Path, storage: Path | str, **changes: Any) -> TrainSettings:
    """Six steps on two workers, ZeRO-2, fp32, a checkpoint after every second step; `changes` by dotted name."""
    fields: dict[str, Any] = {
        "model": {"preset": "tiny", "processor": str(prepared / "processor"), "overrides": TINY},
        "train_parts": PARTS,
        "data": {"folders": [str(prepared / "data")], "reader_threads": 1},
        "batch": {"global_size": 8, "micro_size": 2},
        "max_steps": NUM_STEPS,
        "precision": "fp32",
        "deepspeed": {"stage": 2},
        "optim": {"lr": 3e-3, "weight_decay": 0.1, "warmup_ratio": 0.2},
        "scaling": {"num_workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0, "peak_tflops": 0.1},
        "run": {"name": "run", "storage": str(storage), "log_every": 1, "checkpoint_every": 2, "seed": 3},
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            fields.setdefault(section, {})[field] = value
        else:
            fields[section] = value
    return TrainSettings.model_validate(fields)


def losses(settings: TrainSettings) -> dict[int, float]:
    """Step -> loss, as the run logged them."""
    lines = read_metrics(f"{settings.run.storage}/{settings.run.name}")
    return {line["step"]: line["loss"] for line in lines}


def completed(run: Path, checkpoint: str) -> Path:
    """The folder of this checkpoint, which is written while training goes on, when it is complete."""
    deadline = time.monotonic() + 60
    while not (complete := list(run.glob(f"{checkpoint}-*/checkpoint.json"))):
        assert time.monotonic() < deadline, f"{checkpoint} has not been completed"
        time.sleep(0.05)
    return complete[0].parent


def check_export(exported: str, prepared: Path) -> None:
    """The export loads without a warning, with the processor of `prepared`, and generates."""
    model, loading = FlashSlothForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = FlashSlothProcessor.from_pretrained(exported)
    assert processor.identity() == FlashSlothProcessor.from_pretrained(prepared / "processor").identity()
    prompt = processor(messages=[{"role": "user", "content": "Name red again please ."}])
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[0] == 1
