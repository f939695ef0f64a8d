"""What `robustlearn detect` does: fit to normal rows, score others, explain what is flagged."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustlearn import data
from robustlearn.anomaly import Detector, HardNegativeDetector, MeanNeighborDetector
from robustlearn.anomaly.base import check_finite
from robustlearn.errors import InputError
from robustlearn.report import lead

DETECTORS: dict[str, type[Detector]] = {
    "hard-negatives": HardNegativeDetector,
    "mean-distance": MeanNeighborDetector,
}
SHOWN = 10
SHOWN_FEATURES = 5


def detected(
    normal: str,
    score: str,
    *,
    drop: str | None,
    method: str,
    false_alarm: float,
    explain: int,
    seed: int,
) -> dict[str, Any]:
    """Return what was found as plain data; see `robustlearn.report.write_detection`."""
    if method not in DETECTORS:
        raise InputError(f"--method must be one of {', '.join(DETECTORS)}; got {method!r}")
    known, names = data.features(normal, drop=drop)
    new, other_names = data.features(score, drop=drop)
    if names != other_names:
        raise InputError(
            f"{score} has the columns {_told(other_names, new)}, and {normal} has "
            f"{_told(names, known)}: give the same columns in the same order"
        )
    for path, rows in ((normal, known), (score, new)):
        check_finite(rows, Path(path).name, names)
    detector = DETECTORS[method](false_alarm=false_alarm, random_state=seed)
    detector.fit(known)
    scores, p_values = detector.anomaly_score(new), detector.p_values(new)
    flagged = scores > -detector.offset_
    return {
        "detector": method,
        "data": Path(normal).name,
        "scored": Path(score).name,
        "trained": len(known),
        "false_alarm": false_alarm,
        "smallest_p": 1 / (len(detector.calibration_) + 1),
        "threshold": -detector.offset_,
        "calibration": (-detector.calibration_).tolist(),
        "settings": {"method": method, "false alarms": false_alarm, "seed": seed},
        "samples": [
            {
                "row": row,
                "score": float(scores[row]),
                "p_value": float(p_values[row]),
                "flagged": bool(flagged[row]),
                **_why(found, names),
            }
            for row, found in enumerate(_explained(detector, new, scores, flagged, explain))
        ],
    }


def show(document: dict[str, Any], out: Path | None) -> None:
    """Print how many rows are flagged, and the most anomalous of them."""
    console = Console()
    console.print(Text(lead(document)))
    flagged = sorted(
        (sample for sample in document["samples"] if sample["flagged"]), key=lambda s: -s["score"]
    )
    if flagged:
        table = Table("row", "score", "p-value", "to be accepted", box=None, pad_edge=False)
        for sample in flagged[:SHOWN]:
            changes = ", ".join(f"{n} {a:.4g} → {b:.4g}" for n, a, b in sample["changes"])
            figures = str(sample["row"]), f"{sample['score']:.4g}", f"{sample['p_value']:.3g}"
            table.add_row(*figures, Text(changes or "–"))
        console.print(table)
    if out is not None:
        console.print(Text(f"page: {out / 'detection.html'}"))


def _explained(
    detector: Detector, x: np.ndarray, scores: np.ndarray, flagged: np.ndarray, most: int
) -> list[Any]:
    """Explain the most anomalous flagged rows."""
    order = np.argsort(-scores)
    chosen = order[flagged[order]][:most]
    found: list[Any] = [None] * len(x)
    if len(chosen):
        for row, why in zip(chosen, detector.explain(x[chosen]), strict=True):
            found[row] = why
    return found


def _why(found: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if found is None:
        return {"distance": None, "changes": []}
    changes = [(names[j], before, after) for j, before, after in found.features]
    return {"distance": found.distance, "changes": changes[:SHOWN_FEATURES]}


def _told(names: tuple[str, ...], x: np.ndarray) -> str:
    shown = ", ".join(names[:8])
    return f"{shown}, … ({x.shape[1]} in all)" if len(names) > 8 else shown
