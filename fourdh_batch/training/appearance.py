"""The texture encoder as a task of the training loop: a whole outfit from a part of its map.

As in HMAR and PHALP the encoder is the first half of an auto-encoder of texture maps. Two things
are ours, for what the tracker does with it: the decoder has to tell the *whole* outfit in even
light, so that two views of one outfit mean the same; and beside it, looks at one outfit have to be
nearer to each other than to a look at another one (`agreement`).

The cost of the tracker has a fixed place for the distance (docs/PHALP.md, section 8), and training
leaves it anywhere. So the last layer is scaled when the weights are written: the median distance
of two different outfits at full size, both cut to what both views show, becomes
`TYPICAL_DISTANCE`.

Dimension letters: `B` examples, `S` side of a map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from fourdh_batch.config import LoopConfig, TrainAppearanceConfig
from fourdh_batch.errors import TrainingError
from fourdh_batch.models.appearance import (
    LAYERS,
    NUM_POOLED,
    TextureEncoder,
    embedding_distance,
    save_texture_encoder,
    untrained_texture_encoder,
)
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.models.texture import ATLAS_PX, RGB_SCALE, STD_RGB
from fourdh_batch.training.looks import AGAIN, FIRST, OTHER, Looks, OutfitLooks, collate_looks
from fourdh_batch.training.loop import Examples, seed_of, update
from fourdh_batch.types import F64

WEIGHTS_NAME = "appearance.safetensors"
# In the recorded sequences of the published tracker (random weights) it is 0.6. A third of that is
# what small models can be trusted with: bodies that are off take their colours from elsewhere.
TYPICAL_DISTANCE = 0.2
CALIBRATION_EXAMPLES = 64
CALIBRATION_VIEWS = 48
MEAN_EXAMPLES = 64  # of which the decoder takes the map that it counts from
FILLED_SHARE = 0.25  # of the training examples; see `looks.OutfitLooks`
HELD_OUT_VIEWS = 96
FIRST_ANSWER = 0.01  # size of what the first decoder adds to the mean map
_TRAINING, _HELD_OUT, _CALIBRATION = range(3)  # what a seed is for


class TextureDecoder(nn.Module):
    """The encoder's layers backwards, from an embedding to a whole map; for training only.

    Convolutions stand before the enlargements, where they cost a quarter.

    Args:
        mean: (3, S, S) the map that answers are counted from.
    """

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        channels = [num_out for _, _, num_out in reversed(LAYERS)] + [3]
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels)]
        with torch.no_grad():  # gradients of full size, and answers near the mean at first
            for layer in layers:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                layer.bias.zero_()  # type: ignore[union-attr]
            layers[-1].weight *= FIRST_ANSWER
        self.layers = nn.ModuleList(layers)

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, E) to (B, 3, S, S) normalised RGB."""
        side = self.mean.shape[-1] >> NUM_POOLED
        x = embedding.view(len(embedding), -1, side, side)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.layers) - 1:
                x = F.relu(x)
            if i >= len(self.layers) - NUM_POOLED:
                x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return x + self.mean


