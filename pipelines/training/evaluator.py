"""Evaluates the checkpoints of a run on a prepared split, in one process that is no rank of the training.

The model is built once, as the run builds it. Of each checkpoint the weights that learn are read from the files of all
ranks, whatever their number and the ZeRO stage, and every file is verified first. The loss is a mean over all loss
tokens of the same rows, so it depends neither on the number of workers nor on the micro-batch.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines import storage
from pipelines.evaluation.answering import Answerer, answer_here
from pipelines.evaluation.questions import read_questions
from pipelines.evaluation.verdicts import judge
from pipelines.feed import BatchLoader, GlobalBatch, MicroBatch, Position, PreparedRows
from pipelines.shards.manifest import Manifest
from pipelines.training.checkpoint import CheckpointManifest, opened
from pipelines.training.export import write_export
from pipelines.training.lora import merge_adapters
from pipelines.training.scores import Measure, Score, write_score
from pipelines.training.settings import TrainSettings
from pipelines.training.start import StartError, build_learner, check_encoder, check_start, load_processor
from pipelines.training.state import read_weights


class CheckpointEvaluator:
    """Evaluates checkpoints of one run, one after the other.

    Args:
        settings: Of the run, with absolute paths and an `evaluation` section.
        run_uri: The run's folder.
        device: Where the model works.
    """

    def __init__(self, settings: TrainSettings, run_uri: str, device: torch.device) -> None:
        assert settings.evaluation, "only a run with an evaluation section has an evaluator"
        self._settings = settings
        self._evaluation = settings.evaluation
        self._run_uri = run_uri
        self._processor = load_processor(settings.model)
        data = settings.data
        self._rows = PreparedRows(self._evaluation.folders, data.cache_dir, int(data.cache_gib * 2**30))
        self._chosen = spread(len(self._rows), self._evaluation.max_rows)
        self._measure = Measure.of(self._evaluation, [each.manifest.identity() for each in self._rows.datasets])
        self._model = build_learner(settings, self._processor).eval().to(device)

    def evaluate(self, checkpoint: str) -> Score:
        """Evaluate a checkpoint and put the score into its folder.

        Raises:
            CheckpointError: It does not verify.
            StateError: It belongs to a model with other parameters.
        """
        started = time.monotonic()
        manifest = self._load(checkpoint)
        questions, right = self._ask() if self._evaluation.metric == "exact_match" else (None, None)
        score = Score(
            checkpoint=checkpoint,
            manifest=manifest.fingerprint(),
            step=manifest.progress.step,
            measure=self._measure,
            rows=len(self._chosen),
            loss_tokens=int(self._rows.num_loss_tokens[self._chosen].sum()),
            loss=self._loss(),
            questions=questions,
            exact_match=right / questions if questions and right is not None else None,
            seconds=time.monotonic() - started,
        )
        write_score(self._run_uri, score)
        return score

    def export(self, checkpoint: str, target: str) -> None:
        """Write the model of a checkpoint as a `from_pretrained` folder.

        Raises:
            CheckpointError, StateError: As `evaluate`.
        """
        step = self._load(checkpoint).progress.step
        lora, weights = self._settings.lora, self._model.state_dict()
        weights = merge_adapters(weights, lora) if lora else weights
        write_export(target, self._model, weights, self._processor, step)

    def _load(self, checkpoint: str) -> CheckpointManifest:
        """Give the model a checkpoint's weights, in the run's precision."""
        learning = {name: each for name, each in self._model.named_parameters() if each.requires_grad}
        with opened(storage.join(self._run_uri, checkpoint)) as (manifest, folder):
            files = [folder / entry.name for entry in manifest.files]
            weights = read_weights(files, {name: each.shape for name, each in learning.items()})
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(weights[name])
        return manifest

    @torch.inference_mode()
    def _loss(self) -> float:
        rows = self._chosen[np.argsort(-self._rows.num_tokens[self._chosen], kind="stable")]
        lengths, answers = self._rows.num_tokens[rows], self._rows.num_loss_tokens[rows]
        whole = GlobalBatch(rows, int(lengths.sum()), int(answers.sum()), Position())
        data = self._settings.data
        loader = BatchLoader(
            self._rows,
            iter([whole]),
            rank=0,
            world_size=1,
            micro_batch=self._settings.batch.micro_batch,
            processor=self._processor,
            threads=data.reader_threads,
            prefetch=data.prefetch,
        )
        with loader:
            return sum(self._share(micro) for micro in loader)

    def _share(self, micro: MicroBatch) -> float:
        """What a micro-batch adds to the loss."""
        inputs = {name: tensor.to(self._model.device) for name, tensor in micro.inputs.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = normalize_pixels(inputs["pixel_values"])
        return float(self._model(**inputs, num_items_in_batch=micro.loss_tokens, use_cache=False).loss)

    def _ask(self) -> tuple[int, int]:
        """How many questions the rows hold, and how many of them are answered exactly right."""
        questions = right = start = 0
        for dataset in self._rows.datasets:
            local = self._chosen - start
            local = local[(local >= 0) & (local < len(dataset))]
            start += len(dataset)
            if not len(local):
                continue
            asked = read_questions(dataset, local.tolist())
            answerer = Answerer(self._model, self._processor, dataset, max_new_tokens=self._evaluation.max_new_tokens)
            answered = judge(dataset, asked, answer_here(answerer, asked, self._settings.batch.micro_size))
            questions += len(answered)
            right += sum(answer.correct for answer in answered)
        return questions, right


def check_split(settings: TrainSettings) -> None:
    """Compare the split that a run evaluates on, if any, with the recipe and its processor.

    Raises:
        ManifestError, StartError: What does not fit, by name.
    """
    if not settings.evaluation:
        return
    manifests = {folder: Manifest.load(folder) for folder in settings.evaluation.folders}
    check_start(settings, manifests, load_processor(settings.model))
    check_encoder(settings.model, manifests)
    for folder, manifest in manifests.items():
        if settings.evaluation.metric == "exact_match" and manifest.layout != "chat":
            raise StartError(
                f"evaluation.metric exact_match asks questions, and {folder} is in layout '{manifest.layout}', which "
                "has none: prepare it as 'chat', or evaluate the loss"
            )


def spread(count: int, at_most: int) -> np.ndarray:
    """At most `at_most` of `count` rows, evenly over all of them and always the same: int64[n]."""
    chosen = min(count, at_most)
    return np.arange(chosen) * count // chosen
