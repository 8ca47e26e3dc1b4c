"""The camera of a synthetic scene, and how it moves.

World axes: x right, y up, z towards the viewer; the floor is y = 0; metres. Camera axes: x right,
y down, z forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Camera:
    """A pinhole camera at one moment.

    Attributes:
        position_m: (3,) in the world.
        yaw_deg: to the left; 0 looks along -z.
        pitch_deg: downwards.
        focal_px: focal length.
        image_size_wh: (width, height); the principal point is (width / 2, height / 2).
        roll_deg: of the picture, clockwise.
    """

    position_m: tuple[float, float, float]
    yaw_deg: float
    pitch_deg: float
    focal_px: float
    image_size_wh: tuple[int, int]
    roll_deg: float = 0.0

    @property
    def rotation(self) -> Tensor:
        """(3, 3) float32, world axes to camera axes."""
        angles = [self.yaw_deg, -self.pitch_deg, self.roll_deg]
        turn = Rotation.from_euler("YXZ", angles, degrees=True)
        return torch.from_numpy(np.diag([1.0, -1, -1]) @ turn.inv().as_matrix()).float()

    @property
    def principal_point_px(self) -> tuple[float, float]:
        return self.image_size_wh[0] / 2, self.image_size_wh[1] / 2

    def to_camera(self, points_m: Tensor) -> Tensor:
        """(..., 3) world points in camera axes."""
        return (points_m - torch.tensor(self.position_m)) @ self.rotation.T

    def project(self, points_cam: Tensor) -> Tensor:
        """(..., 3) points in camera axes to (..., 2) pixels."""
        center = torch.tensor(self.principal_point_px)
        return points_cam[..., :2] / points_cam[..., 2:] * self.focal_px + center


@dataclass(frozen=True, slots=True)
class CameraMove:
    """Where a camera stands in the middle of a shot, and how it moves.

    Attributes:
        position_m, yaw_deg, pitch_deg: in the middle of the shot.
        velocity_m_s: dolly.
        pan_deg_s: turn to the left.
        shake_deg: size of the turns of a hand that holds it; positions shake by 1 cm per degree.
        shake_phase: radians; of the shake.
    """

    position_m: tuple[float, float, float] = (0.0, 1.45, 5.2)
    yaw_deg: float = 0.0
    pitch_deg: float = 5.0
    velocity_m_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    pan_deg_s: float = 0.0
    shake_deg: float = 0.0
    shake_phase: float = 0.0

    def at(self, time_s: float, focal_px: float, image_size_wh: tuple[int, int]) -> Camera:
        """The camera at a time, 0 being the middle of the shot."""
        k = np.arange(6)
        rates = 2 * np.pi * np.array([0.9, 1.3, 0.7, 1.7, 1.1, 0.5])
        shake = self.shake_deg * np.sin(rates * time_s + self.shake_phase * (k + 1))
        x, y, z = (
            np.array(self.position_m) + time_s * np.array(self.velocity_m_s) + 0.01 * shake[:3]
        ).tolist()
        return Camera(
            position_m=(x, y, z),
            yaw_deg=float(self.yaw_deg + self.pan_deg_s * time_s + shake[3]),
            pitch_deg=float(self.pitch_deg + shake[4]),
            focal_px=focal_px,
            image_size_wh=image_size_wh,
            roll_deg=float(0.5 * shake[5]),
        )
