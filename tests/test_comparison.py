"""Two reports beside each other: the test, what is refused, and what the pages show."""

import copy
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import robustlearn as rl
from robustlearn import report
from robustlearn.errors import InputError
from robustlearn.evaluate import document
from robustlearn.report import figures
from robustlearn.report.page import _confusion, page

HOSTILE = ["<script>alert(1)</script>", "_Private", "$x$ \\frac", "[/b] [red]x", "a & 'b' \"c\""]


def sample(index, *, right=True, broken_by=None, label=0, prediction=None):
    """A row of a report, by hand."""
    prediction = prediction if prediction is not None else label if right else 1 - label
    return {
        "index": index,
        "label": label,
        "clean_correct": right,
        "broken_by": broken_by,
        "prediction": prediction,
    }


def evaluation(samples, **given):
    return {
        "model": "Net",
        "data": "digits",
        "task": "classification",
        "threat": {"text": "L2 ≤ 0.5", "p": 2, "eps": 0.5},
        "verdict": {"trustworthy": True, "text": "trustworthy: 3 checks found nothing\nmore"},
        "attacks": [{"name": "pgd", "skipped": None}],
        "curve": {"eps": [0.0, 0.5], "attacked": [1.0, 0.5], "certified": None},
        "samples": samples,
        "classes": None,
        **given,
    }


def whole(*samples, **given):
    return {"schema": report.SCHEMA, "evaluations": [evaluation(list(samples), **given)]}


def against(only_first, only_second, both=3, neither=2):
    """Two documents with so many samples of each kind."""
    kinds = [(1, 0)] * only_first + [(0, 1)] * only_second + [(1, 1)] * both + [(0, 0)] * neither
    return tuple(
        whole(*(sample(i, broken_by=None if k[side] else "pgd") for i, k in enumerate(kinds)))
        for side in (0, 1)
    )


# ---------------------------------------------------------------------- the test


def enumerated(b, c):
    """Σ over all outcomes of b + c fair coins that are no likelier than b heads."""
    n = b + c
    ways = [math.comb(n, k) for k in range(n + 1)]
    return sum(w for w in ways if w <= ways[b]) / 2**n


@pytest.mark.parametrize("apart", range(13))
def test_mcnemars_p_is_that_of_all_outcomes(apart):
    for b in range(apart + 1):
        found = report.compared(*against(b, apart - b))["attacked"]
        assert (found["only_first"], found["only_second"]) == (b, apart - b)
        assert found["p"] == pytest.approx(enumerated(b, apart - b))
        assert [share["n"] for share in found["shares"]] == [apart + 5] * 2
        assert [share["value"] for share in found["shares"]] == [
            (b + 3) / (apart + 5),
            (apart - b + 3) / (apart + 5),
        ]


def test_clean_and_attacked_are_tested_apart():
    first = whole(*(sample(i, right=i < 8, broken_by="pgd" if i < 2 else None) for i in range(10)))
    second = whole(*(sample(i, right=i > 0, broken_by="pgd" if i > 6 else None) for i in range(10)))
    result = report.compared(first, second)
    assert (result["clean"]["only_first"], result["clean"]["only_second"]) == (1, 2)
    # the first stands on 2 … 7, the second on 1 … 6
    assert (result["attacked"]["only_first"], result["attacked"]["only_second"]) == (1, 1)
    assert result["attacked"]["p"] == 1
    assert result["verdicts"] == ["trustworthy: 3 checks found nothing"] * 2


def test_only_samples_of_both_are_paired():
    first = whole(*(sample(i) for i in (4, 1, 2, 3)))
    second = whole(*(sample(i, broken_by="pgd" if i == 3 else None) for i in (3, 4, 9)))
    result = report.compared(first, second)
    assert result["samples"] == 2
    assert (result["attacked"]["only_first"], result["attacked"]["only_second"]) == (1, 0)


def test_the_conclusion_names_the_better_one():
    first, second = against(12, 1)
    second["evaluations"][0]["model"] = "Other"
    said = report.conclusion(report.compared(first, second))
    assert said.startswith("Under attack Net holds on more of these samples than Other (83.3% ag")
    said = report.conclusion(report.compared(second, first))
    assert said.startswith("Under attack Net holds on more of these samples than Other")
    assert "cannot be told apart" in report.conclusion(report.compared(*against(5, 1)))
    assert report.compared(*against(1, 1))["models"] == ["Net (first)", "Net (second)"]


def test_no_conclusion_from_a_figure_that_is_not_believed():
    first, second = against(12, 1)
    first["evaluations"][0]["verdict"] = {"trustworthy": False, "text": "suspicious (2 of 9):\n"}
    result = report.compared(first, second)
    said = report.conclusion(result)
    assert said.startswith("No conclusion")
    assert "Net (first) is suspicious (2 of 9)" in said
    assert "holds on more" not in said
    assert result["attacked"]["p"] < 0.05


