"""What a detector said of new rows: detection.json, scores.csv and a page."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from robustlearn.report import figures
from robustlearn.report.files import plain, replace_file
from robustlearn.report.page import template

SCHEMA = "robustlearn-detection/1"
SHOWN = 200
FEW = 200  # normal rows below which more of them are flagged than was asked for
COLUMNS = ("row", "score", "p_value", "flagged", "distance", "changes")


def write_detection(document: dict[str, Any], folder: Path) -> Path:
    """Write detection.json, scores.csv and detection.html; return the folder.

    Parameters
    ----------
    document : plain data with ``detector, settings, data, scored, trained, false_alarm, smallest_p,
        calibration`` (anomaly scores of normal rows) and ``samples``: a row each with ``row, score,
        p_value, flagged, distance, changes``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = plain({"schema": SCHEMA, **document})
    replace_file(folder / "detection.json", json.dumps(whole, indent=1, allow_nan=False).encode())
    replace_file(folder / "scores.csv", _csv(whole["samples"]).encode())
    replace_file(folder / "detection.html", detection_page(whole).encode())
    return folder


def detection_page(document: dict[str, Any]) -> str:
    """Render what was found; every name is escaped, and nothing is fetched from a network."""
    flagged = [sample for sample in document["samples"] if sample["flagged"]]
    flagged.sort(key=lambda sample: -sample["score"])
    scores = [sample["score"] for sample in document["samples"]]
    return str(
        template("detection.html").render(
            d=document,
            lead=lead(document),
            rows=flagged[:SHOWN],
            left_out=max(0, len(flagged) - SHOWN),
            figure=figures.scores(document["calibration"], scores, document["threshold"]),
        )
    )


def lead(document: dict[str, Any]) -> str:
    """Say how many rows are flagged, and how many would be by chance."""
    samples, rate = document["samples"], document["false_alarm"]
    flagged = sum(sample["flagged"] for sample in samples)
    text = (
        f"{flagged} of {len(samples)} rows are flagged. Were all of them normal, about "
        f"{rate * len(samples):.1f} would be, at the rate of false alarms {rate:g}."
    )
    if document["smallest_p"] > rate:
        text += (
            f" With {len(document['calibration'])} rows to calibrate by, the smallest p-value is "
            f"{document['smallest_p']:.3g}: give more normal rows for that rate."
        )
    if document["trained"] < FEW:
        text += (
            f" Learnt from {document['trained']} rows alone, that rate is approximate, and more "
            f"rows than that may be flagged: from {FEW} on it is close."
        )
    return text


def _csv(samples: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sample in samples:
        changes = "; ".join(
            f"{name}: {before:.6g} -> {after:.6g}" for name, before, after in sample["changes"]
        )
        writer.writerow([*(sample[name] for name in COLUMNS[:-1]), changes])
    return out.getvalue()
