"""The report as people open it: in a browser, by mouse, by keyboard, on a phone, in the dark and on paper."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from leoclr_fast.report.page import write_report
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.training.loop import pretrain
from tests.leoclr_fast.chromium import Page, browser, find_chromium
from tests.leoclr_fast.conftest import tiny_config, write_tiny_images
from tests.leoclr_fast.written_run import knn, start, step_record, written_run

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
    pytest.mark.timeout(300),
]

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    program = find_chromium()
    assert program is not None
    with browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, on images of a class with a hostile name; its report is the one that it wrote itself."""
    folder = tmp_path_factory.mktemp("chromium")
    data = write_tiny_images(folder / "data")
    for split in ("train", "val"):
        (data / split / "class2").rename(data / split / EVIL)
    pretrain(tiny_config(monitor__knn_every_epochs=1), data, folder / "run")
    return folder / "run"


def opened(page: Page, path: Path, **shown: Any) -> None:
    page.console.clear()
    page.requests.clear()
    page.show_as(**shown)
    page.open(path)


def read_values(page: Page) -> str:
    """What stands in the box beside the cursor of the loss curve."""
    return str(page.evaluate("document.querySelector('#plot-loss .readout').innerText"))


@pytest.mark.long
def test_the_policy_blocks_what_might_be_smuggled_in(page: Page, run: Path, tmp_path: Path) -> None:
    """Even if escaping failed: markup with a script or an address in the page does nothing, and nobody is asked."""
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/x.png"
        smuggled = f"<img src='{address}' onerror='document.title = 1'><script>document.title = 2</script>"
        text = (run / "report.html").read_text().replace("<main>", f"<main>{smuggled}", 1)
        (tmp_path / "smuggled.html").write_text(text)
        opened(page, tmp_path / "smuggled.html")
        title = page.evaluate("document.title")
        (tmp_path / "open.html").write_text(f"<!doctype html><img src='{address}'>")
        refused = [line for line in page.console if "Content Security Policy" in line]
        blocked = list(asked)
        opened(page, tmp_path / "open.html")
        server.shutdown()
    assert title.startswith("tiny")
    assert len(refused) >= 2
    assert blocked == []
    assert asked == ["/x.png"]  # without the policy it is fetched: the listener does hear


@pytest.mark.long
def test_the_pointer_reads_the_values_of_the_log(page: Page, run: Path) -> None:
    opened(page, run / "report.html")
    records = RunFolder(run).read_metrics("step")
    place = page.evaluate(
        """(() => {
          const plot = document.querySelector('#plot-loss');
          plot.scrollIntoView({block: 'center', behavior: 'instant'});
          const box = plot.querySelector('svg').getBoundingClientRect();
          const data = JSON.parse(document.getElementById('plot-data').textContent).loss;
          return {left: box.left, top: box.top, scale: box.width / data.width, box: data.box, x: data.x, y: data.y};
        })()"""
    )
    for index in (0, 5, len(records) - 1):
        epoch = records[index]["step"] / 3
        share = (epoch - place["x"][0]) / (place["x"][1] - place["x"][0])
        x = place["left"] + place["scale"] * (place["box"][0] + share * place["box"][2])
        page.move_to(x, place["top"] + 40)
        text = read_values(page)
        assert float(re.findall(r"epoch ([\d.]+)", text)[0]) == pytest.approx(epoch, abs=1e-3)
        assert float(re.findall(r"this run: ([\d.]+)", text)[0]) == pytest.approx(records[index]["loss"], abs=1e-3)
        dot = page.evaluate(
            "(() => { const dot = document.querySelector('#plot-loss circle'); return [+dot.getAttribute('cx'), "
            "+dot.getAttribute('cy')]; })()"
        )
        height = (records[index]["loss"] - place["y"][0]) / (place["y"][1] - place["y"][0])
        assert dot[0] == pytest.approx(place["box"][0] + share * place["box"][2], abs=0.1)
        assert dot[1] == pytest.approx(place["box"][1] + (1 - height) * place["box"][3], abs=0.1)


@pytest.mark.long
def test_the_drawn_line_goes_through_the_values(page: Page, run: Path) -> None:
    """matplotlib drew it, the script places the dots: both must mean the same place."""
    opened(page, run / "report.html")
    drawn = page.evaluate(
        """(() => {
          const paths = [...document.querySelectorAll('#plot-loss path')];
          const line = paths.find((path) => path.style.stroke === 'var(--series-0)');
          const end = line.getPointAtLength(line.getTotalLength()), begin = line.getPointAtLength(0);
          const data = JSON.parse(document.getElementById('plot-data').textContent).loss;
          const at = (x, y) => [
            data.box[0] + data.box[2] * (x - data.x[0]) / (data.x[1] - data.x[0]),
            data.box[1] + data.box[3] * (1 - (y - data.y[0]) / (data.y[1] - data.y[0]))];
          const curve = data.curves[0], last = curve.x.length - 1;
          return [begin.x, begin.y, end.x, end.y, at(curve.x[0], curve.y[0]), at(curve.x[last], curve.y[last])].flat();
        })()"""
    )
    np.testing.assert_allclose(drawn[:4], drawn[4:], atol=0.05)


