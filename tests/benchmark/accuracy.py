"""How good the whole pipeline is on clips whose truth is known, and what each cue adds.

  python -m tests.benchmark accuracy hmr=hmr2_mini.safetensors texture=texture.safetensors \\
      predictor=pose_predictor.safetensors detector=detector_folder motion=/data/amass output=/tmp/a

Clips are of every feature in turn; trainings draw theirs with hashed seeds of 64 bits, never with
the small ones of here. Of motion capture give recordings that nothing was trained on. The main
job (decoder, detector, HMR 2.0, texture maps, tracker, rows, publishing, in one process) writes
tables, `evaluate` scores them. The tracker then follows the same detections again without one of
its cues, and so does a tracker that knows boxes alone.

Words, each key=value:
  hmr        weights; `mini` (the default); or `truth` for the true body in every box, which says
             what the tracker could do at best and nothing about bodies
  texture    weights of the texture encoder; without: looks do not count
  predictor  weights of the pose predictor; without: a pose stays as last seen
  detector   folder of a `transformers` detector or .onnx file; without: the true boxes made worse
             as a detector would (constants in accuracy_input.py)
  motion     folder of motion capture for a second set of clips; without: no second set
  output     folder for tables, sheets and accuracy.json; without: ./accuracy_output. What an
             earlier run left in its `procedural` and `mocap` is replaced
  clips, frames, height   how many, how long, how tall (14, 90, 288)
  seed       of the first set (1000); the second has the next one
Words with a dot, such as tracker.gate=50, are settings of the job.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from scipy.spatial.transform import Rotation

from fourdh_batch.config import load_config
from fourdh_batch.evaluate.matching import Boxes, drop_hidden, match_boxes
from fourdh_batch.evaluate.pose import mpjpe_mm, pa_mpjpe_mm
from fourdh_batch.evaluate.report import Report, evaluate
from fourdh_batch.evaluate.tracking import PROTOCOLS, TrackingScores, tracking_scores
from fourdh_batch.geometry import rot6d_to_rotmat
from fourdh_batch.models.build import load_hmr2
from fourdh_batch.models.minis import MINI
from fourdh_batch.models.smpl import load_body
from fourdh_batch.pipeline.engine import Engine, build_engine, model_card
from fourdh_batch.pipeline.plan import Shard, Video
from fourdh_batch.pipeline.records import ChunkResult, ModelCard
from fourdh_batch.pipeline.shard import OK, VideoEnd, VideoTracking, process_shard
from fourdh_batch.storage import Store, fingerprint_file
from fourdh_batch.synthetic.corpus import Clip
from fourdh_batch.tables.reader import read_arrow, smpl_arrays
from fourdh_batch.tables.writer import MemorySpool
from fourdh_batch.training.hmr2 import mean_rotations
from fourdh_batch.types import F32, FrameChunk
from fourdh_batch.video.decode import read_frames
from fourdh_batch.view.overlay import contact_sheet, draw_frame
from tests.benchmark.accuracy_input import TrueBodies, held_out_corpus, write_perturbed_boxes
from tests.benchmark.accuracy_trackers import (
    ALL_CUES,
    SORT_MAX_AGE,
    WITHOUT,
    OneCueLessModels,
    track_by_overlap,
)

TRUTH = "truth"
DEFAULTS = {
    **{"hmr": MINI, "texture": "", "predictor": "", "detector": "", "motion": ""},
    **{"output": "accuracy_output", "clips": "14", "frames": "90", "height": "288", "seed": "1000"},
}
OVERLAP = "overlap alone"  # with the memory of PHALP' for people who are out of sight
SHORT_OVERLAP = "overlap alone, short"  # with that of SORT
BASELINES = {OVERLAP: "overlap", SHORT_OVERLAP: "short overlap"}
ALL, WITHOUT_CUTS = "all clips", "clips without cuts"
TARGETS = {"hota": 0.75, "idf1": 0.90, "mota": 0.90}  # at IoU 0.5
MAX_SWITCHES = 0.5  # of those of overlap alone
# What HMR is measured against: the same body for everybody. That of these very people is nearer to
# them than an answer without a picture can be; that of the training is where answers start from.
MEAN_OF_THESE, MEAN_OF_TRAINING = "of the mean of these people", "of the mean of the training"
GAPS = (5, 10, 20)  # frames; the last class is open
SHEET_FEATURES = ("crossing", "reentry", "long_occlusion", "crowd")
SHEET_FRAMES = 12
MARKER = "made_by_accuracy_benchmark"  # file in a set's folder, which a later run may delete then

Followed = dict[str, dict[str, Boxes]]
"""By tracker and video id."""
Scored = tuple[dict[str, TrackingScores], TrackingScores]
"""By video id, and of all."""


def run(words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Measure, print tables, write accuracy.json; the main figures as of every benchmark."""
    own, settings = _own(words)
    output, seed = Path(own["output"]), int(own["seed"])
    sets = {"procedural": ""} | ({"mocap": own["motion"]} if own["motion"] else {})
    for name in sets:
        require_ours(output / name, own["motion"])
    output.mkdir(parents=True, exist_ok=True)
    figures: list[dict[str, Any]] = []
    found: dict[str, Any] = {"words": list(words), "sets": {}}
    pd.set_option("display.width", 160, "display.max_columns", 30, "display.precision", 3)
    for number, (name, motion) in enumerate(sets.items()):
        start = time.perf_counter()
        measured = _Set(output / name, own, settings, seed + number, motion).measure()
        measured["seconds"] = time.perf_counter() - start
        found["sets"][name] = measured
        figures += _figures(name + _note(own), measured)
        print(f"\n{name}: {measured['seconds']:.0f} s", flush=True)
    if not own["motion"]:
        print("\nno second set: motion=FOLDER was not given")
    text = json.dumps(found, indent=1, allow_nan=False)
    (output / "accuracy.json").write_text(text)
    print(f"\nwritten: {output / 'accuracy.json'}\n")
    return figures


