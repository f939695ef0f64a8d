"""report.json, samples.csv, adversarial.npz and report.html in one folder."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robustlearn.report.page import page


def write(document: dict[str, Any], arrays: Mapping[str, np.ndarray], folder: Path) -> Path:
    """Write a document and its adversarial examples; return the folder.

    Every file is written beside its place and then renamed, so that none is ever half written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, allow_nan=False)
    replace_file(folder / "report.json", text.encode())
    replace_file(folder / "samples.csv", samples_csv(document).encode())
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    replace_file(folder / "adversarial.npz", packed.getvalue())
    replace_file(folder / "report.html", page(document).encode())
    return folder


def plain(value: Any) -> Any:
    """Return data that JSON can hold: infinity as a word, NaN as null."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def samples_csv(document: dict[str, Any]) -> str:
    """One row a sample of every evaluation, fields without meaning left empty."""
    out = io.StringIO()
    first = document["evaluations"][0]["samples"][0]
    writer = csv.DictWriter(out, ["model", *first], lineterminator="\n")
    writer.writeheader()
    for evaluation in document["evaluations"]:
        for sample in evaluation["samples"]:
            writer.writerow({"model": evaluation["model"], **sample})
    return out.getvalue()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it, so that it is never half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