class _Coded(nn.Module):
    """Embeddings of looks, and the outfits told from them; one call for DDP to watch."""

    def __init__(self, encoder: TextureEncoder, decoder: TextureDecoder, precision: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self._precision = precision

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 4, S, S) to (B, 3, E) and (B, 3, 3, S, S)."""
        with torch.autocast(maps.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            embedding = self.encoder(maps.flatten(0, 1))
            told = self.decoder(embedding)
        num = len(maps)
        return embedding.float().unflatten(0, (num, 3)), told.float().unflatten(0, (num, 3))


class AppearanceTask:
    """See `loop.Task`.

    Args:
        encoder, decoder: with their first weights, on the device of the training.
        on_body: (S, S) 1 at texels that lie on the body; no others are asked for.
        agreement: weight of telling outfits apart.
        loop: settings.
        examples, held_out: of `Looks`.
        num_held_out: examples of each held-out set.
        full_size: `Looks` of 256 px; by `num_calibration` of them the last layer is scaled.
    """

    weights_name = WEIGHTS_NAME

    def __init__(
        self,
        encoder: TextureEncoder,
        decoder: TextureDecoder,
        *,
        on_body: Tensor,
        agreement: float,
        loop: LoopConfig,
        examples: Examples,
        held_out: Mapping[str, Examples],
        num_held_out: int,
        full_size: Examples,
    ) -> None:
        self._first = copy.deepcopy(encoder).requires_grad_(False)
        self._encoder = encoder.requires_grad_(True)
        self._decoder = decoder
        self._device = encoder.device
        self._on_body = on_body.to(self._device)
        self._agreement = agreement
        self._loop = loop
        self._coded: nn.Module = _Coded(encoder, decoder, loop.precision)
        self._trained = [*encoder.parameters(), *decoder.parameters()]
        self.modules: Mapping[str, nn.Module] = {"encoder": encoder, "decoder": decoder}
        self.optimizers: Mapping[str, Optimizer] = {
            "both": AdamW(self._trained, lr=loop.learning_rate, weight_decay=loop.weight_decay)
        }
        self.examples = examples
        self.held_out = held_out
        self.num_held_out = num_held_out
        self.full_size = full_size
        self.num_calibration = CALIBRATION_EXAMPLES
        self.metadata = {"origin": "trained"}

    def collate(self, examples: Sequence[Looks]) -> Looks:
        """Examples side by side."""
        return collate_looks(examples)

    def distribute(self) -> None:
        """See `loop.Task`."""
        self._coded = DistributedDataParallel(self._coded)

    def step(self, batch: Looks) -> dict[str, Tensor]:
        """See `loop.Task`."""
        embedding, told = self._coded(batch.maps.to(self._device))
        map_loss = self._map_error(told, batch.whole.to(self._device)).mean()
        same, different = (
            (embedding[:, AGAIN] - embedding[:, i]).square().sum(dim=1) for i in (FIRST, OTHER)
        )
        # 0 where looks at one outfit are alike, 1/2 where they are no nearer than two outfits;
        # whatever the scale, which is found at the end.
        apart_loss = (same / (same + different).clamp(min=1e-9)).mean()
        loss = map_loss + self._agreement * apart_loss
        norm = update(self.optimizers["both"], loss, self._trained, self._loop.clip_norm)
        return {
            "loss": loss.detach(),
            "loss_map": map_loss.detach(),
            "loss_agreement": apart_loss.detach(),
            "gradient_norm": norm,
        }

    def evaluate(self, batches: Iterable[Looks]) -> dict[str, float]:
        """See `loop.Task`: error of the told maps in grey levels beside that of the mean map, and
        how well distances tell same from different (area under the curve, 0.5 is chance): of the
        encoder, of its first weights, and of the mean difference of the colours."""
        model = _Coded(self._encoder, self._decoder, self._loop.precision)
        levels = RGB_SCALE * float(np.mean(STD_RGB))
        errors: dict[str, list[F64]] = {"": [], "_of_mean_map": []}
        pairs: dict[str, list[F64]] = {"": [], "_untrained": [], "_of_colours": []}
        for batch in batches:
            maps, whole = batch.maps.to(self._device), batch.whole.to(self._device)
            embedding, told = model(maps)
            mean = self._decoder.mean.expand_as(told)
            for name, guess in (("", told), ("_of_mean_map", mean)):
                errors[name].append(_numpy(self._map_error(guess, whole)) * levels)
            before = self._first(maps.flatten(0, 1)).unflatten(0, (len(maps), 3))
            for name, vectors in (("", embedding), ("_untrained", before)):
                found = [embedding_distance(vectors[:, AGAIN], vectors[:, i]) for i in _PAIRS]
                pairs[name].append(_numpy(torch.stack(found)))
            off = (maps[:, _PAIRS, :3] - maps[:, AGAIN, None, :3]).abs().sum(dim=(2, 3, 4))
            pairs["_of_colours"].append(_numpy((off / maps[:, _PAIRS, 3].sum(dim=(2, 3))).T))
        figures = {
            f"map_error_levels{name}": float(np.concatenate(e).mean()) for name, e in errors.items()
        }
        for name, parts in pairs.items():
            same, different = np.concatenate(parts, axis=1)
            figures[f"auc{name}"] = area_under_curve(same, different)
            if name != "_of_colours":
                figures[f"same_over_different{name}"] = float(
                    np.median(same) / np.median(different)
                )
        return figures

    def save(self, path: Path) -> str:
        """See `loop.Task`; the last layer is scaled, see above.

        Raises:
            TrainingError: all outfits look alike to the encoder.
        """
        encoder = copy.deepcopy(self._encoder).requires_grad_(False)
        encoder.weights_origin = "trained"
        typical = float(np.median(distances(encoder, self.full_size, self.num_calibration)[1]))
        if not typical > 0:
            raise TrainingError(
                f"expected outfits that look different, got a distance of {typical}"
            )
        last = encoder.get_submodule(LAYERS[-1][0])
        for parameter in last.parameters():
            parameter.mul_((TYPICAL_DISTANCE / typical) ** 0.5)
        return save_texture_encoder(encoder, path)

    def _map_error(self, told: Tensor, whole: Tensor) -> Tensor:
        """(B,) mean absolute error on the body of (B, 3, 3, S, S) against (B, 2, 3, S, S)."""
        off = (told - whole[:, _OUTFIT_OF_LOOK]).abs() * self._on_body
        return off.sum(dim=(1, 2, 3, 4)) / (9 * self._on_body.sum())


_PAIRS = [FIRST, OTHER]  # what `AGAIN` is compared with: the same outfit, a different one
_OUTFIT_OF_LOOK = [0, 0, 1]


def distances(encoder: TextureEncoder, examples: Examples, num: int) -> F64:
    """(2, num) distances of the first examples: of one outfit's looks, and of two outfits'."""
    found = []
    for number in range(num):
        embedding = encoder.embed(examples[number].maps)
        found.append(embedding_distance(embedding[[AGAIN, AGAIN]], embedding[_PAIRS]).tolist())
    return np.array(found).T


def area_under_curve(same: F64, different: F64) -> float:
    """Share of the pairs (one of each) of which the same outfit's distance is the smaller."""
    less = (same[:, None] < different).mean() + (same[:, None] == different).mean() / 2
    return float(less)


