"""The quickstart: the jobs from a corpus to answers, one after the other, as anyone would run them by hand."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openai import OpenAI
from pydantic import NonNegativeInt, PositiveInt

from pipelines.ray_session import one_cluster_for_jobs
from pipelines.report.contents import Goal, Picture, Report, Step, TypeScore, score_replies
from pipelines.report.interview import (
    converse,
    read_conversations,
    wait_until_healthy,
    write_conversations,
)
from pipelines.report.summary import describe_conversation, summarize
from pipelines.report.templates import duration
from pipelines.serving.transport import free_port, set_environment
from pipelines.settings import JobSettings, Section, dump_settings
from pipelines.steps import Steps, readable, sources_identity, started

if TYPE_CHECKING:
    from pipelines.scenes.corpus import DrawnCorpus

_ROOT = Path(__file__).resolve().parents[1]
_IMAGE_SIZE, _IMAGE_TOKENS = 126, 9  # of the tiny preset
_SERVER_PATIENCE_S = 180.0
_NUM_FAILURES = 6
# What only shows figures, or says in which order the steps come, does not change them.
_WITHOUT_EFFECT = [_ROOT / place for place in ("pipelines/report", "pipelines/quickstart.py", "jobs/quickstart.py")]


class StageSettings(Section):
    """What the quickstart changes in a training recipe."""

    max_steps: PositiveInt | None = None
    """Optimizer steps; by default as the recipe says."""


class QuickstartSettings(JobSettings):
    """Draw a corpus, prepare, align, tune, evaluate, serve and report, on this machine."""

    out: str = "outputs/quickstart"
    """Folder for everything that the run writes."""
    scenes: PositiveInt = 6000
    """Pictures to train on."""
    heldout_scenes: PositiveInt = 400
    """Pictures to be judged by; no training picture shows one of their scenes."""
    vocab_size: PositiveInt = 512
    """Entries of the tokenizer."""
    seed: NonNegativeInt = 0
    """Of the corpus."""
    align: StageSettings = StageSettings()
    """The first stage: captions."""
    instruct: StageSettings = StageSettings()
    """The second stage: questions."""
    wanted_accuracy: float = 80.0
    """Percent of held-out answers that must be right; otherwise the exit status is 1."""
    wanted_gain: float = 25.0
    """Points that the pictures must bring over blank ones; otherwise the exit status is 1."""
    pictures_asked: PositiveInt = 3
    """Held-out pictures that the running server is asked about."""
    gallery: PositiveInt = 9
    """Held-out pictures in the report."""


class Quickstart:
    """The steps, in the order of `run`."""

    def __init__(self, settings: QuickstartSettings) -> None:
        self.settings = settings
        self.out = Path(settings.out)
        packages = [_ROOT / "flashsloth", _ROOT / "pipelines", _ROOT / "jobs"]
        code = sources_identity(packages, without=_WITHOUT_EFFECT)
        self.steps = Steps(self.out / "steps", identity=code, before_command=lambda: self.start_cluster())
        self.processor = self.out / "processor"
        self.runs = self.out / "runs"
        self.checkpoint = self.runs / "instruct" / "export"
        self.served = self.out / "served.json"

    def run(self) -> int:
        """From nothing to the report."""
        corpus = self.draw()
        set_environment("127.0.0.1")
        with one_cluster_for_jobs() as self.start_cluster:
            for name, layout in (("captions", "caption"), ("instruct", "chat"), ("heldout", "chat")):
                self.prepare(name, layout)
            self.align()
            self.tune()
            self.evaluate("pictures")
            self.evaluate("blank", "--blank_images")
            self.serve(corpus)
        report = self.report(corpus)
        print(summarize(report, self.out / "report.html"))
        return 0 if all(goal.is_met for goal in report.goals) else 1

    def draw(self) -> DrawnCorpus:
        """The corpus, its tokenizer, and the processor that prepares, trains and serves."""
        # Here and in the report: the model's libraries take seconds to import; --help and a misspelt flag do without.
        from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
        from pipelines.scenes.corpus import corpus_texts, draw_corpus
        from pipelines.scenes.tokenizer import train_tokenizer

        s, folder = self.settings, self.out / "corpus"

        def work() -> None:
            tokenizer = train_tokenizer(corpus_texts(draw()), s.vocab_size)
            images = FlashSlothImageProcessor(size=_IMAGE_SIZE)
            FlashSlothProcessor(images, tokenizer, num_image_tokens=_IMAGE_TOKENS).save_pretrained(self.processor)

        def draw() -> DrawnCorpus:
            return draw_corpus(folder, s.scenes, s.heldout_scenes, s.seed)

        label = f"draw_corpus({folder}, {s.scenes}, {s.heldout_scenes}, {s.seed}); train_tokenizer({s.vocab_size})"
        self.steps.call("draw", label, work, [folder, self.processor])
        return draw()

    def prepare(self, name: str, layout: str) -> None:
        """Corpus -> shards."""
        corpus = self.out / "corpus"
        source = {"path": str(corpus / f"{name}.json"), "image_root": str(corpus / "images")}
        output = self.out / "prepared" / name
        flags = ["--sources", json.dumps([source]), "--layout", layout]
        flags += ["--processor", str(self.processor), "--output", str(output)]
        self.steps.run(f"prepare {name}", job("prepare", *flags), [output])

    def align(self) -> None:
        """Shards -> a model that lists what it sees."""
        flags = ["--model.processor", str(self.processor), *self.run_flags("captions", self.settings.align)]
        self.steps.run("align", job("train", *recipe("tiny-align"), *flags), [self.runs / "align"])

    def tune(self) -> None:
        """That model and more shards -> a model that answers questions."""
        checkpoint = self.runs / "align" / "export"
        flags = ["--model.checkpoint", str(checkpoint), *self.run_flags("instruct", self.settings.instruct)]
        self.steps.run("tune", job("train", *recipe("tiny-instruct"), *flags), [self.runs / "instruct"])

    def run_flags(self, data: str, stage: StageSettings) -> list[str]:
        """Where a training job reads and writes."""
        name = "align" if data == "captions" else data
        flags = ["--data.folders", str(self.out / "prepared" / data), "--run.storage", str(self.runs)]
        return [*flags, "--run.name", name, *(["--max_steps", str(stage.max_steps)] if stage.max_steps else [])]

    def evaluate(self, name: str, *flags: str) -> None:
        """Checkpoint and held-out shards -> answers."""
        output = self.out / "evaluation" / name
        where = ["--checkpoint", str(self.checkpoint), "--data", str(self.out / "prepared" / "heldout")]
        self.steps.run(f"evaluate {name}", job("evaluate", *where, "--output", str(output), *flags), [output])

    def serve_command(self, port: int) -> list[str]:
        """The server of the tuned checkpoint."""
        return job("serve", "--checkpoint", str(self.checkpoint), "--port", str(port))

    def serve(self, corpus: DrawnCorpus) -> None:
        """A few held-out pictures -> what the running server says to them."""
        command = readable(self.serve_command(8000))  # as anyone would type it; below it has a port that is free
        self.steps.call(
            "serve and ask", command, lambda: write_conversations(self.served, self.ask(corpus)), [self.served]
        )

    def ask(self, corpus: DrawnCorpus) -> list[Picture]:
        """Start the server, ask it turn by turn about a few held-out pictures, and stop it."""
        rows = json.loads(corpus.heldout.read_text("utf-8"))[-self.settings.pictures_asked :]
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        self.start_cluster()
        with started(self.serve_command(port)) as server:
            wait_until_healthy(server, address, _SERVER_PATIENCE_S)
            client = OpenAI(base_url=f"{address}/v1", api_key="unused")
            model = client.models.list().data[0].id
            served = [converse(client, model, row, corpus.images) for row in rows]
        for picture in served:
            print(describe_conversation(picture))
        return served

    def report(self, corpus: DrawnCorpus) -> Report:
        """Everything measured, on one page."""
        from pipelines.report.page import write_report
        from pipelines.report.sources import data_facts, pictures_of, replies_of, stage_of
        from pipelines.training.environment import environment_facts

        replies, blank = (replies_of(self.out / "evaluation" / name) for name in ("pictures", "blank"))
        overall, scores = score_replies([reply for _, reply in replies], [reply for _, reply in blank])
        pictures = pictures_of(replies, corpus.images)
        shown, others = pictures[: self.settings.gallery], pictures[self.settings.gallery :]
        wrong = [picture for picture in others if not all(reply.is_right for reply in picture.replies)]
        report = Report(
            title="FlashSloth quickstart",
            summary=self.describe(overall),
            goals=self.goals(overall),
            steps=[Step(record.name, record.command, record.seconds) for record in self.steps.records],
            stages=[
                stage_of("Alignment", self.runs / "align", "Captions that list the objects."),
                stage_of("Instruction tuning", self.runs / "instruct", "Questions about the same pictures."),
            ],
            overall=overall,
            scores=scores,
            pictures=shown,
            failures=wrong[:_NUM_FAILURES],
            served=read_conversations(self.served, corpus.images),
            data={name: data_facts(self.out / "prepared" / name) for name in ("captions", "instruct", "heldout")},
            settings={
                "quickstart": dump_settings(self.settings),
                **{name: (self.runs / name / "config.yaml").read_text("utf-8") for name in ("align", "instruct")},
            },
            environment=environment_facts(),
        )
        write_report(report, self.out / "report.html")
        return report

    def goals(self, overall: TypeScore) -> list[Goal]:
        """What the run has to reach."""
        gain = 100 * (overall.accuracy - overall.blank)
        return [
            Goal("% of held-out answers exactly right", self.settings.wanted_accuracy, 100 * overall.accuracy),
            Goal("points above the same model shown blank pictures", self.settings.wanted_gain, gain),
        ]

    def describe(self, overall: TypeScore) -> str:
        """The run in two sentences."""
        seconds = sum(record.seconds for record in self.steps.records)
        return (
            f"From {self.settings.scenes:,} made-up pictures to a model that answers over HTTP, in {duration(seconds)} "
            f"on {os.cpu_count()} CPU cores. It answered {overall.num_questions:,} questions about "
            f"{self.settings.heldout_scenes:,} pictures of scenes that it was not trained on."
        )


def job(name: str, *flags: str) -> list[str]:
    """The command line of a job, with paths as short as they can be typed from here."""
    return [sys.executable, os.path.relpath(_ROOT / "jobs" / f"{name}.py"), *flags]


def recipe(name: str) -> list[str]:
    """The flag that names a recipe of this repository."""
    return ["--config", os.path.relpath(_ROOT / "jobs" / "recipes" / f"{name}.yaml")]
