"""Pictures of one person each, with the truth, as fast as training eats them.

A crop is what HMR 2.0 looks at: the square around a person's box grown to 3 : 4, of which the
middle columns are kept where the picture is narrower than high. Nothing is rendered larger and cut
out: the camera is the crop's own window of a perspective camera, so scale, shift and roll of the
augmented box are exact. Some crops end at the waist, some people stand behind others or things.

Crop `i` of a seed is the same wherever one starts. Dimension letters: `B` crops, `K` keypoints
(44), `V` vertices, `H`, `W` crop size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

from fourdh_batch.geometry import FOCAL_PER_SIDE, crop_square
from fourdh_batch.models.smpl import SmplBody
from fourdh_batch.rasterizer import FAR_M, rasterize
from fourdh_batch.synthetic.camera import Camera
from fourdh_batch.synthetic.gestures import PoseSampler, rotation_matrices
from fourdh_batch.synthetic.mocap import Recording
from fourdh_batch.synthetic.rooms import random_room
from fourdh_batch.synthetic.scene import random_light, shading, vertex_normals
from fourdh_batch.synthetic.wardrobe import Wardrobe, random_outfits
from fourdh_batch.types import F32, F64, I64, NUM_BETAS, U8, Bool

BLOCK = 32  # crops that are made together, whatever the start
COARSE_M = 0.036  # vertices closer than this are one; at the head and the ends of limbs
FINE_M = 0.022
FINE_JOINTS = (7, 8, 10, 11, 12, 15, 20, 21, 22, 23)
VIEW_SIZE_WH = (240, 180)  # of the places behind the people
VIEWS_PER_PLACE = 4

GRAIN_CROPS = 12
SOFT = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16
COMPANION_SHARE = 0.4  # of the crops with a second person in front or behind
PASSING_SHARE = 0.5  # of those: so near in the picture that one covers some of the other
THING_SHARE = 0.3  # with something in front
WAIST_SHARE = 0.12  # whose picture ends somewhere between waist and knees
SIDE_SHARE = 0.06  # whose picture ends somewhere within the box, left or right
HIDDEN_BY_M = 0.25  # what is so much nearer than a keypoint is not the person's own skin


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """B crops and their truth.

    Attributes:
        index: (B,) number of each crop.
        rgb: (B, H, W, 3) uint8.
        keypoints_2d: (B, 44, 3) x and y in widths of the square, 0 its centre, -0.5 to 0.5 inside;
            confidence 1 where the keypoint is in front of the camera.
        keypoints_3d: (B, 44, 4) metres in camera axes, origin of the body model (`keypoints_3d_m`
            of the tables); confidence 1.
        keypoint_visible: (B, 44) bool, inside the picture and not behind somebody or something.
        global_orient: (B, 1, 3, 3) camera axes.
        body_pose: (B, 23, 3, 3).
        betas: (B, 10).
        pred_cam: (B, 3) the (s, tx, ty) that projects `keypoints_3d` best.
        has_pose, has_betas: (B,) float32, 1 throughout.
    """

    index: I64
    rgb: U8
    keypoints_2d: F32
    keypoints_3d: F32
    keypoint_visible: Bool
    global_orient: F32
    body_pose: F32
    betas: F32
    pred_cam: F32
    has_pose: F32
    has_betas: F32

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice) -> Crops:
        return Crops(*(getattr(self, field.name)[rows] for field in fields(self)))


def crops(
    body: SmplBody,
    *,
    seed: int,
    start: int = 0,
    size_hw: tuple[int, int] = (256, 256),
    recordings: Sequence[Recording] = (),
    recorded_share: float = 0.5,
    num_places: int = 12,
    num_outfits: int = 96,
    supersampling: int = 1,
) -> Iterator[Crops]:
    """Training crops without end, up to `BLOCK` at a time.

    Args:
        body: its tensors on the CPU.
        start: first crop; a training that was stopped goes on from there.
        size_hw: height is the side of the square; the width may be smaller.
        recordings: motion capture; `recorded_share` of the people take a pose of it.
        num_places, num_outfits: made before the first crop, and reused.
        supersampling: pictures are drawn so many times larger and averaged; 2 has smoother edges
            and takes about three times as long.
    Raises:
        ValueError: a picture wider than high, or a negative start.
    """
    if not 0 < size_hw[1] <= size_hw[0] or start < 0:
        raise ValueError(f"expected width <= height and start >= 0, got {size_hw} and {start}")
    studio = CropStudio(
        body,
        seed=seed,
        size_hw=size_hw,
        recordings=recordings,
        recorded_share=recorded_share,
        num_places=num_places,
        num_outfits=num_outfits,
        supersampling=supersampling,
    )
    block = start // BLOCK
    while True:
        made = studio.block(block)
        yield made[max(start - block * BLOCK, 0) :]
        block += 1


def coarse_mesh(body: SmplBody) -> tuple[I64, I64]:
    """A mesh of some of a body's vertices, for small pictures.

    Returns:
        rows: (n,) of the body's vertices; faces: (m, 3) corners among them.
    """
    vertices = body.v_template.double().numpy()
    joint = body.lbs_weights.argmax(dim=1).numpy()
    size = np.where(np.isin(joint, FINE_JOINTS), FINE_M, COARSE_M)
    cell = np.floor(vertices / size[:, None]).astype(np.int64)
    _, cluster = np.unique(np.column_stack([joint, cell]), axis=0, return_inverse=True)
    count = np.bincount(cluster)
    center = np.stack([np.bincount(cluster, axis) / count for axis in vertices.T], axis=1)
    distance = np.linalg.norm(vertices - center[cluster], axis=1)
    order = np.lexsort((distance, cluster))
    rows = order[np.searchsorted(cluster[order], np.arange(len(count)))]
    faces = cluster[body.faces]
    distinct = (faces != np.roll(faces, 1, axis=1)).all(axis=1)
    return rows, np.unique(faces[distinct], axis=0)


class CropStudio:
    """Outfits, places and the mesh that all crops of a seed share."""

    def __init__(
        self,
        body: SmplBody,
        *,
        seed: int,
        size_hw: tuple[int, int],
        recordings: Sequence[Recording],
        recorded_share: float,
        num_places: int,
        num_outfits: int,
        supersampling: int,
    ) -> None:
        """See `crops`."""
        self._body = body
        self._seed = seed
        self._size_hw = size_hw
        self._fine = supersampling
        rows, faces = coarse_mesh(body)
        self._part = body.part(rows)
        self._faces = torch.from_numpy(faces)
        self._poses = PoseSampler([r.facing_forwards() for r in recordings], recorded_share)
        rng = np.random.default_rng([seed, 0xC0])
        wardrobe = Wardrobe(body)
        dressed = [wardrobe.dress(outfit) for outfit in random_outfits(rng, num_outfits)]
        self._colours = torch.stack([colours[rows] for colours, _ in dressed])
        self._thickness = torch.stack([thickness[rows] for _, thickness in dressed])
        grain = rng.standard_normal(GRAIN_CROPS * 3 * size_hw[0] * size_hw[1], np.float32)
        self._grain = torch.from_numpy(grain)  # drawn once: every crop takes a stretch of it
        self._views = torch.cat([_views(rng) for _ in range(num_places)])  # (n, 3, h, w)

    @torch.no_grad()
    def block(self, number: int) -> Crops:
        """Crops `number * BLOCK` up to the next block's first."""
        index = np.arange(number * BLOCK, (number + 1) * BLOCK)
        rngs = [np.random.default_rng([self._seed, int(i)]) for i in index]
        pose = np.stack([self._poses.sample(rng) for rng in rngs])
        betas = torch.from_numpy(
            np.stack([rng.normal(0, 0.9, NUM_BETAS).clip(-2, 2) for rng in rngs])
        ).float()
        matrices = rotation_matrices(pose)
        turn = np.stack([_view_turn(rng) for rng in rngs])  # world to camera
        matrices[:, 0] = turn @ matrices[:, 0]
        rotations = torch.from_numpy(matrices).float()
        vertices, joints = self._part(rotations[:, :1], rotations[:, 1:], betas)
        keypoints = self._body.keypoints_3d(rotations[:, :1], rotations[:, 1:], betas)

        outfit = np.array([rng.integers(len(self._colours)) for rng in rngs])
        normals = vertex_normals(vertices, self._faces)
        vertices = vertices + normals * self._thickness[outfit][..., None]
        place = torch.from_numpy(np.stack([_place(rng) for rng in rngs])).float()
        cam_t = (place - joints[:, 0])[:, None]  # the pelvis stands at `place`
        vertices_cam, keypoints_cam = vertices + cam_t, keypoints + cam_t
        center, side, ends = self._boxes(vertices_cam, joints + cam_t, rngs)

        shaded = self._shade(self._colours[outfit], normals, turn, rngs)
        rgb, depth = self._draw(vertices_cam, shaded, center, side, place, rngs)
        ends = (ends.view(-1, 2, 2) - center[:, None]) / side[:, None, None]
        self._blacken(rgb, depth, ends.numpy())
        where = (keypoints_cam[..., :2] / keypoints_cam[..., 2:] - center[:, None]) / side[
            :, None, None
        ]  # (B, 44, 2) widths of the square
        in_front = (keypoints_cam[..., 2:] > 0.1).float()
        return Crops(
            index=index,
            rgb=rgb,
            keypoints_2d=torch.cat([where, in_front], dim=2).numpy(),
            keypoints_3d=torch.cat([keypoints, torch.ones_like(in_front)], dim=2).numpy(),
            keypoint_visible=self._visible(where, keypoints_cam[..., 2], depth),
            global_orient=rotations[:, :1].numpy(),
            body_pose=rotations[:, 1:].numpy(),
            betas=betas.numpy(),
            pred_cam=fit_weak_camera(keypoints, where).numpy(),
            has_pose=np.ones(BLOCK, np.float32),
            has_betas=np.ones(BLOCK, np.float32),
        )

    def _boxes(
        self, vertices_cam: Tensor, joints_cam: Tensor, rngs: list[np.random.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Centre (B, 2) and side (B,) of the crops on the plane one metre before the camera.

        And (B, 4) x0, y0, x1, y1 where the pictures end that they are cut from.
        """
        pixels = vertices_cam[..., :2] / vertices_cam[..., 2:]
        box = torch.cat([pixels.amin(dim=1), pixels.amax(dim=1)], dim=1).numpy()
        legs = (joints_cam[:, (1, 4), 1] / joints_cam[:, (1, 4), 2]).numpy()  # hip and knee
        ends = np.tile(np.array([-np.inf, -np.inf, np.inf, np.inf], box.dtype), (len(box), 1))
        for i, rng in enumerate(rngs):
            kind = rng.random()
            if kind < WAIST_SHARE:
                cut = legs[i, 0] + rng.uniform(-0.2, 1.0) * (legs[i, 1] - legs[i, 0])
                if box[i, 1] + 0.4 * (box[i, 3] - box[i, 1]) < cut < box[i, 3]:
                    ends[i, 3] = cut
            elif kind < WAIST_SHARE + SIDE_SHARE:
                gone = rng.uniform(0.1, 0.5) * (box[i, 2] - box[i, 0])
                if rng.random() < 0.5:
                    ends[i, 0] = box[i, 0] + gone
                else:
                    ends[i, 2] = box[i, 2] - gone
        box[:, :2], box[:, 2:] = (
            np.maximum(box[:, :2], ends[:, :2]),
            np.minimum(box[:, 2:], ends[:, 2:]),
        )
        center, side = crop_square(box * 1000)
        scale = np.exp([rng.normal(0.05, 0.13) for rng in rngs]).clip(0.75, 1.45)
        shift = np.stack([rng.normal(0, 0.05, 2).clip(-0.12, 0.12) for rng in rngs])
        moved = center + shift * side[:, None]
        return (
            torch.from_numpy(moved / 1000).float(),
            torch.from_numpy(side * scale / 1000).float(),
            torch.from_numpy(ends).float(),
        )

    def _blacken(self, rgb: U8, depth: Tensor, ends: F32) -> None:
        """Takes away what is beyond the `ends` (B, 2, 2), in widths of the square; depth is 0."""
        height, width = self._size_hw
        x = (np.arange(width) - width / 2) / height  # index H / 2 is the centre, as in `_draw`
        y = (np.arange(height) - height / 2) / height
        for i in np.flatnonzero(np.isfinite(ends).any(axis=(1, 2))):
            (x0, y0), (x1, y1) = ends[i]
            beyond = ((x < x0) | (x > x1))[None] | ((y < y0) | (y > y1))[:, None]
            rgb[i][beyond] = 0
            fine = beyond.repeat(self._fine, axis=0).repeat(self._fine, axis=1)
            depth[i][torch.from_numpy(fine)] = 0.0

    def _shade(
        self, colours: Tensor, normals: Tensor, turn: F64, rngs: list[np.random.Generator]
    ) -> Tensor:
        """(B, V, 3) colours in the light of each crop."""
        upright = normals @ torch.from_numpy(turn).float()  # camera to world
        shaded = []
        for i, rng in enumerate(rngs):
            tint = torch.from_numpy(rng.normal(1, 0.06, 3).clip(0.8, 1.2)).float()
            shaded.append(colours[i] * tint * shading(upright[i], random_light(rng)))
        return torch.stack(shaded)

    def _draw(
        self,
        vertices_cam: Tensor,
        shaded: Tensor,
        center: Tensor,
        side: Tensor,
        place: Tensor,
        rngs: list[np.random.Generator],
    ) -> tuple[U8, Tensor]:
        """The pictures, and (B, H', W') the depth of what is nearest."""
        height, width = (n * self._fine for n in self._size_hw)
        meshes, colours, owner = [vertices_cam], [shaded], list(range(BLOCK))
        for i, rng in enumerate(rngs):
            if rng.random() < COMPANION_SHARE:  # a neighbour of the block comes along
                j = (i + 1 + int(rng.integers(BLOCK - 1))) % BLOCK
                across, nearer = rng.choice([-1, 1], 2)
                if rng.random() < PASSING_SHARE:
                    away = across * rng.uniform(0, 0.6), 0.0, nearer * rng.uniform(0.4, 1.5)
                else:
                    away = across * rng.uniform(0.25, 0.8), 0.0, rng.uniform(-0.7, 0.9)
                moved = vertices_cam[j] - place[j] + place[i] + torch.tensor(away).float()
                meshes.append(moved[None])
                colours.append(shaded[j][None])
                owner.append(i)
        vertices, colour = torch.cat(meshes), torch.cat(colours)
        # One camera for all: each crop's own window is a shear and a scale before it.
        window = torch.tensor(owner)
        x_y = (vertices[..., :2] - center[window][:, None] * vertices[..., 2:]) / side[window][
            :, None, None
        ]
        seen = rasterize(
            torch.cat([x_y, vertices[..., 2:]], dim=2),
            self._faces,
            focal_px=height,
            principal_point_px=(
                (width - 1 + self._fine) / 2,  # the square's centre is index H / 2 of the crop
                (height - 1 + self._fine) / 2,
            ),
            image_size_hw=(height, width),
            facing_only=True,
        )
        depth = seen.depth[:BLOCK].clone()
        best = torch.arange(BLOCK)[:, None, None].expand(depth.shape).clone()
        for k in range(BLOCK, len(owner)):
            nearer = seen.depth[k] < depth[owner[k]]
            depth[owner[k]][nearer] = seen.depth[k][nearer]
            best[owner[k]][nearer] = k
        covered = depth < FAR_M
        crop, y, x = covered.nonzero(as_tuple=True)
        mesh = best[crop, y, x]
        pixel = (mesh * height + y) * width + x
        face = seen.face_index.view(-1).index_select(0, pixel)
        weight = seen.barycentric.view(-1, 3).index_select(0, pixel)
        corner = self._faces.index_select(0, face) + (mesh * colour.shape[1])[:, None]  # (N, 3)
        flat = colour.view(-1, 3)
        front = sum(flat.index_select(0, corner[:, k]) * weight[:, k : k + 1] for k in range(3))
        rgb = torch.stack([self._behind(rng, (height, width)) for rng in rngs])  # (B, H', W', 3)
        rgb[crop, y, x] = front
        for i, rng in enumerate(rngs):
            if rng.random() < THING_SHARE:
                self._put_before(rgb[i], depth[i], rng)
        small = (
            F.avg_pool2d(rgb.permute(0, 3, 1, 2), self._fine)
            if self._fine > 1
            else (rgb.permute(0, 3, 1, 2))
        )
        return np.stack([expose(small[i], self._grain, rng) for i, rng in enumerate(rngs)]), depth

    def _behind(self, rng: np.random.Generator, size_hw: tuple[int, int]) -> Tensor:
        """(H, W, 3) a piece of a place."""
        view = self._views[rng.integers(len(self._views))]
        high = int(rng.uniform(0.35, 1.0) * view.shape[1])
        wide = min(max(high * size_hw[1] // size_hw[0], 8), view.shape[2])
        top = int(rng.integers(view.shape[1] - high + 1))
        left = int(rng.integers(view.shape[2] - wide + 1))
        piece = view[:, top : top + high, left : left + wide]
        if rng.random() < 0.5:
            piece = piece.flip(2)
        grown = F.interpolate(piece[None], size_hw, mode="bilinear", align_corners=False)
        return grown[0].permute(1, 2, 0) * float(rng.uniform(0.7, 1.2))

    def _put_before(self, rgb: Tensor, depth: Tensor, rng: np.random.Generator) -> None:
        """Paints something with straight edges over a picture; its pixels get depth 0."""
        height, width = depth.shape
        if rng.random() < 0.5:  # a post or a wall from one side
            wide = rng.uniform(0.08, 0.35) * width
            left = rng.uniform(-0.5 * wide, width - 0.5 * wide)
            top = 0.0 if rng.random() < 0.6 else rng.uniform(0.1, 0.6) * height
            box = (left, top, left + wide, float(height))
        else:  # a table, a crate
            wide, high = rng.uniform(0.2, 0.9) * width, rng.uniform(0.1, 0.35) * height
            left = rng.uniform(-0.4 * wide, width - 0.6 * wide)
            top = rng.uniform(0.4, 0.95) * height
            box = (left, top, left + wide, top + high)
        x0, y0, x1, y1 = (max(round(v), 0) for v in box)
        part = rgb[y0:y1, x0:x1]
        if part.numel() == 0:
            return
        texture = self._behind(rng, (part.shape[0], part.shape[1]))
        colour = torch.from_numpy(rng.uniform(0.1, 0.85, 3)).float()
        rgb[y0:y1, x0:x1] = 0.6 * colour + 0.4 * texture
        depth[y0:y1, x0:x1] = 0.0

    def _visible(self, where: Tensor, z: Tensor, depth: Tensor) -> Bool:
        """(B, 44) what is inside its picture and at most `HIDDEN_BY_M` behind what is drawn."""
        height, width = depth.shape[1:]
        x = (where[..., 0] * height + (width - 1 + self._fine) / 2).round().long()
        y = (where[..., 1] * height + (height - 1 + self._fine) / 2).round().long()
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        crop = torch.arange(len(depth))[:, None].expand(x.shape)
        nearest = depth[crop, y.clamp(0, height - 1), x.clamp(0, width - 1)]
        return (inside & (nearest > z - HIDDEN_BY_M)).numpy()


def fit_weak_camera(keypoints_3d: Tensor, keypoints_2d: Tensor) -> Tensor:
    """The weak camera that HMR 2.0 would have to give.

    Args:
        keypoints_3d: (B, K, 3) metres, camera axes.
        keypoints_2d: (B, K, 2) widths of the square, 0 its centre.
    Returns:
        (B, 3) (s, tx, ty), least squares of `geometry.project_to_crop`.
    """
    x_y, z = keypoints_3d[..., :2].double(), keypoints_3d[..., 2:].double()
    u = keypoints_2d.double()
    # u (z + tz) = F (x + tx), by tz:  q (F x - u z) + F (q tx) = u, linear in q = 1 / tz and q tx
    first = (FOCAL_PER_SIDE * x_y - u * z).reshape(len(u), -1)  # (B, 2 K)
    one = torch.full_like(z[..., 0], FOCAL_PER_SIDE)
    none = torch.zeros_like(one)
    second = torch.stack([one, none], dim=2).reshape(len(u), -1)
    third = torch.stack([none, one], dim=2).reshape(len(u), -1)
    system = torch.stack([first, second, third], dim=2)
    answer = torch.linalg.lstsq(system, u.reshape(len(u), -1, 1)).solution[..., 0]
    q = answer[:, :1]
    scale = 2 * FOCAL_PER_SIDE * q
    return torch.cat([scale, answer[:, 1:] / q], dim=1).float()


def _view_turn(rng: np.random.Generator) -> F64:
    """(3, 3) world to camera: from anywhere around, mostly level, hardly rolled."""
    pitch = rng.normal(6, 9) if rng.random() < 0.85 else rng.uniform(-20, 50)
    roll = rng.normal(0, 5) if rng.random() < 0.85 else rng.uniform(-35, 35)
    turn = Rotation.from_euler("ZXY", [roll, pitch, rng.uniform(-180, 180)], degrees=True)
    return np.asarray(np.diag([1.0, -1, -1]) @ turn.as_matrix())


def _place(rng: np.random.Generator) -> F64:
    """(3,) the pelvis in camera axes: near to far, in the middle of the frame or at its side."""
    z = np.exp(rng.uniform(np.log(2.4), np.log(11)))
    return np.array([z * np.tan(rng.normal(0, 0.2)), z * np.tan(rng.normal(0, 0.08)), z])


def _views(rng: np.random.Generator) -> Tensor:
    """(n, 3, h, w) a place from several sides."""
    room = random_room(rng)
    cameras = [
        Camera(
            position_m=(float(rng.uniform(-5, 5)), float(rng.uniform(0.8, 2.4)), float(z)),
            yaw_deg=float(rng.uniform(-30, 30)),
            pitch_deg=float(rng.uniform(-5, 25)),
            focal_px=float(rng.uniform(0.9, 2.0) * VIEW_SIZE_WH[1]),
            image_size_wh=VIEW_SIZE_WH,
        )
        for z in rng.uniform(0, 7, VIEWS_PER_PLACE)
    ]
    return torch.stack([room.view(camera).rgb.permute(2, 0, 1) for camera in cameras])


def expose(rgb: Tensor, grain: Tensor, rng: np.random.Generator) -> U8:
    """(H, W, 3) uint8 of (3, H, W): blur, gain, contrast, noise out of `grain` (n,)."""
    kind = rng.random()
    if kind < 0.12:  # moves while the shutter is open
        length = int(rng.integers(1, 3)) * 2 + 1
        size = (1, length) if rng.random() < 0.7 else (length, 1)
        pad = (size[1] // 2, size[1] // 2, size[0] // 2, size[0] // 2)
        rgb = F.avg_pool2d(F.pad(rgb[None], pad, mode="replicate"), size, 1)[0]
    elif kind < 0.24:  # seen from far away, made larger
        small = F.avg_pool2d(rgb[None], 2)
        rgb = F.interpolate(small, rgb.shape[1:], mode="bilinear", align_corners=False)[0]
    elif kind < 0.6:  # edges as soft as a lens and a codec leave them
        rgb = F.conv2d(F.pad(rgb[:, None], (1, 1, 1, 1), mode="replicate"), SOFT)[:, 0]
    gain = torch.from_numpy(rng.normal(1, 0.04, 3) * np.exp(rng.normal(0, 0.15))).float()
    rgb = (rgb * gain[:, None, None]).clamp(0, 1)
    rgb = rgb + rgb * (1 - rgb) * float(rng.normal(0, 0.15))
    first = int(rng.integers(len(grain) - rgb.numel()))
    noise = grain[first : first + rgb.numel()].view_as(rgb) * float(rng.uniform(0, 0.03))
    bright = (rgb + noise).clamp(0, 1) * 255
    return bright.round().byte().permute(1, 2, 0).numpy()
