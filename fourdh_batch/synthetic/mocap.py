"""Motion capture from files: AMASS-style npz and BVH, as motions of SMPL's 24 joints.

Whatever the file's convention, a `Recording` has the walk's world axes: x right, y up, z towards
the viewer, metres; a body at zero rotation faces +z. Dimension letters: `T` frames, `J` joints of
a BVH file.

Sources: the npz fields of AMASS; Biovision's hierarchical format; joint names as the CMU, Mixamo
and LaFAN1 collections write them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from fourdh_batch.errors import DAMAGED_NPZ, MotionError
from fourdh_batch.storage import is_local, list_objects, redact_uri
from fourdh_batch.synthetic.gestures import rotation_matrices
from fourdh_batch.synthetic.motion import Body, Motion
from fourdh_batch.types import F64, NUM_BODY_JOINTS

logger = logging.getLogger(__name__)

NUM_JOINTS = 1 + NUM_BODY_JOINTS
AMASS_WIDTHS = (72, 156, 165)  # SMPL, SMPL+H, SMPL-X; the first 66 numbers are the same joints
SHARED_JOINTS = 22  # of those bodies; SMPL's two hands stay at rest for the larger ones
ADULT_LEG_M = 0.85  # hip to ankle; tells the unit of a BVH file
METRES_PER_UNIT = (1.0, 0.1, 0.0254, 0.056444, 0.01, 0.001)  # m, dm, inch, CMU's, cm, mm
RATES_HZ = (0.1, 1e4)  # slower or faster is a mistake in the file
MOST = 1e6  # of any number in a file: radians, metres, the unit and the degrees of a BVH
Z_UP_TO_Y_UP = Rotation.from_euler("x", -90, degrees=True)
UpAxis = Literal["y", "z"]


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """T frames of one recorded person.

    Attributes:
        name: of the file.
        pose: (T, 24, 3) rotation vectors, radians; the root's first, in world axes.
        pelvis_m: (T, 3) path of the pelvis joint. Its height above the floor is not relied upon.
        fps: frames per second.
    """

    name: str
    pose: F64
    pelvis_m: F64
    fps: float

    @property
    def duration_s(self) -> float:
        return (len(self.pose) - 1) / self.fps

    def resampled(self, fps: float) -> Recording:
        """The same motion at another rate: rotations by slerp, the path linearly."""
        times = np.arange(len(self.pose)) / self.fps
        wanted = np.arange(int(np.floor(times[-1] * fps + 1e-6)) + 1) / fps
        return replace(self, pose=self._poses_at(wanted), pelvis_m=self._path_at(wanted), fps=fps)

    def _poses_at(self, times_s: F64) -> F64:
        if len(self.pose) == 1:
            return np.repeat(self.pose, len(times_s), axis=0)
        times = np.arange(len(self.pose)) / self.fps
        inside = times_s.clip(0, times[-1])
        joints = [
            Slerp(times, Rotation.from_rotvec(self.pose[:, j]))(inside).as_rotvec()
            for j in range(NUM_JOINTS)
        ]
        return np.stack(joints, axis=1)

    def _path_at(self, times_s: F64) -> F64:
        times = np.arange(len(self.pose)) / self.fps
        return np.stack([np.interp(times_s, times, axis) for axis in self.pelvis_m.T], axis=1)

    def facing_forwards(self) -> F64:
        """(T, 24, 3) the poses, each turned about the vertical so that it faces +z."""
        root = Rotation.from_rotvec(self.pose[:, 0])
        ahead = root.as_matrix()[:, :, 2]
        heading = Rotation.from_euler("y", np.arctan2(ahead[:, 0], ahead[:, 2])[:, None])
        pose = self.pose.copy()
        pose[:, 0] = (heading.inv() * root).as_rotvec()
        return pose


def play(
    recording: Recording,
    body: Body,
    betas: Tensor,
    *,
    times_s: F64,
    position_m: tuple[float, float],
    heading_deg: float,
) -> Motion:
    """A recording on a body, put onto the floor of a scene.

    The lowest point of the whole stretch touches the floor, so that jumps stay jumps.

    Args:
        betas: (10,) shape.
        times_s: (T,) of the recording; before its begin and after its end it stands still.
        position_m: (x, z) of the pelvis in the middle of the stretch.
        heading_deg: where the body faces there; 0 is the viewer, 90 the right.
    """
    pose, path = recording._poses_at(times_s), recording._path_at(times_s)
    middle = len(times_s) // 2
    ahead = Rotation.from_rotvec(pose[middle, 0]).as_matrix()[:, 2]
    turn = Rotation.from_euler("y", np.radians(heading_deg) - np.arctan2(ahead[0], ahead[2]))
    pose[:, 0] = (turn * Rotation.from_rotvec(pose[:, 0])).as_rotvec()
    path = turn.apply(path - path[middle])
    matrices = torch.from_numpy(rotation_matrices(pose)).float()
    out = body(matrices[:, :1], matrices[:, 1:], betas.expand(len(pose), -1))
    root = out.joints[0, 0].double().numpy()
    transl = path + np.array([position_m[0] - root[0], 0, position_m[1] - root[2]])
    lowest = out.vertices[..., 1].amin(dim=1).double().numpy() + transl[:, 1]
    transl[:, 1] -= lowest.min()
    return Motion(matrices[:, :1], matrices[:, 1:], torch.from_numpy(transl).float())


def load_recordings(folder: str | Path) -> list[Recording]:
    """Every .npz and .bvh of a folder and of those below it, by path.

    An .npz without poses, such as AMASS's ``shape.npz`` of each subject, is left out with a
    warning; hidden files and folders and links back to a folder above are not followed.

    Raises:
        FileNotFoundError: there is no such folder.
        MotionError: a file cannot be used, none has poses, or the folder is not local.
    """
    if not is_local(str(folder)):
        raise MotionError(f"{redact_uri(str(folder))}: expected a local folder")
    recordings: list[Recording] = []
    without: dict[Path, list[str]] = {}
    for item in list_objects(str(folder), (".npz", ".bvh")):
        path = Path(item.uri)
        if path.suffix.lower() == ".npz" and not _has_poses(path):
            without.setdefault(path.parent, []).append(path.name)
        else:
            recordings.append(load_recording(path))
    for place, names in without.items():
        logger.warning("%s: left out, no poses in %s", place, ", ".join(names))
    if not recordings:
        found = ", ".join(str(place / n) for place, names in without.items() for n in names)
        raise MotionError(
            f"{folder}: expected .npz or .bvh files with poses, got none"
            f"{' in ' * bool(found)}{found}"
        )
    return recordings


def load_recording(path: str | Path, *, up: UpAxis | None = None) -> Recording:
    """One file of motion capture.

    Args:
        path: an ``.npz`` with `poses` (T, 72, 156 or 165) axis-angle, `trans` (T, 3) and
            `mocap_framerate` or `mocap_frame_rate` (AMASS); or with `global_orient_axis_angle`
            (T, 3), `body_pose_axis_angle` (T, 23, 3), `transl_m` (T, 3) and `fps`; or a ``.bvh``.
        up: the file's vertical axis; None: z for AMASS, y for the other npz, and for a
            BVH the one along which its people stand.
    Raises:
        MotionError: the file is not of these forms; says where.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        recording, is_up = _read_npz(path)
    elif suffix == ".bvh":
        recording, is_up = _read_bvh(path)
    else:
        raise MotionError(f"{path}: expected .npz or .bvh, got {path.suffix or 'no suffix'}")
    if (up or is_up) == "y":
        return recording
    pose = recording.pose.copy()
    pose[:, 0] = (Z_UP_TO_Y_UP * Rotation.from_rotvec(pose[:, 0])).as_rotvec()
    return replace(recording, pose=pose, pelvis_m=Z_UP_TO_Y_UP.apply(recording.pelvis_m))


