from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from fourdh_batch.errors import MotionError
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.synthetic.gestures import gesture_curve, rotation_matrices
from fourdh_batch.synthetic.limits import LIMITS
from fourdh_batch.synthetic.mocap import (
    BVH_NAMES,
    SMPL_PARENTS,
    load_recording,
    load_recordings,
    play,
)
from fourdh_batch.synthetic.motion import Gait, gait_pose
from fourdh_batch.types import F64

FPS = 30
FRAMES = 90
LIMB_JOINTS = [1, 2, 4, 5, 16, 17, 18, 19]
CHILDREN = {j: [c for c in range(22) if SMPL_PARENTS[c] == j] for j in range(22)}


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def rest(body: SmplBody) -> F64:
    """(24, 3) joints of the T-pose."""
    eye = torch.eye(3).expand(1, 24, 3, 3)
    return body(eye[:, :1], eye[:, 1:], torch.zeros(1, 10)).joints[0].double().numpy()


@pytest.fixture(scope="module")
def pose() -> F64:
    """(T, 24, 3) somebody walks and gestures, turning slowly."""
    times = np.arange(FRAMES) / FPS
    base = Rotation.from_matrix(gait_pose(times * 6, Gait()).reshape(-1, 3, 3)).as_rotvec()
    acted = gesture_curve(
        base.reshape(-1, 24, 3), times, np.random.default_rng(3), busy=0.8, still=False
    )
    acted[:, 0] = (
        Rotation.from_euler("y", times[:, None] * 0.5) * Rotation.from_rotvec(acted[:, 0])
    ).as_rotvec()
    return acted


def write_bvh(
    path: Path,
    pose: F64,
    rest: F64,
    path_m: F64,
    *,
    names: dict[int, str],
    order: str,
    unit_m: float,
    axes: dict[int, F64] | None = None,
) -> Path:
    """A BVH of SMPL's joints.

    Args:
        names: SMPL joint to name; those absent are left out (only joints without children here).
        order: of the rotation channels, like "zxy".
        axes: (3, 3) per joint: columns are the file's joint axes in the T-pose; None: the world's.
    """
    matrices = rotation_matrices(pose)
    world = matrices.copy()
    for j in range(1, 24):
        world[:, j] = world[:, SMPL_PARENTS[j]] @ matrices[:, j]
    frames = {j: np.eye(3) if axes is None else axes[j] for j in names}
    turned = {j: world[:, j] @ frames[j] for j in names}
    rows: list[F64] = []
    lines = ["HIERARCHY"]

    def add(j: int, depth: int) -> None:
        pad = "\t" * depth
        parent = SMPL_PARENTS[j]
        lines.append(f"{pad}{'ROOT' if j == 0 else 'JOINT'} {names[j]}")
        lines.append(pad + "{")
        offset = np.zeros(3) if j == 0 else frames[parent].T @ (rest[j] - rest[parent]) / unit_m
        lines.append(f"{pad}\tOFFSET " + " ".join(f"{x:.6f}" for x in offset))
        rotations = " ".join(f"{axis.upper()}rotation" for axis in order)
        if j == 0:
            lines.append(f"{pad}\tCHANNELS 6 Xposition Yposition Zposition {rotations}")
            rows.append(path_m / unit_m)
            local = turned[0]
        else:
            lines.append(f"{pad}\tCHANNELS 3 {rotations}")
            local = turned[parent].swapaxes(-1, -2) @ turned[j]
        rows.append(Rotation.from_matrix(local).as_euler(order.upper(), degrees=True))
        for child in CHILDREN[j]:
            if child in names:
                add(child, depth + 1)
        if not any(child in names for child in CHILDREN[j]):
            lines.append(f"{pad}\tEnd Site\n{pad}\t{{\n{pad}\t\tOFFSET 0 0 1\n{pad}\t}}")
        lines.append(pad + "}")

    add(0, 0)
    lines += ["MOTION", f"Frames: {len(pose)}", f"Frame Time: {1 / FPS:.8f}"]
    lines += [" ".join(f"{x:.6f}" for x in row) for row in np.concatenate(rows, axis=1)]
    path.write_text("\n".join(lines) + "\n")
    return path


