"""Square crops of people, bit for bit as OpenCV 4 makes them, on the device of the frames.

HMR 2.0 was trained on crops of `cv2.warpAffine`, which samples at 1/32 pixel with integer weights.
The same integers are computed here, so that CPU, GPU and OpenCV agree exactly; an exact bilinear
sampler would differ by up to 6 grey levels, OpenCV 5 by up to 6.

`T` frames, `M` crops, `S` = 256 side of a crop. Crop pixel i samples the frame at
center + (i - 128) * size / 256: the centre of the square falls on index 128.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fourdh_batch.geometry import CROP_PX
from fourdh_batch.types import F64

# Of 0..255 pixels, RGB: the statistics of ImageNet, as HMR 2.0 normalises.
MEAN_RGB = 255 * np.array([0.485, 0.456, 0.406])
STD_RGB = 255 * np.array([0.229, 0.224, 0.225])

COORDINATE_SCALE = 1024  # OpenCV adds coordinates in 1/1024 px and rounds the sum to 1/32 px
STEPS = 32
POSITION_LIMIT = 2**29  # half a million pixels: outside of any frame, and sums fit in int32

BLUR_ABOVE = 1.1  # the published demo blurs where size / 256 / 2 exceeds this
BLUR_TRUNCATE = 4.0  # radius of the kernel in sigmas, scikit-image's default


def crop_batch(
    frames: Tensor, frame_row: Tensor, center: Tensor, size: Tensor, *, antialias: bool = False
) -> Tensor:
    """Normalised crops for HMR 2.0.

    Args:
        frames: (T, H, W, 3) uint8 RGB, on any device.
        frame_row: (M,) integer, the frame of each crop.
        center: (M, 2) float32 px, of `geometry.crop_square`; best kept on the CPU.
        size: (M,) float32 px, positive.
        antialias: blur large crops before they are shrunk, as the published single-image demo
            does. Production crops have no blur: neither tracker nor evaluation blurs. One crop
            at a time, in float64.

    Returns:
        (M, 3, 256, 256) float32 on the device of the frames. Outside the frame is black before
        the normalisation.

    Raises:
        ValueError: a shape or dtype does not fit, or a crop has no finite place or no extent.
    """
    _check(frames, 3, frame_row, center, size)
    if antialias:
        pixels = _warp_blurred(frames, frame_row, center, size)
    else:
        pixels = _warp(frames, frame_row, center, size)
    mean = torch.from_numpy(MEAN_RGB).to(frames.device)[:, None, None]
    std = torch.from_numpy(STD_RGB).to(frames.device)[:, None, None]
    return (pixels - mean).div_(std).float()  # in float64, as published


def crop_masks(masks: Tensor, mask_row: Tensor, center: Tensor, size: Tensor) -> Tensor:
    """Crops of binary masks through the same warp: the tracker's fourth channel.

    Args:
        masks: (N, H, W) uint8 of the whole frame, 0 outside and 255 inside.
        mask_row: (M,) integer, the mask of each crop.
        center, size: as in `crop_batch`.

    Returns:
        (M, 256, 256) float32 whole numbers in 0..255, coverage of each pixel.
    """
    _check(masks[..., None], 1, mask_row, center, size)
    return _warp(masks[..., None], mask_row, center, size)[:, 0]


def crop_affine(center: Tensor, size: Tensor) -> F64:
    """Matrices that take crop pixels to frame pixels, equal to OpenCV's in every bit.

    Args:
        center: (M, 2) float32 px.
        size: (M,) float32 px.

    Returns:
        (M, 2, 3) float64. The last bits matter: sampling positions are rounded to 1/1024 px, and
        ties are common because float32 centres are multiples of a power of two.
    """
    middle = center.detach().cpu().float().numpy()
    half = size.detach().cpu().float().numpy() * np.float32(0.5)
    nothing = np.zeros_like(half)
    source = np.stack(
        (
            middle,
            middle + np.stack((nothing, half), axis=-1),
            middle + np.stack((half, nothing), axis=-1),
        ),
        axis=1,
    ).astype(np.float64)  # (M, 3, 2), rounded to float32 on the way
    low, high = CROP_PX / 2, float(CROP_PX)
    target = np.array([low, low, low, high, high, low])
    return _inverted(_solved_affine(source, target))


def _solved_affine(source: F64, target: F64) -> F64:
    """Affine maps of three points each, by elimination in the order in which OpenCV rounds.

    Args:
        source: (M, 3, 2) points.
        target: (6,) x, y of the three points they go to.

    Returns:
        (M, 2, 3).
    """
    num = len(source)
    rows = np.arange(num)
    system = np.zeros((num, 6, 7))
    system[:, 0::2, 0:2] = system[:, 1::2, 3:5] = source
    system[:, 0::2, 2] = system[:, 1::2, 5] = 1
    system[:, :, 6] = target
    for i in range(6):
        pivot = i + np.abs(system[:, i:, i]).argmax(axis=1)
        swapped = system[rows, pivot]
        system[rows, pivot] = system[:, i]
        system[:, i] = swapped
        factor = system[:, i + 1 :, i] * (-1 / swapped[:, i])[:, None]
        system[:, i + 1 :, i:] += factor[:, :, None] * swapped[:, None, i:]
    solution = np.zeros((num, 6))
    for i in reversed(range(6)):
        rest = system[:, i, 6].copy()
        for j in range(i + 1, 6):
            rest -= system[:, i, j] * solution[:, j]
        solution[:, i] = rest / system[:, i, i]
    return solution.reshape(num, 2, 3)


def _inverted(affine: F64) -> F64:
    """(M, 2, 3) inverse maps, in the order in which OpenCV rounds."""
    (a, b, c), (d, e, f) = np.moveaxis(affine, 0, -1)
    scale = 1 / (a * e - b * d)
    a, b, d, e = e * scale, b * -scale, d * -scale, a * scale
    rows = ((a, b, -a * c - b * f), (d, e, -d * c - e * f))
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=1)


def _warp(frames: Tensor, frame_row: Tensor, center: Tensor, size: Tensor) -> Tensor:
    """(T, H, W, C) uint8 to (M, C, S, S) float32 whole numbers in 0..255."""
    num_frames, height, width, channels = frames.shape
    column, row = _positions(crop_affine(center, size), frames.device)
    num = len(column)
    first = frame_row.to(frames.device, torch.int64)[:, None, None] * (height * width)
    x_taps = _taps(column[:, 0, None, :] + row[:, 0, :, None], width)
    y_taps = _taps(column[:, 1, None, :] + row[:, 1, :, None], height)
    flat = frames.reshape(num_frames * height * width, channels)
    total = torch.full((num, channels, CROP_PX, CROP_PX), 0.5, device=frames.device)
    for y, y_weight in y_taps:
        line = first + y * width
        for x, x_weight in x_taps:
            pixels = flat.index_select(0, (line + x).view(-1))
            pixels = pixels.view(num, CROP_PX, CROP_PX, channels).permute(0, 3, 1, 2).contiguous()
            total.addcmul_(pixels.float(), (x_weight * y_weight)[:, None])
    # A sum of multiples of 2^-10 below 2^9: exact in float32. OpenCV rounds halves up.
    return total.floor_()


def _positions(inverse: F64, device: torch.device) -> tuple[Tensor, Tensor]:
    """Terms of the sampling positions in 1/1024 px, of the columns and of the rows.

    Returns:
        Two (M, 2, S) int32, x and y; rounding to 1/32 px is prepared in the second.
    """
    index = np.arange(CROP_PX)
    column = np.rint(inverse[:, :, 0, None] * index * COORDINATE_SCALE)
    row = np.rint((inverse[:, :, 1, None] * index + inverse[:, :, 2, None]) * COORDINATE_SCALE)
    row += COORDINATE_SCALE // STEPS // 2
    both = np.clip(np.stack((column, row)), -POSITION_LIMIT, POSITION_LIMIT).astype(np.int32)
    column_, row_ = torch.from_numpy(both).to(device)
    return column_, row_


def _taps(position: Tensor, length: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two neighbours along one axis: index into it and weight, zero outside.

    Args:
        position: (M, S, S) int32 in 1/1024 px.
        length: number of pixels of the axis.
    """
    position = position >> 5  # 1/32 px
    low = position >> 5
    high = low + 1
    fraction = (position & (STEPS - 1)).float().mul_(1 / STEPS)
    low_inside, high_inside = low.clamp(0, length - 1), high.clamp(0, length - 1)
    return (
        (low_inside, (1 - fraction) * (low_inside == low)),
        (high_inside, fraction * (high_inside == high)),
    )


