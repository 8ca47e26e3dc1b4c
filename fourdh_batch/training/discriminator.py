"""The factorised discriminator of poses and shapes, for training only.

It tells predicted bodies from motion capture: each joint alone, all joints together, the shape.

`B` bodies, `J` = 23 joints, `D` = 32 features of a joint. Parameter names are those of the
published checkpoint (`discriminator.*`, 62 tensors).

Source: Kanazawa et al., End-to-end Recovery of Human Shape and Pose, section 3.3; HMR 2.0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourdh_batch.types import NUM_BETAS, NUM_BODY_JOINTS

JOINT_DIM = 32
ALL_JOINTS_DIM = 1024


class Discriminator(nn.Module):
    """Scores of bodies: 1 is real, 0 is predicted; no sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.D_conv1 = nn.Conv2d(9, JOINT_DIM, kernel_size=1)
        self.D_conv2 = nn.Conv2d(JOINT_DIM, JOINT_DIM, kernel_size=1)
        self.pose_out = nn.ModuleList(nn.Linear(JOINT_DIM, 1) for _ in range(NUM_BODY_JOINTS))
        self.betas_fc1 = nn.Linear(NUM_BETAS, 10)
        self.betas_fc2 = nn.Linear(10, 5)
        self.betas_out = nn.Linear(5, 1)
        self.D_alljoints_fc1 = nn.Linear(JOINT_DIM * NUM_BODY_JOINTS, ALL_JOINTS_DIM)
        self.D_alljoints_fc2 = nn.Linear(ALL_JOINTS_DIM, ALL_JOINTS_DIM)
        self.D_alljoints_out = nn.Linear(ALL_JOINTS_DIM, 1)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, body_pose: Tensor, betas: Tensor) -> Tensor:
        """Scores.

        Args:
            body_pose: (B, 23, 3, 3) rotation matrices.
            betas: (B, 10).

        Returns:
            (B, 25): 23 joints, the shape, all joints.
        """
        numbers = body_pose.reshape(-1, NUM_BODY_JOINTS, 9).transpose(1, 2)[
            ..., None
        ]  # (B, 9, J, 1)
        features = F.relu(self.D_conv2(F.relu(self.D_conv1(numbers))))[..., 0]  # (B, D, J)
        joints = [read_out(features[:, :, j]) for j, read_out in enumerate(self.pose_out)]
        shape = self.betas_out(F.relu(self.betas_fc2(F.relu(self.betas_fc1(betas)))))
        hidden = F.relu(self.D_alljoints_fc1(features.flatten(1)))
        together = self.D_alljoints_out(F.relu(self.D_alljoints_fc2(hidden)))
        return torch.cat((*joints, shape, together), dim=1)
