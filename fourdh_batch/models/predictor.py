"""Pose predictor of PHALP': a masked transformer over a track's past.

A track's poses are written into a row of `L` slots, one per frame; the network fills the empty
slots, behind the last pose as well as between two. Parameter names are those of the published
checkpoint; what it holds beyond them never acts.

Dimension letters: `K` tracks, `L` slots, `S` slots with a pose, `N` slots to be read, `D` width,
`A` heads of `G` numbers.

Savings that change results by rounding only (docs/PHALP.md, section 17):

- keys are few (at most 7 poses) and queries many: `q . k = x . (Wq^T k)` and
  `Wo sum a v = sum a (Wo v)`, so that per head and key one vector is projected in place of all L
  slots, and attention costs 2 A S instead of 2 A G + 2 A S products per number of a slot;
- in the last block keys are many and queries few: the same the other way round, and keys and
  values are never formed;
- both convolutions, which have as many windows as they have strides, are one matrix product each;
- only the slots asked for go through the rest of the last block and the read-outs.

Source: docs/PHALP.md, section 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourdh_batch.geometry import rot6d_to_rotmat
from fourdh_batch.models.precision import tf32
from fourdh_batch.models.smpl_head import NUM_CAM_NUMBERS, NUM_POSE_NUMBERS, FeedForward, PreNorm
from fourdh_batch.types import F32, I64, NUM_BETAS, NUM_BODY_JOINTS, Bool

NUM_POSE_VECTOR = 9 * (1 + NUM_BODY_JOINTS) + NUM_BETAS + 3  # 229
NUM_STATE = NUM_POSE_NUMBERS + NUM_BETAS + NUM_CAM_NUMBERS  # what the SMPL head improves
SMPL_HEAD_DIM = 1024  # as published
NUM_HEAD_STEPS = 3
EMPTY_LOGIT = -1000.0  # of a key without a pose
STD_EPSILON = 1e-10  # added to the divisor when poses are normalised


@dataclass(frozen=True, slots=True)
class PredictorSize:
    """Sizes of one pose predictor (docs/PHALP.md, section 5.1).

    Attributes:
        dim: width D.
        depth: blocks of the first transformer.
        num_heads, head_dim: A and G.
        mlp_dim: hidden width of the feed-forward parts.
        mid_dim: hidden width of the pose encoder.
        smpl_dim: hidden width of the SMPL head.
        frame_length: slots L.
        conv_stride, conv_pad: of both convolutions, whose kernels are stride + 2 pad long.
    """

    dim: int
    depth: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    mid_dim: int = NUM_POSE_VECTOR
    smpl_dim: int = SMPL_HEAD_DIM
    frame_length: int = 125
    conv_stride: int = 5
    conv_pad: int = 1

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least = 0 if name == "conv_pad" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if self.frame_length % self.conv_stride:
            raise ValueError(
                f"frame_length: expected a multiple of the stride {self.conv_stride}, "
                f"got {self.frame_length}"
            )


class Attention(nn.Module):
    """Attention for two lopsided cases: few keys, and few queries."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.scale = head_dim**-0.5
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim))

    def add_of_few_keys(
        self, onto: Tensor, tokens: Tensor, slot: Tensor, is_ignored: Tensor
    ) -> None:
        """Every slot looks at some.

        Args:
            onto: (K, L, D) to which the result is added.
            tokens: (K, L, D).
            slot: (K, S) slots that are keys.
            is_ignored: (K, S) keys that do not count.
        """
        (num_tracks, num_keys), heads, dim = slot.shape, self.num_heads, tokens.shape[-1]
        to_q, to_k, to_v = self.to_qkv.weight.view(3, -1, dim)  # (A G, D)
        to_out = cast(nn.Linear, self.to_out[0])

        def per_head(rows: Tensor, matrix: Tensor) -> Tensor:
            """(K S, A G) rows, (A, G, D) matrix: (K, A S, D)."""
            rows = torch.bmm(rows.view(len(rows), heads, -1).transpose(0, 1), matrix)
            rows = rows.view(heads, num_tracks, num_keys, dim).transpose(0, 1)
            return rows.reshape(num_tracks, heads * num_keys, dim)

        keys = _take(tokens, slot).view(-1, dim)
        probe = per_head(F.linear(keys, to_k) * self.scale, to_q.view(heads, -1, dim))
        back = to_out.weight.t().view(heads, -1, dim)
        value = per_head(F.linear(keys, to_v), back)
        logits = torch.bmm(probe, tokens.transpose(1, 2)).view(num_tracks, heads, num_keys, -1)
        logits.masked_fill_(is_ignored[:, None, :, None], EMPTY_LOGIT)
        # Slots are the last axis here: a soft-max over a short last axis is slow.
        weights = torch.softmax(logits, dim=2).view(num_tracks, heads * num_keys, -1)
        value[:, :num_keys] += to_out.bias  # the weights of a head, here the first, sum to one
        onto.baddbmm_(weights.transpose(1, 2), value)

    def forward(self, tokens: Tensor, is_ignored: Tensor) -> Tensor:
        """Every slot looks at every slot; with gradients, for training.

        Args:
            tokens: (K, L, D).
            is_ignored: (K, L) slots that are no keys.

        Returns:
            (K, L, D).
        """
        num_tracks, length, _ = tokens.shape
        qkv = self.to_qkv(tokens).view(num_tracks, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (K, A, L, G)
        mask = torch.zeros_like(is_ignored, dtype=q.dtype).masked_fill(is_ignored, EMPTY_LOGIT)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None, None].expand(-1, -1, length, -1), scale=self.scale
        )
        return cast(Tensor, self.to_out(mixed.transpose(1, 2).flatten(2)))

    def of_few_queries(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """Some slots look at all.

        Args:
            tokens: (K, L, D).
            queries: (K, N, D).

        Returns:
            (K, N, D).
        """
        (num_tracks, num_queries, dim), heads = queries.shape, self.num_heads
        to_q, to_k, to_v = self.to_qkv.weight.view(3, heads, -1, dim)  # (A, G, D)
        q = F.linear(queries.reshape(-1, dim), to_q.view(-1, dim)) * self.scale
        probe = torch.bmm(q.view(len(q), heads, -1).transpose(0, 1), to_k)  # (A, K N, D)
        probe = probe.transpose(0, 1).reshape(num_tracks, num_queries * heads, dim)
        weights = torch.softmax(torch.bmm(probe, tokens.transpose(1, 2)), dim=-1)
        mixed = torch.bmm(weights, tokens).view(-1, heads, dim).transpose(0, 1)  # (A, K N, D)
        value = torch.bmm(mixed, to_v.transpose(1, 2)).transpose(0, 1)  # (K N, A, G)
        return cast(Tensor, self.to_out(value.reshape(num_tracks, num_queries, -1)))


class Transformer(nn.Module):
    """Blocks of attention and MLP, each normalised first; no norm after the last."""

    def __init__(self, size: PredictorSize, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    PreNorm(size.dim, Attention(size.dim, size.num_heads, size.head_dim)),
                    PreNorm(size.dim, FeedForward(size.dim, size.mlp_dim)),
                )
            )
            for _ in range(depth)
        )

    def blocks(self) -> Iterator[tuple[nn.LayerNorm, Attention, PreNorm]]:
        """Norm and attention, and the feed-forward part with its norm."""
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            attention = cast(PreNorm, attention)
            yield attention.norm, cast(Attention, attention.fn), cast(PreNorm, feed_forward)


