"""The detectors: scikit-learn's contract, scores against definitions, calibration."""

import doctest
import importlib
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks

import robustlearn as rl
from robustlearn.anomaly import HardNegativeDetector, MeanNeighborDetector, conformal, p_values
from robustlearn.anomaly import detector as detector_module
from robustlearn.anomaly.explanation import _restored
from robustlearn.anomaly.scaling import by_range, by_rank
from robustlearn.anomaly.stream import Stream
from robustlearn.errors import InputError
from robustlearn.evaluate.detectors import told_apart
from robustlearn.evaluate.results import Sample

QUICK = {"steps": 20, "batch_size": 32, "critics": 2, "width": 16, "random_state": 0}


def normal(rows, features=3, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, features))


def quick(**options):
    return HardNegativeDetector(**{**QUICK, **options})


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([MeanNeighborDetector(), HardNegativeDetector(**QUICK)])
def test_the_contract_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("name", ["baseline", "conformal", "detector"])
def test_the_examples(name):
    module = importlib.import_module(f"robustlearn.anomaly.{name}")
    assert doctest.testmod(module, raise_on_error=True).attempted


# ---------------------------------------------------------------- scores


def test_the_baseline_is_the_mean_distance_to_the_five_nearest():
    x, new = normal(200), normal(30, seed=1)
    detector = MeanNeighborDetector(scaling="standard").fit(x)
    centre, spread = x.mean(0), x.std(0)
    search = NearestNeighbors(n_neighbors=5).fit((x - centre) / spread)
    expected = search.kneighbors((new - centre) / spread)[0].mean(1)
    np.testing.assert_allclose(detector.anomaly_score(new), expected, rtol=1e-12)


def test_a_training_row_is_not_its_own_neighbour_but_its_copy_is():
    x = np.r_[normal(50), normal(1, seed=7), normal(1, seed=7)]
    detector = MeanNeighborDetector(n_neighbors=1).fit(x)
    scores = detector.anomaly_score(x)
    assert (scores[:50] > 0).all()
    assert (scores[50:] == 0).all()
    np.testing.assert_array_equal(np.sort(-scores), detector.calibration_)


@pytest.mark.parametrize("kind", ["fused", "feature", "logit"])
def test_every_kind_of_score_ranks_far_rows_last(kind):
    detector = quick(kind=kind, steps=150).fit(normal(300))
    scores = detector.anomaly_score(np.r_[normal(50, seed=1), 8 + normal(50, seed=2)])
    assert scores[:50].max() < np.median(scores[50:])


def test_scores_do_not_change_with_the_unit_of_a_feature():
    x, new = normal(200), normal(20, seed=1)
    unit, shift = np.array([1e-3, 1.0, 1e4]), np.array([5.0, 0.0, -100.0])
    before = quick(critics=0).fit(x).score_samples(new)
    after = quick(critics=0).fit(x * unit + shift).score_samples(new * unit + shift)
    np.testing.assert_allclose(after, before, rtol=1e-6)


def test_the_map_by_rank_undoes_a_monotone_transformation_up_to_its_second_half():
    x = torch.from_numpy(normal(100, 1))  # every row a knot
    straight, bent = by_rank(x), by_rank(x.exp())
    mine = straight(x) - 0.5 * torch.asinh(straight.centre(x))
    other = bent(x.exp()) - 0.5 * torch.asinh(bent.centre(x.exp()))
    assert (mine - other).abs().max() < 1e-6
    assert bool((straight(x).sort(0).values.diff(dim=0) >= 0).all())


def test_the_same_seed_gives_the_same_detector_and_it_survives_pickling():
    x, new = normal(100), normal(20, seed=1)
    one, two = quick().fit(x), quick().fit(x)
    np.testing.assert_array_equal(one.score_samples(new), two.score_samples(new))
    again = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(again.score_samples(new), one.score_samples(new))


