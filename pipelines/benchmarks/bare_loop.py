"""A training loop as plain as torch allows, in a process of its own: what Ray Train and DeepSpeed are measured against.

It takes settings as JSON on its command line, then numbers of steps, one per line, on its standard input, and answers
each with a line of JSON: what those steps took. It reads the same batches as a run with these settings on one worker,
and does what a step of that run does to the weights: learning rates of the schedule, gradients clipped, AdamW.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from types import TracebackType

import torch

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.feed import BatchLoader, Feed, MicroBatch, Position, PreparedRows
from pipelines.training.optimization import build_optimizer, freeze, schedule_factor, set_learning_rates
from pipelines.training.settings import TrainSettings
from pipelines.training.start import build_model, load_processor


class BareLoop:
    """The process, from the side of whoever measures against it; use as a context manager."""

    def __init__(self, settings: TrainSettings) -> None:
        command = [sys.executable, "-m", __name__, settings.model_dump_json()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> BareLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its input, at which it ends

    def run(self, num_steps: int) -> dict[str, float]:
        """`seconds`, `cpu_s` and the mean `loss` of the next steps.

        Raises:
            ValueError: The process has ended; its own message is on stderr.
        """
        assert self._process.stdin and self._process.stdout
        print(num_steps, file=self._process.stdin, flush=True)
        if not (answer := self._process.stdout.readline()):
            raise ValueError(f"the bare loop ended with exit code {self._process.wait()}")
        return json.loads(answer)


def bare_steps(settings: TrainSettings) -> Iterator[float]:
    """Train step by step, on the CPU in fp32; yields the loss of each."""
    processor, rows = load_processor(settings.model), PreparedRows(settings.data.folders)
    model = build_model(settings.model, processor, settings.precision, settings.run.seed)
    freeze(model, settings.train_parts)
    optimizer = build_optimizer(model, settings.optim)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_steps = settings.max_steps or 0
    feed = Feed(
        rows.num_tokens,
        rows.num_loss_tokens,
        rows.has_image,
        settings.batch.global_size,
        settings.run.seed,
        settings.data.length_group,
    )
    loader = BatchLoader(
        rows,
        feed.walk(Position(), num_steps),
        rank=0,
        world_size=1,
        micro_batch=settings.batch.micro_batch,
        processor=processor,
        threads=settings.data.reader_threads,
        prefetch=settings.data.prefetch,
    )
    step, loss = 0, 0.0
    with loader:
        for micro in loader:
            set_learning_rates(optimizer, schedule_factor(step, num_steps, settings.optim))
            loss += _backward(model, micro)
            if micro.is_last:
                torch.nn.utils.clip_grad_norm_(learning, settings.optim.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                yield loss
                step, loss = step + 1, 0.0


def model_ready(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A micro-batch as a run hands it to the model: pixels normalised."""
    return inputs | {"pixel_values": normalize_pixels(inputs["pixel_values"])}


def _backward(model: FlashSlothForConditionalGeneration, micro: MicroBatch) -> float:
    loss = model(**model_ready(micro.inputs), num_items_in_batch=micro.loss_tokens, use_cache=False).loss
    loss.backward()
    return loss.item()


def main() -> None:
    """Answer standard input until it ends."""
    settings = TrainSettings.model_validate_json(sys.argv[1])
    torch.set_num_threads(settings.scaling.cpus_per_worker)
    steps = bare_steps(settings)
    for line in sys.stdin:
        start, cpu_start, count = time.perf_counter(), time.process_time(), int(line)
        losses = [next(steps) for _ in range(count)]
        figures = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}
        print(json.dumps(figures | {"loss": sum(losses) / count}), flush=True)


if __name__ == "__main__":
    main()
