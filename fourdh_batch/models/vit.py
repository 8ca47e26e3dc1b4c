"""Backbone of HMR 2.0: a plain vision transformer as ViTPose has it.

`B` crops, `N` tokens (192, 16 rows of 12, where crops are not shrunk), `D` width, `A` attention
heads.
Parameter names are those of the published checkpoint.

Source: Goel et al., Humans in 4D, section 3.1; Xu et al., ViTPose.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_HW = (256, 192)
PATCH_PX = 16
PATCH_PADDING_PX = 2  # shifts every patch by 2 px; the last two rows and columns are never seen
NORM_GROUPS = 8
NORM_EPSILON = 1e-6  # the head has PyTorch's 1e-5


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_PX, stride=PATCH_PX, padding=PATCH_PADDING_PX)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, N, D), row by row."""
        tokens: Tensor = self.proj(image)
        return tokens.flatten(2).transpose(1, 2)


class ConvBlock(nn.Module):
    """A normalised 3 x 3 convolution, added to its input where the shapes allow."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(NORM_GROUPS, num_out)
        self.is_residual = stride == 1 and num_in == num_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        y = F.relu(self.norm(self.conv(x)))
        return x + y if self.is_residual else y


class ConvEmbed(nn.Module):
    """Patches by 3 x 3 convolutions: small networks learn from far fewer pictures with them.

    Source: Xiao et al., Early Convolutions Help Transformers See Better.

    Args:
        dim: width D.
        stem: (channels, stride) of each convolution; the strides must make `PATCH_PX` together.
    """

    def __init__(self, dim: int, stem: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        widths = (3, *(width for width, _ in stem))
        self.blocks = nn.Sequential(
            *(
                ConvBlock(num_in, num_out, stride)
                for num_in, (num_out, stride) in zip(widths, stem, strict=False)
            )
        )
        self.proj = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, N, D), row by row."""
        tokens: Tensor = self.proj(self.blocks(image))
        return tokens.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        b, n, d = tokens.shape
        qkv = self.qkv(tokens).view(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, A, N, D / A)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # its gradient is slow there
            q, k, v = q.float(), k.float(), v.float()
        mixed = F.scaled_dot_product_attention(q, k, v).to(qkv.dtype)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(b, n, d))
        return projected


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D); GELU by the error function, not by tanh."""
        projected: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return projected


class Block(nn.Module):
    """Attention and MLP, both on residual branches.

    Attributes:
        drop_path: share of the crops for which a branch is left out, in training mode only.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.drop_path = 0.0
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        tokens = tokens + self._kept(self.attn(self.norm1(tokens)))
        mixed: Tensor = tokens + self._kept(self.mlp(self.norm2(tokens)))
        return mixed

    def _kept(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        keep = 1 - self.drop_path
        is_kept = torch.rand(len(branch), 1, 1, device=branch.device) < keep
        return branch * (is_kept / keep).to(branch.dtype)


class ViT(nn.Module):
    """Crops to tokens.

    Args:
        depth: number of blocks.
        dim: width D.
        num_heads: attention heads A; must divide `dim`.
        mlp_ratio: hidden width of the MLPs over `dim`.
        shrink: the image is seen so many times smaller; 2 and 4 make less work for small models.
        stem: of a `ConvEmbed`; empty for the published one convolution.
    """

    def __init__(
        self,
        *,
        depth: int,
        dim: int,
        num_heads: int,
        mlp_ratio: int = 4,
        shrink: int = 1,
        stem: tuple[tuple[int, int], ...] = (),
    ) -> None:
        super().__init__()
        self.image_hw = (IMAGE_HW[0] // shrink, IMAGE_HW[1] // shrink)
        num_tokens = (self.image_hw[0] // PATCH_PX) * (self.image_hw[1] // PATCH_PX)
        # Slot 0 belonged to a class token that is gone; it is added to every token.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_tokens, dim))
        self.patch_embed = ConvEmbed(dim, stem) if stem else PatchEmbed(dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.last_norm = nn.LayerNorm(dim, eps=NORM_EPSILON)

    def set_drop_path(self, last: float) -> None:
        """Stochastic depth in training: 0 in the first block, rising linearly to `last`."""
        for i, block in enumerate(self.blocks):
            cast(Block, block).drop_path = last * i / max(len(self.blocks) - 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Tokens of crops.

        Args:
            image: (B, 3, 256, 192) normalised RGB, or already so much smaller as it is seen.

        Returns:
            (B, N, D) in the dtype of the weights.
        """
        if image.shape[2:] != self.image_hw:
            image = F.avg_pool2d(image, image.shape[2] // self.image_hw[0])
        tokens = self.patch_embed(image) + self.pos_embed[:, 1:] + self.pos_embed[:, :1]
        for block in self.blocks:
            tokens = block(tokens)
        normalised: Tensor = self.last_norm(tokens)
        return normalised
