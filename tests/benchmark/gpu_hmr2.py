"""HMR 2.0 on one GPU: crops per second, share of peak, error of reduced precision.

    python tests/benchmark/gpu_hmr2.py --json figures.json
    python tests/benchmark/gpu_hmr2.py --checkpoint hmr2.safetensors --reference ../4D-Humans
    python tests/benchmark/gpu_hmr2.py --device cpu --size tiny --batch-sizes 2 --seconds 0

Figures of one table are taken in turn, round by round; each is the median over the rounds. One
crop of the full model counts as 251.09 GFLOP everywhere, the work of the published code, so that
saved work shows as a higher share of the peak and not as a lower one. Without a checkpoint the
weights are pseudo-random (`tests/golden/recipe.py`): speed does not depend on them, errors do.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fourdh_batch.models.build import HMR2_SIZES, build_hmr2, expected_shapes, load_hmr2
from fourdh_batch.models.hmr2 import REDUCED_DTYPES, SIDE_MARGIN_PX, Hmr2
from fourdh_batch.models.smpl import load_body
from fourdh_batch.models.smpl_head import CrossAttention
from fourdh_batch.models.vit import Attention
from fourdh_batch.pipeline.reconstruct import Reconstructor
from fourdh_batch.types import FrameChunk
from fourdh_batch.video.crops import crop_batch

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "golden"))
import recipe  # noqa: E402

PUBLISHED_FLOP = {"vit_h": 251.09e9}  # per crop, multiply-add = 2
PEAK_TFLOPS = 790.0  # dense fp16 or bf16 matrix products, measured on an H200
Call = Callable[[], object]


class Bench:
    """Times calls on one device.

    Args:
        device: where the calls run.
        rounds: how often each call of a table is timed.
        seconds: at least so long per timing.
        peak_tflops: what a share of peak refers to.
        flop_per_crop: work of one crop.
    """

    def __init__(
        self, device: torch.device, rounds: int, seconds: float, peak: float, flop: float
    ) -> None:
        self.device, self.rounds, self.seconds = device, rounds, seconds
        self.peak, self.flop = peak, flop

    def seconds_per_call(self, call: Call, repeats: int) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def table(self, calls: dict[str, tuple[Call, int]], *, share: bool) -> dict[str, Any]:
        """Crops per second of each call, given with its number of crops, taken in turn."""
        figures: dict[str, Any] = {}
        repeats = {}
        for name, (call, num_crops) in list(calls.items()):
            try:
                call()
                once = self.seconds_per_call(call, 1)
            except RuntimeError as error:  # out of memory, or no kernel for this type
                figures[name] = {"num_crops": num_crops, "failed": str(error).splitlines()[0]}
                continue
            repeats[name] = max(1, round(self.seconds / once)) if once else 1
        times: dict[str, list[float]] = {name: [] for name in repeats}
        for _ in range(self.rounds):
            for name, number in repeats.items():
                times[name].append(self.seconds_per_call(calls[name][0], number))
        for name, measured in times.items():
            num_crops = calls[name][1]
            rate = num_crops / statistics.median(measured)
            figures[name] = {
                "num_crops": num_crops,
                "crops_per_s": rate,
                "spread": [num_crops / max(measured), num_crops / min(measured)],
            }
            if share and self.flop:
                figures[name]["tflops"] = rate * self.flop / 1e12
                figures[name]["share_of_peak"] = rate * self.flop / 1e12 / self.peak
        return figures

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---------------------------------------------------------------- variants


@contextmanager
def patched(owner: type[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    before = owner.forward
    owner.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        owner.forward = before  # type: ignore[method-assign]


def explicit_attention(self: Attention, tokens: Tensor) -> Tensor:
    """Softmax of a stored matrix, as the published backbone computes it."""
    b, n, d = tokens.shape
    heads = self.num_heads
    q, k, v = self.qkv(tokens).view(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    weights = torch.softmax((q * (d // heads) ** -0.5) @ k.transpose(-2, -1), dim=-1)
    mixed: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))
    return mixed


def explicit_cross_attention(self: CrossAttention, query: Tensor, context: Tensor) -> Tensor:
    """Keys and values of every token, as the published head computes them."""
    batch, heads = len(query), self.num_heads
    k, v = self.to_kv(context).chunk(2, dim=-1)
    q = self.to_q(query)[:, None]
    q, k, v = (x.reshape(batch, x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) * self.scale, dim=-1)
    mixed: Tensor = self.to_out((weights @ v).transpose(1, 2).reshape(batch, -1))
    return mixed


def with_patch(call: Call, owner: type[nn.Module], forward: Callable[..., Tensor]) -> Call:
    def run() -> object:
        with patched(owner, forward):
            return call()

    return run


def with_sdpa(call: Call, backend: SDPBackend) -> Call:
    def run() -> object:
        with sdpa_kernel(backend):
            return call()

    return run


def graphed(network: nn.Module, image: Tensor) -> Call:
    """The network captured as a CUDA graph for this one input."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            network(image)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(image)
    return graph.replay


