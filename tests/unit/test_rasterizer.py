from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fourdh_batch.rasterizer import FAR_M, Fragments, rasterize, rasterize_depth

FOCAL_PX = 100.0
CENTER_PX = (20.0, 15.0)
SIZE_HW = (30, 40)


def draw(vertices: Tensor, faces: Tensor, **options: int | float) -> Fragments:
    return rasterize(
        vertices,
        faces,
        focal_px=FOCAL_PX,
        principal_point_px=CENTER_PX,
        image_size_hw=SIZE_HW,
        **options,  # type: ignore[arg-type]
    )


def lift(pixels: list[tuple[float, float]], depths: list[float]) -> Tensor:
    """(1, N, 3) points in camera axes that project onto the pixels."""
    center = torch.tensor(CENTER_PX, dtype=torch.float64)
    z = torch.tensor(depths, dtype=torch.float64)[:, None]
    xy = (torch.tensor(pixels, dtype=torch.float64) - center) / FOCAL_PX * z
    return torch.cat([xy, z], dim=1)[None]


def random_scene(num_meshes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    center = torch.rand(num_meshes, 60, 1, 3, generator=generator) - 0.5
    offset = (torch.rand(num_meshes, 60, 3, 3, generator=generator) - 0.5) * 0.3
    vertices = (center + offset) * torch.tensor([2.0, 1.5, 1.0])
    vertices = vertices.reshape(num_meshes, 180, 3) + torch.tensor([0.0, 0, 5])
    return vertices, torch.arange(180).view(60, 3)


def brute_force(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Depth and face of every pixel by testing every face in 3-D: rays against triangles."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in SIZE_HW), indexing="ij")
    ray = torch.stack(
        [(x - CENTER_PX[0]) / FOCAL_PX, (y - CENTER_PX[1]) / FOCAL_PX, torch.ones_like(x)], dim=-1
    )
    corners = vertices.double()[faces]  # (F, 3, 3)
    # ray = sum of weighted corners: (H, W, F, 3)
    weights = torch.linalg.solve(corners.transpose(1, 2), ray[:, :, None, :, None])[..., 0]
    z = torch.where((weights >= 0).all(dim=-1), 1 / weights.sum(dim=-1), FAR_M)
    depth, index = z.min(dim=-1)
    return depth, torch.where(depth < FAR_M, index, -1)


def test_a_random_soup_equals_ray_casting() -> None:
    vertices, faces = random_scene(1)
    seen = draw(vertices, faces)
    depth, index = brute_force(vertices[0], faces)
    assert torch.equal(seen.face_index[0], index)
    torch.testing.assert_close(seen.depth[0].double(), depth, rtol=1e-6, atol=0)
    assert 100 < int((index >= 0).sum()) < index.numel()


def test_barycentrics_give_back_the_point_on_the_ray() -> None:
    vertices, faces = random_scene(2)
    seen = draw(vertices, faces)
    mesh, y, x = (seen.face_index >= 0).nonzero(as_tuple=True)
    corners = vertices[mesh[:, None], faces[seen.face_index[mesh, y, x]]]
    weights = seen.barycentric[mesh, y, x]
    points = (corners * weights[..., None]).sum(dim=1)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(mesh)))
    torch.testing.assert_close(points[:, 2], seen.depth[mesh, y, x], rtol=1e-6, atol=0)
    projected = points[:, :2] / points[:, 2:] * FOCAL_PX + torch.tensor(CENTER_PX)
    torch.testing.assert_close(projected, torch.stack([x, y], dim=1).float(), atol=1e-4, rtol=0)


def test_background_is_far_without_face_and_weights() -> None:
    seen = draw(lift([(0, 0), (3, 0), (0, 3)], [2, 2, 2]), torch.tensor([[0, 1, 2]]), far=7.0)
    assert seen.depth[0, -1, -1] == 7.0
    assert seen.face_index[0, -1, -1] == -1
    assert seen.barycentric[0, -1, -1].tolist() == [0, 0, 0]


def test_integers_are_pixel_centres_and_edges_are_inclusive() -> None:
    square = lift([(4, 5), (8, 5), (8, 9), (4, 9)], [2, 2, 2, 2])
    seen = draw(square, torch.tensor([[0, 1, 2], [0, 2, 3]]))
    expected = torch.zeros(SIZE_HW, dtype=torch.bool)
    expected[5:10, 4:9] = True
    assert torch.equal(seen.face_index[0] >= 0, expected)


def test_both_windings_are_drawn_alike() -> None:
    vertices, faces = random_scene(1)
    assert torch.equal(draw(vertices, faces).depth, draw(vertices, faces.flip(1)).depth)


def test_depth_is_perspective_correct() -> None:
    # a plane that runs away: 1/z, not z, is linear along the picture
    ramp = lift([(0, 10), (30, 0), (30, 20)], [1.0, 3.0, 3.0])
    seen = draw(ramp, torch.tensor([[0, 1, 2]]))
    assert seen.depth[0, 10, 15] == pytest.approx(1 / ((1 + 1 / 3) / 2), rel=1e-6)
    assert seen.barycentric[0, 10, 15, 0] == pytest.approx(0.75, abs=1e-6)


def test_a_face_through_the_near_plane_is_dropped_whole() -> None:
    vertices = lift([(5, 5), (15, 5), (5, 15)], [2, 2, 2])
    crossing = torch.cat([vertices, torch.tensor([[[0.0, 0, 0.05], [0, 0, -3], [0, 0, 0]]])], dim=1)
    faces = torch.tensor([[0, 1, 3], [0, 1, 4], [0, 1, 5], [0, 1, 2]])
    seen = draw(crossing, faces)
    assert set(seen.face_index.unique().tolist()) == {-1, 3}


