"""Spatial attention pooling (SAP): keep what stands out in each region of the image (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import nn

from .configuration_flashsloth import FlashSlothConfig


class SpatialAttentionPooling(nn.Module):
    """Pools each square of `pooling_size` x `pooling_size` patches into one token, weighted by a learned score.

    The grid of patches is row-major, and so is the grid of regions that comes out.
    """

    def __init__(self, config: FlashSlothConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.size = config.pooling_size
        self.grid = config.patch_grid // config.pooling_size
        self.score_in = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.pooling_dropout)
        self.score_out = nn.Linear(width, 1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Pool `patches` float[B, P, D] (P = 729) to float[B, R, D] (R = 81)."""
        scores = self.score_out(self.dropout(torch.relu(self.score_in(patches))))
        weights = self._regions(scores).float().softmax(dim=2).to(patches.dtype)
        return (self._regions(patches) * weights).sum(dim=2)

    def _regions(self, values: torch.Tensor) -> torch.Tensor:
        """Group float[B, P, D] by region: float[B, R, patches of a region, D]."""
        batch, _, width = values.shape
        grid = values.view(batch, self.grid, self.size, self.grid, self.size, width)
        return grid.transpose(2, 3).reshape(batch, self.grid**2, self.size**2, width)
