"""The page in a browser: it draws, is clicked and sorted, fits a phone, and runs nobody's names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from compressor.report.html import write_report
from compressor.result import Result
from compressor.testing.models import TinyResNet
from tests.report.browser import MISSING, REQUIRED, find_chromium, launched
from tests.report.results import ENDING, HOSTILE, full_result, hostile_result
from tests.runs import compress, fit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None and REQUIRED not in os.environ, reason=MISSING),
]

DESKTOP, PHONE = (1280, 900), (390, 844)
PATIENCE_MS = 120_000  # the machine may be busy
# Of every text that is seen: its colour against the first background behind it (WCAG 2.1).
CONTRASTS = """() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const srgb = (c) => c.startsWith("color(srgb")
    ? parse(c.replace("srgb", "")).map((v, i) => i < 3 ? v * 255 : v) : parse(c);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => {
      v /= 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const c = srgb(getComputedStyle(e).backgroundColor);
      if (c.length && (c.length < 4 || c[3] > 0)) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  let seen = 0;
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    if (!element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = srgb(element.closest("svg") ? style.fill : style.color);
    if (ink.length < 3) continue;
    const [a, b] = [light(ink), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (ratio < 4.5) poor.push([element.tagName, element.textContent.slice(0, 40), ratio]);
  }
  return [seen, poor];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A short run on random images, and its folder."""
    torch.manual_seed(0)
    batches = [(torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))) for _ in range(4)]
    model = fit(TinyResNet(), batches)
    folder = tmp_path_factory.mktemp("run")
    training = {"optimizer": {"name": "SGD", "lr": 0.01}, "epochs": 2}
    result = compress(
        model,
        {"train": batches, "test": batches[:2]},
        folder,
        delta=4.0,
        optimization="latency",
        target={"runtime": "eager"},
        techniques=["channel_pruning", "block_removal"],
        export={"formats": []},
        fine_tuner=training,
        full_trainer=training,
    )
    return result, folder


@contextmanager
def opened(browser: Browser, path: Path, **options: Any) -> Iterator[Page]:
    """The page, drawn; what it asks of the network or complains of fails the test."""
    viewport = {"width": DESKTOP[0], "height": DESKTOP[1]}
    context = browser.new_context(viewport=viewport, **options)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE_MS)
    tab = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("console", lambda message: said.append(message.text))
    try:
        tab.goto(path.as_uri(), wait_until="domcontentloaded")
        tab.wait_for_selector("html[data-ready=true]")
        yield tab
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        assert not said
    finally:
        context.close()


@pytest.fixture(scope="module")
def desktop(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page that has everything; tests that change how it is looked at change that back."""
    folder = tmp_path_factory.mktemp("full")
    with opened(browser, write_report(full_result().to_json(), folder / "report.html")) as tab:
        yield tab


def test_a_real_run_leaves_a_page_that_shows_what_it_found(
    browser: Browser, real: tuple[Result, Path]
) -> None:
    result, folder = real
    assert result.artifacts["report"] == folder / "report.html"
    with opened(browser, folder / "report.html") as tab:
        assert tab.locator("#table tbody tr").count() == len(result.variants)
        for key in ("frontier", "damage", "layers", "predictions", "curves"):
            assert tab.locator(f"#chart-{key} .main-svg").count() > 0, key
        certificate = result.certificate
        claimed = f"{certificate.reference_metric:.2f} → {certificate.metric:.2f}, "  # delta is 4
        assert tab.locator("#headline").inner_text().startswith(claimed)


def test_layers_add_up_to_what_the_certificate_says(real: tuple[Result, Path]) -> None:
    result, _ = real
    c, rows = result.certificate, result.layers
    assert sum(row.reference.params for row in rows) == c.reference_params
    assert sum(row.compressed.params for row in rows) == c.params
    assert sum(row.reference.macs for row in rows) == c.reference_macs
    assert sum(row.compressed.macs for row in rows) == c.macs
    latency_ms = sum(row.reference.latency_ms or 0.0 for row in rows)
    assert latency_ms == pytest.approx(c.reference_latency_ms)
    assert result.chosen in {record.id for record in result.variants}


def test_a_click_on_a_dot_shows_that_variants_plan(desktop: Page) -> None:
    assert desktop.locator("#plan-title").inner_text() == "Variant 4 (aaaa04)"
    desktop.locator("#chart-frontier").scroll_into_view_if_needed()
    place = desktop.evaluate(
        """() => {
          const chart = document.getElementById("chart-frontier");
          const trace = chart.data.find((t) => (t.customdata || []).includes("aaaa02"));
          const at = trace.customdata.indexOf("aaaa02");
          const {xaxis, yaxis} = chart._fullLayout, box = chart.getBoundingClientRect();
          const put = (axis, v) => axis.d2p(v) + axis._offset;
          return [box.x + put(xaxis, trace.x[at]), box.y + put(yaxis, trace.y[at])];
        }"""
    )
    desktop.mouse.move(*place)
    hover = desktop.locator("#chart-frontier .hoverlayer")
    hover.locator("text").first.wait_for()
    for part in ("Variant 2", "accuracy 88.00", "0.330 ms", "1 channel pruning, 5 quantization"):
        assert part in (hover.text_content() or ""), part
    desktop.mouse.click(*place)
    assert desktop.locator("#plan-title").inner_text() == "Variant 2 (aaaa02)"
    plan = desktop.locator("#plan-table tbody tr")
    assert plan.count() == 6
    assert plan.first.inner_text().split("\t") == [
        "channel pruning",
        "layer1.0.conv1",
        "16 of 32 channels",
    ]
    assert desktop.locator("tr[aria-current=true]").get_attribute("data-variant") == "aaaa02"


def test_keys_alone_select_a_variant_and_sort_the_table(desktop: Page) -> None:
    row = desktop.locator("tr[data-variant=aaaa03] button")
    row.focus()
    desktop.keyboard.press("Enter")
    assert desktop.locator("#plan-title").inner_text() == "Variant 3 (aaaa03)"
    outline = row.evaluate("(e) => parseFloat(getComputedStyle(e).outlineWidth)")
    style = row.evaluate("(e) => getComputedStyle(e).outlineStyle")
    assert outline > 0, "who goes by keys sees where they are"
    assert style != "none"
    assert row.get_attribute("aria-pressed") == "true"

    def order() -> list[str | None]:
        rows = desktop.locator("#table tbody tr")
        return [rows.nth(i).get_attribute("data-variant") for i in range(rows.count())]

    head = desktop.locator("#table thead button", has_text="accuracy")
    head.focus()
    desktop.keyboard.press("Enter")
    assert order() == ["aaaa05", "aaaa02", "aaaa04", "aaaa01", "aaaa03"], "what is missing is last"
    desktop.keyboard.press("Enter")
    assert order() == ["aaaa01", "aaaa04", "aaaa02", "aaaa05", "aaaa03"]
    assert desktop.locator("th[aria-sort=descending]").count() == 1


def test_buttons_choose_what_a_chart_shows(desktop: Page) -> None:
    title: Callable[[], Any] = lambda: desktop.evaluate(  # noqa: E731
        "document.getElementById('chart-frontier').layout.xaxis.title.text"
    )
    assert title() == "latency, ms"
    desktop.locator("button[data-chart=frontier][data-option=size]").click()
    assert title() == "size, bytes"
    chart = desktop.locator("#chart-damage")
    assert "channel pruning" in (chart.get_attribute("aria-label") or "")
    desktop.locator("button[data-chart=damage][data-option=quantization]").click()
    assert "of quantization" in (chart.get_attribute("aria-label") or "")


def test_texts_can_be_read_in_both_themes_and_the_button_changes_them(desktop: Page) -> None:
    def colour() -> Any:
        return desktop.evaluate("getComputedStyle(document.body).backgroundColor")

    light = colour()
    seen, poor = desktop.evaluate(CONTRASTS)
    assert seen > 200
    assert not poor
    desktop.emulate_media(color_scheme="dark")
    desktop.wait_for_selector("html[data-drawn=dark]")
    dark = colour()
    assert dark != light
    seen, poor = desktop.evaluate(CONTRASTS)
    assert seen > 200
    assert not poor
    desktop.locator("#theme").click()
    assert colour() == light, "though the system is dark"
    desktop.emulate_media(color_scheme="light")
    desktop.locator("#theme").click()
    desktop.wait_for_selector("html[data-drawn=dark]")
    assert colour() == dark, "though the system is light"
    assert not desktop.evaluate(CONTRASTS)[1]
    desktop.locator("#theme").click()


def test_a_phone_shows_all_without_scrolling_sideways(desktop: Page) -> None:
    desktop.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    try:
        width = "document.getElementById('chart-frontier')._fullLayout.width"
        for _ in range(PATIENCE_MS // 100):  # `wait_for_function` would break the page's policy
            if desktop.evaluate(width) <= PHONE[0]:
                break
            desktop.wait_for_timeout(100)
        assert desktop.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
        wide = desktop.evaluate(
            """() => [...document.querySelectorAll("main *")].filter((e) =>
                !e.closest(".scroll, .plot, pre, .hidden") &&
                e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML)"""
        )
        assert not wide
    finally:
        desktop.set_viewport_size({"width": DESKTOP[0], "height": DESKTOP[1]})


def test_those_who_do_not_see_it_are_told(desktop: Page) -> None:
    assert desktop.locator("html").get_attribute("lang") == "en"
    assert desktop.locator("h1").count() == 1
    charts = desktop.locator("[role=img]")
    for i in range(charts.count()):
        assert len(charts.nth(i).get_attribute("aria-label") or "") > 30
    unnamed = desktop.evaluate(
        """() => [...document.querySelectorAll("button, a, [role=region]")].filter((e) =>
            !(e.textContent.trim() || e.getAttribute("aria-label"))).length"""
    )
    assert unnamed == 0


def test_hostile_names_are_shown_and_not_run(browser: Browser, tmp_path: Path) -> None:
    """Without the page's policy: only the escapes are between a name and the page."""
    path = write_report(hostile_result().to_json(), tmp_path / "report.html")
    with opened(browser, path, bypass_csp=True) as tab:
        for button in tab.locator("button").all():
            button.click()
        for trace in tab.locator("#chart-frontier .point").all():
            trace.hover(force=True)
        tab.wait_for_timeout(100)
        assert tab.evaluate("window.hacked") is None
        assert tab.evaluate("document.images.length") == 0
        assert tab.evaluate("document.scripts.length") == 3
        tab.locator("tr[data-variant=aaaa02] button").click()
        assert HOSTILE in tab.locator("#plan-table").inner_text()
        assert ENDING in tab.locator("#decisions").inner_text()
        assert HOSTILE in (tab.locator("#chart-frontier").text_content() or "")
