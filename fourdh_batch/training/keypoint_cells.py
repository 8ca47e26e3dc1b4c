"""Where each keypoint lies among the tokens of the backbone, asked in training only.

The published backbone comes from ViTPose, which learnt keypoints in the picture before. A small one
from random weights gets the same from this: each token is asked which keypoints lie in its cell and
where in there. Without it, bodies are learnt many times more slowly.

`B` people, `N` tokens of the backbone, `K` = 44 keypoints.

Source: the task of Xu et al., ViTPose; cell and place in it after Li et al., SimCC, in two axes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fourdh_batch.models.vit import IMAGE_HW, PATCH_PX, ViT
from fourdh_batch.types import NUM_KEYPOINTS

VIEW_WIDTH = IMAGE_HW[1] / IMAGE_HW[0]  # of the backbone's view, in widths of the crop


class KeypointCells(nn.Module):
    """One linear map of every token: a score and a place for each keypoint.

    Args:
        backbone: whose tokens are asked.
    """

    def __init__(self, backbone: ViT) -> None:
        super().__init__()
        self.rows_columns = tuple(side // PATCH_PX for side in backbone.image_hw)
        self.linear = nn.Linear(backbone.pos_embed.shape[2], 3 * NUM_KEYPOINTS)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, K, 3): the score, then x and y in the cell, 0 to 1."""
        told: Tensor = self.linear(tokens)
        return told.view(*tokens.shape[:2], NUM_KEYPOINTS, 3)

    def loss(self, told: Tensor, truth: Tensor) -> Tensor:
        """Cross entropy over the cells plus L1 of the place, summed over all that lie in a cell.

        Args:
            told: (B, N, K, 3) of `forward`.
            truth: (B, K, 3) crop widths, 0 is the centre; then the confidence, which weighs.
        """
        rows, columns = self.rows_columns
        x = (truth[..., 0] + VIEW_WIDTH / 2) * rows  # cells are square
        y = (truth[..., 1] + 0.5) * rows
        column, row = x.floor(), y.floor()
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        weight = truth[..., 2] * inside
        cell = (row * columns + column).long().clamp(0, rows * columns - 1)  # (B, K)
        missed = F.cross_entropy(told[..., 0], cell, reduction="none")
        place = told[..., 1:].gather(1, cell[:, None, :, None].expand(-1, 1, -1, 2))[:, 0]
        off_x, off_y = place[..., 0] - (x - column), place[..., 1] - (y - row)
        return (weight * (missed + (off_x.abs() + off_y.abs()) / 2)).sum()