# ---------------------------------------------------------------- npz


@contextmanager
def _npz(path: Path) -> Iterator[NpzFile]:
    """Raises: MotionError: it is none, or damaged."""
    try:
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if not isinstance(stored, NpzFile):
                raise ValueError("a single array")
            with stored:
                yield stored
    except (ValueError, EOFError, KeyError, *DAMAGED_NPZ) as error:
        raise MotionError(f"{path}: expected an .npz of plain arrays, got {error}") from error


def _has_poses(path: Path) -> bool:
    with _npz(path) as file:
        return not POSE_KEYS.isdisjoint(file.files)


def _read_npz(path: Path) -> tuple[Recording, UpAxis]:
    with _npz(path) as file:
        stored = {key: file[key] for key in file.files if key in _NPZ_KEYS}
    if "poses" in stored:
        poses = _floats(path, stored, "poses", 2)
        if poses.shape[1] not in AMASS_WIDTHS:
            raise MotionError(f"{path}: poses: expected (T, 72, 156 or 165), got {poses.shape}")
        joints = NUM_JOINTS if poses.shape[1] == 72 else SHARED_JOINTS
        pose = np.zeros((len(poses), NUM_JOINTS, 3))
        pose[:, :joints] = poses[:, : 3 * joints].reshape(len(poses), joints, 3)
        trans = _floats(path, stored, "trans", 2)
        rate = "mocap_framerate" if "mocap_framerate" in stored else "mocap_frame_rate"
        up: UpAxis = "z"
    else:
        root = _floats(path, stored, "global_orient_axis_angle", 2)
        rest = _floats(path, stored, "body_pose_axis_angle", 3)
        if root.shape[1:] != (3,) or rest.shape != (len(root), NUM_BODY_JOINTS, 3):
            raise MotionError(
                f"{path}: expected global_orient_axis_angle (T, 3) and body_pose_axis_angle "
                f"(T, {NUM_BODY_JOINTS}, 3), got {root.shape} and {rest.shape}"
            )
        pose = np.concatenate([root[:, None], rest], axis=1)
        trans = _floats(path, stored, "transl_m", 2)
        rate, up = "fps", "y"
    fps = float(_floats(path, stored, rate, 0))
    if trans.shape != (len(pose), 3) or not len(pose) or not _is_rate(fps):
        raise MotionError(
            f"{path}: expected T > 0 poses, a path (T, 3) and a rate of {RATES_HZ[0]:g} to "
            f"{RATES_HZ[1]:g} per second, got {len(pose)} poses, {trans.shape} and {fps}"
        )
    # The translation moves the model, whose pelvis is a constant away from its origin.
    return Recording(path.name, pose, trans, fps), up


