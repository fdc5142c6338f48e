"""`jobs/benchmark.py annotate`: rows a second of one worker on Ray, against the bare engine on the same questions.

The bare engine gets its prompts ready made: images are read, decoded and tokenized before the clock starts. The worker
does all that, writes parts and sends receipts. Its clock starts when its first part is written, which leaves out its
start-up, and stops with its last part. As many rows as there are slots may have been under way when it started; all are
taken for done by then, so its figure is rather too low than too high.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import torch
from pydantic import PositiveInt
from transformers.utils.logging import disable_progress_bar

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.backbones import processor_fields
from flashsloth.image_processing_flashsloth import decode_image
from pipelines.annotate import annotate
from pipelines.annotation.settings import AnnotateSettings
from pipelines.benchmarks.machine import describe_machine
from pipelines.benchmarks.photos import draw_corpus, write_rows
from pipelines.benchmarks.rounds import Figures, Rounds, take_turns, timed
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.benchmarks.sizes import TINY, Size
from pipelines.benchmarks.table import Bound, Report, Table
from pipelines.preparation.settings import SourceSettings
from pipelines.ray_session import start_ray
from pipelines.serving.engine import Encoder, Engine, EngineSettings, Prompt
from pipelines.serving.sampling import Sampling

_PROMPT = "Describe the image in one or two sentences."
_ENGINE, _WORKER = "bare engine", "annotate, one worker"


class AnnotateBenchmark(BenchmarkSettings):
    """One annotation worker against the engine in it, on the CPU."""

    num_rows: PositiveInt = 1000
    """Rows, each with a photo of its own up to `photos`."""
    photos: PositiveInt = 250
    """Made-up photos of about 500 x 400 pixels."""
    max_tokens: PositiveInt = 48
    """Length of every answer: the random model does not end by itself."""
    max_slots: PositiveInt = 16
    """Requests that are decoded together."""
    chunk_rows: PositiveInt = 100
    """Rows of a part."""
    seed: int = 0
    """Of photos and weights."""


def measure_annotate(settings: AnnotateBenchmark) -> Report:
    """Run the whole benchmark."""
    if settings.quick:
        settings = settings.model_copy(update={"num_rows": 60, "photos": 30, "rounds": 1, "chunk_rows": 20})
    machine = describe_machine()
    bench = _Bench(settings)
    with bench.engine:
        rounds = take_turns(
            {_ENGINE: bench.bare_engine, _WORKER: bench.worker},
            settings.rounds,
            say=lambda line: print(line, flush=True),
        )
    ratio = rounds.ratio(_WORKER, _ENGINE, "rows_per_s")
    bound = Bound(name="annotate against the bare engine, rows/s", sense="at least", wanted=0.95, measured=ratio.median)
    return Report(
        name="annotate",
        machine=machine,
        settings=settings.model_dump(),
        tables=[_table(settings, rounds)],
        bounds=[bound],
        measured={"annotate": rounds.record()},
    )


class _Bench:
    """Photos, a checkpoint of random weights, and the engine that stays for all rounds."""

    def __init__(self, settings: AnnotateBenchmark) -> None:
        self.settings = settings
        self.corpus = draw_corpus(Path(settings.output) / "work", settings.photos, settings.seed)
        self.rows = write_rows(self.corpus, settings.num_rows, settings.photos, settings.seed)
        self.checkpoint = self.corpus / "model"
        processor = FlashSlothProcessor.from_pretrained(self.corpus / "processor")
        write_checkpoint(self.checkpoint, processor, settings.seed)
        torch.set_num_threads(1)  # as in the worker
        disable_progress_bar()
        # Without a cache of images: what the engine remembers of the round before, a new worker would have to encode.
        self.budgets = EngineSettings(
            max_slots=settings.max_slots, max_length=512, max_waiting=settings.num_rows, image_cache_bytes=0
        )
        self.engine = Engine.from_checkpoint(self.checkpoint, "cpu", "float32", self.budgets)
        self.prompts = self._prompts()
        start_ray()

    def bare_engine(self) -> Figures:
        """The prompts, ready made, in one call."""
        return self._figures(timed(lambda: self.engine.generate(self.prompts)))

    def worker(self) -> Figures:
        """A whole annotation, timed by its parts."""
        output = self._annotate()
        written = sorted(path.stat().st_mtime for path in (output / "parts").rglob("*.parquet"))
        return self._figures(written[-1] - written[0], self.settings.chunk_rows + self.settings.max_slots)

    def _figures(self, seconds: float, fewer: int = 0) -> Figures:
        num_rows = self.settings.num_rows - fewer
        return {
            "seconds": seconds,
            "rows_per_s": num_rows / seconds,
            "tokens_per_s": num_rows * self.settings.max_tokens / seconds,
        }

    def _annotate(self) -> Path:
        output = self.corpus / "annotated"
        shutil.rmtree(output, ignore_errors=True)
        settings = AnnotateSettings(
            sources=[SourceSettings(path=str(self.rows), image_root=str(self.corpus))],
            output=str(output),
            checkpoint=str(self.checkpoint),
            prompt=_PROMPT,
            max_tokens=self.settings.max_tokens,
            chunk_rows=self.settings.chunk_rows,
            device="cpu",
            engine=self.budgets.model_copy(update={"max_waiting": 2 * self.settings.max_slots}),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            manifest = annotate(settings)
        expected = self.settings.num_rows * self.settings.max_tokens
        if manifest is None or manifest.answer_tokens != expected:
            found = manifest.answer_tokens if manifest else 0
            raise ValueError(f"{output}: {found} tokens of answers, expected {expected}: the two do not do equal work")
        return output

    def _prompts(self) -> list[Prompt]:
        encoder, sampling = Encoder(self.engine.processor), Sampling(max_tokens=self.settings.max_tokens)
        messages = [{"role": "user", "content": _PROMPT}]
        names = [json.loads(line)["image"] for line in self.rows.read_text(encoding="utf-8").splitlines()]
        pictures = {name: decode_image((self.corpus / name).read_bytes()) for name in dict.fromkeys(names)}
        return [encoder.prompt(messages, pictures[name], sampling) for name in names]


def write_checkpoint(folder: Path, processor: FlashSlothProcessor, seed: int, size: Size = TINY) -> None:
    """A small model for the pictures of `processor`, whose answers never end before `max_tokens`."""
    torch.manual_seed(seed)
    vision = {"image_size": processor.image_processor.size, "patch_size": 14}
    text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 1024}
    config = FlashSlothConfig.tiny(
        **size.overrides
        | {"vision_config": size.overrides.get("vision_config", {}) | vision}
        | {"text_config": size.overrides["text_config"] | text},
        **processor_fields(processor),
    )
    model = FlashSlothForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.bias[processor.eos_token_id] = -1e9
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _table(settings: AnnotateBenchmark, rounds: Rounds) -> Table:
    rows = []
    for name in (_ENGINE, _WORKER):
        speed, ratio = rounds.spread(name, "rows_per_s"), rounds.ratio(name, _ENGINE, "rows_per_s")
        tokens = rounds.spread(name, "tokens_per_s").median
        cells = [f"{speed.median:.1f}", f"{tokens:,.0f}", f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"]
        rows.append([name, *cells])
    return Table(
        title="Annotating",
        columns=["contestant", "rows/s", "tokens/s", "of the bare engine"],
        rows=rows,
        notes=[
            f"{settings.num_rows} rows about {settings.photos} photos, {settings.max_tokens} tokens each, "
            f"{settings.max_slots} slots, {settings.chunk_rows} rows a chunk, random weights on one thread. Medians of "
            f"{settings.rounds} rounds, the lowest and the highest ratio beside."
        ],
    )
