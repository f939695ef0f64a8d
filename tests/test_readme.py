"""The README's Python runs as it stands, one block after the other."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    names = {"net": net, "x": torch.rand(20, 3, 2, 2), "y": torch.arange(20) % 3}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_two_commands_open_it():
    first = README.index("```")
    assert README[first:].startswith("```\nmake demo ")
    assert "\nmake test " in README[first : README.index("```", first + 3)]
