"""What the adversary wants: per-sample losses ``(output, y) -> (n,)``.

A targeted attack is another loss, not a flag: there ``y`` is the class to be reached. Each loss
says which way the adversary pushes it and when it has won; classifiers with one logit z count
as two classes with logits (0, z).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from robustlearn.errors import InputError

Function = Callable[[Tensor, Tensor], Tensor]
Look = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Loss:
    """A per-sample loss with the direction in which the adversary pushes it.

    Call it for its value; `objective` is what the adversary maximises, `look` gives that and its
    derivative by the output, and `broken` tells where the adversary has won.
    """

    def __init__(
        self, function: Function, *, ascend: bool, won: Function | None, look: Look | None = None
    ) -> None:
        functools.update_wrapper(self, function)
        self.function, self.ascend, self._won, self._look = function, ascend, won, look
        self.name = function.__name__
        self.task = "classification" if won is not None else "regression"

    @property
    def targeted(self) -> bool:
        """Whether the adversary wins where the prediction is y: then y is a target, no label."""
        return self._won is reached

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample, shape (n,)."""
        return self.function(output, y)

    def objective(self, output: Tensor, y: Tensor) -> Tensor:
        """Return what the adversary maximises: the loss, or minus a margin."""
        return self.function(output, y) if self.ascend else -self.function(output, y)

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective (n,) and its derivative by the output, in the output's shape."""
        if self._look is not None and output.dim() == 2 and output.shape[1] >= 2:
            return self._look(output, y)
        with torch.enable_grad():
            point = output.detach().requires_grad_()
            value = self.objective(point, y)
            (slope,) = torch.autograd.grad(value.sum(), point, allow_unused=True)
        return value.detach(), torch.zeros_like(output) if slope is None else slope

    def broken(self, output: Tensor, y: Tensor) -> Tensor:
        """Tell where the adversary has won, shape (n,) bool; nowhere for a regression loss."""
        if self._won is None:
            return torch.zeros(len(output), dtype=torch.bool, device=output.device)
        return self._won(output, y)

    def __repr__(self) -> str:
        return f"<loss {self.name}>"


LOSSES: dict[str, Loss] = {}


def loss(
    *, ascend: bool, won: Function | None, look: Look | None = None
) -> Callable[[Function], Loss]:
    """Make a `Loss` of a function and file it under its name; ``look`` spares it autograd."""

    def decorate(function: Function) -> Loss:
        made = Loss(function, ascend=ascend, won=won, look=look)
        return LOSSES.setdefault(made.name, made)

    return decorate


def two_columns(logits: Tensor) -> Tensor:
    """Show one logit z, (n,) or (n, 1), as the logits (0, z) of two classes."""
    if logits.dim() == 1 or logits.shape[1] == 1:
        z = logits.reshape(-1, 1)
        return torch.cat([torch.zeros_like(z), z], 1)
    return logits


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Tell where the first largest logit is not that of y; NaN predicts nothing, so it is."""
    z = two_columns(logits.detach())
    return (z.argmax(1) != y) | z.isnan().any(1)


def reached(logits: Tensor, y: Tensor) -> Tensor:
    """Tell where the prediction is y: success of a targeted attack."""
    return ~misclassified(logits, y)


def _gap(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """z_y − max_{j≠y} z_j, and the columns."""
    z = two_columns(logits)
    own = z.gather(1, y[:, None]).squeeze(1)
    rival = z.scatter(1, y[:, None], -torch.inf).amax(1)
    return own - rival, z


def _broken_by_nan(value: Tensor) -> Tensor:
    """NaN predicts nothing: the adversary could not wish for more."""
    return value.nan_to_num(torch.inf, torch.inf, -torch.inf)


def _look_closest(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """max_{j≠y} z_j − z_y and its slope e_rival − e_y; a tie counts as zero."""
    own = y[:, None]
    top, rival = logits.scatter(1, own, -torch.inf).max(1, keepdim=True)
    slope = torch.zeros_like(logits).scatter_(1, rival, 1.0).scatter_(1, own, -1.0)
    return _broken_by_nan(top.sub_(logits.gather(1, own)).squeeze(1)), slope


def _look_likely(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """max_{j≠y} z_j − z_y, and the slope Σ_{j≠y} softmax_j e_j − e_y of the `log_odds`."""
    own = y[:, None]
    rivals = logits.scatter(1, own, -torch.inf)
    value = (rivals.amax(1, keepdim=True) - logits.gather(1, own)).squeeze(1)
    return _broken_by_nan(value), rivals.softmax(1).scatter_(1, own, -1.0)


def _look_odds(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The `log_odds`, and the slope Σ_{j≠y} softmax_j e_j − e_y."""
    own = y[:, None]
    rivals = logits.scatter(1, own, -torch.inf)
    value = rivals.logsumexp(1) - logits.gather(1, own).squeeze(1)
    return value, rivals.softmax(1).scatter_(1, own, -1.0)


