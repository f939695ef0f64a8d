"""What the detectors share: scikit-learn's contract around a differentiable anomaly score."""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from robustlearn.anomaly import conformal
from robustlearn.anomaly.explanation import Explanation, explained
from robustlearn.anomaly.fusion import Score
from robustlearn.errors import InputError
from robustlearn.registry import Range, check_options
from robustlearn.threats import LpBall

Array = NDArray[np.float64]
CHUNK = 1024  # rows scored together
BAGGED = "bagged"
RATE = Range(0, 1, "()")
LOWEST = np.finfo(np.float64).min  # of a score: a row too far away to be measured


class Detector(OutlierMixin, BaseEstimator):
    """A detector of rows unlike the normal rows that it was fitted to.

    Subclasses say how a `Score` is learnt. As elsewhere in scikit-learn, higher scores are more
    normal, and `predict` gives 1 for what is accepted and −1 for what is flagged.
    """

    contamination: Any
    false_alarm: Any
    calibration: Any
    max_rows: Any
    random_state: Any

    @abstractmethod
    def _learnt(self, rows: Tensor, generator: torch.Generator) -> Score:
        """Return the score, learnt from normal rows (n, d)."""

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn what is normal from X (n, d); y is ignored.

        Of more than ``max_rows`` rows a random part is used, so that memory is bounded.

        Raises
        ------
        InputError for fewer than two rows, NaN, infinity, text, and options that cannot be; and for
        rows so large or so close together that distances between them cannot be computed.
        """
        self._check_options()
        rows = self._rows(X, reset=True)
        generator = torch.Generator().manual_seed(self._seed())
        self._settle(_thinned(rows, self.max_rows, generator), generator)
        return self

    def _settle(self, rows: Array, generator: torch.Generator) -> None:
        """Learn the score from the rows kept, calibrate it, and place the threshold."""
        learnt, held_out = self._divided(rows, generator)
        self.rows_ = torch.from_numpy(learnt)
        self.score_ = self._learnt(self.rows_, generator)
        new = -self.score_.of_training.numpy() if held_out is None else self._scores(held_out)
        self.calibration_ = np.sort(new)
        if not np.isfinite(np.median(new)):
            raise InputError(
                "most of the training rows have no finite score: distances between them overflow; "
                "scale the features to a common size first"
            )
        if self.contamination == "auto":
            self.offset_ = conformal.threshold(self.calibration_, float(self.false_alarm))
        else:
            self.offset_ = float(np.percentile(self._scores(rows), 100 * self.contamination))

    def _divided(self, rows: Array, generator: torch.Generator) -> tuple[Array, Array | None]:
        """Return the rows to learn from, and those held out, if some are to be."""
        if self.calibration == BAGGED:
            return rows, None
        count = round(float(self.calibration) * len(rows))
        if not 1 <= count <= len(rows) - 2:
            raise InputError(
                f"calibration={self.calibration!r} holds out {count} of {len(rows)} rows; at least "
                f"1 must be held out and 2 remain: give more rows, or calibration={BAGGED!r}"
            )
        order = torch.randperm(len(rows), generator=generator).numpy()
        return rows[order[count:]], rows[order[:count]]

    # ------------------------------------------------------------------ scores

    def score_samples(self, X: Any) -> Array:
        """Return how normal rows (n, d) are, (n,); the sign is opposite to `anomaly_score`."""
        check_is_fitted(self)
        return self._scores(self._rows(X, reset=False))

    def anomaly_score(self, X: Any) -> Array:
        """Return how anomalous rows are, (n,): −`score_samples`, the orientation of PyOD."""
        return -self.score_samples(X)

    def decision_function(self, X: Any) -> Array:
        """Return ``score_samples(X) − offset_``, (n,): negative for what is flagged."""
        return np.asarray(self.score_samples(X) - self.offset_)

    def predict(self, X: Any) -> NDArray[np.int64]:
        """Return 1 for rows that are accepted and −1 for those that are flagged, (n,)."""
        return np.where(self.decision_function(X) >= 0, 1, -1).astype(np.int64)

    def p_values(self, X: Any) -> Array:
        """Return conformal p-values, (n,): flagging p ≤ α raises a false alarm at rate ≤ α.

        That holds for ``calibration`` by rows held out. For ``"bagged"`` it is approximate: the
        score of a training row leaves the row itself out, but not its part in the scaling, and with
        few rows in many features more than α are flagged. At α = 10%, heavy tails: 13 to 17% with
        30 rows in 10 features, 11 to 14% with 100 rows in 20, 10 to 11% with 200. The features of
        critics (``kind="feature"``) have seen all rows: there it is 19% with 30.
        """
        return conformal.p_values(self.calibration_, self.score_samples(X))

    def explain(self, X: Any, *, p: float = 2.0) -> list[Explanation | None]:
        """For each flagged row, return the nearest accepted point found and what had to change.

        Parameters
        ----------
        X : (n, d).
        p : norm of the distance, 1 or 2, in units of the range of each feature.

        Returns
        -------
        One `Explanation` a row; None for rows that are accepted, and where no accepted point is
        found. A training row is left out of its own score, but not of that of a point a hair's
        breadth beside it, which may be accepted for that reason alone.
        """
        check_is_fitted(self)
        return explained(self, self._rows(X, reset=False), p)

    def as_network(self) -> nn.Module:
        """Return x ↦ decision_function(x), (n, d) -> (n,), as a module that has gradients.

        It is what `robustlearn.wrap` attacks: a classifier of the classes −1 (flagged, logit 0)
        and 1 (accepted).
        """
        check_is_fitted(self)
        return Decision(self.score_, self.offset_)

    def _scores(self, rows: Array) -> Array:
        with torch.no_grad():
            parts = [-self.score_(part) for part in torch.from_numpy(rows).split(CHUNK)]
        return np.maximum(torch.cat(parts).numpy(), LOWEST)

    # ------------------------------------------------------------------ input

    def _rows(self, X: Any, *, reset: bool) -> Array:
        if any(getattr(kind, "kind", None) in ("m", "M") for kind in _kinds(X)):
            raise InputError(
                "X holds dates or times, which have no unit that distances could be measured in; "
                "encode them as numbers first, for example days since the first"
            )
        try:
            rows = validate_data(
                self,
                X,
                dtype=np.float64,
                order="C",
                ensure_min_samples=2 if reset else 1,
                ensure_all_finite=False,  # told below, by row and column
                reset=reset,
                copy=True,
            )
        except ValueError as error:
            raise InputError(f"{error}{_remedy(str(error))}") from error
        check_finite(rows, "X", getattr(self, "feature_names_in_", None))
        return np.asarray(rows)

    def _seed(self) -> int:
        try:
            return int(check_random_state(self.random_state).randint(2**31 - 1))
        except ValueError as error:
            raise InputError(
                "random_state must be None, a whole number in [0, 2³²) or a RandomState; got "
                f"{self.random_state!r}"
            ) from error

    def _check_options(self) -> None:
        """Raise an InputError for options that cannot be."""
        words = {"contamination": "auto", "calibration": BAGGED}
        self._check_numbers(
            {
                "false_alarm": RATE,
                "contamination": Range(0, 0.5, "(]"),
                "calibration": RATE,
                "max_rows": Range(2, np.inf, "[)", whole=True),
            },
            {name for name, word in words.items() if getattr(self, name) == word},
        )

    def _check_numbers(self, ranges: dict[str, Range], but: Collection[str] = ()) -> None:
        """Raise an InputError unless each option lies in its range, but for those left out."""
        given = {name: getattr(self, name) for name in ranges if name not in but}
        for name, value in given.items():
            if value is None:
                raise InputError(f"{name} must be {ranges[name]}; got None")
        check_options(type(self).__name__, given, ranges)


class Decision(nn.Module):
    """x ↦ −score(x) − offset, computed on the CPU, where the neighbours are found."""

    offset: Tensor

    def __init__(self, score: Score, offset: float) -> None:
        super().__init__()
        self.score = score
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the decision, (n,)."""
        return -self.score(x.cpu()).to(x.device) - self.offset

    def enclosed(self, x: Tensor, threat: LpBall) -> tuple[Tensor, Tensor]:
        """Bound the decision over the threat at each x, (n,) below and above."""
        low, high = (bound.to(x.device) for bound in self.score.enclosed(x.cpu(), threat))
        return -high - self.offset, -low - self.offset


def check_finite(rows: Array, source: str, names: Sequence[str] | None = None) -> None:
    """Raise an InputError that names the first row and column of (n, d) without a finite number."""
    holes = np.argwhere(~np.isfinite(rows))
    if not len(holes):
        return
    row, column = holes[0]
    value = "NaN" if np.isnan(rows[row, column]) else "infinity"
    name = "" if names is None else f" ({names[column]})"
    raise InputError(
        f"{source} holds {value} in row {row}, column {column}{name}, counted from 0, and "
        f"{len(holes)} such values in all; finite numbers were expected: drop or impute these "
        "rows, for a distance to them has no meaning"
    )


def _thinned(rows: Array, most: int, generator: torch.Generator) -> Array:
    if len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:most].numpy()]


def _kinds(X: Any) -> Collection[Any]:
    """Return the types of the columns of a table, or the one of an array."""
    return getattr(X, "dtypes", (getattr(X, "dtype", None),))


def _remedy(said: str) -> str:
    """Say what to do about a complaint of scikit-learn's."""
    if "could not convert" in said:
        return "; encode text and categories as numbers first, for example one column a category"
    return ""