POSE_KEYS = {"poses", "global_orient_axis_angle", "body_pose_axis_angle"}
_NPZ_KEYS = {
    *("poses", "trans", "mocap_framerate", "mocap_frame_rate"),
    *("global_orient_axis_angle", "body_pose_axis_angle", "transl_m", "fps"),
}


def _floats(path: Path, stored: dict[str, NDArray[Any]], key: str, ndim: int) -> F64:
    if key not in stored:
        raise MotionError(f"{path}: expected the key {key!r}, got {sorted(stored)}")
    array = stored[key]
    if not isinstance(array, np.ndarray):  # a member that is no .npy comes as its bytes
        raise MotionError(f"{path}: {key}: expected an array, got a file of another kind")
    if array.dtype.kind not in "fiu" or array.ndim != ndim:
        raise MotionError(
            f"{path}: {key}: expected {ndim} axes of finite numbers, "
            f"got {array.ndim} of {array.dtype}"
        )
    numbers: F64 = array.astype(np.float64)  # of halves MOST would overflow
    if not (np.abs(numbers) < MOST).all():
        raise MotionError(f"{path}: {key}: expected finite numbers below {MOST:g}, got others")
    return numbers


def _is_rate(fps: float) -> bool:
    return RATES_HZ[0] <= fps <= RATES_HZ[1]


# ---------------------------------------------------------------- BVH

