"""ℓ2 radii from how fast a network can change."""

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustlearn._tensor import flat
from robustlearn.certify.base import CERTIFICATES, Certificate, classified, euclidean, interval
from robustlearn.errors import InputError
from robustlearn.models import Model, TorchModel
from robustlearn.models.network import chain_of, is_affine
from robustlearn.threats import LpBall

DENSE = 2**22  # entries of a layer's matrix that is written out for its exact norm
OFFSETS = ("bias", "running_mean", "shift", "offset")  # of an affine layer
SLACK = 1e-9  # relative: what the rounding of a norm in float64 may have taken from it
SLOPES: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Tanh: 1.0,
    nn.Hardtanh: 1.0,
    nn.Softplus: 1.0,
    nn.Sigmoid: 0.25,
}


def _applies(model: Model, threat: LpBall, x: Tensor) -> bool:
    return (
        isinstance(model, TorchModel)
        and threat.p > 0
        and _parts(model, tuple(x.shape[1:])) is not None
    )


@CERTIFICATES.register("lipschitz", applies=_applies, auto=False)
def lipschitz(
    model: Model,
    x: Tensor,
    threat: LpBall,
    y: Tensor | None,
    seconds: float = math.inf,
    *,
    constant: float | None = None,
) -> Certificate:
    """min_j (z_y − z_j) / L_j at x: no ℓ2 step below it changes the prediction.

    For a `Sequential` of affine layers and activations L_j = ‖w_y − w_j‖₂ · Π L(layer), the last
    affine layer taken row by row; for a given constant L of the map x ↦ z, L_j = √2·L. Regressor:
    f(x) ± L·‖δ‖₂. Norms other than ℓ2 by ‖δ‖₂ ≤ c·‖δ‖; the box is not made use of. The product is
    loose for deep networks. In float64, for the network in real arithmetic; all but the margin
    leave ten times the room that the model's own outputs at x differ from it.

    Parameters
    ----------
    x : (n, *shape); y : (n,) labels or targets, or None for the predicted class.
    seconds : a sample may take; this takes few.
    constant : L > 0 of a model whose layers are not known: any black box.

    Raises
    ------
    InputError for a model whose layers are not known, without a constant.
    """
    if constant is not None and not 0 < constant < math.inf:
        raise InputError(f"a Lipschitz constant is positive and finite; got {constant!r}")
    shape, wide = tuple(x.shape[1:]), x.detach().cpu().double()
    with torch.no_grad():
        told = model(x).detach().cpu().double()
    parts = None if constant is not None else _parts(model, shape)
    if constant is None and parts is None:
        raise InputError(
            f"the layers of {model.name} are not known: give lipschitz(…, constant=L) one"
        )
    output, slack = told, torch.zeros(len(x), dtype=torch.float64)
    if parts is not None:
        output, last, before = _measured(parts, wide, model)
        slack = 10 * (output.reshape(told.shape) - told).abs().reshape(len(x), -1).amax(1)
        pairs = before * (1 + SLACK) * _distances(last)
        own = before * (1 + SLACK) * torch.linalg.matrix_norm(last, 2)
    else:
        classes = 1 if output.dim() == 1 else output.shape[1]
        own = torch.tensor(float(constant or 0), dtype=torch.float64)
        pairs = math.sqrt(2) * own * (1 - torch.eye(classes, dtype=torch.float64))
    scale = euclidean(threat, shape)
    reach = scale * torch.as_tensor(threat.eps, dtype=torch.float64).expand(len(x))
    if model.task == "regression":
        middle, width = output.reshape(-1), own * reach + slack
        return interval("lipschitz", middle - width, middle + width, y)
    label = output.argmax(1) if y is None else y.detach().cpu().long()
    gap = output.gather(1, label[:, None]) - output
    slope = pairs[label]
    mine = nn.functional.one_hot(label, output.shape[1]).bool()
    margin = (gap - slope * reach[:, None]).masked_fill(mine, torch.inf).amin(1)
    room = gap - 2 * slack[:, None]  # a margin is the difference of two outputs
    radius = (room / (slope * scale)).nan_to_num(0.0, torch.inf).masked_fill(mine, torch.inf)
    right, certified = output.argmax(1) == label, margin > 2 * slack
    return classified("lipschitz", right, radius.amin(1).clamp_min(0), certified, margin)


