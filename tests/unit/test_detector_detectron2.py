"""Without Detectron2 its detectors say how to get it."""

from __future__ import annotations

import sys

import pytest

from fourdh_batch.errors import CheckpointError, ConfigError
from fourdh_batch.models.detector import build_detector
from fourdh_batch.models.detector_detectron2 import _state


@pytest.mark.parametrize("name", ["detectron2_vitdet_h", "detectron2_mask_rcnn"])
def test_without_the_package_the_error_says_how_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ConfigError, match=rf"'{name}' needs Detectron2.*pip install"):
        build_detector(name, path="model.pth")


def test_weights_that_are_no_tensors_by_name_are_refused() -> None:
    import io

    import torch

    file = io.BytesIO()
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="expected tensors by name, got list"):
        _state(file.getvalue(), "model.pth")
