from __future__ import annotations

from pathlib import Path

import pytest

from tests.media import BoxCorpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> BoxCorpus:
    """Five clips with a hostile name, a cut, an empty one and one frame, and two broken files."""
    corpus = BoxCorpus(tmp_path_factory.mktemp("corpus with spaces"))
    corpus.add("two.mp4", num_frames=40, seed=1)
    corpus.add("deep er/ünï & #1.mkv", num_frames=33, num_people=3, seed=2)
    corpus.add("cut.mp4", num_frames=40, seed=3, cut_at=20)
    corpus.add("nobody.mp4", num_frames=20, num_people=0)
    corpus.add("one_frame.mp4", num_frames=1, seed=4, miss=0.0)
    (corpus.folder / "empty.mp4").touch()
    whole = (corpus.folder / "two.mp4").read_bytes()
    Path(corpus.folder / "cut_short.mp4").write_bytes(whole[: len(whole) // 2])
    return corpus
