"""How alike a track and a detection look: the texture encoder and what uses it.

`TextureMemory` is the published appearance cue: it keeps a texture map per track and compares
maps with the encoder, two passes per pair. `AppearanceProjection` turns a map into 256 numbers
that are stored with a detection; `tracking.appearance.CompactMemory` compares those without any
network.

Dimension letters: `B` maps, `P` pairs, `M` detections, `K` tracks, `S` = 256 side of a map,
`E` = 4096 numbers of an embedding, `D` = 256 numbers of a compact vector.

A *map* is a (4, S, S) uv vector of `models.texture`: RGB and a mask of +1 and -1. In here it is
kept *laid out* as (S, S, 4), which is how the convolutions want it, with a mask of 1 and 0 and RGB
0 where the mask is 0: masking a map then is one product.

Source: docs/PHALP.md, sections 4 (encoder, distance), 7 (memory) and 14 (weights).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models.build import ORIGINS
from fourdh_batch.models.checkpoint import (
    read_lightning_state_dict,
    read_safetensors,
    tensors_digest,
    write_safetensors,
)
from fourdh_batch.models.minis import TEXTURE, shipped
from fourdh_batch.models.precision import tf32
from fourdh_batch.models.texture import ATLAS_PX, NUM_CHANNELS, unpack_texture
from fourdh_batch.types import F64, I64, FrameDetections

NUM_EMBEDDING = 4096
NUM_COMPACT = 256
EMBEDDING_SCALE = 1000.0  # embeddings are divided by it before they are compared
DISTANCE_SCALE = 100.0
MIXING_GAIN = 0.1  # alpha of section 7
# A distance was at most 1.3 times its estimate at half resolution for maps like those of people,
# and 10.1 times for white noise, the worst that was tried.
BOUND_GUARD = 16.0
# Name, input and output channels; a 2 x 2 maximum follows the first four.
LAYERS = (
    ("conv1x", 4, 16),
    ("conv2", 16, 64),
    ("conv3", 64, 128),
    ("conv4", 128, 256),
    ("conv5", 256, 256),
    ("conv5_1", 256, 16),
)
NUM_POOLED = 4
# Maps per pass: the activations of more leave a CPU core's caches; a GPU wants many.
MAPS_PER_PASS = {"cpu": 2, "other": 64}

PUBLISHED_ENTRY = "model"  # of hmar_v2_weights.pth
NUM_PUBLISHED_PREFIX = 5  # characters before the names in it
PUBLISHED_PART = "encoding_head."
KIND = "texture_encoder"  # in the metadata of our own files
UNTRAINED_GAIN = 2.0  # puts the distances of untrained weights where the cost is sensitive

_FULL = -1  # in place of the other map of a pair: the map is not cut by it


class TextureEncoder(nn.Module):
    """Six 3 x 3 convolutions, 0.95 G products per map.

    Always float32 without TF32: the distances decide who is who. Two things differ from the
    published program and change no result: the rectifier acts after the maximum, which it commutes
    with, on a quarter of the numbers, and activations lie with their channels last.

    Args:
        weights_origin: one of `models.build.ORIGINS`.
        weights_digest: of the weights.
    """

    def __init__(self, *, weights_origin: str = "untrained", weights_digest: str = "") -> None:
        super().__init__()
        for name, num_in, num_out in LAYERS:
            self.add_module(name, nn.Conv2d(num_in, num_out, 3, padding=1))
        self.weights_origin = weights_origin
        self.weights_digest = weights_digest

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def maps_per_pass(self) -> int:
        """Maps that go through the network at once."""
        return MAPS_PER_PASS.get(self.device.type, MAPS_PER_PASS["other"])

    @torch.no_grad()
    def embed(self, maps: Tensor) -> Tensor:
        """Embeddings of maps; a map's embedding depends on its companions by rounding at most.

        Args:
            maps: (B, 4, S, S) float32, in any memory layout (channels last is fastest); fit for
                `texture_distance` are maps that are 0 in all four channels outside a mask and 1
                in the fourth inside. Smaller maps have smaller embeddings.

        Returns:
            (B, E) float32, channel-major, not yet divided by `EMBEDDING_SCALE`.

        Source: docs/PHALP.md, section 4.
        """
        if not len(maps):
            return torch.empty(0, NUM_EMBEDDING, device=self.device)
        size = self.maps_per_pass * ATLAS_PX**2 // (maps.shape[2] * maps.shape[3])
        with tf32(False):
            return torch.cat([self(part) for part in torch.split(maps, size)])

    def forward(self, maps: Tensor) -> Tensor:
        """What `embed` gives, in one pass and with gradients, for training."""
        x = maps.to(self.device).contiguous(memory_format=torch.channels_last)
        for i, (name, _, _) in enumerate(LAYERS):
            x = self.get_submodule(name)(x)
            if i < NUM_POOLED:
                x = F.max_pool2d(x, 2)
            x = x.relu_()
        return x.flatten(1)  # (B, 16 * 16 * 16)


def texture_distance(
    encoder: TextureEncoder, track_maps: Tensor, detection_maps: Tensor
) -> tuple[Tensor, Tensor]:
    """How differently P pairs look where both are seen.

    Args:
        encoder: see `TextureEncoder`.
        track_maps: (P, 4, S, S) uv vectors, RGB and a mask above 0.5 where the person is seen.
        detection_maps: (P, 4, S, S) likewise.

    Returns:
        (P,) float64 distances, 0 or more, and exactly 0 for pairs that share no texel (section 15,
        Q7); (P,) float64 overlaps as the reference counts them: half the share of the map's texels
        that both see.

    Source: docs/PHALP.md, section 4.
    """
    device = encoder.device
    track, detection = _lay_out(track_maps.to(device)), _lay_out(detection_maps.to(device))
    both = track[..., 3:] * detection[..., 3:]
    num_shared = both.sum(dim=(1, 2, 3), dtype=torch.float64)
    distance = torch.zeros_like(num_shared)
    rows = torch.nonzero(num_shared)[:, 0]
    # One pair after the other, so that both its maps are in one pass.
    maps = torch.stack((track[rows], detection[rows]), dim=1) * both[rows, None]
    embedding = encoder.embed(maps.flatten(0, 1).permute(0, 3, 1, 2))
    distance[rows] = embedding_distance(embedding[0::2], embedding[1::2])
    return distance, num_shared / (2 * ATLAS_PX * ATLAS_PX)


def embedding_distance(track: Tensor, detection: Tensor) -> Tensor:
    """(P,) float64 distances of (P, E) embeddings, 0 or more.

    Source: docs/PHALP.md, section 4.
    """
    difference = (track.double() - detection.double()) / EMBEDDING_SCALE
    return DISTANCE_SCALE * difference.square().sum(dim=1)


class _Look(NamedTuple):
    """A map cut down to what it shares with another one."""

    is_track: bool
    own: int  # track id or detection row
    other: int  # detection row or track id; `_FULL`: all of it is shared


class _FrameLooks:
    """What is known of one frame until its tracks are told apart."""

    def __init__(self, frame: FrameDetections, maps: Tensor) -> None:
        self.frame = frame
        self.maps = maps  # (M, S, S, 4) laid out
        self.distance: dict[tuple[int, int], float] = {}
        self.embedding: dict[_Look, Tensor] = {}


class TextureMemory:
    """The tracker's `TextureTerm`: a map of all that was ever seen of every track.

    Detections carry their maps in `FrameDetections.appearance`: (M, 4, S, S) uint8 of
    `models.texture.pack_texture`, or float uv vectors, which are taken as they are.

    In a frame no pair is compared twice, and a map that lies wholly within its partner's is encoded
    once for all such partners. A track takes 1 MiB on the device.

    Args:
        encoder: its device keeps the maps.
        alpha: gain of the mixing; a match mixes in `alpha * score ** 2` of the detection.

    Source: docs/PHALP.md, sections 4, 7 and 15 (Q7, Q22).
    """

    def __init__(self, encoder: TextureEncoder, *, alpha: float = MIXING_GAIN) -> None:
        self.encoder = encoder
        self.alpha = alpha
        self.reset()

    def reset(self) -> None:
        """Forget all tracks and give the memory back."""
        self._slot: dict[int, int] = {}
        self._free: list[int] = []
        self._maps = torch.empty(0, ATLAS_PX, ATLAS_PX, NUM_CHANNELS, device=self.encoder.device)
        self._looks: _FrameLooks | None = None

    def distances(self, frame: FrameDetections, track_id: I64, detection_row: I64) -> F64:
        """(P,) texture distances of the pairs (track_id[i], detection_row[i]).

        Raises:
            ValueError: the frame carries no maps, or a track was never seen.
        """
        pairs = list(zip(track_id.tolist(), detection_row.tolist(), strict=True))
        unseen = sorted({track for track, _ in pairs} - set(self._slot))
        if unseen:
            raise ValueError(f"frame {frame.frame_index}: no map of the tracks {unseen}")
        looks = self._of_frame(frame)
        new = [pair for pair in dict.fromkeys(pairs) if pair not in looks.distance]
        self._compare(looks, new)
        return np.array([looks.distance[pair] for pair in pairs], dtype=np.float64)

    def bounds(self, frame: FrameDetections, track_id: I64, detection_row: I64) -> F64:
        """Estimates that the distances of these pairs do not reach, at a quarter of their price.

        The maps are compared at half their resolution, and `BOUND_GUARD` times that is the bound:
        no proof, but an ample distance from all that was measured.

        Returns:
            (P,).
        """
        looks, found = self._of_frame(frame), [np.empty(0)]
        pairs = list(zip(track_id.tolist(), detection_row.tolist(), strict=True))
        for part in self._parts(pairs):
            track = torch.stack([self._maps[self._slot[track]] for track, _ in part])
            detection = looks.maps[[row for _, row in part]]
            maps = torch.stack((track, detection), dim=1)  # both maps of a pair in one pass
            maps = maps * (track[..., 3:] * detection[..., 3:])[:, None]
            small = F.avg_pool2d(maps.flatten(0, 1).permute(0, 3, 1, 2), 2)
            embedding = self.encoder.embed(small)
            quarter = embedding_distance(
                embedding[0::2], embedding[1::2]
            )  # a quarter of the numbers
            found.append(BOUND_GUARD * 4 * quarter.cpu().numpy())
        return np.concatenate(found)

    def observe(self, frame: FrameDetections, track_id: I64, live_track_id: I64) -> None:
        """Mix the maps of a frame into those of their tracks.

        Where both are seen, `(1 - a) old + a new` with `a = alpha * score ** 2`; where one is, that
        one. The masks grow together. A new track's map is its detection's.

        Args:
            frame: the frame.
            track_id: (M,) track of each detection, old or new; -1 for a refused detection.
            live_track_id: tracks that are still followed; all others are forgotten.

        Raises:
            ValueError: the frame carries no maps.
        """
        live = set(live_track_id.tolist())
        for track in self._slot.keys() - live:
            self._free.append(self._slot.pop(track))
        looks = self._of_frame(frame)
        row_of = {track: row for row, track in enumerate(track_id.tolist()) if track in live}
        old = [track for track in row_of if track in self._slot]
        new = [track for track in row_of if track not in self._slot]
        score = np.asarray(frame.score, dtype=np.float64)
        gain = torch.from_numpy(self.alpha * score**2).float().to(self._maps.device)
        for track in old:  # in place: gathering maps and putting them back costs more than mixing
            row, before = row_of[track], self._maps[self._slot[track]]
            seen = looks.maps[row]
            # The mask takes part: 1 stays 1, and 0 becomes what the detection has.
            is_seen = seen[..., 3:]
            before.lerp_(seen, torch.where(before[..., 3:] > 0, gain[row] * is_seen, is_seen))
        for slot, track in zip(self._take_slots(len(new)), new, strict=True):
            self._slot[track] = slot
            self._maps[slot] = looks.maps[row_of[track]]
        self._looks = None

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything remembered, exactly, with nothing for texels that were never seen.

        Returns:
            ``track_id`` (K,) int64; ``mask`` (K, S * S / 8) uint8, eight texels a byte; ``rgb``
            (N, 3) float32 of all texels in the masks, track by track and row by row.
        """
        maps = [self._maps[slot].cpu().numpy() for slot in self._slot.values()]
        seen = [laid_out[..., 3] > 0 for laid_out in maps]
        rgb = [laid_out[is_seen][:, :3] for laid_out, is_seen in zip(maps, seen, strict=True)]
        return {
            "track_id": np.array(list(self._slot), dtype=np.int64),
            "mask": np.packbits(
                np.array(seen, dtype=bool).reshape(len(seen), ATLAS_PX * ATLAS_PX), axis=1
            ),
            "rgb": np.concatenate([np.empty((0, 3), np.float32), *rgb]),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: an array is missing, one too many, or of another size.
        """
        expected = {"track_id", "mask", "rgb"}
        if set(state) != expected:
            raise ValueError(f"texture state: expected {sorted(expected)}, got {sorted(state)}")
        track_id, mask, rgb = state["track_id"], state["mask"], state["rgb"]
        num_bytes = ATLAS_PX * ATLAS_PX // 8
        if mask.shape != (len(track_id), num_bytes):
            raise ValueError(
                f"texture state: expected masks {(len(track_id), num_bytes)}, got {mask.shape}"
            )
        seen = np.unpackbits(mask, axis=1).astype(bool)
        ends = np.cumsum(seen.sum(axis=1))
        if rgb.shape != (ends[-1] if len(ends) else 0, 3):
            raise ValueError(f"texture state: expected RGB of {seen.sum()} texels, got {rgb.shape}")
        self.reset()
        for slot, track, is_seen, values in zip(
            self._take_slots(len(track_id)),
            track_id.tolist(),
            seen,
            np.split(rgb, ends[:-1]) if len(ends) else [],
            strict=True,
        ):
            laid_out = np.zeros((ATLAS_PX * ATLAS_PX, NUM_CHANNELS), np.float32)
            laid_out[is_seen, :3] = values
            laid_out[:, 3] = is_seen
            self._slot[track] = slot
            self._maps[slot] = torch.from_numpy(laid_out).view(ATLAS_PX, ATLAS_PX, NUM_CHANNELS)

    def maps(self, track_id: Sequence[int]) -> Tensor:
        """(K, 4, S, S) float32 uv vectors of tracks, mask +1 and -1."""
        maps = self._maps[[self._slot[track] for track in track_id]].permute(0, 3, 1, 2)
        return torch.cat((maps[:, :3], maps[:, 3:] * 2 - 1), dim=1)

    def _of_frame(self, frame: FrameDetections) -> _FrameLooks:
        if self._looks is None or self._looks.frame is not frame:
            self._looks = _FrameLooks(frame, _frame_maps(frame, self.encoder.device))
        return self._looks

    def _compare(self, looks: _FrameLooks, pairs: list[tuple[int, int]]) -> None:
        """Find the distances of pairs that are not known yet."""
        looks_of: dict[tuple[int, int], tuple[_Look, _Look]] = {}
        for part in self._parts(pairs):
            track = torch.stack([self._maps[self._slot[track], ..., 3] for track, _ in part])
            detection = torch.stack([looks.maps[row, ..., 3] for _, row in part])
            shared = (track * detection).sum(dim=(1, 2))
            counts = torch.stack((shared, track.sum(dim=(1, 2)), detection.sum(dim=(1, 2))), dim=1)
            for (track_id, row), (num_shared, num_track, num_row) in zip(
                part, counts.tolist(), strict=True
            ):
                if not num_shared:
                    looks.distance[track_id, row] = 0.0
                    continue
                looks_of[track_id, row] = (
                    _Look(True, track_id, _FULL if num_shared == num_track else row),
                    _Look(False, row, _FULL if num_shared == num_row else track_id),
                )
        unknown = [
            look
            for look in dict.fromkeys(chain.from_iterable(looks_of.values()))
            if look not in looks.embedding
        ]
        for part_looks in self._parts(unknown):
            maps = torch.stack([self._own(looks, look) for look in part_looks])
            maps *= torch.stack([self._other(looks, look)[..., 3:] for look in part_looks])
            embeddings = self.encoder.embed(maps.permute(0, 3, 1, 2))
            looks.embedding.update(zip(part_looks, embeddings, strict=True))
        for part in self._parts(list(looks_of)):
            found = embedding_distance(
                torch.stack([looks.embedding[looks_of[pair][0]] for pair in part]),
                torch.stack([looks.embedding[looks_of[pair][1]] for pair in part]),
            )
            looks.distance.update(zip(part, found.tolist(), strict=True))
        looks.embedding = {k: v for k, v in looks.embedding.items() if k.other == _FULL}

    def _own(self, looks: _FrameLooks, look: _Look) -> Tensor:
        return self._maps[self._slot[look.own]] if look.is_track else looks.maps[look.own]

    def _other(self, looks: _FrameLooks, look: _Look) -> Tensor:
        if look.other == _FULL:
            return self._own(looks, look)
        return looks.maps[look.other] if look.is_track else self._maps[self._slot[look.other]]

    def _parts(self, items: list[Any]) -> Iterator[list[Any]]:
        size = self.encoder.maps_per_pass
        return (items[start : start + size] for start in range(0, len(items), size))

    def _take_slots(self, num: int) -> list[int]:
        """Slots for new tracks; there is always room for twice as many as were needed so far."""
        missing = num - len(self._free)
        if missing > 0:
            before = len(self._maps)
            more = max(missing, before)
            self._maps = torch.cat((self._maps, self._maps.new_zeros(more, *self._maps.shape[1:])))
            self._free.extend(range(before + more - 1, before - 1, -1))
        return [self._free.pop() for _ in range(num)]


class AppearanceProjection:
    """Looks of a detection in 256 numbers, small enough to be stored for every detection.

    What is not seen of a person counts as seen, in the mean colour of what is: cut by its own mask
    alone a map would mostly tell which side of the person is visible (in the recorded sequences
    two looks at one person are then nearer than looks at two persons in 6 of 10 cases, filled in
    9.4 to 10 of 10, with untrained weights; how trained weights take filled maps is not known).
    The embedding of the filled map, divided by 1000, is multiplied by a fixed matrix of random
    signs. A hundred times the squared distance of two such vectors estimates that of the whole
    embeddings with a relative standard deviation of `sqrt(2 / 256)` = 9 % (Johnson and
    Lindenstrauss), and is of the size of the distance of section 4. Rounding to float16 moves a
    distance, before it is squared, by at most 0.05 % of both vectors' lengths together.

    Vectors can be compared when weights and seed are the same.

    Args:
        encoder: see `TextureEncoder`.
        seed: of the signs.
    """

    def __init__(self, encoder: TextureEncoder, *, seed: int = 0) -> None:
        self.encoder = encoder
        stream = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:appearance".encode())))
        signs = np.where(stream.random((NUM_EMBEDDING, NUM_COMPACT)) < 0.5, -1, 1)
        scale = 1 / (EMBEDDING_SCALE * np.sqrt(NUM_COMPACT))
        self._signs = torch.from_numpy((signs * scale).astype(np.float32)).to(encoder.device)

    @torch.no_grad()
    def __call__(self, textures: Tensor) -> Tensor:
        """Compact vectors of maps.

        Args:
            textures: (B, 4, S, S) uint8 of `models.texture.pack_texture`, or float uv vectors.

        Returns:
            (B, D) float16; NaN for a map on which nothing is seen.
        """
        maps = _lay_out(_uv_vectors(textures.to(self.encoder.device)))
        vectors = maps.new_full((len(maps), NUM_COMPACT), torch.nan)
        rows = torch.nonzero(maps[..., 3].any(dim=2).any(dim=1))[:, 0]
        maps = maps[rows]
        mask = maps[..., 3:]
        mean = maps.sum(dim=(1, 2), keepdim=True) / mask.sum(dim=(1, 2), keepdim=True)
        maps = torch.where(mask > 0, maps, mean)  # the mean of the mask itself is 1
        embedding = self.encoder.embed(maps.permute(0, 3, 1, 2))
        with tf32(False):
            vectors[rows] = embedding @ self._signs
        return vectors.half()


# ---------------------------------------------------------------- weights


def load_texture_encoder(path: str | Path, *, device: str | torch.device = "cpu") -> TextureEncoder:
    """The encoder from a file.

    Args:
        path: the published ``hmar_v2_weights.pth``, or ``.safetensors`` of
            `import_texture_encoder`; the word ``mini`` for the one that comes with the package.
        device: where it shall work.

    Returns:
        The encoder; its `weights_origin` is what the file says, ``imported`` where it says nothing.

    Raises:
        CheckpointError: the file is missing, damaged, refers to code, or lacks a tensor.
    """
    weights, metadata = _read(shipped(path, TEXTURE))
    return _build(weights, metadata.get("origin", "imported"), device)


def import_texture_encoder(src: str | Path, dst: str | Path, *, origin: str = "official") -> str:
    """Turn the published file into safetensors, once, so that no pickle is read again.

    Args:
        src: the published ``hmar_v2_weights.pth``.
        dst: the ``.safetensors`` to write.
        origin: ``official`` for the file of the authors, else ``imported``; nothing in the file
            tells them apart.

    Returns:
        The digest of the weights.

    Raises:
        CheckpointError: as `load_texture_encoder`.
        ValueError: there is no such origin.
    """
    if origin not in ORIGINS:
        raise ValueError(f"origin: expected one of {ORIGINS}, got {origin!r}")
    weights, _ = _read(Path(src))
    digest = tensors_digest(weights)
    write_safetensors(dst, weights, {"kind": KIND, "origin": origin, "digest": digest})
    return digest


def save_texture_encoder(encoder: TextureEncoder, path: str | Path) -> str:
    """Write an encoder as safetensors, with its own origin; gives back its digest."""
    weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    digest = tensors_digest(weights)
    metadata = {"kind": KIND, "origin": encoder.weights_origin, "digest": digest}
    write_safetensors(path, weights, metadata)
    return digest


def untrained_texture_encoder(
    seed: int = 0, *, device: str | torch.device = "cpu"
) -> TextureEncoder:
    """An encoder with seeded random weights, the same on any machine.

    Its distances are in a sensible range, and it tells colours apart, but it has learned nothing.
    """
    weights = {}
    for name, shape in _expected_shapes().items():
        seed_of = zlib.crc32(f"{seed}:{PUBLISHED_PART}{name}".encode())
        uniform = np.random.Generator(np.random.PCG64(seed_of)).random(int(np.prod(shape)))
        limit = 0.1 if len(shape) == 1 else UNTRAINED_GAIN * np.sqrt(3 / np.prod(shape[1:]))
        values = (-limit + 2 * limit * uniform).astype(np.float32).reshape(shape)
        weights[name] = torch.from_numpy(values)
    return _build(weights, "untrained", device)


def _expected_shapes() -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.{part}": shape
        for name, num_in, num_out in LAYERS
        for part, shape in (("weight", (num_out, num_in, 3, 3)), ("bias", (num_out,)))
    }


def _build(
    weights: Mapping[str, Tensor], origin: str, device: str | torch.device
) -> TextureEncoder:
    encoder = TextureEncoder(weights_origin=origin, weights_digest=tensors_digest(weights))
    encoder.load_state_dict(weights)
    encoder = encoder.requires_grad_(False).eval()
    return encoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The twelve tensors as float32, and what our own files say of them."""
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        found, metadata = read_safetensors(path)
        _check_metadata(path, metadata)
    else:
        published = read_lightning_state_dict(path, entry=PUBLISHED_ENTRY)
        found = {}
        for full_name, tensor in published.items():
            name = full_name[NUM_PUBLISHED_PREFIX:]
            if not name.startswith(PUBLISHED_PART):
                continue
            if name.removeprefix(PUBLISHED_PART) in found:
                raise CheckpointError(
                    f"{path}: expected one tensor {name} behind a prefix of "
                    f"{NUM_PUBLISHED_PREFIX} characters, got several, such as {full_name}"
                )
            found[name.removeprefix(PUBLISHED_PART)] = tensor
    expected = _expected_shapes()
    if "conv1x.weight" not in found and "conv1.weight" in found:
        raise CheckpointError(
            f"{path}: expected a 4c texture encoder, which sees colour and mask (conv1x), "
            "got a 3c one, which sees colour only (conv1)"
        )
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{path}: expected the {len(expected)} tensors of the texture encoder, "
            f"missing: {', '.join(missing)}"
        )
    misfits = [
        f"{name} (expected floating point {shape}, got {found[name].dtype} "
        f"{tuple(found[name].shape)})"
        for name, shape in expected.items()
        if tuple(found[name].shape) != shape or not found[name].is_floating_point()
    ]
    if misfits:
        raise CheckpointError(f"{path}: texture encoder: {'; '.join(misfits)}")
    weights = {name: found[name].float() for name in expected}
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise CheckpointError(f"{path}: texture encoder: expected finite weights, got NaN or inf")
    digest = tensors_digest(weights)
    if metadata.get("digest", digest) != digest:
        raise CheckpointError(
            f"{path}: expected weights of digest {metadata['digest']}, got {digest}; "
            "the file is damaged, make or fetch it again"
        )
    return weights, metadata


