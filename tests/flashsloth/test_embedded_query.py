"""The embedded query module against the text of the specification, one turn at a time."""

import math

import pytest
import torch

from flashsloth import FlashSlothConfig
from flashsloth.embedded_query import EmbeddedQuery, QueryAttention, QueryPlan

IMAGE, QUERY = 511, 509


def attention_one_by_one(
    module: QueryAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    q, k, v = module.q_proj(query), module.k_proj(key), module.v_proj(value)
    width, value_width = q.shape[-1] // module.num_heads, v.shape[-1] // module.num_heads
    heads = []
    for head in range(module.num_heads):
        inner, outer = slice(head * width, (head + 1) * width), slice(head * value_width, (head + 1) * value_width)
        scores = q[:, inner] @ k[:, inner].T / math.sqrt(width)
        heads.append(torch.softmax(scores.float(), dim=-1) @ v[:, outer])
    return torch.cat(heads, dim=-1)


def turn_by_turn(
    module: EmbeddedQuery,
    hidden_states: torch.Tensor,
    question_ids: torch.Tensor,
    query_mask: torch.Tensor,
    images: dict[tuple[int, int], torch.Tensor],
) -> torch.Tensor:
    """`images` gives the patches of each (row, turn) that has any."""
    result = hidden_states.clone()
    for (row, turn), patches in images.items():
        queries = (question_ids[row] == turn) & query_mask[row]
        question = (question_ids[row] == turn) & ~query_mask[row]
        q, t = module.down_text(hidden_states[row, queries]), module.down_text(hidden_states[row, question])
        v = module.down_image(patches)
        asked = attention_one_by_one(
            module.text_attention, module.norm_query(q), module.norm_text(t), module.norm_text(t)
        )
        found = attention_one_by_one(module.image_attention, asked, module.norm_image(v), patches)
        result[row, queries] = hidden_states[row, queries] + module.up(found)
    return result


def layout(rows: list[list[tuple[str, int, int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of (kind, length, turn) pieces to ids and question ids, padded on the right."""
    kinds = {"text": 7, "image": IMAGE, "question": 8, "query": QUERY}
    ids = [[kinds[kind] for kind, length, _ in row for _ in range(length)] for row in rows]
    turns = [[turn for _, length, turn in row for _ in range(length)] for row in rows]
    width = max(map(len, ids))
    return tuple(torch.tensor([row + [0] * (width - len(row)) for row in table]) for table in (ids, turns))


@pytest.fixture
def config() -> FlashSlothConfig:
    return FlashSlothConfig.tiny(num_query_tokens=3, tiling="hd")


@pytest.fixture
def module(config: FlashSlothConfig) -> EmbeddedQuery:
    torch.manual_seed(0)
    return EmbeddedQuery(config)


def test_equals_the_loop_over_rows_and_turns(config: FlashSlothConfig, module: EmbeddedQuery) -> None:
    """One turn; text only; three turns of unequal length; two samples packed in one row, each with its image."""
    rows = [
        [("text", 4, 0), ("image", 45, 0), ("question", 5, 1), ("query", 3, 1), ("text", 2, 0)],
        [("text", 3, 0), ("question", 4, 1), ("query", 3, 1), ("question", 2, 2), ("query", 3, 2)],
        [("image", 45, 0)] + [p for k in (1, 2, 3) for p in (("question", k * 2, k), ("query", 3, k), ("text", 3, 0))],
        [("image", 45, 0), ("question", 3, 1), ("query", 3, 1), ("image", 45, 0), ("question", 4, 2), ("query", 3, 2)],
    ]
    input_ids, question_ids = layout(rows)
    hidden_states = torch.randn(*input_ids.shape, config.text_config.hidden_size)
    patches = torch.randn(4, 5 * config.num_patches, config.vision_config.hidden_size)
    query_mask = input_ids == QUERY
    plan = QueryPlan.build(question_ids, query_mask, input_ids == IMAGE, config.num_image_tokens)
    result = module(hidden_states, patches, plan)

    images = {(0, 1): patches[0], (2, 1): patches[1], (2, 2): patches[1], (2, 3): patches[1]}
    images |= {(3, 1): patches[2], (3, 2): patches[3]}
    expected = turn_by_turn(module, hidden_states, question_ids, query_mask, images)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert torch.equal(result[~query_mask], hidden_states[~query_mask]), "only query tokens change"
    assert torch.equal(result[1], hidden_states[1]), "rows without an image keep theirs"
    assert not torch.allclose(result[2][query_mask[2]], hidden_states[2][query_mask[2]])


def test_keys_and_values_are_computed_once_per_image(config: FlashSlothConfig, module: EmbeddedQuery) -> None:
    turns = [p for k in (1, 2, 3, 4) for p in (("question", 2, k), ("query", 3, k))]
    input_ids, question_ids = layout([[("image", 45, 0), *turns], [("image", 45, 0), *turns]])
    plan = QueryPlan.build(question_ids, input_ids == QUERY, input_ids == IMAGE, config.num_image_tokens)
    seen = []
    for projection in (module.image_attention.k_proj, module.image_attention.v_proj, module.down_image):
        projection.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    patches = torch.randn(2, 5 * config.num_patches, config.vision_config.hidden_size)
    module(torch.randn(*input_ids.shape, config.text_config.hidden_size), patches, plan)
    assert seen == [(2, 5 * config.num_patches)] * 3, "8 turns on 2 images: 2 sets of keys and values"


def test_a_turn_without_question_is_refused_by_row_and_turn(config: FlashSlothConfig) -> None:
    input_ids, question_ids = layout([[("image", 45, 0), ("question", 2, 1), ("query", 3, 1), ("query", 3, 2)]])
    with pytest.raises(ValueError, match="row 0, turn 2: its query tokens have 0 question tokens"):
        QueryPlan.build(question_ids, input_ids == QUERY, input_ids == IMAGE, config.num_image_tokens)


def test_an_image_that_no_turn_asks_for_changes_nothing(config: FlashSlothConfig, module: EmbeddedQuery) -> None:
    input_ids, question_ids = layout([[("image", 45, 0), ("text", 4, 0)]])
    plan = QueryPlan.build(question_ids, input_ids == QUERY, input_ids == IMAGE, config.num_image_tokens)
    hidden_states = torch.randn(1, 49, config.text_config.hidden_size)
    patches = torch.randn(1, 5 * config.num_patches, config.vision_config.hidden_size)
    assert torch.equal(module(hidden_states, patches, plan), hidden_states)


def test_a_packed_row_is_read_once_for_all_its_images(config: FlashSlothConfig, module: EmbeddedQuery) -> None:
    sample = [("image", 45, 0), ("question", 4, 1), ("query", 3, 1)]
    input_ids, question_ids = layout([sample * 3, [("text", 9, 0)]])
    sample_ids = torch.arange(3).repeat_interleave(52).expand(2, -1)
    plan = QueryPlan.build(question_ids, input_ids == QUERY, input_ids == IMAGE, config.num_image_tokens, sample_ids)
    seen: list[int] = []
    module.down_text.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    patches = torch.randn(3, 5 * config.num_patches, config.vision_config.hidden_size)
    module(torch.randn(2, 156, config.text_config.hidden_size), patches, plan)
    assert seen == [1], "one row holds three images, the other none"


def test_the_idle_plan_changes_nothing_and_reaches_every_parameter(
    config: FlashSlothConfig, module: EmbeddedQuery
) -> None:
    hidden_states = torch.randn(2, 11, config.text_config.hidden_size, requires_grad=True)
    patches = torch.zeros(1, 5 * config.num_patches, config.vision_config.hidden_size)
    result = module(hidden_states, patches, QueryPlan.idle(11, 3, hidden_states.device))
    assert torch.equal(result, hidden_states)
    result.sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_plan_moves_as_a_whole(config: FlashSlothConfig) -> None:
    input_ids, question_ids = layout([[("image", 45, 0), ("question", 4, 1), ("query", 3, 1)]])
    plan = QueryPlan.build(question_ids, input_ids == QUERY, input_ids == IMAGE, config.num_image_tokens)
    moved = plan.to(torch.device("meta"))
    assert moved.slots_per_image == plan.slots_per_image
    for name, part in vars(plan).items():
        if isinstance(part, torch.Tensor):
            assert vars(moved)[name].is_meta and vars(moved)[name].shape == part.shape, name
