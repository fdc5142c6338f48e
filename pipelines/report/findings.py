"""What was learned and what not, in plain words, from the figures alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.report.contents import Stage, TypeScore

# Of the way from the better baseline to no mistakes at all.
LEARNED, PARTLY = 0.75, 0.35


@dataclass(frozen=True)
class Finding:
    """A verdict ("learned", "partly learned", "not learned") on one type of question, and the sentence behind it."""

    question_type: str
    verdict: str
    sentence: str


def margin(share: float, num_questions: int) -> float:
    """Half the width of the 95 % Wilson interval of a share measured on `num_questions`."""
    z = 1.96
    spread = math.sqrt(share * (1 - share) / num_questions + z**2 / (4 * num_questions**2))
    return z * spread / (1 + z**2 / num_questions)


def judge(score: TypeScore) -> Finding:
    """Compare one type with the better of its two baselines.

    What lies within the margin of error of a baseline is never called learned, however high it is.
    """
    baseline, name = max((score.blank, "with a blank picture"), (score.majority, "by always saying the same"))
    gained = (score.accuracy - baseline) / (1 - baseline) if baseline < 1 else 0.0
    error = margin(score.accuracy, score.num_questions)
    figures = f"{score.accuracy:.0%} right, against {baseline:.0%} {name}"
    if score.accuracy - error <= baseline:
        verdict, sentence = "not learned", f"{figures}: no better, within its margin of ± {100 * error:.0f} points."
    elif gained >= LEARNED:
        verdict, sentence = "learned", f"{figures}."
    elif gained >= PARTLY:
        verdict, sentence = "partly learned", f"{figures}: the picture clearly helps, yet mistakes remain."
    else:
        verdict, sentence = "not learned", f"{figures}: the picture hardly helps."
    if score.mistake and verdict != "learned":
        said, truth, times = score.mistake
        sentence += f" Most frequent mistake: “{said}” for “{truth}” ({times} times)."
    return Finding(score.question_type, verdict, sentence)


def describe_stage(stage: Stage) -> str:
    """How the loss of a stage went: means over its first and last tenth, so that one batch does not decide."""
    if not stage.losses:
        return "No step was recorded."
    tenth = max(1, len(stage.losses) // 10)
    first, last = _mean(stage.losses[:tenth]), _mean(stage.losses[-tenth:])
    direction = "fell" if last < first else "did not fall:"
    return f"The loss {direction} from {first:.3g} to {last:.3g} over {stage.steps[-1]} steps."


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
