"""The bracket of a detector: proven ≤ true ≤ attacked, and bounds that no point passes."""

import math

import numpy as np
import pytest
import torch

import robustlearn as rl
from robustlearn.anomaly import HardNegativeDetector, MeanNeighborDetector
from robustlearn.anomaly.neighbors import Density, Reference


def rows(count, seed):
    return np.random.default_rng(seed).normal(size=(count, 3)) * [1.0, 10.0, 0.1]


DETECTORS = {
    "mean distance": MeanNeighborDetector(),
    "by range": MeanNeighborDetector(scaling="range"),
    "by rank": MeanNeighborDetector(scaling="rank"),
    "hard negatives": HardNegativeDetector(steps=20, critics=2, random_state=0),
    "not local": HardNegativeDetector(critics=0, local=False, random_state=0),
}
THREATS = {
    "l1": rl.LpBall(1, 0.3, scale=np.array([1.0, 10.0, 0.1])),
    "l2": rl.LpBall(2, 0.3, scale=np.array([1.0, 10.0, 0.1])),
    "linf": rl.LpBall(math.inf, 0.3, scale=np.array([1.0, 10.0, 0.1])),
    "masked": rl.LpBall(2, 3.0, mask=np.array([True, False, True])),
    "walled": rl.LpBall(math.inf, 5.0, lower=-1.0, upper=1.0, mask=np.array([True, False, True])),
}


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request):
    return DETECTORS[request.param].fit(rows(150, 0))


@pytest.mark.parametrize("name", THREATS)
def test_no_point_of_the_threat_passes_the_bounds(detector, name):
    threat, network = THREATS[name], detector.as_network()
    x = torch.from_numpy(np.r_[rows(10, 1), rows(10, 2) * 3, detector.rows_[:5].numpy()])
    if name == "walled":
        x[:, [0, 2]] = x[:, [0, 2]].clamp(-1, 1)
    low, high = network.enclosed(x, threat)
    moves = torch.cat([threat.sample(x, seed) for seed in range(30)])
    again = x.repeat(30, 1)
    gradient = torch.from_numpy(rows(len(again), 3))
    for delta in (moves, threat.argmax(gradient, again), torch.zeros_like(again)):
        z = network(threat.restrict(again, delta)).detach()
        assert bool((z >= low.repeat(30) - 1e-9).all())
        assert bool((z <= high.repeat(30) + 1e-9).all())


@pytest.mark.parametrize(
    ("dense", "sparse", "reach"), [(-5.0, 5.1, 4.5), (299.0, -106.0, 100.0)], ids=["both", "far"]
)
def test_the_bounds_know_the_density_of_every_row_that_can_become_a_neighbour(dense, sparse, reach):
    """Half-way between dense rows and sparse ones the threat reaches the domain of each.

    The far ones are 299 away, the sixth neighbour 105: within that and twice the reach.
    """
    rows = torch.cat([dense + 0.001 * torch.arange(7.0), sparse + torch.arange(7.0)])
    density = Density(Reference(rows.double()[:, None]))
    here = torch.zeros(1, 1, dtype=torch.float64)
    low, high = density.enclosed(here, torch.tensor([reach]))
    for place in torch.linspace(-reach, reach, 51, dtype=torch.float64):
        scores, _ = density(place.reshape(1, 1))
        assert bool((low[:, :2] <= scores).all())
        assert bool((scores <= high[:, :2]).all())


def test_the_bounds_of_a_mean_distance_are_met_far_from_all_rows():
    """There all neighbours lie in one direction, and the distance to them is linear."""
    detector = MeanNeighborDetector(scaling="none").fit(rows(150, 0))
    x = torch.tensor([[1e6, 0.0, 0.0]], dtype=torch.float64)
    low, high = detector.score_.enclosed(x, rl.LpBall(2, 10.0))
    here = detector.score_(x)
    toward = detector.score_(x - torch.tensor([[10.0, 0.0, 0.0]]))
    assert float(toward - low) < 1e-3
    assert 10.0 - 1e-3 < float(high - here) < 11.0  # and one neighbour more, for a copy


def test_certified_is_at_most_attacked_and_the_radius_is_that_of_the_bound(detector):
    x = np.r_[rows(15, 1) / 2, rows(15, 2) * 6]
    y = detector.predict(x)
    threat = rl.LpBall(2, 0.2, scale=np.array([1.0, 10.0, 0.1]))
    report = rl.evaluate(detector, x, y, threat, attacks=["pgd"])
    assert report.certificate["method"] == "enclosure"
    assert 0 < report.certified.value <= report.attacked.value <= report.clean.value
    found = rl.certify(detector, x, threat)
    for factor, expected in ((0.999, True), (1.001, False)):
        within = rl.LpBall(2, torch.from_numpy(found.radius * factor), scale=threat.scale)
        kept = found.radius > 1e-4
        assert (rl.certify(detector, x, within).certified == expected)[kept].all()


class Slope(torch.nn.Module):
    """Accepts where Σx < 10⁸."""

    def forward(self, x):
        return 1e8 - x.sum(1, keepdim=True)

    def enclosed(self, x, threat):
        z, reach = self(x)[:, 0], threat.support(torch.ones_like(x), x)
        return z - reach, z + reach


def test_an_infinite_radius_is_one_of_the_whole_box():
    """Proven up to about 10⁶, and the boundary at 7·10⁷, the radius was told infinite."""
    model, x = rl.models.TorchModel(Slope(), task="classification"), np.zeros((1, 2))
    for walls, low, high in (
        ({}, 1e6, 1e8 / 2**0.5),
        ({"upper": 1e9}, 1e6, 1e8 / 2**0.5),
        ({"upper": 1e3}, 1e6, 1e8 / 2**0.5),
        ({"lower": -1e3, "upper": 1e3}, math.inf, math.inf),
        ({"mask": [False, False]}, math.inf, math.inf),
    ):
        radius = rl.certify(model, x, rl.LpBall(2, 1.0, **walls), method="enclosure").radius[0]
        assert low <= radius <= high


@pytest.mark.parametrize("places", [(0.0, 0.0), (1e8, 1e8), (-1e8, 1e8)])
def test_distances_far_from_the_origin_are_those_of_differences(places):
    """There products of matrices, by which many features are searched, have lost all digits."""
    random = np.random.default_rng(0)
    x, new = (
        np.concatenate([place + random.normal(size=(count, 20)) for place in places])
        for count in (100, 20)
    )
    detector = MeanNeighborDetector(scaling="none").fit(x)
    threat = rl.LpBall(2, 0.5)
    apart = np.sort(np.linalg.norm(new[:, None] - x, axis=2))[:, :5].mean(1)
    np.testing.assert_allclose(detector.anomaly_score(new), apart, rtol=1e-12)
    low, high = detector.score_.enclosed(torch.from_numpy(new), threat)
    assert (low.numpy() <= apart - 0.49).all()
    assert (apart + 0.49 <= high.numpy()).all()


def test_few_rows_are_searched_twice():
    """Of ordinary data none, also where many distances tie: else the search is no faster."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 20)))
    for points in (x, (x > 0).double(), x.float()):
        reference = Reference(points)
        apart = reference.every(points)[0][:, -1]
        moved = points - reference.centre
        last = torch.from_numpy(reference.index.kneighbors(moved.numpy())[0][:, -1])
        assert not reference._doubtful(points, apart, last.to(points)).any()
