"""Objectives that train on certified bounds: what is minimised bounds the worst case from above."""

import math
import weakref

import torch
from torch import Tensor, nn

from robustlearn.certify.bounds import interval_bounds, margin_rows
from robustlearn.certify.relax import Region, Span_of, backward, lines
from robustlearn.errors import InputError
from robustlearn.models.trace import ACTIVATIONS, Network, trace
from robustlearn.threats import LpBall
from robustlearn.train.inner import Craft, evaluating
from robustlearn.train.objectives import CROSS_ENTROPY, PLAIN, Criterion, Outcome, objective, pgd_at

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
AGREES = 1e-3  # difference that rounding explains
COMPARED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # that are what was recorded of them


def interval_init_(net: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draw W ~ N(0, 2π/n²) for n inputs a neuron, biases 0: intervals then keep their width.

    An interval of radius r leaves an affine layer with Σ|w|·r, 2r in the mean, of which a ReLU
    passes about a half. With weights as large as usual the width grows by about √n a layer, and
    the first steps of training on bounds drive the network to a constant, where it stays.

    Parameters
    ----------
    net : its linear and convolutional layers are drawn anew, in place; before `fit` with ``ibp``.

    Returns
    -------
    The network. Source: Shi et al. (2021).

    Examples
    --------
    >>> from robustlearn.train import interval_init_
    >>> net = interval_init_(nn.Linear(1000, 1000), torch.Generator().manual_seed(0))
    >>> round(float(net.weight.abs().sum(1).mean()), 2)
    2.0
    """
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, WEIGHTED):
                fan = module.weight[0].numel()
                module.weight.normal_(0, math.sqrt(2 * math.pi) / fan, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    return net


@objective(classes_only=True, climbs=False)
def ibp(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    weight: float = 0.5,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """(1 − w)·L(f(x), y) + w·L(−m, y), m the margins that intervals prove; certified training.

    −m bounds z_j − z_y over the threat, so that L(−m, y) bounds the worst cross-entropy. Needs a
    slow ramp of ε, and weights that do not widen intervals to begin with: `interval_init_`. Batch
    normalisation computes bounds with its running statistics. Source: Gowal et al. (2018), there
    with w from 0 to 1/2.
    """
    return _mixed(model, x, y, threat, weight, 0.0, criterion, craft)


@objective(classes_only=True, climbs=False)
def crown_ibp(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    weight: float = 0.5,
    beta: float = 0.5,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """`ibp` with margins (1 − β)·intervals + β·CROWN between intervals.

    Tighter at the start of training than intervals alone, at twice the cost or more. Source: Zhang
    et al. (2020), there with β from 1 to 0.
    """
    return _mixed(model, x, y, threat, weight, beta, criterion, craft)


@objective(classes_only=True)
def mtl_ibp(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    weight: float = 0.05,
    steps: int = 2,
    step_size: float | None = None,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """(1 − w)·L(f(x'), y) + w·L(−m, y): an attack from below and intervals from above.

    Source: De Palma et al. (2024); w between 0.001 and 0.5 trades clean for certified accuracy.
    """
    below = pgd_at(
        model, x, y, threat, steps=steps, step_size=step_size, criterion=criterion, craft=craft
    )
    margins = _margins(craft.network(model), x, y, threat, 0.0)
    loss = (1 - weight) * below.loss + weight * criterion(_logits(margins, y), y)
    return Outcome(loss, below.points, {**below.metrics, **_told(margins, loss)})


def _mixed(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    weight: float,
    beta: float,
    criterion: Criterion,
    craft: Craft,
) -> Outcome:
    clean = criterion(craft.forward(model, x), y)
    margins = _margins(craft.network(model), x, y, threat, beta)
    loss = (1 - weight) * clean + weight * criterion(_logits(margins, y), y)
    return Outcome(loss, x, _told(margins, loss))


def _margins(model: nn.Module, x: Tensor, y: Tensor, threat: LpBall, beta: float) -> Tensor:
    """Lower bounds of z_y − z_j for all other classes in order (n, K − 1), with their graph.

    Raises
    ------
    InputError for a model that cannot be recorded, or that computes something else on a batch.
    """
    with evaluating(model):
        network = trace(model, x, dtype=x.dtype)
        if model not in COMPARED:
            _compare(network, model, x)
    network.bind(live=True)
    region = Region(x, threat)
    spans = interval_bounds(network, region)
    classes = network.nodes[network.output].shape[-1]
    single = (2 * y - 1)[:, None, None]  # a logit of class 1 against class 0
    rows = (single if classes == 1 else margin_rows(y, classes)).to(x)
    found = _elided(network, region, rows, spans)
    if beta:
        owner = torch.arange(len(x), device=x.device).repeat_interleave(rows.shape[1])
        relaxed = {i: line.rows(owner) for i, line in lines(network, spans).items()}
        output = network.output
        slope, offset = backward(network, output, rows.flatten(0, 1)[:, None], relaxed)
        crown = region.select(owner).least(slope, offset)
        found = (1 - beta) * found + beta * crown.reshape(found.shape)
    return found


def _elided(network: Network, region: Region, rows: Tensor, spans: Span_of) -> Tensor:
    """Rows·outputs from below (n, k), by intervals of the activations before the last layer.

    The rows (n, k, K) go through the last affine map as a whole: what two outputs share cancels.
    """
    affine, (n, k) = network.segments[network.output], rows.shape[:2]
    bound = (rows * affine.offset).sum(2)
    parts = affine.pull(rows.flatten(0, 1)[:, None])
    for source, part in zip(affine.sources, parts, strict=True):
        curve = ACTIVATIONS.get(network.nodes[source].kind)
        span = region.box if curve is None else map(curve, spans[source])
        low, high = (side.reshape(n, -1, 1) for side in span)
        through = part.reshape(n, k, -1)
        negative = through.clamp(max=0)
        bound = bound + ((through - negative) @ low + negative @ high).squeeze(2)
    return bound


def _compare(network: Network, model: nn.Module, x: Tensor) -> None:
    """Compare a network with what was recorded of it on one sample, the first time it is met."""
    points = torch.cat([x, x + 1])  # what mixes a batch shows in one sample too
    with torch.no_grad():
        theirs = model(points)
        ours = network(points).reshape(theirs.shape)
    if not torch.allclose(ours, theirs, AGREES, AGREES):
        raise InputError(
            f"{type(model).__name__} computes something else on a batch than what was recorded of "
            "it on one sample: does it keep a state, or depend on the other samples?"
        )
    COMPARED.add(model)


def _logits(margins: Tensor, y: Tensor) -> Tensor:
    """Return 0 for the class itself and −m for the others, (n, K)."""
    classes = margins.shape[1] + 1
    others = torch.arange(classes, device=y.device) != y[:, None]
    return margins.new_zeros(len(y), classes).masked_scatter(others, -margins)


def _told(margins: Tensor, loss: Tensor) -> dict[str, Tensor]:
    proven = (margins.detach().amin(1) > 0).float()
    return {"loss": loss.detach(), "certified": proven}