def world_rotations(pose: F64) -> F64:
    matrices = rotation_matrices(pose)
    world = matrices.copy()
    for j in range(1, 24):
        world[:, j] = world[:, SMPL_PARENTS[j]] @ matrices[:, j]
    return world


def degrees_between(a: F64, b: F64) -> F64:
    turn = Rotation.from_matrix((a.swapaxes(-1, -2) @ b).reshape(-1, 3, 3))
    result: F64 = np.degrees(turn.magnitude()).reshape(a.shape[:-2])
    return result


def path_of(frames: int) -> F64:
    times = np.arange(frames) / FPS
    return np.stack([0.3 * times, 0.9 + 0.02 * np.sin(times), 1.2 * times], axis=1)


CMU_NAMES = {
    **{0: "Hips", 1: "LeftUpLeg", 2: "RightUpLeg", 3: "Spine", 4: "LeftLeg", 5: "RightLeg"},
    **{6: "Spine1", 7: "LeftFoot", 8: "RightFoot", 9: "Spine2", 10: "LeftToeBase"},
    **{11: "RightToeBase", 12: "Neck", 13: "LeftShoulder", 14: "RightShoulder", 15: "Head"},
    **{16: "LeftArm", 17: "RightArm", 18: "LeftForeArm", 19: "RightForeArm", 20: "LeftHand"},
    21: "RightHand",
}
MIXAMO_NAMES = {j: f"mixamorig:{name}" for j, name in CMU_NAMES.items()}
POSER_NAMES = CMU_NAMES | {
    **{1: "LeftHip", 2: "RightHip", 4: "LeftKnee", 5: "RightKnee", 7: "LeftAnkle"},
    **{8: "RightAnkle", 13: "LeftCollar", 14: "RightCollar", 16: "LeftShoulder"},
    **{17: "RightShoulder", 18: "LeftElbow", 19: "RightElbow", 20: "LeftWrist", 21: "RightWrist"},
    3: "Chest",
    6: "Chest2",
    9: "Chest3",
}


@pytest.mark.parametrize(
    ("names", "order", "unit_m"),
    [(CMU_NAMES, "zyx", 0.056444), (MIXAMO_NAMES, "zxy", 0.01), (POSER_NAMES, "yxz", 1.0)],
)
def test_a_bvh_with_a_t_pose_gives_back_the_motion(
    tmp_path: Path, pose: F64, rest: F64, names: dict[int, str], order: str, unit_m: float
) -> None:
    file = write_bvh(
        tmp_path / "a.bvh", pose, rest, path_of(FRAMES), names=names, order=order, unit_m=unit_m
    )
    recording = load_recording(file)
    assert recording.fps == pytest.approx(FPS)
    assert recording.pose.shape == (FRAMES, 24, 3)
    error = degrees_between(world_rotations(recording.pose), world_rotations(pose))
    # the body's own arms and legs are a few degrees off a straight T
    assert error[:, :22].max() < 12
    assert error[:, [0, 3, 6, 9, 12, 15]].max() < 0.1
    np.testing.assert_allclose(recording.pelvis_m, path_of(FRAMES), atol=0.01)


def test_a_bvh_whose_bones_lie_along_their_own_x_gives_back_the_motion(
    tmp_path: Path, pose: F64, rest: F64
) -> None:
    # LaFAN1's convention: the zero pose is a straight line, not a T
    axes: dict[int, F64] = {}
    for j in CMU_NAMES:
        ends = [c for c in CHILDREN[j] if c in CMU_NAMES]
        end = {0: 3, 9: 12}.get(j, ends[0] if ends else None)
        way = rest[end] - rest[j] if end else axes[SMPL_PARENTS[j]][:, 0]
        x = way / np.linalg.norm(way)
        other = np.array([0.0, 0, 1]) if abs(x[2]) < 0.9 else np.array([0.0, 1, 0])
        z = np.cross(x, other) / np.linalg.norm(np.cross(x, other))
        axes[j] = np.stack([x, np.cross(z, x), z], axis=1)
    file = write_bvh(
        tmp_path / "b.bvh", pose, rest, path_of(FRAMES),
        names=CMU_NAMES, order="zyx", unit_m=0.01, axes=axes,
    )  # fmt: skip
    recording = load_recording(file)
    error = degrees_between(world_rotations(recording.pose), world_rotations(pose))
    assert error[:, LIMB_JOINTS].mean() < 12
    assert error[:, 0].max() < 8
    assert error[:, :22].mean() < 15


