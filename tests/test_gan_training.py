"""What the trainer promises: exact resume, figures, warnings with a remedy, clear refusals."""

import contextlib
import doctest
import math
import warnings

import pytest
import torch
from gans import fitted, networks
from torch import nn

from robustlearn.errors import InputError
from robustlearn.gan import (
    GanGame,
    Watch,
    game,
    losses,
    mixtures,
    training,
    updates,
)
from robustlearn.gan.mixtures import grid, perceptron, ring

# ------------------------------------------------------------------ exact resume


def stopping(at):
    """A progress bar that stops training."""

    def progress(moment):
        if moment.epoch * moment.steps + moment.step == at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("loss", "optimizer", "order"),
    [
        ("relativistic_paired", "adam", "extragradient"),
        ("began:rate=0.1", "optimistic_adam", "alternating"),
        ("wasserstein", "optimistic_sgd", "simultaneous"),
    ],
)
def test_a_resumed_run_ends_with_equal_bits(tmp_path, loss, optimizer, order):
    def run(out=None, **more):
        torch.manual_seed(0)
        pair = networks(zero=False)
        if loss.startswith("began"):
            pair = pair[0], perceptron(2, 2, width=16)
        given = {"loss": loss, "optimizer": optimizer, "order": order, "epochs": 3, "ema": 0.9}
        given |= {"penalty": "r1:weight=0.01 + gradient_penalty:weight=0.1", "lr": 1e-3}
        return fitted(*pair, out=out, **given, **more)

    whole = run()
    with contextlib.suppress(KeyboardInterrupt):
        run(tmp_path, progress=stopping(6), save_every=0.0)
    resumed = run(tmp_path, resume=True)
    for name, weights in whole.history.weights.items():
        again = resumed.history.weights[name]
        assert all(torch.equal(value, again[key]) for key, value in weights.items())
    assert resumed.game.loss.state == whole.game.loss.state
    for mine, theirs in zip(whole.history.rows, resumed.history.rows, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_the_last_weights_are_kept_or_the_best():
    for keep in ("last", "best"):
        result = fitted(keep=keep, epochs=4, lr=0.02, ema=0.5)
        rows = [row["validation"] for row in result.history.rows]
        closest = min(range(4), key=lambda i: rows[i]["sliced_wasserstein"])
        assert result.history.best == (3 if keep == "last" else closest)
        assert result.figures == rows[result.history.best]
        weights = result.history.weights["generator"]
        assert all(torch.equal(v, weights[k]) for k, v in result.generator.state_dict().items())


def test_samples_are_those_of_their_seed():
    result = fitted()
    assert result.sample(5).equal(result.sample(8)[:5])
    assert not result.sample(5, seed=1).equal(result.sample(5))


# ------------------------------------------------------------------ diagnostics


def watching(critic, generator=None, *, loss="minimax", epochs=1, known=None, real=None):
    generator = networks()[0] if generator is None else generator
    modules = {"generator": generator, "critic": critic}
    played = GanGame(modules, {}, 2, losses.get(loss))
    real = ring().sample(300) if real is None else real
    return Watch(played, real, torch.empty(len(real), 0), epochs=epochs, known=known), modules


class Sure(nn.Module):
    """A critic that knows the ring: +10 on it, −10 elsewhere."""

    def forward(self, x):
        return torch.where((x.norm(dim=1) - 1).abs() < 0.1, 10.0, -10.0)


class Still(nn.Module):
    """A generator whose samples are given."""

    def __init__(self, points):
        super().__init__()
        self.points = nn.Parameter(points)

    def forward(self, z):
        return self.points[torch.arange(len(z)) % len(self.points)]


@pytest.mark.parametrize("loss", ["minimax", "non_saturating", "relativistic_paired"])
def test_a_vanishing_gradient_is_told_with_its_remedy(loss):
    """Against one and the same sure critic only the saturating loss is at a loss."""
    watch, modules = watching(Sure(), Still(torch.zeros(4, 2)), loss=loss, epochs=9)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figures = watch(modules)
    assert figures["accuracy"] > 0.95
    assert figures["pull"] == pytest.approx(4.5e-5 if loss == "minimax" else 1.0, rel=0.05)
    assert [str(w.message) for w in told if "vanishes" in str(w.message)] == [
        str(w.message) for w in told
    ]
    assert len(told) == (loss == "minimax")
    if told:
        assert "non_saturating" in str(told[0].message)
        assert not watch.warned ^ {"vanishing"}


def test_collapse_is_told_in_the_second_half():
    mixture = ring()
    lost = Still(mixture.centres[:3] + 0.001)
    for known, said in ((mixture, "3 of 8 modes"), (None, "of the real samples lie")):
        for epochs, warned in ((1, True), (10, False)):
            watch, modules = watching(networks()[1], lost, loss="hinge", epochs=epochs, known=known)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                watch(modules)
                watch(modules)
            assert len(told) == warned
            assert all(said in str(w.message) and "packing" in str(w.message) for w in told)
    watch, modules = watching(networks()[1], lost, epochs=10, known=mixture)
    watch.game.settled, watch.game.epoch = 8, 7
    watch(modules)  # penalties still fall: no warning, or the test fails
    watch.game.epoch = 8
    with pytest.warns(UserWarning, match="3 of 8 modes"):
        watch(modules)
    away, modules = watching(networks()[1], Still(mixture.centres * 1.2))
    away(modules)  # far from all modes alike: no collapse
    good, modules = watching(networks()[1], Still(mixture.sample(300, seed=5)), known=mixture)
    figures = good(modules)  # no warning, or the test fails
    assert (figures["modes"], figures["accuracy"]) == (8, 0.5)
    assert figures["high_quality"] > 0.95
    assert abs(figures["mmd"]) < 0.01


@pytest.mark.parametrize("far", [100.0, math.nan])
def test_divergence_is_told(far):
    watch, modules = watching(networks()[1], epochs=9)
    modules["generator"] = Still(torch.full((5, 2), far))
    with pytest.warns(UserWarning, match="diverges.*Lower the learning rates"):
        watch(modules)


@pytest.mark.parametrize(
    ("figures", "troubles"),
    [
        ({}, []),
        ({"accuracy": 0.99, "pull": 0.02}, []),  # a sure critic whose generator still moves
        ({"pull": 1e-3}, []),  # a generator that moves little because it deceives
        ({"accuracy": 0.96, "pull": 0.009}, ["vanishing"]),
        ({"precision": 0.9, "recall": 0.5}, []),
        ({"precision": 0.9, "recall": 0.4}, ["collapse"]),
        ({"sliced_wasserstein": 1.9}, []),
        ({"sliced_wasserstein": 2.1}, ["divergence"]),
        ({"scores": 2e4}, ["divergence"]),
    ],
)
def test_what_counts_as_trouble(figures, troubles):
    watch, _ = watching(networks()[1])
    watch.first = 1.0
    fine = {"accuracy": 0.6, "pull": 0.4, "precision": 0.8, "recall": 0.7, "scores": 3.0}
    assert watch.troubles({**fine, "sliced_wasserstein": 0.1, **figures}) == troubles


@pytest.mark.parametrize(
    ("data", "unknown"),
    [
        ((torch.arange(128).reshape(64, 2) % 11 == 0).float(), set()),
        (torch.ones(64, 2), set()),
        (torch.tensor([[0.0, 1.0], [2.0, 0.5], [1.0, 0.0]]), {"precision", "recall"}),
        (torch.zeros(1, 2), {"precision", "recall", "mmd"}),
    ],
    ids=["discrete", "constant", "three samples", "one sample"],
)
def test_figures_of_data_that_repeats_or_is_scarce(data, unknown):
    figures = fitted(data=data).figures
    assert {name for name, value in figures.items() if math.isnan(value)} == unknown


def test_gradients_of_both_players_are_in_the_rows():
    """A critic at 0 with a flat last layer gives the generator no gradient at first."""
    found = fitted(lr=0.0, penalty="").history.rows[0]["metrics"]
    assert found["generator_gradient"] == 0.0
    assert found["critic_gradient"] > 0.01


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": "random"}, "order is one of"),
        ({"critic_steps": 0}, "critic_steps must be a whole number"),
        ({"noise": 2.5}, "noise must be a whole number"),
        ({"noise": "2"}, "noise must be a whole number"),
        ({"auxiliary": -1.0}, "auxiliary must be"),
        ({"anneal": 0.5}, "anneal must be"),
        ({"critic_steps": 2, "order": "simultaneous"}, "only where players alternate"),
        ({"packing": 2, "loss": "began"}, "packing=1"),
        ({"keep": "first"}, "keep is one of"),
        ({"optimizer": "newton"}, "optimizer is one of"),
        ({"precision": "fp16"}, "bf16"),
        ({"accumulate": 2, "critic_steps": 2}, "accumulate=1"),
        ({"loss": "began"}, "reconstruction"),
        ({"auxiliary": 1.0}, "Judgement with classes"),
        ({"penalty": "r7"}, "no penalty"),
        ({"compare": 0}, "compare must be a whole number"),
        ({"compare": 2}, "compare must be a whole number"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        fitted(**options)


@pytest.mark.parametrize("module", [updates, game, mixtures, training])
def test_the_examples_of_the_docstrings(module):
    assert doctest.testmod(module, raise_on_error=True).attempted


def test_mixtures_have_their_modes():
    for mixture, modes in ((ring(), 8), (grid(), 25)):
        assert mixture.centres.shape == (modes, 2)
        x = mixture.sample(5000)
        away = torch.cdist(x, mixture.centres).min(1).values
        assert float(away.square().mean()) == pytest.approx(2 * mixture.std**2, rel=0.1)
