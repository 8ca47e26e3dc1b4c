"""The appearance cue: encoder, memories, compact vectors and the way of the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fourdh_batch.errors import CheckpointError
from fourdh_batch.models import appearance
from fourdh_batch.models.appearance import (
    EMBEDDING_SCALE,
    AppearanceProjection,
    TextureEncoder,
    TextureMemory,
    import_texture_encoder,
    load_texture_encoder,
    texture_distance,
    untrained_texture_encoder,
)
from fourdh_batch.models.build import weights_origin
from fourdh_batch.models.checkpoint import write_safetensors
from fourdh_batch.models.texture import unpack_texture
from fourdh_batch.tracking import appearance as compact
from fourdh_batch.tracking.appearance import CompactMemory
from fourdh_batch.tracking.tracker import PhalpTracker, TextureTerm
from fourdh_batch.types import F64, FrameDetections
from tests.golden.phalp_recipe import TEXTURE_ENCODER_SHAPES
from tests.golden.phalp_recipe import weights as recipe_weights
from tests.texture_maps import SIDE, random_maps
from tests.tracking_scenes import frame_of_boxes

# Order of sums only: a map's companions change which kernel the library picks.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def encoder() -> TextureEncoder:
    return untrained_texture_encoder(1)


@pytest.fixture(scope="module")
def looks() -> np.ndarray:
    """Four maps, the last of which sees nothing."""
    maps = random_maps(4, seed=7)
    maps[3] = 0
    return maps


def frame_with(appearance: Any, *, index: int = 0, score: float = 0.9) -> FrameDetections:
    boxes = [[300 * i, 100, 300 * i + 80, 300] for i in range(len(appearance))]
    frame = frame_of_boxes(index, boxes)
    return replace(frame, appearance=appearance, score=np.full(len(boxes), score, np.float32))


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def remembering(encoder: TextureEncoder, looks: np.ndarray) -> TextureMemory:
    """Tracks 1 to M have the looks."""
    memory = TextureMemory(encoder)
    tracks = np.arange(1, len(looks) + 1)
    memory.observe(frame_with(looks), tracks, tracks)
    return memory


class CountingEncoder(TextureEncoder):
    """Counts what it is asked."""

    num_maps = 0

    def embed(self, maps: Tensor) -> Tensor:
        self.num_maps += len(maps)
        return super().embed(maps)


@pytest.fixture
def counting(encoder: TextureEncoder) -> CountingEncoder:
    counting = CountingEncoder()
    counting.load_state_dict(encoder.state_dict())
    return counting


# ---------------------------------------------------------------- encoder


def test_embedding_is_that_of_the_plain_published_order_of_layers(
    encoder: TextureEncoder, looks: np.ndarray
) -> None:
    maps = unpack_texture(torch.from_numpy(looks[:3]))
    x = maps
    with torch.no_grad():
        for i, layer in enumerate(encoder.children()):
            assert isinstance(layer, torch.nn.Conv2d)
            x = torch.relu(torch.conv2d(x, layer.weight, layer.bias, padding=1))
            if i < 4:
                x = torch.max_pool2d(x, 2)
    expected = x.reshape(3, 4096)
    assert (encoder.embed(maps) - expected).abs().max() <= ROUNDING * expected.max()


@pytest.mark.parametrize("maps_per_pass", [1, 3, 64])
def test_embedding_does_not_depend_on_companions(
    encoder: TextureEncoder,
    looks: np.ndarray,
    maps_per_pass: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps = unpack_texture(torch.from_numpy(looks))
    expected = encoder.embed(maps)
    monkeypatch.setitem(appearance.MAPS_PER_PASS, "cpu", maps_per_pass)
    found = encoder.embed(maps.flip(0)).flip(0)
    assert (found - expected).abs().max() <= ROUNDING * expected.max()
    assert encoder.embed(maps[:0]).shape == (0, 4096)


def test_embedding_leaves_its_input_alone(encoder: TextureEncoder, looks: np.ndarray) -> None:
    maps = unpack_texture(torch.from_numpy(looks[:2])).contiguous(memory_format=torch.channels_last)
    before = maps.clone()
    encoder.embed(maps)
    assert torch.equal(maps, before)


def test_q7_pairs_without_a_common_texel_are_at_exactly_0_and_cost_nothing(
    counting: CountingEncoder, looks: np.ndarray
) -> None:
    left, right = looks[:1].copy(), looks[:1].copy()
    left[..., SIDE // 2 :] = 0
    right[..., : SIDE // 2] = 0
    maps = [unpack_texture(torch.from_numpy(side)) for side in (left, right)]
    distance, overlap = texture_distance(counting, *maps)
    assert (float(distance), float(overlap)) == (0, 0)
    memory = remembering(counting, np.concatenate([left, looks[3:]]))
    found = memory.distances(frame_with(right, index=1), ids(1, 2), ids(0, 0))
    assert found.tolist() == [0, 0]
    assert counting.num_maps == 0


# ---------------------------------------------------------------- memory of maps


def test_memory_gives_the_distances_of_section_4(
    encoder: TextureEncoder, looks: np.ndarray
) -> None:
    memory: TextureTerm = remembering(encoder, looks[:2])
    detections = np.concatenate([looks[2:], looks[:1]])
    found = memory.distances(
        frame_with(detections, index=1), ids(1, 2, 1, 2, 1), ids(0, 0, 2, 1, 2)
    )
    maps = unpack_texture(torch.from_numpy(np.concatenate([looks[:2], detections])))
    expected, _ = texture_distance(encoder, maps[[0, 1, 0, 1, 0]], maps[[2, 2, 4, 3, 4]])
    assert found == pytest.approx(expected.numpy(), rel=ROUNDING)
    assert found[:2].min() > 0.05
    assert found[2:].tolist() == [0, 0, 0]  # itself, nothing seen, itself


def test_distances_do_not_depend_on_order_or_rounds(
    encoder: TextureEncoder, looks: np.ndarray
) -> None:
    memory = remembering(encoder, looks[:2])
    track, row = (grid.ravel() for grid in np.indices((2, 2)))
    detections = looks[1:3]
    at_once = memory.distances(frame_with(detections, index=1), track + 1, row)
    frame = frame_with(detections[::-1], index=1)
    backwards = [
        memory.distances(frame, ids(t + 1), ids(1 - r))[0] for t, r in zip(track, row, strict=True)
    ]
    assert backwards == pytest.approx(at_once, rel=ROUNDING, abs=1e-12)


def test_no_pair_is_computed_twice_in_a_frame(counting: CountingEncoder, looks: np.ndarray) -> None:
    memory = remembering(counting, looks[:2])
    frame = frame_with(looks[2:3], index=1)
    first = memory.distances(frame, ids(1, 1), ids(0, 0))
    assert counting.num_maps == 2
    again = memory.distances(frame, ids(2, 1), ids(0, 0))
    assert counting.num_maps == 4
    assert first[0] == first[1] == again[1]
    assert memory.distances(frame, ids(), ids()).shape == (0,)
    memory.distances(frame_with(looks[2:3], index=2), ids(1), ids(0))
    assert counting.num_maps == 6  # another frame


def test_a_map_within_all_its_partners_is_encoded_once(
    counting: CountingEncoder, looks: np.ndarray
) -> None:
    small = looks[:1].copy()
    small[..., SIDE // 2 :] = 0
    other = random_maps(1, seed=8)
    other[:, 3] = looks[0, 3]
    other[:, :3] *= other[:, 3:] > 0
    memory = remembering(counting, np.concatenate([looks[:1], other]))
    frame = frame_with(small, index=1)
    found = memory.distances(frame, ids(1, 2), ids(0, 0))
    assert counting.num_maps == 3
    assert found[0] == 0
    assert found[1] > 0
    memory.reset()
    memory.observe(frame, ids(1), ids(1))
    counting.num_maps = 0
    found_back = memory.distances(
        frame_with(np.concatenate([looks[:1], other]), index=2), ids(1, 1), ids(0, 1)
    )
    assert counting.num_maps == 3
    assert found_back == pytest.approx(found, rel=ROUNDING, abs=1e-12)


@pytest.mark.parametrize("seed", [1, 2])
def test_bounds_are_above_distances_even_of_white_noise(seed: int) -> None:
    encoder = untrained_texture_encoder(seed)
    maps = unpack_texture(torch.from_numpy(random_maps(3, seed=seed)))
    noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(seed))
    noise[:, 3] = 0
    alike = (maps + 0.02 * noise) * (maps[:, 3:] > 0)
    alike[:, 3] = maps[:, 3]
    garbage = (maps + 0.3 * noise) * (maps[:, 3:] > 0)
    garbage[:, 3] = maps[:, 3]
    memory = remembering(encoder, maps.numpy())
    others = torch.cat((alike, garbage, maps.roll(1, 0))).numpy()
    frame = frame_with(others, index=1)
    track, row = np.tile([1, 2, 3], 3), np.arange(9)
    distance, bound = memory.distances(frame, track, row), memory.bounds(frame, track, row)
    assert (distance < bound).all()
    assert (bound[:3] < 2).all()  # alike: low enough to settle a pair at half a picture's distance


def test_bounds_of_no_pairs_and_of_maps_without_common_texels(
    encoder: TextureEncoder, looks: np.ndarray
) -> None:
    memory = remembering(encoder, looks)
    frame = frame_with(looks, index=1)
    assert memory.bounds(frame, ids(), ids()).tolist() == []
    assert memory.bounds(frame, ids(1, 2), ids(3, 3)).tolist() == [0, 0]


def test_a_changed_map_is_compared_anew(encoder: TextureEncoder, looks: np.ndarray) -> None:
    memory = remembering(encoder, looks[:1])
    frame = frame_with(looks[2:3], index=1, score=1.0)
    before = memory.distances(frame, ids(1), ids(0))
    memory.observe(frame, ids(1), ids(1))
    after = memory.distances(frame_with(looks[2:3], index=2), ids(1), ids(0))
    assert after < before


def test_maps_are_mixed_where_both_are_seen_and_kept_where_one_is(
    encoder: TextureEncoder, looks: np.ndarray
) -> None:
    memory = remembering(encoder, looks[:2])
    memory.observe(frame_with(looks[[2, 3]], index=1, score=0.8), ids(1, 2), ids(1, 2))
    old, new = (unpack_texture(torch.from_numpy(looks[row][None]))[0] for row in (0, 2))
    found = memory.maps([1, 2])
    a = 0.1 * np.float32(0.8).astype(float) ** 2
    both = (old[3] > 0) & (new[3] > 0)
    either = (old[3] > 0) | (new[3] > 0)
    expected = torch.where(both, (1 - a) * old[:3] + a * new[:3], old[:3] + new[:3])
    assert (found[0, :3] - expected).abs().max() < 1e-7
    assert torch.equal(found[0, 3], either.float() * 2 - 1)
    assert (both.any(), torch.equal(both, either)) == (True, False)
    # A detection of which nothing is seen changes nothing.
    assert torch.equal(found[1], unpack_texture(torch.from_numpy(looks[1:2]))[0])


def test_maps_of_ended_tracks_are_dropped_and_their_place_is_taken(
    encoder: TextureEncoder, looks: np.ndarray
) -> None:
    memory = remembering(encoder, looks[:3])
    memory.observe(frame_with(looks[2:3], index=1), ids(4), ids(2, 4))
    assert sorted(memory.state()["track_id"]) == [2, 4]
    assert memory.maps([4]).equal(unpack_texture(torch.from_numpy(looks[2:3])))
    assert memory.maps([2]).equal(unpack_texture(torch.from_numpy(looks[1:2])))
    for i in range(2, 40):  # a new track a frame, two alive: the memory does not grow
        memory.observe(frame_with(looks[i % 3][None], index=i), ids(i + 3), ids(i + 2, i + 3))
    assert len(memory._maps) <= 4
    with pytest.raises(ValueError, match=r"frame 50: no map of the tracks \[2, 4\]"):
        memory.distances(frame_with(looks[:1], index=50), ids(4, 41, 2), ids(0, 0, 0))


def test_refused_detections_leave_no_trace(encoder: TextureEncoder, looks: np.ndarray) -> None:
    memory = remembering(encoder, looks[:1])
    before = memory.state()
    memory.observe(frame_with(looks[1:3], index=1), ids(-1, -1), ids(1))
    after = memory.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_restored_memory_is_the_same_to_the_last_bit(
    encoder: TextureEncoder, looks: np.ndarray, is_packed: bool
) -> None:
    if not is_packed:
        looks = unpack_texture(torch.from_numpy(looks)).numpy() * np.float32(1.01)
    memory, resumed = TextureMemory(encoder), TextureMemory(encoder)
    tracks = ids(3, 7, 5, 8)
    memory.observe(frame_with(looks), tracks, tracks)
    memory.observe(frame_with(looks[[1, 0]], index=1), ids(3, 7), tracks)
    state = memory.state()
    resumed.restore(state)
    assert resumed.maps(tracks.tolist()).equal(memory.maps(tracks.tolist()))
    again = resumed.state()
    assert all(np.array_equal(state[name], again[name]) for name in state)
    num_bytes = sum(array.nbytes for array in state.values()) / len(tracks)
    assert num_bytes < 12 * 0.6 * SIDE * SIDE + SIDE * SIDE / 8 + 9
    for term in (memory, resumed):
        term.observe(frame_with(looks[2:3], index=2), ids(5), tracks)
    assert resumed.maps([5]).equal(memory.maps([5]))
    resumed.restore(TextureMemory(encoder).state())
    assert len(resumed.state()["track_id"]) == 0


def test_a_state_that_does_not_fit_is_refused(encoder: TextureEncoder, looks: np.ndarray) -> None:
    memory = remembering(encoder, looks[:1])
    state = memory.state()
    for change, message in (
        ({"more": state["rgb"]}, "expected .*'rgb', 'track_id'.*, got .*'more'"),
        ({"mask": state["mask"][:, 1:]}, r"expected masks \(1, 8192\), got \(1, 8191\)"),
        ({"rgb": state["rgb"][1:]}, "expected RGB of .* texels"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.restore(state | change)
    with pytest.raises(ValueError, match="texture state"):
        memory.restore({})
    assert memory.state()["track_id"].tolist() == [1]


def test_frames_without_usable_maps_are_named(encoder: TextureEncoder, looks: np.ndarray) -> None:
    memory = remembering(encoder, looks[:1])
    nothing = replace(frame_with(looks[:1], index=6), appearance=None)
    message = "frame 6: expected texture maps of 1 people, got none"
    with pytest.raises(ValueError, match=message):
        memory.observe(nothing, ids(1), ids(1))
    with pytest.raises(ValueError, match=message):
        memory.distances(nothing, ids(1), ids(0))
    for wrong in (looks[:1, :3], looks[:1].astype(np.int64), np.zeros((1, 256), np.float16)):
        with pytest.raises(ValueError, match=r"frame 6: expected maps \(M, 4, 256, 256\)"):
            memory.observe(replace(nothing, appearance=wrong), ids(1), ids(1))
    empty = replace(frame_of_boxes(7, []), appearance=None)
    memory.observe(empty, ids(), ids(1))
    assert memory.state()["track_id"].tolist() == [1]


def test_read_only_and_half_precision_maps_are_taken(
    encoder: TextureEncoder, looks: np.ndarray
) -> None:
    packed, memory = looks[:1].copy(), TextureMemory(encoder)
    packed.flags.writeable = False
    memory.observe(frame_with(packed), ids(1), ids(1))
    half = unpack_texture(torch.from_numpy(looks[:1])).half().numpy()
    memory.observe(frame_with(half), ids(2), ids(1, 2))
    assert (memory.maps([1]) - memory.maps([2])).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["maps", "vectors"])
def test_looks_tell_two_people_apart_who_swap_places_unseen(
    encoder: TextureEncoder, looks: np.ndarray, kind: str
) -> None:
    worn = looks[:2]
    if kind == "vectors":
        worn = AppearanceProjection(encoder)(torch.from_numpy(worn)).numpy()
    term: TextureTerm = TextureMemory(encoder) if kind == "maps" else CompactMemory()
    tracker = PhalpTracker(texture=term)
    for i in range(8):
        frame = frame_of_boxes(i, [[600, 200, 680, 400], [615, 200, 695, 400]])
        tracked = tracker.update(replace(frame, appearance=worn))
    assert tracked.detection_track_id.tolist() == [1, 2]
    state = tracker.state()
    for _ in range(2):
        frame = frame_of_boxes(8, [[600, 200, 680, 400], [615, 200, 695, 400]])
        tracked = tracker.update(replace(frame, appearance=worn[::-1].copy()))
        assert tracked.detection_track_id.tolist() == [2, 1]
        tracker = PhalpTracker(texture=type(term)(*([encoder] if kind == "maps" else [])))
        tracker.restore(state)


# ---------------------------------------------------------------- compact vectors


def filled_distance(encoder: TextureEncoder, looks: np.ndarray) -> F64:
    """All pairs' distances, each map filled with the mean of what is seen."""
    maps = unpack_texture(torch.from_numpy(looks))
    mask = maps[:, 3:] > 0
    for rgb, seen in zip(maps[:, :3], mask[:, 0], strict=True):
        rgb[:, ~seen] = rgb[:, seen].mean(dim=1, keepdim=True)
    maps[:, 3] = 1
    embedding = encoder.embed(maps).double() / EMBEDDING_SCALE
    distance: F64 = 100 * torch.cdist(embedding, embedding).square().numpy()
    return distance


