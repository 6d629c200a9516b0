"""
Matrix products in the one form of which runtimes have integer kernels with a bias: Gemm, all of whose factors are 1.

ONNX Runtime makes a Gemm of a MatMul and the Add of a constant behind it before it looks for Q/DQ pairs, and finds none
then that it knows: the product would run in float in spite of them. So it is done before anything is placed, as
onnxslim does it in our own exports. Needs the package onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, Set

import numpy as np

from deploy.graphs.graph import constants, consumers, producers, remove_unused
from deploy.graphs.products import attribute

if TYPE_CHECKING:
    import onnx


def write_gemms(model: onnx.ModelProto) -> str:
    """Rewrites what it can, in place; a sentence on that, or nothing. Results keep their names and values."""
    rewriter = _Rewriter(model)
    number = rewriter.join_biases()
    rewriter.fold_factors()
    if not number:
        return ""
    remove_unused(model)
    del model.graph.value_info[:]
    return f"{number} MatMul and the Add behind each are made a Gemm, as ONNX Runtime has integer kernels for it"


class _Rewriter:
    """The tables of a graph, and what is changed of it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.model, self.graph = model, model.graph
        self.made_by, self.read_by = producers(model), consumers(model)
        self.arrays: Dict[str, np.ndarray] = {
            name: numpy_helper.to_array(tensor) for name, tensor in constants(model).items()
        }
        self.outputs = {value.name for value in model.graph.output}
        self.rows: Set[str] = set()
        """Tensors that are matrices of others with more dimensions."""

    def join_biases(self) -> int:
        """Makes each MatMul by a constant matrix a Gemm with the constant that is added behind it; how many."""
        shapes = self._shapes()
        gemms: Dict[str, List[onnx.NodeProto]] = {}  # output of an Add -> what takes its place
        gone: Set[str] = set()
        for add in self.graph.node:
            index = next((i for i, name in enumerate(add.input) if self._is_free_product(name)), None)
            if add.op_type != "Add" or index is None:
                continue
            product, bias = self.made_by[add.input[index]], self.arrays.get(add.input[1 - index])
            width, sizes = self.arrays[product.input[1]].shape[1], shapes.get(product.input[0], [])
            if bias is None or bias.dtype != np.float32 or bias.size != width or not 1 <= bias.ndim <= len(sizes):
                continue
            if bias.shape[-1] == width:
                gone.add(product.output[0])
                gemms[add.output[0]] = self._gemm(product, bias.reshape(-1), add, sizes)
        kept = [node for node in self.graph.node if node.output[0] not in gone]
        nodes = [new for node in kept for new in gemms.get(node.output[0], [node])]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        return len(gemms)

    def _is_free_product(self, name: str) -> bool:
        """Whether a tensor is a MatMul by a constant matrix, and read by one node alone."""
        node = self.made_by.get(name)
        return (
            node is not None
            and node.op_type == "MatMul"
            and name not in self.outputs
            and len(self.read_by[name]) == 1
            and node.input[0] not in self.arrays
            and self.arrays.get(node.input[1], np.zeros(0)).ndim == 2
            and self.arrays[node.input[1]].dtype == np.float32
        )

    def _shapes(self) -> Dict[str, List[int]]:
        """Tensor -> its sizes, -1 where open, of those with at most one open size."""
        from onnx import shape_inference

        graph = shape_inference.infer_shapes(self.model, data_prop=True).graph
        shapes = {}
        for value in (*graph.value_info, *graph.input):
            if value.type.tensor_type.HasField("shape"):
                sizes = [size.dim_value or -1 for size in value.type.tensor_type.shape.dim]
                if sizes[:-1].count(-1) <= 1 and len(sizes) > 1:
                    shapes[value.name] = sizes
        return shapes

    def _gemm(
        self, product: onnx.NodeProto, bias: np.ndarray, add: onnx.NodeProto, sizes: List[int]
    ) -> List[onnx.NodeProto]:
        """The nodes in place of a MatMul and an Add: a Gemm, of rows where there are more dimensions than two."""
        from onnx import helper

        weight, output = product.input[1], add.output[0]
        inputs = [product.input[0], weight, self._constant(f"{output}/bias", bias)]
        if len(sizes) == 2:
            return [helper.make_node("Gemm", inputs, [output], name=product.name)]
        inner, width = self.arrays[weight].shape
        rows, before = f"{inputs[0]}/as_rows", []
        if rows not in self.rows:  # one for all products that read it, and then one pair
            self.rows.add(rows)
            shape = self._constant(f"{rows}/shape", np.array([-1, inner], np.int64))
            before = [helper.make_node("Reshape", [inputs[0], shape], [rows], name=rows)]
        shape = self._constant(f"{output}/shape", np.array([*sizes[:-1], width], np.int64))
        return [
            *before,
            helper.make_node("Gemm", [rows, *inputs[1:]], [f"{output}/product"], name=product.name),
            helper.make_node("Reshape", [f"{output}/product", shape], [output], name=f"{output}/as_before"),
        ]

    def fold_factors(self) -> None:
        """Puts alpha and beta of each Gemm into its constants, and its bias into the form (output channels,)."""
        for node in self.graph.node:
            if node.op_type != "Gemm":
                continue
            bias = self.arrays.get(node.input[2]) if len(node.input) > 2 else None
            for index, name, values in ((1, "alpha", self.arrays.get(node.input[1])), (2, "beta", bias)):
                factor = attribute(node, name, 1.0)
                if factor != 1 and values is not None and values.dtype == np.float32:
                    node.input[index] = self._constant(f"{node.output[0]}/times_{name}", values * np.float32(factor))
                    next(entry for entry in node.attribute if entry.name == name).f = 1.0
            weight = self.arrays.get(node.input[1])
            if bias is not None and weight is not None and bias.ndim != 1 and bias.shape[:-1] in ((), (1,)):
                width = weight.shape[0 if attribute(node, "transB") else 1]
                vector = np.broadcast_to(self.arrays[node.input[2]].reshape(-1), width)
                node.input[2] = self._constant(f"{node.output[0]}/bias_vector", vector)

    def _constant(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        while name in self.arrays or name in self.made_by:
            name += "_"
        self.arrays[name] = np.ascontiguousarray(values)
        self.graph.initializer.append(numpy_helper.from_array(self.arrays[name], name))
        return name
