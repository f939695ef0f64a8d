"""Attack one model by way of another."""

from typing import Any

from torch import Tensor

from robustlearn.attacks.base import ATTACKS
from robustlearn.models import Guided, wrap
from robustlearn.threats import LpBall


def transfer(
    model: Any,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    surrogate: Any,
    attack: str = "mi_fgsm",
    **options: Any,
) -> Tensor:
    """Climb on the gradients of a surrogate, and keep what does best on the model itself.

    x_adv = attack(`Guided(model, surrogate)`, x, y, threat): only outputs of the model are used.

    Parameters
    ----------
    model : what is attacked, black boxes included; one query a step.
    x, y, threat : as for the attack.
    surrogate : a differentiable model of the same classes, in whatever `wrap` takes.
    attack : name of a gradient attack.
    options : of the attack.

    Returns
    -------
    (n, *shape), in the threat without tolerance.

    Raises
    ------
    InputError for a surrogate without gradients, or of another task.

    Notes
    -----
    It is not filed under ``ATTACKS``, because it cannot run without a surrogate: give `evaluate`
    the model ``Guided(wrap(target), wrap(surrogate))`` instead, with attacks of your choice.

    Examples
    --------
    >>> import torch
    >>> surrogate = torch.nn.Linear(2, 2)
    >>> def black_box(x):
    ...     return surrogate(x).numpy()
    >>> x, y = torch.zeros(1, 2), torch.tensor([0])
    >>> x_adv = transfer(black_box, x, y, LpBall(2, 0.1), surrogate=surrogate, steps=3)
    >>> x_adv.shape
    torch.Size([1, 2])
    """
    guided = Guided(wrap(model), wrap(surrogate))
    return ATTACKS[attack].function(guided, x, y, threat, **options)
