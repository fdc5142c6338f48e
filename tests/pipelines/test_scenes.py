import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.scenes.corpus import DrawnCorpus, corpus_texts, draw_corpus, scene_of
from pipelines.scenes.drawing import PALETTE, draw_scene
from pipelines.scenes.questions import NUMBERS, QUESTION_TYPES, Turn, ask, caption
from pipelines.scenes.scene import BACKGROUNDS, COLORS, COLUMNS, PLACES, SHAPES, Scene, invent_scene
from pipelines.scenes.tokenizer import train_tokenizer

SEED = 7
NUM_ANSWERS = {"color": len(COLORS), "shape": len(SHAPES), "position": len(PLACES), "existence": 2, "count": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DrawnCorpus:
    return draw_corpus(tmp_path_factory.mktemp("corpus"), train_scenes=60, heldout_scenes=30, seed=SEED)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(SEED)
    return [invent_scene(rng, heldout=bool(i % 4 == 0)) for i in range(3000)]


@pytest.fixture(scope="module")
def conversations(scenes: list[Scene]) -> list[tuple[Scene, list[Turn]]]:
    rng = np.random.default_rng(SEED)
    return [(scene, ask(scene, rng)) for scene in scenes]


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text("utf-8"))


def test_train_and_heldout_share_no_scene() -> None:
    train = {scene_of(SEED, "train", i).description for i in range(1500)}
    heldout = {scene_of(SEED, "heldout", i).description for i in range(300)}
    assert not train & heldout
    # Were scenes drawn unevenly, fewer of them would differ.
    assert len(train) > 0.95 * distinct_descriptions(1500, share=3 / 4)
    assert len(heldout) > 0.95 * distinct_descriptions(300, share=1 / 4)


def distinct_descriptions(num_scenes: int, share: float) -> float:
    """How many of `num_scenes` scenes differ on average, where a split holds `share` of all there are."""
    kinds, cells = len(COLORS) * len(SHAPES), len(PLACES)
    possible = [share * math.comb(cells, n) * math.perm(kinds, n) for n in (1, 2, 3)]
    return sum(number * (1 - (1 - 1 / number) ** (num_scenes / 3)) for number in possible)


def test_heldout_scenes_are_of_every_kind() -> None:
    """The split takes no colour, shape, place or number of objects away from either side."""
    for split in ("train", "heldout"):
        drawn = [scene_of(SEED, split, i) for i in range(1000)]
        assert {len(s.objects) for s in drawn} == {1, 2, 3}
        assert {s.background for s in drawn} == set(BACKGROUNDS)
        kinds = Counter((o.color, o.shape, o.place) for s in drawn for o in s.objects)
        assert len(kinds) == len(COLORS) * len(SHAPES) * len(PLACES)


