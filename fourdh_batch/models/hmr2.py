"""HMR 2.0: crops of people to SMPL bodies.

`B` people, `N` tokens, `K` = 44 keypoints, `V` vertices of the body.

Source: Goel et al., Humans in 4D: Reconstructing and Tracking Humans with Transformers.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fourdh_batch.geometry import (
    CROP_PX,
    crop_camera_translation,
    project_to_crop,
    rot6d_to_rotmat,
)
from fourdh_batch.models.precision import tf32
from fourdh_batch.models.smpl_head import SmplHead
from fourdh_batch.models.vit import IMAGE_HW, ViT
from fourdh_batch.types import NUM_BODY_JOINTS

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
REDUCED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIDE_MARGIN_PX = (CROP_PX - IMAGE_HW[1]) // 2  # columns of the crop that the backbone never sees


@dataclass(frozen=True, slots=True, eq=False)
class HmrOutput:
    """Bodies of B crops, float32.

    Attributes:
        global_orient: (B, 1, 3, 3) rotation matrices into camera axes (x right, y down, z forward).
        body_pose: (B, 23, 3, 3) rotation matrices, each relative to its parent joint.
        betas: (B, 10).
        pred_cam: (B, 3) weak perspective (s, tx, ty) of the crop.
        pred_cam_t: (B, 3) metres, translation of the crop camera (focal length 5000 px on 256 px).
        keypoints_3d: (B, K, 3) metres, camera not added.
        keypoints_2d: (B, K, 2) crop widths, 0 is the crop centre.
        pose6d: (B, 144) the six numbers per joint that the rotations are made of.
        token_out: (B, E) the decoder's last token.
        vertices: (B, V, 3) metres, camera not added; None unless asked for.
    """

    global_orient: Tensor
    body_pose: Tensor
    betas: Tensor
    pred_cam: Tensor
    pred_cam_t: Tensor
    keypoints_3d: Tensor
    keypoints_2d: Tensor
    pose6d: Tensor
    token_out: Tensor
    vertices: Tensor | None = None


class Hmr2(nn.Module):
    """The network with a body; see `build.load_hmr2`.

    Args:
        backbone, smpl_head: of fitting widths; their parameters have the checkpoint's names.
        body: has `keypoints_3d(global_orient, body_pose, betas)` and, when called with the same,
            gives `vertices` and `keypoints_3d`.
        size_name: entry of `build.HMR2_SIZES`.
        weights_origin: ``official``, ``imported``, ``trained`` or ``untrained``.
        weights_digest: SHA-256 of the weights, 64 hex digits.
        precision: of the backbone. ``fp32`` keeps TF32 off, ``tf32`` allows it on GPUs, ``bf16``
            and ``fp16`` run on a copy of the weights in that type, ``auto`` is fp16 on GPUs and
            fp32 elsewhere. The head and all after it are always float32 without TF32: they are
            one percent of the work and half of the error.
        compile_blocks: run the backbone's blocks through `torch.compile`.

    Attributes:
        num_overflows: crops whose tokens overflowed in fp16 and were computed again in fp32.
    """

    def __init__(
        self,
        backbone: ViT,
        smpl_head: SmplHead,
        body: nn.Module,
        *,
        size_name: str,
        weights_origin: str,
        weights_digest: str,
        precision: str = "auto",
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
        self.backbone = backbone
        self.smpl_head = smpl_head
        self.body = body
        self.size_name = size_name
        self.weights_origin = weights_origin
        self.weights_digest = weights_digest
        self.precision = precision
        self.num_overflows = 0
        self._compile_blocks = compile_blocks
        self._reduced: dict[torch.dtype, ViT] = {}
        if compile_blocks:
            _compile_blocks(backbone)

    @property
    def active_precision(self) -> str:
        """What ``auto`` means on the present device."""
        if self.precision != "auto":
            return self.precision
        return "fp16" if self.smpl_head.init_cam.is_cuda else "fp32"

    def forward(self, crops: Tensor, *, with_vertices: bool = False) -> HmrOutput:
        """Bodies of crops.

        Args:
            crops: (B, 3, 256, 256) float32 normalised RGB, of `video.crops.crop_batch`.
            with_vertices: pose the whole surface, not only what the keypoints need.

        Raises:
            ValueError: the crops have another shape.
        """
        if crops.ndim != 4 or crops.shape[1:] != (3, CROP_PX, CROP_PX):
            raise ValueError(
                f"crops: expected (B, 3, {CROP_PX}, {CROP_PX}), got {tuple(crops.shape)}"
            )
        return self.read_out(self.tokens(crops), with_vertices=with_vertices)

    def read_out(self, tokens: Tensor, *, with_vertices: bool = False) -> HmrOutput:
        """Bodies of tokens: the head and all after it.

        Args:
            tokens: (B, N, D) float32 of the backbone.
            with_vertices: see `forward`.
        """
        with tf32(False):
            head = self.smpl_head(tokens)
            rotmats = rot6d_to_rotmat(head.pose6d.view(len(tokens), 1 + NUM_BODY_JOINTS, 6))
            pose = rotmats[:, :1], rotmats[:, 1:], head.betas
            vertices = None
            if with_vertices:
                posed = self.body(*pose)
                vertices, keypoints_3d = posed.vertices, posed.keypoints_3d
            else:
                keypoints_3d = cast(Callable[..., Tensor], self.body.keypoints_3d)(*pose)
            pred_cam_t = crop_camera_translation(head.pred_cam)
            return HmrOutput(
                *pose,
                pred_cam=head.pred_cam,
                pred_cam_t=pred_cam_t,
                keypoints_3d=keypoints_3d,
                keypoints_2d=project_to_crop(keypoints_3d, pred_cam_t),
                pose6d=head.pose6d,
                token_out=head.token_out,
                vertices=vertices,
            )

    def tokens(self, crops: Tensor) -> Tensor:
        """(B, 3, 256, 256) to (B, N, D) float32, in the precision of the model."""
        image = backbone_view(crops)
        precision = self.active_precision
        dtype = REDUCED_DTYPES.get(precision)
        if dtype is None:
            with tf32(precision == "tf32"):
                return cast(Tensor, self.backbone(image))
        tokens: Tensor = self._reduced_backbone(dtype)(image.to(dtype)).float()
        if dtype == torch.float16:
            # Only the crops concerned: a person's result must not depend on its companions.
            bad = ~torch.isfinite(tokens).flatten(1).all(dim=1)
            if bad.any():
                if not self.num_overflows:
                    logger.warning("fp16 overflowed in the backbone; such crops run in fp32")
                self.num_overflows += int(bad.sum())
                with tf32(False):
                    tokens[bad] = self.backbone(image[bad])
        return tokens

    def _reduced_backbone(self, dtype: torch.dtype) -> ViT:
        if dtype not in self._reduced:
            with torch.inference_mode(False), torch.no_grad():
                reduced = copy.deepcopy(self.backbone).to(dtype).requires_grad_(False)
            if self._compile_blocks:
                _compile_blocks(reduced)
            self._reduced[dtype] = reduced
        return self._reduced[dtype]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Hmr2:
        # Moving or casting the module: copies of the weights are made again when needed.
        self._reduced.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._reduced.clear()
        return super().load_state_dict(state_dict, *args, **kwargs)


def backbone_view(crops: Tensor) -> Tensor:
    """(B, 3, S, S) to (B, 3, S, 3/4 S): what the backbone sees of crops, S = 256 if not shrunk."""
    side = crops.shape[-1]
    margin = side * SIDE_MARGIN_PX // CROP_PX
    return crops[..., margin : side - margin]


def _compile_blocks(backbone: ViT) -> None:
    """Compile block by block: all blocks share one compiled form, so it takes seconds."""
    for block in backbone.blocks:
        block.compile()
