"""Adversarial terms to be added to the loss of a task, such as restoring an image.

q = D(G(x)) are the scores (n,) of what the task's network made.
"""

from torch import Tensor
from torch.nn.functional import softplus


def adversarial_cross_entropy(fake: Tensor, *, weight: float = 1.0) -> Tensor:
    """w·(−log s(D(G(x)))) = w·sp(−q), (n,) -> (n,): to be added to the loss of a task.

    Examples
    --------
    >>> import torch
    >>> scores, error = torch.zeros(3), torch.ones(3)
    >>> error + adversarial_cross_entropy(scores, weight=0.1)
    tensor([1.0693, 1.0693, 1.0693])
    """
    return weight * softplus(-fake)


def adversarial_hinge(fake: Tensor, *, weight: float = 1.0, margin: float = 1.0) -> Tensor:
    """w·max(0, m − D(G(x))), (n,) -> (n,): nothing where the critic is deceived by the margin.

    Examples
    --------
    >>> import torch
    >>> adversarial_hinge(torch.tensor([-1.0, 0.5, 3.0]))
    tensor([2.0000, 0.5000, 0.0000])
    """
    return weight * (margin - fake).relu()