def test_compact_vectors_estimate_the_distance_of_maps(encoder: TextureEncoder) -> None:
    looks = random_maps(6, seed=3)
    expected = filled_distance(encoder, looks)
    # Seeds average the estimate; its spread is sqrt(2 / 256) = 9 % of the distance each.
    errors = []
    for seed in range(4):
        vectors = AppearanceProjection(encoder, seed=seed)(torch.from_numpy(looks)).numpy()
        assert (vectors.dtype, vectors.shape) == (np.float16, (6, 256))
        memory = CompactMemory()
        memory.observe(frame_with(vectors), np.arange(6), np.arange(6))
        track, row = np.triu_indices(6, 1)
        found = memory.distances(frame_with(vectors, index=1), track, row)
        errors.append(found / expected[track, row] - 1)
    assert np.abs(errors).max() < 4 * np.sqrt(2 / 256)
    assert abs(np.mean(errors)) < 0.09


def test_the_projection_is_the_same_everywhere(encoder: TextureEncoder) -> None:
    signs = AppearanceProjection(encoder)._signs
    assert signs.shape == (4096, 256)
    assert signs.abs().unique().tolist() == pytest.approx([1 / 16_000])
    assert signs[0, :12].sign().int().tolist() == [-1, 1, 1, -1, 1, 1, -1, -1, 1, -1, 1, 1]
    assert not signs.equal(AppearanceProjection(encoder, seed=1)._signs)


