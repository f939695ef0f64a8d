"""The document and its renderings: schema, escaping, and what a browser makes of the page."""

import base64
import json
import math
import shutil
import subprocess
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_diabetes, load_wine
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import robustlearn as rl
from robustlearn import data, evaluate, report
from robustlearn.cli.demo import DigitsNet
from robustlearn.evaluate import document, save
from robustlearn.report.files import plain

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
SCHEMA = json.loads((Path(report.__file__).parent / "schema.json").read_text())


@pytest.fixture(scope="module")
def reports():
    """An image classifier, a table with a certificate, a box that nothing leaves, a regressor."""
    digits = data.load("digits").take(slice(0, 60))
    threat = rl.LpBall(math.inf, 0.1, lower=0, upper=1)
    torch.manual_seed(0)
    images = evaluate(DigitsNet(), digits.x, digits.y, threat, certify="none")
    x, y = load_wine(return_X_y=True, as_frame=True)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    lower, upper = x.min().to_numpy(), x.max().to_numpy()
    threat = rl.LpBall(2, 0.5, scale=x.std().to_numpy(), lower=lower, upper=upper)
    table = evaluate(pipeline, x, y, threat, attacks="quick", data="wine")
    x, y = load_diabetes(return_X_y=True, as_frame=True)
    regression = evaluate(Ridge().fit(x, y), x, y, rl.LpBall(1, 0.01), attacks="quick")
    single = evaluate(Ridge().fit(x, y), x[:1], y[:1], rl.LpBall(1, 0.01), attacks="fgsm")
    return [images, table, regression, single]


@pytest.fixture(scope="module")
def folder(reports, tmp_path_factory):
    return save(
        reports, tmp_path_factory.mktemp("report"), command="robustlearn evaluate --x 'a b'"
    )


def test_the_document_keeps_its_schema(folder, reports):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    text = (folder / "report.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    jsonschema.validate(stored, SCHEMA)
    assert stored["schema"] == report.SCHEMA
    assert stored == json.loads(json.dumps(document(reports, command=stored["command"])))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**stored, "schema": "robustlearn-report/0"}, SCHEMA)


def test_curves_bound_each_other(reports):
    for evaluation in (r.to_dict() for r in reports[:2]):
        curve = evaluation["curve"]
        attacked = np.array([share for share in curve["attacked"] if share is not None])
        assert attacked[0] == evaluation["clean"]["value"]
        at_eps = np.searchsorted(curve["eps"], evaluation["threat"]["eps"] * (1 - 1e-9))
        assert attacked[at_eps] == pytest.approx(evaluation["attacked"]["value"])
        assert (np.diff(attacked) <= 0).all()
        if curve["certified"] is not None:
            assert (np.array(curve["certified"])[: len(attacked)] <= attacked + 1e-12).all()


def test_infinity_and_nan_can_be_written():
    held = {"a": [math.inf, -math.inf, math.nan, 1.5], "b": (None, "x", True)}
    assert plain(held) == {"a": ["inf", "-inf", None, 1.5], "b": [None, "x", True]}


class Collect(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_else(folder):
    page = Collect()
    page.feed((folder / "report.html").read_text())
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.tags.count("svg") == 7  # curve, margins and cost of two, the ascent of one
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    text = " ".join(page.text)
    assert "DigitsNet on data" in text
    assert "of the samples are robust" in text
    assert "both bounds meet" in text
    assert "The mean worst squared error lies between" in text
    assert "robustlearn evaluate --x 'a b'" in text
    assert "proline" in text  # feature names of the table


def test_the_table_for_the_terminal(reports):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(report.table(document(reports)))
    console.file.close()
    text = console.export_text()
    assert "StandardScaler" in text
    assert f"{reports[1].attacked.value:.1%}" in text
    assert "none" in text


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_page_in_a_browser(folder, tmp_path):
    """It has the content, fits a phone without sideways scrolling, and prints."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    base = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}"]

    def run(*more):
        return subprocess.run([*base, *more], capture_output=True, timeout=120, check=True).stdout

    url = f"file://{folder / 'report.html'}"
    dom = run("--dump-dom", url).decode()
    assert "both bounds meet" in dom
    # the page itself allows no script: measure a copy that has one
    source = (folder / "report.html").read_text()
    policy = source[source.index('<meta http-equiv="Content-Security') :].split("\n", 1)[0]
    measure = (
        "<iframe id='f' style='width:360px;height:600px;border:0'></iframe><script>"
        "const f = document.getElementById('f'); f.srcdoc = decodeURIComponent(window.atob('%s'));"
        "f.onload = () => { document.title = f.contentDocument.documentElement.scrollWidth; };"
        "</script>"
    )
    packed = base64.b64encode(urllib.parse.quote(source.replace(policy, "")).encode()).decode()
    copy = tmp_path / "phone.html"
    copy.write_text(measure % packed)
    dom = run("--virtual-time-budget=5000", "--dump-dom", f"file://{copy}").decode()
    width = int(dom.split("<title>")[1].split("</title>")[0])
    assert width <= 360
    run(f"--print-to-pdf={tmp_path / 'report.pdf'}", url)
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
