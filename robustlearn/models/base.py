"""What every wrapped model promises: logits or predictions, counted, and no trace left behind."""

import contextlib
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from robustlearn._tensor import is_out_of_memory
from robustlearn.errors import InputError, ModelError
from robustlearn.models.graph import Network
from robustlearn.models.trees import Trees

Task = Literal["classification", "regression"]
Output = Literal["auto", "logits", "probabilities"]
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LOOKED_AT = 256  # samples whose outputs tell what kind they are


class Objective(Protocol):
    """What an attack climbs."""

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective (n,) and its derivative by the output."""
        ...


class Model(ABC):
    """A classifier as ``(n, *shape) -> (n, K)`` logits, or a regressor as ``-> (n,)``.

    A classifier with one logit z becomes two columns (0, z); probabilities become logits. After
    any call the wrapped object, its gradients and every global random state are as before, and
    the input is untouched.

    Attributes
    ----------
    task : ``"classification"``, ``"regression"``, or None while that is open.
    classes : labels in the order of the columns, or None for 0 … K−1.
    num_classes : K, or None while unknown.
    differentiable : whether `gradient` works.
    device, dtype : where and in which type the model computes.
    forwards, backwards : samples sent through so far.
    notes : what was noticed about the model and should be told.
    """

    differentiable = False
    device = torch.device("cpu")
    dtype = torch.float64

    def __init__(
        self,
        source: Any,
        *,
        task: Task | None = None,
        classes: np.ndarray | None = None,
        num_classes: int | None = None,
        output: Output = "auto",
    ) -> None:
        if task not in (None, "classification", "regression"):
            raise InputError(f"task must be 'classification' or 'regression'; got {task!r}")
        if output not in ("auto", "logits", "probabilities"):
            raise InputError(f"output must be auto, logits or probabilities; got {output!r}")
        self.source, self.task, self.classes = source, task, classes
        self.num_classes = len(classes) if classes is not None else num_classes
        self.forwards = self.backwards = 0
        self.notes: list[str] = []
        self._probabilities = {"auto": None, "logits": False, "probabilities": True}[output]
        self._open = False
        self._plain = False  # whether the last raw output was columns of a tensor
        self._known = False  # whether plain logits come out, and the input was left alone

    @abstractmethod
    def _forward(self, x: Tensor) -> Any:
        """Return the raw output of the wrapped object."""

    @property
    def name(self) -> str:
        """What to call the model in a report."""
        steps = getattr(self.source, "steps", None)
        if isinstance(steps, list):
            return " → ".join(type(step).__name__ for _, step in steps)
        named = getattr(self.source, "__name__", None)
        return str(named or type(self.source).__name__)

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits (n, K), or predictions (n,) of a regressor."""
        output = self.raw(x)
        if output.dim() == 2 and output.shape[1] >= 2:
            self.task = self.task or "classification"
            return self._logits(output)
        column = output.reshape(len(x))
        if self.task is None:
            raise InputError(
                "the model has one output: say wrap(model, task='regression'), or "
                "task='classification' if it is the logit of class 1 against class 0"
            )
        return column if self.task == "regression" else self._logits(column)

    def raw(self, x: Tensor) -> Tensor:
        """Return the output as the model gives it, checked and counted: (n,), (n, 1) or (n, K)."""
        if not self._open:
            with self.session():
                return self.raw(x)
        try:
            output = self._forward(x)
        except InputError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"{self.name} failed on a batch of shape {tuple(x.shape)} and type "
                f"{x.dtype}: {type(error).__name__}: {error}. Is that the shape of input "
                "it expects?"
            ) from error
        self.forwards += len(x)
        return self._checked(output, x)

    def gradient(
        self, x: Tensor, y: Tensor, loss: Objective, precision: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One forward and one backward pass: ∂ objective(model(x), y) / ∂x per sample.

        Parameters
        ----------
        loss : what has ``look(output, y)``: an objective and its derivative by the output.
        precision : ``"bfloat16"`` or ``"float16"`` lets torch compute matrix products and
            convolutions of a float32 model in that type, which is faster where the machine has
            instructions for it; all that is returned is then rounded to its 2 or 3 digits, and
            what matters must be looked at again by ``model(x)``.

        Returns
        -------
        gradient (n, *shape), objective (n,), output (n, K) or (n,); all detached. Gradients of the
        parameters are not computed. A derivative that is NaN counts as zero.

        Raises
        ------
        InputError for a model that cannot be differentiated.
        """
        if not self.differentiable:
            raise InputError(f"{self.name} is a black box: it has no gradient")
        if not self._open:
            with self.session():
                return self.gradient(x, y, loss, precision)
        with torch.enable_grad():
            point = x.detach() if self._known else x.detach().clone()
            output = self._in(precision, point.requires_grad_())
            if not output.requires_grad:
                raise ModelError(
                    f"no gradient flows from the output of {self.name} to its input (is the input "
                    "detached, rounded or turned into numpy on the way?); wrap it as a black box, "
                    "wrap(lambda x: model(x)), to attack it without gradients"
                )
            detached = output.detach()
            value, slope = loss.look(detached, y)
            (gradient,) = torch.autograd.grad(output, point, slope, allow_unused=True)
        self.backwards += len(x)
        if gradient is None:
            gradient = torch.zeros_like(x)
        return gradient.contiguous().nan_to_num_(0.0), value, detached

    def _in(self, precision: str | None, x: Tensor) -> Tensor:
        """Return what `gradient` differentiates, as computed in a lower precision."""
        if precision is None:
            return self._climbed(x)
        if precision not in PRECISIONS:
            raise InputError(f"precision must be {' or '.join(PRECISIONS)}; got {precision!r}")
        with torch.autocast(self.device.type, PRECISIONS[precision]):
            output = self._climbed(x)
        return output.to(self.dtype)

    def _climbed(self, x: Tensor) -> Tensor:
        """Return the output that `gradient` differentiates."""
        return self(x)

    def affine(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Return (W, b) in float64 with output = W·flat(x) + b exactly, or None.

        W is (K, d) for the logits of a classifier, (1, d) for a regressor.
        """
        return None

    @property
    def trees(self) -> Trees | None:
        """The leaves that the outputs are the sums of, where they are known."""
        return None

    def recorded(self, x: Tensor) -> Network:
        """Return the network in normal form, in float64: outputs (n, K), or (n, 1) of a regressor.

        Parameters
        ----------
        x : (n, *shape) samples, the first of which it runs on.

        Raises
        ------
        InputError naming what cannot be recorded.
        """
        raise InputError(f"{self.name} is a black box: there is no network to bound")

    def settle(self, x: Tensor, y: Tensor | None = None) -> None:
        """Decide, while that is open, what the outputs mean: logits, probabilities, predictions.

        Looked at are the outputs for the first samples of x, and the labels if there is one
        output only.
        """
        if self.task is not None and (self.task == "regression" or self._probabilities is not None):
            return
        some = x[:LOOKED_AT]
        try:
            with torch.no_grad():
                output = self.raw(some)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(some) == 1:
                raise
            return self.settle(some[: len(some) // 2], y)
        single = output.dim() == 1 or output.shape[1] == 1
        if self.task is None and (not single or y is not None):
            self.task = "classification" if not single or y is None else self._meant_by(y)
        if self.task == "classification":
            with torch.no_grad():
                self(some)

    def _meant_by(self, y: Tensor) -> Task:
        """Tell from the labels what a single output is."""
        if y.is_floating_point() and bool((y != y.round()).any()):
            return "regression"
        if bool(((y == 0) | (y == 1)).all()):
            return "classification"
        raise InputError(
            "the model has one output and the labels are whole numbers other than 0 and 1: "
            "say wrap(model, task='regression') if they are targets to predict"
        )

    # ------------------------------------------------------------------ leaving no trace

    @contextlib.contextmanager
    def on(self, device: Any) -> Iterator[None]:
        """Compute on another device for a while; ``"auto"`` is the accelerator, None no change."""
        if device == "auto":
            device = torch.accelerator.current_accelerator()
        if device is None:
            yield
            return
        try:
            device = torch.device(device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise InputError(f"the device {str(device)!r} cannot be used: {error}") from error
        before = self.device
        self._move(device)
        try:
            yield
        finally:
            self._move(before)

    def _move(self, device: torch.device) -> None:
        """Change the device; black boxes stay where they are."""
        return

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Hold the model ready for evaluation, and put everything back at the end. Nests."""
        if self._open:
            yield
            return
        self._open = True
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_open", False)
            stack.enter_context(global_random_state())
            stack.enter_context(self._prepared())
            yield

    def rounding(self, size: Tensor) -> Tensor:
        """Bound what the model's arithmetic does to an output of an affine model, |x| ≤ size."""
        return torch.full((len(size),), torch.inf, dtype=torch.float64)

    def _prepared(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    # ------------------------------------------------------------------ outputs

    def note(self, text: str) -> None:
        """Keep what was noticed for the report, and warn once."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, UserWarning, stacklevel=2)

    def _checked(self, output: Any, x: Tensor) -> Tensor:
        self._plain = isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] >= 2
        if not isinstance(output, Tensor):
            output = getattr(output, "logits", output)  # transformers wrap theirs
        if not isinstance(output, Tensor):
            try:
                output = torch.as_tensor(np.asarray(output), device=x.device)
            except (TypeError, ValueError):
                raise ModelError(
                    f"{self.name} returned a {type(output).__name__}, not an array of outputs"
                ) from None
        if output.dim() not in (1, 2) or len(output) != len(x) or output.numel() == 0:
            raise ModelError(
                f"{self.name} returned shape {tuple(output.shape)} for {len(x)} samples; expected "
                f"({len(x)}, classes) logits or ({len(x)},) predictions"
            )
        if not output.is_floating_point() and not self._labels_allowed(output):
            raise ModelError(
                f"{self.name} returned {output.dtype}, not real numbers; if these are predicted "
                "labels, say how many classes there are: wrap(model, num_classes=…)"
            )
        if self.task == "regression" and output.dim() == 2 and output.shape[1] != 1:
            raise ModelError(f"{self.name} predicts {output.shape[1]} targets; expected one")
        if self.num_classes is None and output.dim() == 2 and output.shape[1] >= 2:
            self.num_classes = output.shape[1]
        return output

    def _labels_allowed(self, output: Tensor) -> bool:
        return False

    def _logits(self, output: Tensor) -> Tensor:
        if self._probabilities is None:
            self._probabilities = self._recognise(output.detach())
        if self._probabilities:
            if bool(((output < -1e-3) | (output > 1 + 1e-3)).any()):
                raise ModelError(
                    f"{self.name} was taken to return probabilities, and returned "
                    f"{float(output.min()):g} to {float(output.max()):g}: say "
                    "wrap(model, output='logits') if these are logits"
                )
            tiny = torch.finfo(output.dtype).tiny
            if output.dim() == 1:
                output = output.clamp_min(tiny).log() - (1 - output).clamp_min(tiny).log()
            else:
                output = output.clamp_min(tiny).log()
        if output.dim() == 1:
            self.num_classes = 2
            output = torch.stack([torch.zeros_like(output), output], 1)
        return output

    def _recognise(self, output: Tensor) -> bool:
        """Tell probabilities from logits, or say that it cannot be told."""
        unit = bool(((output >= 0) & (output <= 1)).all())
        if output.dim() == 1 and unit:
            raise InputError(
                f"the single output of {self.name} lies in [0, 1] for every sample: is it the "
                "probability of class 1 or a logit? Say wrap(model, task='classification', "
                "output='probabilities') or output='logits'"
            )
        if output.dim() == 1 or not unit or bool(((output.sum(1) - 1).abs() > 1e-3).any()):
            return False
        self.note(
            f"{self.name} returns probabilities: their logarithms are used as logits, and "
            "where they are saturated the gradient is lost; return logits if you can, or "
            "say wrap(model, output='logits') if these are logits"
        )
        return True


@contextlib.contextmanager
def global_random_state(seed: int = 0) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global generators inside, and restore them after."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        with _accelerator_random_state(seed):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)


@contextlib.contextmanager
def _accelerator_random_state(seed: int) -> Iterator[None]:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        yield
        return
    devices = list(range(torch.accelerator.device_count()))
    with torch.random.fork_rng(devices, device_type=accelerator.type):
        torch.manual_seed(seed)
        yield