def _distances(rows: Tensor) -> Tensor:
    """‖w_i − w_j‖₂ of all pairs of rows, from the differences: products would cancel."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def constant_of(model: nn.Module, shape: Sequence[int]) -> float:
    """Return a bound on ‖f(x) − f(x')‖₂ / ‖x − x'‖₂: the product over the layers.

    An affine layer, or several in a row, counts with the largest singular value of its matrix
    where that has at most 4 million entries, and with √(‖W‖₁‖W‖_∞) ≥ ‖W‖₂ otherwise, both from
    above; an activation with its largest slope. Convolutions are affine layers: their padding
    and stride are those of the matrix.

    Parameters
    ----------
    model : a plain `Sequential`; shape : of a sample.

    Raises
    ------
    InputError for a layer that is not known.

    Examples
    --------
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> round(constant_of(nn.Sequential(layer, nn.ReLU()), (2,)), 4)
    4.0
    """
    parts = _grouped(chain_of(copy.deepcopy(model).double().eval()))
    if parts is None:
        raise InputError("a layer is not known: affine layers, activations and max pooling are")
    point, total = torch.zeros(1, *shape, dtype=torch.float64), 1.0
    for part in parts:
        total *= _constant(part, point)
        point = part(point).detach()
    return total


def _parts(model: Model, shape: tuple[int, ...]) -> list[nn.Module] | None:
    """Return a float64 copy of the layers, if they are known and the last is affine."""
    layers = model.layers(shape) if isinstance(model, TorchModel) else None
    parts = None if layers is None else _grouped(list(layers))
    return parts if parts and isinstance(parts[-1], nn.Sequential) else None


def _grouped(leaves: list[nn.Module]) -> list[nn.Module] | None:
    """Put affine layers in a row into one `Sequential`; None where a layer is not known."""
    parts: list[nn.Module] = []
    for affine, run in itertools.groupby(leaves, is_affine):
        layers = list(run)
        if not affine and any(_slope(layer) is None for layer in layers):
            return None
        parts += [nn.Sequential(*layers)] if affine else layers
    return parts


def _slope(leaf: nn.Module) -> float | None:
    """Return the Lipschitz constant of an activation; of max pooling without overlap it is 1."""
    if type(leaf) is nn.LeakyReLU:
        return max(1.0, abs(leaf.negative_slope))
    if type(leaf) in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d):
        apart = leaf.stride == leaf.kernel_size and leaf.dilation == 1
        return 1.0 if apart else None
    return SLOPES.get(type(leaf))


def _constant(part: nn.Module, point: Tensor) -> float:
    if type(part) is not nn.Sequential:
        return float(_slope(part) or 0)
    size = point.numel() * part(point).numel()
    return (1 + SLACK) * float(_spectral(part, point) if size <= DENSE else _mixed(part, point))


def _matrix(part: nn.Module, point: Tensor) -> Tensor:
    """Return W of x ↦ Wx + b."""
    whole = torch.autograd.functional.jacobian(lambda x: part(x).reshape(-1), point)
    return whole.reshape(len(whole), -1)


def _spectral(part: nn.Module, point: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(_matrix(part, point), 2)


def _mixed(part: nn.Module, point: Tensor) -> Tensor:
    """√(‖W‖₁‖W‖_∞): the largest column and row sums of |W|, without writing it out."""
    sizes = copy.deepcopy(part)
    for layer in sizes.children():
        for name, value in (*layer.named_parameters(), *layer.named_buffers()):
            if value.is_floating_point():
                value.data = value.data.abs() * (name not in OFFSETS)
    ones = torch.ones_like(point).requires_grad_()
    across = sizes(ones)
    (down,) = torch.autograd.grad(across.sum(), ones)
    return (across.abs().max() * down.abs().max()).sqrt().detach()  # a pool may divide by −1


def _measured(parts: list[nn.Module], x: Tensor, model: Model) -> tuple[Tensor, Tensor, float]:
    """Return outputs in float64, the matrix of the last layer and the constant before it."""
    before = 1.0
    for part in parts[:-1]:
        before *= _constant(part, x[:1])
        x = part(x)
    last, output = _matrix(parts[-1], x[:1]), parts[-1](x)
    if model.task == "classification" and output.reshape(len(x), -1).shape[1] == 1:
        column = output.reshape(len(x), 1)
        return torch.cat([0 * column, column], 1), torch.cat([0 * last, last]), before
    return flat(output), last, before
