"""The feed: batches from lengths and a seed, dealt out to ranks, read ahead."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import storage
from pipelines.feed import BatchLoader, BudgetError, Feed, Mixture, Position, PreparedRows, TokenBudget, deal
from pipelines.feed.sharing import padding_share
from pipelines.shards import ShardError
from tests.prepared import coloured_rows, write_prepared


def make_feed(
    num_rows: int, global_batch: int, seed: int = 0, length_group: int = 2, mixture: Mixture | None = None
) -> Feed:
    draw = np.random.default_rng(num_rows)
    return Feed(
        num_tokens=draw.integers(5, 400, num_rows),
        num_loss_tokens=draw.integers(1, 5, num_rows),
        has_image=draw.random(num_rows) < 0.7,
        global_batch=global_batch,
        seed=seed,
        length_group=length_group,
        mixture=mixture,
    )


@settings(max_examples=150, deadline=None)
@given(
    num_rows=st.integers(1, 120),
    micro=st.sampled_from([1, 2, 4, TokenBudget(800), TokenBudget(2000, images=3), TokenBudget(900, 5, line=450)]),
    accumulation=st.integers(1, 3),
    interruptions=st.lists(st.integers(1, 15), max_size=4),
    weights=st.sampled_from([None, (1.0, 1.0), (0.3, 2.5)]),
    data=st.data(),
)
def test_the_union_over_ranks_is_the_epoch_whatever_the_world_and_the_interruptions(
    num_rows, micro, accumulation, interruptions, weights, data
):
    global_batch = accumulation * 4
    mixture = Mixture([num_rows // 2, num_rows - num_rows // 2], weights) if weights else None
    feed = make_feed(num_rows, global_batch, mixture=mixture)
    position, seen, batches = Position(), [], []
    for pause in [*interruptions, 10**6]:
        # A new attempt: a new feed, another number of workers, other micro-batches, from the stored position.
        world = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
        feed = make_feed(num_rows, global_batch, mixture=mixture)
        left = feed.batches_per_epoch - position.batch if position.epoch == 0 else 0
        for batch in feed.walk(position, min(pause, left)):
            steps = deal(batch.rows, world, micro, feed.num_tokens, feed.has_image)
            assert all(len(step) == world for step in steps)
            for share in (share for step in steps for share in step):
                check_share(share, micro, feed)
            seen += [int(row) for step in steps for share in step for line in share for row in line]
            batches.append(sorted(batch.rows.tolist()))
            position = batch.after
    assert sorted(seen) == (mixture.rows(0, feed.seed).tolist() if mixture else list(range(num_rows)))
    assert position.samples_seen == len(seen) == feed.rows_per_epoch
    assert batches == [sorted(rows.tolist()) for rows in make_feed(num_rows, global_batch, mixture=mixture).epoch(0)]


def test_every_point_of_a_grid_gives_the_same_batches_and_the_whole_epoch():
    """Rows x world sizes x micro-batches x interruptions, all of them; the test above draws odder ones."""
    micros = [1, 4, TokenBudget(900), TokenBudget(1000, images=2), TokenBudget(1600, line=800)]
    for num_rows, global_batch in itertools.product((1, 7, 24, 61), (4, 16)):
        expected = [sorted(rows.tolist()) for rows in make_feed(num_rows, global_batch).epoch(0)]
        for world, micro, pause in itertools.product((1, 2, 3, 4, 8), micros, (1, 3, 100)):
            position, batches = Position(), []
            while len(batches) < len(expected):
                feed = make_feed(num_rows, global_batch)  # each attempt starts from the position alone
                for batch in feed.walk(position, min(pause, len(expected) - len(batches))):
                    steps = deal(batch.rows, world, micro, feed.num_tokens, feed.has_image)
                    assert all(len(step) == world for step in steps)
                    batches.append(sorted(int(r) for step in steps for share in step for line in share for r in line))
                    position = batch.after
            assert batches == expected
            assert sorted(itertools.chain(*batches)) == list(range(num_rows))


def check_share(share: list[np.ndarray], micro: int | TokenBudget, feed: Feed) -> None:
    """A share keeps within what a micro-batch may hold."""
    if isinstance(micro, int):
        assert len(share) <= micro
        return
    lengths = [int(feed.num_tokens[line].sum()) for line in share]
    assert len(share) * max(lengths, default=0) <= micro.tokens
    assert sum(int(feed.has_image[line].sum()) for line in share) <= (micro.images or 10**6)
    assert all(length <= micro.line for length in lengths) if micro.line else all(len(line) == 1 for line in share)


def test_every_batch_but_the_last_is_whole_and_the_walk_goes_on_over_epochs():
    feed = make_feed(50, 8)
    sizes = [len(batch.rows) for batch in feed.walk(Position(), 2 * feed.batches_per_epoch)]
    assert sizes == ([8] * 6 + [2]) * 2
    last = list(feed.walk(Position(), 9))[-1]
    assert last.after == Position(epoch=1, batch=2, samples_seen=66)


def test_seed_and_epoch_change_the_order_and_nothing_else_does():
    first = [rows.tolist() for rows in make_feed(64, 8).epoch(0)]
    assert first == [rows.tolist() for rows in make_feed(64, 8).epoch(0)]
    assert first != [rows.tolist() for rows in make_feed(64, 8).epoch(1)]
    assert first != [rows.tolist() for rows in make_feed(64, 8, seed=1).epoch(0)]


def test_the_order_is_the_one_it_always_was():
    # A run that is resumed after an upgrade must see the batches it would have seen.
    lengths = np.arange(12) * 7 % 12
    feed = Feed(lengths, lengths, np.arange(12) % 3 > 0, global_batch=4, seed=11, length_group=2)
    assert [rows.tolist() for rows in feed.epoch(3)] == [[11, 4, 2, 7], [3, 6, 9, 0], [5, 10, 8, 1]]


def test_batches_hold_one_modality_and_similar_lengths():
    draw = np.random.default_rng(1)
    lengths, has_image = draw.integers(10, 1000, 4000), draw.random(4000) < 0.6
    feed = Feed(lengths, lengths, has_image, 32, seed=0, length_group=8)
    batches = feed.epoch(0)
    mixed = [rows for rows in batches if 0 < has_image[rows].sum() < len(rows)]
    assert len(mixed) <= 1

    def padding(batches: list[np.ndarray]) -> float:
        return 1 - lengths.sum() / sum(lengths[rows].max() * len(rows) for rows in batches)

    shuffled = np.split(draw.permutation(4000), 125)
    assert padding(batches) < 0.2 < 0.4 < padding(shuffled)


def sizes(rows: np.ndarray, world_size: int, micro: int) -> list[list[int]]:
    every = np.arange(len(rows))
    return [[len(share) for share in step] for step in deal(rows, world_size, micro, every, every > 0)]


def test_a_short_batch_is_evened_out_and_may_leave_ranks_without_rows():
    assert sizes(np.arange(10), 4, 2) == [[2, 2, 1, 1], [1, 1, 1, 1]]
    assert sizes(np.arange(2), 4, 2) == [[1, 1, 0, 0]]


def drawn(num_rows: int = 96) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers, longest first, with lengths like those of conversations, half of them with an image."""
    draw = np.random.default_rng(2)
    lengths = np.minimum(draw.lognormal(5.5, 0.8, num_rows), 2000).astype(int) + 50
    return np.argsort(-lengths, kind="stable"), lengths, draw.random(num_rows) < 0.5