def published_backbone(checkout: Path, ours: nn.Module, device: torch.device) -> nn.Module:
    """The published backbone with our weights; needs nothing but its own file.

    Args:
        checkout: folder of the published code (4D-Humans).
    """
    file = checkout / "hmr2" / "models" / "backbones" / "vit.py"
    if importlib.util.find_spec("timm") is None:
        # The file takes three small functions from timm, of which evaluation calls one.
        layers = types.ModuleType("timm.models.layers")
        vars(layers).update(
            drop_path=lambda x, *_args: x,
            to_2tuple=lambda x: x if isinstance(x, tuple) else (x, x),
            trunc_normal_=nn.init.trunc_normal_,
        )
        for name in ("timm", "timm.models"):
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules["timm.models.layers"] = layers
    spec = importlib.util.spec_from_file_location("published_vit", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.vit(None)
    network.load_state_dict(ours.state_dict())
    network.to(device).eval()  # its train() gives nothing back
    return network


# ---------------------------------------------------------------- tables


def backbone_speed(bench: Bench, model: Hmr2, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens of crops by precision, batch size and way of running."""
    calls: dict[str, tuple[Call, int]] = {}
    on_gpu = bench.device.type == "cuda"
    middle = args.batch_sizes[len(args.batch_sizes) // 2]
    for precision in args.precisions:
        dtype = REDUCED_DTYPES.get(precision)
        network = copy.deepcopy(model.backbone).to(dtype) if dtype else model.backbone
        for batch in args.batch_sizes:
            image = make_crops(batch, bench.device)[..., SIDE_MARGIN_PX:-SIDE_MARGIN_PX]
            image = image.to(dtype or torch.float32)
            name = f"{precision} {batch}"

            def run(network: Any = network, image: Tensor = image, p: str = precision) -> object:
                with tf32(p == "tf32"):
                    return network(image)

            calls[name] = run, batch
            if on_gpu and dtype and args.graphs:
                calls[f"{name} graph"] = graphed(network, image), batch
            if batch != middle:
                continue
            explicit = with_patch(run, Attention, explicit_attention)
            calls[f"{name} explicit attention"] = explicit, batch
            if on_gpu:
                backends = [SDPBackend.EFFICIENT_ATTENTION]
                backends += (
                    [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if dtype else []
                )
                for backend in backends:
                    calls[f"{name} {backend.name}"] = with_sdpa(run, backend), batch
            if dtype and args.compile:
                faster = copy.deepcopy(network)
                for block in faster.blocks:
                    block.compile(dynamic=False)
                calls[f"{name} compiled"] = (lambda n=faster, i=image: n(i)), batch
                if on_gpu and args.graphs:
                    calls[f"{name} compiled graph"] = graphed(faster, image), batch
    return bench.table(calls, share=True)


def model_speed(bench: Bench, model: Hmr2, args: argparse.Namespace) -> dict[str, Any]:
    """Crops on the device to bodies on the device, head and keypoints included."""
    calls: dict[str, tuple[Call, int]] = {}
    for precision in args.precisions:
        for batch in args.batch_sizes:
            crops = make_crops(batch, bench.device)

            def run(crops: Tensor = crops, precision: str = precision) -> object:
                model.precision = precision
                return model(crops)

            calls[f"{precision} {batch}"] = run, batch
    return bench.table(calls, share=True)


def head_speed(bench: Bench, model: Hmr2, args: argparse.Namespace) -> dict[str, Any]:
    """The float32 head alone, with and without keys and values."""
    batch = args.batch_sizes[-1]
    tokens = model.tokens(make_crops(batch, bench.device))

    def run() -> object:
        with tf32(False):
            return model.smpl_head(tokens)

    explicit = with_patch(run, CrossAttention, explicit_cross_attention)
    return bench.table(
        {"ours": (run, batch), "explicit keys and values": (explicit, batch)}, share=False
    )


def crop_speed(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Crops out of 1080p frames on the device, and whether they equal those of the CPU."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (4, 1080, 1920, 3), dtype=torch.uint8, generator=generator)
    calls: dict[str, tuple[Call, int]] = {}
    on_device = frames.to(bench.device)
    for batch in args.batch_sizes:
        place = make_squares(batch)
        calls[str(batch)] = (lambda place=place: crop_batch(on_device, *place)), batch
    figures = bench.table(calls, share=False)
    place = make_squares(16)
    same = torch.equal(crop_batch(frames, *place), crop_batch(on_device, *place).cpu())
    return {**figures, "equal_to_cpu": same}


def end_to_end_speed(bench: Bench, model: Hmr2, args: argparse.Namespace) -> dict[str, Any]:
    """Frames in memory and boxes to bodies in memory: copies, crops, network, results."""
    num_frames, people_per_frame = (2, 2) if bench.device.type == "cpu" else (32, 16)
    rng = np.random.default_rng(0)
    index = np.arange(num_frames)
    rgb = rng.integers(0, 256, (num_frames, 1080, 1920, 3), dtype=np.uint8)
    chunks = [FrameChunk(name, index, index, index / 25, rgb) for name in ("a", "b")]
    rows = np.repeat(index, people_per_frame)
    _, center, size = (part.numpy() for part in make_squares(len(rows)))
    half = np.stack([size * 0.375, size * 0.5], axis=-1)
    boxes = np.concatenate([center - half, center + half], axis=1).astype(np.float32)
    total = 2 * len(rows)
    calls: dict[str, tuple[Call, int]] = {}
    for batch in args.batch_sizes:
        reconstructor = Reconstructor(model, batch_size=batch, device=bench.device)
        calls[str(batch)] = (
            (lambda r=reconstructor: r.reconstruct(chunks, [(rows, boxes)] * 2)),
            total,
        )
    model.precision = "auto"
    return bench.table(calls, share=True)


def precision_errors(model: Hmr2, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Vertices against fp32 on the same device, in mm, and pixels of the crop."""
    crops = make_crops(8, device)
    results = {}
    for precision in dict.fromkeys(("fp32", *args.precisions)):
        model.precision = precision
        out = model(crops, with_vertices=True)
        results[precision] = out.vertices, out.keypoints_2d
    exact, exact_2d = results["fp32"]
    figures = {}
    for precision, (vertices, keypoints_2d) in results.items():
        distance = (vertices - exact).norm(dim=-1).flatten().double() * 1000
        pixels = (keypoints_2d - exact_2d).norm(dim=-1).flatten() * 256
        figures[precision] = {
            "mean_mm": float(distance.mean()),
            "p99_mm": float(distance.quantile(0.99)),
            "max_mm": float(distance.max()),
            "mean_px": float(pixels.mean()),
            "max_px": float(pixels.max()),
        }
    return {**figures, "fp16_overflows": model.num_overflows}


def companion_effects(
    model: Hmr2, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """How far the result of a crop follows its place in a batch and its companions."""
    batch = args.batch_sizes[min(1, len(args.batch_sizes) - 1)]
    crops = make_crops(batch, device)
    order = torch.arange(batch - 1, -1, -1, device=device)
    figures = {}
    for precision in args.precisions:
        model.precision = precision
        plain, turned = model(crops), model(crops[order])
        difference = (plain.body_pose - turned.body_pose[order]).abs()
        figures[precision] = {
            "batch": batch,
            "bit_identical": bool(torch.equal(plain.body_pose, turned.body_pose[order])),
            "max_abs": float(difference.max()),
        }
    return figures


def parity(device: torch.device) -> dict[str, Any]:
    """The tiny configuration on this device against the numbers of the published code."""
    golden = np.load(TESTS / "data" / "hmr2" / "network_tiny.npz")
    crop = torch.from_numpy(np.load(TESTS / "data" / "hmr2" / "crop_noise.npz")["crop"])[None]
    weights = recipe.weights(expected_shapes("tiny"), golden)
    model = build_hmr2(
        "tiny", load_body(), weights, origin="imported", device=device, precision="fp32"
    )
    output = model(crop.to(device))
    tokens = model.tokens(crop.to(device))
    found = {"tokens": tokens, "body_pose": output.body_pose, "pred_cam": output.pred_cam}
    return {
        name: float(np.abs(value.cpu().numpy() - golden[name]).max())
        for name, value in found.items()
    }


def published_speed(bench: Bench, model: Hmr2, args: argparse.Namespace) -> dict[str, Any]:
    """The published backbone beside ours: its precision and switches are PyTorch's defaults."""
    network = published_backbone(args.reference, model.backbone, bench.device)
    image = make_crops(2, bench.device)[..., SIDE_MARGIN_PX:-SIDE_MARGIN_PX]
    with tf32(False):
        theirs = network(image).flatten(2).transpose(1, 2)
        difference = float((theirs - model.backbone(image)).abs().max())
    calls: dict[str, tuple[Call, int]] = {}
    model.precision = "auto"
    for batch in dict.fromkeys((1, *args.batch_sizes)):
        crops = make_crops(batch, bench.device)

        def run(crops: Tensor = crops) -> object:
            return network(crops[..., SIDE_MARGIN_PX:-SIDE_MARGIN_PX])

        calls[f"published {batch}"] = run, batch
        calls[f"ours {batch}"] = (lambda crops=crops: model.tokens(crops)), batch
    return {**bench.table(calls, share=True), "max_difference_of_tokens": difference}


# ---------------------------------------------------------------- inputs


def make_crops(num: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randn(num, 3, 256, 256, generator=generator).to(device)


def make_squares(num: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num)
    row = torch.randint(0, 4, (num,), generator=generator)
    center = torch.rand(num, 2, generator=generator) * torch.tensor([1920.0, 1080.0])
    return row, center, torch.rand(num, generator=generator) * 600 + 100


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def make_model(args: argparse.Namespace, device: torch.device) -> Hmr2:
    body = load_body()
    if args.checkpoint:
        return load_hmr2(args.checkpoint, body, device=device)
    means = np.load(TESTS / "data" / "hmr2" / "network_tiny.npz")
    weights = recipe.weights(expected_shapes(args.size), means)
    return build_hmr2(args.size, body, weights, origin="untrained", device=device)


def machine(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "-C", str(TESTS), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "commit": commit or "unknown",
    }


def report(section: str, figures: dict[str, Any]) -> None:
    print(f"\n{section}")
    for name, figure in figures.items():
        if isinstance(figure, dict):
            figure = "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in figure.items()
                if key != "spread"
            )
        print(f"  {name:42} {figure}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="vit_h", choices=list(HMR2_SIZES))
    parser.add_argument("--checkpoint", type=Path, help="real weights, for meaningful errors")
    parser.add_argument("--reference", type=Path, help="checkout of the published code")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument(
        "--precisions",
        nargs="+",
        default=["fp32", "tf32", "bf16", "fp16"],
        choices=["fp32", "tf32", "bf16", "fp16"],
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="at least so long per timing")
    parser.add_argument("--peak-tflops", type=float, default=PEAK_TFLOPS)
    parser.add_argument("--only", nargs="+", help="names of sections")
    parser.add_argument("--json", type=Path, help="write all figures here as well")
    args = parser.parse_args(arguments)

    device = torch.device(args.device)
    if device.type == "cpu":
        args.precisions = [p for p in args.precisions if p != "tf32"]
    bench = Bench(
        device, args.rounds, args.seconds, args.peak_tflops, PUBLISHED_FLOP.get(args.size, 0.0)
    )
    model = make_model(args, device)
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "parity": lambda: parity(device),
        "precision errors": lambda: precision_errors(model, args, device),
        "companion effects": lambda: companion_effects(model, args, device),
        "crops": lambda: crop_speed(bench, args),
        "head": lambda: head_speed(bench, model, args),
        "model": lambda: model_speed(bench, model, args),
        "end to end": lambda: end_to_end_speed(bench, model, args),
        "backbone": lambda: backbone_speed(bench, model, args),
    }
    if args.reference:
        sections["published"] = lambda: published_speed(bench, model, args)
    figures: dict[str, Any] = {"machine": machine(device), "size": args.size}
    report("machine", figures["machine"])
    for name, section in sections.items():
        if args.only and name not in args.only:
            continue
        try:
            with torch.inference_mode():
                figures[name] = section()
        except RuntimeError as error:  # the other sections are worth having
            figures[name] = {"failed": str(error)}
        report(name, figures[name])
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
