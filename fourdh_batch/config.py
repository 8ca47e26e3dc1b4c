"""The settings of a job: one dataclass per subsystem, merged and checked once.

The only door to OmegaConf. A job has a YAML file; `key=value` words on the command line override
it (`detector.name=onnx tracker.max_age=30`). All mistakes are collected and raised together as a
`ConfigError`; the result is plain frozen-by-habit dataclasses, and nothing below this module
knows where a value came from.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fourdh_batch.errors import ConfigError

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
SOURCE_KINDS = ("synthetic", "tables", "tars")
TRACK_SOURCE_KINDS = ("synthetic", "tables")
DECAYS = ("constant", "cosine")


@dataclass
class VideoConfig:
    """Reading of video files.

    Attributes:
        decoder: `auto` (PyAV) or `pyav`; the streaming reader.
        chunk_frames: frames of a chunk, the unit of GPU work; 16 to 256.
        max_chunk_mb: a chunk of large pictures is cut earlier, MiB of RGB.
        max_megapixels: larger pictures are refused before decoding.
        stall_timeout_s: a decoder that hands out no chunk for so long is killed, seconds.
        decoder_memory_mb: memory that a decoding process may take, MiB; 0 for no limit.
        detect_shots: find hard cuts, start the location cue afresh there, fill `shot_id`.
    """

    decoder: str = "auto"
    chunk_frames: int = 32
    max_chunk_mb: int = 128
    max_megapixels: float = 36.0
    stall_timeout_s: float = 120.0
    decoder_memory_mb: int = 4096
    detect_shots: bool = True


@dataclass
class DetectorConfig:
    """Person boxes.

    Attributes:
        name: a short name of `models/detector.py`: `onnx`, `transformers`, `boxes`, or a
            `detectron2_...`.
        path: weights file, model directory or hub id, or the file of given boxes; with
            `transformers` the words `mini` and `mini-segmenter` for the small models of this
            package.
        score_threshold: a detection is kept when its score is strictly greater (PHALP: 0.8).
        min_width_px, min_height_px: narrower or lower boxes are dropped (PHALP: 50 and 100).
        batch_size: frames per batch.
        input_size: side of the detector's input in pixels, 0 for the model's own.
        boxes_format: of the file of given boxes: `auto`, `ava`, `mot`, `posetrack`, `parquet`.
        boxes_time_offset_s: time in an AVA file at which the video begins, seconds (900 for
            the published cuts).
    """

    name: str = "onnx"
    path: str = ""
    score_threshold: float = 0.8
    min_width_px: float = 50.0
    min_height_px: float = 100.0
    batch_size: int = 8
    input_size: int = 0
    boxes_format: str = "auto"
    boxes_time_offset_s: float = 0.0


@dataclass
class HmrConfig:
    """HMR 2.0 and its body model.

    Attributes:
        weights: official `.ckpt`, or `.safetensors` made by `fourdh weights import` or
            `jobs/train_hmr2.py`; the word `mini` for the small model of this package.
        size: a size of `models/build.py`; empty: read from the weights.
        body: SMPL file (`SMPL_NEUTRAL.pkl` or npz); empty: the open body of this package.
        extra_regressor: `SMPL_to_J19.pkl`, needed with an official SMPL file.
        device: `auto`, `cpu`, `cuda`.
        precision: `auto` (fp32 on CPU, fp16 backbone on GPU), `fp32`, `tf32`, `bf16`, `fp16`.
        batch_size: crops per batch, mixed over people, frames and videos; 0: by device.
        cpu_threads: threads of one model on a CPU. Fixed, because the number of threads may
            change the last bit of a result.
    """

    weights: str = ""
    size: str = ""
    body: str = ""
    extra_regressor: str = ""
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 0
    cpu_threads: int = 1


@dataclass
class TrackerConfig:
    """PHALP'. Names and defaults as in the paper's code; see `tracking/tracker.py`.

    Attributes:
        max_age: a confirmed track survives so many missed frames.
        n_init: detections in a row that confirm a track (at most 7).
        gate: pairs that cost more are never matched.
        box_weight: how much it counts, beside the published cues, that a box covers the one in
            which a person was last seen in this shot, carried along to where the person is expected
            if it was not in the frame before: a pair costs exp(-box_weight IoU) times as much. 0:
            not at all, as published. 2 helps where people pass each other and the network sees the
            same body in both boxes.
        log_cost: of all ways to match, take the one with the smallest product of costs instead of
            the smallest sum, as published: one pair that hardly fits does not tear others apart.
        keep_predicted: write `state=predicted` rows for frames in which a track was missed
            between two detections.
        texture_weights: the texture encoder, `hmar_v2_weights.pth` or the `.safetensors` that
            `fourdh weights import` makes of it; `mini` for the one of this package; empty: looks
            do not count.
        atlas: folder of `bmap_256.npy` and `fmap_256.npy`; empty: the body's own atlas.
        predictor_weights: the pose predictor, `.safetensors` of `fourdh weights import`, or
            `pose_predictor.pth` with its `.yaml` and `mean_std.npy` beside it; `mini` for the one
            of this package; empty: a pose stays as last seen.
        compat: number and predict exactly as the published tracker (docs/PHALP.md, section 15).
        store_appearance: keep pose, shape, camera and a compact vector of the looks of every
            reconstructed box in `detections`, so that `jobs/track.py` can track again.
        device: `auto` (the GPU where the tracking process was given one), `cpu` or `cuda`.
    """

    max_age: int = 50
    n_init: int = 5
    gate: float = 100.0
    box_weight: float = 0.0
    log_cost: bool = False
    keep_predicted: bool = True
    texture_weights: str = ""
    atlas: str = ""
    predictor_weights: str = ""
    compat: bool = False
    store_appearance: bool = False
    device: str = "auto"

    @property
    def has_networks(self) -> bool:
        """Whether a tracking process has anything to run on a GPU."""
        return bool(self.texture_weights or self.predictor_weights)


@dataclass
class PlanConfig:
    """Grouping of videos into shards, the videos that one Parquet object holds.

    Attributes:
        videos_per_shard: at most so many.
        mb_per_shard: a shard is closed when its video files exceed this, MiB.
        limit: take only the first so many videos; 0 for all.
        retry_quarantined: also redo finished shards that hold a quarantined video.
        remove_missing: videos that are finished but not in `input` any more leave the tables;
            otherwise they stay, and a run that would lose them is refused.
        list_root: folder or prefix from which the names of a `.txt` list count; empty: the
            folder of the list.
        list_start_s, list_end_s: of the videos of a `.txt` list only frames from the one time
            up to the other are read, seconds; 0: from the beginning, to the end.
        gpu_hour_cost: price of one GPU for an hour in any currency, for `fourdh plan`; 0: costs
            are not shown.
        max_removed: share of the finished videos that may leave the tables in one run; a run
            that would take out more is refused, for the input is more likely incomplete.
    """

    videos_per_shard: int = 200
    mb_per_shard: int = 512
    limit: int = 0
    retry_quarantined: bool = False
    remove_missing: bool = False
    list_root: str = ""
    list_start_s: float = 0.0
    list_end_s: float = 0.0
    gpu_hour_cost: float = 0.0
    max_removed: float = 1.0


@dataclass
class ClusterConfig:
    """Ray.

    Attributes:
        address: `auto` (the cluster this job was submitted to, else a new local one), `local`,
            or `ray://...`.
        gpu_actors: model processes; 0: one per GPU of the cluster, or one on a CPU machine.
        gpus_per_actor: share of a GPU per model process; used where the cluster has GPUs. With
            its trackers' shares it should add up to 1.
        cpus_per_actor: cores reserved per model process.
        cpus_per_decoder: cores reserved per decoding process.
        trackers_per_actor: tracking processes per model process.
        gpus_per_tracker: share of a GPU per tracking process, for its texture encoder and pose
            predictor; taken only where weights for them are given. 0: they run on a core.
        checkpoint_frames: a tracking process saves the state of a video every so many frames, so
            that after a death only frames behind it are done again.
        max_gpu_actors: on a cluster that grows: model processes to ask for although they do not
            fit yet, so that its autoscaler brings nodes; 0: use what is there and what joins.
        units_per_actor: units a model process works on at once, so that decoding one overlaps
            with computing another. A unit is one long video, or some short ones of a shard.
        videos_per_unit: short videos in a unit at most.
        unit_mb: a unit of several videos holds at most so many MiB of files.
        chunks_ahead: chunks decoded ahead per unit.
        progress_timeout_s: a unit without a finished chunk for so long is given up.
        attempts: a video is quarantined after so many deaths or unknown errors without having
            got further.
    """

    address: str = "auto"
    gpu_actors: int = 0
    gpus_per_actor: float = 0.9
    cpus_per_actor: float = 1.0
    cpus_per_decoder: float = 1.0
    trackers_per_actor: int = 1
    gpus_per_tracker: float = 0.1
    checkpoint_frames: int = 512
    max_gpu_actors: int = 0
    units_per_actor: int = 2
    videos_per_unit: int = 32
    unit_mb: int = 64
    chunks_ahead: int = 2
    progress_timeout_s: float = 900.0
    attempts: int = 2


@dataclass
class LogConfig:
    """What the processes of a job say of themselves; docs/OBSERVABILITY.md.

    Attributes:
        format: `text`, or `json` for one object a line; then the workers log to Ray's files on
            their nodes and not to the driver as well.
    """

    format: str = "text"


@dataclass
class PosesConfig:
    """Bodies that are given instead of reconstructed, for `jobs/track.py` alone.

    Attributes:
        layout: what the input is: `ours` (output of an earlier run) or a layout of
            docs/POSE_ENGINES.md: `parquet`, `npz`, `phalp`, `pare`, `pymafx`, `cliff`; `auto`
            looks.
        image_size: WIDTHxHEIGHT of all videos in pixels, for files that do not tell (cliff).
        fps: frames per second of all videos, for files that do not tell; 0: 30 for times, unknown
            in `videos`.
        looks: use the compact appearance vectors where the input has them.
        workers: processes; 0: one per core.
    """

    layout: str = "auto"
    image_size: str = ""
    fps: float = 0.0
    looks: bool = True
    workers: int = 0

    @property
    def image_size_px(self) -> tuple[int, int] | None:
        """Width and height; None where not given, or not in this form."""
        match = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", self.image_size, re.ASCII)
        return (int(match[1]), int(match[2])) if match else None


@dataclass
class EvaluateConfig:
    """The user's copies of the published benchmarks, for `jobs/evaluate.py` alone.

    What is empty is not evaluated; docs/EVALUATION.md has the layouts.

    Attributes:
        metadata: folder of the published `hmr2_evaluation_data`, one `.npz` per data set.
        images_3dpw, images_h36m, images_lsp, images_coco, images_posetrack: the folder that the
            image names in the data set's `.npz` start from.
        emdb: folder of EMDB, with P0 to P9.
        smpl_female, smpl_male: SMPL files, for the truth of EMDB.
        posetrack_annotations: folder of PoseTrack's json files, or one of them.
        posetrack_tables: output root of a run over the videos of these annotations.
        ava_truth, ava_found, ava_excluded: csv files of AVA: labels, scored predictions of
            actions, and the seconds to leave out.
    """

    metadata: str = ""
    images_3dpw: str = ""
    images_h36m: str = ""
    images_lsp: str = ""
    images_coco: str = ""
    images_posetrack: str = ""
    emdb: str = ""
    smpl_female: str = ""
    smpl_male: str = ""
    posetrack_annotations: str = ""
    posetrack_tables: str = ""
    ava_truth: str = ""
    ava_found: str = ""
    ava_excluded: str = ""


@dataclass
class JobConfig:
    """A whole job.

    Attributes:
        input: a video, a folder, a glob or prefix (any fsspec path), a manifest (csv, jsonl or
            Parquet with columns `video_id` and `uri`), or a `.txt` list of file names.
        output: root of the tables (any fsspec path).
        dataset: name in the `dataset` column and in the keys.
    """

    input: str = ""
    output: str = ""
    dataset: str = "videos"
    video: VideoConfig = field(default_factory=VideoConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    hmr: HmrConfig = field(default_factory=HmrConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    poses: PosesConfig = field(default_factory=PosesConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class SourceConfig:
    """One source of training examples.

    Attributes:
        kind: `synthetic` (people made here), `tables` (output root of a run and its videos),
            or `tars` (WebDataset tars in the published training layout).
        path: of `tables` the output root; of `tars` a tar, a folder of tars, or names with one
            counting part such as `/data/h36m-train/{000000..000312}.tar`; of `synthetic` a folder
            of motion capture (.npz, .bvh), empty for the package's own motions alone.
        weight: share of the examples, relative to the other sources.
        name: before the figures of a held-out source, of several; empty: its kind.
    """

    kind: str = "synthetic"
    path: str = ""
    weight: float = 1.0
    name: str = ""


@dataclass
class LossConfig:
    """Weights of the losses of HMR 2.0, as published; the sums run over the batch.

    Attributes:
        keypoints_2d: L1 of projected keypoints, crop widths.
        keypoints_3d: L1 of keypoints from the pelvis, metres.
        global_orient, body_pose: squared differences of rotation matrices.
        betas: squared differences of shape coefficients.
        keypoint_cells: cross entropy of the token in which a keypoint lies, and L1 of its place
            in there; not published, stands for the pretraining of the backbone (0: without).
        adversarial: of both sides of the discriminator; 0 trains without it.
    """

    keypoints_2d: float = 0.01
    keypoints_3d: float = 0.05
    global_orient: float = 0.001
    body_pose: float = 0.001
    betas: float = 0.0005
    keypoint_cells: float = 0.0
    adversarial: float = 0.0005


@dataclass
class AugmentConfig:
    """Random changes of training crops, as published.

    Attributes:
        scale: boxes grow or shrink by at most this share.
        rotation_deg: standard deviation of in-plane rotations, cut at twice this.
        rotation_share: share of the crops that are rotated.
        translation: boxes move by at most this share of their size.
        color: each channel is multiplied by 1 - this to 1 + this.
        flip_share: share of the crops that are mirrored.
        extreme_crop_share: share of the crops that show a part of the body only.
    """

    scale: float = 0.3
    rotation_deg: float = 30.0
    rotation_share: float = 0.6
    translation: float = 0.02
    color: float = 0.2
    flip_share: float = 0.5
    extreme_crop_share: float = 0.1


@dataclass
class LoopConfig:
    """Optimiser and schedule; see `training/loop.py`.

    Attributes:
        steps: updates in all.
        batch_size: examples of a step, in each training process.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: the learning rate rises from 0 over so many steps.
        decay: `constant` or `cosine`, which falls to 0 at the last step.
        clip_norm: gradients are shortened to this norm; 0: never.
        precision: `fp32` or `bf16` (autocast; weights stay float32).
        seed: of the first weights, the order of the examples and the augmentations.
        device: `auto`, `cpu`, `cuda`.
        cpu_threads: threads of PyTorch on a CPU; 0: its own choice.
        data_workers: processes that make examples, for each training process; 0: none.
        log_every, evaluate_every, checkpoint_every: in steps.
        keep_checkpoints: older ones are deleted.
        workers: training processes, by Ray Train where more than 1; each takes a GPU where the
            cluster has some.
        address: Ray cluster for more than one worker: `auto`, `local` or `ray://...`.
        max_failures: times that Ray Train starts lost processes again.
    """

    steps: int = 1000
    batch_size: int = 48
    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    decay: str = "constant"
    clip_norm: float = 0.0
    precision: str = "fp32"
    seed: int = 0
    device: str = "auto"
    cpu_threads: int = 0
    data_workers: int = 0
    log_every: int = 100
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    workers: int = 1
    address: str = "auto"
    max_failures: int = 3


@dataclass
class TrainHmrConfig:
    """Training of HMR 2.0, for `jobs/train_hmr2.py`.

    Attributes:
        output: folder or prefix for checkpoints, logs and the final weights (any fsspec path).
        size: a size of `models/build.py`.
        init: weights to start from, `.ckpt` or `.safetensors` of that size; empty: random ones.
        init_backbone: weights of the backbone alone, such as `vitpose_backbone.pth`.
        mean_params: `smpl_mean_params.npz`, the body that answers are counted from; empty: of
            `init`, or the mean of the first examples.
        body: SMPL file; empty: the open body of this package.
        extra_regressor: `SMPL_to_J19.pkl`, needed with an official SMPL file.
        drop_path: share of residual branches that are left out in the last block of the
            backbone; it rises linearly from 0 in the first (published: 0.55 with ViT-H).
        sources: what is trained on; a list such as
            `[{kind: tars, path: /data/coco, weight: 0.1}, {kind: synthetic, weight: 0.9}]`.
        held_out: what is evaluated on, the same way, each by itself; its `synthetic` has other
            seeds.
        held_out_examples: of each of these.
        pose_histogram: `amass_poses_hist100_SMPL+H_G.npy`, by which the published training drops
            improbable poses of `tars`; empty: none is dropped for that.
        real_poses: bodies for the discriminator: `cmu_mocap.npz` or another npz of `body_pose`
            (N, 72) and `betas` (N, 10), or an output root with `tracks`; needed unless
            `loss.adversarial` is 0.
    """

    output: str = ""
    size: str = "mini"
    init: str = ""
    init_backbone: str = ""
    mean_params: str = ""
    body: str = ""
    extra_regressor: str = ""
    drop_path: float = 0.0
    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig()])
    held_out: list[SourceConfig] = field(default_factory=lambda: [SourceConfig()])
    held_out_examples: int = 512
    pose_histogram: str = ""
    real_poses: str = ""
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class TrainPredictorConfig:
    """Training of the pose predictor, for `jobs/train_predictor.py`.

    Attributes:
        output: folder or prefix for checkpoints, logs and the final weights (any fsspec path).
        sources: what is trained on, `synthetic` and `tables`; a list such as
            `[{kind: tables, path: /data/tables}, {kind: synthetic, weight: 0.2}]`. Where
            `synthetic` has a path to motion capture, everybody plays it.
        held_out: what is evaluated on, the same way, each by itself; its `synthetic` has other
            seeds. Of an output root that is in both lists about every tenth video is held out,
            chosen by its name.
        held_out_examples: of each of these.
        jitter_deg: by so much (standard deviation about each axis) the rotations that the
            predictor is shown of `synthetic` people are wrong, as estimates are; what it has to
            tell is exact.
        dim, depth, num_heads, head_dim, mlp_dim, smpl_dim: sizes of `models/predictor.py`.
        frame_length: slots of a track that are seen at once.
        mask_share: share of the poses that are hidden, as published.
        stretch_share: share of the tracks of which a stretch is hidden instead, or all but the
            last few: what the tracker asks for.
        single_pose_steps: before the first step the encoder and the read-out learn single poses
            in so many (0: everything starts from random weights, as published).
        min_rows: shorter tracks are left out.
    """

    output: str = ""
    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig()])
    held_out: list[SourceConfig] = field(default_factory=lambda: [SourceConfig()])
    held_out_examples: int = 512
    jitter_deg: float = 3.0
    dim: int = 128
    depth: int = 2
    num_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 256
    smpl_dim: int = 256
    frame_length: int = 125
    mask_share: float = 0.4
    stretch_share: float = 0.5
    single_pose_steps: int = 1500
    min_rows: int = 20
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(learning_rate=1e-4, weight_decay=0.05)
    )
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class TrainAppearanceConfig:
    """Training of the texture encoder, for `jobs/train_appearance.py`.

    Attributes:
        output: folder or prefix for checkpoints, logs and the final weights (any fsspec path).
        body: SMPL file; empty: the open body of this package. Maps lie as its own texture
            coordinates say, so the encoder is for runs with the same atlas.
        map_px: side of the maps that are trained on: 256, or a half, a quarter, ... of it.
        agreement: weight of telling outfits apart beside that of reconstructing them.
        num_views: of bodies that outfits are seen in, made before the first step.
        held_out_examples: of other outfits in other views.
    """

    output: str = ""
    body: str = ""
    map_px: int = 128
    agreement: float = 0.3
    num_views: int = 256
    held_out_examples: int = 256
    loop: LoopConfig = field(default_factory=LoopConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class TrainDetectorConfig:
    """Training of a person detector or segmenter, for `jobs/train_detector.py`.

    Attributes:
        output: folder or prefix for checkpoints, logs and the final model (any fsspec path).
        segment: masks, too: RF-DETR-Seg instead of RT-DETR.
        motion: folder of motion capture that half of the people take their poses from, those of the
            held-out frames, too; empty: the package's own motions alone.
        height, width: of the network's input in pixels, multiples of 32.
        dim: width of encoder and decoder, a multiple of 16.
        num_queries: at most so many people are found in a frame.
        decoder_layers: of the decoder.
        backbone_widths: channels of the backbone's stages, with strides 4, 8, 16, 32; of the
            segmenter the last one is the width of its transformer, which has twice as many layers.
        levels: feature maps that the detector looks at, counted from the coarsest.
        reuse: times that a rendered frame is trained on, cut and coloured differently each time.
            Data workers share nothing: with more than one it has to be 1.
        num_places, num_outfits: made before the first frame; of each seed.
        held_out_examples: frames of another seed.
    """

    output: str = ""
    segment: bool = False
    motion: str = ""
    height: int = 160
    width: int = 224
    dim: int = 64
    num_queries: int = 30
    decoder_layers: int = 2
    backbone_widths: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    levels: int = 2
    reuse: int = 4
    num_places: int = 24
    num_outfits: int = 160
    held_out_examples: int = 256
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            batch_size=16, learning_rate=4e-4, weight_decay=1e-4, clip_norm=0.1
        )
    )
    log: LogConfig = field(default_factory=LogConfig)


Config = TypeVar(
    "Config",
    JobConfig,
    TrainHmrConfig,
    TrainPredictorConfig,
    TrainAppearanceConfig,
    TrainDetectorConfig,
)


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    kind: type[Config] = JobConfig,  # type: ignore[assignment]
) -> Config:
    """Defaults, then the YAML file, then `key=value` words; checked as a whole.

    Args:
        path: YAML file, or None.
        overrides: words such as `output=s3://bucket/run1` or `hmr.device=cpu`.
        kind: whose settings.
    Raises:
        ConfigError: lists every unknown key, wrong type and impossible value at once.
    """
    schema = OmegaConf.structured(kind)
    config = schema
    problems: list[str] = []

    known = dict(leaves(asdict(kind())))
    layers: list[tuple[str, str, Any]] = []  # (source, dotted key, value)
    if path is not None:
        try:
            loaded: Any = OmegaConf.to_container(OmegaConf.load(path))
        except FileNotFoundError:
            raise ConfigError(f"config file {path}: no such file") from None
        except (YAMLError, OmegaConfBaseException, OSError) as error:
            raise ConfigError(f"config file {path}: not readable as YAML: {error}") from error
        if loaded and not isinstance(loaded, dict):
            raise ConfigError(
                f"config file {path}: expected a mapping, got {type(loaded).__name__}"
            )
        layers += [(str(path), key, value) for key, value in leaves(loaded or {})]
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            problems.append(f"{word!r}: expected key=value, for example output=/data/run1")
            continue
        # A path is taken to the letter: it may hold '#', ':' or '${'.
        literal = isinstance(known.get(key), str)
        layers.append(("command line", key, value if literal else _parse(value)))

    for source, key, value in layers:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{key}: no such setting ({source}){hint}")
            continue
        expected = type(known[key])
        if value is None or (expected is str and not isinstance(value, (str, int, float))):
            problems.append(f"{key}: expected {expected.__name__}, got {value!r} ({source})")
            continue
        try:
            OmegaConf.update(config, key, _literal(value))
        except OmegaConfBaseException as error:
            reason = f": {str(error).splitlines()[0]}" if expected is list else ""
            problems.append(
                f"{key}: expected {expected.__name__}, got {value!r} ({source}){reason}"
            )

    built = cast(Config, OmegaConf.to_object(config))
    assert isinstance(built, kind)
    problems += _impossible(built)
    if problems:
        raise ConfigError("wrong settings:\n  " + "\n  ".join(problems))
    return built


def require(config: object, *keys: str) -> None:
    """Stop unless these dotted settings are not empty.

    Raises:
        ConfigError: names each empty setting and says how to give it.
    """
    values = dict(leaves(to_dict(config)))
    empty = [key for key in keys if values[key] in ("", None)]
    if empty:
        raise ConfigError(
            "missing settings:\n  "
            + "\n  ".join(f"{key}: give {key}=... ({_meaning(key, type(config))})" for key in empty)
        )


def to_yaml(config: object) -> str:
    """The settings as YAML, as saved beside the output."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: object) -> dict[str, Any]:
    """A settings dataclass as plain nested dicts."""
    if not is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"expected a settings dataclass, got {config!r}")
    return asdict(config)