def test_a_token_budget_holds_as_many_rows_as_fit_and_evens_the_work_out():
    rows, lengths, has_image = drawn()
    fixed = deal(rows, 4, 8, lengths, has_image)
    budgeted = deal(rows, 4, TokenBudget(16000), lengths, has_image)
    assert len(budgeted) == 1 < len(fixed)
    positions = [len(share) * lengths[share[0][0]] for step in budgeted for share in step]
    assert max(positions) < 1.2 * min(positions)
    assert {len(share) for step in budgeted for share in step} != {24}, "long rows are few, short ones many"
    few = deal(rows, 4, TokenBudget(16000, images=8), lengths, has_image)
    assert max(sum(has_image[line].sum() for line in share) for step in few for share in step) == 8


def test_packing_leaves_hardly_any_padding_and_gives_every_rank_the_same():
    rows, lengths, has_image = drawn()
    shares = [share for step in deal(rows, 4, TokenBudget(8200, line=4100), lengths, has_image) for share in step]
    assert {len(share) for share in shares} == {2}
    assert padding_share(shares, lengths) < 0.02
    one_each = [share for step in deal(rows, 4, 8, lengths, has_image) for share in step]
    assert padding_share(one_each, lengths) > 0.05


def test_padding_is_counted_over_all_positions():
    lengths = np.array([4, 3, 1])
    assert padding_share([[np.array([0]), np.array([1])], [np.array([2])], []], lengths) == 1 - 8 / 9
    assert padding_share([[np.array([0]), np.array([1, 2])]], lengths) == 0


