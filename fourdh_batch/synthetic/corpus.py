"""A small corpus made here: clips of walking people, the boxes a detector would give, the truth.

`make_corpus` writes into one folder
    <name>.mp4        H.264, 25 frames per second
    boxes.parquet     video_id, frame_index, bbox_xyxy_px [4], score: people who can be seen
    truth.parquet     every person in the picture, hidden or not; columns in `TRUTH`
The `video_id` is the file name. Everything follows from the seed and the body model.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
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

from fourdh_batch.synthetic.motion import Body, Gait, Motion, walk
from fourdh_batch.synthetic.scene import Camera, dress, random_outfits, random_room, render
from fourdh_batch.types import F64, I64, NUM_BETAS, NUM_BODY_JOINTS, NUM_KEYPOINTS, U8, Bool

FPS = 25
IMAGE_SIZE_WH = (384, 288)  # a person 5 m away is about 195 pixels tall
MIN_VISIBLE_FRACTION = 0.15  # of a person, for a box
MIN_DEPTH_M = 0.5  # nearer people are left out
FOCAL_HEIGHTS = 2.0  # focal length in picture heights
BLOCK_FRAMES = 32  # posed at once
# x264's macroblock tree reads memory that it did not write: with it equal frames now and then
# give other bytes (core 165, pictures of 192x144 and less: 3 to 7 variants in 12 runs)
X264_OPTIONS = {"crf": "20", "preset": "medium", "g": "50", "x264-params": "mbtree=0"}


def _floats(*shape: int) -> pa.DataType:
    return pa.list_(pa.float32(), int(np.prod(shape)))


BOXES = pa.schema(
    [
        ("video_id", pa.string()),
        ("frame_index", pa.int64()),
        ("bbox_xyxy_px", _floats(4)),
        ("score", pa.float32()),
    ]
)
# Names, units and frames of reference are those of the tracks table.
TRUTH = pa.schema(
    [
        ("video_id", pa.string()),
        ("frame_index", pa.int64()),
        ("shot_id", pa.int64()),
        ("person_id", pa.int64()),  # the same across a cut
        ("bbox_xyxy_px", _floats(4)),  # of the whole body, hidden parts too; cut at the border
        ("visible_fraction", pa.float32()),
        ("keypoints_2d_px", _floats(NUM_KEYPOINTS, 2)),
        ("keypoints_3d_m", _floats(NUM_KEYPOINTS, 3)),  # camera axes, cam_t_m not added
        ("global_orient", _floats(1, 3, 3)),  # camera axes
        ("body_pose", _floats(NUM_BODY_JOINTS, 3, 3)),
        ("betas", _floats(NUM_BETAS)),
        ("cam_t_m", _floats(3)),
        ("focal_px", pa.float32()),
        ("principal_point_px", _floats(2)),
    ]
)


@dataclass(frozen=True, slots=True)
class Step:
    """One person's walk in one shot; positions at the middle of the shot.

    Attributes:
        person: number of the person in the clip.
        position_m: (x, z) on the floor.
        heading_deg: 0 towards the viewer, 90 to the right.
        turn_deg_per_m: change of direction on the way.
        cycles_per_s, stride: see `Gait`.
    """

    person: int
    position_m: tuple[float, float]
    heading_deg: float
    turn_deg_per_m: float = 0.0
    cycles_per_s: float = 0.98
    stride: float = 1.0


@dataclass(frozen=True, slots=True)
class ShotPlan:
    """One camera and who walks before it; heights and angles of the camera."""

    steps: tuple[Step, ...]
    camera_m: tuple[float, float, float] = (0.0, 1.45, 5.2)
    yaw_deg: float = 0.0
    pitch_deg: float = 5.0


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """Shots of equal length, one after the other by hard cuts."""

    num_frames: int
    shots: tuple[ShotPlan, ...]


CLIPS: dict[str, ClipPlan] = {
    # one hides the other in the middle
    "crossing": ClipPlan(60, (ShotPlan((Step(0, (0.0, 0.35), 90), Step(1, (0.1, -0.45), -92))),)),
    # one leaves on the right, the other comes in there and passes behind
    "enter_leave": ClipPlan(
        75,
        (
            ShotPlan(
                (
                    Step(0, (0.95, 0.3), 88, cycles_per_s=1.05),
                    Step(1, (1.15, -0.6), -90, cycles_per_s=1.0),
                )
            ),
        ),
    ),
    # towards the viewer, away in an arc, and across behind both
    "trio": ClipPlan(
        60,
        (
            ShotPlan(
                (
                    Step(0, (-0.75, -0.2), -8, cycles_per_s=0.85, stride=0.8),
                    Step(1, (0.85, -0.3), 215, turn_deg_per_m=35, cycles_per_s=0.9, stride=0.9),
                    Step(2, (0.1, -1.3), 90, cycles_per_s=1.0),
                )
            ),
        ),
    ),
    "empty": ClipPlan(48, (ShotPlan(()),)),
    # two walk; after the cut one of them, elsewhere and seen from nearer
    "cut": ClipPlan(
        60,
        (
            ShotPlan((Step(0, (-0.5, 0.2), 60), Step(1, (0.8, -0.5), -70))),
            ShotPlan(
                (Step(0, (0.5, 0.4), -35, turn_deg_per_m=-50, stride=0.9),),
                camera_m=(1.8, 1.7, 5.4),
                yaw_deg=16,
                pitch_deg=8,
            ),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip of the corpus.

    Attributes:
        video_id: file name in the folder.
        shot_starts: first frame of every shot.
        num_people: different people, over all shots.
    """

    video_id: str
    path: Path
    num_frames: int
    fps: int
    image_size_wh: tuple[int, int]
    shot_starts: tuple[int, ...]
    num_people: int