def test_a_map_on_which_nothing_is_seen_has_no_vector(
    encoder: TextureEncoder, looks: np.ndarray
) -> None:
    projection = AppearanceProjection(encoder)
    vectors = projection(torch.from_numpy(looks))
    assert vectors.isnan().all(dim=1).tolist() == [False, False, False, True]
    alone = projection(torch.from_numpy(looks[1:2]))
    assert (alone[0].float() - vectors[1].float()).abs().max() < 1e-3 * vectors[1].abs().max()
    floats = projection(unpack_texture(torch.from_numpy(looks)))
    assert floats.equal(vectors) or (floats - vectors)[:3].abs().max() < 1e-4
    assert projection(torch.from_numpy(looks[:0])).shape == (0, 256)


def test_compact_memory_keeps_a_running_mean() -> None:
    memory = CompactMemory(alpha=0.2)
    a, b = np.float32([[1, 2], [5, 5]])
    memory.observe(frame_with(np.stack([a, b])), ids(4, 9), ids(4, 9))
    memory.observe(frame_with(b[None], index=1, score=0.5), ids(4), ids(4, 9))
    expected = a + 0.2 * 0.25 * (b - a)
    state = memory.state()
    assert state["track_id"].tolist() == [4, 9]
    assert state["mean"] == pytest.approx(np.stack([expected, b]))
    found = memory.distances(frame_with(a[None], index=2), ids(9, 4), ids(0, 0))
    assert found == pytest.approx([100 * 25, 100 * np.square(expected - a).sum()])
    memory.observe(frame_with(a[None], index=2), ids(-1), ids(9))
    assert memory.state()["track_id"].tolist() == [9]
    with pytest.raises(ValueError, match=r"frame 3: no vector of the tracks \[4\]"):
        memory.distances(frame_with(a[None], index=3), ids(4), ids(0))
    memory.reset()
    assert len(memory.state()["track_id"]) == 0