def test_a_row_that_fits_nowhere_is_refused_with_both_numbers():
    with pytest.raises(BudgetError, match="row 1 has 90 tokens, a micro-batch may hold 80"):
        TokenBudget(80).check(np.array([3, 90, 5]))
    with pytest.raises(BudgetError, match="row 1 has 90 tokens, a line may hold 60"):
        TokenBudget(100, line=60).check(np.array([3, 90, 5]))


def test_a_mixture_takes_every_row_of_a_source_before_any_comes_again():
    mixture = Mixture([8, 6], [0.5, 2.0])
    epochs = [mixture.rows(epoch, seed=3) for epoch in range(4)]
    assert [len(rows) for rows in epochs] == [4 + 12] * 4
    for first in (0, 2):
        small = np.concatenate([rows[rows < 8] for rows in epochs[first : first + 2]])
        assert sorted(small.tolist()) == list(range(8))
    assert all(sorted(rows[rows >= 8].tolist()) == sorted([*range(8, 14)] * 2) for rows in epochs)
    assert epochs[0].tolist() != epochs[2].tolist(), "the halves are drawn anew"


def test_a_mixture_of_ones_is_the_plain_order():
    plain, mixed = make_feed(50, 8), make_feed(50, 8, mixture=Mixture([20, 30], [1, 1]))
    for epoch in range(2):
        assert [b.tolist() for b in plain.epoch(epoch)] == [b.tolist() for b in mixed.epoch(epoch)]


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0], "1 weights are given for 2 sources"), ([1.0, 0.0], "a weight is 0.0")]
)
def test_weights_that_say_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture([3, 4], weights)


@pytest.fixture
def rows(tmp_path, processor) -> PreparedRows:
    first = write_prepared(tmp_path / "a", coloured_rows(13, text_only_every=4), processor)
    second = write_prepared(tmp_path / "b", coloured_rows(6), processor, payload="original")
    return PreparedRows([first, second])


def load(rows: PreparedRows, processor, world: int, rank: int, micro: int = 2, batch: int = 8, threads: int = 3):
    feed = Feed(rows.num_tokens, rows.num_loss_tokens, rows.has_image, batch, seed=5)
    batches = feed.walk(Position(), feed.batches_per_epoch)
    with BatchLoader(
        rows, batches, rank=rank, world_size=world, micro_batch=micro, processor=processor, threads=threads, prefetch=3
    ) as loader:
        return list(loader), loader


def test_rows_of_several_folders_follow_each_other(rows):
    assert len(rows) == 19
    assert [rows.read(index)["id"] for index in (0, 12, 13, 18)] == ["0", "12", "0", "5"]
    with pytest.raises(IndexError):
        rows.read(19)


@pytest.mark.s3
def test_folders_share_the_room_of_one_cache(tmp_path, processor, s3_uri):
    local = write_prepared(tmp_path / "local", coloured_rows(4), processor)
    turns = {"a": 1, "b": 2}
    remote = [
        write_prepared(f"{s3_uri}/{name}", coloured_rows(6, turns=count), processor, rows_per_shard=2)
        for name, count in turns.items()
    ]
    cache = tmp_path / "cache"
    sizes = [shard.bytes for shard in PreparedRows(remote).datasets[0].manifest.shards]
    rows = PreparedRows([local, *remote], str(cache), cache_bytes=sum(sizes) + 2 * sizes[0])
    for _ in range(2):
        assert [rows.read(row)["id"] for row in range(len(rows))] == list("0123012345012345")
    assert len(list(cache.iterdir())) == 4, "three shards of the one, one longer one of the other"


