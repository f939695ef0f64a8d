"""Torch modules as models: evaluated, differentiated by the input, and left as they were."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from robustlearn.errors import InputError
from robustlearn.models.base import Model
from robustlearn.models.graph import Network
from robustlearn.models.trace import trace


class Standardize(nn.Module):
    """(x − shift) / divisor + offset, feature by feature, for (n, d) input."""

    shift: Tensor
    divisor: Tensor
    offset: Tensor

    def __init__(self, shift: Any, divisor: Any, offset: Any) -> None:
        super().__init__()
        for name, value in (("shift", shift), ("divisor", divisor), ("offset", offset)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Scale a batch."""
        return (x - self.shift) / self.divisor + self.offset


AFFINE = {
    nn.Linear,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    Standardize,
}
DTYPES = (torch.float32, torch.float64)


class TorchModel(Model):
    """A `torch.nn.Module` in evaluation mode.

    A final softmax or sigmoid module is bypassed: its input is the logits.
    """

    differentiable = True

    def __init__(self, module: nn.Module, source: Any = None, **options: Any) -> None:
        super().__init__(module if source is None else source, **options)
        self.module = module
        self._head: nn.Module | None = None
        self._writes = False
        heads = [m for m in module.modules() if isinstance(m, nn.Softmax | nn.Sigmoid)]
        self._suspects = heads if self._probabilities is None else []
        floats = [v for v in (*module.parameters(), *module.buffers()) if v.is_floating_point()]
        self.device = floats[0].device if floats else torch.device("cpu")
        self.dtype = floats[0].dtype if floats else torch.get_default_dtype()
        if self.dtype not in DTYPES:
            raise InputError(
                f"{self.name} computes in {self.dtype}; distances are measured in float32 or "
                "float64: call .float() on the network first"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits (n, K), or predictions (n,) of a regressor.

        Once a batch has shown that the outputs are plain logits, and that the module does not
        write into its input, the rest of a session goes straight through.
        """
        if self._known and self._open and x.requires_grad and x.dtype is self.dtype:
            self.forwards += len(x)
            return self.module(x)
        before = x.detach().clone()
        output = super().__call__(x)
        known = self._plain and self._probabilities is False and not self._writes
        known = known and self._head is None and x.requires_grad
        self._known = known and torch.equal(x.detach(), before)
        return output

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Hold the module in evaluation mode, its parameters frozen; see `Model.session`."""
        try:
            with super().session():
                yield
        finally:
            self._known = self._known and self._open

    def _forward(self, x: Tensor) -> Any:
        if self._suspects and self.task != "regression":
            self._find_head(x[:1])
        point = x.to(self.device, self.dtype)
        if self._writes or not x.requires_grad:  # the caller's input must not be written to
            point = point.clone()
        try:
            return self._through(point)
        except RuntimeError as error:
            if "a leaf Variable that requires grad" not in str(error):
                raise
        self._writes = True  # it works in place: from now on it gets a copy
        return self._through(point.clone())

    def _through(self, point: Tensor) -> Any:
        if self._head is None:
            return self.module(point)
        own = vars(self._head)  # by no hook: the softmax would still run, and be recorded
        kept, own["forward"] = own.get("forward"), lambda x: x
        try:
            return self.module(point)
        finally:
            del own["forward"]
            if kept is not None:
                own["forward"] = kept

    def _find_head(self, x: Tensor) -> None:
        """Look for a softmax or sigmoid that runs once, and whose output is the network's."""
        suspects = self._suspects
        seen: list[tuple[nn.Module, Tensor]] = []

        def remember(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen.append((module, output))

        hooks = [module.register_forward_hook(remember) for module in suspects]
        try:
            with torch.no_grad():
                output = self.module(x.to(self.device, self.dtype, copy=True))
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(output, Tensor) or output.dim() not in (1, 2):
            self._suspects = []
            return
        single = output.dim() == 1 or output.shape[1] == 1
        if single and self.task is None:
            return  # it may be a regressor with a bounded output
        self._suspects = []
        last = [module for module, result in seen if result is output]
        if len(last) != 1 or sum(module is last[0] for module, _ in seen) != 1:
            return
        if isinstance(last[0], nn.Sigmoid) == single:
            self._head, self._probabilities = last[0], False
            self.note(
                f"{self.name} ends in {type(last[0]).__name__}: the logits before it are used "
                "instead, because saturated probabilities hide the gradient"
            )

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.module.modules()]
        learning = [p for p in self.module.parameters() if p.requires_grad]
        try:
            self.module.eval()
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
            for module, training in modes:
                module.training = training

    def _move(self, device: torch.device) -> None:
        self.module.to(device)
        self.device = device

    def affine(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Return (W, b) of a chain of affine layers; W from autograd in float64."""
        chain = self._affine_chain(shape)
        if chain is None:
            return None
        origin = torch.zeros(1, *shape, dtype=torch.float64)

        def function(x: Tensor) -> Tensor:
            output = chain(x).reshape(-1)
            if self.task == "classification" and len(output) == 1:
                return torch.cat([torch.zeros_like(output), output])
            return output

        weight = torch.autograd.functional.jacobian(function, origin)
        return weight.reshape(len(weight), -1), function(origin)

    def recorded(self, x: Tensor) -> Network:
        """Return the network in normal form; see `Model.recorded`."""
        point = x[:1].to(self.device, self.dtype)
        with self.session():
            if self._suspects and self.task != "regression":
                self._find_head(point)
            if self._probabilities:
                raise InputError(
                    f"{self.name} returns probabilities: return logits to have it bounded"
                )
            return trace(self._columns, point)

    def _columns(self, point: Tensor) -> Tensor:
        """Return logits (n, K), or predictions (n, 1), without looking at their values."""
        output = self._through(point)
        output = getattr(output, "logits", output)
        output = output.reshape(len(point), -1)
        single = output.shape[1] == 1 and self.task != "regression"
        return nn.functional.pad(output, (1, 0)) if single else output

    def rounding(self, size: Tensor) -> Tensor:
        """Bound what rounding does to any output of an affine chain, where |x| ≤ size.

        u·Σ(terms of a layer)·(|W_L|(…(|W_1|·size + |b_1|)…) + |b_L|), u the unit roundoff of the
        dtype: each layer's dot products err by γ of the sizes that enter them (Higham, 2002).

        Parameters
        ----------
        size : (n, *shape) in float64.

        Returns
        -------
        (n,) the largest over the outputs.
        """
        chain = self._affine_chain(tuple(size.shape[1:]))
        if chain is None:
            return torch.full((len(size),), torch.inf, dtype=torch.float64)
        for layer in chain:
            for name, value in (*layer.named_parameters(), *layer.named_buffers()):
                if value.is_floating_point() and name != "running_var":
                    value.copy_(-value.abs() if name in ("running_mean", "shift") else value.abs())
        terms = sum(4 + _terms(layer, size) for layer in chain)
        output = chain(size).reshape(len(size), -1).amax(1)
        return torch.finfo(self.dtype).eps / 2 * terms * output

    def layers(self, shape: tuple[int, ...]) -> nn.Sequential | None:
        """Return a float64 copy of the layers before the logits; None if these are unknown."""
        if self._suspects and self.task != "regression":
            with self.session(), torch.no_grad():
                self._find_head(torch.zeros(1, *shape, dtype=self.dtype, device=self.device))
        if self._probabilities:
            return None
        leaves = [leaf for leaf in chain_of(self.module) if leaf is not self._head]
        chain = copy.deepcopy(nn.Sequential(*leaves)).to("cpu", torch.float64)
        return chain.eval().requires_grad_(False)

    def _affine_chain(self, shape: tuple[int, ...]) -> nn.Sequential | None:
        """Return the layers if all of them are affine."""
        chain = self.layers(shape)
        return chain if chain is not None and all(is_affine(leaf) for leaf in chain) else None

    def _recognise(self, output: Tensor) -> bool:
        """Tell probabilities from logits; an affine network cannot give probabilities."""
        affine = self._head is None and all(is_affine(leaf) for leaf in chain_of(self.module))
        return False if affine else super()._recognise(output)


class Rows(nn.Module):
    """Flatten every sample, single numbers included."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, d)."""
        return x.reshape(len(x), -1)


def _terms(layer: nn.Module, size: Tensor) -> int:
    """How many numbers are added up for one output of an affine layer."""
    weight = getattr(layer, "weight", None)
    return (weight if isinstance(weight, Tensor) else size).shape[1:].numel()


def chain_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers of nested plain Sequentials in order."""
    if type(module) is not nn.Sequential or _altered(module):
        return [module]
    return [leaf for child in module for leaf in chain_of(child)]


def _altered(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_affine(leaf: nn.Module) -> bool:
    """Tell a layer that is affine in evaluation mode, by its exact type."""
    if type(leaf) is Rows:
        return True
    untracked = isinstance(leaf, nn.modules.batchnorm._BatchNorm) and leaf.running_mean is None
    return type(leaf) in AFFINE and not untracked and not _altered(leaf)
