import numpy as np
import pytest
import torch

from flashsloth.collation import collate


def sample(length, labelled=True, **images):
    ids = np.arange(1, length + 1, dtype=np.int32)
    row = {"input_ids": ids, "question_ids": np.ones(length, np.int32), **images}
    return row | ({"labels": ids} if labelled else {})


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[1, 2, 3], [1, 99, 99]], [[1, 1, 1], [1, 0, 0]]),
        ("left", [[1, 2, 3], [99, 99, 1]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_pads_every_key_on_the_same_side(side, ids, mask):
    batch = collate([sample(3), sample(1)], pad_token_id=99, padding_side=side)
    mask = torch.tensor(mask)
    assert batch["input_ids"].tolist() == ids
    assert torch.equal(batch["attention_mask"], mask)
    assert torch.equal(batch["question_ids"], mask)
    assert torch.equal(batch["labels"], torch.where(mask == 1, torch.tensor(ids), -100))
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_takes_lists_and_leaves_out_labels_that_nobody_has():
    batch = collate([{"input_ids": [5, 6], "question_ids": [0, 1]}], pad_token_id=0)
    assert sorted(batch) == ["attention_mask", "input_ids", "question_ids"]


def test_images_are_those_of_the_rows_that_have_one_in_order():
    first, second = np.full((1, 3, 2, 2), 7, np.uint8), np.full((1, 3, 2, 2), 8, np.uint8)
    rows = [sample(2, pixel_values=first), sample(3), sample(1, pixel_values=second)]
    pixels = collate(rows, pad_token_id=0)["pixel_values"]
    assert pixels.shape == (2, 1, 3, 2, 2)
    assert pixels.dtype == torch.uint8
    assert pixels[:, 0, 0, 0, 0].tolist() == [7, 8]


def test_patch_features_keep_their_dtype_and_read_only_arrays_are_copied(recwarn):
    features = np.ones((1, 4, 5), np.float16)
    features.setflags(write=False)  # as a reader of memory-mapped shards gives them
    batch = collate([sample(2, patch_features=features), sample(2)], pad_token_id=0)
    assert batch["patch_features"].shape == (1, 1, 4, 5)
    assert batch["patch_features"].dtype == torch.float16
    assert not recwarn


def test_a_batch_without_images_has_no_image_key():
    assert "pixel_values" not in collate([sample(2, pixel_values=None)], pad_token_id=0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no samples"),
        ([sample(2), sample(2, labelled=False)], "1 of 2 samples have labels"),
        ([sample(2) | {"labels": [1]}], "sample 0: 1 labels for 2 input_ids"),
        ([sample(2) | {"question_ids": [1, 2, 3]}], "sample 0: 3 question_ids for 2 input_ids"),
        (
            [sample(2, pixel_values=np.zeros((1, 3, 2, 2))), sample(2, patch_features=np.zeros((1, 4, 5)))],
            "sample 0 brings pixel_values, sample 1 brings patch_features",
        ),
        (
            [sample(2), sample(2, pixel_values=np.zeros((1, 3, 2, 2))), sample(2, pixel_values=np.zeros((5, 3, 2, 2)))],
            r"sample 2 is \(5, 3, 2, 2\), of sample 1 \(1, 3, 2, 2\)",
        ),
    ],
)
def test_what_cannot_be_one_batch_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        collate(rows, pad_token_id=0)


def test_padding_side_must_be_a_side():
    with pytest.raises(ValueError, match="'middle'"):
        collate([sample(1)], pad_token_id=0, padding_side="middle")
