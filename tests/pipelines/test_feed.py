"""The feed: batches from lengths and a seed, dealt out to ranks, read ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.feed import BatchLoader, Feed, Position, PreparedRows, split
from tests.prepared import coloured_rows, write_prepared


def make_feed(num_rows: int, global_batch: int, seed: int = 0, length_group: int = 2) -> Feed:
    draw = np.random.default_rng(num_rows)
    return Feed(
        num_tokens=draw.integers(5, 400, num_rows),
        num_loss_tokens=draw.integers(1, 5, num_rows),
        has_image=draw.random(num_rows) < 0.7,
        global_batch=global_batch,
        seed=seed,
        length_group=length_group,
    )


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 120),
    micro=st.sampled_from([1, 2, 4]),
    accumulation=st.integers(1, 3),
    interruptions=st.lists(st.integers(1, 15), max_size=4),
    data=st.data(),
)
def test_the_union_over_ranks_is_the_epoch_whatever_the_world_and_the_interruptions(
    num_rows, micro, accumulation, interruptions, data
):
    global_batch = micro * accumulation * 4
    feed = make_feed(num_rows, global_batch)
    position, seen, batches = Position(), [], []
    for pause in [*interruptions, 10**6]:
        # A new attempt: a new feed, another number of workers, from the stored position.
        world = data.draw(st.sampled_from([1, 2, 4]))
        feed = make_feed(num_rows, global_batch)
        left = feed.batches_per_epoch - position.batch if position.epoch == 0 else 0
        for batch in feed.walk(position, min(pause, left)):
            steps = split(batch.rows, world, micro)
            assert all(len(step) == world for step in steps)
            assert all(len(share) <= micro for step in steps for share in step)
            seen += [int(row) for step in steps for share in step for row in share]
            batches.append(sorted(batch.rows.tolist()))
            position = batch.after
    assert sorted(seen) == list(range(num_rows))
    assert position.samples_seen == num_rows
    assert batches == [sorted(rows.tolist()) for rows in make_feed(num_rows, global_batch).epoch(0)]


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


def test_a_short_batch_is_evened_out_and_may_leave_ranks_without_rows():
    assert [[len(share) for share in step] for step in split(np.arange(10), 4, 2)] == [[2, 2, 1, 1], [1, 1, 1, 1]]
    assert [[len(share) for share in step] for step in split(np.arange(2), 4, 2)] == [[1, 1, 0, 0]]


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
