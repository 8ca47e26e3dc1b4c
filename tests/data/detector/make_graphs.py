"""Write the two tiny ONNX graphs of the detector tests; needs the `onnx` package (1.23 was used).

Both find what is blue, in the input and output layout of a real family, so that colour order,
letterbox, decoding and batches can be tested to the pixel:

`rtmdet_layout.onnx`  normalised BGR, any size and batch. One rectangle round all blue pixels with
    score 0.9, its upper half with 0.3, and a row of zeros.
`yolox_layout.onnx`   BGR 0 to 255, 1 x 3 x 64 x 64. Objectness of a cell of stride 8 is the blue
    part of its pixels, person 0.95, class 1 scores 1 everywhere; boxes are 16 px around the
    centres of the cells. Cells of strides 16 and 32 are empty.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).parent


class Graph:
    """Nodes and constants in the order they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def add(self, op: str, *inputs: str, to: str | None = None, **attributes: object) -> str:
        name = to or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def channel(self, image: str, index: int) -> str:
        return self.add("Gather", image, self.constant(index, np.int64), axis=1)

    def save(self, name: str, inputs: list, outputs: list) -> None:
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, FOLDER / f"{name}.onnx")


def rtmdet_layout() -> None:
    g = Graph()
    is_blue = g.add("Greater", g.channel("input", 0), g.constant(2.0))
    not_red = g.add("Less", g.channel("input", 2), g.constant(-1.5))
    blue = g.add("And", is_blue, not_red)
    g.nodes.append(helper.make_node("Cast", [blue], ["blue"], to=TensorProto.FLOAT))  # (B, H, W)
    one = g.constant(1.0)

    def extent(over: int, size_axis: int) -> tuple[str, str]:
        """First and one past the last blue pixel along an axis."""
        profile = g.add("ReduceMax", "blue", axes=[over], keepdims=0)
        shape = g.add("Shape", "input")
        size = g.add("Gather", shape, g.constant(size_axis, np.int64), axis=0)
        size_float = f"size{size_axis}"
        g.nodes.append(helper.make_node("Cast", [size], [size_float], to=TensorProto.FLOAT))
        place = g.add("Range", g.constant(0.0), size_float, one)
        last = g.add("Mul", profile, g.add("Add", place, one))
        first = g.add("Mul", profile, g.add("Sub", size_float, place))
        high = g.add("ReduceMax", last, axes=[1], keepdims=1)
        low = g.add("Sub", size_float, g.add("ReduceMax", first, axes=[1], keepdims=1))
        return low, high

    x1, x2 = extent(1, 3)
    y1, y2 = extent(2, 2)
    found = g.add("ReduceMax", "blue", axes=[1, 2], keepdims=0)
    found = g.add("Unsqueeze", found, g.constant([1], np.int64))
    half = g.add("Mul", g.add("Add", y1, y2), g.constant(0.5))
    best = g.add("Concat", x1, y1, x2, y2, g.add("Mul", found, g.constant(0.9)), axis=1)
    other = g.add("Concat", x1, y1, x2, half, g.add("Mul", found, g.constant(0.3)), axis=1)
    rows = [best, other, g.add("Mul", best, g.constant(0.0))]
    axis = g.constant([1], np.int64)
    g.add("Concat", *(g.add("Unsqueeze", row, axis) for row in rows), axis=1, to="dets")
    scores = g.add("Gather", "dets", g.constant(4, np.int64), axis=2)
    zeros = g.add("Mul", scores, g.constant(0.0))
    g.nodes.append(helper.make_node("Cast", [zeros], ["labels"], to=TensorProto.INT64))
    g.save(
        "rtmdet_layout",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, "h", "w"])],
        [
            helper.make_tensor_value_info("dets", TensorProto.FLOAT, ["batch", 3, 5]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch", 3]),
        ],
    )


def yolox_layout() -> None:
    g = Graph()
    others = g.add("Add", g.channel("images", 1), g.channel("images", 2))
    blue = g.add("Sub", g.channel("images", 0), others)
    blue = g.add("Clip", blue, g.constant(0.0), g.constant(255.0))
    blue = g.add("Div", blue, g.constant(255.0))
    blue = g.add("Unsqueeze", blue, g.constant([1], np.int64))
    pooled = g.add("AveragePool", blue, kernel_shape=[8, 8], strides=[8, 8])
    near = g.add("Reshape", pooled, g.constant([1, 64, 1], np.int64))
    objectness = g.add("Concat", near, g.constant(np.zeros((1, 20, 1))), axis=1)
    box = np.tile([0.5, 0.5, math.log(2), math.log(2)], (1, 84, 1))
    classes = np.zeros((1, 84, 80))
    classes[..., 0], classes[..., 1] = 0.95, 1.0
    g.add("Concat", g.constant(box), objectness, g.constant(classes), axis=2, to="output")
    g.save(
        "yolox_layout",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 84, 85])],
    )


def other_layout() -> None:
    """A graph that is no detector."""
    g = Graph()
    g.add("ReduceMean", "image", axes=[2, 3], keepdims=0, to="mean")
    g.save(
        "other_layout",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("mean", TensorProto.FLOAT, [1, 3])],
    )


if __name__ == "__main__":
    rtmdet_layout()
    yolox_layout()
    other_layout()
