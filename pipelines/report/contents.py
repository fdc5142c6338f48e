"""What a report is made of. Whoever ran the steps fills these in; nothing in here reads a file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Goal:
    """A figure that the run had to reach."""

    name: str
    wanted: float
    measured: float
    """Both in points: 80.0 is 80 %."""

    @property
    def is_met(self) -> bool:
        """Whether the measured figure is at least the wanted one."""
        return self.measured >= self.wanted


@dataclass(frozen=True)
class Step:
    """One command of the run."""

    name: str
    command: str
    seconds: float


@dataclass(frozen=True)
class Stage:
    """One training stage and its loss after each step."""

    name: str
    steps: Sequence[int]
    losses: Sequence[float]
    note: str = ""
    """What was trained on what, in a few words."""

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses):
            raise ValueError(f"stage '{self.name}' has {len(self.steps)} steps and {len(self.losses)} losses")


@dataclass(frozen=True)
class Reply:
    """A question, what the model said to it, and the truth."""

    question: str
    answer: str
    truth: str
    is_right: bool
    question_type: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture with everything that was asked about it."""

    name: str
    data: bytes
    """The image file as it is, JPEG or PNG."""
    replies: Sequence[Reply]


@dataclass(frozen=True)
class TypeScore:
    """How often the answers to one type of question were right, as shares from 0 to 1."""

    question_type: str
    num_questions: int
    accuracy: float
    blank: float
    """The same checkpoint, shown a grey picture instead."""
    majority: float
    """Always the most frequent answer of this type."""
    mistake: tuple[str, str, int] | None = None
    """The most frequent wrong answer: what was said, what was right, how often."""


@dataclass(frozen=True)
class Report:
    """Everything the page shows."""

    title: str
    summary: str
    goals: Sequence[Goal]
    steps: Sequence[Step]
    stages: Sequence[Stage]
    overall: TypeScore
    scores: Sequence[TypeScore]
    pictures: Sequence[Picture]
    """Taken in order, not chosen by result."""
    failures: Sequence[Picture]
    """Further pictures with at least one wrong answer."""
    served: Sequence[Picture] = ()
    """What was asked over HTTP."""
    data: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Prepared folders: name -> facts, the manifest's hash among them."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Name -> resolved settings as YAML."""
    environment: Mapping[str, str] = field(default_factory=dict)


def score_replies(replies: Sequence[Reply], blank: Sequence[Reply]) -> tuple[TypeScore, list[TypeScore]]:
    """Overall and per-type figures from the replies to the real pictures and to blank ones.

    The majority baseline answers each question with the most frequent truth of its type, the best that can be done
    without reading the question or seeing the picture.

    Raises:
        ValueError: where there is no reply, or the two runs did not answer the same questions.
    """
    if not replies:
        raise ValueError("there are no replies to score")
    asked, asked_blank = [_identity(r) for r in replies], [_identity(r) for r in blank]
    if asked != asked_blank:
        raise ValueError(
            f"the two evaluations answered different questions: {len(asked)} with pictures, "
            f"{len(asked_blank)} with blank ones"
        )
    grouped: dict[str, tuple[list[Reply], list[Reply]]] = defaultdict(lambda: ([], []))
    for reply, blank_reply in zip(replies, blank, strict=True):
        grouped[reply.question_type][0].append(reply)
        grouped[reply.question_type][1].append(blank_reply)
    scores = [_score(name, *both) for name, both in sorted(grouped.items())]
    majority = sum(score.majority * score.num_questions for score in scores) / len(replies)
    overall = TypeScore("all", len(replies), _share_right(replies), _share_right(blank), majority)
    return overall, scores


def _identity(reply: Reply) -> tuple[str, str, str]:
    return reply.question_type, reply.question, reply.truth


def _share_right(replies: Sequence[Reply]) -> float:
    return sum(reply.is_right for reply in replies) / len(replies)


def _score(question_type: str, replies: Sequence[Reply], blank: Sequence[Reply]) -> TypeScore:
    truths = Counter(reply.truth for reply in replies)
    mistakes = Counter((reply.answer, reply.truth) for reply in replies if not reply.is_right)
    said, truth, times = (*mistakes.most_common(1)[0][0], mistakes.most_common(1)[0][1]) if mistakes else ("", "", 0)
    return TypeScore(
        question_type=question_type,
        num_questions=len(replies),
        accuracy=_share_right(replies),
        blank=_share_right(blank),
        majority=truths.most_common(1)[0][1] / len(replies),
        mistake=(said, truth, times) if times else None,
    )