@pytest.mark.parametrize("unknown", [np.nan, np.inf])
def test_unknown_looks_are_at_distance_0_and_teach_nothing(unknown: float) -> None:
    memory = CompactMemory()
    known, nothing = np.float16([[0.1, 0.2]]), np.float16([[unknown, 0.2]])
    frames = [frame_with(v, index=i) for i, v in enumerate((known, nothing, known))]
    memory.observe(frames[0], ids(1), ids(1))
    assert memory.distances(frames[1], ids(1), ids(0)).tolist() == [0]
    memory.observe(frames[1], ids(1), ids(1))
    assert memory.state()["mean"] == pytest.approx(known.astype(np.float32))
    memory.observe(frames[1], ids(2), ids(1, 2))
    assert memory.distances(frames[2], ids(2), ids(0)).tolist() == [0]
    memory.observe(frames[2], ids(2), ids(1, 2))
    assert memory.state()["mean"][1] == pytest.approx(known[0].astype(np.float32))


def test_a_restored_compact_memory_is_the_same() -> None:
    rng = np.random.default_rng(0)
    memory, resumed = CompactMemory(), CompactMemory()
    for i in range(5):
        vectors = rng.normal(0, 1, (3, 256)).astype(np.float16)
        memory.observe(frame_with(vectors, index=i), ids(2, 3, 5), ids(2, 3, 5))
    state = memory.state()
    assert sum(array.nbytes for array in state.values()) == 3 * (8 + 4 * 256)
    resumed.restore(state)
    frame = frame_with(vectors, index=9)
    assert np.array_equal(
        resumed.distances(frame, ids(5, 2), ids(0, 1)),
        memory.distances(frame, ids(5, 2), ids(0, 1)),
    )
    resumed.restore(CompactMemory().state())
    assert len(resumed.state()["track_id"]) == 0
    for broken in ({}, {**state, "mean": state["mean"][1:]}, {**state, "more": state["mean"]}):
        with pytest.raises(ValueError, match="looks: expected"):
            resumed.restore(broken)