# SMPL's joint: names of it in collections, without prefix, case and punctuation. The first spine
# joint of a file is SMPL's spine1 and so on; collections with two of them leave spine3 at rest.
BVH_NAMES: dict[int, tuple[str, ...]] = {
    0: ("hips", "hip", "pelvis", "root"),
    1: ("leftupleg", "lefthip", "leftthigh", "lthigh", "lfemur"),
    2: ("rightupleg", "righthip", "rightthigh", "rthigh", "rfemur"),
    3: ("spine", "lowerback", "chest", "abdomen"),
    4: ("leftleg", "leftknee", "leftshin", "lshin", "ltibia"),
    5: ("rightleg", "rightknee", "rightshin", "rshin", "rtibia"),
    6: ("spine1", "chest2"),
    7: ("leftfoot", "leftankle", "lfoot"),
    8: ("rightfoot", "rightankle", "rfoot"),
    9: ("spine2", "chest3", "upperchest"),
    10: ("lefttoebase", "lefttoe", "ltoes"),
    11: ("righttoebase", "righttoe", "rtoes"),
    12: ("neck", "neck1"),
    15: ("head",),
    16: ("leftarm", "leftupperarm", "lshldr", "lhumerus", "leftshoulder"),
    17: ("rightarm", "rightupperarm", "rshldr", "rhumerus", "rightshoulder"),
    # after the arms: a file whose upper arm is LeftShoulder has LeftCollar or nothing above it
    13: ("leftcollar", "lcollar", "lclavicle", "leftshoulder"),
    14: ("rightcollar", "rcollar", "rclavicle", "rightshoulder"),
    18: ("leftforearm", "leftelbow", "leftlowerarm", "lforearm", "lradius"),
    19: ("rightforearm", "rightelbow", "rightlowerarm", "rforearm", "rradius"),
    20: ("lefthand", "leftwrist", "lhand", "lwrist"),
    21: ("righthand", "rightwrist", "rhand", "rwrist"),
}
NEEDED = (0, 1, 2, 4, 5, 7, 8, 16, 17, 18, 19)  # without these there is no person
SMPL_PARENTS = (
    *(-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21),
)
# Limbs: joint, the next one along it, the way from one to the other in the T-pose.
LIMBS: tuple[tuple[int, int, tuple[float, float, float]], ...] = (
    *((1, 4, (0, -1, 0)), (2, 5, (0, -1, 0)), (4, 7, (0, -1, 0)), (5, 8, (0, -1, 0))),
    *((16, 18, (1, 0, 0)), (17, 19, (-1, 0, 0)), (18, 20, (1, 0, 0)), (19, 21, (-1, 0, 0))),
)
# A hinge below each upper limb: joint of the hinge and its axis (in the limb's T-pose axes) about
# which it bends.
HINGES = {1: (4, (1, 0, 0)), 2: (5, (1, 0, 0)), 16: (18, (0, -1, 0)), 17: (19, (0, 1, 0))}
PELVIS_TO_SPINE = np.array([0.0, 0.98, -0.2])  # in the T-pose, about a unit
T_POSE_COSINE = 0.6  # limbs of a zero pose may be this far from the T-pose's (arms down by 50 deg)


@dataclass(slots=True)
class _Joint:
    name: str
    parent: int
    offset: F64
    channels: tuple[str, ...] = ()
    first_channel: int = 0