def _check_metadata(path: str | Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("kind", KIND) != KIND or metadata.get("origin", "imported") not in ORIGINS:
        raise CheckpointError(
            f"{path}: expected a {KIND} and an origin of {ORIGINS}, got {dict(metadata)}"
        )


# ---------------------------------------------------------------- maps


def _frame_maps(frame: FrameDetections, device: torch.device) -> Tensor:
    """(M, S, S, 4) laid out maps of a frame's detections."""
    num = len(frame.people)
    if frame.appearance is None:
        if num:
            raise ValueError(
                f"frame {frame.frame_index}: expected texture maps of {num} people, got none"
            )
        return torch.empty(0, ATLAS_PX, ATLAS_PX, NUM_CHANNELS, device=device)
    # A copy: arrays that were shared are read-only, which PyTorch has no word for.
    maps = torch.from_numpy(np.array(frame.appearance, order="C")).to(device)
    try:
        return _lay_out(_uv_vectors(maps))
    except ValueError as error:
        raise ValueError(f"frame {frame.frame_index}: {error}") from None


def _uv_vectors(textures: Tensor) -> Tensor:
    """(B, 4, S, S) maps of either form as float32 uv vectors."""
    is_packed = textures.dtype == torch.uint8
    if textures.shape[1:] != (NUM_CHANNELS, ATLAS_PX, ATLAS_PX) or not (
        is_packed or textures.is_floating_point()
    ):
        raise ValueError(
            f"expected maps (M, {NUM_CHANNELS}, {ATLAS_PX}, {ATLAS_PX}) of uint8 or float, "
            f"got {tuple(textures.shape)} of {textures.dtype}"
        )
    return unpack_texture(textures) if is_packed else textures.float()


def _lay_out(maps: Tensor) -> Tensor:
    """(B, 4, S, S) uv vectors to (B, S, S, 4) with a mask of 1 and 0."""
    mask = (maps[:, 3] > 0.5).float()
    laid_out = torch.empty(len(maps), ATLAS_PX, ATLAS_PX, NUM_CHANNELS, device=maps.device)
    torch.mul(maps.permute(0, 2, 3, 1), mask[..., None], out=laid_out)
    laid_out[..., 3] = mask
    return laid_out
