"""Models around models: the mean of a random one, and one that is led by another's gradient."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustlearn.errors import InputError
from robustlearn.models.base import Model, Objective


class Around(Model):
    """What a model around another shares: the labels, the device and the session of its inner."""

    def __init__(self, inner: Model) -> None:
        if not isinstance(inner, Model):
            raise InputError(
                f"{type(self).__name__} goes around a model: give it robustlearn.wrap of this "
                f"{type(inner).__name__}"
            )
        super().__init__(
            inner.source,
            task=inner.task,
            classes=inner.classes,
            num_classes=inner.num_classes,
            output="logits",  # the inner model has made logits of what it returns
        )
        self.inner = inner
        self.device, self.dtype, self.notes = inner.device, inner.dtype, inner.notes

    def settle(self, x: Tensor, y: Tensor | None = None) -> None:
        """Decide what the outputs of the inner model mean; see `Model.settle`."""
        self.inner.settle(x, y)
        self.task, self.num_classes = self.inner.task, self.inner.num_classes

    def _move(self, device: torch.device) -> None:
        self.inner._move(device)
        self.device = self.inner.device

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        with self.inner.session():
            yield


class Expectation(Around):
    """x ↦ (1/k) Σ model(x), over k evaluations of a model that draws random numbers.

    The gradient of an objective at that mean is the mean of the k gradients, each along the
    objective's slope there: expectation over transformation. As a model, and not an option of
    each attack, it serves every attack, black-box ones too, `evaluate` and the certificates; the
    output that tells who is broken is the one that was differentiated.

    Parameters
    ----------
    inner : the `Model`, evaluated anew each time; its samples are counted k-fold.
    k : evaluations. A gradient holds the graphs of all k in memory.

    Notes
    -----
    Source: Athalye, Carlini and Wagner (2018), section 4.2. Results depend on the batch wherever
    the random numbers of the inner model do. Modules such as dropout are at rest in evaluation
    mode, where there is nothing to average.

    Examples
    --------
    >>> from robustlearn import wrap
    >>> class Noisy(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x + torch.randn_like(x))
    >>> model = Expectation(wrap(Noisy(4, 3)), 20)
    >>> model(torch.zeros(5, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, inner: Model, k: int) -> None:
        if k < 1:
            raise InputError(f"k must be at least 1; got {k}")
        super().__init__(inner)
        self.k, self.differentiable = k, inner.differentiable

    @property
    def name(self) -> str:
        """What to call the model in a report."""
        return f"{self.inner.name}, mean of {self.k}"

    def _forward(self, x: Tensor) -> Any:
        self.forwards += (self.k - 1) * len(x)
        return torch.stack([self.inner(x) for _ in range(self.k)]).mean(0)

    def gradient(
        self, x: Tensor, y: Tensor, loss: Objective, precision: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient at the mean output; see `Model.gradient`."""
        if not self._open:
            with self.session():
                return self.gradient(x, y, loss, precision)
        found = super().gradient(x, y, loss, precision)
        self.backwards += (self.k - 1) * len(x)
        return found


class Guided(Around):
    """One model's outputs with another one's gradient: how a black box is attacked by transfer.

    model(x) = target(x), and `gradient` is that of the surrogate's objective at x, so that every
    gradient attack climbs on the surrogate, while the target tells what was reached and when a
    sample is broken. A step costs a query of the target and a gradient of the surrogate.

    Parameters
    ----------
    target : the `Model` that is attacked and measured; it may be a black box.
    surrogate : a differentiable `Model` of the same classes.

    Notes
    -----
    Source: Papernot, McDaniel and Goodfellow (2016); choosing among the points of the path by
    the target is added here.
    """

    differentiable = True

    def __init__(self, target: Model, surrogate: Model) -> None:
        if not surrogate.differentiable:
            raise InputError(f"a surrogate needs gradients, and {surrogate.name} is a black box")
        super().__init__(target)
        self.surrogate = surrogate

    @property
    def name(self) -> str:
        """What to call the model in a report."""
        return f"{self.inner.name} by way of {self.surrogate.name}"

    def settle(self, x: Tensor, y: Tensor | None = None) -> None:
        """Decide what both models' outputs mean, and check that it is the same."""
        super().settle(x, y)
        self.surrogate.settle(x, y)
        mine, other = ((m.task, m.num_classes) for m in (self.inner, self.surrogate))
        if mine != other:
            raise InputError(
                f"the surrogate does {other[0]} with {other[1]} classes, the target {mine[0]} "
                f"with {mine[1]}: they must be for the same task"
            )

    def gradient(
        self, x: Tensor, y: Tensor, loss: Objective, precision: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the surrogate's gradient, the target's objective and output."""
        gradient, _, _ = self.surrogate.gradient(x, y, loss, precision)
        with torch.no_grad():
            output = self(x)
        self.backwards += len(x)
        return gradient, loss.look(output, y)[0], output

    def _forward(self, x: Tensor) -> Any:
        return self.inner(x)

    def affine(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Return the target's (W, b), if it is affine."""
        return self.inner.affine(shape)

    def rounding(self, size: Tensor) -> Tensor:
        """Bound what the target's arithmetic does; see `Model.rounding`."""
        return self.inner.rounding(size)

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self.surrogate._move(device)

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        with super()._prepared(), self.surrogate.session():
            yield
