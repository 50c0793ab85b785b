"""The page of two runs on different grids, as a browser shows it."""

import json
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest
import torch

from minimax_train.report.charts import Curve, draw, thin
from minimax_train.report.cli import main
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import DIVISIBLE, tiny_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHORT = [*DIVISIBLE, "recipe.steps=4", "recipe.decay_steps=1", "recipe.warmup_steps=1", "recipe.eval_interval=2"]
SHORT += ["checkpoint.interval=0", "logging.norms=2"]
HOSTILE = "step 3: loss <b>&amp; \"more\"</b><script>document.title='taken'</script>"
# In the browser: what is where, once it is laid out.
PROBE = """<pre id="probe"></pre><script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
document.getElementById("probe").textContent = JSON.stringify({
  title: document.title, window: window.innerWidth, page: document.documentElement.scrollWidth,
  loaded: performance.getEntriesByType("resource").length, injected: document.querySelectorAll("td b").length,
  legend: [...document.querySelectorAll(".legend span")].map(e => [e.innerText, getComputedStyle(e).color]),
  headings: [...document.querySelectorAll("h2")].map(e => e.innerText),
  tables: [...document.querySelectorAll("table")].map(t => [...t.rows].map(r => [...r.cells].map(c => c.innerText))),
  charts: [...document.querySelectorAll("svg.chart")].map(svg => ({
    title: svg.querySelector(".title").textContent, box: box(svg),
    texts: [...svg.querySelectorAll("text")].map(box),
    marks: [...svg.querySelectorAll(".mark")].map(e => [box(e), e.textContent]),
    curves: [...svg.querySelectorAll(".curve")].map(e => [box(e), e.textContent, getComputedStyle(e).stroke]),
  })),
});
</script></body>"""


def _train(grid, config):
    Trainer(config, grid, torch.device("cpu")).train()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name, ranks, axes in (("one", 1, {}), ("two", 2, {"tp": 2})):
        grid = [f"parallel.{axis}={size}" for axis, size in axes.items()]
        run_ranks(_train, ranks, tiny_run(folder / name, *SHORT, *grid, f"run_dir={folder}/runs/{name}"), **axes)
    events = folder / "runs/one/events.jsonl"
    outlier = json.dumps({"step": 3, "time": 1e9, "event": "outlier", "text": HOSTILE})
    events.write_text(events.read_text() + f"{outlier}\n")
    assert main([f"{folder}/runs/one", f"{folder}/runs/two", "-o", f"{folder}/report.html"]) == 0
    return folder


def _open(page, width, *more):
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
    ]
    command += [f"--user-data-dir={page.parent}/browser", f"--window-size={width},3000", *more, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make browser")
@pytest.mark.parametrize("width", [1300, 600])
def test_the_page_in_a_browser(report, width):
    page = report / f"probe-{width}.html"
    points = [(0.0, 1e-4), (4e-4, 3e-4)]  # the last tick is at the edge
    long_labels = draw("long labels", "hours", [Curve(i, f"{run}: x", points) for i, run in enumerate(("one", "two"))])
    page.write_text((report / "report.html").read_text().replace("</body>", long_labels + PROBE))
    dom = _open(page, width, "--dump-dom")
    text = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)[1]
    for name, letter in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(name, letter)
    seen = json.loads(text)
    assert seen["title"] == "one · two" and not seen["loaded"] and not seen["injected"]
    assert seen["page"] <= seen["window"] == width  # nothing has to be scrolled sideways
    (one, blue), (two, orange) = seen["legend"]
    assert (one, two) == ("one", "two") and blue != orange
    assert seen["headings"] == ["Summary", "What differs", "Loss", "Speed", "Memory", "Routing", "Norms", "Events"]
    summary, different, events = seen["tables"]
    assert [row[:2] for row in summary[1:]] == [
        ["one", "1 rank, parallel sizes of 1; after step 0"],
        ["two", "2 ranks, parallel.tp=2; after step 0"],
    ]
    assert ["parallel.tp", "1", "2"] in different and not [row for row in different if row[0] == "model.hidden_size"]
    assert events[1][1:] == ["one", "outlier", "3", HOSTILE]
    charts = {chart["title"]: chart for chart in seen["charts"]}
    assert len(charts) == len(seen["charts"]) > 20 and {"tokens per second", "weight_norm/experts"} <= charts.keys()
    for axis in ("tokens", "steps", "hours of training"):
        marks = charts[f"loss over {axis} (dots: held out)"]["marks"]
        assert sum(text == f"one: outlier: {HOSTILE}" for _, text in marks) == 1
    for chart in seen["charts"]:
        left, top, right, bottom = chart["box"]
        runs = {orange} if chart["title"].startswith("fullest") else {blue, orange}  # of one rank, none is the fullest
        assert {stroke for *_, stroke in chart["curves"]} == runs, chart["title"]
        assert all(a >= left and b >= top and c <= right and d <= bottom for a, b, c, d in chart["texts"])
        for (a, _, b, _), label, _ in chart["curves"]:
            assert left < a < b < right and label.startswith(("one", "two"))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make browser")
def test_both_runs_are_painted(report):
    _open(report / "report.html", 1300, f"--screenshot={report}/page.png")
    pixels = (matplotlib.image.imread(report / "page.png")[..., :3] * 255).round().astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (np.abs(pixels - np.array(colour)).max(-1) < 8).sum() > 300


def test_numbers_of_the_page_are_those_of_the_run(report):
    """Without a browser: a curve's ends lie where its metric's first and last values do."""
    page = (report / "report.html").read_text()
    records = [json.loads(line) for line in (report / "runs/one/metrics.jsonl").read_text().splitlines()]
    rates = [record["tokens_per_second"] for record in records if "loss" in record]
    chart = next(c for c in page.split('<svg class="chart"') if c.partition(">tokens per second<")[1])
    line = re.findall(r'class="curve run-0" points="([^"]+)"', chart)[0]
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    assert len(points) == 4
    heights = [y for _, y in points]
    scale = (max(rates) - min(rates)) / (max(heights) - min(heights))
    assert [max(rates) - (y - min(heights)) * scale for y in heights] == pytest.approx(rates, rel=0.02)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_thinned_curves_keep_their_peaks():
    points = [(float(i), float(i % 7)) for i in range(10_001)]
    points[4321] = (4321.0, 99.0)
    kept = thin(points)
    assert len(kept) <= 502 and (4321.0, 99.0) in kept and kept == sorted(kept)
    assert thin(points[:500]) == points[:500]


def test_what_is_no_run_is_told_in_a_line(tmp_path, report, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    nowhere, page = tmp_path / "nowhere", tmp_path / "nowhere/page.html"
    for given, told in [
        ([nowhere], f"{nowhere}: no run: it has no metrics.jsonl"),
        ([tmp_path], f"{tmp_path}/metrics.jsonl: no step was recorded yet"),
        ([report / "runs/one", "-o", page], f"--output={page}: cannot be written: No such file or directory"),
    ]:
        assert main(list(map(str, given))) == 2
        assert capsys.readouterr().err == f"error: {told}\n"