def _own(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The benchmark's own words, and settings of the job."""
    if others := [word for word in words if "=" not in word]:
        raise ValueError(f"expected key=value words, got {', '.join(others)}")
    pairs = dict(word.split("=", 1) for word in words)
    settings = [f"{key}={value}" for key, value in pairs.items() if "." in key]
    own = {key: value for key, value in pairs.items() if "." not in key}
    if unknown := sorted(set(own) - set(DEFAULTS)):
        raise ValueError(f"unknown words {unknown}; known: {', '.join(DEFAULTS)}")
    return DEFAULTS | own, settings


def _note(own: dict[str, str]) -> str:
    return " (true bodies)" if own["hmr"] == TRUTH else ""


def require_ours(folder: Path, motion: str) -> None:
    """Raises: ValueError: the folder of a set, which will be replaced, holds other things."""
    if motion:
        given, ours = Path(motion).resolve(), folder.resolve()
        if given == ours or given in ours.parents or ours in given.parents:
            raise ValueError(
                f"motion={motion}: expected a folder apart from {folder}, which is written to; "
                "give another output="
            )
    if folder.exists() and not (folder / MARKER).is_file() and any(folder.iterdir()):
        raise ValueError(
            f"{folder}: expected an empty folder or one of an earlier run (with a file {MARKER}), "
            f"got something else{f' beside motion={motion}' * bool(motion)}; give another output="
        )


class _Recording(Engine):
    """Keeps what it gave, for the other trackers."""

    results: list[ChunkResult]

    def run(self, chunks: Sequence[FrameChunk]) -> list[ChunkResult]:
        given = super().run(chunks)
        self.results += given
        return given


class _Set:
    """One set of clips, from rendering to scores."""

    def __init__(
        self, folder: Path, own: dict[str, str], settings: list[str], seed: int, motion: str
    ) -> None:
        torch.set_num_threads(1)
        self.folder, self.body = folder, load_body()
        self.note = _note(own)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / MARKER).touch()
        print(f"\n=== {folder.name}{self.note}: {own['clips']} clips, seed {seed}", flush=True)
        start = time.perf_counter()
        self.clips = held_out_corpus(
            folder / "corpus",
            self.body,
            seed=seed,
            count=int(own["clips"]),
            num_frames=int(own["frames"]),
            height=int(own["height"]),
            motion=motion,
        )
        self.truth_path = folder / "corpus" / "truth.parquet"
        self.truth = pq.read_table(self.truth_path)
        true_boxes, given = folder / "corpus" / "boxes.parquet", folder / "boxes.parquet"
        write_perturbed_boxes(true_boxes, self.truth, self.clips, given, seed=seed)
        print(f"rendered in {time.perf_counter() - start:.0f} s", flush=True)
        self.with_true_bodies = own["hmr"] == TRUTH
        detector = own["detector"]
        kind = "boxes" if not detector else "onnx" if detector.endswith(".onnx") else "transformers"
        self.config = load_config(
            None,
            [
                f"input={folder / 'corpus'}",
                f"output={folder / 'tables'}",
                f"hmr.weights={MINI if self.with_true_bodies else own['hmr']}",
                "hmr.device=cpu",
                f"detector.name={kind}",
                f"detector.path={detector or given}",
                "detector.score_threshold=0.5",
                "detector.min_width_px=10",
                "detector.min_height_px=40",
                f"tracker.texture_weights={own['texture']}",
                f"tracker.predictor_weights={own['predictor']}",
                *settings,
            ],
        )

    def measure(self) -> dict[str, Any]:
        """Run, score, print."""
        followed, cues = self._follow()
        report = evaluate(str(self.folder / "tables"), str(self.truth_path), body=self.body)
        scores = {
            group: {
                protocol: {
                    name: self._score(boxes, videos, protocol) for name, boxes in followed.items()
                }
                for protocol in PROTOCOLS
            }
            for group, videos in self._groups().items()
        }
        for protocol in PROTOCOLS:  # scored the same way
            assert scores[ALL][protocol][ALL_CUES][1] == report.overall.tracking[protocol]
        gaps = self._gaps()
        mean_body = self._mean_body_mm()
        _print(self.clips, report, scores, gaps, mean_body, self.note)
        self._draw_sheets()
        return {
            "cues": cues,
            "clips": {c.video_id: sorted(c.features) for c in self.clips},
            "report": report.to_dict(),
            "pa_mpjpe_mm_of_mean_body": mean_body,
            "trackers": {
                group: {
                    protocol: {
                        name: {
                            "overall": all_.to_dict(),
                            "per_video": {video: one.to_dict() for video, one in videos.items()},
                        }
                        for name, (videos, all_) in of_protocol.items()
                    }
                    for protocol, of_protocol in of_group.items()
                }
                for group, of_group in scores.items()
            },
            "gaps": gaps.astype(object).where(gaps.notna(), None).to_dict("records"),
        }

    def _follow(self) -> tuple[Followed, str]:
        """The main job on every clip; then the other trackers on what its models gave."""
        engine, card = self._engine(), model_card(self.config)
        models, wanted = OneCueLessModels(self.config), self.config.tracker
        missing = {
            "texture": not wanted.texture_weights,
            "boxes": not wanted.box_weight,
            "log cost": not wanted.log_cost,
        }
        names = [name for name in WITHOUT if not missing.get(name)]
        followed: Followed = {name: {} for name in (ALL_CUES, *names, *BASELINES)}
        spent = dict.fromkeys(("the job", *names), 0.0)
        store = Store(self.config.output)
        for clip in self.clips:
            size, fingerprint = fingerprint_file(str(clip.path))
            video = Video(clip.video_id, str(clip.path), size, fingerprint)
            engine.results = []
            start = time.perf_counter()
            shard = Shard(clip.path.stem, self.config.dataset, (video,))
            process_shard(shard, engine, store, self.config, card)
            spent["the job"] += time.perf_counter() - start
            rows = read_arrow(self.config.output, "tracks", video_id=clip.video_id)
            ours = _boxes(rows).take(_is_detected(rows))
            if clip is self.clips[0]:  # tracked again is tracked alike
                again = self._retrack(video, engine.results, card, models)
                assert ours.track_id.tolist() == again.track_id.tolist()
            followed[ALL_CUES][clip.video_id] = ours
            for name in names:
                start = time.perf_counter()
                models.without = name
                followed[name][clip.video_id] = self._retrack(video, engine.results, card, models)
                spent[name] += time.perf_counter() - start
            for baseline, age in ((OVERLAP, wanted.max_age), (SHORT_OVERLAP, SORT_MAX_AGE)):
                followed[baseline][clip.video_id] = track_by_overlap(
                    engine.results, n_init=wanted.n_init, max_age=age
                )
        print("seconds:", {name: round(seconds, 1) for name, seconds in spent.items()})
        return followed, "true bodies; " * self.with_true_bodies + card.cues

    def _engine(self) -> _Recording:
        built, wanted = build_engine(self.config), self.config.detector
        reconstructor = built.reconstructor
        if self.with_true_bodies:
            reconstructor = TrueBodies(self.truth, self.body, reconstructor.sampler)
        return _Recording(
            built.detector,
            reconstructor,
            score_threshold=wanted.score_threshold,
            min_width_px=wanted.min_width_px,
            min_height_px=wanted.min_height_px,
        )

    def _retrack(
        self,
        video: Video,
        results: Sequence[ChunkResult],
        card: ModelCard,
        models: OneCueLessModels,
    ) -> Boxes:
        spool = MemorySpool(video.video_id)
        tracker = replace(self.config.tracker, keep_predicted=False)
        tracking = VideoTracking(
            video,
            shard_id="",
            dataset=self.config.dataset,
            config=replace(self.config, tracker=tracker),
            card=card,
            spool=spool,
            models=models,
        )
        for result in results:
            tracking.add(result)
        tracking.finish(VideoEnd(OK))
        return _boxes(spool.tables()["tracks"])

    def _groups(self) -> dict[str, list[str]]:
        """Names of videos: the tracker does not claim to know people again across a cut."""
        names = {clip.video_id: "cut" in clip.features for clip in self.clips}
        groups = {
            ALL: list(names),
            WITHOUT_CUTS: [name for name, has_cut in names.items() if not has_cut],
        }
        return {group: videos for group, videos in groups.items() if videos}

    def _score(self, followed: dict[str, Boxes], videos: Sequence[str], protocol: str) -> Scored:
        pairs = {}
        for video_id in videos:
            rows, predicted = self._true_rows(video_id), followed[video_id]
            visible, counts = drop_hidden(_boxes(rows), _is_detected(rows), predicted)
            pairs[video_id] = visible, predicted.take(counts)
        return tracking_scores(pairs, protocol)

    def _true_rows(self, video_id: str) -> Any:
        return self.truth.filter(pc.equal(self.truth["video_id"], video_id))

    def _gaps(self) -> pd.DataFrame:
        """MPJPE of completed rows whose detected neighbours are one true person, by gap length."""
        errors: list[tuple[int, float, float, float]] = []
        num_of_several = 0
        for clip in self.clips:
            rows = read_arrow(self.config.output, "tracks", video_id=clip.video_id)
            true_rows = self._true_rows(clip.video_id)
            truth, told = smpl_arrays(true_rows), smpl_arrays(rows)
            there, found, _ = match_boxes(_boxes(true_rows), _boxes(rows))
            person_of = dict(
                zip(found.tolist(), true_rows["track_id"].to_numpy()[there], strict=True)
            )
            keys = zip(
                true_rows["track_id"].to_pylist(), true_rows["frame_index"].to_pylist(), strict=True
            )
            true_row = {key: row for row, key in enumerate(keys)}
            detected, frame = _is_detected(rows), rows["frame_index"].to_numpy()
            track = rows["track_id"].to_numpy()
            for row in np.flatnonzero(~detected):
                seen = np.flatnonzero(detected & (track == track[row]))
                before = seen[frame[seen] < frame[row]][-1]
                after = seen[frame[seen] > frame[row]][0]
                people = {person_of.get(int(end)) for end in (before, after)}
                key = (person_of.get(int(before)), int(frame[row]))
                if len(people) > 1 or key not in true_row:
                    num_of_several += 1
                    continue
                share = (frame[row] - frame[before]) / (frame[after] - frame[before])
                between = self._interpolated(told, int(before), int(after), float(share))
                guesses = told["keypoints_3d_m"][[row, before]]
                guesses = np.concatenate((guesses, between[None]))
                true = np.repeat(truth["keypoints_3d_m"][[true_row[key]]], 3, axis=0)
                gap = int(frame[after] - frame[before] - 1)
                errors.append((gap, *mpjpe_mm(guesses, true).tolist()))
        table = pd.DataFrame(errors, columns=["gap", "completed", "hold", "slerp"])
        edges = [0, *GAPS, np.inf]
        labels = [f"to {gap}" for gap in GAPS] + [f"over {GAPS[-1]}"]
        table["frames"] = pd.cut(table["gap"], edges, labels=labels).astype(str)
        groups = table.groupby("frames", sort=False)
        summary = groups[["completed", "hold", "slerp"]].mean()
        summary.insert(0, "rows", groups.size())
        summary = summary.reindex([label for label in labels if label in summary.index])
        if num_of_several:
            summary.loc["not scored"] = [num_of_several, np.nan, np.nan, np.nan]
        return summary.reset_index()

    def _interpolated(self, told: dict[str, Any], before: int, after: int, share: float) -> F32:
        """(44, 3) keypoints between two rows: rotations by slerp, shapes in proportion."""
        turns = []
        for name, joints in (("global_orient", 1), ("body_pose", 23)):
            low, high = (
                Rotation.from_matrix(told[name][end].reshape(joints, 3, 3).astype(np.float64))
                for end in (before, after)
            )
            way = Rotation.from_rotvec((low.inv() * high).as_rotvec() * share)
            turns.append(torch.from_numpy((low * way).as_matrix()).float()[None])
        betas = (1 - share) * told["betas"][before] + share * told["betas"][after]
        with torch.inference_mode():
            points = self.body.keypoints_3d(*turns, torch.from_numpy(betas)[None].float())
        keypoints: F32 = points[0].numpy()
        return keypoints

    def _mean_body_mm(self) -> dict[str, float]:
        """PA-MPJPE of one body for everybody: the bars for HMR, by what body it is."""
        arrays = smpl_arrays(self.truth.filter(pc.equal(self.truth["state"], "detected")))
        true = arrays["keypoints_3d_m"]
        mean = mean_rotations(torch.from_numpy(arrays["body_pose"]).view(-1, 23, 3, 3))
        head = load_hmr2(self.config.hmr.weights, self.body, device="cpu").smpl_head
        told = rot6d_to_rotmat(head.init_body_pose.view(-1, 6))[1:]
        bodies = {
            MEAN_OF_THESE: (mean, torch.from_numpy(arrays["betas"].mean(0))),
            MEAN_OF_TRAINING: (told, head.init_betas[0]),
        }
        errors = {}
        for name, (pose, betas) in bodies.items():
            with torch.inference_mode():
                points = self.body.keypoints_3d(torch.eye(3)[None, None], pose[None], betas[None])
            alike = np.repeat(points.numpy(), len(true), axis=0)
            errors[name] = float(pa_mpjpe_mm(alike, true).mean())
        return errors

    def _draw_sheets(self) -> None:
        """Tracks over some frames of the hard clips, one PNG each."""
        for clip in self.clips:
            if not clip.features & set(SHEET_FEATURES):
                continue
            rows = read_arrow(self.config.output, "tracks", video_id=clip.video_id).to_pandas()
            rgb = read_frames(str(clip.path), 0, clip.num_frames).rgb
            chosen = np.linspace(0, clip.num_frames - 1, SHEET_FRAMES).round().astype(int)
            pictures = [
                draw_frame(rgb[i], rows[rows["frame_index"] == i], caption=f"{i}")
                for i in chosen.tolist()
            ]
            contact_sheet(pictures, self.folder / f"{clip.path.stem}.png", columns=4)