def test_no_conclusion_from_other_attacks():
    first, second = against(12, 1)
    ran = [("pgd", None), ("square", "the gradients show no sign of masking"), ("fab", "no budget")]
    second["evaluations"][0]["attacks"] = [{"name": n, "skipped": why} for n, why in ran]
    assert "square ran on Net (second) only" in report.conclusion(report.compared(first, second))
    second["evaluations"][0]["attacks"] = [{"name": "pgd", "skipped": "the budget is spent"}]
    assert "pgd ran on Net (first) only" in report.conclusion(report.compared(first, second))


def test_the_same_model_attacked_in_earnest_and_not():
    x = torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    net, threat = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), rl.LpBall(2, 0.3)
    y = net(x).argmax(1)
    plans = ("square:queries=2", "pgd:steps=20,square:queries=2@masked")
    made = [document([rl.evaluate(net, x, y, threat, attacks=plan)]) for plan in plans]
    assert report.conclusion(report.compared(*made)).startswith("No conclusion")
    moved = document([rl.evaluate(net, x + 1e-3, y, threat, attacks=plans[0])])
    with pytest.raises(InputError, match=r"sample 0 has other features .*\(40 such samples\)"):
        report.compared(made[0], moved)


def test_two_linear_models_whose_answer_is_known():
    """b and c are counted from exact distances."""
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = [torch.tensor(w, dtype=torch.float64) for w in ([1, 2, -1, 0.5], [2, 1.5, 0, -1])]
    y = (x @ weights[0] > 1.2).long()
    documents, stands = [], []
    for weight in weights:
        net = nn.Linear(4, 2).double()
        with torch.no_grad():
            net.weight.copy_(torch.stack([0 * weight, weight]))
            net.bias.copy_(torch.tensor([0, -1.2]))
        made = rl.evaluate(net, x, y, rl.LpBall(2, 0.05), attacks="linear_exact")
        documents.append(document([made]))
        gap = (x @ weight - 1.2) * (2 * y - 1)
        stands.append((gap / weight.norm() > 0.05).numpy())
    found = report.compared(*documents)["attacked"]
    assert found["only_first"] == (stands[0] & ~stands[1]).sum() > 3
    assert found["only_second"] == (stands[1] & ~stands[0]).sum()
    assert found["p"] == pytest.approx(enumerated(found["only_first"], found["only_second"]))


# ---------------------------------------------------------------------- refusals


def test_what_cannot_be_paired_is_refused():
    first = whole(sample(0), sample(1))
    threat = {"text": "L2 ≤ 1", "p": 2, "eps": 1.0}
    for second, message in (
        (whole(sample(0), threat=threat), r"the threats differ: L2 ≤ [\d.]+ and L2 ≤ [\d.]+; ev"),
        (whole(sample(0), task="regression"), "one of these is a regressor"),
        (whole(sample(5)), "no sample in common"),
        (whole(sample(0), sample(1, label=1)), r"sample 1 has another label .*\(1 such samples\)"),
    ):
        for pair in ((first, second), (second, first)):
            with pytest.raises(InputError, match=message):
                report.compared(*pair)
    several = copy.deepcopy(first)
    several["evaluations"] *= 2
    with pytest.raises(InputError, match="one evaluation is expected; this one has Net, Net"):
        report.compared(first, several)


