"""Feed-forward ONNX files as torch modules: the operators of published verification networks.

What an operator may be given is listed with it; any other attribute, rank or opset is refused by
name, so that nothing is computed in another way than the file says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlearn.errors import InputError

Inputs = list[Tensor]
Options = dict[str, Any]
OPSET = 7  # from which on operators broadcast, and batch normalisation is that of inference
ANY = None  # every value of an attribute is known


@dataclass(frozen=True)
class Operator:
    """How to compute an operator, and for what.

    ``options`` are the attributes with the values that are known, ``ranks`` the dimensions of the
    first input, the batch included. Only the first input may be a ``single`` one's that depends
    on the network's.
    """

    compute: Callable[[Inputs, Options], Tensor]
    options: dict[str, tuple[Any, ...] | None] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    single: bool = True


class OnnxNetwork(nn.Module):
    """An ONNX graph; the first dimension of its input is the batch.

    Attributes
    ----------
    shape : of one sample, as the file states it.
    """

    def __init__(self, model: Any) -> None:
        import onnx

        super().__init__()
        graph = model.graph
        _check_format(model)
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
        self.shape = _shape(entries[0].type.tensor_type)
        self.steps: list[tuple[str, list[str], str, Options]] = []
        self.batched = {self.entry}
        for node in graph.node:
            self._add(node)
        if self.exit not in self.batched:
            raise InputError("the output of the network does not depend on its input")

    def _add(self, node: Any) -> None:
        """File an operator, or its value if that does not depend on the input."""
        import onnx

        kind, inputs, output = node.op_type, list(node.input), node.output[0]
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if kind == "Constant":
            self._keep(output, _constant(options))
            return
        operator = OPERATORS.get(kind) if node.domain in ("", "ai.onnx") else None
        if operator is None:
            raise InputError(
                f"the network uses the ONNX operator {node.domain and node.domain + '.'}{kind}; "
                f"known are {', '.join(OPERATORS)}"
            )
        unknown = [i for i in inputs if i and i not in self.batched and i not in self.names]
        if unknown:
            raise InputError(f"{kind} takes {unknown[0]!r}, which nothing before it computes")
        for name, value in options.items():
            known = operator.options.get(name, ())
            if known is not ANY and value not in known:
                raise InputError(
                    f"{kind} with {name} = {value!r} is not known; known are "
                    f"{', '.join(operator.options) or 'no attributes'}, and of {name} {known}"
                )
        depending = [i in self.batched for i in inputs]
        if any(depending[1:]) and operator.single:
            raise InputError(f"{kind} with weights that depend on the input is not known")
        if any(depending):
            self.batched.add(output)
            self.steps.append((kind, inputs, output, options))
            return
        if kind not in FOLDED:
            raise InputError(f"{kind} of constants alone is not known: fold it before exporting")
        given = [getattr(self, self.names[i]) for i in inputs if i]
        self._keep(output, FOLDED[kind](given, options))

    def _keep(self, name: str, value: Tensor) -> None:
        self.names[name] = f"value{len(self.names)}"
        self.register_buffer(self.names[name], value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (n, K)."""
        values = {name: getattr(self, key) for name, key in self.names.items()}
        values[self.entry] = x
        for kind, inputs, output, options in self.steps:
            given, operator = [values[i] for i in inputs if i], OPERATORS[kind]
            if operator.ranks and given[0].dim() not in operator.ranks:
                raise InputError(
                    f"{kind} of {given[0].dim()} dimensions is not known; known are "
                    f"{' and '.join(map(str, operator.ranks))}, the batch included"
                )
            values[output] = operator.compute(given, options)
            if not values[output].shape or len(values[output]) != len(x):
                raise InputError(f"{kind} gives {tuple(values[output].shape)}: the batch is lost")
        return values[self.exit].reshape(len(x), -1)


def read(path: str | Path) -> OnnxNetwork:
    """Read a network.

    Raises
    ------
    InputError for a file that is no ONNX network, or that uses an operator, or one of its
    attributes, that is not known.
    """
    try:
        import onnx
    except ImportError:
        raise InputError(
            "reading .onnx files needs the package onnx: pip install robustlearn[onnx]"
        ) from None
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path))
    except DecodeError as error:
        raise InputError(f"{Path(path).name} is not a readable ONNX file: {error}") from None
    return OnnxNetwork(model).eval()


def _check_format(model: Any) -> None:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    version = opsets.get("", opsets.get("ai.onnx", OPSET))
    if version < OPSET:
        raise InputError(f"the network is of ONNX opset {version}; expected {OPSET} or newer")
    if model.graph.sparse_initializer:
        raise InputError("sparse weights are not known: store them as dense ones")


def _shape(entry: Any) -> tuple[int, ...]:
    """Return the shape of one sample."""
    import onnx

    sizes = [d.dim_value for d in entry.shape.dim]
    if entry.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
        raise InputError("the input of the network must be of type float or double")
    if any(size < 1 for size in sizes[1:]) or not sizes:
        raise InputError(f"the shape of the network's input is not fixed: {sizes}")
    if len(sizes) > 1 and sizes[0] > 1:
        raise InputError(f"the first dimension of the input must be a batch of one; got {sizes}")
    return tuple(sizes[1:]) if len(sizes) > 1 else tuple(sizes)


def _constant(options: Options) -> Tensor:
    """Return the value of a Constant; numbers are float32 or int64."""
    import onnx

    (name, value), *others = options.items()
    if others or name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise InputError(f"Constant with {', '.join(options)} is not known")
    if name == "value":
        return torch.tensor(onnx.numpy_helper.to_array(value))
    return torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64)


