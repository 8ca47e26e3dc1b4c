"""The command `fourdh`, and what the scripts in `jobs/` share with it: words to settings to a call.

Exit codes: 0 all done; 3 done, but some videos failed in part or wholly (see the `failures`
table); 1 failed; 2 usage.
"""

from __future__ import annotations

import io
import json
import logging
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from fourdh_batch import __version__, logs
from fourdh_batch.config import (
    JobConfig,
    TrainAppearanceConfig,
    TrainDetectorConfig,
    TrainHmrConfig,
    TrainPredictorConfig,
    describe_settings,
    load_config,
    require,
)
from fourdh_batch.errors import ConfigError, FourdhError, ManifestError
from fourdh_batch.evaluate.report import MISSING, PoseScores, Report, evaluate
from fourdh_batch.evaluate.tracking import PROTOCOLS
from fourdh_batch.pipeline.corpus import stream_corpus
from fourdh_batch.pipeline.dry_run import MAX_HEADERS, MAX_SHARDS, DryRun, dry_run
from fourdh_batch.pipeline.job import OnProgress, RunReport, changes_key, summary_of
from fourdh_batch.pipeline.job import Progress as JobProgress
from fourdh_batch.pipeline.plan import assignments
from fourdh_batch.pipeline.records import UNTRAINED
from fourdh_batch.pipeline.status import RUNNING, status_of
from fourdh_batch.storage import Store, redact, redact_uri
from fourdh_batch.tables.reader import read_table, read_tracks
from fourdh_batch.tables.release import ReleaseProgress, release_root
from fourdh_batch.tables.schema import video_ids_of
from fourdh_batch.tables.verify import VerifyProgress, VerifyReport, verify_root
from fourdh_batch.video.decode import VideoReader

if TYPE_CHECKING:  # imports torch
    from fourdh_batch.evaluate.benchmarks import Figure

logger = logging.getLogger(__name__)

DONE, FAIL, USAGE = 0, 1, 2
STOPPED = "stopped; finished videos are kept, the same command goes on"
LOG_EVERY_S = 10.0
MAX_LINES = 50  # problems that are printed
NAME_WIDTH = 18  # of videos, at least, however narrow the terminal
_MIB = 1 << 20

