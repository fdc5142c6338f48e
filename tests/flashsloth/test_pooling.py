"""Spatial attention pooling against a loop that spells it out."""

import torch

from flashsloth import FlashSlothConfig
from flashsloth.pooling import SpatialAttentionPooling


def pooled_one_by_one(pooling: SpatialAttentionPooling, patches: torch.Tensor, side: int, size: int) -> torch.Tensor:
    rows = []
    for image in patches:
        grid = image.view(side, side, -1)
        tokens = []
        for top in range(0, side, size):
            for left in range(0, side, size):
                region = grid[top : top + size, left : left + size].reshape(size * size, -1)
                scores = torch.stack([pooling.score_out(torch.relu(pooling.score_in(patch))) for patch in region])
                weights = torch.softmax(scores[:, 0], dim=0)
                tokens.append(sum(weight * patch for weight, patch in zip(weights, region, strict=True)))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def test_equals_the_loop_over_regions() -> None:
    torch.manual_seed(0)
    config = FlashSlothConfig.tiny()
    pooling = SpatialAttentionPooling(config).eval()
    patches = torch.randn(2, config.num_patches, config.vision_config.hidden_size)
    expected = pooled_one_by_one(pooling, patches, config.patch_grid, config.pooling_size)
    assert pooling(patches).shape == (2, 9, config.vision_config.hidden_size)
    torch.testing.assert_close(pooling(patches), expected, atol=1e-5, rtol=0)


def test_full_size_pools_729_patches_to_81() -> None:
    config = FlashSlothConfig.base()
    with torch.device("meta"):
        assert SpatialAttentionPooling(config)(torch.empty(3, 729, 1152)).shape == (3, 81, 1152)
