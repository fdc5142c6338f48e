"""Questions about a scene, each with exactly one right answer.

Two rules keep the answers from being read off the text instead of the picture:

- no answer is stated or implied by an earlier turn of the same conversation: a colour or shape that was said to be
  there is not asked for again;
- what is asked does not depend on the answer: whether "yes" is right is a coin tossed before anything else is chosen,
  and all colours, shapes and places are equally likely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from pipelines.scenes.scene import COLORS, SHAPES, Scene, SceneObject

QUESTION_TYPES = ("color", "shape", "position", "existence", "count")
NUM_TURNS = 4
_MAX_TRIES = 24
NUMBERS = ("zero", "one", "two", "three")
CAPTION_REQUESTS = ("Describe the picture.", "What does the picture show?", "List the objects and their places.")
_PHRASINGS = {
    "color": ("What color is the {}?", "Which color does the {} have?", "Tell me the color of the {}."),
    "shape": ("What shape is the {}?", "Which shape does the {} have?", "Tell me the shape of the {}."),
    "position": ("Where is the {}?", "In which part of the picture is the {}?", "Tell me the place of the {}."),
    "existence": ("Is there a {}?", "Does the picture show a {}?", "Can you see a {}?"),
    "count": ("How many objects are there?", "How many objects does the picture show?", "Count the objects."),
}


@dataclass(frozen=True)
class Turn:
    """A question of one of the `QUESTION_TYPES` and its answer."""

    question_type: str
    question: str
    answer: str


def caption(scene: Scene) -> str:
    """Objects and places in reading order: "a red bar at the top left and a blue square at the top right."."""
    parts = [f"a {o.color} {o.shape} at the {o.place}" for o in scene.objects]
    return (" and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]) + "."


def ask(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """A conversation of `NUM_TURNS` turns; fewer where a single object gives no more to ask."""
    plan = _plan(scene, rng)
    # A single object can be asked for its place and for one of colour and shape: the question names the other.
    num_turns = min(NUM_TURNS, plan.count + plan.existence + (2 if len(scene.objects) == 1 else NUM_TURNS))
    longest: list[Turn] = []
    for _ in range(_MAX_TRIES):
        turns = _converse(scene, plan, rng, existence_first=False)
        if len(turns) == num_turns:
            return turns
        longest = max(longest, turns, key=len)
    return longest or _converse(scene, plan, rng, existence_first=True)


@dataclass(frozen=True)
class _Plan:
    """What is fixed before any order of turns is tried, so that retrying cannot tilt the answers."""

    count: bool
    existence: bool
    exists: bool
    existence_kind: str


def _plan(scene: Scene, rng: np.random.Generator) -> _Plan:
    left_out = rng.choice(["nothing", "count", "existence"], p=[0.6, 0.2, 0.2])
    kinds = ["color"]
    if len({o.shape for o in scene.objects}) < len(SHAPES):
        kinds.append("shape")
    if len(scene.objects) > 1:
        # A single object named in full by a "yes" would leave nothing to ask.
        kinds.append("both")
    return _Plan(
        count=bool(left_out != "count"),
        existence=bool(left_out != "existence"),
        exists=bool(rng.integers(2)),
        existence_kind=str(rng.choice(kinds)),
    )


@dataclass
class _Conversation:
    scene: Scene
    plan: _Plan
    rng: np.random.Generator
    turns: list[Turn] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    """Colours and shapes that earlier turns said are in the picture."""
    placed: set[int] = field(default_factory=set)
    """Cells whose object has been asked for its place."""

    def say(self, question_type: str, subject: str, answer: str, tells: Iterable[str]) -> bool:
        phrasing = self.rng.choice(_PHRASINGS[question_type])
        self.turns.append(Turn(question_type, str(phrasing).format(subject), answer))
        self.told.update(tells)
        return True

    def shuffled_objects(self) -> list[SceneObject]:
        return [self.scene.objects[i] for i in self.rng.permutation(len(self.scene.objects))]

    def is_only(self, attribute: str, scene_object: SceneObject) -> bool:
        value = getattr(scene_object, attribute)
        return sum(getattr(o, attribute) == value for o in self.scene.objects) == 1


def _converse(scene: Scene, plan: _Plan, rng: np.random.Generator, existence_first: bool) -> list[Turn]:
    """One try at a conversation; empty where earlier turns left nothing for the planned existence question.

    It always finds a place when it comes first.
    """
    conversation = _Conversation(scene, plan, rng)
    if plan.count:
        # First, because what follows names objects, and names can be counted.
        _ask_count(conversation)
    num_others = NUM_TURNS - len(conversation.turns)
    existence_slot = int(rng.integers(1 if existence_first else num_others)) if plan.existence else None
    # A second object is asked for its place only where nothing else is left to ask.
    others = iter([*rng.permutation(["color", "shape", "position"]).tolist(), "position"])
    for slot in range(num_others):
        if slot == existence_slot:
            if not _ask_existence(conversation):
                return []
        else:
            # `others` is an iterator: what cannot be asked here is skipped, what was asked is used up.
            any(_ASKERS[kind](conversation) for kind in others)
    return conversation.turns


def _ask_count(conversation: _Conversation) -> bool:
    return conversation.say("count", "", NUMBERS[len(conversation.scene.objects)], ())


def _ask_color(conversation: _Conversation) -> bool:
    for o in conversation.shuffled_objects():
        if conversation.is_only("shape", o) and o.color not in conversation.told:
            return conversation.say("color", o.shape, o.color, (o.color, o.shape))
    return False


def _ask_shape(conversation: _Conversation) -> bool:
    for o in conversation.shuffled_objects():
        if conversation.is_only("color", o) and o.shape not in conversation.told:
            return conversation.say("shape", f"{o.color} object", o.shape, (o.color, o.shape))
    return False


def _ask_position(conversation: _Conversation) -> bool:
    for o in conversation.shuffled_objects():
        if o.cell in conversation.placed:
            continue
        names: list[tuple[str, tuple[str, ...]]] = [(f"{o.color} {o.shape}", (o.color, o.shape))]
        if conversation.is_only("shape", o):
            names.append((o.shape, (o.shape,)))
        if conversation.is_only("color", o):
            names.append((f"{o.color} object", (o.color,)))
        subject, tells = names[conversation.rng.integers(len(names))]
        conversation.placed.add(o.cell)
        return conversation.say("position", subject, o.place, tells)
    return False


def _ask_existence(conversation: _Conversation) -> bool:
    """Ask only where both "yes" and "no" had a subject to ask for, whichever the coin chose."""
    kind, told = conversation.plan.existence_kind, conversation.told
    objects = conversation.scene.objects
    colors, shapes = {o.color for o in objects}, {o.shape for o in objects}
    there: list[tuple[str, ...]]
    missing: list[tuple[str, ...]]
    if kind == "color":
        there = [(c,) for c in COLORS if c in colors - told]
        missing = [(c,) for c in COLORS if c not in colors]
    elif kind == "shape":
        there = [(s,) for s in SHAPES if s in shapes - told]
        missing = [(s,) for s in SHAPES if s not in shapes]
    else:
        pairs = {(o.color, o.shape) for o in objects}
        there = [(o.color, o.shape) for o in objects if not {o.color, o.shape} <= told]
        # A missing pair shares its colour or its shape with something in the picture: both words have to be looked at.
        near = [(c, s) for c in COLORS for s in SHAPES if c in colors or s in shapes]
        missing = [pair for pair in near if pair not in pairs and not set(pair) <= told]
    if not there or not missing:
        return False
    candidates = there if conversation.plan.exists else missing
    words = candidates[conversation.rng.integers(len(candidates))]
    subject = f"{words[0]} object" if kind == "color" else " ".join(words)
    answer = "yes" if conversation.plan.exists else "no"
    return conversation.say("existence", subject, answer, words if conversation.plan.exists else ())


_ASKERS: dict[str, Callable[[_Conversation], bool]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "position": _ask_position,
}