def _gemm(given: Inputs, options: Options) -> Tensor:
    x, weight, *bias = given
    product = x @ (weight.T if options.get("transB") else weight) * options.get("alpha", 1.0)
    return product + bias[0] * options.get("beta", 1.0) if bias else product


def _conv(given: Inputs, options: Options) -> Tensor:
    x, weight, *bias = given
    before, after = _halves(options.get("pads"), x.dim() - 2)
    x = functional.pad(x, [p for pair in zip(before[::-1], after[::-1], strict=True) for p in pair])
    convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[x.dim()]
    return convolve(
        x, weight, bias[0] if bias else None, options.get("strides", 1), 0,
        options.get("dilations", 1), options.get("group", 1),
    )  # fmt: skip


def _halves(pads: list[int] | None, count: int) -> tuple[list[int], list[int]]:
    pads = pads or [0] * (2 * count)
    return pads[:count], pads[count:]


def _pool(average: bool) -> Callable[[Inputs, Options], Tensor]:
    def pool(given: Inputs, options: Options) -> Tensor:
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
    """Reshape samples; the batch must stay the first dimension."""
    x, shape = given
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())]
    one = math.prod(x.shape[1:])
    kept = sizes[0] in (1, len(x)) if -1 in sizes[1:] else math.prod(sizes[1:]) == one
    if not kept and len(sizes) > 1:
        raise InputError(f"Reshape to {shape.tolist()} takes samples of {one} numbers apart")
    return x.reshape(len(x), *sizes[1:]) if len(sizes) > 1 else x.flatten(1)


def _batch_norm(given: Inputs, options: Options) -> Tensor:
    x, weight, bias, mean, var = given
    return functional.batch_norm(x, mean, var, weight, bias, eps=options.get("epsilon", 1e-5))


def _squeeze(given: Inputs, options: Options) -> Tensor:
    x, *second = given
    axes = second[0].tolist() if second else options.get("axes", [])
    axes = sorted(axis % x.dim() for axis in axes)
    if not axes or 0 in axes or any(x.shape[axis] != 1 for axis in axes):
        raise InputError(
            f"Squeeze of axes {axes} of {tuple(x.shape)} is not known: name dimensions of size 1 "
            "other than the batch"
        )
    return x.reshape([size for i, size in enumerate(x.shape) if i not in axes])


def _transpose(given: Inputs, options: Options) -> Tensor:
    order = options.get("perm", list(range(given[0].dim()))[::-1])
    if order[0] != 0:
        raise InputError(f"Transpose with perm = {order} moves the batch")
    return given[0].permute(order)


def _dropout(given: Inputs, options: Options) -> Tensor:
    if len(given) > 2 and bool(given[2]):
        raise InputError("Dropout in training mode is random: export the network for inference")
    return given[0]


def _folded_reshape(given: Inputs, options: Options) -> Tensor:
    x, shape = given
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])


def _pairwise(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return Operator(lambda given, options: function(*given), single=False)


def _plain(function: Callable[[Tensor], Tensor], **options: Any) -> Operator:
    return Operator(lambda given, _: function(given[0]), options)


PADDED = {"auto_pad": (b"NOTSET",), "pads": ANY, "strides": ANY, "kernel_shape": ANY}
POOLED = {**PADDED, "ceil_mode": (0,)}
OPERATORS: dict[str, Operator] = {
    "Gemm": Operator(_gemm, {"alpha": ANY, "beta": ANY, "transA": (0,), "transB": (0, 1)}, (2,)),
    "MatMul": _pairwise(torch.matmul),
    "Conv": Operator(_conv, {**PADDED, "dilations": ANY, "group": ANY}, (3, 4, 5)),
    "Add": _pairwise(torch.add),
    "Sub": _pairwise(torch.sub),
    "Mul": _pairwise(torch.mul),
    "Div": _pairwise(torch.div),
    "Neg": _plain(torch.neg),
    "Relu": _plain(torch.relu),
    "LeakyRelu": Operator(
        lambda given, options: functional.leaky_relu(given[0], options.get("alpha", 0.01)),
        {"alpha": ANY},
    ),
    "Tanh": _plain(torch.tanh),
    "Sigmoid": _plain(torch.sigmoid),
    "BatchNormalization": Operator(
        _batch_norm, {"epsilon": ANY, "momentum": ANY, "training_mode": (0,), "spatial": (1,)}
    ),
    "MaxPool": Operator(_pool(False), {**POOLED, "dilations": ANY, "storage_order": ANY}, (4,)),
    "AveragePool": Operator(
        _pool(True), {**POOLED, "count_include_pad": (0, 1), "dilations": ([1, 1],)}, (4,)
    ),
    "GlobalAveragePool": Operator(
        lambda given, _: given[0].mean(tuple(range(2, given[0].dim())), keepdim=True),
        ranks=(3, 4, 5),
    ),
    "Flatten": _plain(lambda x: x.flatten(1), axis=(1,)),
    "Reshape": Operator(_reshape, {"allowzero": (0,)}),
    "Squeeze": Operator(_squeeze, {"axes": ANY}),
    "Transpose": Operator(_transpose, {"perm": ANY}),
    "Identity": _plain(lambda x: x),
    "Dropout": Operator(_dropout, {"ratio": ANY, "seed": ANY}),
}
# Of constants alone, which have no batch.
FOLDED: dict[str, Callable[[Inputs, Options], Tensor]] = {
    "Identity": lambda given, options: given[0],
    "Reshape": _folded_reshape,
    "Transpose": lambda given, options: given[0].permute(
        options.get("perm", list(range(given[0].dim()))[::-1])
    ),
}