class _Lines:
    """Tokens of a BVH file, line by line, with the place for errors."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines = text.splitlines()
        self.row = 0

    def next(self, what: str) -> list[str]:
        while self.row < len(self.lines):
            self.row += 1
            if words := self.lines[self.row - 1].split():
                return words
        raise MotionError(f"{self.path}: expected {what}, got the end of the file")

    def fail(self, expected: str) -> MotionError:
        got = self.lines[self.row - 1].strip()[:60]
        return MotionError(f"{self.path}, line {self.row}: expected {expected}, got {got!r}")

    def numbers(self, words: Sequence[str], count: int, what: str) -> list[float]:
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) != count or not (np.abs(values) < MOST).all():
            raise self.fail(f"{count} numbers below {MOST:g} ({what})")
        return values


def _read_bvh(path: Path) -> tuple[Recording, UpAxis]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MotionError(f"{path}: expected text, got {error}") from error
    lines = _Lines(path, text)
    joints = _hierarchy(lines)
    values, frame_s = _motion(lines, joints)
    place = _smpl_joints(path, joints)
    world, positions = _forward(joints, values)
    scale = _metres_per_unit(path, joints, place)
    _, zero_positions = _forward(joints, np.zeros((1, values.shape[1])))
    align = _alignment(path, place, world, positions, zero_positions[0])
    rotations = np.tile(np.eye(3), (len(values), NUM_JOINTS, 1, 1))
    for j in range(
        NUM_JOINTS
    ):  # world rotations of the SMPL body; absent joints follow their parent
        if j in place:
            rotations[:, j] = world[:, place[j]] @ align[j]
        elif j:
            rotations[:, j] = rotations[:, SMPL_PARENTS[j]]
    local = rotations.copy()
    for j in range(1, NUM_JOINTS):
        local[:, j] = rotations[:, SMPL_PARENTS[j]].swapaxes(-1, -2) @ rotations[:, j]
    pose = Rotation.from_matrix(local.reshape(-1, 3, 3)).as_rotvec().reshape(-1, NUM_JOINTS, 3)
    recording = Recording(path.name, pose, positions[:, place[0]] * scale, 1 / frame_s)
    standing = _upwards(place, positions).mean(axis=0)
    return recording, "z" if abs(standing[2]) > abs(standing[1]) else "y"


def _upwards(place: dict[int, int], positions: F64) -> F64:
    """(T, 3) from the ankles to the shoulders."""
    shoulders = positions[:, [place[16], place[17]]].mean(axis=1)
    direction: F64 = shoulders - positions[:, [place[7], place[8]]].mean(axis=1)
    return direction


def _hierarchy(lines: _Lines) -> list[_Joint]:
    if lines.next("HIERARCHY") != ["HIERARCHY"]:
        raise lines.fail("HIERARCHY")
    joints: list[_Joint] = []
    stack: list[int] = []
    num_channels = 0
    while True:
        words = lines.next("a joint or MOTION")
        word = words[0].upper()
        if word == "MOTION":
            break
        if word in ("ROOT", "JOINT", "END"):
            if (word == "ROOT") != (not joints) or len(words) < 2 or (word != "ROOT" and not stack):
                raise lines.fail("one ROOT with a name, then its JOINTs")
            name = "" if word == "END" else " ".join(words[1:])
            joints.append(_Joint(name, stack[-1] if stack else -1, np.zeros(3)))
            if lines.next("{") != ["{"]:
                raise lines.fail("{")
            stack.append(len(joints) - 1)
        elif word == "OFFSET" and stack:
            joints[stack[-1]].offset = np.array(lines.numbers(words[1:], 3, "OFFSET x y z"))
        elif word == "CHANNELS" and stack and not joints[stack[-1]].channels:
            names = tuple(name.capitalize() for name in words[2:])
            if words[1:2] != [str(len(names))] or not set(names) <= _CHANNELS:
                raise lines.fail(f"CHANNELS, their number and names out of {sorted(_CHANNELS)}")
            joints[stack[-1]].channels = names
            joints[stack[-1]].first_channel = num_channels
            num_channels += len(names)
        elif word == "}" and stack:
            stack.pop()
        else:
            raise lines.fail("ROOT, JOINT, End Site, OFFSET, CHANNELS, } or MOTION")
    if stack or not joints:
        raise lines.fail("every joint closed by } before MOTION")
    return joints


_CHANNELS = frozenset(f"{axis}{kind}" for axis in "XYZ" for kind in ("position", "rotation"))


def _motion(lines: _Lines, joints: list[_Joint]) -> tuple[F64, float]:
    words = lines.next("Frames:")
    if words[0] != "Frames:" or len(words) != 2 or not re.fullmatch(r"0*[1-9]\d{0,11}", words[1]):
        raise lines.fail("Frames: and their number")
    num_frames = int(words[1])
    words = lines.next("Frame Time:")
    if words[:2] != ["Frame", "Time:"]:
        raise lines.fail("Frame Time: and seconds")
    (frame_s,) = lines.numbers(words[2:], 1, "seconds per frame")
    if frame_s <= 0 or not _is_rate(1 / frame_s):
        raise lines.fail(f"a time per frame of {1 / RATES_HZ[1]:g} to {1 / RATES_HZ[0]:g} s")
    width = sum(len(joint.channels) for joint in joints)
    rows = [
        lines.numbers(lines.next(f"frame {i} of {num_frames}"), width, "one per channel")
        for i in range(min(num_frames, len(lines.lines) + 1))
    ]
    if rest := [line for line in lines.lines[lines.row :] if line.strip()]:
        raise MotionError(
            f"{lines.path}: expected {num_frames} frames as declared, {len(rest)} lines follow"
        )
    return np.array(rows), frame_s


def _forward(joints: list[_Joint], values: F64) -> tuple[F64, F64]:
    """World rotations (T, J, 3, 3) and positions (T, J, 3), in the file's unit."""
    rotations = np.zeros((len(values), len(joints), 3, 3))
    positions = np.zeros((len(values), len(joints), 3))
    for i, joint in enumerate(joints):
        local = np.tile(np.eye(3), (len(values), 1, 1))
        offset = np.tile(joint.offset, (len(values), 1))
        for k, channel in enumerate(joint.channels, joint.first_channel):
            axis = channel[0].lower()
            if channel.endswith("rotation"):  # channels turn from left to right
                turn = Rotation.from_euler(axis, values[:, k, None], degrees=True).as_matrix()
                local = local @ turn
            else:  # positions stand in place of the offset (LaFAN1's roots, Mixamo's joints)
                offset[:, "xyz".index(axis)] = values[:, k]
        if joint.parent < 0:
            rotations[:, i], positions[:, i] = local, offset
        else:
            above = rotations[:, joint.parent]
            rotations[:, i] = above @ local
            positions[:, i] = positions[:, joint.parent] + (above @ offset[..., None])[..., 0]
    return rotations, positions


