"""The page in a real browser: no error, every tab by keyboard, clips play, readable at two widths, dark and light."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser
from run_folders import HOSTILE, write_run

from videox.tracking.report.page import PAGE, write_page

TABS = ["overview", "samples", "curves", "speed", "data", "clips", "events", "settings"]
SECONDS = 120_000  # milliseconds that a step may take on a busy machine
LEAST_CONTRAST = 4.5  # of WCAG 2.1, level AA, for text
# What is wider than the window although it does not scroll by itself, and text that is too small to read.
UNREADABLE = """() => {
  const wide = [], small = [];
  for (const e of document.querySelectorAll("main *, header *, nav *")) {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!box.width || e.closest("svg") || e.closest(".tip")) continue;
    if (box.right > innerWidth + 1 && !e.closest(".wide, .run, pre, [role=tablist]")) wide.push(e.outerHTML.slice(0, 120));
    const own = Array.from(e.childNodes).some(n => n.nodeType === 3 && n.textContent.trim());
    if (own && parseFloat(style.fontSize) < 11.5) small.push(e.outerHTML.slice(0, 120));
  }
  return {wide, small, scroll: document.documentElement.scrollWidth - innerWidth};
}"""
CONTRAST = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 && m[3] === 0 ? null : m.slice(0, 3); };
  const light = c => { const l = c.map(v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
  const worst = {ratio: 99};
  for (const e of document.querySelectorAll("body *")) {
    if (!e.getClientRects().length || e.closest("svg") || (e.tagName === "BUTTON" && e.disabled)) continue;
    if (!Array.from(e.childNodes).some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    let back = e, color = null;
    while (back && !(color = parse(getComputedStyle(back).backgroundColor))) back = back.parentElement;
    const a = light(parse(getComputedStyle(e).color)), b = light(color || [255, 255, 255]);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst.ratio) Object.assign(worst, {ratio, what: e.outerHTML.slice(0, 120)});
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = write_run(tmp_path_factory.mktemp("run") / "run", steps=600, refused=60)
    write_page(written)
    return written


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (1600, "light"), (1600, "dark")])
def test_the_page_works_in_a_browser(chromium: Any, folder: Path, width: int, scheme: str, tmp_path: Path) -> None:
    context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: problems.append(f"a script of a caption ran: {dialog.message}"))
    page.goto((folder / PAGE).as_uri())

    # the tab list is one stop of the Tab key; arrow keys, End and Home move within it
    page.keyboard.press("Tab")
    for number, tab in enumerate(TABS):
        assert page.evaluate("document.activeElement.id") == tab
        assert page.evaluate(
            "[...document.querySelectorAll('[role=tabpanel]')].filter(p => !p.hidden).map(p => p.id)"
        ) == [f"panel-{tab}"]
        assert page.get_attribute(f"#{tab}", "aria-selected") == "true"
        found = page.evaluate(UNREADABLE)
        assert found == {"wide": [], "small": [], "scroll": 0}, (tab, found)
        worst = page.evaluate(CONTRAST)
        assert worst["ratio"] >= LEAST_CONTRAST, (tab, worst)
        page.screenshot(path=str(tmp_path / f"{tab}-{width}-{scheme}.png"), full_page=True)
        if number < len(TABS) - 1:
            page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == TABS[0]  # around the end
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.id") == TABS[-1]
    page.keyboard.press("Home")
    page.keyboard.press("Tab")  # from the tab list into the open panel
    assert page.evaluate("document.activeElement.id") == "panel-overview"

    page.click("#samples")
    moving = "[...document.querySelectorAll('video')].every(v => v.readyState >= 2 && !v.error && v.videoWidth > 0 && (v.currentTime > 0 || v.ended))"
    page.wait_for_function(moving)
    assert page.evaluate("document.querySelectorAll('video').length") == 4
    page.click("[data-play=pause]")
    assert page.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")

    page.click("#data")
    refused = "#panel-data .pager >> nth=-1"
    assert "1 to 25 of 60" in page.inner_text(refused)
    page.locator(refused).get_by_role("button", name="Next").press("Enter")
    assert "26 to 50 of 60" in page.inner_text(refused)

    page.click("#curves")
    page.locator("#panel-curves .plot").first.focus()
    page.keyboard.press("ArrowLeft")
    assert "step " in page.inner_text("#panel-curves .tip >> nth=0")
    page.reload()
    assert page.get_attribute("#curves", "aria-selected") == "true"  # a reload keeps the tab
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    context.close()


@pytest.mark.slow
def test_the_page_is_readable_without_scripts(chromium: Any, folder: Path) -> None:
    context = chromium.new_context(java_script_enabled=False, viewport={"width": 1000, "height": 900})
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    page.goto((folder / PAGE).as_uri())
    text = page.inner_text("body")
    assert HOSTILE[0] in text and "Learning rate" in text and "60 of" not in text[:10]
    context.close()