def test_what_lies_beyond_the_far_plane_is_not_drawn() -> None:
    vertices, faces = random_scene(1)
    whole, cut = draw(vertices, faces), draw(vertices, faces, far=5.0)
    beyond = (whole.depth >= 5.0) & (whole.face_index >= 0)
    assert beyond.any()
    assert (cut.face_index[beyond] == -1).all()
    assert torch.equal(cut.face_index[~beyond], whole.face_index[~beyond])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_faces_with_a_vertex_that_is_not_finite_are_dropped(bad: float) -> None:
    vertices, faces = random_scene(1)
    expected = draw(vertices, faces[1:])
    vertices[0, 0, 0] = bad
    seen = draw(vertices, faces)
    assert torch.equal(seen.depth, expected.depth)


def test_faces_without_area_cover_nothing() -> None:
    line = lift([(5, 5), (15, 5), (10, 5)], [2, 2, 2])
    assert (draw(line, torch.tensor([[0, 1, 2], [0, 0, 0]])).face_index == -1).all()


def test_the_first_of_two_equal_faces_wins() -> None:
    vertices, faces = random_scene(1)
    seen = draw(vertices, torch.cat([faces, faces]))
    assert seen.face_index.max() < len(faces)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_chunk_changes_nothing(chunk: int) -> None:
    vertices, faces = random_scene(3)
    faces = faces[:20]
    whole, parts = draw(vertices, faces), draw(vertices, faces, chunk=chunk)
    assert torch.equal(whole.depth, parts.depth)
    assert torch.equal(whole.face_index, parts.face_index)
    assert torch.equal(whole.barycentric, parts.barycentric)


def test_a_batch_equals_its_meshes_one_by_one() -> None:
    vertices, faces = random_scene(3)
    together = draw(vertices, faces)
    for i in range(3):
        assert torch.equal(draw(vertices[i : i + 1], faces).face_index[0], together.face_index[i])


def test_one_huge_face_fills_the_picture() -> None:
    huge = lift([(-1e6, -1e6), (1e6, -1e6), (0, 2e6)], [3, 3, 3])
    seen = draw(huge, torch.tensor([[0, 1, 2]]), chunk=100)
    assert torch.allclose(seen.depth, torch.full((1, *SIZE_HW), 3.0))


def test_a_closed_surface_has_no_cracks() -> None:
    # a grid of thin faces over the whole picture, jittered, at float32 coordinates
    generator = torch.Generator().manual_seed(0)
    n = 60
    y, x = torch.meshgrid(torch.linspace(-5, 35, n), torch.linspace(-5, 45, n), indexing="ij")
    jitter = (torch.rand(2, n, n, generator=generator) - 0.5) * 0.6
    z = 3 + torch.rand(n, n, generator=generator)
    grid = torch.stack(
        [
            (x + jitter[0] - CENTER_PX[0]) / FOCAL_PX * z,
            (y + jitter[1] - CENTER_PX[1]) / FOCAL_PX * z,
            z,
        ],
        dim=-1,
    )
    i = torch.arange(n * n).view(n, n)
    faces = torch.cat(
        [
            torch.stack([i[:-1, :-1], i[1:, :-1], i[:-1, 1:]], dim=-1).view(-1, 3),
            torch.stack([i[1:, 1:], i[:-1, 1:], i[1:, :-1]], dim=-1).view(-1, 3),
        ]
    )
    assert (draw(grid.view(1, -1, 3), faces).face_index >= 0).all()


def test_no_mesh_and_no_face_give_empty_pictures() -> None:
    vertices, faces = random_scene(1)
    assert draw(vertices[:0], faces).depth.shape == (0, *SIZE_HW)
    seen = draw(vertices, faces[:0])
    assert (seen.depth == FAR_M).all()
    assert (seen.face_index == -1).all()


def test_wrong_input_is_refused() -> None:
    vertices, faces = random_scene(1)
    with pytest.raises(ValueError, match=r"vertices_cam: expected \(B, V, 3\)"):
        draw(vertices[0], faces)
    with pytest.raises(ValueError, match=r"faces: expected \(F, 3\)"):
        draw(vertices, faces[:, :2])
    with pytest.raises(ValueError, match="0 < near < far"):
        draw(vertices, faces, near=5.0, far=2.0)
    with pytest.raises(ValueError, match="chunk: expected at least 1"):
        draw(vertices, faces, chunk=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same() -> None:
    vertices, faces = random_scene(4)
    here, there = draw(vertices, faces), draw(vertices.cuda(), faces)
    assert (here.face_index != there.face_index.cpu()).double().mean() < 1e-3
    torch.testing.assert_close(here.depth, there.depth.cpu(), rtol=1e-5, atol=0)
    depth = rasterize_depth(
        vertices.cuda(),
        faces,
        focal_px=FOCAL_PX,
        principal_point_px=CENTER_PX,
        image_size_hw=SIZE_HW,
    )
    assert torch.equal(depth, there.depth)


def test_a_closed_body_needs_only_the_faces_that_face_the_camera() -> None:
    corners = torch.tensor(
        [[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]
    )
    outwards = torch.tensor(
        [
            *([0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1]),
            *([2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]),
        ]
    )
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turn *= torch.linalg.det(turn).sign()
    cube = (corners @ turn.T + torch.tensor([0.2, 0.1, 4.0]))[None]
    everything, facing = draw(cube, outwards), draw(cube, outwards, facing_only=True)
    assert (everything.face_index >= 0).any()
    assert torch.equal(everything.depth, facing.depth)
    assert torch.equal(everything.face_index, facing.face_index)
    inside_out = draw(cube, outwards.flip(1), facing_only=True)
    assert (inside_out.depth[inside_out.face_index >= 0].mean() > 4).all()  # the far sides
