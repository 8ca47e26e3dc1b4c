"""Tracks drawn over their video: boxes with identities, skeletons, bodies, captions.

Rows are those of the `tracks` table. Lines and letters grow with the picture. Pictures are
(H, W, 3) uint8 RGB; pixel coordinates follow OpenCV. Predicted rows are dashed and faded.
"""

from __future__ import annotations

import colorsys
import math
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from fourdh_batch.rasterizer import rasterize
from fourdh_batch.types import F32, I64, NUM_KEYPOINTS, U8

# Limbs between OpenPose's 25 body joints, the first of the 44 keypoints: arm, leg, face, foot.
MIDDLE_LIMBS = ((1, 8), (1, 0))
RIGHT_LIMBS = (
    *((1, 2), (2, 3), (3, 4), (8, 9), (9, 10), (10, 11)),
    *((0, 15), (15, 17), (11, 22), (22, 23), (11, 24)),
)
LEFT_LIMBS = (
    *((1, 5), (5, 6), (6, 7), (8, 12), (12, 13), (13, 14)),
    *((0, 16), (16, 18), (14, 19), (19, 20), (14, 21)),
)
LEFT_WHITENING = 0.55  # left limbs are lighter, so that front and back can be told apart
FADED = 0.45  # opacity of predicted rows
MESH_OPACITY = 0.75
MESH_LIGHT = (-0.4, -0.6, -0.7)  # towards the light, camera axes
GOLDEN_RATIO = 0.6180339887498949
WARNING_RGB = (255, 190, 60)
SUBPIXEL_BITS = 3  # OpenCV draws at fractions of a pixel
MAX_DRAWN_PX = 1e5  # beyond, OpenCV's fixed-point coordinates would overflow
TEXT_HEIGHT = 0.03  # capital letters, in heights of the picture
MIN_TEXT_PX = 8
HERSHEY_PX = 22.0  # capital letters of FONT_HERSHEY_SIMPLEX at scale 1
X264_OPTIONS = {"crf": "20", "preset": "medium"}

Colour = tuple[int, int, int]
Rect = tuple[int, int, int, int]  # left, top, right, bottom
PosedVertices = Callable[[pd.DataFrame], Tensor]