def _smpl_joints(path: Path, joints: list[_Joint]) -> dict[int, int]:
    """SMPL joint to row of the file."""
    rows: dict[str, int] = {}
    for i, joint in enumerate(joints):
        plain = re.sub(r"[^a-z0-9]", "", joint.name.split(":")[-1].lower())
        rows.setdefault(plain.removeprefix("mixamorig"), i)
    place: dict[int, int] = {}
    for smpl, names in BVH_NAMES.items():
        for name in names:
            if name in rows and rows[name] not in place.values():
                place[smpl] = rows[name]
                break
    missing = [BVH_NAMES[j][0] for j in NEEDED if j not in place]
    if missing:
        known = [joint.name for joint in joints if joint.name]
        raise MotionError(f"{path}: expected joints like {missing}, got {known}")
    return place


def _metres_per_unit(path: Path, joints: list[_Joint], place: dict[int, int]) -> float:
    """The unit in which the legs have the length of a person's, by ratio."""

    def length(top: int, bottom: int) -> float:
        total, i = 0.0, place[bottom]
        while i not in (place[top], -1):
            total += float(np.linalg.norm(joints[i].offset))
            i = joints[i].parent
        return total

    leg = (length(1, 7) + length(2, 8)) / 2
    if leg <= 0:
        raise MotionError(f"{path}: expected legs with a length, got {leg}")
    ratios = np.abs(np.log(np.array(METRES_PER_UNIT) * leg / ADULT_LEG_M))
    return METRES_PER_UNIT[int(ratios.argmin())]


def _alignment(
    path: Path,
    place: dict[int, int],
    world: F64,
    positions: F64,
    zero: F64,
) -> dict[int, F64]:
    """Per joint the constant (3, 3) that takes SMPL's T-pose axes to the file's joint axes.

    A file whose zero pose is about a T-pose has the same axes in all joints, up to the little by
    which its limbs differ from it. Otherwise (LaFAN1: every bone along its own x) the axes follow
    from the bones and from the axes about which knees and elbows are seen to bend.
    """
    up = np.abs(_upwards(place, zero[None])[0]).argmax()
    facing = _frame(np.eye(3)[up], zero[place[1]] - zero[place[2]])
    limbs = [
        (joint, _unit(zero[place[end]] - zero[place[joint]]), facing @ np.array(way))
        for joint, end, way in LIMBS
        if end in place
    ]
    if all(float(is_way @ way) > T_POSE_COSINE for _, is_way, way in limbs):
        align = dict.fromkeys(place, facing)
        for joint, is_way, way in limbs:
            align[joint] = _shortest_turn(way, is_way) @ facing
        _check_turns(path, align)
        return align
    return _axes_from_motion(path, place, world, positions)


