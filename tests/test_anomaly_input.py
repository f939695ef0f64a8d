"""What detectors make of bad input, extreme values and options that cannot be."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_anomaly import normal, quick
from torch.utils._python_dispatch import TorchDispatchMode

from robustlearn.anomaly import MeanNeighborDetector
from robustlearn.errors import InputError


@pytest.mark.parametrize("make", [MeanNeighborDetector, quick])
class TestBadInput:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_a_number(self, make, value):
        x = normal(20)
        x[3, 1] = value
        with pytest.raises(InputError, match=r"row 3, column 1, .* drop or impute") as told:
            make().fit(x)
        assert "HistGradientBoosting" not in str(told.value)  # advice of scikit-learn's
        x[3, 1] = 0.0
        named = pd.DataFrame(x, columns=["a", "b", "c"])
        detector = make().fit(named)
        named.loc[7, "c"] = value
        with pytest.raises(InputError, match=r"row 7, column 2 \(c\)"):
            detector.predict(named)

    def test_categories(self, make):
        with pytest.raises(InputError, match="encode text and categories"):
            make().fit(pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": ["x", "y", "x"]}))

    def test_dates(self, make):
        dates = pd.DataFrame({"a": pd.date_range("2020", periods=20)})
        for table in (dates, dates.assign(b=1.0), dates.to_numpy(), dates - dates.min()):
            with pytest.raises(InputError, match="dates or times"):
                make().fit(table)

    def test_one_row(self, make):
        with pytest.raises(InputError, match="minimum of 2"):
            make().fit(normal(1))

    @pytest.mark.parametrize(
        "x",
        [
            np.c_[normal(60), np.full(60, 7.0)],
            normal(3),
            normal(60, 1),
            np.repeat(normal(4), 15, axis=0),
            np.zeros((10, 2)),
        ],
        ids=["constant column", "fewer rows than neighbours", "one feature", "copies", "one point"],
    )
    def test_a_sane_result(self, make, x):
        detector = make().fit(x)
        scores = detector.anomaly_score(np.r_[x, x[:1] + 50])
        assert np.isfinite(scores).all()
        assert scores[-1] > scores[:-1].max()

    def test_a_huge_outlier_in_training_does_not_hide_the_others(self, make):
        """Not the ones in its own feature either: by mean and deviation the area is ½."""
        new = normal(100, seed=1)
        far = new + np.array([8.0, 0.0, 0.0])
        for rows, least in ((30, 0.7), (200, 0.95)):
            x = np.r_[normal(rows), [[1e9, 0.0, 0.0]]]
            scores = make().fit(x).anomaly_score(np.r_[new, far])
            assert roc_auc_score(np.repeat([0, 1], 100), scores) > least

    @pytest.mark.parametrize("unit", [1e200, 1e-200])
    def test_units_of_any_size(self, make, unit):
        x = normal(60)
        here = make().fit(x).anomaly_score(x)
        np.testing.assert_allclose(make().fit(x * unit).anomaly_score(x * unit), here, rtol=1e-6)

    def test_a_row_too_far_to_be_measured_is_flagged(self, make):
        """Also where it is so after scaling alone, which made an infinity of it."""
        for unit in (1.0, 1e-5, 1e-300):
            detector = make().fit(normal(60) * unit)
            row = np.full((1, 3), 1e308)
            assert np.isfinite(detector.score_samples(row)).all()
            assert detector.predict(row) == -1

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ({"contamination": 0.7}, "contamination must be"),
            ({"false_alarm": 0}, "false_alarm must be"),
            ({"false_alarm": 1.0}, "false_alarm must be"),
            ({"random_state": -1}, "random_state must be"),
            ({"calibration": 0.01}, "holds out 0 of 20 rows"),
            ({"max_rows": 1}, "max_rows must be"),
        ],
    )
    def test_options(self, make, option, said):
        with pytest.raises(InputError, match=said):
            make(**option).fit(normal(20))


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor held."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.numbers = max(self.numbers, found.numel())
        return found


@pytest.mark.parametrize(
    ("make", "rows", "features", "times"),
    [(MeanNeighborDetector, 3000, 20, 2), (quick, 300, 300, 7)],
)
def test_memory_is_bounded_by_the_rows(make, rows, features, times):
    """A fit held seven neighbours of all rows at once, a map by ranks (features, 200, 200)."""
    with Largest() as largest:
        make(random_state=0).fit(normal(rows, features))
    assert largest.numbers < times * rows * features


def test_a_single_critic_is_calibrated_by_rows_held_out():
    """Asked what it says of the rows that it has seen, it flagged 87% of normal ones at 10%."""
    rates = []
    for seed in range(4):
        x = np.random.default_rng(seed).standard_t(3, size=(460, 10))
        detector = quick(critics=1, kind="logit", steps=100, calibration=0.5).fit(x[:60])
        rates.append((detector.p_values(x[60:]) <= 0.1).mean())
    assert np.mean(rates) < 0.2


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"kind": "both"}, "kind must be one of"),
        ({"critics": 0, "kind": "logit"}, "critics=0: give some"),
        ({"critics": 1}, "one critic sees all rows"),
        ({"loss": "began"}, "reads the critic's errors"),
        ({"loss": "no such"}, "there is no adversarial loss"),
        ({"device": "no such"}, "cannot be used"),
        ({"logit_weight": np.inf}, "logit_weight must be"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"learning_rate": 1e30}, "critics diverged.*Lower learning_rate"),
        ({"loss": 3}, "adversarial loss: expected a name"),
        ({"ranks": "no"}, "ranks must be True or False"),
    ],
)
def test_options_of_the_critics(option, said):
    with pytest.raises(InputError, match=said):
        quick(**option).fit(normal(20))