@loss(ascend=False, won=misclassified, look=_look_closest)
def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y − max_{j≠y} z_j: negative exactly where the prediction is not y.

    A tie is decided as argmax decides it, for the lowest class: where y loses a tie its margin
    is the smallest negative number. Where an output is NaN nothing is predicted: −∞.
    """
    gap, z = _gap(logits, y)
    with torch.no_grad():
        if float(gap.abs().min()) > 0:  # neither a tie nor NaN, as almost always
            return gap
        lost = (gap == 0) & misclassified(z, y)
    tiny = torch.finfo(z.dtype).tiny
    return torch.where(gap.isnan(), -torch.inf, torch.where(lost, gap - tiny, gap))


@loss(ascend=False, won=reached)
def targeted_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j≠t} z_j − z_t: negative exactly where the prediction is the target t = y."""
    gap, z = _gap(logits, y)
    tiny = torch.finfo(z.dtype).tiny
    with torch.no_grad():
        won = (gap == 0) & reached(z, y)
    return torch.where(gap.isnan(), torch.inf, torch.where(won, -gap - tiny, -gap))


@loss(ascend=True, won=misclassified)
def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(z)_y."""
    return functional.cross_entropy(two_columns(logits), y, reduction="none")


@loss(ascend=True, won=misclassified, look=_look_odds)
def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """log Σ_{j≠y} e^{z_j} − z_y: cross-entropy's direction, at a length that never vanishes.

    The cross-entropy is log(1 + e^u) of it, whose slope is lost where the logits are saturated.
    """
    z = two_columns(logits)
    own = z.gather(1, y[:, None]).squeeze(1)
    return z.scatter(1, y[:, None], -torch.inf).logsumexp(1) - own


soft_margin = Loss(margin.function, ascend=False, won=misclassified, look=_look_likely)
"""The margin by value, the log-odds by slope: all rivals pull, the closest counts."""


@loss(ascend=False, won=reached)
def targeted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(z)_t, pushed down: the target t = y becomes likely."""
    return functional.cross_entropy(two_columns(logits), y, reduction="none")


@loss(ascend=False, won=misclassified)
def scaled_margin(logits: Tensor, y: Tensor) -> Tensor:
    """margin / (1 + max z − min z), in (−1, 1): bounded, and of the margin's sign."""
    z = two_columns(logits)
    return margin(z, y) / (1 + z.amax(1) - z.amin(1))


@loss(ascend=True, won=misclassified)
def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """−(z_y − max_{j≠y} z_j) / (z₍₁₎ − z₍₃₎): positive on success, unchanged by a gain.

    Source: Croce and Hein (2020). Under three classes the ratio is undefined, and minus the
    `scaled_margin` takes its place.
    """
    gap, z = _gap(logits, y)
    if z.shape[1] < 3:
        return -scaled_margin(z, y)
    top = z.topk(3, dim=1).values
    return -gap / (top[:, 0] - top[:, 2]).clamp_min(torch.finfo(z.dtype).tiny)


@loss(ascend=True, won=reached)
def targeted_dlr(logits: Tensor, y: Tensor) -> Tensor:
    """(z_t − max_{j≠t} z_j) / (z₍₁₎ − (z₍₃₎ + z₍₄₎)/2) for the target t = y: positive on success.

    Under four classes the ratio is undefined, and the `scaled_margin` of t takes its place.
    """
    gap, z = _gap(logits, y)
    if z.shape[1] < 4:
        return scaled_margin(z, y)
    top = z.topk(4, dim=1).values
    spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return gap / spread.clamp_min(torch.finfo(z.dtype).tiny)


@loss(ascend=True, won=None)
def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """(f(x) − y)² of a regressor; infinite where it predicts NaN."""
    return _broken_by_nan((output.reshape(len(y)) - y) ** 2)


@loss(ascend=True, won=None)
def absolute_error(output: Tensor, y: Tensor) -> Tensor:
    """|f(x) − y| of a regressor; infinite where it predicts NaN."""
    return _broken_by_nan((output.reshape(len(y)) - y).abs())


def get(chosen: Any, task: str = "classification") -> Loss:
    """Return a loss by name, a `Loss` as it is, or a plain function as a loss to be raised.

    Parameters
    ----------
    chosen : name, `Loss`, or function ``(output, y) -> (n,)`` that the adversary maximises; None
        stands for the margin of a classifier and the squared error of a regressor.
    task : ``"classification"`` or ``"regression"``.
    """
    if chosen is None:
        return squared_error if task == "regression" else margin
    if isinstance(chosen, Loss):
        if chosen.task != task:
            raise InputError(f"{chosen.name} is a loss for {chosen.task}, not for {task}")
        return chosen
    if callable(chosen):
        return Loss(chosen, ascend=True, won=misclassified if task == "classification" else None)
    if chosen not in LOSSES:
        raise InputError(f"there is no loss named {chosen!r}; there are: {', '.join(LOSSES)}")
    return get(LOSSES[chosen], task)
