"""Training on real Ray Train workers with real DeepSpeed, at a size that takes seconds."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.feed import BatchLoader, Feed, Position, PreparedRows
from pipelines.training.launch import TrainingError, check_cluster, check_inputs, train
from pipelines.training.metrics import read_metrics
from pipelines.training.optimization import build_optimizer, freeze, schedule_factor, set_learning_rates
from pipelines.training.settings import TrainSettings
from pipelines.training.start import build_model, load_processor
from tests.prepared import coloured_rows, write_prepared

pytestmark = pytest.mark.ray

PARTS = ["vision_tower", "pooling", "projector", "query_tokens", "embedded_query", "language_model"]
TINY = {
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    "query_hidden_size": 16,
    "pooling_dropout": 0.0,  # dropout draws per rank, so it would tell one worker from two
}
NUM_STEPS = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A processor and 20 rows: three batches of 8 an epoch, the last one short; some rows without an image."""
    from flashsloth import FlashSlothImageProcessor
    from tests.fixtures.tiny import train_tokenizer

    root = tmp_path_factory.mktemp("prepared")
    processor = FlashSlothProcessor(FlashSlothImageProcessor(size=126), train_tokenizer(), num_image_tokens=9)
    processor.save_pretrained(root / "processor")
    write_prepared(root / "data", coloured_rows(20, text_only_every=3), processor)
    return root


