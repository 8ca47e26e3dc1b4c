"""Mixed sources of labelled people, as numbered training examples.

Which source a number draws from, which of its people, and how the picture is changed follow from
(seed, number) alone: any process can make any example, and a training can be resumed anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fourdh_batch.config import AugmentConfig
from fourdh_batch.geometry import CROP_PX
from fourdh_batch.training.augment import UNCHANGED, draw_changes, make_example
from fourdh_batch.training.examples import Example, Person
from fourdh_batch.types import I64

CYCLE = 1000  # numbers among which every source has exactly its share
_SHUFFLE, _CHANGE = 1, 2  # what a random generator is for


class PeopleSource(Protocol):
    """Numbered people; each follows from its number alone, in any process.

    Consecutive numbers should be cheap together: a batch asks for a run of them.
    """

    def person(self, number: int) -> Person:
        """The person of any number from 0 on."""


class MixedExamples:
    """Examples of several sources.

    Args:
        sources: of people; each is asked for 0, 1, 2, ... as the numbers of examples rise.
        weights: shares, relative to each other; rounded to 1 / `CYCLE`.
        seed: of the mixture and of the changes.
        augment: random changes; None: none, for evaluation.
        crop_px: side of the crops.
    """

    def __init__(
        self,
        sources: Sequence[PeopleSource],
        weights: Sequence[float],
        *,
        seed: int,
        augment: AugmentConfig | None,
        crop_px: int = CROP_PX,
    ) -> None:
        self._sources = list(sources)
        self._counts = _shares(weights)
        self._seed = seed
        self._augment = augment
        self._crop_px = crop_px
        self._cycle: tuple[int, I64, I64] | None = None

    def place(self, number: int) -> tuple[int, int]:
        """Source of an example, and its number there."""
        cycle, at = divmod(number, CYCLE)
        if self._cycle is None or self._cycle[0] != cycle:
            order = np.repeat(np.arange(len(self._counts)), self._counts)
            np.random.default_rng((self._seed, _SHUFFLE, cycle)).shuffle(order)
            before = np.zeros(CYCLE, dtype=np.int64)
            for source in range(len(self._counts)):
                mine = order == source
                before[mine] = np.arange(mine.sum())
            self._cycle = cycle, order, before
        _, order, before = self._cycle
        source = int(order[at])
        return source, cycle * int(self._counts[source]) + int(before[at])

    def __getitem__(self, number: int) -> Example:
        source, own = self.place(number)
        person = self._sources[source].person(own)
        if self._augment is None:
            return make_example(person, UNCHANGED, crop_px=self._crop_px)
        random = np.random.default_rng((self._seed, _CHANGE, number))
        return make_example(person, draw_changes(random, self._augment), crop_px=self._crop_px)


def _shares(weights: Sequence[float]) -> I64:
    """Whole numbers that add up to `CYCLE`, each at least 1: largest remainders first."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * CYCLE
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = CYCLE - int(counts.sum())
    order = np.argsort(-(exact - counts), kind="stable")
    if missing >= 0:
        counts[order[:missing]] += 1
    else:
        for _ in range(-missing):
            counts[counts.argmax()] -= 1
    return counts
