"""Z-buffer rasteriser of triangle meshes: plain torch, CPU or GPU, no extension.

Dimension letters: `B` meshes of one topology, `V` vertices, `F` faces, `H`, `W` picture size.

Pixel coordinates follow OpenCV: integer coordinates are pixel centres. Whoever counts pixel `i`
from `i` to `i + 1` (as the renderer behind PHALP's textures does) passes a principal point that
is half a pixel smaller: 127.5 for the middle of 256 pixels.

Both windings are drawn, edges are inclusive, nothing is anti-aliased. A face with a vertex at or
before the near plane is dropped as a whole (it is not clipped): people stand in front of their
camera, and a body that reaches the lens has no sensible picture. Where two faces have the same
depth the lower face index wins, so the result does not depend on the order of the work.

Source of the rules: the depth renderer of Kato et al., Neural 3D Mesh Renderer, 2018, as PHALP
uses it to find out which parts of a body are seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEAR_M = 0.1  # planes of the Neural 3D Mesh Renderer; beyond `far` nothing is drawn
FAR_M = 100.0
CHUNK_CPU = 1 << 16  # fits the caches; larger is slower
CHUNK_GPU = 1 << 22  # about 1 GB of working memory

_EDGE_TOLERANCE = 1e-9  # in barycentrics: float64 rounding must not open cracks between faces
_FACE_BITS = 32
_FACE_MASK = (1 << _FACE_BITS) - 1
_EMPTY = torch.iinfo(torch.int64).max


@dataclass(frozen=True, slots=True, eq=False)
class Fragments:
    """What is seen in every pixel of B pictures.

    Attributes:
        depth: (B, H, W) float32, z in the unit of the vertices; `far` where nothing is seen.
        face_index: (B, H, W) int64, -1 where nothing is seen.
        barycentric: (B, H, W, 3) float32 weights of the face's corners, perspective-correct:
            the weighted mean of the corners' attributes is the attribute of the point seen.
            0 where nothing is seen.
    """

    depth: Tensor
    face_index: Tensor
    barycentric: Tensor


@torch.no_grad()
def rasterize(
    vertices_cam: Tensor,
    faces: Tensor,
    *,
    focal_px: float,
    principal_point_px: tuple[float, float],
    image_size_hw: tuple[int, int],
    near: float = NEAR_M,
    far: float = FAR_M,
    facing_only: bool = False,
    chunk: int | None = None,
) -> Fragments:
    """Which point of which face is seen in every pixel.

    Args:
        vertices_cam: (B, V, 3) metres in camera axes: x right, y down, z forward. Faces with a
            vertex that is not finite are dropped.
        faces: (F, 3) vertex indices, the same for all B meshes.
        focal_px: focal length of the pinhole camera.
        principal_point_px: (x, y); integers are pixel centres.
        image_size_hw: (height, width) of the pictures.
        near, far: only points strictly between the two depths are drawn.
        facing_only: drop faces whose corners do not run counter-clockwise as seen from the camera:
            half the work for a closed mesh, of which no other face is seen.
        chunk: bounds the working memory: at most so many (mesh, face) pairs, then so many
            (face, pixel) pairs are examined at once. Changes no result.
    Raises:
        ValueError: wrong shapes, or a camera without a positive focal length.
    """
    key, screen = _z_buffer(
        vertices_cam, faces, focal_px, principal_point_px, image_size_hw, near, far, chunk,
        facing_only=facing_only,
    )  # fmt: skip
    faces = faces.to(key.device)
    flat = key.view(-1)
    face_index = torch.full_like(flat, -1)
    barycentric = torch.zeros(len(flat), 3, device=key.device)
    height, width = image_size_hw
    covered = (flat != _EMPTY).nonzero()[:, 0]
    for pixel in torch.split(covered, _chunk(chunk, key.device)):
        face = flat.index_select(0, pixel) & _FACE_MASK
        face_index.index_copy_(0, pixel, face)
        mesh = torch.div(pixel, height * width, rounding_mode="floor")
        vertex = faces.index_select(0, face) + (mesh * vertices_cam.shape[1])[:, None]
        corners = screen.view(-1, 3).index_select(0, vertex.view(-1)).view(-1, 3, 3)
        y = torch.div(pixel, width, rounding_mode="floor") % height
        barycentric.index_copy_(0, pixel, _perspective_weights(corners, pixel % width, y))
    return Fragments(
        depth=_depth(key, far),
        face_index=face_index.view_as(key),
        barycentric=barycentric.view(*key.shape, 3),
    )


@torch.no_grad()
def rasterize_depth(
    vertices_cam: Tensor,
    faces: Tensor,
    *,
    focal_px: float,
    principal_point_px: tuple[float, float],
    image_size_hw: tuple[int, int],
    near: float = NEAR_M,
    far: float = FAR_M,
    chunk: int | None = None,
) -> Tensor:
    """(B, H, W) float32: `rasterize(...).depth` alone, for those who need no faces."""
    key, _ = _z_buffer(
        vertices_cam, faces, focal_px, principal_point_px, image_size_hw, near, far, chunk
    )
    return _depth(key, far)


def _z_buffer(
    vertices_cam: Tensor,
    faces: Tensor,
    focal_px: float,
    principal_point_px: tuple[float, float],
    image_size_hw: tuple[int, int],
    near: float,
    far: float,
    chunk: int | None,
    *,
    facing_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """(B, H, W) int64 with the bits of the depth above those of the face; (B, V, 3) u, v, 1/z.

    Positive floats are ordered as their bit patterns are, so that one integer minimum finds the
    nearest face and, among equals, the first.
    """
    if vertices_cam.ndim != 3 or vertices_cam.shape[-1] != 3:
        raise ValueError(f"vertices_cam: expected (B, V, 3), got {tuple(vertices_cam.shape)}")
    if faces.ndim != 2 or faces.shape[-1] != 3:
        raise ValueError(f"faces: expected (F, 3), got {tuple(faces.shape)}")
    if not (focal_px > 0 and 0 < near < far):
        raise ValueError(
            f"expected focal_px > 0 and 0 < near < far, got {focal_px}, {near} and {far}"
        )
    height, width = image_size_hw
    num_meshes = vertices_cam.shape[0]
    faces = faces.to(vertices_cam.device)
    chunk = _chunk(chunk, vertices_cam.device)
    inverse_z = vertices_cam[..., 2:].double().reciprocal()
    center = inverse_z.new_tensor(principal_point_px)
    screen = torch.cat([vertices_cam[..., :2] * inverse_z * focal_px + center, inverse_z], dim=-1)
    in_front = (vertices_cam[..., 2:] > near) & screen.isfinite().all(dim=-1, keepdim=True)
    screen = torch.where(in_front, screen, torch.nan)  # a NaN in a corner drops the face

    key = torch.full((num_meshes * height * width,), _EMPTY, device=vertices_cam.device)
    meshes_at_once = max(1, chunk // max(1, len(faces)))
    for start in range(0, num_meshes, meshes_at_once):
        part = screen[start : start + meshes_at_once]
        planes = _planes(part, faces, (height, width), facing_only)
        _scatter(key[start * height * width :], planes, (height, width), near, far, chunk)
    return key.view(num_meshes, height, width), screen


@dataclass(frozen=True, slots=True, eq=False)
class _Planes:
    """Screen-space planes of the K faces whose bounding box holds at least one pixel centre.

    Attributes:
        mesh, face: (K,) int64.
        x, y, width, height: (K,) int64, upper left pixel and size of the bounding box.
        coefficients: (K, 9) float64: value at (x, y) and slopes along x and y of the second
            barycentric, of the third, and of 1/z; all three are linear on the screen.
    """

    mesh: Tensor
    face: Tensor
    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    coefficients: Tensor


def _planes(
    screen: Tensor, faces: Tensor, image_size_hw: tuple[int, int], facing_only: bool
) -> _Planes:
    """The planes of the faces that may be seen; screen: (B, V, 3)."""
    num_faces = len(faces)
    corners = screen.index_select(1, faces.T.reshape(-1)).view(len(screen), 3, num_faces, 3)
    p0, p1, p2 = corners.unbind(dim=1)  # (B, F, 3)
    low = torch.minimum(torch.minimum(p0, p1), p2).ceil_().clamp_(min=0)
    high = torch.maximum(torch.maximum(p0, p1), p2).floor_()
    high = torch.minimum(high, high.new_tensor([image_size_hw[1] - 1, image_size_hw[0] - 1, 1e38]))
    seen = (low[..., 0] <= high[..., 0]) & (low[..., 1] <= high[..., 1])
    if facing_only:  # y runs down, hence the sign
        a, b = p1[..., :2] - p0[..., :2], p2[..., :2] - p0[..., :2]
        seen &= a[..., 0] * b[..., 1] < a[..., 1] * b[..., 0]
    row = seen.view(-1).nonzero()[:, 0]
    p0, p1, p2, low, high = (a.reshape(-1, 3).index_select(0, row) for a in (p0, p1, p2, low, high))

    x1, y1, z1 = (p1 - p0).unbind(dim=-1)
    x2, y2, z2 = (p2 - p0).unbind(dim=-1)
    x, y, _ = (low - p0).unbind(dim=-1)  # the box's corner seen from the first vertex
    area = x1 * y2 - x2 * y1  # twice the signed area; not finite slopes cover nothing
    b1, b1_x, b1_y = (x * y2 - x2 * y) / area, y2 / area, -x2 / area
    b2, b2_x, b2_y = (x1 * y - x * y1) / area, -y1 / area, x1 / area
    depth = (p0[:, 2] + b1 * z1 + b2 * z2, b1_x * z1 + b2_x * z2, b1_y * z1 + b2_y * z2)
    size = (high - low + 1).long()
    return _Planes(
        mesh=torch.div(row, num_faces, rounding_mode="floor"),
        face=row % num_faces,
        x=low[:, 0].long(),
        y=low[:, 1].long(),
        width=size[:, 0],
        height=size[:, 1],
        coefficients=torch.stack([b1, b1_x, b1_y, b2, b2_x, b2_y, *depth], dim=-1),
    )


def _scatter(
    key: Tensor,
    planes: _Planes,
    image_size_hw: tuple[int, int],
    near: float,
    far: float,
    chunk: int,
) -> None:
    """Lower `key` (pixels of all meshes, flat) in place by every pixel inside a face.

    The (face, pixel) pairs of all boxes form one sequence, which is cut into equal parts
    whatever the sizes of the faces.
    """
    num_pixels = planes.width * planes.height
    end = num_pixels.cumsum(dim=0)
    start = end - num_pixels
    corner = (planes.mesh * image_size_hw[0] + planes.y) * image_size_hw[1] + planes.x
    total = int(end[-1]) if len(end) else 0
    for begin in range(0, total, chunk):
        stop = min(begin + chunk, total)
        bounds = torch.tensor([begin, stop - 1], device=key.device)
        first, last = torch.searchsorted(end, bounds, right=True).tolist()
        ends = end[first : last + 1].clamp(max=stop)
        repeats = ends - start[first : last + 1].clamp(min=begin)
        k = torch.repeat_interleave(repeats, output_size=stop - begin) + first
        within = torch.arange(begin, stop, device=key.device) - start.index_select(0, k)
        box_width = planes.width.index_select(0, k)
        row = torch.div(within, box_width, rounding_mode="floor")
        column = within - row * box_width
        b1, b1_x, b1_y, b2, b2_x, b2_y, inverse_z, inverse_z_x, inverse_z_y = (
            planes.coefficients.index_select(0, k).unbind(dim=-1)
        )
        b1 = b1 + b1_x * column + b1_y * row
        b2 = b2 + b2_x * column + b2_y * row
        depth = (inverse_z + inverse_z_x * column + inverse_z_y * row).reciprocal().float()
        inside = torch.minimum(torch.minimum(b1, b2), 1 - b1 - b2) >= -_EDGE_TOLERANCE
        inside &= (depth > near) & (depth < far)
        seen = inside.nonzero()[:, 0]
        k, depth = k.index_select(0, seen), depth.index_select(0, seen)
        pixel = corner.index_select(0, k) + (row * image_size_hw[1] + column).index_select(0, seen)
        value = (depth.view(torch.int32).long() << _FACE_BITS) | planes.face.index_select(0, k)
        key.scatter_reduce_(0, pixel, value, reduce="amin")


def _perspective_weights(corners: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(N, 3) float32 weights of the corners (N, 3, 3) (u, v, 1/z) at the pixels x, y (N,)."""
    edge1, edge2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    dx, dy = x - corners[:, 0, 0], y - corners[:, 0, 1]
    area = edge1[:, 0] * edge2[:, 1] - edge2[:, 0] * edge1[:, 1]
    b1 = (dx * edge2[:, 1] - edge2[:, 0] * dy) / area
    b2 = (edge1[:, 0] * dy - dx * edge1[:, 1]) / area
    weights = torch.stack([1 - b1 - b2, b1, b2], dim=-1).clamp(0, 1) * corners[..., 2]
    return (weights / weights.sum(dim=-1, keepdim=True)).float()


def _depth(key: Tensor, far: float) -> Tensor:
    """(B, H, W) float32 from the upper half of the keys."""
    depth = (key >> _FACE_BITS).int().view(torch.float32)
    return torch.where(key != _EMPTY, depth, far)


def _chunk(chunk: int | None, device: torch.device) -> int:
    """The caller's chunk, or the default of the device."""
    if chunk is None:
        return CHUNK_CPU if device.type == "cpu" else CHUNK_GPU
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    return chunk
