"""The page of a record in a headless Chromium, at the widths of a phone and of a desktop."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sample_records import full_record, sample_case, sample_record, sample_run, sample_speed

from pdcore.backend import FEATURES
from pdcore_conformance.record.writing import OUTCOMES, Record, load, run_alone, save, target
from pdcore_conformance.report import write_page

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
SECTIONS = (
    "outcomes",
    "failures",
    "known",
    "features",
    "errors",
    "speed",
    "growth",
    "memory",
    "environment",
    "cases",
)
WIDTHS = (400, 1400)
SCHEMES = ("light", "dark")

# Texts for the names and messages of a record. If the page did not escape one, it would have
# further elements, whether or not the content policy lets them act.
HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "</title></style></svg><svg onload=document.title='owned'>{{ 7 * 7 }}",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Start one Chromium for all tests, with a temporary profile."""
    chromium = shutil.which("chromium")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "chromium" if chromium is None else "chromedriver"
        reason = f"no {missing} on the path (Debian: apt-get install chromium chromium-driver)"
        # In CI a missing browser fails the tests, unless `.ci/run` says that there is none.
        if os.environ.get("CI") and not os.environ.get("WITHOUT_BROWSER"):
            pytest.fail(f"{reason}; WITHOUT_BROWSER=1 skips these tests")
        pytest.skip(reason)

    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Without the path of the driver selenium would search for one, and might download it.
    chrome = Chrome(options=options, service=Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@dataclass(frozen=True)
class View:
    """A page that the browser shows."""

    browser: Chrome
    address: str

    def ask(self, script: str, *arguments: Any) -> Any:
        """Evaluate a function body in the page."""
        return self.browser.execute_script(script, *arguments)

    def requests(self) -> list[str]:
        """Return the URLs requested since the last call, including failed requests."""
        messages = [
            json.loads(e["message"])["message"] for e in self.browser.get_log("performance")
        ]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture
def show(browser: Chrome) -> Callable[..., View]:
    """Open a page with a width in a color scheme; device emulation allows the width of a phone."""

    def opened(path: Path, width: int = 1400, scheme: str = "light") -> View:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(path.as_uri())
        view = View(browser, path.as_uri())
        assert view.ask("return innerWidth") == width
        return view

    return opened


@pytest.fixture(scope="module")
def record() -> Record:
    return full_record()


@pytest.fixture(scope="module")
def page(record: Record, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "record.html"
    write_page(path, record)
    return path


def hostile(text: str) -> Record:
    """Return a small record with `text` in every free field: names, messages, machines, notes."""
    # The schema restricts these fields to a few values, or to a pattern.
    fixed = {"kind", "created", "commit", "outcome", "level", "grid", "capabilities"}
    fixed |= {"direction", "way"}
    keyed = {"versions", "verdicts", "seconds", "error_over_budget", "capabilities"}

    def spoilt(value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            return value if key in fixed else f"{value} {text}"
        if isinstance(value, list):
            return [spoilt(entry, key) for entry in value]
        if isinstance(value, dict):
            if key in keyed:
                inner = key if key in fixed else ""
                return {f"{name} {text}": spoilt(entry, inner) for name, entry in value.items()}
            return {name: spoilt(entry, name) for name, entry in value.items()}
        return value

    record = full_record()
    for run in record["runs"]:
        run["cases"] = [c for i, c in enumerate(run["cases"]) if i % 9 == 0 or c["message"]]
        run["counts"] = {o: sum(c["outcome"] == o for c in run["cases"]) for o in OUTCOMES}
    spoiled: Record = spoilt(record)
    return spoiled


# --- content -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_every_section_is_there_and_seen(
    record: Record, page: Path, show: Callable[..., View], width: int
) -> None:
    view = show(page, width)
    seen = view.ask("""
        return [...document.querySelectorAll("main > section")].map(section => ({
          id: section.querySelector("h2").id, shown: section.checkVisibility(),
          height: section.getBoundingClientRect().height, text: section.innerText }));
    """)
    assert [section["id"] for section in seen] == list(SECTIONS)
    assert all(section["shown"] and section["height"] > 60 for section in seen), seen
    links = view.ask("return [...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert links == list(SECTIONS)
    text = {section["id"]: section["text"] for section in seen}
    names = [target(run) for run in record["runs"]]

    for place in ("outcomes", "features", "errors", "environment"):
        assert [name for name in names if name not in text[place]] == [], place
    assert [name for name in FEATURES if name not in text["features"]] == []
    # The matrix has a cell for every feature and backend, none of them empty.
    cells = view.ask("return [...document.querySelectorAll('.features td')].map(c => c.innerText)")
    assert len(cells) == len(FEATURES) * len(names)
    assert all(cells)

    # The heat map shows the smallest and the largest error over budget, and one within it.
    groups = {case["group"] for run in record["runs"] for case in run["cases"]} - {"declared"}
    assert [group for group in groups if group not in text["errors"]] == []
    assert "2,211" in text["errors"]
    assert "∞" in text["errors"]

    timed = [run["speed"] for run in record["runs"] if run["speed"] is not None]
    ratios = [entry for speed in timed for entry in speed["ratios"]]
    figures = view.ask(
        "return [...document.querySelectorAll('.marks .figure')].map(f => f.innerText)"
    )
    assert len(figures) == len(ratios) > 50
    assert all("×" in text and " to " in text for text in figures)
    growing = sum(len(speed["growth"]) for speed in timed)
    assert view.ask("return document.querySelectorAll('.chart').length") == len(timed)
    assert view.ask("return document.querySelectorAll('.chart polyline.curve').length") == growing
    assert "35.3" in text["memory"]
    assert "NVIDIA H200" in text["environment"]
    assert "onnxruntime Attention" in text["speed"]


def test_every_failure_comes_with_the_command_that_runs_it(
    record: Record, page: Path, show: Callable[..., View]
) -> None:
    view = show(page, 400)
    shown = view.ask("""
        return [...document.querySelectorAll(".failure")].map(failure => [
          failure.querySelector(".command pre").textContent, failure.innerText]);
    """)
    failed = {
        run_alone(run, case): case["message"]
        for run in record["runs"]
        for case in run["cases"]
        if case["outcome"] in ("failed", "error")
    }
    assert {command for command, _ in shown} == set(failed)
    for command, text in shown:
        assert (failed[command] or "no message").splitlines()[0] in text
        assert command.split()[2] in text


def test_the_page_is_complete_without_its_script(page: Path, show: Callable[..., View]) -> None:
    view = show(page)
    assert view.ask("return document.querySelectorAll('button').length") > 0
    whole = view.ask("return document.querySelectorAll('section h2, table, .chart').length")
    off = "Emulation.setScriptExecutionDisabled"
    view.browser.execute_cdp_cmd(off, {"value": True})
    try:
        bare = show(page)
        assert bare.ask("return document.querySelectorAll('button, [type=search]').length") == 0
        count = bare.ask("return document.querySelectorAll('section h2, table, .chart').length")
        assert count == whole
    finally:
        view.browser.execute_cdp_cmd(off, {"value": False})


def test_the_filter_and_the_switch(page: Path, show: Callable[..., View]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    view = show(page)
    count = """
        return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).length;
    """
    assert view.ask(count, "tr.dtype") == 0
    view.browser.find_element(By.ID, "by-dtype").click()
    assert view.ask(count, "tr.dtype") > 20
    assert view.ask(count, "#every-case tbody tr") == 0
    view.browser.find_element(By.CSS_SELECTOR, "#every-case input").send_keys("TWO_passes float64")
    said = "return document.querySelector('#every-case [role=status]').textContent"
    WebDriverWait(view.browser, 5).until(lambda _: view.ask(said))
    assert view.ask(said) == "6 cases"
    assert view.ask(count, "#every-case tbody tr") == 6


# --- layout ------------------------------------------------------------------------------------

# A script that lists the visible elements that reach beyond the window, except in boxes that
# scroll.
OVERFLOWING = """
const width = document.documentElement.clientWidth;
const out = [];
for (const element of document.body.querySelectorAll("*")) {
  const scrolls = element.parentElement.closest(".box, pre");
  if (scrolls || element.closest("defs, title, desc") || !element.checkVisibility()) continue;
  const { left, right } = element.getBoundingClientRect();
  if (left < -0.5 || right > width + 0.5)
    out.push(`${element.tagName} ${element.className} ${left} to ${right}`);
}
for (const cell of document.querySelectorAll("td, th"))
  if (cell.checkVisibility() && cell.scrollWidth > cell.clientWidth + 1)
    out.push("cut off: " + cell.textContent);
return out.slice(0, 10);
"""

# A script that lists every visible text with its contrast to the background, by WCAG 2.
CONTRASTS = """
const parsed = colour => {
  const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
  return [r, g, b, a];
};
const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
const luminance = colour => {
  const [r, g, b] = colour.map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = element => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    layers.push(parsed(getComputedStyle(e).backgroundColor));
    if (layers.at(-1)[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
};
for (const details of document.querySelectorAll("details")) details.open = true;
const found = new Map();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
  if (!text || element.closest("script, title, desc") || !element.checkVisibility()) continue;
  const style = getComputedStyle(element), ground = behind(element);
  const colour = over(parsed(element.closest("svg") ? style.fill : style.color), ground);
  const [a, b] = [luminance(colour), luminance(ground)];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const kind = `${element.tagName}.${element.getAttribute("class") || ""} ${colour} on ${ground}`;
  if (!found.has(kind)) found.set(kind, { kind, text: text.slice(0, 60), ratio });
}
return { texts: [...found.values()], paper: luminance(behind(document.body)) };
"""

# A script that lists SVG without size, and texts and points outside of their plot or overlapping.
PLOTS = """
const out = [];
for (const svg of document.querySelectorAll("svg")) {
  const { width, height } = svg.getBoundingClientRect();
  if (!(width > 10 && height > 10)) out.push(`no size: ${svg.outerHTML.slice(0, 80)}`);
  const chart = svg.classList.contains("chart");
  const room = chart ? svg.viewBox.baseVal : { width, height };
  // A label of the axis is centred at its tick; the margin of the page has room for half of it.
  const beyond = chart ? 0 : 24;
  const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBBox()]);
  for (const [text, box] of texts) {
    if (!(box.width > 0 && box.height > 0)) out.push(`empty text: ${text}`);
    if (box.x < -beyond || box.x + box.width > room.width + beyond
        || box.y < 0 || box.y + box.height > room.height + 1)
      out.push(`outside: ${text} at ${box.x}, ${box.y}`);
    for (const [other, that] of texts)
      if (that !== box && that.x < box.x + box.width && box.x < that.x + that.width
          && that.y + 3 < box.y + box.height && box.y + 3 < that.y + that.height)
        out.push(`${text} on ${other}`);
  }
  for (const mark of svg.querySelectorAll("circle, polyline, .point")) {
    const inner = mark.getBoundingClientRect(), outer = svg.getBoundingClientRect();
    if (inner.left < outer.left - 6 || inner.right > outer.right + 6
        || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1)
      out.push(`outside: ${mark.outerHTML.slice(0, 80)}`);
  }
}
return out.slice(0, 10);
"""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_can_be_read(
    page: Path, show: Callable[..., View], width: int, scheme: str
) -> None:
    view = show(page, width, scheme)
    sizes = view.ask("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert sizes[0] <= sizes[1] <= width
    assert view.ask(OVERFLOWING) == []
    assert view.ask("return document.querySelectorAll('svg').length") > 50
    assert view.ask(PLOTS) == []

    seen = view.ask(CONTRASTS)
    assert len(seen["texts"]) > 20
    assert [text for text in seen["texts"] if not text["ratio"] >= 4.5] == []
    assert (seen["paper"] > 0.8) == (scheme == "light")
    assert (seen["paper"] < 0.05) == (scheme == "dark")
    # The page also fits with every case unfolded.
    assert view.ask(OVERFLOWING) == []
    assert view.browser.get_log("browser") == []


@pytest.mark.parametrize("decades", [0.1, 1, 2, 3.5, 5])
def test_the_labels_of_any_axis_have_room(
    decades: float, tmp_path: Path, show: Callable[..., View]
) -> None:
    run = sample_run("numpy:cpu", [sample_case("axes::one")], speed=sample_speed())
    speed = run["speed"]
    assert speed is not None
    for index, entry in enumerate(speed["ratios"]):
        ratio = 10 ** (decades * (index / (len(speed["ratios"]) - 1) - 0.5))
        entry.update(ratio=ratio, interval=[ratio * 0.9, ratio * 1.1], at_least=None, met=None)
    for entry in speed["growth"]:
        entry["lengths"] = [8 * round(10 ** (decades * k / 2)) + k for k in range(3)]
        entry["seconds"] = [
            [0.9 * t, t, 1.1 * t] for t in (10 ** (decades * k - 7) for k in range(3))
        ]
    write_page(tmp_path / "record.html", sample_record(run))
    view = show(tmp_path / "record.html", 400)
    labels = view.ask(
        "return ['.chart text', '.axis text'].map(s => document.querySelectorAll(s).length)"
    )
    assert min(labels) > 4
    assert view.ask(PLOTS) == []
    assert view.ask(OVERFLOWING) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_scroll_in_their_own_boxes(
    page: Path, show: Callable[..., View], width: int
) -> None:
    boxes = show(page, width).ask("""
        return [...document.querySelectorAll(".box")].filter(b => b.checkVisibility()).map(box => {
          box.scrollLeft = 1e6;
          const head = box.querySelector("tbody th").getBoundingClientRect();
          return { wide: box.scrollWidth > box.clientWidth + 1, moved: box.scrollLeft,
                   stays: Math.abs(head.left - box.getBoundingClientRect().left) < 2,
                   room: box.clientWidth - head.width, reachable: box.tabIndex === 0 };
        });
    """)
    assert any(box["wide"] for box in boxes)
    for box in boxes:
        assert box["wide"] == (box["moved"] > 0), box
        # The row names stay visible, and leave room for the columns that scroll.
        assert box["stays"], box
        assert box["room"] > 100, box
        assert box["reachable"], box


# --- security ----------------------------------------------------------------------------------


def test_nothing_is_fetched(page: Path, show: Callable[..., View]) -> None:
    view = show(page)
    names = view.ask("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in names if not name.startswith("data:")] == []
    asked = view.requests()
    assert asked[0] == view.address
    assert [url for url in asked[1:] if not url.startswith("data:")] == []
    assert view.browser.get_log("browser") == []


@pytest.mark.parametrize("text", HOSTILE, ids=["script", "attribute", "closing tags"])
def test_hostile_text_stays_text(text: str, tmp_path: Path, show: Callable[..., View]) -> None:
    save(tmp_path / "record.json", hostile(text)["runs"])
    path = tmp_path / "record.html"
    write_page(path, load(tmp_path / "record.json"))
    view = show(path, 400)
    assert "owned" not in view.ask("return document.title")
    elements = (
        "return document.querySelectorAll('script, img, style, iframe, object, embed').length"
    )
    assert view.ask(elements) == 2  # its own style and its own script
    acting = """
        return [...document.querySelectorAll("*")].flatMap(e => [...e.attributes])
          .filter(a => a.name.startsWith("on") || a.value.trim().startsWith("javascript:")).length;
    """
    assert view.ask(acting) == 0
    assert view.ask("return document.querySelectorAll('.failure').length") > 5
    # Every place that shows the field has it as text.
    assert view.ask("return document.body.textContent.split(arguments[0]).length", text) > 200
    assert view.browser.get_log("browser") == []
    assert [url for url in view.requests()[1:] if not url.startswith("data:")] == []
    # The long names do not break the layout either.
    assert view.ask("return document.documentElement.scrollWidth") <= 400
    assert view.ask(OVERFLOWING) == []
