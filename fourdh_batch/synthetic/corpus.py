"""A corpus made here: clips of people, the boxes a detector would give, the truth.

`make_corpus` writes into one folder
    <name>.mp4        H.264, 25 frames per second
    boxes.parquet     video_id, frame_index, bbox_xyxy_px [4], score, mask_rle: who can be seen,
                      as `detector.path=` takes it
    truth.parquet     the table `tracks` as a faultless tracker would write it; its metadata names
                      all clips, those with nobody in them, too
The `video_id` is the file name. Everything follows from the seed, the plans and the body model.

In the truth a `track_id` is a person, the same across a cut and after leaving the picture. A row
is `detected` where at least `MIN_VISIBLE_FRACTION` of the person is seen, and `predicted` where
less is seen between two such frames of a shot; `score` is the share that is seen. Boxes hold the
dressed body, hidden parts too, and end at the picture's border; masks hold what is seen of it.
`focal_px` and `cam_t_m` are the true ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from fourdh_batch.masks import encode_rle
from fourdh_batch.synthetic.camera import Camera
from fourdh_batch.synthetic.mocap import Recording
from fourdh_batch.synthetic.motion import Body, Motion
from fourdh_batch.synthetic.plans import CLIPS, FPS, ClipPlan, ShotPlan
from fourdh_batch.synthetic.rooms import random_room
from fourdh_batch.synthetic.scene import quantise, render, vertex_normals
from fourdh_batch.synthetic.tracks import IMAGE_SIZE_WH, MIN_DEPTH_M, move_person
from fourdh_batch.synthetic.wardrobe import Outfit, Wardrobe, random_outfits
from fourdh_batch.tables.schema import arrow_schema, make_table, with_video_ids
from fourdh_batch.types import I64, NUM_BETAS, U8, Bool

DATASET = "synthetic"
MIN_VISIBLE_FRACTION = 0.15  # of a person, for a box
BLOCK_FRAMES = 32  # posed at once
BLUR_PICTURES = 5  # averaged for one smeared frame
# x264's macroblock tree reads memory that it did not write: with it equal frames now and then
# give other bytes (core 165, pictures of 192x144 and less: 3 to 7 variants in 12 runs)
X264_OPTIONS = {"crf": "20", "preset": "medium", "g": "50", "x264-params": "mbtree=0"}

BOXES = pa.schema(
    [
        ("video_id", pa.string()),
        ("frame_index", pa.int64()),
        ("bbox_xyxy_px", pa.list_(pa.float32(), 4)),
        ("score", pa.float32()),
        ("mask_rle", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip of the corpus.

    Attributes:
        video_id: file name in the folder.
        shot_starts: first frame of every shot.
        num_people: different people, over all shots.
        features: what makes it difficult; see `plans.FEATURES`.
    """

    video_id: str
    path: Path
    num_frames: int
    fps: int
    image_size_wh: tuple[int, int]
    shot_starts: tuple[int, ...]
    num_people: int
    features: frozenset[str]


def make_corpus(
    folder: str | Path,
    body: Body,
    *,
    seed: int = 0,
    clips: Mapping[str, ClipPlan] = CLIPS,
    recordings: Sequence[Recording] = (),
    image_size_wh: tuple[int, int] = IMAGE_SIZE_WH,
    num_frames: int | None = None,
) -> list[Clip]:
    """Renders clips and writes their boxes and truth.

    A clip is the same whichever others are made. Fewer frames cut it at both ends of each shot,
    so that what happens in the middle (people cross) still happens.

    Args:
        folder: is made where it does not exist.
        body: its tensors on the CPU.
        clips: file name without suffix to plan; see `plans.drawn_clips`.
        recordings: motions that the plans refer to by number.
        image_size_wh: even numbers; people grow with the height.
        num_frames: of every clip, at least one per shot; None: each clip's own.
    Raises:
        ValueError: an odd size, too few frames, a name that is a path, a recording that is not
            there.
    """
    if image_size_wh[0] % 2 or image_size_wh[1] % 2 or min(image_size_wh) < 2:
        raise ValueError(f"image_size_wh: H.264 needs even sizes, got {image_size_wh}")
    for name, plan in clips.items():
        _check(name, plan, len(recordings), num_frames)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = [_video_id(name) for name in clips]
    schema = with_video_ids(arrow_schema("tracks").empty_table(), ids).schema
    made: list[Clip] = []
    with (
        _one_thread(),
        _written(folder / "boxes.parquet", BOXES) as boxes,
        _written(folder / "truth.parquet", schema) as truth,
    ):
        studio = _Studio(body, seed, image_size_wh, recordings)
        for name, plan in clips.items():
            clip, rows, found = studio.make(folder, name, plan, num_frames)
            made.append(clip)
            truth.write_table(rows)
            boxes.write_table(found)
    return made


