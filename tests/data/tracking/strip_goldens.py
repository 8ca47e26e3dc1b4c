"""Cut the sequences recorded from the reference tracker down to what the tests here need.

    python tests/data/tracking/strip_goldens.py PARITY_FOLDER

PARITY_FOLDER holds the recordings of the reference: sequences, location_predictor.npz,
cost_matrices.npz and the files of its networks. Whole sequences, with textures, are kept as
full_seq*.npz; the networks' files lose what no test reads (see `NETWORKS`). What is left out
of the short ones: textures, joints (tracking compares only the
projected model origin), and predicted poses of tracks that no detection of the next frame can
reach, whatever their pose. Poses are kept in half precision, costs up to 10,000.

Textures enter a cost only as the factor 1 + 4.0536 R. The R of each pair is found here from the
recorded cost and from the reference's own recorded predictions, by the formula written out once
more below, so that nothing of the package takes part in making its goldens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def cost_without_texture(loca_t, pose_t, loca_d, pose_d):  # type: ignore[no-untyped-def]
    """EQ_019 of one track and one detection with R = 0, and its part that has no pose in it."""
    distance = np.hypot(loca_t[88] - loca_d[88], loca_t[89] - loca_d[89])
    spread = 0.1 + np.tanh(np.hypot(loca_t[93], loca_t[94]))
    depth = abs(np.log(loca_t[92] / loca_d[92]))
    depth_spread = 0.1 + np.tanh(abs(np.log(1 / loca_t[95])))
    place = np.exp(distance / spread / 0.3792) * np.exp(depth / depth_spread / 4.1658)
    pose = min(float(np.square(pose_t[:226] - pose_d[:226]).sum()), 1.5)
    return (1 + 1.3070 * pose) * place, place


def strip_sequence(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    loca, pose = z["in_loca"].astype(np.float64), z["in_pose"].astype(np.float64)
    track_loca, track_pose = z["trk_loca"].astype(np.float64), z["trk_pose"].astype(np.float64)
    frames, tracks = z["in_frame_ptr"], z["trk_ptr"]
    texture = np.zeros(len(z["cost"]))
    is_reachable = np.zeros(len(z["trk_id"]), bool)
    entry = 0
    for frame, (num_rows, num_columns) in enumerate(z["cost_shape"]):
        for row in range(num_rows):
            before = tracks[frame - 1] + row
            ids = z["row_id"][z["row_id_ptr"][frame] : z["row_id_ptr"][frame + 1]]
            assert z["trk_id"][before] == ids[row]
            for column in range(num_columns):
                detection = frames[frame] + column
                with np.errstate(over="ignore"):
                    bare, place = cost_without_texture(
                        track_loca[before], track_pose[before], loca[detection], pose[detection]
                    )
                if place <= 100:
                    is_reachable[before] = True
                    texture[entry] = max(0.0, (z["cost"][entry] / bare - 1) / 4.0536)
                entry += 1
    assert entry == len(z["cost"])
    assert np.array_equal(z["out_bbox"], z["in_bbox"][z["out_det_row"]])
    cost = np.where(z["cost"] < 1e4, z["cost"], np.inf).astype(np.float32)
    pose_row = np.full(len(is_reachable), -1, np.int16)
    pose_row[is_reachable] = np.arange(is_reachable.sum())
    corners = np.concatenate([z["in_bbox"][:, :2], z["in_bbox"][:, :2] + z["in_bbox"][:, 2:]], 1)
    copied = (
        "in_frame_ptr in_shots in_conf in_gt_id trk_ptr trk_id trk_state trk_tsu trk_hits trk_age "
        "cost_shape row_id row_id_ptr match det_track_id "
        "out_ptr out_tid out_tracked_time out_det_row outd_ptr outd_tracked_ids"
    )
    return {
        **{key: z[key] for key in copied.split()},
        "in_image_size_wh": z["in_image_size"][::-1],
        "in_bbox_xyxy": corners.astype(np.float32),
        "in_center": z["in_center"],
        "in_size": z["in_scale"].max(1),
        "in_camera": z["in_loca"][:, 90:93],
        "in_pose": z["in_pose"][:, :226].astype(np.float16),
        "trk_loca": z["trk_loca"][:, 88:96],  # x, y, tx, ty, tz, three uncertainties
        "trk_pose": z["trk_pose"][is_reachable, :226].astype(np.float16),
        "trk_pose_row": pose_row,
        "cost": cost,
        "texture": texture.astype(np.float32),
    }


# Per file: the keys that are left out. Of long tables every fourth slot is kept.
NETWORKS = {
    "texture_autoencoder": (),
    "texture_sampler": ("vertices", "faces", "cam_t", "depth", "uv_image"),  # in rasterizer/depth
    "features": ("det_appe",),
    "pose_transformer_small": ("config", "ava_logits_all_times"),
    "pose_transformer_wide": ("config", "tokens_first3"),
    "postprocess": None,  # only what completing the tracks 2 to 4 needs
}
EVERY_FOURTH_SLOT = ("tokens_first3", "decoded_all_times")


def strip_network(name: str, z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    left_out = NETWORKS[name]
    if left_out is None:
        parts = ("has_detection", "pose_shape", "smoothed_pose")
        return {f"track{k}_{part}": z[f"track{k}_{part}"] for k in (2, 3, 4) for part in parts}
    kept = {key: array for key, array in z.items() if key not in left_out}
    return {k: a[:, ::4] if k in EVERY_FOURTH_SLOT else a for k, a in kept.items()}


def main(parity: Path) -> None:
    for name in NETWORKS:
        with np.load(parity / f"{name}.npz") as z:
            np.savez_compressed(HERE / f"{name}.npz", **strip_network(name, dict(z)))
    for name in ("seqA", "seqB", "seqC"):
        with np.load(parity / f"{name}.npz") as z:
            np.savez_compressed(HERE / f"{name}.npz", **strip_sequence(dict(z)))
            np.savez_compressed(HERE / f"full_{name}.npz", **z)
    with np.load(parity / "location_predictor.npz") as z:
        kept = {key: z[key] for key in ("history_time", "time_since_update", "note")}
        kept |= {key: z[key][..., 88:99] for key in ("history_loca", "predicted_loca")}
        np.savez_compressed(HERE / "location_predictor.npz", **kept)
    with np.load(parity / "cost_matrices.npz") as z:
        kept = {key: z[key] for key in z if "uv" not in key and "loca" not in key}
        kept |= {key: z[key][..., 88:99] for key in z if "loca" in key}
    with np.load(parity / "seqA.npz") as z:
        for frame in range(4):
            rows = kept.pop(f"f{frame}_det_rows")
            kept[f"f{frame}_det_loca"] = z["in_loca"][rows, 88:99]
            kept[f"f{frame}_det_pose"] = z["in_pose"][rows]
    np.savez_compressed(HERE / "cost_matrices.npz", **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