def test_a_bvh_with_z_up_is_turned_upright(tmp_path: Path, pose: F64, rest: F64) -> None:
    z_up = Rotation.from_euler("x", 90, degrees=True)
    axes = {j: z_up.inv().as_matrix() for j in CMU_NAMES}  # columns: the file's x, y, z here
    file = write_bvh(
        tmp_path / "z.bvh", pose, rest, path_of(FRAMES),
        names=CMU_NAMES, order="zxy", unit_m=0.01, axes=axes,
    )  # fmt: skip
    lines = file.read_text().splitlines()
    first = lines.index("MOTION") + 3
    for k in range(first, len(lines)):  # the world, too, has z up
        numbers = np.array(lines[k].split(), float)
        numbers[:3] = z_up.apply(numbers[:3])
        root = Rotation.from_euler("ZXY", numbers[3:6], degrees=True)
        numbers[3:6] = (z_up * root).as_euler("ZXY", degrees=True)
        lines[k] = " ".join(map(str, numbers))
    file.write_text("\n".join(lines))
    recording = load_recording(file)
    error = degrees_between(world_rotations(recording.pose), world_rotations(pose))
    assert error[:, [0, 3, 6, 9, 12, 15]].max() < 0.1
    np.testing.assert_allclose(recording.pelvis_m, path_of(FRAMES), atol=0.01)


def test_every_joint_name_stands_once() -> None:
    for side in ("left", "right"):
        names = [n for j, group in BVH_NAMES.items() for n in group if j not in (13, 14)]
        assert len(names) == len(set(names)), side


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("width", [72, 156, 165])
def test_amass_files_are_turned_upright(tmp_path: Path, pose: F64, width: int) -> None:
    z_up = Rotation.from_euler("x", 90, degrees=True)
    lying = pose.copy()
    lying[:, 0] = (z_up * Rotation.from_rotvec(pose[:, 0])).as_rotvec()
    poses = np.zeros((FRAMES, width))
    poses[:, :66] = lying[:, :22].reshape(FRAMES, 66)
    poses[:, 66:] = 0.1  # hands, or face and hands
    rate = {"mocap_framerate": 120.0} if width != 165 else {"mocap_frame_rate": 120.0}
    file = npz(
        tmp_path / "a.npz", poses=poses, trans=z_up.apply(path_of(FRAMES)), gender="male",
        betas=np.zeros(16), **rate,
    )  # fmt: skip
    recording = load_recording(file)
    assert recording.fps == 120
    np.testing.assert_allclose(recording.pelvis_m, path_of(FRAMES), atol=1e-6)
    assert (
        degrees_between(world_rotations(recording.pose), world_rotations(pose))[:, :22].max() < 1e-4
    )
    assert (recording.pose[:, 22:] == (0.1 if width == 72 else 0)).all()
    halves = npz(
        tmp_path / "h.npz", poses=poses.astype(np.float16), trans=np.zeros((FRAMES, 3)), **rate
    )
    assert len(load_recording(halves).pose) == FRAMES  # without a warning of an overflow
    kept = load_recording(file, up="y")
    np.testing.assert_allclose(kept.pelvis_m, z_up.apply(path_of(FRAMES)), atol=1e-6)


def own_npz(path: Path, pose: F64, **changes: Any) -> Path:
    arrays: dict[str, Any] = {
        "global_orient_axis_angle": pose[:, 0],
        "body_pose_axis_angle": pose[:, 1:],
        "transl_m": path_of(len(pose)),
        "fps": np.float32(FPS),
    } | changes
    return npz(path, **{key: value for key, value in arrays.items() if value is not None})


