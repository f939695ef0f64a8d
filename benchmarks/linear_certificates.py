"""Time to certify a linear classifier exactly: every norm, with and without box."""

import math
import statistics
import time

import recording
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import robustlearn as rl


def main() -> None:
    """Measure, print a table, write the rows."""
    given = recording.arguments(__doc__)
    rounds, sizes = (5, ((2000, 784), (2000, 3072), (500, 784))) if given.full else (1, ((50, 20),))
    rows = []
    for n, d in sizes:
        torch.manual_seed(given.seed)
        model = rl.wrap(nn.Linear(d, 10).double())
        x = torch.rand(n, d, dtype=torch.float64)
        for p in (1, 2, 3, math.inf):
            for box in ({}, {"lower": 0.0, "upper": 1.0}):
                for turn in range(rounds):
                    wall, cpu = time.perf_counter(), time.process_time()
                    rl.certify(model, x, rl.LpBall(p, 0.1, **box))
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    rows.append(
                        {
                            "samples": n,
                            "features": d,
                            "classes": 10,
                            "p": p,
                            "box": bool(box),
                            "round": turn,
                            "seconds": wall,
                            "cpu_seconds": cpu,
                        }
                    )
    recording.save(rows, given)
    table = Table("samples", "features", "p", "box", "seconds (median)", "CPU seconds (median)")
    for key in dict.fromkeys((r["samples"], r["features"], r["p"], r["box"]) for r in rows):
        mine = [r for r in rows if (r["samples"], r["features"], r["p"], r["box"]) == key]
        medians = (statistics.median(r[t] for r in mine) for t in ("seconds", "cpu_seconds"))
        table.add_row(*map(str, key), *(f"{m:.3f}" for m in medians))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
