"""Feed-forward ONNX files as torch modules: the operators of published verification networks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlearn.errors import InputError

Inputs = list[Tensor]
Options = dict[str, Any]


class OnnxNetwork(nn.Module):
    """An ONNX graph; the first dimension of its input is the batch.

    Attributes
    ----------
    shape : of one sample, as the file states it.
    """

    def __init__(self, graph: Any) -> None:
        import onnx

        super().__init__()
        values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
        self.names: dict[str, str] = {}
        for name, array in values.items():
            self._keep(name, torch.tensor(array))
        entries = [entry for entry in graph.input if entry.name not in values]
        if len(entries) != 1 or len(graph.output) != 1:
            raise InputError(
                f"a network has one input and one output; this one has {len(entries)} and "
                f"{len(graph.output)}"
            )
        self.entry, self.exit = entries[0].name, graph.output[0].name
        sizes = [d.dim_value for d in entries[0].type.tensor_type.shape.dim]
        if any(size < 1 for size in sizes[1:]):
            raise InputError(f"the shape of the network's input is not fixed: {sizes}")
        self.shape = tuple(sizes[1:]) if len(sizes) > 1 else tuple(sizes)
        self.steps: list[tuple[str, list[str], str, Options]] = []
        for node in graph.node:
            options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                self._keep(
                    node.output[0], torch.tensor(onnx.numpy_helper.to_array(options["value"]))
                )
            elif node.op_type not in OPERATORS:
                raise InputError(
                    f"the network uses the ONNX operator {node.op_type}; known are "
                    f"{', '.join(OPERATORS)}"
                )
            else:
                self.steps.append((node.op_type, list(node.input), node.output[0], options))

    def _keep(self, name: str, value: Tensor) -> None:
        self.names[name] = f"value{len(self.names)}"
        self.register_buffer(self.names[name], value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (n, K)."""
        values = {name: getattr(self, key) for name, key in self.names.items()}
        values[self.entry] = x
        for kind, inputs, output, options in self.steps:
            values[output] = OPERATORS[kind]([values[i] for i in inputs if i], options)
        return values[self.exit].reshape(len(x), -1)


def read(path: str | Path) -> OnnxNetwork:
    """Read a network.

    Raises
    ------
    InputError for a file that is no ONNX network, or that uses an operator that is not known.
    """
    try:
        import onnx
    except ImportError:
        raise InputError(
            "reading .onnx files needs the package onnx: pip install robustlearn[onnx]"
        ) from None
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path)).graph
    except DecodeError as error:
        raise InputError(f"{Path(path).name} is not a readable ONNX file: {error}") from None
    return OnnxNetwork(graph).eval()


def _gemm(given: Inputs, options: Options) -> Tensor:
    x, weight, *bias = given
    if options.get("transA"):
        raise InputError("Gemm with transA mixes the samples of a batch")
    product = x @ (weight.T if options.get("transB") else weight) * options.get("alpha", 1.0)
    return product + bias[0] * options.get("beta", 1.0) if bias else product


def _matmul(given: Inputs, options: Options) -> Tensor:
    left, right = given
    if right.dim() == 2 and left.dim() > 2 and left.shape[-1] != right.shape[0]:
        left = left.flatten(1)
    return left @ right


def _conv(given: Inputs, options: Options) -> Tensor:
    x, weight, *bias = given
    _only_padding(options)
    before, after = _halves(options.get("pads"), x.dim() - 2)
    x = functional.pad(x, [p for pair in zip(before[::-1], after[::-1], strict=True) for p in pair])
    convolve = {3: functional.conv1d, 4: functional.conv2d}[x.dim()]
    return convolve(
        x, weight, bias[0] if bias else None, options.get("strides", 1), 0,
        options.get("dilations", 1), options.get("group", 1),
    )  # fmt: skip


def _only_padding(options: Options) -> None:
    if options.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or options.get("ceil_mode"):
        raise InputError("auto_pad and ceil_mode are not known: export with explicit padding")


def _halves(pads: list[int] | None, count: int) -> tuple[list[int], list[int]]:
    pads = pads or [0] * (2 * count)
    return pads[:count], pads[count:]


def _pool(average: bool) -> Callable[[Inputs, Options], Tensor]:
    def pool(given: Inputs, options: Options) -> Tensor:
        _only_padding(options)
        before, after = _halves(options.get("pads"), given[0].dim() - 2)
        if before != after:
            raise InputError("pooling with padding that differs between sides is not known")
        size, strides = options["kernel_shape"], options.get("strides", 1)
        if average:
            inside = bool(options.get("count_include_pad"))
            return functional.avg_pool2d(given[0], size, strides, before, False, inside)
        return functional.max_pool2d(given[0], size, strides, before, options.get("dilations", 1))

    return pool


def _reshape(given: Inputs, options: Options) -> Tensor:
    x, shape = given
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())]
    return x.reshape(len(x), *sizes[1:]) if len(sizes) > 1 else x.flatten(1)


def _flatten(given: Inputs, options: Options) -> Tensor:
    return given[0].flatten(1) if options.get("axis", 1) == 1 else given[0]


def _batch_norm(given: Inputs, options: Options) -> Tensor:
    x, weight, bias, mean, var = given
    return functional.batch_norm(x, mean, var, weight, bias, eps=options.get("epsilon", 1e-5))


def _squeezed(given: Inputs, options: Options) -> Tensor:
    x = given[0]
    return x.reshape(len(x), *[size for size in x.shape[1:] if size != 1])


OPERATORS: dict[str, Callable[[Inputs, Options], Tensor]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Conv": _conv,
    "Add": lambda given, options: given[0] + given[1],
    "Sub": lambda given, options: given[0] - given[1],
    "Mul": lambda given, options: given[0] * given[1],
    "Div": lambda given, options: given[0] / given[1],
    "Neg": lambda given, options: -given[0],
    "Relu": lambda given, options: torch.relu(given[0]),
    "LeakyRelu": lambda given, options: functional.leaky_relu(given[0], options.get("alpha", 0.01)),
    "Tanh": lambda given, options: torch.tanh(given[0]),
    "Sigmoid": lambda given, options: torch.sigmoid(given[0]),
    "BatchNormalization": _batch_norm,
    "MaxPool": _pool(average=False),
    "AveragePool": _pool(average=True),
    "GlobalAveragePool": lambda given, options: given[0].mean((2, 3), keepdim=True),
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeezed,
    "Transpose": lambda given, options: given[0].permute(options["perm"]),
    "Identity": lambda given, options: given[0],
    "Dropout": lambda given, options: given[0],
}