def test_scores_have_exact_gradients():
    detector = quick().fit(normal(100))
    network = detector.as_network()
    x = torch.from_numpy(normal(6, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(network, x, eps=1e-7, atol=1e-4)
    np.testing.assert_allclose(
        network(x).detach(), detector.decision_function(x.detach().numpy()), atol=1e-9
    )


# ---------------------------------------------------------------- calibration


def test_p_values_by_definition():
    calibration, scores = np.sort(normal(40, 1)[:, 0]), normal(10, 1, seed=1)[:, 0]
    expected = [(1 + sum(c <= s for c in calibration)) / 41 for s in scores]
    np.testing.assert_allclose(p_values(calibration, scores), expected)


@pytest.mark.parametrize("detector", [MeanNeighborDetector, quick])
@pytest.mark.parametrize("calibration", ["bagged", 0.5])
def test_the_rate_of_false_alarms_that_was_asked_for_is_kept(detector, calibration):
    rates = []
    for seed in range(6):
        x = normal(1200, seed=seed)
        fitted = detector(calibration=calibration, false_alarm=0.1, random_state=seed).fit(x[:400])
        rates.append((fitted.predict(x[400:]) == -1).mean())
        flagged = fitted.p_values(x[400:]) <= 0.1
        np.testing.assert_array_equal(flagged, fitted.predict(x[400:]) == -1)
    assert abs(np.mean(rates) - 0.1) < 0.03  # sd of a mean of six about .01


def test_rows_held_out_keep_the_rate_where_rows_are_few():
    """30 rows in 10 features with heavy tails: there calibration in the bag flags 16%."""
    rates = {0.5: [], "bagged": []}
    for seed in range(40):
        x = np.random.default_rng(seed).standard_t(3, size=(230, 10))
        for calibration, found in rates.items():
            detector = MeanNeighborDetector(calibration=calibration, random_state=seed)
            found.append((detector.fit(x[:30]).p_values(x[30:]) <= 0.1).mean())
    assert np.mean(rates[0.5]) < 0.1 + 2 * np.std(rates[0.5]) / 40**0.5
    assert 0.11 < np.mean(rates["bagged"]) < 0.2  # documented as approximate


def test_the_threshold_is_one_of_the_scores_at_every_rate():
    for rate in (1e-9, 0.5, 1 - 1e-12):
        assert conformal.threshold(np.arange(10.0), rate) in range(10)


def test_the_threshold_is_that_of_the_p_value_also_where_products_are_rounded():
    """0.29·100 is 28.999999999999996, and 29/100 ≤ 0.29."""
    scores = np.arange(99.0)
    flagged = scores < conformal.threshold(scores, 0.29)
    np.testing.assert_array_equal(flagged, p_values(scores, scores) <= 0.29)


def test_rows_are_judged_by_critics_that_did_not_see_them():
    """Critics that were trained on 30 rows accept those, and would flag most of the others."""
    rates = []
    for seed in range(4):
        x = np.random.default_rng(seed).standard_t(3, size=(230, 10))
        detector = quick(kind="logit", critics=4, steps=100, random_state=seed).fit(x[:30])
        rates.append((detector.p_values(x[30:]) <= 0.1).mean())
    assert np.mean(rates) < 0.15


def test_a_share_of_contamination_is_flagged_in_training():
    x = normal(200)
    assert (quick(contamination=0.2).fit(x).predict(x) == -1).sum() == 40


# ---------------------------------------------------------------- streams


def test_a_stream_keeps_a_bounded_number_of_rows_and_follows_the_data():
    detector = quick(max_rows=150)
    for seed in range(4):
        detector.partial_fit(normal(100, seed=seed))
    assert len(detector.rows_) == 150
    far = 6 + normal(100, seed=9)
    assert (detector.predict(far) == -1).mean() > 0.9
    for seed in range(10, 20):
        detector.partial_fit(6 + normal(100, seed=seed))
    assert (detector.predict(far) == -1).mean() < 0.2
    with pytest.raises(InputError, match="partial_fit calibrates"):
        quick(calibration=0.2).partial_fit(far)
    held_out = quick(calibration=0.2).fit(far).set_params(calibration="bagged")
    with pytest.raises(InputError, match="calibration cannot change within a stream"):
        held_out.partial_fit(far)


def test_contamination_is_the_share_of_all_rows_kept_and_not_of_the_last_batch():
    detector = quick(contamination=0.2).fit(normal(200))
    for row in (0.0, 9.0):
        detector.partial_fit(np.full((1, 3), row))
        flagged = detector.predict(detector.rows_.numpy()) == -1
        assert flagged.mean() == pytest.approx(0.2, abs=0.01)


def test_a_stream_keeps_early_and_late_rows_alike():
    kept = []
    for seed in range(20):
        stream = Stream(50, seed)
        for first in range(0, 1000, 100):
            stream.add(np.arange(first, first + 100.0)[:, None])
        kept.append(stream.rows)
    assert np.mean(kept) == pytest.approx(499.5, abs=30)  # four standard deviations


def test_partial_fit_goes_on_from_fit():
    x, more = normal(80), normal(40, seed=1)
    detector = quick().fit(x).partial_fit(more)
    assert {tuple(row) for row in detector.rows_.numpy()} == {tuple(row) for row in np.r_[x, more]}
    other = quick().partial_fit(x).partial_fit(more)
    np.testing.assert_array_equal(detector.score_samples(x), other.score_samples(x))
    with pytest.raises(InputError, match="2 features"):
        detector.partial_fit(x[:, :2])
    with pytest.raises(InputError, match="critics cannot change within a stream"):
        detector.set_params(critics=3).partial_fit(more)
    assert len(detector.fit(x).rows_) == 80


# ---------------------------------------------------------------- explanations and attacks


@pytest.mark.parametrize("p", [1, 2])
def test_an_explanation_is_accepted_near_and_sparse(p):
    x = normal(300)
    detector = MeanNeighborDetector().fit(x)
    row = np.array([[0.0, 9.0, 0.0]])
    (found,) = detector.explain(row, p=p)
    assert detector.predict(found.accepted[None]) == 1
    unit = by_range(torch.from_numpy(x)).divisor.numpy()
    assert found.distance == pytest.approx(np.linalg.norm((found.accepted - row[0]) / unit, p))
    j, before, after = found.features[0]
    assert (j, before) == (1, 9.0)
    assert after < 4
    steps = np.linspace(0, 1, 400)[:, None]  # no accepted point much nearer on the way in
    way = row * (1 - steps)
    nearest = way[np.argmax(detector.predict(way) == 1)]
    assert found.distance <= 1.05 * np.linalg.norm((nearest - row[0]) / unit, p)
    assert detector.explain(np.zeros((1, 3))) == [None]


@pytest.mark.parametrize(
    ("x", "options"),
    [
        ([[0.0, 0.0], [1.0, 1.0]], {}),
        (np.zeros((10, 2)), {}),
        (normal(100, 2) * 1e-12, {"scaling": "none"}),
        (normal(6, 2), {"calibration": 0.5, "false_alarm": 0.9}),
    ],
    ids=["threshold at every row", "one point", "tiny decisions", "no row accepted"],
)
def test_an_explanation_where_hardly_a_training_row_is_accepted(x, options):
    """A margin of the decision that is absolute, or a goal that must be there, finds none."""
    detector = MeanNeighborDetector(random_state=0, **options).fit(x)
    (found,) = detector.explain([[50.0, 50.0]])
    assert detector.predict(found.accepted[None]) == 1


def test_features_are_put_back_as_long_as_that_is_accepted():
    """Accepted where the first feature is 1: the others need not have changed."""
    x, unit = torch.zeros(2, 3), torch.ones(3)
    point = torch.tensor([[1.0, 0.5, -2.0], [0.1, 1.0, 0.0]])
    restored = _restored(lambda at: at[:, 0] + at[:, 1] >= 1, x, point, unit)
    assert restored.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_where_nothing_is_accepted_there_is_no_explanation():
    detector = MeanNeighborDetector().fit(normal(50))
    detector.offset_ = np.inf
    assert detector.explain(normal(2, seed=1)) == [None, None]


def test_evaluate_takes_a_detector_and_tells_evasion_from_false_alarm():
    detector = MeanNeighborDetector(random_state=0).fit(normal(200))
    x = np.r_[normal(10, seed=1) / 2, 3.2 + 0 * normal(10, seed=2)]
    y = np.r_[np.ones(10), -np.ones(10)].astype(int)
    weak, strong = (
        rl.evaluate(detector, x, y, rl.LpBall(2, eps), attacks=["pgd"], certify="none")
        for eps in (1e-6, 20.0)
    )
    assert weak.clean.value == weak.attacked.value == 1.0
    assert strong.attacked.value == 0.0
    assert [note.split(":")[0] for note in strong.notes[-2:]] == ["evasion", "false alarm"]


def test_evasion_and_false_alarms_are_counted_apart():
    """Two of four anomalies are evaded, one was missed; the one normal row that is right stands."""
    rows = [(-1, True, "pgd", False), (-1, True, "pgd", False), (-1, True, None, True)]
    rows += [(-1, False, None, False), (1, True, None, True)]
    samples = [
        Sample(number, label, clean_correct=right, broken_by=attack, certified=proven)
        for number, (label, right, attack, proven) in enumerate(rows)
    ]
    evasion, alarm = told_apart(samples, certified=True)
    assert "flagged, a share of 0.6667" in evasion
    assert "and 1 are proven to stay; 1 more are wrong without a change" in evasion
    assert "accepted, a share of 0 [" in alarm
    assert told_apart(samples[4:], certified=False) == [
        alarm.removesuffix(", and 1 are proven to stay")
    ]


def test_other_detectors_are_black_boxes_of_the_same_two_classes():
    forest = IsolationForest(n_estimators=5, random_state=0).fit(normal(100))
    model, x = rl.wrap(forest), torch.from_numpy(normal(20, seed=1))
    assert not model.differentiable
    assert model.classes.tolist() == [-1, 1]
    np.testing.assert_array_equal(model.classes[model(x).argmax(1)], forest.predict(x.numpy()))


@pytest.mark.parametrize(
    "other", [IsolationForest(n_estimators=5, random_state=0), LocalOutlierFactor(novelty=True)]
)
def test_evasions_of_other_detectors_are_told_too(other):
    """One that scores new rows need not have fit_predict."""
    x, threat = normal(100), rl.LpBall(2, 0.1)
    y = other.fit(x).predict(x)
    report = rl.evaluate(other, x[:8], y[:8], threat, attacks=["square"], certify="none")
    assert report.notes[-1].startswith("false alarm: of the normal rows that are accepted")


# ---------------------------------------------------------------- rows that repeat


def test_where_rows_repeat_distances_are_plain(monkeypatch):
    random = np.random.default_rng(0)
    few, odd = random.poisson(0.2, (600, 5)), random.integers(0, 6, (600, 5))
    normal_rows = np.where(random.random((600, 1)) < 0.06, odd, few).astype(float)
    strange = random.integers(0, 6, (100, 5)).astype(float)
    train, test = normal_rows[:300], np.r_[normal_rows[300:], strange]
    label = np.r_[np.zeros(300), np.ones(100)]

    def area():
        found = quick(critics=2).fit(train).anomaly_score(test)
        return roc_auc_score(label, found)

    baseline = MeanNeighborDetector(scaling="standard").fit(train)
    plain = roc_auc_score(label, baseline.anomaly_score(test))
    assert area() > plain - 0.005
    monkeypatch.setattr(detector_module, "COPIES", np.inf)  # always local
    assert area() < plain - 0.03


def test_flags_count_by_their_rarity():
    random, rates = np.random.default_rng(0), np.r_[np.full(10, 0.5), np.full(10, 0.01)]
    rows = (random.random((500, 20)) < rates).astype(float)
    often, rarely = rows[:40].copy(), rows[:40].copy()
    often[:, :2], rarely[:, 10:12] = 1 - often[:, :2], 1 - rarely[:, 10:12]
    detector = quick(critics=2).fit(rows)
    higher = detector.anomaly_score(rarely) > detector.anomaly_score(often)
    assert higher.mean() > 0.9
    baseline = MeanNeighborDetector(scaling="standard").fit(rows)
    pairs = (one.anomaly_score(rarely) for one in (detector, baseline))
    assert spearmanr(*pairs).statistic == pytest.approx(1)


def test_distances_are_local_where_no_row_repeats():
    dense, sparse = normal(150) * 0.05, 5 + normal(150, seed=1)
    detector = quick(critics=0).fit(np.r_[dense, sparse])
    near_dense, in_sparse = np.full((1, 3), 0.8), np.full((1, 3), 5.8)
    assert detector.anomaly_score(near_dense) > detector.anomaly_score(in_sparse)
    plain = MeanNeighborDetector(scaling="standard").fit(np.r_[dense, sparse])
    assert plain.anomaly_score(near_dense) < 3 * plain.anomaly_score(in_sparse)