def make_corpus(
    folder: str | Path,
    body: Body,
    *,
    seed: int = 0,
    clips: Sequence[str] = tuple(CLIPS),
    image_size_wh: tuple[int, int] = IMAGE_SIZE_WH,
    num_frames: int | None = None,
) -> list[Clip]:
    """Renders clips and writes their boxes and truth.

    A clip is the same whichever others are made. Fewer frames cut it at both ends of each shot,
    so that what happens in the middle (people cross) still happens.

    Args:
        folder: is made where it does not exist.
        body: its tensors on the CPU.
        clips: names out of `CLIPS`.
        image_size_wh: even numbers; people grow with the height.
        num_frames: of every clip, at least one per shot; None: each clip's own.
    Raises:
        ValueError: an unknown clip, an odd size, too few frames.
    """
    unknown = sorted(set(clips) - set(CLIPS))
    if unknown:
        raise ValueError(f"clips: expected names out of {list(CLIPS)}, got {unknown}")
    if image_size_wh[0] % 2 or image_size_wh[1] % 2 or min(image_size_wh) < 2:
        raise ValueError(f"image_size_wh: H.264 needs even sizes, got {image_size_wh}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Clip] = []
    truth: list[pa.Table] = []
    with _one_thread():
        for name in clips:
            clip, rows = _make_clip(folder, name, body, seed, image_size_wh, num_frames)
            made.append(clip)
            truth.append(rows)
    table = pa.concat_tables([TRUTH.empty_table(), *truth])
    visible = table["visible_fraction"].to_numpy() >= MIN_VISIBLE_FRACTION
    boxes = table.filter(pa.array(visible)).select(["video_id", "frame_index", "bbox_xyxy_px"])
    boxes = boxes.append_column("score", pa.array(np.ones(len(boxes), np.float32)))
    pq.write_table(boxes.cast(BOXES), folder / "boxes.parquet")
    pq.write_table(table, folder / "truth.parquet")
    return made


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
    phase: float


def _make_clip(
    folder: Path,
    name: str,
    body: Body,
    seed: int,
    image_size_wh: tuple[int, int],
    num_frames: int | None,
) -> tuple[Clip, pa.Table]:
    plan = CLIPS[name]
    length = plan.num_frames if num_frames is None else num_frames
    if length < len(plan.shots):
        raise ValueError(f"num_frames: {name} has {len(plan.shots)} shots, got {length} frames")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    num_people = len({step.person for shot in plan.shots for step in shot.steps})
    people = [
        _Person(betas, dress(body, betas, outfit), float(rng.uniform(0, 2 * np.pi)))
        for outfit in random_outfits(rng, num_people)
        for betas in [torch.from_numpy(rng.normal(0, 0.9, NUM_BETAS).clip(-1.8, 1.8)).float()]
    ]
    starts = [round(i * length / len(plan.shots)) for i in range(len(plan.shots) + 1)]
    video_id = f"{name}.mp4"
    path = folder / video_id
    rows: list[pa.Table] = []

    def frames() -> Iterator[U8]:
        for shot_id, shot in enumerate(plan.shots):
            frame_index = np.arange(starts[shot_id], starts[shot_id + 1])
            camera = Camera(
                position_m=shot.camera_m,
                yaw_deg=shot.yaw_deg,
                pitch_deg=shot.pitch_deg,
                focal_px=FOCAL_HEIGHTS * image_size_wh[1],
                image_size_wh=image_size_wh,
            )
            yield from _shot(video_id, shot_id, frame_index, camera, shot, people, body, rng, rows)

    _encode(path, frames(), image_size_wh)
    clip = Clip(video_id, path, length, FPS, image_size_wh, tuple(starts[:-1]), num_people)
    return clip, pa.concat_tables([TRUTH.empty_table(), *rows])


def _shot(
    video_id: str,
    shot_id: int,
    frame_index: I64,
    camera: Camera,
    shot: ShotPlan,
    people: list[_Person],
    body: Body,
    rng: np.random.Generator,
    rows: list[pa.Table],
) -> Iterator[U8]:
    """The frames of a shot; appends the truth of each block of frames to `rows`."""
    backdrop = random_room(camera, rng)
    faces = torch.from_numpy(body.faces)
    colours = torch.stack([person.colours for person in people]) if people else torch.empty(0)
    times_s = (frame_index - frame_index.mean()) / FPS
    paths = [_path(body, people[step.person], step, times_s) for step in shot.steps]
    for begin in range(0, len(frame_index), BLOCK_FRAMES):
        block = slice(begin, begin + BLOCK_FRAMES)
        posed = [
            _pose(camera, body, people[step.person].betas, path[block])
            for step, path in zip(shot.steps, paths, strict=True)
        ]
        visible = np.zeros((len(posed), len(frame_index[block])), np.float32)
        present = np.array([p.in_picture for p in posed]).reshape(visible.shape)
        for t in range(visible.shape[1]):
            here = np.flatnonzero(present[:, t])
            vertices = [posed[i].vertices_m[t] for i in here]
            who = [shot.steps[i].person for i in here]
            picture = render(
                camera,
                backdrop,
                torch.stack(vertices) if vertices else torch.empty(0, 0, 3),
                colours[who],
                faces,
            )
            visible[here, t] = picture.visible_fraction
            yield picture.rgb
        for step, person, in_picture, fraction in zip(
            shot.steps, posed, present, visible, strict=True
        ):
            columns = person.columns | {
                "frame_index": frame_index[block],
                "visible_fraction": fraction,
            }
            rows.append(
                _table(
                    {name: value[in_picture] for name, value in columns.items()},
                    video_id=video_id,
                    shot_id=shot_id,
                    person_id=step.person,
                    focal_px=camera.focal_px,
                )
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Posed:
    """T frames of one person before a camera.

    Attributes:
        vertices_m: (T, V, 3) in the world.
        in_picture: (T,) bool, the box of the body meets the picture.
        columns: those columns of `TRUTH` that follow from the body, (T, ...).
    """

    vertices_m: Tensor
    in_picture: Bool
    columns: dict[str, NDArray[Any]]


def _path(body: Body, person: _Person, step: Step, times_s: F64) -> Motion:
    return walk(
        body,
        person.betas,
        Gait(cycles_per_s=step.cycles_per_s, stride=step.stride),
        times_s=times_s,
        position_m=step.position_m,
        heading_deg=step.heading_deg,
        turn_deg_per_m=step.turn_deg_per_m,
        phase=person.phase,
    )


def _pose(camera: Camera, body: Body, shape: Tensor, path: Motion) -> _Posed:
    num_frames = len(path.transl_m)
    betas = shape.expand(num_frames, -1)
    out = body(path.global_orient, path.body_pose, betas)
    transl = path.transl_m[:, None]  # (T, 1, 3)
    vertices_m = out.vertices + transl
    vertices_cam = camera.to_camera(vertices_m)
    # The model turns about its pelvis, so the camera's turn moves everything but the pelvis.
    pelvis = out.joints[:, :1]
    cam_t = camera.to_camera(pelvis + transl) - pelvis  # (T, 1, 3)
    keypoints_cam = camera.to_camera(out.keypoints_3d + transl)

    pixels = camera.project(vertices_cam)
    low, high = pixels.amin(dim=1), pixels.amax(dim=1)
    last = torch.tensor(camera.image_size_wh) - 1
    in_picture = (vertices_cam[..., 2].amin(dim=1) > MIN_DEPTH_M) & ((high > 0) & (low < last)).all(
        dim=1
    )
    columns = {
        "bbox_xyxy_px": torch.cat([low.clamp(min=0), torch.minimum(high, last)], dim=1),
        "keypoints_2d_px": camera.project(keypoints_cam),
        "keypoints_3d_m": keypoints_cam - cam_t,
        "global_orient": camera.rotation @ path.global_orient,
        "body_pose": path.body_pose,
        "betas": betas,
        "cam_t_m": cam_t[:, 0],
        "principal_point_px": torch.tensor(camera.principal_point_px).expand(num_frames, 2),
    }
    return _Posed(
        vertices_m=vertices_m,
        in_picture=in_picture.numpy(),
        columns={name: value.numpy() for name, value in columns.items()},
    )


def _table(columns: dict[str, NDArray[Any]], **constants: str | int | float) -> pa.Table:
    """Rows of `TRUTH` from arrays (N, ...) and from values that all rows share."""
    num_rows = len(columns["frame_index"])
    arrays = []
    for field in TRUTH:
        if field.name in constants:
            array = pa.array([constants[field.name]] * num_rows, field.type)
        elif pa.types.is_fixed_size_list(field.type):
            flat = pa.array(np.ascontiguousarray(columns[field.name]).reshape(-1), pa.float32())
            array = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
        else:
            array = pa.array(columns[field.name], field.type)
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=TRUTH)


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
