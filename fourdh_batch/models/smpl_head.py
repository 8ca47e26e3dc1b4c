"""Head of HMR 2.0: a transformer decoder with one query token, then linear read-outs.

`B` people, `N` context tokens, `C` their width, `E` width of the query, `A` heads of `G` numbers.
Parameter names are those of the published checkpoint.

Three savings that change results by rounding only:

- the query starts from the same vector for everybody (a zero goes into `to_token_embedding`);
- self-attention of a single token is the value projection: its softmax is 1;
- cross-attention never forms keys and values. With one query, `q . (Wk x) = (Wk^T q) . x` and
  `sum a_n (Wv x_n) = Wv (sum a_n x_n)`, so the 2 x 192 projections of every layer become two.
  That is 0.06 instead of 3.02 GFLOP per crop of the full model, all in float32.

Source: Goel et al., Humans in 4D, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourdh_batch.types import NUM_BETAS, NUM_BODY_JOINTS

NUM_POSE_NUMBERS = 6 * (1 + NUM_BODY_JOINTS)
NUM_CAM_NUMBERS = 3


class HeadOutput(NamedTuple):
    """Read-outs with the mean added.

    Attributes:
        pose6d: (B, 144) six numbers per joint, root first.
        betas: (B, 10).
        pred_cam: (B, 3) weak perspective (s, tx, ty).
        token_out: (B, E).
    """

    pose6d: Tensor
    betas: Tensor
    pred_cam: Tensor
    token_out: Tensor


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.inner = num_heads * head_dim
        self.to_qkv = nn.Linear(dim, 3 * self.inner, bias=False)  # q and k never act
        self.to_out = nn.Sequential(nn.Linear(self.inner, dim))

    def forward(self, query: Tensor) -> Tensor:
        """(B, E) to (B, E)."""
        value = F.linear(query, self.to_qkv.weight[2 * self.inner :])
        return cast(Tensor, self.to_out(value))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, context_dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.scale = head_dim**-0.5
        self.to_kv = nn.Linear(context_dim, 2 * inner, bias=False)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim))

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """(B, E), (B, N, C) to (B, E)."""
        batch, heads = len(query), self.num_heads
        to_k, to_v = self.to_kv.weight.view(2, heads, -1, context.shape[-1])  # (A, G, C)
        q = self.to_q(query).view(batch, heads, -1).transpose(0, 1)  # (A, B, G)
        probe = torch.bmm(q, to_k).transpose(0, 1)  # (B, A, C)
        weights = torch.softmax(torch.bmm(probe, context.transpose(1, 2)) * self.scale, dim=-1)
        mixed = torch.bmm(weights, context).transpose(0, 1)  # (A, B, C)
        value = torch.bmm(mixed, to_v.transpose(1, 2)).transpose(0, 1)  # (B, A, G)
        return cast(Tensor, self.to_out(value.reshape(batch, -1)))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        # Identities where the published code has dropout: they keep the names net.0 and net.3.
        self.net = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dim)
        )

    def forward(self, query: Tensor) -> Tensor:
        """(B, E) to (B, E)."""
        return cast(Tensor, self.net(query))


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, query: Tensor, *context: Tensor) -> Tensor:
        """(B, E) to (B, E): residual branch, normalised first."""
        return cast(Tensor, self.fn(self.norm(query), *context))


class Layers(nn.Module):
    """Decoder layers, each of self-attention, cross-attention and MLP; no norm after the last."""

    def __init__(self, layers: Iterable[nn.ModuleList]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """(B, E), (B, N, C) to (B, E)."""
        for layer in self.layers:
            self_attention, cross_attention, feed_forward = cast(nn.ModuleList, layer)
            query = query + self_attention(query)
            query = query + cross_attention(query, context)
            query = query + feed_forward(query)
        return query


class Decoder(nn.Module):
    """One query token that is the same for everybody, and what it reads from the context."""

    def __init__(self, dim: int, layers: Layers) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.to_token_embedding = nn.Linear(1, dim)  # its input is zero: only the bias acts
        self.transformer = layers

    def forward(self, context: Tensor) -> Tensor:
        """(B, N, C) to (B, E)."""
        start = self.to_token_embedding.bias + self.pos_embedding[0]  # (1, E)
        return cast(Tensor, self.transformer(start.expand(len(context), -1), context))


class SmplHead(nn.Module):
    """Tokens to SMPL parameters and crop camera.

    Args:
        dim: width E of the query.
        depth: decoder layers.
        num_heads, head_dim: A and G.
        mlp_dim: hidden width of the feed-forward parts.
        context_dim: width C of the backbone's tokens.
    """

    init_body_pose: Tensor
    init_betas: Tensor
    init_cam: Tensor

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        mlp_dim: int,
        context_dim: int,
    ) -> None:
        super().__init__()
        layers = (
            nn.ModuleList(
                (
                    PreNorm(dim, SelfAttention(dim, num_heads, head_dim)),
                    PreNorm(dim, CrossAttention(dim, context_dim, num_heads, head_dim)),
                    PreNorm(dim, FeedForward(dim, mlp_dim)),
                )
            )
            for _ in range(depth)
        )
        self.transformer = Decoder(dim, Layers(layers))
        self.decpose = nn.Linear(dim, NUM_POSE_NUMBERS)
        self.decshape = nn.Linear(dim, NUM_BETAS)
        self.deccam = nn.Linear(dim, NUM_CAM_NUMBERS)
        self.register_buffer("init_body_pose", torch.zeros(1, NUM_POSE_NUMBERS))
        self.register_buffer("init_betas", torch.zeros(1, NUM_BETAS))
        self.register_buffer("init_cam", torch.zeros(1, NUM_CAM_NUMBERS))

    def forward(self, tokens: Tensor) -> HeadOutput:
        """(B, N, C) float32 tokens of the backbone, as they are."""
        token_out = self.transformer(tokens)
        return HeadOutput(
            pose6d=self.init_body_pose + self.decpose(token_out),
            betas=self.init_betas + self.decshape(token_out),
            pred_cam=self.init_cam + self.deccam(token_out),
            token_out=token_out,
        )