def test_frames_without_usable_vectors_are_named() -> None:
    memory = CompactMemory()
    vectors = np.zeros((1, 8), np.float32)
    memory.observe(frame_with(vectors), ids(1), ids(1))
    with pytest.raises(ValueError, match="frame 4: expected the looks of 1 people, got none"):
        memory.observe(replace(frame_with(vectors, index=4), appearance=None), ids(1), ids(1))
    with pytest.raises(ValueError, match=r"frame 4: expected vectors \(M, D\) of float"):
        memory.observe(frame_with(np.zeros((1, 8), np.uint8), index=4), ids(1), ids(1))
    with pytest.raises(ValueError, match="frame 4: expected vectors of 8 numbers, got 9"):
        memory.distances(frame_with(np.zeros((1, 9), np.float32), index=4), ids(1), ids(0))
    memory.observe(frame_of_boxes(5, []), ids(), ids(1))
    assert memory.state()["track_id"].tolist() == [1]


def test_compact_memory_needs_no_torch_and_mixes_as_the_memory_of_maps_does() -> None:
    code = "import fourdh_batch.tracking.appearance, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert compact.MIXING_GAIN == appearance.MIXING_GAIN
    assert compact.DISTANCE_SCALE == appearance.DISTANCE_SCALE


# ---------------------------------------------------------------- weights


