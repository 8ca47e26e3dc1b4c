"""Files of weights of every part: telling them apart, turning published ones into ours, checking.

Parts: ``hmr2`` is HMR 2.0, ``texture`` the texture encoder and ``predictor`` the pose predictor of
PHALP'.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.models import appearance, build, build_phalp
from fourdh_batch.models.checkpoint import MAX_LISTED, read_checkpoint, read_safetensors_metadata
from fourdh_batch.models.minis import MINI

HMR2, TEXTURE, PREDICTOR = "hmr2", "texture", "predictor"
PARTS = (HMR2, TEXTURE, PREDICTOR)


def part_of(path: str | Path) -> str:
    """Which part a file of weights is for, by what is in it.

    Returns:
        One of `PARTS`. What is like no other is ``hmr2``, whose readers list what they miss.

    Raises:
        CheckpointError: the file is missing, damaged, refers to code, or holds no weights.
    """
    if Path(path).suffix == ".safetensors":
        metadata = read_safetensors_metadata(path)
        if metadata.get("format", "").split(" ")[0] == build_phalp.FORMAT.split(" ")[0]:
            return PREDICTOR
        return TEXTURE if metadata.get("kind") == appearance.KIND else HMR2
    content = read_checkpoint(path)
    state = content.get("state_dict")
    if isinstance(state, Mapping):
        names = [name for name in state if isinstance(name, str)]
        has_hmr2 = any(name.startswith(build.PARTS) for name in names)
        has_predictor = any(name.startswith(build_phalp.PREFIX) for name in names)
        return PREDICTOR if has_predictor and not has_hmr2 else HMR2
    if isinstance(content.get(appearance.PUBLISHED_ENTRY), Mapping):
        return TEXTURE
    raise CheckpointError(
        f"{path}: expected an entry 'state_dict' (HMR 2.0, pose predictor) or "
        f"{appearance.PUBLISHED_ENTRY!r} (texture encoder), got {list(content)[:MAX_LISTED]}"
    )


def import_weights(
    source: str | Path,
    target: str | Path,
    *,
    part: str | None = None,
    config: str | Path | None = None,
    mean_std: str | Path | None = None,
) -> str:
    """Turn a published file into safetensors, once, so that no pickle is read again.

    Args:
        source: `epoch=35-step=1000000.ckpt`, `hmar_v2_weights.pth` or `pose_predictor.pth`.
        target: the ``.safetensors`` to write.
        part: one of `PARTS`; None: see `part_of`.
        config, mean_std: of the pose predictor, see `build_phalp.import_pose_predictor`.

    Returns:
        The part that it was.

    Raises:
        ConfigError: the arguments do not fit each other.
        CheckpointError: a file is missing, damaged, refers to code, or does not fit.
    """
    part = _checked(part) or part_of(source)
    if Path(target).suffix != ".safetensors":
        raise ConfigError(f"target {target}: expected a name that ends in .safetensors")
    if part == PREDICTOR:
        build_phalp.import_pose_predictor(source, target, config=config, mean_std=mean_std)
        return part
    if config or mean_std:
        raise ConfigError(
            f"{source}: expected a YAML and a mean only with a pose predictor, got part {part!r}"
        )
    if part == TEXTURE:
        appearance.import_texture_encoder(source, target)
    else:
        build.convert_official_checkpoint(source, target)
    return part


def check_weights(path: str | Path, *, part: str | None = None) -> str:
    """One line about a file of weights that fits: part, origin, tensors, numbers, digest.

    Args:
        path: published, or ours; the word ``mini``, of which the part must be named.
        part: one of `PARTS`; None: see `part_of`.

    Raises:
        ConfigError: there is no such part, or several.
        CheckpointError: a file is missing, damaged, refers to code, or does not fit.
    """
    if str(path) == MINI and part is None:
        raise ConfigError(f"{path}: expected one of the parts {PARTS}, got none")
    part = _checked(part) or part_of(path)
    if part == HMR2:
        return build.check_checkpoint(path)
    if part == TEXTURE:
        encoder = appearance.load_texture_encoder(path)
        name, origin, digest = "texture encoder", encoder.weights_origin, encoder.weights_digest
        state = encoder.state_dict()
    else:
        predictor = build_phalp.load_pose_predictor(path)
        name, origin = f"pose predictor, {predictor.network.size}", predictor.weights_origin
        digest = predictor.weights_digest
        state = predictor.network.state_dict()
    num_numbers = sum(tensor.numel() for tensor in state.values())
    return (
        f"{path}: {name}, {origin} weights, {len(state)} tensors, {num_numbers:,} numbers, "
        f"digest {digest}"
    )


def _checked(part: str | None) -> str | None:
    if part is not None and part not in PARTS:
        raise ConfigError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    return part