def _boxes(rows: Any) -> Boxes:
    return Boxes(
        rows["frame_index"].to_numpy().astype(np.int64),
        rows["track_id"].to_numpy().astype(np.int64),
        smpl_arrays(rows.select(["bbox_xyxy_px"]))["bbox_xyxy_px"].astype(np.float64),
    )


def _is_detected(rows: Any) -> Any:
    return np.asarray(pc.equal(rows["state"], "detected").to_numpy(), np.bool_)


def _print(
    clips: Sequence[Clip],
    report: Report,
    scores: dict[str, Any],
    gaps: pd.DataFrame,
    mean_body: dict[str, float],
    note: str,
) -> None:
    pose = report.overall.pose
    print(f"\nBodies of detected people{note}")
    print(
        pd.Series(
            {
                "people": pose.num_people,
                "matched": pose.matched,
                "PA-MPJPE mm": pose.pa_mpjpe_mm,
                **mean_body,
                "MPJPE mm": pose.mpjpe_mm,
                "PVE mm": pose.pve_mm,
                **{f"PCK@{name}": share for name, share in pose.pck.items()},
                "AP50 of boxes": report.overall.boxes.ap50,
            }
        )
        .map("{:.4g}".format)
        .to_string()
    )
    for told in report.notes:
        print(told)
    print(f"\nPoses of missed frames: MPJPE mm by length of the gap{note}")
    print(gaps.to_string(index=False))
    for group, of_group in scores.items():
        for protocol, of_protocol in of_group.items():
            print(f"\nTrackers, {group}, protocol {protocol}{note}")
            rows = {
                name if name in (ALL_CUES, *BASELINES) else f"- {name}": _row(all_)
                for name, (_, all_) in of_protocol.items()
            }
            print(_whole(pd.DataFrame(rows).T).to_string())
    print(f"\nClips, protocol iou50; last: ID switches of the other trackers{note}")
    of_protocol = scores[ALL]["iou50"]
    lines = {}
    for clip in clips:
        others = {
            BASELINES.get(name, f"-{name}"): videos[clip.video_id].id_switches
            for name, (videos, _) in of_protocol.items()
            if name != ALL_CUES
        }
        lines[clip.path.stem] = {
            "people": clip.num_people,
            **_row(of_protocol[ALL_CUES][0][clip.video_id]),
            **others,
        }
    print(_whole(pd.DataFrame(lines).T).to_string(), flush=True)


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """Counts without a decimal point."""
    counts = [name for name in table if (table[name] == table[name].round()).all()]
    return table.astype(dict.fromkeys(counts, int))