def test_the_loader_keeps_the_order_and_decodes_stored_images(rows, processor):
    micro_batches, _ = load(rows, processor, world=1, rank=0)
    assert [micro.is_last for micro in micro_batches] == [False, False, False, True] * 2 + [False, True]
    images = sum(micro.inputs["pixel_values"].shape[0] for micro in micro_batches)
    assert images == int(rows.has_image.sum())
    for micro in micro_batches:
        assert micro.inputs["pixel_values"].shape[1:] == (1, 3, 126, 126)
        assert micro.inputs["pixel_values"].dtype == torch.uint8
    labels = sum(int((micro.inputs["labels"] != -100).sum()) for micro in micro_batches)
    assert (
        labels
        == int(rows.num_loss_tokens.sum())
        == sum({id(m.batch): m.batch.num_loss_tokens for m in micro_batches}.values())
    )


@pytest.mark.s3
def test_a_store_read_by_ranges_gives_the_same_batches_as_the_disk_and_names_a_damaged_row(tmp_path, processor, s3_uri):
    conversations = coloured_rows(13, text_only_every=4)
    local = PreparedRows([write_prepared(tmp_path / "data", conversations, processor)])
    remote = PreparedRows([write_prepared(s3_uri, conversations, processor)], cache_bytes=0)
    here, _ = load(local, processor, world=2, rank=1)
    there, _ = load(remote, processor, world=2, rank=1, threads=6)
    for left, right in zip(here, there, strict=True):
        assert all(torch.equal(left.inputs[name], right.inputs[name]) for name in left.inputs)
    shard = remote.datasets[0].manifest.shards[0]
    uri = f"{s3_uri}/{shard.name}"
    data = bytearray(storage.read_bytes(uri))
    data[shard.row_offsets[3] - 100] ^= 1
    storage.write_bytes(uri, bytes(data))
    with pytest.raises(ShardError, match=f"{shard.name}: row 2: expected .* bytes with"):
        load(remote, processor, world=1, rank=0, threads=6)


def test_threads_change_nothing(rows, processor):
    one, _ = load(rows, processor, world=2, rank=1, threads=1)
    many, _ = load(rows, processor, world=2, rank=1, threads=4)
    for left, right in zip(one, many, strict=True):
        assert all(torch.equal(left.inputs[name], right.inputs[name]) for name in left.inputs)


def test_a_rank_without_rows_runs_a_row_without_labels(rows, processor):
    micro_batches, _ = load(rows, processor, world=4, rank=3, micro=4, batch=16)
    last = micro_batches[-1]
    assert len(last.batch.rows) == 3  # for 4 ranks
    assert (last.inputs["labels"] == -100).all()
    assert last.inputs["input_ids"].shape[0] == 1
    assert len(micro_batches) == len(load(rows, processor, world=4, rank=0, micro=4, batch=16)[0])


def test_a_micro_batch_without_images_says_so_with_an_empty_tensor(tmp_path, processor):
    texts = coloured_rows(4, text_only_every=1)
    for payload, name, shape in (
        ("pixels", "pixel_values", (0, 1, 3, 126, 126)),
        ("features", "patch_features", (0, 1, 81, 128)),
    ):
        folder = write_prepared(tmp_path / payload, texts + coloured_rows(1), processor, payload=payload)
        micro_batches, _ = load(PreparedRows([folder]), processor, world=1, rank=0, micro=4, batch=4)
        without = [micro.inputs[name].shape for micro in micro_batches if not (micro.inputs[name].shape[0])]
        assert without == [shape]


def test_the_wait_for_data_is_measured(rows, processor, monkeypatch):
    gate = threading.Event()
    read = rows.read

    def slow(row: int):
        gate.wait(0.05)
        return read(row)

    monkeypatch.setattr(rows, "read", slow)
    _, loader = load(rows, processor, world=1, rank=0, threads=1)
    assert loader.waited_s > 0.5


def test_a_broken_row_reaches_the_step_as_its_own_error(rows, processor, monkeypatch):
    def broken(row: int):
        raise OSError("disk gone")

    monkeypatch.setattr(rows, "read", broken)
    with pytest.raises(OSError, match="disk gone"):
        load(rows, processor, world=1, rank=0)


def test_folders_without_rows_are_refused(tmp_path, processor):
    with pytest.raises(ValueError, match="hold no row"):
        PreparedRows([write_prepared(tmp_path / "none", [], processor)])
