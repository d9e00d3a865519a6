"""Small models in ONNX format, made without PyTorch."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WEIGHT: NDArray[np.float32] = np.random.default_rng(0).normal(size=(64, 10)).astype("f4")
Shape = list[int | str]


def save_model(
    path: str,
    shape: Shape | None = None,
    dtype: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("dense/BiasAdd:0",),
    inputs: int = 1,
    weight: NDArray[np.float32] = WEIGHT,
) -> None:
    """Save a model: the sum of the channels of 8 x 8 pixels, `/pool.1/Sum`, times a matrix, `dense/BiasAdd:0`."""
    shape = ["N", 1, 8, 8] if shape is None else shape
    channel_axis = 1 if len(shape) == 4 and shape[1] in (1, 3) else len(shape) - 1
    nodes = [
        helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["axes"], value=numpy_helper.from_array(np.array([channel_axis]))),
        helper.make_node("ReduceSum", ["cast", "axes"], ["/pool.1/Sum"], keepdims=0),
        helper.make_node("Flatten", ["/pool.1/Sum"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["dense/BiasAdd:0"]),
        helper.make_node("Softmax", ["dense/BiasAdd:0"], ["softmax"]),
        helper.make_node("ArgMax", ["softmax"], ["label"], axis=1, keepdims=0),
    ]
    names = ["images", "mask"][:inputs]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, dtype, shape) for name in names],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    Path(path).write_bytes(model.SerializeToString())
