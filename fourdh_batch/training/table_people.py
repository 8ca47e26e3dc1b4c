"""People of our own tables, with the frames of their videos: pseudo ground truth.

Source: HMR 2.0 is trained on fits to its own kind of output the same way.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow.compute as pc

from fourdh_batch.errors import TrainingError, VideoError
from fourdh_batch.geometry import crop_square
from fourdh_batch.storage import is_local, open_read, redact_uri
from fourdh_batch.tables.reader import read_arrow, read_table, read_tracks, smpl_arrays
from fourdh_batch.training.examples import Person
from fourdh_batch.types import U8
from fourdh_batch.video.decode import read_frames

logger = logging.getLogger(__name__)

WINDOW_FRAMES = 32  # decoded together
VISIT = 32  # people that are taken from a window before the next is drawn
LANES = 4  # windows in memory
MAX_ATTEMPTS = 100
COLUMNS = (
    *("frame_index", "bbox_xyxy_px", "global_orient", "body_pose", "betas"),
    *("keypoints_2d_px", "keypoints_3d_m"),
)

_Window = tuple[dict[int, U8], dict[str, Any]]  # pictures by frame, columns of rows


class TablePeople:
    """See `data.PeopleSource`: detected rows of `tracks`. Their keypoints all count as known.

    Args:
        root: output root of a run; its `videos` say where the videos are.
        seed: of the order.
        body_model: as in `tracks`, of the body that is trained with; rows of another are warned of,
            for their betas are other shapes. Empty: any.

    Raises:
        FileNotFoundError: nothing was committed there.
        TrainingError: no row is of use.
    """

    def __init__(self, root: str, *, seed: int, body_model: str = "") -> None:
        self._root = root
        self._seed = seed
        detected = [("state", "==", "detected")]
        columns = ["dataset", "video_id", "frame_index", "body_model"]
        rows = read_arrow(root, "tracks", columns=columns, filters=detected)
        if rows.num_rows == 0:
            raise TrainingError(f"{root}: expected detected people, got none")
        others = sorted(set(pc.unique(rows["body_model"]).to_pylist()) - {body_model})
        if body_model and others:
            logger.warning(
                "%s: made with the body %s, trained with %s, of which the same betas are another "
                "shape; see body=",
                *(redact_uri(root), ", ".join(others), body_model),
            )
        index = rows.drop_columns("body_model").to_pandas()
        index["window"] = index["frame_index"] // WINDOW_FRAMES
        counts = index.groupby(["dataset", "video_id", "window"], sort=True).size()
        self._windows = list(counts.index)
        self._cumulated = counts.to_numpy().cumsum()
        videos = read_table(root, "videos", columns=["dataset", "video_id", "uri"])
        self._uri = {(d, v): u for d, v, u in videos.itertuples(index=False)}
        self._loaded: OrderedDict[int, _Window | None] = OrderedDict()

    def person(self, number: int) -> Person:
        """See `data.PeopleSource`.

        Raises:
            TrainingError: window after window cannot be read.
        """
        visit, at = divmod(number, VISIT)
        random = np.random.default_rng((self._seed, visit))
        for _ in range(MAX_ATTEMPTS):
            row = int(random.integers(self._cumulated[-1]))
            window = self._window(int(np.searchsorted(self._cumulated, row, side="right")))
            if window:
                frames, rows = window
                order = random.permutation(len(rows["betas"]))
                return _person(frames, rows, int(order[at % len(order)]))
        raise TrainingError(f"{self._root}: {MAX_ATTEMPTS} stretches of video cannot be read")

    def _window(self, number: int) -> _Window | None:
        if number not in self._loaded:
            while len(self._loaded) >= LANES:
                self._loaded.popitem(last=False)
            self._loaded[number] = self._read(number)
        self._loaded.move_to_end(number)
        return self._loaded[number]

    def _read(self, number: int) -> _Window | None:
        """Pictures and rows of a window; None where the video cannot be read."""
        dataset, video_id, window = self._windows[number]
        first = int(window) * WINDOW_FRAMES
        rows = read_tracks(
            self._root,
            columns=COLUMNS,
            dataset=dataset,
            video_id=video_id,
            filters=[
                ("state", "==", "detected"),
                ("frame_index", ">=", first),
                ("frame_index", "<", first + WINDOW_FRAMES),
            ],
        )
        wanted = rows["frame_index"].to_numpy()
        uri = self._uri[dataset, video_id]
        try:
            start, stop = int(wanted.min()), int(wanted.max()) + 1
            if is_local(uri):
                chunk = read_frames(uri, start, stop, video_id=video_id)
            else:
                with open_read(uri) as file:
                    chunk = read_frames(file, start, stop, video_id=video_id)
        except (VideoError, OSError, ValueError) as error:
            logger.warning("%s", error)
            return None
        frames = {int(i): rgb for i, rgb in zip(chunk.frame_index, chunk.rgb, strict=True)}
        rows = rows[rows["frame_index"].isin(frames)]
        if rows.empty:
            return None
        return frames, {**smpl_arrays(rows), "frame_index": rows["frame_index"].to_numpy()}


def _person(frames: dict[int, U8], rows: dict[str, Any], row: int) -> Person:
    box = rows["bbox_xyxy_px"][row]
    center, size = crop_square(box)
    known = np.ones((len(rows["keypoints_2d_px"][row]), 1), dtype=np.float32)
    return Person(
        image=frames[int(rows["frame_index"][row])],
        box_center_px=center,
        box_size_px=float(size),
        longer_side_px=float((box[2:] - box[:2]).max()),
        keypoints_2d=np.hstack((rows["keypoints_2d_px"][row], known)),
        keypoints_3d=np.hstack((rows["keypoints_3d_m"][row], known)),
        global_orient=rows["global_orient"][row],
        body_pose=rows["body_pose"][row],
        betas=rows["betas"][row],
        has_pose=1.0,
        has_betas=1.0,
    )
