"""The page as one string, and its file."""

from __future__ import annotations

import time
from pathlib import Path

from videox.files import atomic_write
from videox.tracking.report.assets import SCRIPT, STYLE, content_policy
from videox.tracking.report.collect import RunFiles, read_run
from videox.tracking.report.markup import Markup, escaped, joined, moment, tag
from videox.tracking.report.media import FOLDER, Cache, deadline
from videox.tracking.report.pictures import clips_tab, made_strips, make_media, samples_tab
from videox.tracking.report.sections import (
    curves_tab,
    data_tab,
    events_tab,
    overview,
    settings_tab,
    speed_tab,
    state_of,
)

PAGE = "report.html"


def render(run: RunFiles, cache: Cache, *, seconds_left: float | None = None, now: float | None = None) -> str:
    """Return the page on a run, with the pictures and clips that are in the cache.

    Args:
        run: its files.
        cache: of small pictures and clips; nothing is made if its time is over.
        seconds_left: the run's own estimate; None follows it from the last steps.
        now: seconds since 1970 that the page states as its time; None = now.
    """
    strips = made_strips(run, cache)
    tabs = {
        "Overview": overview(run, seconds_left),
        "Samples": samples_tab(run, cache, strips),
        "Curves": curves_tab(run),
        "Speed": speed_tab(run),
        "Data": data_tab(run),
        "Clips": clips_tab(run, strips),
        "Events": events_tab(run),
        "Settings": settings_tab(run),
    }
    shown = {name: content for name, content in tabs.items() if content}
    written = time.time() if now is None else now
    name = run.folder.resolve().name
    body = tag(
        "body",
        tag("header", tag("h1", name, dir="auto"),
            tag("p", f"written {moment(written)}", class_="soft", data_written=int(written), data_state=state_of(run))),
        tag("nav", tag("div", *_buttons(shown), role="tablist", aria_label="parts of the report")),
        tag("main", *(
            tag("section", content, id=f"panel-{key.lower()}", role="tabpanel", tabindex="0",
                aria_labelledby=key.lower())
            for key, content in shown.items()
        )),
        tag("script", Markup(SCRIPT)),
    )  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=Markup(content_policy())),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        Markup(f"<title>{escaped(name)}</title>"),
        tag("style", Markup(STYLE)),
    )
    return f"<!doctype html>\n{tag('html', joined([head, body]), lang='en')}\n"


def _buttons(shown: dict[str, Markup]) -> list[Markup]:
    return [
        tag("button", name, type="button", role="tab", id=name.lower(), aria_controls=f"panel-{name.lower()}",
            aria_selected="false")
        for name in shown
    ]  # fmt: skip


def write_page(folder: Path, *, seconds_left: float | None = None, media_seconds: float | None = None) -> Path:
    """Write report.html into a run's output_dir, replaced as a whole, and return its path.

    The page is written at once with the pictures that exist, and once more if new ones were made afterwards.

    Args:
        folder: the output_dir.
        seconds_left: see render.
        media_seconds: how long to make pictures and clips; None = until all are made.

    Raises:
        OSError: the page cannot be written.
    """
    run, small = read_run(folder), folder / FOLDER
    path = _write(folder, render(run, Cache(small, until=0.0), seconds_left=seconds_left))
    if make_media(run, Cache(small, deadline(media_seconds))):
        path = _write(folder, render(read_run(folder), Cache(small, until=0.0), seconds_left=seconds_left))
    return path


def _write(folder: Path, page: str) -> Path:
    path = folder / PAGE
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path
