"""Two evaluations of the same samples, beside each other: who is right where the other fails."""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from scipy import stats

from robustlearn.errors import InputError
from robustlearn.report.table import figure

SCHEMA = "robustlearn-report/1"
LEVEL = 0.05
MILD = ("the gradients show no sign of masking", "the same attack has run already")  # not run
NEEDED = {
    "model",
    "data",
    "task",
    "threat",
    "verdict",
    "attacks",
    "samples",
    "curve",
}  # of an evaluation


def load(path: Path) -> dict[str, Any]:
    """Read a report.json, or the one in a folder.

    Raises
    ------
    InputError for a file that is not a report of this version.
    """
    path = path / "report.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a report of robustlearn ({SCHEMA})")
    evaluations = document.get("evaluations")
    listed = evaluations if isinstance(evaluations, list) else []
    if not listed or any(not isinstance(e, dict) or NEEDED - e.keys() for e in listed):
        raise InputError(f"{path} is damaged: an evaluation in it lacks parts")
    return document


def compared(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Pair two evaluations by the samples that both looked at, and test their difference.

    Of b samples that only the first and c that only the second gets right, b is binomial with
    b + c trials and probability ½ if both models are as good: McNemar's test, exact, two-sided.

    Parameters
    ----------
    first, second : documents of `load`, of one evaluation each.

    Returns
    -------
    plain data: models, threats, number of samples, ``"caveats"`` (why no conclusion on the attacked
    figures can be drawn), and for ``"clean"`` and ``"attacked"`` the two shares, b, c and p-value.

    Raises
    ------
    InputError where nothing can be paired: several evaluations in a document, regressors, other
    data or labels under the same numbers, another threat, no sample in common.

    Notes
    -----
    Source: McNemar (1947); under attack "right" means unbroken, an upper bound for both models,
    so that the test compares what these attacks found, not the truth.
    """
    one, two = _single(first), _single(second)
    _check(one, two)
    rows = {s["index"]: s for s in one["samples"]}
    pairs = [(rows[s["index"]], s) for s in two["samples"] if s["index"] in rows]
    if not pairs:
        raise InputError("the two reports have no sample in common")
    for key, what in (("label", "another label"), ("digest", "other features")):
        other = [a["index"] for a, b in pairs if a.get(key) != b.get(key)]
        if other:
            raise InputError(
                f"sample {other[0]} has {what} in each report ({len(other)} such samples): they "
                "are not of the same data"
            )
    names = _names(one["model"], two["model"])
    return {
        "models": names,
        "caveats": _caveats(one, two, names),
        "data": one["data"],
        "threat": one["threat"]["text"],
        "verdicts": [e["verdict"]["text"].partition("\n")[0] for e in (one, two)],
        "samples": len(pairs),
        "clean": _tested([(a["clean_correct"], b["clean_correct"]) for a, b in pairs]),
        "attacked": _tested([(stands(a), stands(b)) for a, b in pairs]),
    }


def comparison_table(result: dict[str, Any]) -> Table:
    """Return the comparison for the terminal."""
    title = Text(f"{result['data']}, {result['threat']}: {result['samples']} samples of both")
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("")
    for model in result["models"]:
        shown.add_column(Text(model), justify="right", overflow="fold")
    shown.add_column("only first", justify="right")
    shown.add_column("only second", justify="right")
    shown.add_column("McNemar p", justify="right")
    for name in ("clean", "attacked"):
        found = result[name]
        shares = (figure(share, "classification", "\n") for share in found["shares"])
        shown.add_row(
            name, *shares, str(found["only_first"]), str(found["only_second"]), f"{found['p']:.3g}"
        )
    return shown


def conclusion(result: dict[str, Any]) -> str:
    """Say in words what the test allows to say, or why it allows nothing."""
    if result["caveats"]:
        return "No conclusion on who holds better under attack: " + "; ".join(result["caveats"])
    found, (one, two) = result["attacked"], result["models"]
    first, second = (share["value"] for share in found["shares"])
    if found["p"] >= LEVEL:
        return (
            f"Under attack {one} and {two} cannot be told apart on these samples "
            f"({first:.1%} and {second:.1%}, p = {found['p']:.2g})."
        )
    better, worse = (one, two) if first > second else (two, one)
    return (
        f"Under attack {better} holds on more of these samples than {worse} "
        f"({max(first, second):.1%} against {min(first, second):.1%}, p = {found['p']:.2g})."
    )


def _single(document: dict[str, Any]) -> dict[str, Any]:
    evaluations = document["evaluations"]
    if len(evaluations) != 1:
        names = ", ".join(e["model"] for e in evaluations)
        raise InputError(f"a report of one evaluation is expected; this one has {names}")
    return dict(evaluations[0])


def _names(one: str, two: str) -> list[str]:
    return [one, two] if one != two else [f"{one} (first)", f"{two} (second)"]


def _check(one: dict[str, Any], two: dict[str, Any]) -> None:
    if "regression" in (one["task"], two["task"]):
        raise InputError("McNemar's test compares classifiers; one of these is a regressor")
    if one["threat"] != two["threat"]:
        raise InputError(
            f"the threats differ: {one['threat']['text']} and {two['threat']['text']}; evaluate "
            "both models under the same one"
        )


def _caveats(one: dict[str, Any], two: dict[str, Any], names: list[str]) -> list[str]:
    """Say why the attacked figures do not compare: one is not believed, or other attacks ran."""
    found = []
    for evaluation, name in ((one, names[0]), (two, names[1])):
        if not evaluation["verdict"].get("trustworthy"):
            text = evaluation["verdict"]["text"].partition("\n")[0].rstrip(":")
            found.append(f"the verdict on {name} is {text}")
    first, second = _attacked_by(one), _attacked_by(two)
    for mine, theirs, name in ((first, second, names[0]), (second, first, names[1])):
        if alone := [attack for attack in mine if attack not in theirs]:
            found.append(f"{', '.join(alone)} ran on {name} only")
    return found


def _attacked_by(evaluation: dict[str, Any]) -> list[str]:
    """Return the attacks that ran, or would have if there had been anything to find."""
    runs = evaluation["attacks"]
    return [run["name"] for run in runs if run["skipped"] is None or run["skipped"] in MILD]


def stands(sample: dict[str, Any]) -> bool:
    """Tell whether the model is right on a sample and no attack broke it."""
    return bool(sample["clean_correct"]) and sample["broken_by"] is None


def _tested(pairs: list[tuple[bool, bool]]) -> dict[str, Any]:
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    apart = only_first + only_second
    p = float(stats.binomtest(only_first, apart).pvalue) if apart else 1.0
    shares = []
    for right in zip(*pairs, strict=True):
        interval = stats.binomtest(sum(right), len(right)).proportion_ci(0.95, "exact")
        shares.append(
            {
                "value": sum(right) / len(right),
                "low": float(interval.low),
                "high": float(interval.high),
                "n": len(right),
            }
        )
    return {"shares": shares, "only_first": only_first, "only_second": only_second, "p": p}
