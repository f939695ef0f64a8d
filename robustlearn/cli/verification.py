"""Answers to VNN-LIB queries, as the tools of its competition give them."""

from pathlib import Path
from typing import Any

import torch

from robustlearn.certify.bounds import Deadline
from robustlearn.certify.complete import decide
from robustlearn.cli import vnnlib
from robustlearn.models import onnx
from robustlearn.models.trace import trace
from robustlearn.registry import TIME, check_options


def verified(network: Path, rule: Path, seconds: float) -> dict[str, Any]:
    """Return the answer, and for ``sat`` the inputs and outputs of a counterexample.

    The inputs are numbers of float32, but for a box that holds none; the outputs are computed from
    them in float64. Queries share the time.
    """
    check_options("verify", {"seconds": seconds}, {"seconds": TIME})
    module = onnx.read(network).double()  # a property speaks of real arithmetic
    shape = module.shape
    recorded = trace(module, torch.full((1, *shape), 0.5, dtype=torch.float64))
    outputs = recorded.nodes[recorded.output].shape[-1]
    queries = vnnlib.read(rule, shape, outputs)
    deadline, answer = Deadline.after(seconds), "unsat"
    for done, (region, unsafe) in enumerate(queries):
        share, middle = deadline.share(len(queries) - done), region.x.float().double()
        single = bool(region.threat.contains(region.x, middle))
        dtype = torch.float32 if single else torch.float64
        with torch.no_grad():
            found = decide(recorded, region, unsafe, dtype=dtype, deadline=share)
        if found.witness is not None:
            y = recorded(found.witness[None])[0]
            return {"answer": "sat", "x": found.witness.flatten().tolist(), "y": y.tolist()}
        if found.status == "open":
            answer = "unknown"
    return {"answer": answer}


def told(result: dict[str, Any]) -> str:
    """Return the answer, and below it the counterexample as one S-expression."""
    if result["answer"] != "sat":
        return str(result["answer"])
    values = [f"({name}_{i} {v!r})" for name in "XY" for i, v in enumerate(result[name.lower()])]
    return "sat\n(" + "\n ".join(values) + ")"