@pytest.mark.long
def test_the_keyboard_reads_all_values(page: Page, run: Path) -> None:
    opened(page, run / "report.html")
    records = RunFolder(run).read_metrics("step")
    page.evaluate("document.querySelector('a.skip').focus()")
    for _ in range(40):
        page.press("Tab")
        if page.evaluate("document.activeElement.id") == "plot-loss":
            break
    assert page.evaluate("document.activeElement.id") == "plot-loss"
    assert page.evaluate("document.activeElement.getAttribute('role')") == "slider"
    page.press("Home")
    heard = []
    for _ in records:
        heard.append(page.evaluate("document.activeElement.getAttribute('aria-valuetext')"))
        page.press("ArrowRight")
    spoken = [float(re.findall(r"this run: ([\d.]+)", text)[0]) for text in heard]
    assert spoken == pytest.approx([record["loss"] for record in records], abs=1e-3)
    page.press("Escape")
    assert page.evaluate("document.querySelector('#plot-loss .readout').hidden")


@pytest.mark.long
def test_every_plot_has_words_and_a_table(page: Page, run: Path) -> None:
    """And a hostile name is text, the contact sheet is seen, and nothing is complained of."""
    opened(page, run / "report.html")
    assert page.console == []
    assert EVIL in page.evaluate("document.body.innerText")
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 100)")
    plots = page.evaluate(
        """[...document.querySelectorAll('figure .plot')].map((plot) => ({
          label: plot.getAttribute('aria-label'),
          heading: plot.closest('figure').querySelector('h3').innerText,
          rows: plot.closest('figure').querySelectorAll('details tbody tr').length}))"""
    )
    assert [plot["heading"] for plot in plots] == [
        "Loss",
        "kNN accuracy, %",
        "Positive and negative similarity",
        "Gradient norm",
        "Learning rate",
        "Images per second",
        "Data wait, %",
    ]
    steps = RunFolder(run).read_metrics("step")
    first = plots[0]["label"]
    assert f"this run: from {steps[0]['loss']:.4g} at 0.333 to {steps[-1]['loss']:.4g} at 4" in first
    assert "Arrow keys read the values." in first
    assert plots[0]["rows"] == len(steps)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    table = page.evaluate(
        "[...document.querySelectorAll('figure')[0].querySelectorAll('tbody tr')].map((row) => "
        "[...row.children].map((cell) => +cell.innerText))"
    )
    np.testing.assert_allclose(table, [[record["step"] / 3, record["loss"]] for record in steps], rtol=1e-4)
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((each) => +each.tagName[1])")
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    assert page.evaluate("document.documentElement.lang") == "en"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.long
@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_nothing_sticks_out_at_any_width(page: Page, run: Path, width: int) -> None:
    opened(page, run / "report.html", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(
        "[...document.querySelectorAll('.plot svg text')].map((text) => text.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 9  # of the smallest writing in a plot, in pixels


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True])
def test_contrast_in_both_schemes_and_on_paper(page: Page, run: Path, tmp_path: Path, dark: bool) -> None:
    """WCAG AA: 4.5 for text, 3 for lines."""
    opened(page, run / "report.html", dark=dark)
    colours = page.evaluate(
        """(() => {
          const probe = document.createElement('i'); document.body.append(probe);
          const colour = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
          const names = ['paper', 'card', 'ink', 'ink-soft', 'link', 'good', 'bad', 'warn',
            'series-0', 'series-1', 'series-2', 'series-3', 'series-4', 'series-5'];
          return Object.fromEntries(names.map((name) => [name, colour(name)]));
        })()"""
    )
    light = {name: luminance(colour) for name, colour in colours.items()}

    def contrast(one: str, other: str) -> float:
        low, high = sorted((light[one], light[other]))
        return (high + 0.05) / (low + 0.05)

    assert (light["paper"] < 0.02) == dark
    for name in ("ink", "ink-soft", "link", "bad", "warn", "good"):
        assert contrast(name, "paper") >= 4.5, name
    for number in range(6):
        assert contrast(f"series-{number}", "paper") >= 3
    picture = np.asarray(Image.open(page.screenshot(tmp_path / "page.png")).convert("L"))
    assert (np.median(picture) < 60) == dark
    opened(page, run / "report.html", dark=dark, media="print")  # light, and without controls
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_two_runs_are_read_together(page: Page, tmp_path: Path) -> None:
    """By keyboard and pointer; their steps differ: each is read where it has a value, and a gap is called so."""
    one = [
        start(),
        *(step_record(step, loss=5.0 if step != 20 else math.nan) for step in range(10, 61, 10)),
        knn(46, 20.0),
    ]
    other = [start(), *(step_record(step, loss=6.0) for step in range(5, 41, 5))]
    runs = [written_run(tmp_path / "one", one), written_run(tmp_path / "<b>other", other)]
    write_report(runs, tmp_path / "both.html")
    opened(page, tmp_path / "both.html", width=390)
    assert page.console == []
    assert page.requests[0] == (tmp_path / "both.html").as_uri()
    assert all(address.startswith("data:") for address in page.requests[1:])
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "<b>other: LeOCLR pretrained" in page.evaluate("document.body.innerText")
    page.evaluate("document.getElementById('plot-loss').focus()")
    page.press("Home")
    assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')") == "epoch 0.1087, <b>other: 6"
    for _ in range(3):
        page.press("ArrowRight")
    assert "one: not a number" in read_values(page)
    page.press("End")
    assert re.fullmatch(r"epoch 1.304\s+one: 5", read_values(page))
    x, y = page.evaluate(
        "(() => { const plot = document.getElementById('plot-loss'); plot.scrollIntoView({behavior: 'instant'}); "
        "const box = plot.getBoundingClientRect(); return [box.left + box.width / 4, box.top + box.height / 2]; })()"
    )
    page.move_to(x, y)
    assert re.fullmatch(r"epoch 0.21739\s+one: 5\s+<b>other: 6", read_values(page))
