"""What a comparison of methods found: figures, paired differences, a picture, and it in words."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustlearn.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

Array = NDArray[np.float64]
Measure = Literal["error", "worst_case"]
MEASURES: tuple[Measure, ...] = ("error", "worst_case")
SPOKEN: dict[Measure, str] = {"error": "error", "worst_case": "worst case"}
NEGLIGIBLE = 1e-3  # in variances of y: smaller differences are not claimed


class Row(NamedTuple):
    """What one method did on one split.

    Attributes
    ----------
    error : mean (wᵀx + b − y)² over the test part as the setting leaves it.
    worst_case : mean (|wᵀx + b − y| + ε‖w‖_q)² over it.
    """

    seed: int
    setting: str
    method: str
    error: float
    worst_case: float


class Difference(NamedTuple):
    """d̄ = mean over seeds of (method − rival), with two standard errors.

    Attributes
    ----------
    mean : d̄; negative where the method is better.
    standard_error : s/√J over J random splits of this one data set.
    wide_error : s·√(1/J + n_test/n_train), which counts that the training parts overlap and so
        looks beyond this data set. Source: Nadeau and Bengio (2003).
    """

    mean: float
    standard_error: float
    wide_error: float

    @property
    def clear(self) -> bool:
        """|d̄| > 2·standard_error, and not below 0.001 of the variance of y."""
        return abs(self.mean) > max(2 * self.standard_error, NEGLIGIBLE)

    @property
    def wide(self) -> bool:
        """Whether it is clear and |d̄| > 2·wide_error too."""
        return self.clear and abs(self.mean) > 2 * self.wide_error

    def __str__(self) -> str:
        """|d̄| ± standard error, with a star if it is not wide."""
        star = "" if self.wide or not self.clear else "*"
        return f"{abs(self.mean):.3f} ± {self.standard_error:.3f}{star}"


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, and what can be said from them.

    Attributes
    ----------
    rows : one a seed × setting × method.
    eps, norm : the attack of the worst case.
    ratio : n_test / n_train.
    ours : the methods that are trained for the worst case.
    notes : what was left out, and why.
    """

    rows: tuple[Row, ...] = field(repr=False)
    eps: float
    norm: float
    ratio: float
    ours: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings, in their order."""
        return tuple(dict.fromkeys(row.setting for row in self.rows))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in their order."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    def values(self, setting: str, method: str, measure: Measure = "worst_case") -> Array:
        """Return one number a seed, (seeds,), in the order of the seeds."""
        chosen = [r for r in self.rows if r.setting == setting and r.method == method]
        if not chosen:
            raise InputError(
                f"no rows for setting {setting!r} and method {method!r}; there are the settings "
                f"{', '.join(self.settings)} and the methods {', '.join(self.methods)}"
            )
        return np.array([getattr(row, measure) for row in chosen])

    def difference(
        self, setting: str, method: str, rival: str, measure: Measure = "worst_case"
    ) -> Difference:
        """Mean over seeds of (method − rival): both saw the same splits and corruptions."""
        gap = self.values(setting, method, measure) - self.values(setting, rival, measure)
        spread = float(gap.std(ddof=1)) if len(gap) > 1 else math.inf
        share = 1 / len(gap)
        return Difference(
            float(gap.mean()), spread * math.sqrt(share), spread * math.sqrt(share + self.ratio)
        )

    def table(self) -> "DataFrame":
        """Mean ± s/√J over J seeds: two lines a setting (error, worst case), one column a method.

        The unit is the variance of y. The standard errors are those of each number; which method is
        better is a matter of the paired differences (`difference`), whose errors are smaller.
        """
        import pandas

        cells = {
            method: {
                (setting, SPOKEN[measure]): _cell(self.values(setting, method, measure))
                for setting in self.settings
                for measure in MEASURES
            }
            for method in self.methods
        }
        return pandas.DataFrame(cells)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw each method as a line from its error (hollow) to its worst case (full).

        Bars are 2 standard errors to either side. Matplotlib axes are given and returned.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            height = 0.6 + 0.17 * len(self.settings) * (len(self.methods) + 1)
            _, ax = plt.subplots(figsize=(8, height), layout="constrained")
        starts = (len(self.methods) + 1.5) * np.arange(len(self.settings), dtype=np.float64)
        for index, method in enumerate(self.methods):
            _dumbbells(ax, self, method, starts + index, f"C{index}")
        ax.set_yticks(starts + (len(self.methods) - 1) / 2, self.settings)
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
        norm = "∞" if math.isinf(self.norm) else f"{self.norm:g}"
        ax.set_xlabel(f"mean squared error: ○ test part, ● worst case, ℓ{norm} ≤ {self.eps:g}")
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return ax

    def conclusion(self) -> str:
        """Return sentences that the numbers support, our losses included.

        A difference is claimed if it is more than 2 standard errors, and 0.001 of the variance of
        y. A star marks a claim that does not hold once the overlap of the splits is counted.
        """
        lines: list[str] = []
        told: dict[str, Array] = {}
        for setting in self.settings:
            for measure in MEASURES:
                heading = f"{setting}, {SPOKEN[measure]}"
                numbers = np.stack([self.values(setting, m, measure) for m in self.methods])
                same = [old for old, found in told.items() if np.allclose(found, numbers, 1e-9, 0)]
                if same:
                    lines.append(f"{heading}: the same numbers as “{same[0]}”.")
                    continue
                told[heading] = numbers
                lines.append(f"{heading}: {_ranking(self, setting, measure)}")
                lines += [_losses_of(self, setting, measure, m) for m in self.ours]
        lines += [_total(self, m, measure) for measure in MEASURES for m in self.ours]
        return "\n".join([*filter(None, lines), _caveat(self), *self.notes])


def _mean(values: Array) -> tuple[float, float]:
    """Return the mean and its standard error s/√J, nan for one value."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def _cell(values: Array) -> str:
    mean, error = _mean(values)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def _dumbbells(ax: "Axes", found: Comparison, method: str, places: Array, colour: str) -> None:
    """Draw a method: one line a setting."""
    ends = []
    for measure, face in zip(MEASURES, ("white", colour), strict=True):
        pairs = [_mean(found.values(setting, method, measure)) for setting in found.settings]
        means, errors = np.array(pairs).T
        label = method if measure == "worst_case" else None
        style: Any = {"fmt": "o", "ms": 4, "lw": 1, "mfc": face, "color": colour, "zorder": 3}
        ax.errorbar(means, places, xerr=2 * np.nan_to_num(errors), label=label, **style)
        ends.append(means)
    ax.hlines(places, *ends, color=colour, lw=1, alpha=0.4)