def describe_settings(kind: type[Any] = JobConfig) -> str:
    """One line per setting: dotted name, default and meaning; for `--help`."""
    return "\n".join(
        f"  {key}={value!r}: {_meaning(key, kind)}" for key, value in leaves(asdict(kind()))
    )


def _parse(text: str) -> Any:
    """A word of the command line with YAML's types; what is no YAML stays a string."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"v={text}"]))["v"]  # type: ignore[call-overload,index]
    except (YAMLError, OmegaConfBaseException):
        return text


def _literal(value: Any) -> Any:
    """A value whose strings are taken to the letter, at any depth."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    return value


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested dicts."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _meaning(key: str, owner: Any) -> str:
    """The `Attributes` line of a dotted setting of a dataclass."""
    *path, name = key.split(".")
    for part in path:
        made: Any = {f.name: f for f in fields(owner)}[part].default_factory
        owner = type(made())
    text = ""
    for line in (owner.__doc__ or "").split("Attributes:")[-1].splitlines():
        names, colon, rest = line.strip().partition(":")
        if colon and name in [n.strip() for n in names.split(",")]:
            text = rest.strip()
        elif text and line.startswith(" " * 12):
            text += " " + line.strip()
        elif text:
            break
    return text.rstrip(".")


_Check = tuple[str, bool, str, object]  # setting, whether it is possible, expected, got