def _warp_blurred(frames: Tensor, frame_row: Tensor, center: Tensor, size: Tensor) -> Tensor:
    """(M, 3, S, S) float64; each crop larger than the limit from a blurred copy of its region."""
    height, width = frames.shape[1:3]
    pixels = _warp(frames, frame_row, center, size).double()
    column, row = _positions(crop_affine(center, size), frames.device)
    for i in (size / CROP_PX / 2 > BLUR_ABOVE).nonzero().flatten().tolist():
        sigma = (float(size[i]) / CROP_PX / 2 - 1) / 2
        x_taps = _taps(column[i, 0, None, :] + row[i, 0, :, None], width)
        y_taps = _taps(column[i, 1, None, :] + row[i, 1, :, None], height)
        left, right = int(x_taps[0][0].min()), int(x_taps[1][0].max()) + 1
        top, bottom = int(y_taps[0][0].min()), int(y_taps[1][0].max()) + 1
        region = _blurred_region(frames[int(frame_row[i])], (left, top, right, bottom), sigma)
        pixels[i] = 0
        for y, y_weight in y_taps:
            for x, x_weight in x_taps:
                pixels[i] += region[:, y - top, x - left] * (x_weight * y_weight)
    return pixels


def _blurred_region(frame: Tensor, bounds: tuple[int, int, int, int], sigma: float) -> Tensor:
    """A part of a frame after a Gaussian blur of the whole frame.

    Args:
        frame: (H, W, 3) uint8.
        bounds: left, top, right, bottom in px; right and bottom are not included.
        sigma: px. The kernel ends at 4 sigma; the frame's edge pixels repeat outside.

    Returns:
        (3, bottom - top, right - left) float64 in 0..255.
    """
    left, top, right, bottom = bounds
    radius = int(BLUR_TRUNCATE * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1, dtype=torch.float64, device=frame.device)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel /= kernel.sum()
    x = torch.arange(left - radius, right + radius, device=frame.device)
    y = torch.arange(top - radius, bottom + radius, device=frame.device)
    region = frame[y.clamp(0, frame.shape[0] - 1)][:, x.clamp(0, frame.shape[1] - 1)]
    image = region.permute(2, 0, 1)[:, None].double()  # (3, 1, H', W')
    image = F.conv2d(image, kernel.view(1, 1, -1, 1))
    return F.conv2d(image, kernel.view(1, 1, 1, -1))[:, 0]


def _check(frames: Tensor, channels: int, frame_row: Tensor, center: Tensor, size: Tensor) -> None:
    if frames.ndim != 4 or frames.shape[3] != channels or frames.dtype != torch.uint8:
        raise ValueError(
            f"expected uint8 pictures with {channels} channels, "
            f"got {tuple(frames.shape)} {frames.dtype}"
        )
    num = len(frame_row)
    if frame_row.ndim != 1 or center.shape != (num, 2) or size.shape != (num,):
        raise ValueError(
            f"expected frame_row ({num},), center ({num}, 2), size ({num},), got "
            f"{tuple(frame_row.shape)}, {tuple(center.shape)}, {tuple(size.shape)}"
        )
    if num and (frame_row.min() < 0 or frame_row.max() >= len(frames)):
        raise ValueError(
            f"frame_row: expected 0 to {len(frames) - 1}, "
            f"got {frame_row.min()} to {frame_row.max()}"
        )
    reach = center + size[:, None] / 2
    if not (torch.isfinite(reach).all() and (reach > center).all()):
        raise ValueError(
            "expected crops at finite places, larger than the spacing of float32 there"
        )
