"""The report of a comparison in headless Chromium: `make browser`, since a browser is no Python package.

It fails where there is none: `apt-get install chromium`, or SIMRL_BROWSER=/path/to/chrome. Screenshots go to
build/report, to be looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from simrl.experiments.config import load_config
from simrl.experiments.html_figures import spans_of
from simrl.experiments.html_report import write_report
from simrl.experiments.run import Result, run, write_run

POLICIES = ("verl", "rlhfuse", "rlhfless")
SCREENSHOTS = Path(__file__).parents[1] / "build" / "report"
HOSTILE = "<img src=x onerror=alert(1)><b>prompt</b>"
# Chromium runs as root in containers, and else asks its makers for updates.
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
FIND = "[...Bokeh.documents[0].all_models].find((model) => model.name === name)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("SIMRL_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.fail("no Chromium: apt-get install chromium, or SIMRL_BROWSER=/path/to/chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    small = ("job.model=qwen2.5-0.5b", "job.prompts_per_step=64", "job.dataset_prompts=64", "engine.tensor_parallel=2")
    found = {policy: run(load_config(policy=policy, nodes=2, steps=4, sets=small)) for policy in POLICIES}
    for result in found.values():
        result.frames.samples["prompt_id"] = HOSTILE
    return found


@pytest.fixture(scope="module")
def report(results: dict[str, Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for policy, result in results.items():
        write_run(result, folder / policy)
    write_report([folder / policy for policy in POLICIES], folder / "report.html")
    return folder / "report.html"


def value(page: Page, expression: str, name: str) -> Any:
    """*expression* of `model`, the page's model with that name."""
    return page.evaluate(f"(name) => {{ const model = {FIND}; return {expression} }}", name)


def tooltips(page: Page) -> list[str]:
    """Texts of all tooltips that are shown; they live in shadow roots."""
    script = """() => { const found = []; const look = (root) => { for (const element of root.querySelectorAll("*")) {
        if (element.classList.contains("bk-Tooltip") && element.shadowRoot) found.push(element.shadowRoot.textContent);
        if (element.shadowRoot) look(element.shadowRoot); } }; look(document); return found }"""
    return list(page.evaluate(script))


def place_of(page: Page, name: str, x: float, y: float) -> tuple[float, float]:
    """Where on the screen a point of a figure's data is."""
    page.evaluate(f"(name) => {{ const model = {FIND}; Bokeh.index.get_by_id(model.id).el.scrollIntoView() }}", name)
    script = f"""([name, x, y]) => {{ const model = {FIND}; const view = Bokeh.index.get_by_id(model.id);
        const box = view.el.getBoundingClientRect();
        return [box.x + view.frame.x_scale.compute(x), box.y + view.frame.y_scale.compute(y)] }}"""
    left, top = page.evaluate(script, [name, x, y])
    return left, top


def pixel(page: Page, name: str, x: float, y: float) -> list[int]:
    """Red, green and blue of a figure's canvas at a point of its data."""
    script = f"""([name, x, y]) => {{ const model = {FIND}; const view = Bokeh.index.get_by_id(model.id);
        const canvas = view.canvas_view.primary.canvas; const ratio = canvas.width / view.el.clientWidth;
        const place = [view.frame.x_scale.compute(x) * ratio, view.frame.y_scale.compute(y) * ratio];
        return [...canvas.getContext("2d").getImageData(...place, 1, 1).data.slice(0, 3)] }}"""
    return list(page.evaluate(script, [name, x, y]))


@dataclass(frozen=True)
class Span:
    """What the timeline tells of a span, and its middle (s, row)."""

    who: str
    where: str
    middle: tuple[float, float]


def learning_of(result: Result) -> Span:
    """The last of the spans in which all learn."""
    spans = spans_of(result.frames.workers)
    last = spans[spans["kind"] == "learning"].sort_values("left").iloc[-1]
    middle = (float(last["left"] + last["right"]) / 2, float(last["bottom"]) + 0.5)
    return Span(str(last["who"]), str(last["where"]), middle)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 1920])
def test_the_report_works_without_errors_and_requests(
    width: int, scheme: Any, browser: Browser, report: Path, results: dict[str, Result]
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-drawn]")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(1000)  # for the paint after the last change of colours
    page.screenshot(path=SCREENSHOTS / f"report-{width}-{scheme}.png", full_page=True)

    # As wide as the window, in the colours asked for.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ink = value(page, "model.below[0].major_label_text_color", "timeline verl")
    assert ink == ("#222" if scheme == "light" else "#e6e6e6")

    # Every span is drawn.
    for policy, result in results.items():
        drawn = "model.renderers.filter((r) => r.name !== 'step').map((r) => r.data_source.get_length())"
        assert sum(value(page, drawn, f"timeline {policy}")) == len(spans_of(result.frames.workers))
        learning = learning_of(result)
        assert pixel(page, f"timeline {policy}", *learning.middle) == pytest.approx([0x00, 0x9E, 0x73], abs=5)

    # Hover tells what is under the pointer.
    name = "timeline verl"
    learning = learning_of(results["verl"])
    x, y = place_of(page, name, *learning.middle)
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.wait_for_timeout(500)
    (shown,) = tooltips(page)
    assert "learning" in shown
    assert learning.who in shown
    assert learning.where in shown

    # A drag zooms all timelines in, reset zooms out.
    whole = value(page, "[model.x_range.start, model.x_range.end]", name)
    page.mouse.down()
    page.mouse.move(x - 80, y + 5, steps=4)
    page.mouse.up()
    page.wait_for_timeout(500)
    low, high = value(page, "[model.x_range.start, model.x_range.end]", "timeline rlhfless")
    assert high == pytest.approx(learning.middle[0], abs=0.02 * whole[1])
    assert whole[0] < low < high < whole[1]
    page.evaluate(f"(name) => {{ const model = {FIND}; Bokeh.index.get_by_id(model.id).reset() }}", name)
    assert value(page, "[model.x_range.start, model.x_range.end]", name) == whole

    # Ctrl and wheel zoom; the wheel alone scrolls the page.
    page.mouse.wheel(0, 50)
    page.wait_for_timeout(300)
    assert value(page, "[model.x_range.start, model.x_range.end]", name) == whole
    x, y = place_of(page, name, *learning.middle)
    page.mouse.move(x, y)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -400)
    page.keyboard.up("Control")
    page.wait_for_timeout(500)
    low, high = value(page, "[model.x_range.start, model.x_range.end]", name)
    assert high - low < 0.9 * (whole[1] - whole[0])

    assert problems == []
    assert requests == [report.as_uri()]
    context.close()


def test_prompts_with_markup_are_text_in_tooltips(browser: Browser, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-drawn]")
    page.wait_for_timeout(500)
    seconds = value(page, "model.renderers[0].data_source.get_column('seconds')[1]", "critical verl")
    x, y = place_of(page, "critical verl", 1, seconds / 2)
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.wait_for_timeout(500)
    (shown,) = tooltips(page)
    assert HOSTILE in shown
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    page.close()