def _axes_from_motion(
    path: Path, place: dict[int, int], world: F64, positions: F64
) -> dict[int, F64]:
    """`_alignment` where the zero pose says nothing."""

    def bone(joint: int, end: int) -> F64:  # in the axes of the joint
        along = positions[:, place[end]] - positions[:, place[joint]]
        return _unit(np.einsum("tji,tj->ti", world[:, place[joint]], along).mean(axis=0))

    def own(joint: int, direction: F64) -> F64:  # mean of a moving direction, in joint axes
        return _unit(np.einsum("tji,tj->ti", world[:, place[joint]], direction).mean(axis=0))

    if 3 not in place:
        raise MotionError(f"{path}: the zero pose is no T-pose, and there is no spine to go by")
    left = positions[:, place[1]] - positions[:, place[2]]
    align = {0: _axes(bone(0, 3), own(0, left), PELVIS_TO_SPINE, np.array([1.0, 0, 0]))}
    for joint, end, way in LIMBS:
        if joint not in HINGES or end not in place:
            continue
        hinge, axis = HINGES[joint]
        last = next(stop for start, stop, _ in LIMBS if start == hinge)
        if last not in place:
            raise MotionError(f"{path}: expected {BVH_NAMES[last][0]}, to see how the limb bends")
        upper = positions[:, place[hinge]] - positions[:, place[joint]]
        lower = positions[:, place[last]] - positions[:, place[hinge]]
        bend = np.cross(upper, lower)  # longer where it is bent more
        if (
            np.linalg.norm(bend, axis=1).max()
            < 0.05 * np.median(np.linalg.norm(upper, axis=1)) ** 2
        ):
            raise MotionError(f"{path}: the zero pose is no T-pose, and {joint} never bends")
        for part, along in ((joint, bone(joint, hinge)), (hinge, bone(hinge, last))):
            align[part] = _axes(along, own(part, bend), np.array(way), np.array(axis))
    _check_turns(path, align)
    for joint in sorted(set(place) - set(align)):  # the rest: rest pose, on average of the motion
        above = SMPL_PARENTS[joint]
        while above not in align:
            above = SMPL_PARENTS[above]
        turn = world[:, place[joint]].swapaxes(-1, -2) @ world[:, place[above]] @ align[above]
        align[joint] = Rotation.from_matrix(turn).mean().as_matrix()
    return align


def _check_turns(path: Path, align: dict[int, F64]) -> None:
    """Raises: MotionError: bones without a length, or all along one line, tell no axes."""
    for joint, turn in align.items():
        if not np.linalg.det(turn) > 0.5:
            raise MotionError(
                f"{path}: expected bones that tell the axes of {BVH_NAMES[joint][0]}, got some "
                "without a length, or along one line"
            )


def _axes(along: F64, side: F64, way: F64, axis: F64) -> F64:
    """The rotation that takes `way` to `along` and `axis` about to `side`."""

    def basis(first: F64, second: F64) -> F64:
        first = _unit(first)
        second = _unit(second - (second @ first) * first)
        return np.stack([first, second, np.cross(first, second)], axis=1)

    result: F64 = basis(along, side) @ basis(way, axis).T
    return result


def _frame(up: F64, left: F64) -> F64:
    """(3, 3) columns left, up, forward: SMPL's x, y, z."""
    return _axes(_unit(up), _unit(left), np.array([0.0, 1, 0]), np.array([1.0, 0, 0]))


def _shortest_turn(start: F64, end: F64) -> F64:
    axis = np.cross(start, end)
    sine = float(np.linalg.norm(axis))
    if sine < 1e-9:
        return np.eye(3)
    turn = Rotation.from_rotvec(axis / sine * np.arctan2(sine, float(start @ end)))
    matrix: F64 = turn.as_matrix()
    return matrix


def _unit(vector: F64) -> F64:
    result: F64 = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return result
