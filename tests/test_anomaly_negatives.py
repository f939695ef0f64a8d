"""The mechanism in two dimensions: where negatives lie, and what harder ones are good for."""

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from robustlearn.anomaly import HardNegativeDetector
from robustlearn.anomaly.critics import Critics, Recipe, bags, train
from robustlearn.anomaly.negatives import FAR, NEAR, Generator, Shells, ascended
from robustlearn.anomaly.neighbors import Reference


def ring(rows, seed):
    """Rows around a circle of radius 2, and what to expect of a detector: what is off the ring."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(rows, generator=generator)
    radius = 2 + 0.1 * torch.randn(rows, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def shells(rows):
    return Shells(rows, Reference(rows).nearest(rows)[0].mean(1))


def trained(rows, seed, *, steps=200, ascent=2, network=False):
    """Return critics, their generator and the shells, after some rounds of the game."""
    generator = torch.Generator().manual_seed(seed)
    critics = Critics(2, 2, 32, generator)
    placer = Generator(2, generator) if network else None
    recipe = Recipe(steps, 64, 5e-3, "non_saturating", ascent)
    train(critics, placer, bags(len(rows), 2, generator), shells(rows), recipe, generator)
    return critics, placer, generator


def test_negatives_lie_on_shells_and_half_of_them_change_some_features_only():
    rows, generator = torch.randn(50, 6, dtype=torch.float64), torch.Generator().manual_seed(0)
    around = shells(rows)
    drawn = around.sample(torch.randint(0, 50, (3, 400), generator=generator), generator)
    moved = drawn.points - drawn.base
    torch.testing.assert_close(moved.norm(dim=2), drawn.radius)
    spacing = around.spacing
    assert drawn.radius.min() >= NEAR * spacing.min()
    assert drawn.radius.max() <= FAR * spacing.max()
    some = (moved == 0).any(2).double().mean()
    assert 0.35 < some < 0.5


def test_the_ascent_stays_on_the_shell_and_finds_its_best_point():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    start = shells(rows).sample(torch.randint(0, 40, (2, 64), generator=generator), generator)
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    moved = ascended(lambda x: x @ slope, start, 60)
    torch.testing.assert_close((moved.points - moved.base).norm(dim=2), start.radius)
    best = start.base @ slope + start.radius * slope.norm()  # of a linear critic, in closed form
    torch.testing.assert_close(moved.points @ slope, best, rtol=1e-3, atol=1e-3)


def test_a_generator_places_negatives_outside_the_level_set_close_to_it_and_spread_out():
    rows = ring(100, 0)
    critics, placer, generator = trained(rows, 0, steps=400, ascent=0, network=True)
    drawn = shells(rows).sample(torch.randint(0, 100, (2, 500), generator=generator), generator)
    anywhere = 8 * torch.rand(500, 2, generator=generator) - 4
    with torch.no_grad():
        made = placer(drawn, generator)
        placed, fell, far = critics(made.points), critics(drawn.points), critics.of_all(anywhere)
    outside, by_chance = ((logits < 0).double().mean() for logits in (placed, fell))
    assert outside > 0.8 > by_chance + 0.2
    assert placed.abs().median() < 0.5 * far.abs().median()
    unit = (made.points - made.base) / made.radius[..., None]
    assert unit.mean((0, 1)).norm() < 0.5


def accepted(critics, rows, fresh):
    """Return the share of the plane that critics accept with 95% of the rows, and of fresh rows."""
    grid = torch.cartesian_prod(*[torch.linspace(-4, 4, 40)] * 2)
    with torch.no_grad():
        known, anywhere, new = (critics.of_all(x).mean(0) for x in (rows, grid, fresh))
    threshold = known.quantile(0.05)
    return [float((found >= threshold).double().mean()) for found in (anywhere, new)]


def test_the_accepted_region_shrinks_over_rounds_while_normal_rows_stay_in():
    """On a ring negatives that are moved shrink it less: some come to lie among normal rows."""
    rows, fresh = ring(400, 0), ring(400, 1)
    areas = {}
    for ascent, share in ((0, 0.5), (2, 0.97)):
        (before, kept), (after, still) = (
            accepted(trained(rows, 0, steps=steps, ascent=ascent)[0], rows, fresh)
            for steps in (25, 400)
        )
        assert after < share * before
        assert min(kept, still) > 0.88
        areas[ascent] = after
    assert areas[2] > areas[0] + 0.1


def test_a_generator_spreads_its_points_where_the_critic_is_indifferent():
    """All directions alike at first; only the term of dispersion is left to move it."""
    generator = torch.Generator().manual_seed(0)
    placer = Generator(2, generator)
    with torch.no_grad():
        placer.layers[-1].bias.copy_(torch.tensor([20.0, 0.0]))
    rows = torch.randn(64, 2, generator=generator)
    drawn = shells(rows).sample(torch.arange(64)[None], generator)
    placer.optimizer.param_groups[0]["lr"] = 0.1

    def mean_direction(made):
        return float(((made.points - made.base) / made.radius[..., None]).mean((0, 1)).norm())

    first = mean_direction(placer.trained(lambda x: 0 * x.sum(2), drawn, generator))
    for _ in range(60):
        last = placer.trained(lambda x: 0 * x.sum(2), drawn, generator)
    assert first > 0.8
    assert mean_direction(last) < 0.3


def test_negatives_that_are_moved_make_better_critics():
    """On several seeds; the same number of steps for both, other negatives alone."""
    features, gains = 8, []
    for seed in range(4):
        random = np.random.default_rng(seed)
        basis = random.normal(size=(2, features))
        normal = random.normal(size=(900, 2)) @ basis + 0.1 * random.normal(size=(900, features))
        strange = normal[600:] + 0.5 * random.normal(size=(300, features))
        auroc = [
            roc_auc_score(
                np.r_[np.zeros(300), np.ones(300)],
                HardNegativeDetector(
                    kind="logit", ascent_steps=ascent, steps=150, critics=2, random_state=seed
                )
                .fit(normal[:300])
                .anomaly_score(np.r_[normal[300:600], strange]),
            )
            for ascent in (0, 2)
        ]
        gains.append(auroc[1] - auroc[0])
    assert np.mean(gains) > 0
    assert sum(gain > 0 for gain in gains) >= 3