def test_resampling_halves_the_steps(tmp_path: Path, pose: F64) -> None:
    recording = load_recording(own_npz(tmp_path / "a.npz", pose))
    fine = recording.resampled(2 * FPS)
    assert len(fine.pose) == 2 * FRAMES - 1
    assert fine.duration_s == pytest.approx(recording.duration_s)
    there, here = rotation_matrices(fine.pose[::2]), rotation_matrices(pose)
    np.testing.assert_allclose(there, here, atol=1e-9)
    half = degrees_between(rotation_matrices(fine.pose[:-1]), rotation_matrices(fine.pose[1:]))
    np.testing.assert_allclose(half[0::2], half[1::2], atol=1e-4)  # slerp is uniform
    np.testing.assert_allclose(
        fine.pelvis_m[1::2], (path_of(FRAMES)[1:] + path_of(FRAMES)[:-1]) / 2
    )


def test_a_played_recording_stands_on_the_floor_where_it_should(
    tmp_path: Path, body: SmplBody, pose: F64
) -> None:
    recording = load_recording(own_npz(tmp_path / "a.npz", pose))
    betas = torch.tensor([1.0, *[0.0] * 9])
    motion = play(
        recording, body, betas, times_s=np.arange(40) / 25, position_m=(1.0, -2.0), heading_deg=90
    )
    out = body(motion.global_orient, motion.body_pose, betas.expand(40, -1))
    vertices = out.vertices + motion.transl_m[:, None]
    assert vertices[..., 1].min().item() == pytest.approx(0, abs=1e-4)
    pelvis = (out.joints[:, 0] + motion.transl_m)[20]
    assert pelvis[0].item() == pytest.approx(1, abs=1e-4)
    assert pelvis[2].item() == pytest.approx(-2, abs=1e-4)
    ahead = motion.global_orient[20, 0, :, 2]
    assert ahead[0] > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "expected the key 'fps'"),
        ({"fps": np.float32(0)}, "a rate of 0.1 to 10000 per second"),
        ({"fps": np.float64(1e-9)}, "a rate of 0.1 to 10000 per second"),
        ({"transl_m": np.full((FRAMES, 3), 1e300)}, "finite numbers below"),
        ({"transl_m": np.zeros((3, 3))}, r"path \(T, 3\)"),
        ({"transl_m": np.full((FRAMES, 3), np.nan)}, "finite"),
        ({"body_pose_axis_angle": np.zeros((FRAMES, 21, 3))}, r"\(T, 23, 3\)"),
        ({"poses": np.zeros((FRAMES, 63))}, r"72, 156 or 165"),
        ({"fps": np.array(["x"], dtype=object)}, "plain arrays"),
        ({"global_orient_axis_angle": None, "body_pose_axis_angle": None}, "expected the key"),
    ],
)
def test_wrong_npz_files_are_refused(
    tmp_path: Path, pose: F64, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MotionError, match=message):
        load_recording(own_npz(tmp_path / "a.npz", pose, **changes))


def test_wrong_bvh_files_name_the_line(tmp_path: Path, pose: F64, rest: F64) -> None:
    file = write_bvh(
        tmp_path / "a.bvh", pose[:3], rest, path_of(3), names=CMU_NAMES, order="zxy", unit_m=0.01
    )
    good = file.read_text().splitlines()

    def expect(lines: list[str], message: str) -> None:
        file.write_text("\n".join(lines))
        with pytest.raises(MotionError, match=message):
            load_recording(file)

    motion = good.index("MOTION")
    expect(good[:-1], "expected frame 2 of 3, got the end of the file")
    expect([*good[:-1], good[-1] + " x"], rf"a\.bvh, line {len(good)}: expected 69 numbers")
    expect([*good[:3], "OFFSET 1 2", *good[4:]], r"line 4: expected 3 numbers")
    expect([*good[:4], "CHANNELS 2 Xrotation", *good[5:]], r"line 5: expected CHANNELS")
    expect([*good[: motion - 1], *good[motion:]], r"closed by \}")
    expect(["HELLO", *good[1:]], r"line 1: expected HIERARCHY")
    expect([line.replace("LeftUpLeg", "Tail") for line in good], "joints like .'leftupleg'")
    expect([*good[: motion + 1], "Frames: 99999999999", *good[motion + 2 :]], "end of the file")
    expect([*good[: motion + 1], "Frames: ²", *good[motion + 2 :]], "Frames: and their number")
    expect([*good[: motion + 1], "Frames: 2", *good[motion + 2 :]], "2 frames as declared, 1 line")
    expect([*good[: motion + 2], "Frame Time: 1e5", *good[motion + 3 :]], "a time per frame of")
    expect([*good[:-1], " ".join(["1e99"] * 69)], "expected 69 numbers below")
    expect([*good[:5], good[4], *good[5:]], "line 6: expected ROOT, JOINT")  # CHANNELS twice
    file.write_text("\n".join(good), encoding="utf-8-sig")
    assert len(load_recording(file).pose) == 3