def recipe(prepared: Path, storage: Path, **changes: Any) -> TrainSettings:
    """Six steps on two workers, ZeRO-2, fp32, a checkpoint after every second step; `changes` by dotted name."""
    fields: dict[str, Any] = {
        "model": {"preset": "tiny", "processor": str(prepared / "processor"), "overrides": TINY},
        "train_parts": PARTS,
        "data": {"folders": [str(prepared / "data")], "reader_threads": 1},
        "batch": {"global_size": 8, "micro_size": 2},
        "max_steps": NUM_STEPS,
        "precision": "fp32",
        "optim": {"lr": 3e-3, "weight_decay": 0.1, "warmup_ratio": 0.2},
        "scaling": {"num_workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0},
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
    lines = read_metrics(f"{settings.run.storage}/{settings.run.name}")
    return {line["step"]: line["loss"] for line in lines}


def plain_losses(settings: TrainSettings) -> list[float]:
    """The slow obvious twin: no workers, no DeepSpeed, each global batch in one piece."""
    processor = load_processor(settings.model)
    rows = PreparedRows(settings.data.folders)
    model = build_model(settings.model, processor, "fp32", settings.run.seed)
    freeze(model, settings.train_parts)
    optimizer = build_optimizer(model, settings.optim)
    feed = Feed(rows.num_tokens, rows.num_loss_tokens, rows.has_image, settings.batch.global_size, settings.run.seed)
    result = []
    batches = feed.walk(Position(), NUM_STEPS)
    with BatchLoader(rows, batches, rank=0, world_size=1, micro_batch=100, processor=processor) as loader:
        for step, micro in enumerate(loader):
            set_learning_rates(optimizer, schedule_factor(step, NUM_STEPS, settings.optim))
            micro.inputs["pixel_values"] = normalize_pixels(micro.inputs["pixel_values"])
            loss = model(**micro.inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            result.append(loss.item())
    return result


def measure_variants(config: dict[str, Any]) -> None:
    """A worker that trains several variants of one recipe after each other and stores their losses."""
    import json

    import torch.distributed as dist

    from pipelines.training.loop import WorkerRun, grouped_by_step
    from pipelines.training.metrics import StepMeter
    from pipelines.training.process import prepare_process

    device = prepare_process(1, on_gpu=False)
    settings = TrainSettings.model_validate(config)
    found = {}
    for stage, precision, micro, checkpointing in json.loads(os.environ["VARIANTS"]):
        variant = settings.model_copy(deep=True)
        variant.deepspeed.stage, variant.precision, variant.batch.micro_size = stage, precision, micro
        variant.model.gradient_checkpointing = checkpointing
        processor = load_processor(variant.model)
        run = WorkerRun(variant, processor, PreparedRows(variant.data.folders), device)
        meter, measured = StepMeter(device), []
        with run.loader(Position(), NUM_STEPS) as loader:
            for step, micro_batches in enumerate(grouped_by_step(loader)):
                run.step(step, micro_batches, meter)
                meter.add_step(micro_batches[-1].batch)
                measured.append(meter.read(loader.waited_s, None)["loss"])
        found[f"{stage} {precision} {micro} {checkpointing}"] = measured
    if dist.get_rank() == 0:
        (Path(settings.run.storage) / "variants.json").write_text(json.dumps(found))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_losses_depend_neither_on_workers_nor_on_micro_batches_nor_on_the_zero_stage(
    ray_session, prepared, tmp_path, monkeypatch, num_workers
):
    import json

    variants = [(2, "fp32", 4, False), (2, "fp32", 1, False), (1, "fp32", 2, True)]
    if num_workers == 2:
        variants += [(0, "fp32", 2, False), (3, "fp32", 2, False), (0, "bf16", 4, False), (2, "bf16", 4, False)]
    settings = recipe(prepared, tmp_path, scaling__num_workers=num_workers, batch__micro_size=4)
    monkeypatch.setattr(
        "pipelines.training.launch.worker_environment",
        lambda cpus, on_gpu: {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "VARIANTS": json.dumps(variants)},
    )
    train(settings, measure_variants)
    twin = plain_losses(settings)
    assert twin[-1] < 0.9 * twin[0]
    for name, found in json.loads((tmp_path / "variants.json").read_text()).items():
        tolerance = 5e-2 if "bf16" in name else 1e-5
        np.testing.assert_allclose(found, twin, rtol=tolerance, err_msg=name)


def test_a_run_exports_continues_after_a_crash_and_survives_a_damaged_checkpoint(
    ray_session, prepared, tmp_path, capfd
):
    undisturbed = recipe(prepared, tmp_path / "a")
    check_inputs(undisturbed)
    check_cluster(undisturbed.scaling)
    exported = train(undisturbed)
    expected = losses(undisturbed)
    assert list(expected) == list(range(1, NUM_STEPS + 1))
    np.testing.assert_allclose(list(expected.values()), plain_losses(undisturbed), rtol=1e-5)
    _check_export(exported, prepared)
    _check_folder(Path(exported).parent)

    # Worker 1 dies in step 5, after the checkpoint of step 4: the retry does steps 5 and 6 again, bit for bit.
    crashed = recipe(prepared, tmp_path / "b")
    exported = train(crashed, crash_once)
    assert (tmp_path / "b" / "crashed").exists()
    assert losses(crashed) == expected
    _check_export(exported, prepared)

    # The newest checkpoint loses a byte: the same command goes on from the one before.
    newest, before = sorted((tmp_path / "b" / "run").glob("step-*"), reverse=True)[:2]
    assert (newest.name[:13], before.name[:13]) == ("step-00000006", "step-00000004")
    victim = sorted(newest.rglob("*.pt"))[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    train(crashed, say_to_file)
    assert losses(crashed) == expected
    said = (tmp_path / "b" / "said").read_text()
    assert f"checkpoint {newest.name}: state/{victim.name} has sha256" in said
    assert re.search(r"resuming from \S+/step-00000004-\w+ \(step 4, every file verified\)", said)

    # Nothing verifies: it never starts over in silence.
    for manifest in (tmp_path / "b" / "run").glob("step-*/checkpoint.json"):
        manifest.unlink()
    crashed.run.max_failures = 0
    with pytest.raises(TrainingError, match=r"no checkpoint of this run verifies.*was never completed"):
        train(crashed)


def crash_once(config: dict[str, Any]) -> None:
    """`train_worker`, but rank 1 of the first attempt dies without a word in the fifth step."""
    from pipelines.training import loop

    step = loop.WorkerRun.step

    def dying(self: Any, number: int, *rest: Any) -> None:
        marker = Path(config["run"]["storage"]) / "crashed"
        if number == 4 and self.rank == 1 and not marker.exists():
            marker.touch()
            os._exit(1)
        step(self, number, *rest)

    loop.WorkerRun.step = dying
    loop.train_worker(config)


def say_to_file(config: dict[str, Any]) -> None:
    """`train_worker`, with what it says about checkpoints kept in a file."""
    from pipelines.training import checkpoint, loop

    checkpoint._say = lambda message: _append(Path(config["run"]["storage"]) / "said", message)
    loop.train_worker(config)


def _append(path: Path, message: str) -> None:
    with path.open("a") as file:
        file.write(message + "\n")


def _check_export(exported: str, prepared: Path) -> None:
    model, loading = FlashSlothForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = FlashSlothProcessor.from_pretrained(exported)
    assert processor.identity() == FlashSlothProcessor.from_pretrained(prepared / "processor").identity()
    prompt = processor(messages=[{"role": "user", "content": "Name red again please ."}])
    assert model.generate(**prompt, max_new_tokens=2, do_sample=False).shape[0] == 1


def _check_folder(run: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "export"} <= {path.name for path in run.iterdir()}
    assert list((run / "tensorboard").glob("events.*"))
    line = read_metrics(str(run))[-1]
    wanted = ("lr", "grad_norm", "samples_per_s", "tokens_per_s", "data_wait_share", "memory_gib", "samples_seen")
    assert all(np.isfinite(line[name]) for name in wanted)
    assert line["samples_seen"] == 40


def test_zero_3_saves_resumes_and_exports(ray_session, prepared, tmp_path):
    settings = recipe(prepared, tmp_path, deepspeed__stage=3, train_parts=["pooling", "projector", "embedded_query"])
    settings.max_steps = NUM_STEPS - 2
    exported = train(settings)
    before = losses(settings)
    shutil.rmtree(Path(exported))
    settings.max_steps = NUM_STEPS
    settings.optim.schedule = "constant"
    exported = train(settings)
    assert list(losses(settings)) == list(range(1, NUM_STEPS + 1))
    assert {step: loss for step, loss in losses(settings).items() if step <= 4} == before
    _check_export(exported, prepared)
    start = build_model(settings.model, load_processor(settings.model), "fp32", settings.run.seed).state_dict()
    trained = FlashSlothForConditionalGeneration.from_pretrained(exported).state_dict()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    # Not each of them: some norm's gradient may be below what moves a float32 at 1.
    assert changed <= {
        name for name in start if any(part in name for part in (".pooling.", ".projector.", ".embedded_query."))
    }
    assert len(changed) > 10