def test_objects_stay_inside_their_own_cells(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert len({o.cell for o in scene.objects}) == len(scene.objects)
        for o in scene.objects:
            row, column = divmod(o.cell, COLUMNS)
            assert column / COLUMNS < o.x - o.radius and o.x + o.radius < (column + 1) / COLUMNS
            assert row / COLUMNS < o.y - o.radius and o.y + o.radius < (row + 1) / COLUMNS


def test_pictures_show_what_the_scene_says(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes[:120]:
        picture = draw_scene(scene, rng)
        assert picture.size == (scene.width, scene.height) and picture.mode == "RGB"
        pixels = np.asarray(picture).astype(int)
        occupied = {o.cell: o for o in scene.objects}
        for cell in range(len(PLACES)):
            row, column = divmod(cell, COLUMNS)
            if cell in occupied:
                x, y = int(occupied[cell].x * scene.width), int(occupied[cell].y * scene.height)
                distances = {name: np.abs(pixels[y, x] - rgb).sum() for name, rgb in PALETTE.items()}
                assert min(distances, key=distances.get) == occupied[cell].color
            else:
                patch = pixels[
                    row * scene.height // COLUMNS + 2 : (row + 1) * scene.height // COLUMNS - 2,
                    column * scene.width // COLUMNS + 2 : (column + 1) * scene.width // COLUMNS - 2,
                ]
                assert np.ptp(patch, axis=-1).max() <= 20, "an empty cell is nearly grey"


def test_shapes_cover_their_areas() -> None:
    """A square, a bar and a column of one radius: the share of the bounding box that each one covers."""
    expected = {"square": 0.70, "bar": 0.25, "column": 0.25}
    rng = np.random.default_rng(1)
    found: dict[str, list[float]] = defaultdict(list)
    while any(len(found[shape]) < 5 for shape in SHAPES):
        scene = invent_scene(rng, heldout=False)
        if len(scene.objects) == 1 and scene.background == "light":
            o = scene.objects[0]
            pixels = np.asarray(draw_scene(scene, rng)).astype(int)
            box = (2 * o.radius * min(scene.width, scene.height)) ** 2
            found[o.shape].append(float((np.ptp(pixels, axis=-1) > 60).sum() / box))
    for shape in SHAPES:
        assert np.mean(found[shape]) == pytest.approx(expected[shape], abs=0.05)


def answer_by_looking(scene: Scene, question: str) -> str:
    """The obvious twin: read colour and shape words out of the question, look through the objects."""
    words = set(re.findall(r"[a-z]+", question))
    matching = [
        o
        for o in scene.objects
        if (not words & set(COLORS) or o.color in words) and (not words & set(SHAPES) or o.shape in words)
    ]
    if "How many" in question or "Count" in question:
        return NUMBERS[len(scene.objects)]
    if question.startswith(("Is there", "Does the picture", "Can you")):
        return "yes" if matching else "no"
    assert len(matching) == 1, f"'{question}' is about {len(matching)} objects"
    if "color of" in question or " color " in question:
        return matching[0].color
    if "shape of" in question or " shape " in question:
        return matching[0].shape
    assert "Where" in question or "place" in question or "part of the picture" in question
    return matching[0].place


def test_every_answer_is_the_one_right_answer(conversations: list[tuple[Scene, list[Turn]]]) -> None:
    for scene, turns in conversations:
        for turn in turns:
            assert turn.answer == answer_by_looking(scene, turn.question), turn
    assert {turn.question_type for _, turns in conversations for turn in turns} == set(QUESTION_TYPES)


def test_conversations_have_a_few_turns(conversations: list[tuple[Scene, list[Turn]]]) -> None:
    lengths = Counter(len(turns) for _, turns in conversations)
    assert set(lengths) <= {2, 3, 4}
    assert lengths[4] > 0.8 * len(conversations)


def test_answers_are_balanced(conversations: list[tuple[Scene, list[Turn]]]) -> None:
    answers: dict[str, Counter] = defaultdict(Counter)
    for _, turns in conversations:
        for turn in turns:
            answers[turn.question_type][turn.answer] += 1
    for question_type, counts in answers.items():
        majority = counts.most_common(1)[0][1] / counts.total()
        even = 1 / NUM_ANSWERS[question_type]
        # What is told earlier tilts colours and shapes by a point or two; four standard errors are chance.
        chance = 4 * math.sqrt(even * (1 - even) / counts.total())
        assert majority < even + chance + 0.02, (question_type, counts)
    shares = {question_type: counts.total() for question_type, counts in answers.items()}
    assert min(shares.values()) > 0.1 * sum(shares.values())


def test_existence_is_a_coin_whatever_was_said_before(conversations: list[tuple[Scene, list[Turn]]]) -> None:
    """Neither the number of objects nor the wording of the question tells "yes" from "no"."""
    groups: dict[tuple, list[bool]] = defaultdict(list)
    for scene, turns in conversations:
        for turn in turns:
            if turn.question_type == "existence":
                named = (any(c in turn.question for c in COLORS), any(s in turn.question for s in SHAPES))
                groups[("objects", len(scene.objects))].append(turn.answer == "yes")
                groups[("named", *named)].append(turn.answer == "yes")
    assert len(groups) == 6
    for group, said_yes in groups.items():
        deviations = abs(np.mean(said_yes) - 0.5) * 2 * np.sqrt(len(said_yes))
        assert deviations < 3.5, (group, np.mean(said_yes), len(said_yes))


def test_no_answer_is_stated_earlier_in_its_conversation(conversations: list[tuple[Scene, list[Turn]]]) -> None:
    for _, turns in conversations:
        told: set[str] = set()
        for turn in turns:
            words = set(re.findall(r"[a-z]+", f"{turn.question} {turn.answer}")) & {*COLORS, *SHAPES}
            if turn.question_type in ("color", "shape"):
                assert turn.answer not in told, turns
            if turn.question_type == "existence":
                assert not words <= told, turns
            if turn.answer != "no":
                told |= words


def test_caption_lists_the_objects_in_reading_order(scenes: list[Scene]) -> None:
    for scene in scenes[:200]:
        named = re.findall(r"a (\w+) (\w+) at the ([a-z ]+?)(?=,| and a |\.)", caption(scene))
        assert named == [(o.color, o.shape, o.place) for o in scene.objects]
        assert [PLACES.index(place) for _, _, place in named] == sorted(PLACES.index(place) for _, _, place in named)


def test_rows_are_llava_rows(corpus: DrawnCorpus) -> None:
    captions, instruct, heldout = rows_of(corpus.captions), rows_of(corpus.instruct), rows_of(corpus.heldout)
    assert (len(captions), len(instruct), len(heldout)) == (60, 60, 30)
    for row in captions + instruct + heldout:
        speakers = [message["from"] for message in row["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        assert row["conversations"][0]["value"].startswith("<image>\n")
        assert sum("<image>" in message["value"] for message in row["conversations"]) == 1
        with Image.open(corpus.images / row["image"]) as picture:
            assert picture.format == "JPEG"
    for row in instruct + heldout:
        assert len(row["question_types"]) == len(row["conversations"]) // 2
    assert not {row["image"] for row in instruct} & {row["image"] for row in heldout}


def test_the_seed_decides_everything(corpus: DrawnCorpus, tmp_path: Path) -> None:
    again = draw_corpus(tmp_path / "again", train_scenes=60, heldout_scenes=30, seed=SEED)
    files = sorted(p.relative_to(corpus.folder) for p in corpus.folder.rglob("*") if p.is_file())
    assert len(files) == 60 + 30 + 4
    for file in files:
        assert (corpus.folder / file).read_bytes() == (again.folder / file).read_bytes(), file
    other = draw_corpus(tmp_path / "other", train_scenes=60, heldout_scenes=30, seed=SEED + 1)
    assert other.instruct.read_bytes() != corpus.instruct.read_bytes()


def test_a_complete_corpus_is_not_drawn_again(tmp_path: Path) -> None:
    first = draw_corpus(tmp_path, train_scenes=3, heldout_scenes=2, seed=0)
    (first.images / "train-00000.jpg").write_bytes(b"marked")
    assert first.drawn and not draw_corpus(tmp_path, train_scenes=3, heldout_scenes=2, seed=0).drawn
    assert (first.images / "train-00000.jpg").read_bytes() == b"marked"
    assert draw_corpus(tmp_path, train_scenes=4, heldout_scenes=2, seed=0).drawn
    assert (first.images / "train-00000.jpg").read_bytes() != b"marked"


def test_an_interrupted_corpus_is_drawn_anew(tmp_path: Path) -> None:
    first = draw_corpus(tmp_path, train_scenes=3, heldout_scenes=2, seed=0)
    (first.folder / "corpus.json").unlink()
    (first.images / "train-00002.jpg").unlink()
    assert draw_corpus(tmp_path, train_scenes=3, heldout_scenes=2, seed=0).drawn
    assert (first.images / "train-00002.jpg").exists()


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_an_empty_split_is_refused(tmp_path: Path, sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"got {sizes[0]} for training and {sizes[1]} held out"):
        draw_corpus(tmp_path, *sizes, seed=0)


def test_tokenizer_is_of_the_expected_kind(corpus: DrawnCorpus) -> None:
    tokenizer = train_tokenizer(corpus_texts(corpus), vocab_size=512)
    assert len(tokenizer) <= 512
    assert len(tokenizer.encode(" .")) == 1
    assert tokenizer.pad_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    for text in ("größe ∑ 图片 \t\n\x00", " What color is the circle?", "What color is the circle?", "a  b"):
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    for answer in (*COLORS, *SHAPES, "yes", "no", "one", "two", "three"):
        assert len(tokenizer.encode(f" {answer}")) == 1, answer


def test_tokenizer_refuses_a_vocabulary_without_room() -> None:
    with pytest.raises(ValueError, match="vocab_size 257 is too small"):
        train_tokenizer(["some text"], vocab_size=257)
    assert len(train_tokenizer(["some text"], vocab_size=258).encode(" .")) == 1