app = typer.Typer(
    name="fourdh",
    help="Every person in a video corpus, in 3D, with an identity over time, in a table.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Settings are key=value words; `fourdh settings` lists them all.",
)
weights_app = typer.Typer(help="Import and check model weights.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

Words = Annotated[
    list[str] | None, typer.Argument(metavar="[JOB.yaml] KEY=VALUE...", show_default=False)
]
Part = Annotated[
    str | None,
    typer.Option(
        metavar="PART",
        help="hmr2, texture or predictor; else told by the content.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command("run")
def run_command(words: Words = None, as_json: AsJson = False) -> None:
    """Bring the tables of an output up to date with a corpus.

    Only what is new or changed is done; an interrupted run continues.

    Example: fourdh run input=/data/videos output=/data/tables hmr.weights=hmr2.safetensors
    detector.name=onnx detector.path=rtmdet.onnx
    """
    raise typer.Exit(run_job(*_split(words), as_json=as_json))


@app.command("plan")
def plan_command(
    words: Words = None,
    as_json: AsJson = False,
    show_all: Annotated[bool, typer.Option("--all", help="List every shard to do.")] = False,
    headers: Annotated[
        int, typer.Option(min=0, help="Read the headers of so many files, for their frames.")
    ] = MAX_HEADERS,
    remember: Annotated[
        bool, typer.Option(help="Keep what was probed below the output, for the next time.")
    ] = False,
) -> None:
    """Show what a run would do and take, without doing it: videos, frames, hours, cost, bytes.

    Nothing is written. Give the models of the run as well, or those of the last run are assumed.

    Example: fourdh plan input=/data/videos output=/data/tables plan.gpu_hour_cost=2.5
    """

    def plan() -> int:
        config = load_config(*_split(words))
        require(config, "input", "output")
        with _steps("planning") as on_step:
            found = dry_run(
                config,
                max_headers=headers,
                max_shards=sys.maxsize if show_all else MAX_SHARDS,
                remember=remember,
                on_step=on_step,
            )
        if as_json:
            typer.echo(json.dumps(found.to_dict()))
        else:
            _print_plan(found)
        return DONE

    raise typer.Exit(_guarded(plan))


@app.command("status")
def status_command(
    output: Annotated[str, typer.Argument(help="Root of the tables.")],
    dataset: Annotated[
        str | None, typer.Option(help="Its newest run; else the newest of all.", show_default=False)
    ] = None,
    watch: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Look again until the run has ended.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Show where a run is, or how it ended, from storage alone.

    Example: fourdh status /data/tables --watch 30
    """

    def look() -> int:
        status = None
        while True:
            status = status_of(output, dataset=dataset, before=status)
            text = json.dumps(status.to_dict()) if as_json else "\n".join(status.lines())
            typer.echo(text)
            if not watch or status.state != RUNNING:
                return DONE
            time.sleep(watch)

    raise typer.Exit(_guarded(look))


@app.command("verify")
def verify_command(
    output: Annotated[str, typer.Argument(help="Root of the tables, or of a release.")],
    corpus: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="CORPUS",
            help="Today's videos, as for a run; they must be done instead of all ever planned.",
            show_default=False,
        ),
    ] = None,
    words: Words = None,
    dataset: Annotated[str | None, typer.Option(help="Only this one.", show_default=False)] = None,
    quick: Annotated[bool, typer.Option(help="Presence and size only, nothing is opened.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prove that the tables are whole and right. Exit code 0: proved, 1: problems, 2: usage.

    Every committed object is there with its checksum and rows, no row stands twice, every video
    is done or in `failures`, and nothing else lies where a reader would take it for a table.

    Settings say how the input is read, as for a run (plan.list_start_s and the like).

    Example: fourdh verify /data/tables --input /data/videos
    """

    def verify() -> int:
        store = Store(output)
        videos = None
        if corpus is not None:
            videos = stream_corpus(replace(load_config(*_split(words)), input=corpus))
        elif words:
            raise ConfigError("settings are for --input, which was not given")
        with _progress(_verify_line) as on_progress:
            report = verify_root(
                output,
                dataset=dataset,
                planned=lambda name: assignments(store, name),
                corpus=None if videos is None else ((v.video_id, v.fingerprint) for v in videos),
                quick=quick,
                on_progress=on_progress,
            )
        if as_json:
            typer.echo(json.dumps({**asdict(report), "exit_code": report.exit_code}))
        else:
            _print_proof(report)
        return report.exit_code

    raise typer.Exit(_guarded(verify))


@app.command("release")
def release_command(
    output: Annotated[str, typer.Argument(help="Root of the tables.")],
    name: Annotated[str, typer.Argument(help="The release; letters, digits, '-', '.', '_'.")],
    dataset: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be repeated.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy what is committed to OUTPUT/releases/NAME, which stays as it is.

    A run may go on meanwhile. An interrupted release is completed by the same command.

    Example: fourdh release /data/tables v1
    """

    def release() -> int:
        with _progress(_release_line) as on_progress:
            made = release_root(output, name, datasets=dataset or (), on_progress=on_progress)
        summary = {"name": made.name, "place": made.place, "digest": made.digest, **made.totals()}
        if as_json:
            typer.echo(json.dumps({**summary, "created": made.created}))
        else:
            for word, value in summary.items():
                typer.echo(f"{word.replace('_', ' '):12.12} {value}")
        return DONE

    raise typer.Exit(_guarded(release))


@app.command("show")
def show_command(
    output: Annotated[str, typer.Argument(help="Root of the tables.")],
    video_id: Annotated[str, typer.Argument(help="As in the `videos` table.")],
    to: Annotated[str, typer.Option(help="MP4 file to write.")] = "overlay.mp4",
) -> None:
    """Draw the boxes, identities and joints of one video over its frames.

    Example: fourdh show /data/tables clip.mp4 --to clip_overlay.mp4
    """

    def draw() -> int:
        show(output, video_id, to)
        typer.echo(to)
        return DONE

    raise typer.Exit(_guarded(draw))


@app.command("evaluate")
def evaluate_command(
    predictions: Annotated[str, typer.Argument(help="Root of the tables of a run.")],
    truth: Annotated[
        str, typer.Argument(help="Parquet file with columns of `tracks`, or a root of tables.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write all numbers: .json, or .parquet with a row per video."
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Tracking protocol: {' or '.join(PROTOCOLS)}; may be repeated, else both.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Of the predictions, of several.", show_default=False)
    ] = None,
    body: Annotated[
        str | None,
        typer.Option(help="Body model for PVE; else the open body.", show_default=False),
    ] = None,
    extra_regressor: Annotated[
        str | None, typer.Option(help="SMPL_to_J19.pkl of an SMPL file.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score bodies, tracks and boxes of a run against truth. docs/EVALUATION.md says what is what.

    A video that the run lacks is all misses, and is named.

    Examples: fourdh evaluate /data/tables /data/corpus/truth.parquet;
    fourdh evaluate s3://bucket/tables s3://bucket/truth.parquet --to scores.json;
    fourdh evaluate /data/tables /data/other_tables --gate phalp --json
    """

    def score() -> int:
        if unknown := sorted(set(gate or ()) - set(PROTOCOLS)):
            raise ConfigError(f"--gate: expected {' or '.join(PROTOCOLS)}, got {unknown[0]!r}")
        if to is not None and not to.endswith((".json", ".parquet")):
            raise ConfigError(f"--to: expected a file that ends in .json or .parquet, got {to!r}")
        from fourdh_batch.models.smpl import load_body

        with _steps("evaluating") as on_step:
            report = evaluate(
                predictions,
                truth,
                dataset=dataset,
                protocols=gate or tuple(PROTOCOLS),
                body=load_body(body, extra_regressor=extra_regressor),
                on_step=on_step,
            )
        if to is not None:
            write_report(report, to)
        if as_json:
            typer.echo(json.dumps(report.to_dict()))
        else:
            show_scores(report)
        return DONE

    raise typer.Exit(_guarded(score))


@app.command("synthesize")
def synthesize_command(
    folder: Annotated[Path, typer.Argument(help="Where to write; made where it does not exist.")],
    clips: Annotated[int, typer.Option(min=1, help="Number of clips.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    motion: Annotated[
        Path | None, typer.Option(help="Folder of .npz (AMASS) and .bvh files that people play.")
    ] = None,
    frames: Annotated[int, typer.Option(min=3, help="Of each clip, at 25 per second.")] = 90,
    height: Annotated[
        int, typer.Option(min=48, max=4320, help="Of the 4:3 pictures, pixels.")
    ] = 288,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the corpus that the folder holds.")
    ] = False,
) -> None:
    """Render clips of people with their exact truth: shapes, poses, cameras, identities.

    Writes <name>.mp4, boxes.parquet (boxes and masks of a faultless detector), truth.parquet (a
    tracks table) and sheet.png (three frames of each clip). Names say what is difficult; the first
    ten clips show one difficulty each: crossings, occlusions, re-entries, moving cameras, cuts,
    crowds.

    Example: fourdh synthesize /data/synthetic --clips 20 --seed 1 --motion /data/amass/CMU/01
    """

    def make() -> int:
        made = synthesize(
            folder,
            clips=clips,
            seed=seed,
            motion=motion,
            frames=frames,
            height=height,
            overwrite=overwrite,
        )
        typer.echo(f"{made} clips in {folder}; look at {folder / 'sheet.png'}")
        return DONE

    raise typer.Exit(_guarded(make))


@app.command("settings")
def settings_command() -> None:
    """List every setting with its default and meaning."""
    typer.echo(describe_settings())


@app.command("doctor")
def doctor_command(as_json: AsJson = False) -> None:
    """Say what is installed and what a job would run on."""
    facts = doctor()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            typer.echo(f"{name:22} {value}")


@weights_app.command("list")
def weights_list_command() -> None:
    """List the model sizes and what their weights are made from."""
    from fourdh_batch.models.build import HMR2_SIZES, expected_shapes

    for name, size in HMR2_SIZES.items():
        count = sum(shape.numel() for shape in expected_shapes(name).values()) / 1e6
        typer.echo(
            f"{name:8} {count:6.1f} M numbers; backbone {size.vit_depth} x {size.vit_dim}, "
            f"decoder {size.head_depth} x {size.head_dim}; crops of {256 // size.shrink} px"
        )
    typer.echo(
        "\nThe word mini stands for a small trained model of this package (assets/mini/CARDS.md):\n"
        "hmr.weights=mini, tracker.texture_weights=mini, tracker.predictor_weights=mini,\n"
        "detector.name=transformers detector.path=mini (boxes) or =mini-segmenter (with masks)"
    )


@weights_app.command("import")
def weights_import_command(
    source: Annotated[Path, typer.Argument(help="Published checkpoint (.ckpt, .pth).")],
    target: Annotated[Path, typer.Argument(help="File to write (.safetensors).")],
    part: Part = None,
    yaml: Annotated[
        Path | None, typer.Option(help="Of the pose predictor; else beside the checkpoint.")
    ] = None,
    mean_std: Annotated[
        Path | None, typer.Option(help="Of the pose predictor; else mean_std.npy beside it.")
    ] = None,
) -> None:
    """Turn a published checkpoint into a plain tensor file, checking every key.

    Nothing in the checkpoint is executed.

    Examples: fourdh weights import epoch=35-step=1000000.ckpt hmr2.safetensors;
    fourdh weights import hmar_v2_weights.pth texture.safetensors;
    fourdh weights import pose_predictor.pth predictor.safetensors --yaml pose_predictor.yaml
    --mean-std mean_std.npy
    """

    def convert() -> int:
        from fourdh_batch.models.weights import import_weights

        made = import_weights(source, target, part=part, config=yaml, mean_std=mean_std)
        typer.echo(f"{target}: {made}")
        return DONE

    raise typer.Exit(_guarded(convert))


@weights_app.command("check")
def weights_check_command(
    path: Annotated[Path, typer.Argument(help=".ckpt, .pth or .safetensors")],
    part: Part = None,
) -> None:
    """Check the keys and shapes of a weights file.

    Example: fourdh weights check hmr2.safetensors
    """

    def check() -> int:
        from fourdh_batch.models.weights import check_weights

        typer.echo(check_weights(path, part=part))
        return DONE

    raise typer.Exit(_guarded(check))


def show(output: str, video_id: str, to: str | Path) -> None:
    """Write the overlay video of one video of an output.

    Raises:
        ConfigError: the output holds no such video.
        VideoError: it cannot be read any more.
    """
    from fourdh_batch.view.overlay import write_overlay_video

    videos = read_table(output, "videos")
    rows = videos[videos["video_id"] == video_id]
    if rows.empty:
        known = ", ".join(sorted(videos["video_id"])[:8])
        raise ConfigError(f"{output}: no video {video_id!r}; there are {len(videos)}: {known} ...")
    tracks = read_tracks(output, video_id=video_id)
    untrained = not tracks.empty and (tracks["weights"] == UNTRAINED).any()
    with VideoReader(rows["uri"].iloc[0], video_id=video_id) as reader:
        frames = (
            (int(index), rgb)
            for chunk in reader.chunks()
            for index, rgb in zip(chunk.frame_index, chunk.rgb, strict=True)
        )
        write_overlay_video(
            frames,
            tracks,
            to,
            fps=reader.info.fps or 25.0,
            caption=video_id,
            warning=f"weights: {UNTRAINED}" if untrained else "",
        )


def synthesize(
    folder: Path,
    *,
    clips: int,
    seed: int,
    motion: Path | None,
    frames: int,
    height: int,
    overwrite: bool,
) -> int:
    """Write a synthetic corpus and a contact sheet of it; the number of clips.

    Raises:
        ConfigError: one of the folders is none, or the first one holds a corpus already.
        MotionError: one of its files cannot be used.
    """
    from fourdh_batch.models.smpl import load_body
    from fourdh_batch.synthetic.corpus import make_corpus
    from fourdh_batch.synthetic.mocap import load_recordings
    from fourdh_batch.synthetic.plans import drawn_clips
    from fourdh_batch.video.decode import read_frames
    from fourdh_batch.view.overlay import contact_sheet

    if motion is not None and not motion.is_dir():
        raise ConfigError(f"--motion: expected a folder, got {motion}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder or nothing, got a file")
    truth = folder / "truth.parquet"
    if truth.exists() and not overwrite:
        raise ConfigError(f"{folder} holds a corpus already; take another, or --overwrite")
    recordings = load_recordings(motion) if motion is not None else []  # which may fail
    if truth.exists():
        _remove_clips(folder, truth)
    plans = drawn_clips(seed, clips, num_recordings=len(recordings), num_frames=frames)
    made = make_corpus(
        folder,
        load_body(),
        seed=seed,
        clips=plans,
        recordings=recordings,
        image_size_wh=(round(height * 2 / 3) * 2, height // 2 * 2),
    )
    pictures = [
        read_frames(str(clip.path), i, i + 1).rgb[0]
        for clip in made[:12]
        for i in (clip.num_frames // 6, clip.num_frames // 2, 5 * clip.num_frames // 6)
    ]
    contact_sheet(pictures, folder / "sheet.png", columns=6)
    return len(made)


def _remove_clips(folder: Path, truth: Path) -> None:
    """Delete the clips of a truth, which would stay beside those of another."""
    try:
        rows = pq.read_table(truth, columns=["video_id"])
        names = {*rows["video_id"].unique().to_pylist(), *video_ids_of(rows.schema)}
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{truth}: expected the truth of a corpus, got {error}") from error
    for name in names:
        if Path(name).name == name and name.endswith(".mp4"):  # the file may be anybody's
            (folder / name).unlink(missing_ok=True)
    truth.unlink()


def doctor() -> dict[str, Any]:
    """Versions and devices, by name."""
    import torch

    facts: dict[str, Any] = {
        "fourdh_batch": __version__,
        "python": platform.python_version(),
    }
    for name in (
        *("torch", "ray", "av", "decord", "smplx", "onnxruntime", "transformers", "s3fs"),
        "trackeval",
    ):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    facts["gpu"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else "none (the job runs on CPU)"
    )
    return facts


C = TypeVar("C", TrainHmrConfig, TrainPredictorConfig, TrainAppearanceConfig, TrainDetectorConfig)


class Job(Protocol):
    """What a job does once its settings are known; `cluster.run.run_job` is the main one."""

    def __call__(self, config: JobConfig, *, on_progress: OnProgress) -> RunReport:
        """Bring the tables of the output up to date."""


def run_main_job(config: JobConfig, *, on_progress: OnProgress) -> RunReport:
    """The main job; Ray and the model libraries are imported here."""
    from fourdh_batch.cluster import run as cluster

    return cluster.run_job(config, on_progress=on_progress)


def run_job(
    yaml: str | Path | None,
    words: Sequence[str],
    *,
    as_json: bool = False,
    show_changes: bool = False,
    run: Job = run_main_job,
) -> int:
    """Run a job with a progress bar, a log and a closing table; returns the exit code.

    Args:
        yaml: the job's own defaults.
        words: key=value.
        as_json: print the summary as JSON.
        show_changes: print, before the table, what was new, changed or gone.
        run: the job.
    """

    def call() -> int:
        config = load_config(yaml, words)
        with _progress(_line, config.log.format) as on_progress:
            report = run(config, on_progress=on_progress)
        if as_json:
            typer.echo(json.dumps(_summary(report)))
        else:
            if show_changes and report.changes:
                key = changes_key(report.run_id, "txt")
                typer.echo(Store(config.output).read_bytes(key).decode())
            _print_summary(report)
        return report.exit_code

    signal.signal(signal.SIGTERM, _stop)  # so that the lease is given back
    return _guarded(call)


def job_main(
    yaml: Path,
    words: Sequence[str],
    *,
    description: str,
    show_changes: bool = False,
    run: Job = run_main_job,
) -> int:
    """What a script of `jobs/` does with its command line; returns the exit code.

    Args:
        yaml: the job's own defaults.
        words: the command line.
        description: what `--help` says before the settings.
        show_changes: see `run_job`.
        run: the job.
    """
    if "-h" in words or "--help" in words:
        typer.echo(f"{description.strip()}\n\nSettings; defaults may differ in {yaml.name}:\n")
        typer.echo(describe_settings())
        return DONE
    words, as_json = [word for word in words if word != "--json"], "--json" in words
    return run_job(yaml, words, as_json=as_json, show_changes=show_changes, run=run)


def training_main(
    yaml: Path,
    words: Sequence[str],
    *,
    description: str,
    kind: type[C],
    run: Callable[[C], None],
) -> int:
    """What a training script of `jobs/` does with its command line; returns the exit code.

    Args:
        yaml: the job's own defaults; a YAML file as first word goes before it.
        words: the command line.
        description: what `--help` says before the settings.
        kind: of settings.
        run: trains; then `training.json` lies in `output`.
    """
    if "-h" in words or "--help" in words:
        typer.echo(f"{description.strip()}\n\nSettings; defaults may differ in {yaml.name}:\n")
        typer.echo(describe_settings(kind))
        return DONE

    def call() -> int:
        recipe, overrides = _split([word for word in words if word != "--json"])
        config = load_config(recipe or yaml, overrides, kind)
        require(config, "output")
        logs.set_up(config.log.format)
        run(config)
        from fourdh_batch.training.loop import RECORD

        record = json.loads(Store(config.output).read_bytes(RECORD))
        if "--json" in words:
            typer.echo(json.dumps(record, allow_nan=False))
        else:
            weights = f"{config.output.rstrip('/')}/{record['weights']}"
            typer.echo(f"{weights} after {record['steps']} steps; held out:")
            for name, value in record["held_out"].items():
                typer.echo(f"  {name:32} {'-' if value is None else f'{value:.4g}'}")
        return DONE

    signal.signal(signal.SIGTERM, _stop)
    return _guarded(call, "stopped; the last checkpoint is kept, the same command goes on")


def benchmarks_main(yaml: Path, words: Sequence[str], *, description: str) -> int:
    """What `jobs/evaluate.py` does with its command line; returns the exit code.

    Args:
        yaml: the job's own defaults.
        words: the command line.
        description: what `--help` says before the settings.
    """
    if "-h" in words or "--help" in words:
        typer.echo(f"{description.strip()}\n\nSettings; defaults may differ in {yaml.name}:\n")
        typer.echo(describe_settings())
        return DONE
    words, as_json = [word for word in words if word != "--json"], "--json" in words

    def call() -> int:
        from fourdh_batch.evaluate.benchmarks import evaluate_benchmarks
        from fourdh_batch.models.smpl import load_body
        from fourdh_batch.pipeline.engine import build_model

        config = load_config(yaml, words)
        logs.set_up(config.log.format)
        models: list[Any] = []

        def load_model() -> Any:
            models.append(build_model(config))
            return models[0]

        with _steps("evaluating") as on_step:
            figures = evaluate_benchmarks(
                config.evaluate,
                load_model=load_model,
                load_body=lambda path: load_body(
                    path, extra_regressor=config.hmr.extra_regressor or None
                ),
                batch_size=config.hmr.batch_size,
                on_step=on_step,
            )
        used = [
            f"HMR 2.0: size {model.size_name}, {model.weights_origin} weights of digest "
            f"{model.weights_digest[:16]}, {model.active_precision}, body {model.body.name}"
            for model in models
        ]
        if as_json:
            typer.echo(json.dumps({"model": used, "figures": [asdict(one) for one in figures]}))
        else:
            _print_figures(figures)
            for line in used:
                typer.echo(line)
        return DONE

    return _guarded(call)


def _print_figures(figures: Sequence[Figure]) -> None:
    console = _console()
    for section in dict.fromkeys(figure.section for figure in figures):
        table = _table("data", "measure", "ours", "paper", "", title=section)
        for figure in figures:
            if figure.section != section:
                continue
            digits = 2 if figure.measure.startswith("PCK") else 1
            table.add_row(
                *(figure.dataset, figure.measure, _number(figure.ours, digits)),
                ", ".join(f"{value:g} ({name})" for name, value in figure.paper.items()),
                figure.note,
            )
        console.print(table)


def main() -> None:
    """Entry point of the command."""
    app()


def _split(words: list[str] | None) -> tuple[str | None, list[str]]:
    """A leading YAML file, then key=value words."""
    words = words or []
    if words and "=" not in words[0] and words[0].endswith((".yaml", ".yml")):
        return words[0], words[1:]
    return None, words


def _guarded(call: Callable[[], int], stopped: str = STOPPED) -> int:
    """The exit code of a call; errors raised on purpose become one clear message.

    Args:
        call: gives back an exit code.
        stopped: what is said when it is.
    """
    try:
        return call()
    except (ConfigError, ManifestError) as error:
        typer.echo(f"error: {redact(str(error))}", err=True)
        return USAGE
    except FileNotFoundError as error:
        named = f"{error.filename}: {error.strerror or 'no such file'}"
        typer.echo(f"error: {redact(named if error.filename else str(error))}", err=True)
        return USAGE
    except FourdhError as error:
        typer.echo(f"error: {redact(str(error))}", err=True)
        return FAIL
    except OSError as error:
        typer.echo(f"error: {redact(str(error))}", err=True)
        return FAIL
    except (KeyboardInterrupt, SystemExit):  # the latter from Ray's handler while it starts
        typer.echo(stopped, err=True)
        return FAIL


def _stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


class ByteProgress(Protocol):
    """What a progress bar is drawn from."""

    @property
    def bytes_done(self) -> int:
        """Of `bytes_total`."""

    @property
    def bytes_total(self) -> int:
        """All there is to do."""


P = TypeVar("P", bound=ByteProgress)


@contextmanager
def _progress(
    line: Callable[[P], str], log_format: str = logs.TEXT
) -> Iterator[Callable[[P], None]]:
    """A bar where a person looks on, else a line in the log now and then."""
    console = Console(stderr=True)
    if log_format == logs.JSON or not console.is_terminal:
        logs.set_up(log_format)
        last = time.monotonic()

        def log(now: P) -> None:
            nonlocal last
            if time.monotonic() - last >= LOG_EVERY_S:
                last = time.monotonic()
                logger.info("%s", line(now))

        yield log
        return
    logs.set_up(handler=RichHandler(console=console, show_path=False))
    with Progress(
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("planning", total=None)

        def show_bar(now: P) -> None:
            bar.update(
                task,
                total=max(now.bytes_total, 1),
                completed=now.bytes_done,
                description=line(now),
            )

        yield show_bar


def _line(now: JobProgress) -> str:
    return (
        f"{now.videos_done}/{now.videos_total} videos, {now.shards_done}/{now.shards_total} "
        f"shards, {now.frames_done} frames"
    )


def _verify_line(now: VerifyProgress) -> str:
    return f"{now.shards_done}/{now.shards_total} shards, {now.bytes_done / _MIB:.0f} MiB"


def _release_line(now: ReleaseProgress) -> str:
    return f"{now.bytes_done / _MIB:.0f} of {now.bytes_total / _MIB:.0f} MiB"


def _print_proof(report: VerifyReport) -> None:
    for problem in report.problems[:MAX_LINES]:
        typer.echo(problem.line())
    if report.num_problems > MAX_LINES:
        typer.echo(f"and {report.num_problems - MAX_LINES} more problems (--json names them)")
    for note in report.notes:
        typer.echo(f"note: {note}")
    looked = "listed" if report.quick else "read"
    typer.echo(
        f"{report.shards} shards, {report.objects} objects {looked} "
        f"({report.num_bytes / _MIB:.1f} MiB), "
        + ", ".join(f"{count} {name}" for name, count in report.rows.items())
        + f"; {sum(report.videos.values())} videos: "
        + (", ".join(f"{count} {status}" for status, count in report.videos.items()) or "none")
    )
    verdict = "present, not opened" if report.quick else "proved"
    count = f"{report.num_problems} problem" + "s" * (report.num_problems != 1)
    typer.echo(f"{report.root}: {verdict if report.exit_code == 0 else count}")


def _summary(report: RunReport) -> dict[str, Any]:
    return {
        "run_id": report.run_id,
        "output": redact_uri(report.output),
        "exit_code": report.exit_code,
        "shards": {
            "done": len(report.shards),
            "up_to_date": report.num_shards_before,
            "failed": report.failed_shards,
        },
        **summary_of(report),
        "weights": report.card.weights_origin,
        "model_fingerprint": report.card.fingerprint,
        "seconds": report.seconds,
    }


def _print_summary(report: RunReport) -> None:
    summary = _summary(report)
    table = _table("", "", show_header=False, title=f"run {report.run_id}")
    if not report.shards and not report.failed_shards:
        table.add_row("nothing to do", f"{report.num_shards_before} shards are up to date")
    else:
        table.add_row("shards", f"{len(report.shards)} done, {report.num_shards_before} before")
        for name in ("frames", "people", "track_rows"):
            table.add_row(name.replace("_", " "), str(summary[name]))
    if report.changes:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(report.changes.items()))
        table.add_row("changes", f"{counts}: {changes_key(report.run_id)}")
    for status, count in summary["videos"].items():
        if count:
            table.add_row(f"videos {status}", str(count))
    for shard_id, reason in report.failed_shards.items():
        table.add_row(f"shard {shard_id} failed", reason)
    table.add_row("weights", summary["weights"])
    table.add_row("seconds", f"{report.seconds:.1f}")
    table.add_row("tables", summary["output"])
    _console().print(table)


@contextmanager
def _steps(doing: str) -> Iterator[Callable[[str, int, int], None]]:
    """A line that says how far it is, where a person looks on."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    with console.status(doing) as status:
        yield lambda what, done, total: status.update(
            f"{doing}: {done}{f' of {total}' if total else ''} {what}"
        )


def write_report(report: Report, to: str) -> None:
    """Write all numbers of an evaluation to a `.json` or, a row per video, a `.parquet`."""
    folder, slash, name = to.rpartition("/")
    store = Store((folder or slash) if slash else ".")
    if name.endswith(".json"):
        store.write_bytes(name, json.dumps(report.to_dict(), indent=1).encode())
        return
    sink = io.BytesIO()
    pq.write_table(report.to_table(), sink)
    store.write_bytes(name, sink.getvalue())


def _console() -> Console:
    """Standard output on which names stand as they are: `[/x]` and `:x:` are no markup."""
    return Console(markup=False, emoji=False)


def _table(*headers: str, **options: Any) -> Table:
    """A table that folds what a narrow terminal has no room for, instead of cutting it off."""
    return Table(*(Column(header, overflow="fold") for header in headers), **options)


def show_scores(report: Report) -> None:
    """Print what `evaluate` found: together, then video by video."""
    console, overall = _console(), report.overall
    num_missing = len(report.missing)
    table = _table("", "", show_header=False, title=f"{report.predictions} against {report.truth}")
    table.add_row("videos", f"{len(report.per_video)}, of them {num_missing} missing")
    table.add_row("bodies", _pose_line(overall.pose))
    if overall.completed.num_people:
        table.add_row("completed bodies", _pose_line(overall.completed))
    table.add_section()
    for name, scores in overall.tracking.items():
        table.add_row(
            f"tracks, {name}",
            f"HOTA {scores.hota:.3f} (DetA {scores.det_a:.3f}, AssA {scores.ass_a:.3f}), "
            f"MOTA {scores.mota:.3f}, IDF1 {scores.idf1:.3f}, IDs {scores.id_switches}; "
            f"{scores.matches} boxes matched, {scores.misses} missed, "
            f"{scores.false_positives} wrong",
        )
    boxes = overall.boxes
    table.add_row(
        f"boxes of {report.boxes_of}",
        f"AP {boxes.ap:.3f}, AP50 {boxes.ap50:.3f}, AP75 {boxes.ap75:.3f}, "
        f"recall at IoU 0.5 {boxes.recall50:.3f}",
    )
    console.print(table)
    each = _table(
        *("video", "bodies", "MPJPE", "PA-MPJPE"),
        *(f"{word} {name}" for name in overall.tracking for word in ("HOTA", "MOTA", "IDs")),
        box=None,
        padding=(0, 1, 0, 0),
        caption=f"the first {MAX_LINES} videos; --to has all"
        if len(report.per_video) > MAX_LINES
        else None,
    )
    each.columns[0].min_width = NAME_WIDTH
    for video_id, one in islice(report.per_video.items(), MAX_LINES):
        label = f"{video_id} (missing)" if report.status[video_id] == MISSING else video_id
        each.add_row(
            *(label, str(one.pose.num_people)),
            *(_number(one.pose.mpjpe_mm), _number(one.pose.pa_mpjpe_mm)),
            *(
                word
                for scores in one.tracking.values()
                for word in (
                    *(
                        _number(share if scores.num_truth_boxes else None, 3)
                        for share in (scores.hota, scores.mota)
                    ),
                    str(scores.id_switches),
                )
            ),
        )
    console.print(each)
    for video_id in report.missing[:MAX_LINES]:
        typer.echo(f"missing: {video_id}: in the truth, not in the predictions; all are misses")
    for video_id in report.without_truth[:MAX_LINES]:
        typer.echo(f"not scored: {video_id}: there is no truth")
    if (rest := len(report.without_truth) - MAX_LINES) > 0:
        typer.echo(f"not scored: and {rest} more; --json names them")
    for note in report.notes:
        typer.echo(f"note: {note}")


def _pose_line(pose: PoseScores) -> str:
    share = "" if pose.matched is None else f" ({100 * pose.matched:.1f} % of the true ones)"
    rate = "" if pose.fps is None else f" at {pose.fps:g} fps"
    shares = ", ".join(f"PCK@{name} {_number(value, 3)}" for name, value in pose.pck.items())
    return (
        f"{pose.num_people} matched{share}; MPJPE {_number(pose.mpjpe_mm)} mm, "
        f"PA-MPJPE {_number(pose.pa_mpjpe_mm)} mm, PVE {_number(pose.pve_mm)} mm, acceleration "
        f"{_number(pose.acceleration_mm_per_frame2)} mm/frame²{rate}, {shares}"
    )


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_plan(found: DryRun) -> None:
    console = _console()
    table = _table("", "", show_header=False, title="what a run would do")
    table.add_row("corpus", f"{found.num_videos} videos in {found.num_shards} shards")
    table.add_row("up to date", f"{found.shards_up_to_date} shards")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.changes.items()))
    kept = f"; {found.videos_kept} beside them are kept" if found.videos_kept else ""
    todo = f"{found.videos_todo} videos in {found.shards_todo} shards"
    table.add_row("to do", f"{todo}{f' ({kinds})' if kinds else ''}{kept}")
    if found.videos_missing:
        table.add_row(
            "not in the input",
            f"{found.videos_missing} finished videos; they stay (plan.remove_missing=true takes "
            "them out)",
        )
    if found.shards_removed:
        table.add_row("taken out", f"{found.shards_removed} shards, none of whose videos is left")
    rates = found.rates
    on_cpu = rates.device == "cpu"
    guessed = f", {found.frames_guessed} of them guessed by size" if found.frames_guessed else ""
    table.add_row("files", _size(found.bytes_in))
    table.add_row("frames", f"{found.frames}{guessed}")
    table.add_row("people", f"about {found.people_rows} rows of tracks")
    table.add_row("process-hours on CPU" if on_cpu else "GPU-hours", f"about {found.hours:.3g}")
    if found.cost is not None:
        table.add_row("cost", f"about {found.cost:.2f}, at {found.gpu_hour_cost:g} a GPU-hour")
    table.add_row("tables", f"about {_size(found.bytes_out)}")
    per = f"{1 / rates.seconds_per_frame:.3g} frames/s, {rates.rows_per_frame:.3g} people a frame"
    where = f"measured by {', '.join(rates.runs)} on {rates.device}"
    nothing = "assumed; no run of these models has measured any"
    table.add_row("rates", f"{per}: {where if rates.runs else nothing}")
    if found.models != "given":
        table.add_row("models", f"not given; {found.models}")
    console.print(table)
    if found.shards:
        rest = found.shards_todo - len(found.shards)
        shards = _table(
            *("shard", "videos", "kept", "MiB", "frames"),
            title="shards to do",
            caption=f"and {rest} more; --all lists them" if rest else None,
        )
        for row in found.shards:
            shards.add_row(*map(str, row.values()))
        console.print(shards)


def _size(num_bytes: int) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"