def test_files_that_are_no_reports(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(OSError, match=r"report\.json"):
        report.load(path)
    good = json.dumps(whole(sample(0)))
    path.write_text(good)
    assert report.load(tmp_path) == report.load(path) == whole(sample(0))
    lacking = whole(sample(0))
    del lacking["evaluations"][0]["samples"]
    for text, message in (
        (good[:-9], "not readable as JSON"),
        ("", "not readable as JSON"),
        ("[1]", "is not a report of robustlearn"),
        ('{"schema": "robustlearn-report/9"}', "is not a report of robustlearn"),
        (f'{{"schema": "{report.SCHEMA}"}}', "is damaged"),
        (f'{{"schema": "{report.SCHEMA}", "evaluations": []}}', "is damaged"),
        (f'{{"schema": "{report.SCHEMA}", "evaluations": [3]}}', "is damaged"),
        (json.dumps(lacking), "is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            report.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not readable as JSON"):
        report.load(path)


# ---------------------------------------------------------------------- pages and tables


class Collect(HTMLParser):
    """Tags, where they lead, and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_as_they_are(name):
    first, second = against(4, 1)
    first["evaluations"][0]["model"] = name
    second["evaluations"][0]["data"] = first["evaluations"][0]["data"] = name
    html = report.comparison_page(first, second)
    shown = Collect(html)
    assert "script" not in shown.tags
    assert not {"link", "iframe", "object", "img"} & set(shown.tags)
    assert all(link.startswith("#") for link in shown.links)
    assert "default-src 'none'" in html
    assert shown.text.count(name) >= 5  # title, head and verdict, and in the legend of the figure
    assert name in Collect(html[html.index("<svg") :]).text
    console = Console(width=400, record=True, file=open("/dev/null", "w"))
    console.print(report.comparison_table(report.compared(first, second)))
    console.file.close()
    text = console.export_text()
    assert text.count(name) == 2


def test_the_page_of_two_models_alike_tells_them_apart():
    html = report.comparison_page(*against(4, 1))
    legend = Collect(html[html.index("<svg") :]).text
    assert "Net (first)" in legend
    assert "Net (second)" in legend
    without = [copy.deepcopy(part) for part in against(4, 1)]
    without[1]["evaluations"][0]["curve"] = None  # budgets per sample
    assert "<svg" not in report.comparison_page(*without)


# ---------------------------------------------------------------------- figures


@pytest.fixture
def drawn(monkeypatch):
    """Return the axes of a figure instead of its picture."""
    from matplotlib.figure import Figure

    def axes_of(draw, title):
        axes = Figure().add_subplot()
        draw(axes)
        return axes

    monkeypatch.setattr(figures, "_svg", axes_of)


def points_of(line):
    return np.asarray(line.get_xdata(), float).tolist(), np.asarray(line.get_ydata()).tolist()


def attacked(name, attempted, broken, forwards, backwards):
    numbers = {"attempted": attempted, "broken": broken}
    return {"name": name, **numbers, "forwards": forwards, "backwards": backwards}


def test_cost_against_found(drawn):
    runs = [
        attacked("pgd:steps=5", 8, 3, 48, 40),
        attacked("idle", 0, 0, 0, 0),
        attacked("square:queries=9@audit", 5, 1, 45, 0),
    ]
    given = {"attacks": runs, "clean": {"value": 0.8, "n": 10}, "task": "classification"}
    axes = figures.cost(given)
    spent, standing = points_of(axes.lines[0])
    assert spent == pytest.approx([0, 8.8, 13.3])
    assert standing == pytest.approx([0.8, 0.5, 0.4])
    assert [text.get_text() for text in axes.texts] == ["pgd", "square"]
    assert figures.cost({**given, "task": "regression"}) is None
    assert figures.cost({**given, "attacks": runs[1:2]}) is None


def test_loss_against_iteration(drawn):
    axes = figures.trace({"verdict": {"ascent": [-1.0, 0.5, 2.0]}})
    assert points_of(axes.lines[0]) == ([0, 1, 2], [-1.0, 0.5, 2.0])
    assert figures.trace({"verdict": {"ascent": []}}) is None
    assert figures.trace({"verdict": {}}) is None


def test_curves_of_two_models(drawn):
    first, second = (part["evaluations"][0] for part in against(1, 1))
    second["curve"] = {"eps": [0.0, 0.5], "attacked": [0.9, 0.7], "certified": [0.8, 0.2]}
    axes = figures.curves([first, second], ["one", "_two"])
    values = [points_of(line)[1] for line in axes.lines]
    assert values[:3] == [[1.0, 0.5], [0.9, 0.7], [0.8, 0.2]]
    assert axes.lines[0].get_color() != axes.lines[1].get_color() == axes.lines[2].get_color()
    shown = [text.get_text().strip("\u200b") for text in axes.get_legend().get_texts()]
    assert shown == ["one", "_two"]
    assert figures.curves([first, {**second, "curve": None}], ["one", "two"]) is None


# ---------------------------------------------------------------------- what turns into what


def test_confusion_by_hand():
    samples = [
        sample(0, label=2),
        sample(1, label=2, broken_by="pgd", prediction=10),
        sample(2, label=2, right=False, prediction=0),
        sample(3, label=10),
        sample(4, label=10, prediction=2),  # a tie that no attack broke stands
    ]
    found = _confusion(evaluation(samples))
    assert found["names"] == ["0", "2", "10"]
    two, ten = found["rows"]
    assert (two["name"], two["n"], two["counts"]) == ("2", 3, [1, 1, 1])
    assert (two["clean"], two["attacked"]) == (2 / 3, 1 / 3)
    assert (ten["name"], ten["n"], ten["counts"]) == ("10", 2, [0, 1, 1])
    assert (ten["clean"], ten["attacked"]) == (1, 1)
    named = _confusion(evaluation(samples, classes=[f"c{k}" for k in range(11)]))
    assert named["names"] == ["c0", "c2", "c10"]
    assert _confusion(evaluation(samples, task="regression")) is None
    many = [sample(i, label=i) for i in range(21)]
    assert _confusion(evaluation(many)) is None
    assert len(_confusion(evaluation(many[:20]))["rows"]) == 20


def test_the_page_of_an_evaluation_agrees_with_its_rows():
    """Shares by class, weighted by their sizes, are the totals."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 3).double(), torch.rand(40, 3, dtype=torch.float64)
    y = net(x + 0.05 * torch.randn(40, 3, dtype=torch.float64)).argmax(1)
    made = rl.evaluate(net, x, y, rl.LpBall(2, 0.1), attacks="linear_exact", classes=HOSTILE[:3])
    found = _confusion(made.to_dict())
    for name in ("clean", "attacked"):
        total = sum(row["n"] * row[name] for row in found["rows"]) / 40
        assert total == pytest.approx(getattr(made, name).value)
    assert sum(sum(row["counts"]) for row in found["rows"]) == 40
    html = page(document([made]))
    assert "script" not in Collect(html).tags
    assert f"→ {HOSTILE[0]}" in Collect(html).text
