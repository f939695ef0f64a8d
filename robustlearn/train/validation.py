"""What held-out samples say of a network in training: clean, under one step, and under attack."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustlearn.attacks import ATTACKS
from robustlearn.loop.randomness import keys
from robustlearn.models import Model, wrap
from robustlearn.threats import LpBall

CLIMBS, QUERIES = 15, 50  # gradients of the climb, and outputs of the search after it
ATTACKED: tuple[tuple[str, dict[str, Any]], ...] = (  # one after the other, on what stands
    ("pgd", {"steps": 1, "step_size": 1.25, "schedule": "constant"}),
    ("apgd", {"steps": CLIMBS}),
    ("square", {"queries": QUERIES}),
)
CHUNK = 500  # samples a batch
LOST, APART, GAP = 0.5, 0.5, 0.1  # see `overfitted`


@dataclass(frozen=True)
class Standing:
    """Shares of held-out samples that are right: untouched, after one step, and after attack.

    Of a regressor minus the mean squared errors, so that higher is better there too.
    """

    clean: float
    single: float
    robust: float

    def overfitted(self, best: "Standing | None") -> bool:
        """Tell a network that has learned to mask its gradient (catastrophic overfitting).

        A single step finds little and the attack nearly everything: they are ``APART`` from each
        other, or the attacked share has lost the part ``LOST`` of its best while that after one
        step has lost nothing and stands ``GAP`` above it; that best was ``GAP`` or more: with less
        a network is weak, not masked.
        """
        if self.robust < 0 or self.clean <= 0:
            return False
        if self.single - self.robust > APART:
            return True
        return (
            best is not None
            and best.robust >= GAP
            and self.single - self.robust >= GAP
            and self.robust < LOST * best.robust
            and self.single >= best.single - 0.01
        )


def validate(
    net: nn.Module | Model, x: Tensor, y: Tensor, threat: LpBall, *, seed: int = 0
) -> Standing:
    """Measure a network by one step, and by APGD with a search by scores on what it leaves.

    PGD alone flatters networks that were trained by single steps: the search without gradients
    sees through a mask. An upper bound on the robust share, cheap enough for every epoch; the
    figure to be told in the end is that of `robustlearn.evaluate`.

    Parameters
    ----------
    net : a network, taken for a classifier if y are whole numbers of an integer type; or what
        `wrap` made of it, for which that is said.
    x : (n, *shape) on the network's device; y : (n,) classes or targets.

    Notes
    -----
    Cost a sample: 17 gradients, and 50 outputs where the climb finds nothing.
    """
    model = wrap(net, task=None if not y.is_floating_point() else "regression")
    sums = torch.zeros(3, dtype=torch.float64)
    with model.session(), torch.no_grad():
        model.settle(x[:CHUNK], y[:CHUNK])
        for rows in torch.arange(len(x), device=x.device).split(CHUNK):
            drawn = keys(seed, "validation", 0, rows)
            sums += _measured(model, x[rows], y[rows], threat.select(rows), drawn)
    clean, single, robust = (sums / len(x)).tolist()
    return Standing(clean, min(clean, single), min(clean, single, robust))


def _measured(model: Model, x: Tensor, y: Tensor, threat: LpBall, drawn: Tensor) -> Tensor:
    """Return the sums of what is right: clean, after a step, after the attack."""
    if model.task == "regression":
        return -_errors(model, x, y, threat, drawn)
    left = _right(model, x, y).nonzero().squeeze(1)
    standing = [len(left)]
    for name, options in ATTACKED:
        if len(left):
            own, there = {"generator": drawn[left], **options}, threat.select(left)
            points = ATTACKS[name].function(model, x[left], y[left], there, **own)
            left = left[_right(model, points, y[left])]
        standing.append(len(left))
    clean, single, _, robust = standing
    return torch.tensor([clean, single, robust], dtype=torch.float64)


def _errors(model: Model, x: Tensor, y: Tensor, threat: LpBall, drawn: Tensor) -> Tensor:
    """Return the sums of squared errors: clean, after a step, after the attack."""
    points = [
        x,
        ATTACKS["fgsm"].function(model, x, y, threat),
        ATTACKS["pgd"].function(model, x, y, threat, steps=CLIMBS, restarts=2, generator=drawn),
    ]
    return torch.stack([(model(p).reshape(-1) - y).double().square().sum().cpu() for p in points])


def _right(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y