def _impossible(config: object) -> list[str]:
    """Values that no job can use."""
    if isinstance(config, JobConfig):
        checks = _job_checks(config)
    else:
        assert isinstance(
            config,
            (TrainHmrConfig, TrainPredictorConfig, TrainAppearanceConfig, TrainDetectorConfig),
        )
        checks = _loop_checks(config.loop)
        if isinstance(config, TrainHmrConfig):
            checks += _hmr_checks(config)
        elif isinstance(config, TrainPredictorConfig):
            checks += _predictor_checks(config)
        elif isinstance(config, TrainAppearanceConfig):
            checks += _appearance_checks(config)
        else:
            checks += _detector_checks(config)
    infinite = [
        f"{key}: expected a finite number, got {value!r}"
        for key, value in leaves(to_dict(config))
        if isinstance(value, float) and not math.isfinite(value)
    ]
    return infinite + [
        f"{key}: expected {expected}, got {got!r}" for key, ok, expected, got in checks if not ok
    ]


def _loop_checks(loop: LoopConfig) -> list[_Check]:
    def at_least(least: int, *names: str) -> list[_Check]:
        values = {name: getattr(loop, name) for name in names}
        return [(f"loop.{n}", v >= least, f"{least} or more", v) for n, v in values.items()]

    return [
        *at_least(1, "steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every"),
        *at_least(1, "keep_checkpoints", "workers"),
        *at_least(0, "weight_decay", "warmup_steps", "clip_norm", "cpu_threads", "data_workers"),
        *at_least(0, "seed", "max_failures"),
        ("loop.learning_rate", loop.learning_rate > 0, "more than 0", loop.learning_rate),
        ("loop.decay", loop.decay in DECAYS, " or ".join(DECAYS), loop.decay),
        ("loop.precision", loop.precision in ("fp32", "bf16"), "fp32 or bf16", loop.precision),
        ("loop.device", bool(_DEVICE.fullmatch(loop.device)), "auto, cpu or cuda", loop.device),
    ]