def track_colour(track_id: int) -> Colour:
    """The colour of an identity, RGB; the same in every frame and every video."""
    hue = track_id * GOLDEN_RATIO % 1
    value = (1.0, 0.8)[track_id // 8 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def printable(text: str) -> str:
    """Text in the ASCII that OpenCV can draw: accents go, all else is escaped."""
    drawn = []
    for letter in text:
        plain = "".join(c for c in unicodedata.normalize("NFKD", letter) if " " <= c <= "~")
        drawn.append(plain or letter.encode("unicode_escape").decode("ascii"))
    return "".join(drawn)


def draw_frame(
    rgb: U8,
    rows: pd.DataFrame,
    *,
    caption: str = "",
    warning: str = "",
    vertices_cam: Tensor | None = None,
    faces: I64 | None = None,
) -> U8:
    """A copy of a frame with its tracks drawn in.

    Args:
        rgb: (H, W, 3) uint8.
        rows: the frame's rows of the `tracks` table: `track_id`, `state`, `bbox_xyxy_px`,
            `keypoints_2d_px`; with bodies also `focal_px` and `principal_point_px`.
        caption: first line, at the top left.
        warning: second line, in another colour.
        vertices_cam: (rows, V, 3) bodies of the rows, metres in camera axes.
        faces: (F, 3), needed with bodies.
    Raises:
        ValueError: the picture is not RGB, or bodies do not fit the rows.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"rgb: expected (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}")
    picture = np.ascontiguousarray(rgb).copy()
    pen = _Pen.of(picture)
    if vertices_cam is not None and len(rows):
        if faces is None or len(vertices_cam) != len(rows):
            raise ValueError(
                f"expected faces and {len(rows)} bodies, got "
                f"{'no faces' if faces is None else 'faces'} and {len(vertices_cam)} bodies"
            )
        picture = _draw_bodies(picture, rows, vertices_cam, faces)
    predicted = (rows["state"] == "predicted").to_numpy(dtype=bool)
    if predicted.any():
        solid = picture.copy()
        _draw_tracks(solid, rows[predicted], pen, is_predicted=True)
        picture = cv2.addWeighted(solid, FADED, picture, 1 - FADED, 0).astype(np.uint8)
    _draw_tracks(picture, rows[~predicted], pen, is_predicted=False)
    taken: list[Rect] = []
    for text, colour in ((caption, (255, 255, 255)), (warning, WARNING_RGB)):
        if text:
            y = taken[-1][3] if taken else 0
            taken.append(pen.caption(picture, printable(text), y, colour))
    _draw_labels(picture, rows, taken, pen)
    return picture


def write_overlay_video(
    frames: Iterable[tuple[int, U8]],
    tracks: pd.DataFrame,
    path: str | Path,
    *,
    fps: float,
    caption: str = "",
    warning: str = "",
    posed_vertices: PosedVertices | None = None,
    faces: I64 | None = None,
) -> int:
    """Draws a video, one frame at a time, and encodes it as H.264.

    The file appears under its name when it is complete. Odd sizes are padded by a line; frames
    of another size than the first are scaled to it.

    Args:
        frames: (frame_index, rgb) in order.
        tracks: rows of one video; see `draw_frame`.
        path: an .mp4 file, overwritten.
        fps: frames per second of the result.
        caption: first line; the frame's number is added.
        warning: second line, in another colour.
        posed_vertices: rows of one frame (at least one) to (rows, V, 3) bodies in camera axes.
        faces: (F, 3), needed with `posed_vertices`.
    Returns:
        The number of frames.
    Raises:
        ValueError: there is no frame, or `fps` is not positive.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps: expected a positive number, got {fps}")
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    rows_of = tracks.groupby("frame_index").indices
    nobody = tracks.iloc[:0]
    count = 0
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            rate = Fraction(fps).limit_denominator(90_000)
            stream = container.add_stream("libx264", rate=rate, options=X264_OPTIONS)
            stream.pix_fmt = "yuv420p"
            for frame_index, rgb in frames:
                if count == 0:
                    size_wh = rgb.shape[1], rgb.shape[0]
                    stream.width, stream.height = (n + n % 2 for n in size_wh)
                elif (rgb.shape[1], rgb.shape[0]) != size_wh:
                    rgb = cv2.resize(rgb, size_wh, interpolation=cv2.INTER_AREA).astype(np.uint8)
                place = rows_of.get(frame_index)
                rows = nobody if place is None else tracks.iloc[place]
                drawn = draw_frame(
                    rgb,
                    rows,
                    caption=f"{caption}  frame {frame_index}".strip(),
                    warning=warning,
                    vertices_cam=posed_vertices(rows) if posed_vertices and len(rows) else None,
                    faces=faces,
                )
                even = _pad(drawn, (stream.width, stream.height), "edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
                count += 1
            if count == 0:
                raise ValueError(f"{path} ({caption}): expected at least one frame, got none")
            container.mux(stream.encode(None))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def contact_sheet(frames: Iterable[U8], path: str | Path, *, columns: int) -> None:
    """Writes frames side by side, row by row, as one PNG.

    Args:
        frames: (H, W, 3) uint8 each; smaller ones are padded to the largest.
        columns: pictures per row.
    Raises:
        ValueError: there is no frame, or no column.
    """
    pictures = list(frames)
    if not pictures or columns < 1:
        raise ValueError(f"expected frames and columns, got {len(pictures)} and {columns}")
    size_wh = max(p.shape[1] for p in pictures), max(p.shape[0] for p in pictures)
    pictures = [_pad(p, size_wh, "constant") for p in pictures]
    columns = min(columns, len(pictures))
    pictures += [np.zeros_like(pictures[0])] * (-len(pictures) % columns)
    rows = [np.hstack(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    _, encoded = cv2.imencode(".png", cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))
    Path(path).write_bytes(encoded.tobytes())


@dataclass(frozen=True, slots=True)
class _Pen:
    """Line widths and letter sizes for one picture size."""

    line_px: int
    font_scale: float
    font_px: int

    @staticmethod
    def of(picture: U8) -> _Pen:
        short = min(picture.shape[:2])
        text_px = max(MIN_TEXT_PX, TEXT_HEIGHT * short)
        return _Pen(
            line_px=max(1, round(short / 300)),
            font_scale=text_px / HERSHEY_PX,
            font_px=max(1, round(text_px / 11)),
        )

    def size(self, text: str) -> tuple[int, int, int]:
        """Width, height and descent of a text in pixels."""
        (width, height), below = cv2.getTextSize(
            text, cv2.FONT_HERSHEY_SIMPLEX, self.font_scale, self.font_px
        )
        return width, height, below

    def box(self, text: str) -> tuple[int, int]:
        """Width and height of a label."""
        width, height, below = self.size(text)
        margin = max(2, height // 4)
        return width + 2 * margin, height + below // 2 + 2 * margin

    def label(self, picture: U8, text: str, x: int, y: int, ground: Colour, ink: Colour) -> Rect:
        """Writes on a filled ground whose upper left corner is (x, y)."""
        width, height = self.box(text)
        _, letters, _ = self.size(text)
        margin = max(2, letters // 4)
        rect = x, y, x + width, y + height
        cv2.rectangle(picture, rect[:2], (rect[2] - 1, rect[3] - 1), ground, -1)
        at = (x + margin, y + margin + letters)
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(picture, text, at, font, self.font_scale, ink, self.font_px, cv2.LINE_AA)
        return rect

    def caption(self, picture: U8, text: str, y: int, ink: Colour) -> Rect:
        """A line at the left edge; too long a text loses its middle."""
        keep = len(text)
        shown = text
        while self.box(shown)[0] > picture.shape[1] and keep > 4:
            keep -= max(1, keep // 16)
            shown = text[: keep // 2] + ".." + text[len(text) - (keep - keep // 2) :]
        return self.label(picture, shown, 0, y, (0, 0, 0), ink)


def _draw_tracks(picture: U8, rows: pd.DataFrame, pen: _Pen, *, is_predicted: bool) -> None:
    """Skeletons and boxes, in place."""
    for track_id, box, flat in zip(
        rows["track_id"], rows["bbox_xyxy_px"], rows["keypoints_2d_px"], strict=True
    ):
        colour = track_colour(int(track_id))
        keypoints = np.asarray(flat, dtype=np.float32).reshape(NUM_KEYPOINTS, 2)
        _draw_skeleton(picture, keypoints, colour, pen)
        corners = np.asarray(box, dtype=np.float64)
        if np.isfinite(corners).all():
            _draw_box(picture, corners, colour, pen, is_dashed=is_predicted)


def _draw_skeleton(picture: U8, keypoints: F32, colour: Colour, pen: _Pen) -> None:
    near = np.abs(np.nan_to_num(keypoints, nan=np.inf)) < MAX_DRAWN_PX  # (44, 2)
    points = np.where(near, keypoints, 0) * (1 << SUBPIXEL_BITS)
    at = [(x, y) for x, y in np.rint(points).astype(int).tolist()]
    is_usable = [x and y for x, y in near.tolist()]
    whitened = [round(c + LEFT_WHITENING * (255 - c)) for c in colour]
    light: Colour = (whitened[0], whitened[1], whitened[2])
    for limbs, ink in ((MIDDLE_LIMBS + RIGHT_LIMBS, colour), (LEFT_LIMBS, light)):
        for a, b in limbs:
            if is_usable[a] and is_usable[b]:
                cv2.line(picture, at[a], at[b], ink, pen.line_px, cv2.LINE_AA, SUBPIXEL_BITS)


def _draw_box(
    picture: U8, corners: np.ndarray, colour: Colour, pen: _Pen, *, is_dashed: bool
) -> None:
    left, top, right, bottom = np.rint(corners.clip(-MAX_DRAWN_PX, MAX_DRAWN_PX)).astype(int)
    if not is_dashed:
        cv2.rectangle(picture, (left, top), (right, bottom), colour, pen.line_px)
        return
    dash = 6 * pen.line_px
    height, width = picture.shape[:2]
    for start in range(max(left, -dash), min(right, width), 2 * dash):
        stop = min(start + dash, right)
        cv2.line(picture, (start, top), (stop, top), colour, pen.line_px)
        cv2.line(picture, (start, bottom), (stop, bottom), colour, pen.line_px)
    for start in range(max(top, -dash), min(bottom, height), 2 * dash):
        stop = min(start + dash, bottom)
        cv2.line(picture, (left, start), (left, stop), colour, pen.line_px)
        cv2.line(picture, (right, start), (right, stop), colour, pen.line_px)


def _draw_labels(picture: U8, rows: pd.DataFrame, taken: list[Rect], pen: _Pen) -> None:
    """Identities on top of their boxes, moved down until they cover no other text."""
    height, width = picture.shape[:2]
    for track_id, state, box in zip(
        rows["track_id"], rows["state"], rows["bbox_xyxy_px"], strict=True
    ):
        left, top, right, bottom = (float(value) for value in box)
        if not all(map(math.isfinite, (left, top, right, bottom))):
            continue
        if right < 0 or bottom < 0 or left >= width or top >= height:
            continue
        text = f"{track_id} predicted" if state == "predicted" else f"{track_id}"
        wide, tall = pen.box(text)
        x = min(max(round(left), 0), max(width - wide, 0))
        y = min(max(round(top) - tall, 0), max(height - tall, 0))
        while any(x < r[2] and r[0] < x + wide and y < r[3] and r[1] < y + tall for r in taken):
            y += tall // 2
        colour = track_colour(int(track_id))
        is_light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        ink: Colour = (0, 0, 0) if is_light else (255, 255, 255)
        taken.append(pen.label(picture, text, x, y, colour, ink))


def _draw_bodies(picture: U8, rows: pd.DataFrame, vertices_cam: Tensor, faces: I64) -> U8:
    """Shaded bodies in their identities' colours, blended in; the nearer hides the farther."""
    camera = {
        (float(f), *map(float, c))
        for f, c in zip(rows["focal_px"], rows["principal_point_px"], strict=True)
    }
    if len(camera) != 1:
        raise ValueError(f"expected one camera for the bodies of a frame, got {sorted(camera)}")
    focal_px, *center = camera.pop()
    vertices = vertices_cam.detach().cpu().float()
    num_people, num_vertices, _ = vertices.shape
    one = torch.from_numpy(faces)
    scene = torch.cat([one + p * num_vertices for p in range(num_people)])
    flat = vertices.reshape(-1, 3)
    seen = rasterize(
        flat[None],
        scene,
        focal_px=focal_px,
        principal_point_px=(center[0], center[1]),
        image_size_hw=(picture.shape[0], picture.shape[1]),
    )
    corners = flat[scene]  # (P * F, 3, 3)
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    smooth = torch.zeros_like(flat)
    for corner in range(3):
        smooth.index_add_(0, scene[:, corner], normals)
    facing = F.normalize(smooth, dim=1) @ F.normalize(torch.tensor(MESH_LIGHT), dim=0)
    brightness = 0.45 + 0.65 * facing.clamp(min=0)  # (P * V,)

    y, x = (seen.face_index[0] >= 0).nonzero(as_tuple=True)
    face = seen.face_index[0, y, x]
    person = torch.div(face, len(one), rounding_mode="floor")
    shade = (brightness[scene[face]] * seen.barycentric[0, y, x]).sum(dim=1)
    colours = torch.tensor([track_colour(int(i)) for i in rows["track_id"]], dtype=torch.float32)
    is_faded = torch.from_numpy((rows["state"] == "predicted").to_numpy(dtype=bool).copy())
    opacity = torch.where(is_faded, MESH_OPACITY * FADED, MESH_OPACITY)[person, None]
    ink = (colours[person] * shade[:, None]).clamp(max=255)
    blended = torch.from_numpy(picture)[y, x] * (1 - opacity) + ink * opacity
    picture[y.numpy(), x.numpy()] = blended.round().byte().numpy()
    return picture


def _pad(picture: U8, size_wh: tuple[int, int], mode: Literal["edge", "constant"]) -> U8:
    """Grows a picture to the right and below."""
    right, below = size_wh[0] - picture.shape[1], size_wh[1] - picture.shape[0]
    return np.pad(picture, ((0, below), (0, right), (0, 0)), mode=mode)