def published(**changed: Any) -> dict[str, Any]:
    """What the published file holds, its other networks cut short."""
    tensors = recipe_weights(TEXTURE_ENCODER_SHAPES, 1)
    others = {
        "encoding_head.t_conv1x.weight": torch.zeros(2, 2),
        "encoding_head.t_bn_5.num_batches_tracked": torch.tensor(3),
        "backbone.conv1.weight": torch.zeros(3),
    }
    model = {f"HMAR.{name}": tensor for name, tensor in (tensors | others).items()}
    return {"epoch": 3, "model": model, **changed}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hmar_v2_weights.pth"
    torch.save(published(), path)
    return path


def test_published_weights_are_read_and_imported(
    file: Path, tmp_path: Path, encoder: TextureEncoder, looks: np.ndarray
) -> None:
    loaded = load_texture_encoder(file)
    assert loaded.weights_origin == weights_origin(file) == "imported"
    assert loaded.weights_digest == encoder.weights_digest
    assert (loaded.training, encoder.weights_origin) == (False, "untrained")
    ours = tmp_path / "texture.safetensors"
    assert import_texture_encoder(file, ours) == encoder.weights_digest
    again = load_texture_encoder(ours)
    assert again.weights_origin == weights_origin(ours) == "official"
    assert again.weights_digest == encoder.weights_digest
    maps = unpack_texture(torch.from_numpy(looks[:1]))
    assert again.embed(maps).equal(encoder.embed(maps))
    assert ours.stat().st_size < 5e6  # nothing of the other networks
    with pytest.raises(ValueError, match=r"origin: expected one of .*, got 'found'"):
        import_texture_encoder(file, ours, origin="found")