class IterativeSmplHead(nn.Module):
    """SMPL parameters of a token, improved step by step (docs/PHALP.md, section 5.4)."""

    init_body_pose: Tensor
    init_betas: Tensor
    init_cam: Tensor

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim + NUM_STATE, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.decpose = nn.Linear(hidden, NUM_POSE_NUMBERS)
        self.decshape = nn.Linear(hidden, NUM_BETAS)
        self.deccam = nn.Linear(hidden, NUM_CAM_NUMBERS)
        self.register_buffer("init_body_pose", torch.zeros(1, NUM_POSE_NUMBERS))
        self.register_buffer("init_betas", torch.zeros(1, NUM_BETAS))
        self.register_buffer("init_cam", torch.zeros(1, NUM_CAM_NUMBERS))

    def forward(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) to (N, 24, 3, 3) rotation matrices, root first, and (N, 10) betas."""
        dim = token.shape[-1]
        of_token = F.linear(token, self.fc1.weight[:, :dim], self.fc1.bias)  # in every step
        state = torch.cat((self.init_body_pose, self.init_betas, self.init_cam), dim=-1)
        for _ in range(NUM_HEAD_STEPS):
            hidden = F.relu(of_token + F.linear(state, self.fc1.weight[:, dim:]))
            hidden = F.relu(self.fc2(hidden))
            steps = self.decpose(hidden), self.decshape(hidden), self.deccam(hidden)
            state = state + torch.cat(steps, dim=-1)
        rot6d = state[:, :NUM_POSE_NUMBERS].reshape(len(token), -1, 6)
        return rot6d_to_rotmat(rot6d), state[:, NUM_POSE_NUMBERS:-NUM_CAM_NUMBERS]


class PoseTransformer(nn.Module):
    """The network (docs/PHALP.md, sections 5.3 and 5.4).

    `freeze` must be called after the weights have been set, before `tokens`.
    """

    conv_en_matrix: Tensor
    conv_de_matrix: Tensor
    empty: Tensor
    second_embedding: Tensor

    def __init__(self, size: PredictorSize) -> None:
        super().__init__()
        self.size = size
        dim, kernel = size.dim, size.conv_stride + 2 * size.conv_pad
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.pos_embedding_learned1 = nn.Parameter(torch.zeros(1, size.frame_length, dim))
        self.pos_embedding_learned2 = nn.Parameter(torch.zeros(1, size.frame_length, dim))
        self.transformer1 = Transformer(size, size.depth)
        self.transformer2 = Transformer(size, 1)
        self.conv_en = nn.Conv1d(dim, dim, kernel, size.conv_stride, size.conv_pad)
        self.conv_de = nn.ConvTranspose1d(dim, dim, kernel, size.conv_stride, size.conv_pad)
        self.pose_shape_encoder = nn.Sequential(
            nn.Linear(NUM_POSE_VECTOR, size.mid_dim), nn.ReLU(), nn.Linear(size.mid_dim, dim)
        )
        self.smpl_head = nn.ModuleList([IterativeSmplHead(dim, size.smpl_dim)])
        self.loca_head = nn.ModuleList(
            [
                nn.Sequential(
                    *(nn.Linear(dim, dim), nn.ReLU()),
                    *(nn.Linear(dim, dim), nn.ReLU()),
                    nn.Linear(dim, 3),
                )
            ]
        )

    def forward(self, pose: Tensor, is_seen: Tensor) -> Tensor:
        """Tokens of all slots, by the plain formulas and with gradients, for training.

        Args:
            pose: (K, L, 229) normalised pose vectors.
            is_seen: (K, L) slots that have one; the others' numbers are not looked at.

        Returns:
            (K, L, D); `tokens` gives the same up to rounding.
        """
        encoded = self.pose_shape_encoder(pose)
        tokens = torch.where(is_seen[..., None], encoded, self.mask_token.to(encoded.dtype))
        tokens = tokens + self.pos_embedding_learned1
        for norm, attention, feed_forward in self.transformer1.blocks():
            tokens = tokens + attention(norm(tokens), ~is_seen)
            tokens = tokens + feed_forward(tokens)
        tokens = cast(Tensor, self.conv_de(self.conv_en(tokens.transpose(1, 2)))).transpose(1, 2)
        tokens = tokens + self.pos_embedding_learned2
        for norm, attention, feed_forward in self.transformer2.blocks():
            tokens = tokens + attention(norm(tokens), torch.zeros_like(is_seen))
            tokens = tokens + feed_forward(tokens)
        return tokens

    @torch.no_grad()
    def freeze(self) -> PoseTransformer:
        """Make what depends on the weights only; call it again when they change."""
        dim = self.size.dim
        frozen = {
            "conv_en_matrix": self.conv_en.weight.permute(2, 1, 0).reshape(-1, dim),
            "conv_de_matrix": self.conv_de.weight.transpose(1, 2).reshape(dim, -1),
            "empty": self.mask_token + self.pos_embedding_learned1,
            "second_embedding": cast(Tensor, self.conv_de.bias) + self.pos_embedding_learned2,
        }
        for name, tensor in frozen.items():
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        return self.eval()

    def tokens(self, pose: Tensor, slot: Tensor, is_ignored: Tensor, wanted: Tensor) -> Tensor:
        """Tokens of some slots.

        Args:
            pose: (K, S, 229) normalised pose vectors.
            slot: (K, S) the slots that they belong to. Of those that are not ignored no two are
                the same.
            is_ignored: (K, S) pose vectors that do not count; the slot of such a one still has to
                exist. Where all are ignored, every slot must be listed.
            wanted: (K, N) slots to be read.

        Returns:
            (K, N, D).
        """
        tokens = self.empty.repeat(len(pose), 1, 1)  # (K, L, D)
        track, item = torch.nonzero(~is_ignored, as_tuple=True)
        used = slot[track, item]
        tokens[track, used] = (
            self.pose_shape_encoder(pose[track, item]) + self.pos_embedding_learned1[0, used]
        )
        for norm, attention, feed_forward in self.transformer1.blocks():
            attention.add_of_few_keys(tokens, norm(tokens), slot, is_ignored)
            tokens += feed_forward(tokens)
        tokens = self._bottleneck(tokens)
        tokens += self.second_embedding
        read = _take(tokens, wanted)
        for norm, attention, feed_forward in self.transformer2.blocks():
            tokens = norm(tokens)
            read = read + attention.of_few_queries(tokens, _take(tokens, wanted))
            read = read + feed_forward(read)
        return read

    def _bottleneck(self, tokens: Tensor) -> Tensor:
        """(K, L, D) to (K, L, D): `conv_en`, then `conv_de` without its bias."""
        (num_tracks, length, dim), stride = tokens.shape, self.size.conv_stride
        pad, num_windows = self.size.conv_pad, length // stride
        kernel = stride + 2 * pad
        window = F.pad(tokens, (0, 0, pad, pad)).unfold(1, kernel, stride).transpose(2, 3)
        code = torch.addmm(
            cast(Tensor, self.conv_en.bias), window.reshape(-1, kernel * dim), self.conv_en_matrix
        )  # (K windows, D)
        parts = (code @ self.conv_de_matrix).view(num_tracks, num_windows, kernel, dim)
        # Windows overlap: the first `stride` slots of each lie side by side, then those that
        # reach into the next window, and so on.
        joined = tokens.new_zeros(num_tracks, length + -(-kernel // stride) * stride, dim)
        for start in range(0, kernel, stride):
            part = parts[:, :, start : start + stride]
            place = joined[:, start : start + length].view(num_tracks, num_windows, stride, dim)
            place[:, :, : part.shape[2]] += part
        return joined[:, pad : pad + length]

    def read_out(self, token: Tensor) -> Tensor:
        """(N, D) to (N, 229) pose vectors, in natural units."""
        rotmats, betas = self.smpl_head[0](token)
        return torch.cat((rotmats.flatten(1), betas, self.loca_head[0](token)), dim=-1)


class PosePredictor:
    """A pose predictor with its weights; what `tracking.tracker.PosePredictor` asks for.

    Everything is float32, with TF32 off: predicted poses decide who is who.

    Args:
        network: with its weights.
        mean, std: (229,) of pose vectors.
        device: where it runs.
        weights_origin: one of `models.build.ORIGINS`.
        weights_digest: of weights, mean and standard deviation.

    Attributes:
        frame_length: slots L; the farthest frame that can be told is L - 1 after the first.
    """

    def __init__(
        self,
        network: PoseTransformer,
        mean: Tensor,
        std: Tensor,
        *,
        device: str | torch.device = "cpu",
        weights_origin: str = "imported",
        weights_digest: str = "",
    ) -> None:
        self.network = network.to(device).freeze().requires_grad_(False)
        self.mean, self.std = mean.to(device), std.to(device)
        self.device = torch.device(device)
        self.frame_length = network.size.frame_length
        self.weights_origin = weights_origin
        self.weights_digest = weights_digest

    def __call__(self, pose: F32, frame_index: I64, slot: I64) -> F32:
        """Predict K tracks at once, each at its own slot (docs/PHALP.md, sections 5.2 and 5.5).

        A track whose history is not finite gets a prediction that is not, and no other does.

        Args:
            pose: (K, S, 229) remembered pose vectors, oldest first.
            frame_index: (K, S) their frames.
            slot: (K,) frame to predict, counted from frame_index[:, 0]. What lies beyond the last
                slot, L - 1, is taken there, poses and predictions alike (section 15, Q4).

        Returns:
            (K, 229) pose vectors.
        """
        last = self.frame_length - 1
        pose_slot = (frame_index - frame_index[:, :1]).clip(0, last)
        # The newest of several poses in a slot counts.
        is_same = pose_slot[:, :, None] == pose_slot[:, None, :]
        is_ignored = np.triu(is_same, 1).any(axis=2)
        return self._predict(pose, pose_slot, is_ignored, slot.clip(0, last)[:, None])

    def complete(self, pose: F32, is_seen: Bool, wanted: I64) -> F32:
        """Poses of one stretch of a track, seen or not (docs/PHALP.md, section 13.2).

        Args:
            pose: (T, 229) pose vectors of T consecutive frames, at most L.
            is_seen: (T,) frames that have a pose; the others' numbers are not looked at.
            wanted: (N,) which to read, 0 to L - 1.

        Returns:
            (N, 229) pose vectors.

        Raises:
            ValueError: there are too many frames, or a wanted one lies outside the slots.
        """
        if len(pose) > self.frame_length:
            raise ValueError(f"expected at most {self.frame_length} frames, got {len(pose)}")
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.frame_length):
            raise ValueError(f"wanted: expected slots below {self.frame_length}, got {wanted}")
        pose_slot = np.flatnonzero(is_seen)
        if len(pose_slot):
            seen, is_ignored = pose[pose_slot], np.zeros(len(pose_slot), np.bool_)
        else:  # keys without a pose are all alike then, and all count
            pose_slot = np.arange(self.frame_length)
            seen = np.zeros((self.frame_length, NUM_POSE_VECTOR), np.float32)
            is_ignored = np.ones(self.frame_length, np.bool_)
        return self._predict(seen[None], pose_slot[None], is_ignored[None], wanted[None])

    @torch.inference_mode()
    def _predict(self, pose: F32, pose_slot: I64, is_ignored: Bool, wanted: I64) -> F32:
        """(K, S, 229), (K, S), (K, S), (K, N) to (K N, 229)."""
        if not wanted.size:
            return np.zeros((0, NUM_POSE_VECTOR), np.float32)
        with tf32(False):
            normalised = (self._tensor(pose) - self.mean) / (self.std + STD_EPSILON)
            slot, ignored = self._tensor(pose_slot), self._tensor(is_ignored)
            token = self.network.tokens(normalised, slot, ignored, self._tensor(wanted))
            vectors: F32 = self.network.read_out(token.flatten(0, 1)).cpu().numpy()
        return vectors

    def _tensor(self, array: F32 | I64 | Bool) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _take(tokens: Tensor, slot: Tensor) -> Tensor:
    """(K, L, D) tokens, (K, N) slots: (K, N, D)."""
    return tokens[torch.arange(len(slot), device=slot.device)[:, None], slot]