def _ranking(found: Comparison, setting: str, measure: Measure) -> str:
    """Say who has the lowest mean, whom it clearly beats, and who is level with it."""
    means = {m: found.values(setting, m, measure).mean() for m in found.methods}
    best = min(means, key=lambda method: means[method])
    gaps = {
        m: found.difference(setting, m, best, measure) for m in sorted(means, key=means.__getitem__)
    }
    beaten = [f"{m} (by {gap})" for m, gap in gaps.items() if gap.clear]
    level = [f"{m} ({gap})" for m, gap in gaps.items() if m != best and not gap.clear]
    parts = [f"{best} has the lowest mean, {means[best]:.3f}"]
    parts += [f"clearly below {_listed(beaten)}"] if beaten else []
    parts += [f"level with {_listed(level)}"] if level else []
    return "; ".join(parts) + "."


def _against_others(
    found: Comparison, setting: str, measure: Measure, ours: str
) -> dict[str, Difference]:
    """Return one of ours less each method that is not ours."""
    rivals = [m for m in found.methods if m not in found.ours]
    return {m: found.difference(setting, ours, m, measure) for m in rivals}


def _losses_of(found: Comparison, setting: str, measure: Measure, ours: str) -> str:
    """Say to which of the other methods one of ours clearly loses."""
    gaps = _against_others(found, setting, measure, ours)
    lost = [f"{m} (by {gap})" for m, gap in gaps.items() if gap.clear and gap.mean > 0]
    return f"    {ours} loses to {_listed(lost)}." if lost else ""


def _total(found: Comparison, ours: str, measure: Measure) -> str:
    """Count over the settings; beside clean data the attack carried out adds no new numbers."""
    settings = [s for s in found.settings if s != "input attack" or "clean" not in found.settings]
    gaps = [g for s in settings for g in _against_others(found, s, measure, ours).values()]
    won = sum(gap.clear and gap.mean < 0 for gap in gaps)
    lost = sum(gap.clear and gap.mean > 0 for gap in gaps)
    return (
        f"In all, {SPOKEN[measure]}: {ours} wins {won} of {len(gaps)} comparisons with the other "
        f"methods, loses {lost}, and {len(gaps) - won - lost} are undecided."
        if gaps
        else ""
    )


def _caveat(found: Comparison) -> str:
    """Say what the standard errors are, and what a star is."""
    seeds = len({row.seed for row in found.rows})
    if seeds < 2:
        return "One split has no standard error: nothing is claimed."
    factor = math.sqrt(1 + seeds * found.ratio)
    return (
        f"± is the standard error of the paired difference over {seeds} random splits of this one "
        "data set; level: within 2 of them, or less than 0.001 apart. *: no longer beyond 2 once "
        "the overlap of the splits is counted, which makes the standard errors "
        f"{factor:.1f} times larger."
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