def _source_checks(
    config: TrainHmrConfig | TrainPredictorConfig, kinds: tuple[str, ...]
) -> list[_Check]:
    lists = {"sources": config.sources, "held_out": config.held_out}
    names = [source.name or source.kind for source in config.held_out]
    checks: list[_Check] = [
        ("sources", bool(config.sources), "at least one source", config.sources),
        ("held_out", bool(names), "at least one source", config.held_out),
        ("held_out", len(set(names)) == len(names), "different names", names),
        ("held_out_examples", config.held_out_examples >= 1, "1 or more", config.held_out_examples),
    ]
    for name, sources in lists.items():
        for source in sources:
            checks += [
                (name, source.kind in kinds, f"a kind of {kinds}", source.kind),
                (name, source.weight > 0 and math.isfinite(source.weight), "weights", source),
                (name, source.kind == "synthetic" or bool(source.path), "a path", source),
            ]
    return checks


def _hmr_checks(config: TrainHmrConfig) -> list[_Check]:
    checks: list[_Check] = [
        *_source_checks(config, SOURCE_KINDS),
        ("drop_path", 0 <= config.drop_path < 1, "0 to below 1", config.drop_path),
        (
            "real_poses",
            bool(config.real_poses) or config.loss.adversarial == 0,
            "poses for the discriminator, or loss.adversarial=0",
            config.real_poses,
        ),
    ]
    checks += [
        (f"loss.{name}", weight >= 0, "0 or more", weight)
        for name, weight in asdict(config.loss).items()
    ]
    checks += [
        (f"augment.{name}", value >= 0 and (name == "rotation_deg" or value <= 1), "0 to 1", value)
        for name, value in asdict(config.augment).items()
    ]
    checks.append(("augment.scale", config.augment.scale < 1, "below 1", config.augment.scale))
    return checks


