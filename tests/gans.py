"""Small players for the tests of generators and critics."""

import warnings

import torch

from robustlearn.gan import fit_gan
from robustlearn.gan.mixtures import perceptron, ring


def networks(*, packing=1, zero=True, width=16, inputs=2, noise=2):
    torch.manual_seed(0)
    generator = perceptron(noise, 2, width=width)
    return generator, perceptron(inputs * packing, 1, width=width, zero=zero)


def fitted(*pair, data=None, **options):
    given = {"noise": 2, "epochs": 1, "batch_size": 64, "compare": 200, **options}
    pair = pair or networks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit_gan(*pair, ring().sample(256) if data is None else data, **given)