def test_a_bvh_whose_bones_tell_no_axes_is_refused(tmp_path: Path, pose: F64, rest: F64) -> None:
    flat = rest.copy()
    flat[[1, 2]] = flat[0]  # both hips in the middle: no left and no right
    file = write_bvh(
        tmp_path / "a.bvh", pose, flat, path_of(FRAMES), names=CMU_NAMES, order="zxy", unit_m=0.01
    )
    with pytest.raises(MotionError, match="bones that tell the axes of"):
        load_recording(file)


def test_a_folder_is_read_in_order(tmp_path: Path, pose: F64) -> None:
    with pytest.raises(MotionError, match="got none"):
        load_recordings(tmp_path)
    for name in ("b.npz", "a.npz"):
        own_npz(tmp_path / name, pose[:4])
    (tmp_path / "notes.txt").write_text("x")
    assert [r.name for r in load_recordings(tmp_path)] == ["a.npz", "b.npz"]


def test_an_amass_folder_is_read_with_its_subjects(
    tmp_path: Path, pose: F64, caplog: pytest.LogCaptureFixture
) -> None:
    for subject in ("s2", "s1"):
        (tmp_path / "CMU" / subject).mkdir(parents=True)
        npz(tmp_path / "CMU" / subject / "shape.npz", betas=np.zeros(16))
    with pytest.raises(MotionError, match=r"got none in .*s1/shape\.npz, .*s2/shape\.npz"):
        load_recordings(tmp_path)
    own_npz(tmp_path / "CMU" / "s2" / "walk.npz", pose[:4])
    own_npz(tmp_path / "CMU" / "s1" / "run.NPZ.npz", pose[:4])
    npz(tmp_path / "CMU" / "s1" / "neutral.npz", betas=np.zeros(16))
    (tmp_path / "CMU" / "s1" / "up").symlink_to(tmp_path)
    caplog.clear()
    assert [r.name for r in load_recordings(tmp_path)] == ["run.NPZ.npz", "walk.npz"]
    first, second = caplog.messages
    assert first.endswith("s1: left out, no poses in neutral.npz, shape.npz")
    assert second.endswith("s2: left out, no poses in shape.npz")


def test_what_is_no_npz_is_said_clearly(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.zeros((3, 72)))
    with pytest.raises(
        MotionError, match=r"a\.npz: expected an \.npz of plain arrays, got a single"
    ):
        load_recording(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", poses=np.random.default_rng(0).normal(size=(9, 72)))
    content = bytearray((tmp_path / "b.npz").read_bytes())
    content[200:400] = bytes(200)
    (tmp_path / "b.npz").write_bytes(content)
    with pytest.raises(MotionError, match=r"b\.npz: expected an \.npz of plain arrays"):
        load_recording(tmp_path / "b.npz")
    header = io.BytesIO()
    claims = {"descr": "<f8", "fortran_order": False, "shape": (10**13, 72)}
    np.lib.format.write_array_header_1_0(header, claims)
    for member, said in ((header.getvalue(), "of plain arrays, got"), (b"x", "of another kind")):
        with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
            archive.writestr("poses.npy", member)
        with pytest.raises(MotionError, match=said):
            load_recording(tmp_path / "c.npz")
    content = bytearray((tmp_path / "c.npz").read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1  # encrypted
    (tmp_path / "c.npz").write_bytes(content)
    with pytest.raises(MotionError, match="encrypted"):
        load_recording(tmp_path / "c.npz")


def test_limits_mirror_each_other_and_hold_rest() -> None:
    for left, right in ((1, 2), (4, 5), (16, 17), (18, 19)):
        mirrored = np.sort(LIMITS[left] * [1, -1, -1], axis=0)
        np.testing.assert_array_equal(LIMITS[right], mirrored)
    assert (LIMITS[:, 0] < 0).all()
    assert (LIMITS[:, 1] > 0).all()