def test_untrained_weights_depend_on_the_seed_only(encoder: TextureEncoder) -> None:
    expected = recipe_weights(TEXTURE_ENCODER_SHAPES, 1)
    state = encoder.state_dict()
    assert len(state) == len(expected)
    assert all(state[k.removeprefix("encoding_head.")].equal(t) for k, t in expected.items())
    assert untrained_texture_encoder().weights_digest != encoder.weights_digest


class RunsCode:
    """Pickles as a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, file: Path) -> None:
    proof, out = tmp_path / "proof", tmp_path / "out.safetensors"
    torch.save(published(optimizer=RunsCode(proof)), file)
    with pytest.raises(CheckpointError, match=r"reference to posix.mkdir; refused"):
        load_texture_encoder(file)
    with pytest.raises(CheckpointError, match="refused"):
        import_texture_encoder(file, out)
    assert not proof.exists()
    assert not out.exists()


def test_missing_and_misfitting_tensors_are_listed(file: Path) -> None:
    def save(**changed: Tensor | None) -> None:
        content = published()
        for name, tensor in changed.items():
            content["model"][f"HMAR.encoding_head.{name.replace('__', '.')}"] = tensor
        content["model"] = {k: v for k, v in content["model"].items() if v is not None}
        torch.save(content, file)

    save(conv2__bias=None, conv5_1__weight=None)
    with pytest.raises(CheckpointError, match=r"missing: conv2.bias, conv5_1.weight$"):
        load_texture_encoder(file)
    save(conv1x__weight=None, conv1x__bias=None, conv1__weight=torch.zeros(16, 3, 3, 3))
    with pytest.raises(CheckpointError, match=r"expected a 4c .* got a 3c one"):
        load_texture_encoder(file)
    save(conv3__bias=torch.zeros(64), conv4__bias=torch.zeros(256, dtype=torch.int64))
    with pytest.raises(
        CheckpointError, match=r"conv3.bias .*\(128,\), got .*\(64,\)\); conv4.bias .*int64"
    ):
        load_texture_encoder(file)
    save(conv3__bias=torch.full((128,), torch.nan))
    with pytest.raises(CheckpointError, match="expected finite weights"):
        load_texture_encoder(file)


def test_two_tensors_of_one_name_are_refused(file: Path) -> None:
    content = published()
    content["model"]["EMA_.encoding_head.conv2.bias"] = torch.zeros(64)
    torch.save(content, file)
    with pytest.raises(
        CheckpointError,
        match=r"expected one tensor encoding_head\.conv2\.bias .* got several, such as EMA_\.enc",
    ):
        load_texture_encoder(file)


def test_other_files_are_refused(tmp_path: Path, file: Path, encoder: TextureEncoder) -> None:
    torch.save({"state_dict": {}}, file)
    with pytest.raises(CheckpointError, match=r"expected an entry 'model', got \['state_dict'\]"):
        load_texture_encoder(file)
    with pytest.raises(CheckpointError, match="no such file"):
        load_texture_encoder(tmp_path / "none.pth")
    ours = tmp_path / "texture.safetensors"
    weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    write_safetensors(ours, weights, {"digest": "0" * 64})
    with pytest.raises(CheckpointError, match=r"expected weights of digest 000.*damaged"):
        load_texture_encoder(ours)
    write_safetensors(ours, weights, {"size": "tiny", "origin": "borrowed"})
    with pytest.raises(CheckpointError, match="expected a texture_encoder and an origin of"):
        load_texture_encoder(ours)
    write_safetensors(ours, weights, {})
    bare = load_texture_encoder(ours)
    assert (bare.weights_origin, bare.weights_digest) == ("imported", encoder.weights_digest)
