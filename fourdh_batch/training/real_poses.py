"""Bodies that the discriminator takes for real."""

from __future__ import annotations

import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile

from fourdh_batch.errors import CheckpointError
from fourdh_batch.geometry import axis_angle_to_rotmat
from fourdh_batch.storage import is_local, local_path
from fourdh_batch.tables.reader import read_tracks, smpl_arrays
from fourdh_batch.types import F32, NUM_BETAS, NUM_BODY_JOINTS

NUM_POSE = 3 * (1 + NUM_BODY_JOINTS)  # axis-angle, the root first


class StoredPoses:
    """Bodies in an order that follows from a seed.

    Args:
        body_pose: (N, 23, 3, 3) rotation matrices.
        betas: (N, 10).
        seed: of the order; every round over the bodies has another.
    """

    def __init__(self, body_pose: F32, betas: F32, *, seed: int) -> None:
        self._body_pose = body_pose
        self._betas = betas
        self._seed = seed
        self._round: tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]] | None = None

    def __getitem__(self, number: int) -> tuple[F32, F32]:
        """(23, 3, 3) and (10,) of any number from 0 on."""
        turn, at = divmod(number, len(self._betas))
        if self._round is None or self._round[0] != turn:
            random = np.random.default_rng((self._seed, turn))
            self._round = turn, random.permutation(len(self._betas))
        row = int(self._round[1][at])
        return self._body_pose[row], self._betas[row]


def load_real_poses(path: str, *, seed: int) -> StoredPoses:
    """Bodies of motion capture, or of a run.

    Args:
        path: an ``.npz`` of `body_pose` (N, 72) axis-angle with the root first and `betas` (N, 10),
            as ``cmu_mocap.npz`` of the published training data; or an output root with `tracks`,
            of which detected rows count.
        seed: of the order.

    Raises:
        CheckpointError: the file does not hold them.
        FileNotFoundError: there is no such file, or nothing was committed.
    """
    if not path.endswith(".npz"):
        columns = ["body_pose", "betas"]
        rows = read_tracks(path, columns=columns, filters=[("state", "==", "detected")])
        arrays = smpl_arrays(rows)
        pose, betas = arrays["body_pose"], arrays["betas"]
    else:
        if not is_local(path):
            raise CheckpointError(f"{path}: expected a local file")
        axis_angle, betas = _read_npz(local_path(path))
        pose = axis_angle_to_rotmat(axis_angle.reshape(len(axis_angle), -1, 3)[:, 1:])
    if not len(betas):
        raise CheckpointError(f"{path}: expected bodies, got none")
    if not (np.isfinite(pose).all() and np.isfinite(betas).all()):
        raise CheckpointError(f"{path}: expected finite bodies, got NaN or infinity")
    return StoredPoses(pose.astype(np.float32), betas.astype(np.float32), seed=seed)


def _read_npz(path: Path) -> tuple[F32, F32]:
    try:
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, NpzFile):
            raise ValueError("a single array")
        with stored:
            pose, betas = stored["body_pose"], stored["betas"][:, :NUM_BETAS]
    except (ValueError, EOFError, KeyError, IndexError, BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path}: expected 'body_pose' and 'betas', got {error}") from error
    if pose.ndim != 2 or pose.shape[1] != NUM_POSE or betas.shape != (len(pose), NUM_BETAS):
        raise CheckpointError(
            f"{path}: expected body_pose (N, {NUM_POSE}) and betas (N, {NUM_BETAS}), "
            f"got {pose.shape} and {betas.shape}"
        )
    return pose.astype(np.float32), betas.astype(np.float32)