def _predictor_checks(config: TrainPredictorConfig) -> list[_Check]:
    shares = {"mask_share": config.mask_share, "stretch_share": config.stretch_share}
    steps = config.single_pose_steps
    sizes = ("dim", "depth", "num_heads", "head_dim", "mlp_dim", "smpl_dim")
    # Whole steps of the predictor's convolution; gaps of evaluation (training/tracks.py) with rows
    # around them.
    length, stride, least = config.frame_length, 5, 24
    return [
        *_source_checks(config, TRACK_SOURCE_KINDS),
        ("jitter_deg", config.jitter_deg >= 0, "0 or more", config.jitter_deg),
        *((name, 0 <= share <= 1, "0 to 1", share) for name, share in shares.items()),
        *((name, getattr(config, name) >= 1, "1 or more", getattr(config, name)) for name in sizes),
        (
            "frame_length",
            length >= least and length % stride == 0,
            f"a multiple of {stride} above {least}",
            length,
        ),
        ("min_rows", config.min_rows >= 2, "2 or more", config.min_rows),
        ("single_pose_steps", steps >= 0, "0 or more", steps),
    ]


def _appearance_checks(config: TrainAppearanceConfig) -> list[_Check]:
    sides = (256, 128, 64, 32, 16)
    return [
        ("map_px", config.map_px in sides, f"one of {sides}", config.map_px),
        ("agreement", config.agreement >= 0, "0 or more", config.agreement),
        ("num_views", config.num_views >= 2, "2 or more", config.num_views),
        ("held_out_examples", config.held_out_examples >= 1, "1 or more", config.held_out_examples),
    ]