def _row(scores: TrackingScores) -> dict[str, float]:
    return {
        "HOTA": scores.hota,
        "IDF1": scores.idf1,
        "MOTA": scores.mota,
        "IDs": scores.id_switches,
        "FN": scores.misses,
        "FP": scores.false_positives,
    }


def _figures(name: str, measured: dict[str, Any]) -> list[dict[str, Any]]:
    figures = []
    for group, of_group in measured["trackers"].items():
        ours, overlap = (of_group["iou50"][who]["overall"] for who in (ALL_CUES, OVERLAP))
        for key, target in TARGETS.items():
            what = f"{name}, {group}: {key.upper()} at IoU 0.5 (target {target})"
            figures.append({"what": what, "value": ours[key], "unit": ""})
        what = f"{name}, {group}: ID switches / overlap alone (target {MAX_SWITCHES})"
        share = ours["id_switches"] / max(overlap["id_switches"], 1)
        figures.append({"what": what, "value": share, "unit": "x"})
    pose = measured["report"]["overall"]["pose"]
    return [
        *figures,
        *(
            {
                "what": f"{name}: PA-MPJPE / that {of_whom}",
                "value": pose["pa_mpjpe_mm"] / bar,
                "unit": "x",
            }
            for of_whom, bar in measured["pa_mpjpe_mm_of_mean_body"].items()
        ),
    ]
