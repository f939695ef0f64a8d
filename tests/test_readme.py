"""The README's Python runs as it stands, one block after the other."""

import math
import re
from pathlib import Path

import torch

import robustlearn as rl
from robustlearn.attacks import unsuitable
from robustlearn.evaluate import PRESETS

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    names = {"net": net, "x": torch.rand(20, 3, 2, 2), "y": torch.arange(20) % 3}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 9
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_costs_of_the_presets_are_those_of_their_steps():
    def gradients(preset, p, scopes=("all",)):
        net, threat = rl.wrap(torch.nn.Sequential(torch.nn.Linear(2, 10))), rl.LpBall(p, 0.1)
        steps = [s for s in PRESETS[preset] if s.scope in scopes and s.needs != "affine"]
        fit = [s for s in steps if unsuitable(s.name, net, threat, (2,)) is None]
        return f"{sum(s.cost(10).gradients for s in fit):,}"

    rows = {row.split("`")[1]: row for row in README.splitlines() if row.startswith("| `")}
    for preset in PRESETS:
        told = rows[preset].split("|")[2]
        assert told.split()[0].strip(",") == gradients(preset, math.inf)
        assert gradients(preset, 2) in told
    for scope in ("near", "closest"):
        assert f" {gradients('standard', math.inf, (scope,))} for" in rows["standard"]


def test_the_two_commands_open_it():
    first = README.index("```")
    assert README[first:].startswith("```\nmake demo ")
    assert "\nmake test " in README[first : README.index("```", first + 3)]