def _detector_checks(config: TrainDetectorConfig) -> list[_Check]:
    sizes = ("num_queries", "decoder_layers", "reuse", "num_places", "num_outfits")
    widths, levels = config.backbone_widths, config.levels
    # Queries are chosen from the places of these feature maps; see models/detector_transformers.py.
    strides = [16] if config.segment else [32 // 2**level for level in range(levels)]
    num_places = sum((config.height // s) * (config.width // s) for s in strides if s)
    return [
        *((name, getattr(config, name) >= 1, "1 or more", getattr(config, name)) for name in sizes),
        ("held_out_examples", config.held_out_examples >= 1, "1 or more", config.held_out_examples),
        *(
            (name, value > 0 and value % 32 == 0, "a multiple of 32", value)
            for name, value in (("height", config.height), ("width", config.width))
        ),
        ("dim", config.dim > 0 and config.dim % 16 == 0, "a multiple of 16", config.dim),
        (
            "backbone_widths",
            len(widths) == 4 and all(w > 0 and w % 4 == 0 for w in widths),
            "four multiples of 4",
            widths,
        ),
        ("levels", 1 <= levels <= 3, "1 to 3", levels),
        (
            "num_queries",
            config.num_queries <= num_places,
            f"at most {num_places}, the places of the feature maps (height, width, levels)",
            config.num_queries,
        ),
        (
            "reuse",
            config.reuse == 1 or config.loop.data_workers <= 1,
            "1 with several loop.data_workers",
            config.reuse,
        ),
    ]


def _job_checks(config: JobConfig) -> list[_Check]:
    video, detector, hmr = config.video, config.detector, config.hmr
    plan, cluster, tracker, poses = config.plan, config.cluster, config.tracker, config.poses
    shares = cluster.gpus_per_actor + cluster.trackers_per_actor * cluster.gpus_per_tracker
    return [
        (
            "video.decoder",
            video.decoder in ("auto", "pyav"),
            "auto or pyav (decord cannot stream safely; it serves short reads only)",
            video.decoder,
        ),
        ("video.chunk_frames", 16 <= video.chunk_frames <= 256, "16 to 256", video.chunk_frames),
        ("video.max_chunk_mb", video.max_chunk_mb >= 1, "at least 1", video.max_chunk_mb),
        ("video.max_megapixels", video.max_megapixels > 0, "more than 0", video.max_megapixels),
        ("video.stall_timeout_s", video.stall_timeout_s > 0, "more than 0", video.stall_timeout_s),
        (
            "video.decoder_memory_mb",
            video.decoder_memory_mb >= 0,
            "0 or more",
            video.decoder_memory_mb,
        ),
        (
            "detector.score_threshold",
            0 <= detector.score_threshold < 1,
            "0 to below 1",
            detector.score_threshold,
        ),
        ("detector.min_width_px", detector.min_width_px >= 0, "0 or more", detector.min_width_px),
        (
            "detector.min_height_px",
            detector.min_height_px >= 0,
            "0 or more",
            detector.min_height_px,
        ),
        ("detector.batch_size", detector.batch_size >= 1, "at least 1", detector.batch_size),
        ("detector.input_size", detector.input_size >= 0, "0 or more", detector.input_size),
        (
            "hmr.device",
            _DEVICE.fullmatch(hmr.device) is not None,
            "auto, cpu or cuda",
            hmr.device,
        ),
        (
            "hmr.precision",
            hmr.precision in ("auto", "fp32", "tf32", "bf16", "fp16"),
            "auto, fp32, tf32, bf16 or fp16",
            hmr.precision,
        ),
        ("hmr.batch_size", hmr.batch_size >= 0, "0 or more", hmr.batch_size),
        ("hmr.cpu_threads", hmr.cpu_threads >= 1, "at least 1", hmr.cpu_threads),
        ("log.format", config.log.format in ("text", "json"), "text or json", config.log.format),
        ("tracker.max_age", tracker.max_age >= 0, "0 or more", tracker.max_age),
        ("tracker.n_init", 1 <= tracker.n_init <= 7, "1 to 7", tracker.n_init),
        ("tracker.gate", tracker.gate >= 1, "at least 1", tracker.gate),
        (
            "tracker.box_weight",
            0 <= tracker.box_weight <= (0 if tracker.compat else 20),
            "0 to 20, and 0 with tracker.compat",
            tracker.box_weight,
        ),
        (
            "tracker.log_cost",
            not (tracker.log_cost and tracker.compat),
            "false with tracker.compat",
            tracker.log_cost,
        ),
        ("plan.videos_per_shard", plan.videos_per_shard >= 1, "at least 1", plan.videos_per_shard),
        ("plan.mb_per_shard", plan.mb_per_shard >= 1, "at least 1", plan.mb_per_shard),
        ("plan.limit", plan.limit >= 0, "0 or more", plan.limit),
        ("plan.list_start_s", plan.list_start_s >= 0, "0 or more", plan.list_start_s),
        (
            "plan.list_end_s",
            plan.list_end_s == 0 or plan.list_end_s > plan.list_start_s,
            "0, or more than plan.list_start_s",
            plan.list_end_s,
        ),
        ("plan.gpu_hour_cost", plan.gpu_hour_cost >= 0, "0 or more", plan.gpu_hour_cost),
        ("cluster.gpu_actors", cluster.gpu_actors >= 0, "0 or more", cluster.gpu_actors),
        (
            "cluster.gpus_per_actor",
            cluster.gpus_per_actor > 0,
            "more than 0",
            cluster.gpus_per_actor,
        ),
        (
            "cluster.cpus_per_actor",
            cluster.cpus_per_actor > 0,
            "more than 0",
            cluster.cpus_per_actor,
        ),
        (
            "cluster.cpus_per_decoder",
            cluster.cpus_per_decoder > 0,
            "more than 0",
            cluster.cpus_per_decoder,
        ),
        (
            "cluster.trackers_per_actor",
            cluster.trackers_per_actor >= 1,
            "at least 1",
            cluster.trackers_per_actor,
        ),
        (
            "cluster.gpus_per_tracker",
            cluster.gpus_per_tracker >= 0,
            "0 or more",
            cluster.gpus_per_tracker,
        ),
        (
            "cluster.checkpoint_frames",
            cluster.checkpoint_frames >= 1,
            "at least 1",
            cluster.checkpoint_frames,
        ),
        (
            "tracker.device",
            _DEVICE.fullmatch(tracker.device) is not None,
            "auto, cpu or cuda",
            tracker.device,
        ),
        (
            "tracker.atlas",
            not tracker.atlas or bool(tracker.texture_weights),
            "tracker.texture_weights beside it, without which it says nothing",
            tracker.atlas,
        ),
        (
            "cluster.gpus_per_tracker",
            not (tracker.has_networks and cluster.gpus_per_actor <= 1) or shares <= 1 + 1e-9,
            "shares of a GPU for a model process and its trackers of at most 1 together",
            f"{cluster.gpus_per_actor:g} + {cluster.trackers_per_actor} x "
            f"{cluster.gpus_per_tracker:g}",
        ),
        (
            "cluster.units_per_actor",
            cluster.units_per_actor >= 1,
            "at least 1",
            cluster.units_per_actor,
        ),
        (
            "cluster.videos_per_unit",
            cluster.videos_per_unit >= 1,
            "at least 1",
            cluster.videos_per_unit,
        ),
        ("cluster.unit_mb", cluster.unit_mb >= 1, "at least 1", cluster.unit_mb),
        (
            "cluster.max_gpu_actors",
            cluster.max_gpu_actors >= 0,
            "0 or more",
            cluster.max_gpu_actors,
        ),
        (
            "plan.limit",
            not (plan.limit and plan.remove_missing),
            "0 with plan.remove_missing, which would take all others out",
            plan.limit,
        ),
        ("plan.max_removed", 0 <= plan.max_removed <= 1, "0 to 1", plan.max_removed),
        ("cluster.chunks_ahead", cluster.chunks_ahead >= 1, "at least 1", cluster.chunks_ahead),
        (
            "cluster.progress_timeout_s",
            cluster.progress_timeout_s > 0,
            "more than 0",
            cluster.progress_timeout_s,
        ),
        ("cluster.attempts", cluster.attempts >= 1, "at least 1", cluster.attempts),
        (
            "poses.image_size",
            not poses.image_size or poses.image_size_px is not None,
            "WIDTHxHEIGHT such as 1280x720",
            poses.image_size,
        ),
        ("poses.fps", 0 <= poses.fps < 10_000, "0 to below 10000", poses.fps),
        ("poses.workers", poses.workers >= 0, "0 or more", poses.workers),
        ("dataset", bool(config.dataset.strip()), "a name", config.dataset),
    ]
