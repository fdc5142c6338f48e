"""Greedy answers to questions: in this process, or by a pool of actors."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
import torch

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.collation import collate
from flashsloth.image_processing_flashsloth import GREY, normalize_pixels
from pipelines.evaluation.questions import EvaluationError, Question
from pipelines.feed import model_inputs
from pipelines.shards.reader import ShardedDataset
from pipelines.training.export import fetch_export, load_export


class Answerer:
    """A model that answers questions of a prepared split.

    Args:
        model: In evaluation mode, on the device where it shall work.
        processor: The one that prepared the split.
        dataset: The split.
        blank_images: Show grey in place of every picture.
        max_new_tokens: Longest answer.
    """

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        processor: FlashSlothProcessor,
        dataset: ShardedDataset,
        blank_images: bool = False,
        max_new_tokens: int = 64,
    ) -> None:
        self._model = model
        self._processor = processor
        self._dataset = dataset
        self._blank_images = blank_images
        self._max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def answer(self, questions: Sequence[tuple[int, int]]) -> list[str]:
        """Greedy answers to `(row, turn)` pairs, in one batch padded on the left."""
        rows = {row: self._dataset.read(row) for row, _ in questions}
        batch = collate(
            [self._prompt(rows[row], turn) for row, turn in questions], self._processor.pad_token_id, "left"
        )
        inputs = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = normalize_pixels(inputs["pixel_values"])
        generated = self._model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self._max_new_tokens,
            eos_token_id=self._processor.eos_token_id,
            pad_token_id=self._processor.pad_token_id,
        )
        return self._processor.post_process(generated[:, inputs["input_ids"].shape[1] :])

    def _prompt(self, row: dict[str, Any], turn: int) -> dict[str, Any]:
        """The conversation up to question `turn`, and the image, as a sample for `collate`."""
        stored = model_inputs(row, self._processor)
        image = {name: stored[name] for name in ("pixel_values", "patch_features") if name in stored}
        if image and self._blank_images:
            image = {"pixel_values": _grey(self._processor)}
        prompt = self._processor.encode(row["messages"][: 2 * turn + 1], has_image=bool(image))
        return {"input_ids": prompt["input_ids"], "question_ids": prompt["question_ids"], **image}


class CheckpointAnswerer(Answerer):
    """A checkpoint that answers questions of a prepared split. Also the class of a Ray Data actor pool.

    Args:
        checkpoint: `from_pretrained` folder, local or on an object store.
        folder: The prepared split.
        blank_images: Show grey in place of every picture.
        max_new_tokens: Longest answer.
        num_threads: CPU threads of torch; as many as it likes where None.
        cache_dir: Where shards of an object store are kept.

    Raises:
        EvaluationError: The split was prepared by another processor than the checkpoint's.
        ExportError: There is no such checkpoint.
    """

    def __init__(
        self,
        checkpoint: str,
        folder: str,
        blank_images: bool = False,
        max_new_tokens: int = 64,
        num_threads: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        if num_threads:
            torch.set_num_threads(num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        dataset = ShardedDataset(folder, cache_dir=cache_dir)
        processor = check_processor(checkpoint, dataset)
        model = load_export(checkpoint, dtype).eval().to(device)
        super().__init__(model, processor, dataset, blank_images, max_new_tokens)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`row` int64[B] and `turn` int64[B] to the same and `answer`, for Ray Data."""
        answers = self.answer([(int(row), int(turn)) for row, turn in zip(batch["row"], batch["turn"], strict=True)])
        return {"row": batch["row"], "turn": batch["turn"], "answer": np.array(answers, dtype=object)}


def check_processor(checkpoint: str, dataset: ShardedDataset) -> FlashSlothProcessor:
    """The checkpoint's processor, which must be the one that prepared the split."""
    processor = FlashSlothProcessor.from_pretrained(fetch_export(checkpoint))
    prepared, own = dataset.manifest.processor_identity, processor.identity()
    if prepared != own:
        raise EvaluationError(
            f"{dataset.folder} was prepared by processor {prepared[:12]}, the one of {checkpoint} is {own[:12]}: "
            "prepare the split with the processor of this checkpoint"
        )
    return processor


def answer_here(answerer: Answerer, questions: Sequence[Question], batch_size: int) -> Iterator[dict[str, Any]]:
    """Answer in this process; yields `{row, turn, answer}`, a batch of similar lengths at a time."""
    ordered = sorted(questions, key=lambda question: question.num_tokens)
    for start in range(0, len(ordered), batch_size):
        pairs = [(question.row, question.turn) for question in ordered[start : start + batch_size]]
        for (row, turn), answer in zip(pairs, answerer.answer(pairs), strict=True):
            yield {"row": row, "turn": turn, "answer": answer}


def answer_on_ray(
    questions: Sequence[Question],
    batch_size: int,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    answerer_arguments: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Answer with a pool of `CheckpointAnswerer` actors on the connected cluster; yields as `answer_here` does."""
    ordered = sorted(questions, key=lambda question: question.num_tokens)
    table = ray.data.from_items([{"row": question.row, "turn": question.turn} for question in ordered])
    answered = table.map_batches(
        CheckpointAnswerer,
        fn_constructor_kwargs={**answerer_arguments, "num_threads": max(1, int(cpus_per_worker))},
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        batch_size=batch_size,
        num_cpus=cpus_per_worker,
        num_gpus=gpus_per_worker,
    )
    yield from answered.iter_rows()


def with_progress(answers: Iterable[dict[str, Any]], total: int, every_s: float = 5.0) -> Iterator[dict[str, Any]]:
    """Pass `answers` through, and say how far they are every few seconds."""
    started = said = time.monotonic()
    for count, answer in enumerate(answers, start=1):
        yield answer
        now = time.monotonic()
        if now - said >= every_s or count == total:
            said = now
            print(f"answered {count}/{total} questions ({count / (now - started):.0f}/s)", flush=True)


def _grey(processor: FlashSlothProcessor) -> np.ndarray:
    images = processor.image_processor
    return np.full((images.num_tiles, 3, images.size, images.size), GREY[0], dtype=np.uint8)