def build_appearance_task(
    config: TrainAppearanceConfig, device: str | torch.device = "auto"
) -> AppearanceTask:
    """The texture encoder with its first weights and its outfits.

    Raises:
        CheckpointError: the body does not fit, or has no texture coordinates.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    seed, body = config.loop.seed, load_body(config.body or None)
    examples = _looks(body, seed, _TRAINING, config.map_px, config.num_views, FILLED_SHARE)
    held_out = _looks(body, seed, _HELD_OUT, config.map_px, HELD_OUT_VIEWS)
    studio = examples.studio
    rng = np.random.default_rng((seed, _TRAINING))
    mean = torch.stack([studio.whole(studio.colours(rng)) for _ in range(MEAN_EXAMPLES)]).mean(0)
    on_body = torch.zeros(config.map_px**2)
    on_body[studio.texel] = 1
    torch.manual_seed(seed_of(seed, _TRAINING))  # of the decoder's first weights
    return AppearanceTask(
        untrained_texture_encoder(seed, device=device).train(),
        TextureDecoder(mean).to(device=device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        on_body=on_body.view(config.map_px, config.map_px),
        agreement=config.agreement,
        loop=config.loop,
        examples=examples,
        held_out={"outfits": held_out},
        num_held_out=config.held_out_examples,
        full_size=_looks(body, seed, _CALIBRATION, ATLAS_PX, CALIBRATION_VIEWS),
    )


def _looks(
    body: SmplBody, seed: int, use: int, map_px: int, num_views: int, filled_share: float = 0.0
) -> OutfitLooks:
    return OutfitLooks(
        body,
        seed=seed_of(seed, use),
        map_px=map_px,
        num_views=num_views,
        filled_share=filled_share,
    )


def _numpy(tensor: Tensor) -> F64:
    array: F64 = tensor.double().cpu().numpy()
    return array