def _video_id(name: str) -> str:
    return f"{name}.mp4"


@contextmanager
def _written(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A table that is written clip by clip and gets its name when it is whole.

    One of that name is deleted first: it would not fit the clips that are replaced meanwhile.
    """
    part = path.with_name(f".{path.name}.part")
    path.unlink(missing_ok=True)
    try:
        with pq.ParquetWriter(part, schema) as writer:
            yield writer
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _check(name: str, plan: ClipPlan, num_recordings: int, num_frames: int | None) -> None:
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"clips: expected plain names, got {name!r}")
    length = plan.num_frames if num_frames is None else num_frames
    if length < len(plan.shots):
        raise ValueError(f"num_frames: {name} has {len(plan.shots)} shots, got {length} frames")
    wanted = [s.recording[0] for shot in plan.shots for s in shot.steps if s.recording]
    if max(wanted, default=-1) >= num_recordings:
        raise ValueError(f"{name} wants recording {max(wanted)}, got {num_recordings} recordings")


def _boxes(truth: pa.Table, mask_rle: Sequence[bytes]) -> pa.Table:
    """What a faultless detector finds of a truth; `mask_rle` of the rows of people who are seen."""
    seen = truth.filter(pa.compute.field("state") == "detected")
    columns = {name: seen[name] for name in ("video_id", "frame_index", "bbox_xyxy_px")}
    score = pa.array(np.ones(len(seen), np.float32))
    return pa.table(columns | {"score": score, "mask_rle": list(mask_rle)}).cast(BOXES)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one core: sums do not depend on the machine, and many small steps run faster."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@dataclass(frozen=True, slots=True, eq=False)
class _Person:
    betas: Tensor  # (10,)
    colours: Tensor  # (V, 3)
    thickness_m: Tensor  # (V,)
    phase: float
    seed: int  # of the gestures


@dataclass(frozen=True, slots=True, eq=False)
class _Posed:
    """T frames of one person, each pictured S times.

    Attributes:
        vertices_m, normals: (T * S, V, 3) of the dressed body, in the world.
        in_picture: (T,) the box of the dressed body meets the picture.
        columns: those columns of the table that follow from the body, (T, ...).
    """

    vertices_m: Tensor
    normals: Tensor
    in_picture: Bool
    columns: dict[str, NDArray[Any]]


class _Studio:
    """What all clips of a corpus share."""

    def __init__(
        self,
        body: Body,
        seed: int,
        image_size_wh: tuple[int, int],
        recordings: Sequence[Recording],
    ) -> None:
        self._body = body
        self._seed = seed
        self._size_wh = image_size_wh
        self._recordings = recordings
        self._wardrobe = Wardrobe(body)
        self._faces = torch.from_numpy(body.faces)

    def make(
        self, folder: Path, name: str, plan: ClipPlan, num_frames: int | None
    ) -> tuple[Clip, pa.Table, pa.Table]:
        """Writes one clip; its record, its truth and its boxes."""
        length = plan.num_frames if num_frames is None else num_frames
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        cast = sorted({step.person for shot in plan.shots for step in shot.steps})
        outfits = random_outfits(rng, len(cast))
        people = {
            person: self._person(outfit, rng) for person, outfit in zip(cast, outfits, strict=True)
        }
        starts = [round(i * length / len(plan.shots)) for i in range(len(plan.shots) + 1)]
        video_id = _video_id(name)
        rows: list[dict[str, NDArray[Any]]] = []

        def frames() -> Iterator[U8]:
            for shot_id, shot in enumerate(plan.shots):
                frame_index = np.arange(starts[shot_id], starts[shot_id + 1])
                yield from self._shot(shot_id, frame_index, shot, people, rng, rows)

        _encode(folder / video_id, frames(), self._size_wh)
        clip = Clip(
            video_id=video_id,
            path=folder / video_id,
            num_frames=length,
            fps=FPS,
            image_size_wh=self._size_wh,
            shot_starts=tuple(starts[:-1]),
            num_people=len(cast),
            features=plan.features,
        )
        body_model = f"{self._body.name}:{self._body.digest[:16]}"
        truth, mask_rle = _truth_table(rows, video_id, self._size_wh, body_model)
        return clip, truth, _boxes(truth, mask_rle)

    def _person(self, outfit: Outfit, rng: np.random.Generator) -> _Person:
        betas = torch.from_numpy(rng.normal(0, 0.9, NUM_BETAS).clip(-1.8, 1.8)).float()
        colours, thickness_m = self._wardrobe.dress(outfit)
        phase = float(rng.uniform(0, 2 * np.pi))
        return _Person(betas, colours, thickness_m, phase, int(rng.integers(2**31)))

    def _shot(
        self,
        shot_id: int,
        frame_index: I64,
        shot: ShotPlan,
        people: Mapping[int, _Person],
        rng: np.random.Generator,
        rows: list[dict[str, NDArray[Any]]],
    ) -> Iterator[U8]:
        """The frames of a shot; appends the rows of those who are in the picture to `rows`."""
        room = random_room(rng)
        num_pictures = BLUR_PICTURES if shot.exposure > 0 else 1
        within = (np.arange(num_pictures) - (num_pictures - 1) / 2) / max(num_pictures - 1, 1)
        moments = (frame_index - frame_index.mean())[:, None] + shot.exposure * within
        times_s = moments.reshape(-1) / FPS
        focal_px = shot.focal_heights * self._size_wh[1]
        cameras = [shot.camera.at(float(t), focal_px, self._size_wh) for t in times_s]
        motions = [
            move_person(
                self._body,
                self._recordings,
                people[step.person].betas,
                step,
                times_s=times_s,
                phase=people[step.person].phase,
                rng=np.random.default_rng([people[step.person].seed, shot_id]),
            )
            for step in shot.steps
        ]
        still = len({(c.position_m, c.yaw_deg, c.pitch_deg, c.roll_deg) for c in cameras}) == 1
        backdrop = room.view(cameras[0]) if still else None
        grain = rng.uniform(0.0, 0.012)
        for begin in range(0, len(frame_index), BLOCK_FRAMES):
            block = slice(begin, begin + BLOCK_FRAMES)
            fine = slice(begin * num_pictures, (begin + BLOCK_FRAMES) * num_pictures)
            posed = [
                self._pose(cameras[fine], people[step.person], motion[fine], num_pictures)
                for step, motion in zip(shot.steps, motions, strict=True)
            ]
            num_frames = len(frame_index[block])
            present = np.array([p.in_picture for p in posed]).reshape(len(posed), num_frames)
            visible = np.zeros((len(posed), num_frames), np.float32)
            mask_rle = np.full((len(posed), num_frames), b"", object)
            for t in range(num_frames):
                here = np.flatnonzero(present[:, t])
                dressed = [people[shot.steps[i].person].colours for i in here]
                total = torch.zeros(self._size_wh[1], self._size_wh[0], 3)
                for k in range(num_pictures):
                    i = t * num_pictures + k
                    camera = cameras[fine][i]
                    picture = render(
                        camera,
                        backdrop or room.view(camera),
                        _stack([posed[p].vertices_m[i] for p in here]),
                        _stack(dressed),
                        self._faces,
                        normals=_stack([posed[p].normals[i] for p in here]),
                        light=shot.light,
                        blocks=shot.blocks,
                    )
                    total += picture.rgb / num_pictures
                    if k == num_pictures // 2:
                        visible[here, t] = picture.visible_fraction
                        mask_rle[here, t] = [mask.counts for mask in encode_rle(picture.mask())]
                noise = rng.standard_normal(total.shape, np.float32) * grain
                yield quantise(total + torch.from_numpy(noise))
            for step, person, in_picture, fraction, masks in zip(
                shot.steps, posed, present, visible, mask_rle, strict=True
            ):
                columns = person.columns | {
                    "frame_index": frame_index[block],
                    "score": fraction,
                    "mask_rle": masks,
                    "shot_id": np.full(num_frames, shot_id),
                    "track_id": np.full(num_frames, step.person),
                    "focal_px": np.full(num_frames, focal_px, np.float32),
                }
                rows.append({name: value[in_picture] for name, value in columns.items()})

    def _pose(
        self, cameras: list[Camera], person: _Person, motion: Motion, num_pictures: int
    ) -> _Posed:
        betas = person.betas.expand(len(cameras), -1)
        out = self._body(motion.global_orient, motion.body_pose, betas)
        normals = vertex_normals(out.vertices, self._faces)
        transl = motion.transl_m[:, None]
        dressed = out.vertices + transl + normals * person.thickness_m[:, None]

        truth = slice(num_pictures // 2, None, num_pictures)  # the middle of the exposure
        shown = cameras[truth]
        rotation = torch.stack([camera.rotation for camera in shown])  # (T, 3, 3)
        eye = torch.tensor([camera.position_m for camera in shown])[:, None]

        def to_camera(points_m: Tensor) -> Tensor:
            return (points_m - eye) @ rotation.mT

        # The model turns about its pelvis, so the camera's turn moves everything but the pelvis.
        pelvis = out.joints[truth, :1]
        cam_t = to_camera(pelvis + transl[truth]) - pelvis  # (T, 1, 3)
        keypoints_cam = to_camera(out.keypoints_3d[truth] + transl[truth])
        vertices_cam = to_camera(dressed[truth])
        pixels = shown[0].project(vertices_cam)
        low, high = pixels.amin(dim=1), pixels.amax(dim=1)
        last = torch.tensor(self._size_wh) - 1
        meets = ((high > 0) & (low < last)).all(dim=1)
        in_picture = (vertices_cam[..., 2].amin(dim=1) > MIN_DEPTH_M) & meets
        columns = {
            "bbox_xyxy_px": torch.cat([low.clamp(min=0), torch.minimum(high, last)], dim=1),
            "keypoints_2d_px": shown[0].project(keypoints_cam),
            "keypoints_3d_m": keypoints_cam - cam_t,
            "global_orient": rotation[:, None] @ motion.global_orient[truth],
            "body_pose": motion.body_pose[truth],
            "betas": betas[truth],
            "cam_t_m": cam_t[:, 0],
        }
        return _Posed(
            vertices_m=dressed,
            normals=normals,
            in_picture=in_picture.numpy(),
            columns={name: value.numpy() for name, value in columns.items()},
        )


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if tensors else torch.zeros(0, 0, 3)


def _truth_table(
    rows: list[dict[str, NDArray[Any]]],
    video_id: str,
    image_size_wh: tuple[int, int],
    body_model: str,
) -> tuple[pa.Table, list[bytes]]:
    """The rows of one clip as the table `tracks`, in its order; masks of those who are seen."""
    rows = [part for part in rows if len(part["frame_index"])]
    if not rows:
        return arrow_schema("tracks").empty_table(), []
    columns = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    order = np.lexsort((columns["track_id"], columns["frame_index"]))
    columns = {name: value[order] for name, value in columns.items()}
    seen = columns["score"] >= MIN_VISIBLE_FRACTION
    frame = columns["frame_index"]
    keep = np.zeros(len(frame), bool)
    since = np.zeros(len(frame), np.int64)
    for track in np.unique(columns["track_id"]):
        for shot in np.unique(columns["shot_id"]):
            mine = np.flatnonzero((columns["track_id"] == track) & (columns["shot_id"] == shot))
            shown = mine[seen[mine]]
            if len(shown) == 0:
                continue
            inside = mine[(mine >= shown[0]) & (mine <= shown[-1])]
            keep[inside] = True
            last = shown[np.searchsorted(shown, inside, side="right") - 1]
            since[inside] = frame[inside] - frame[last]
    columns = {name: value[keep] for name, value in columns.items()}
    seen, since = seen[keep], since[keep]
    mask_rle = columns.pop("mask_rle")[seen].tolist()
    hits, track_len = np.zeros(len(seen), np.int64), np.zeros(len(seen), np.int64)
    for track in np.unique(columns["track_id"]):
        mine = columns["track_id"] == track
        hits[mine] = np.cumsum(seen[mine])
        track_len[mine] = mine.sum()
    table = make_table(
        "tracks",
        columns
        | {
            "dataset": DATASET,
            "video_id": video_id,
            "pts_s": columns["frame_index"] / FPS,
            "state": np.where(seen, "detected", "predicted").tolist(),
            "frames_since_seen": since,
            "score": np.where(seen, columns["score"], np.nan).astype(np.float32),
            "principal_point_px": np.array(image_size_wh, np.float32) / 2,
            "image_size_px": np.array(image_size_wh),
            "hits": hits,
            "track_len": track_len,
            "weights": "given",
            "body_model": body_model,
            "model_fingerprint": "truth",
        },
    )
    return table, mask_rle


def _encode(path: Path, frames: Iterator[U8], image_size_wh: tuple[int, int]) -> None:
    """H.264, in one thread so that the same frames give the same bytes."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=X264_OPTIONS)
        stream.width, stream.height = image_size_wh
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for rgb in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
