"""The tabs of the page on pictures: training clips as the model gets them, and sample clips by prompt and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from videox.tracking.report.collect import Record, RunFiles, SampleFile, finite, whole
from videox.tracking.report.markup import Markup, escaped, joined, tag
from videox.tracking.report.media import (
    Cache,
    clip_name,
    data_uri,
    is_made,
    nearest,
    signature,
    small_clip,
    small_picture,
    strip_name,
    training_strip,
)

STRIPS_BYTES, CLIPS_BYTES = 3_500_000, 3_000_000  # of the files before base64, which adds a third
MOST_VIDEOS = 60  # browsers refuse to play many more on one page
MOST_LINKS = 60  # to clips of a prompt that are not on the page


@dataclass(frozen=True)
class Strip:
    """A training clip of the contact sheet: its entry in data_report.json, and its picture."""

    clip: Record
    path: Path


def data_dir_of(run: RunFiles) -> Path:
    """Return the folder that the paths in data_report.json are relative to."""
    return Path(str(run.data.get("data_dir", "")))


def training_clips(run: RunFiles) -> list[Record]:
    """Return the training and held-out clips that the page may show."""
    clips = run.data.get("clips")
    return [clip for clip in clips if isinstance(clip, dict) and _is_clip(clip)] if isinstance(clips, list) else []


def _is_clip(clip: Record) -> bool:
    bucket, indices = clip.get("bucket"), clip.get("indices")
    numbers = [bucket, indices] if isinstance(bucket, list) and isinstance(indices, list) else []
    whole_numbers = all(isinstance(value, int) for part in numbers for value in part)
    return bool(clip.get("path") and numbers and len(numbers[0]) == 3 and numbers[1] and whole_numbers)


def make_media(run: RunFiles, cache: Cache) -> bool:
    """Make the small pictures and clips that the page lacks, and delete those of earlier data.

    Returns:
        Whether there are new ones.
    """
    folder = data_dir_of(run)
    missing = [clip for clip in training_clips(run) if not cache.has(strip_name(clip))]
    if missing:
        import torch  # noqa: F401 - here, since its import takes long on a busy machine, and a read has a time limit
    made = [training_strip(cache, clip, folder) for clip in missing]
    made += [small_picture(cache, Path(sample.image)) for sample in run.samples if sample.image]
    shown = shown_samples(run)
    made += [small_clip(cache, sample) for sample in shown if not is_made(cache, sample)]
    names = {clip_name(sample) for sample in shown}
    cache.prune(names.union(strip_name(clip) for clip in training_clips(run)))
    return any(made)


def made_strips(run: RunFiles, cache: Cache) -> list[Strip]:
    """Return the training clips whose picture is there, thinned evenly to STRIPS_BYTES."""
    found = []
    for clip in training_clips(run):
        name = strip_name(clip)
        if cache.has(name) and (path := training_strip(cache, clip, data_dir_of(run))) is not None:
            found.append(Strip(clip, path))
    every = -(-sum(strip.path.stat().st_size for strip in found) // STRIPS_BYTES)
    return found[:: max(every, 1)]


def clips_tab(run: RunFiles, strips: Sequence[Strip]) -> Markup | None:
    """The training clips, as contact sheets."""
    clips = training_clips(run)
    if not strips:
        return None
    total = max(whole(run.data.get("clips_total")), len(clips))
    words = "First, middle and last frame of each clip after cropping and scaling, as the model gets them."
    if len(strips) < total:
        words += f" {len(strips):,} of {total:,} clips are shown, evenly spaced."
    cells = [_strip_cell(run, strip) for strip in strips]
    return joined([tag("p", words, class_="soft"), tag("div", *cells, class_="clips pages", data_size=24)])


def _strip_cell(run: RunFiles, strip: Strip) -> Markup:
    clip, row = strip.clip, whole(strip.clip.get("row"))
    bucket = clip.get("bucket")
    size = " x ".join(map(str, bucket)) if isinstance(bucket, list) else ""
    cropped = finite(clip.get("cropped"))
    words = [f"row {row}", size, f"cropped {cropped:.0%}" if cropped >= 0.005 else ""]
    if clip.get("fate") == "held_out":
        words.append("held out")
    elif times := run.metrics.trained.get(row):
        words.append(f"trained {times} times")
    return tag(
        "div",
        tag("img", src=Markup(data_uri(strip.path)), alt=f"three frames of row {row}", loading="lazy"),
        tag("p", tag("b", ", ".join(word for word in words if word))),
        tag("p", clip.get("path"), class_="soft", dir="auto"),
        tag("p", clip.get("caption") or "(no caption)", class_="caption", dir="auto"),
        class_="clip",
    )


def shown_samples(run: RunFiles) -> list[SampleFile]:
    """Return the samples that the page may show: of at most as many steps as browsers play clips of.

    Of more steps every second, fourth, eighth ... and the last one are taken, so that nearly all the reduced copies
    that were made are still of use after the next samples.
    """
    steps = sorted({sample.step for sample in run.samples})
    prompts = len({sample.number for sample in run.samples})
    most, every = max(MOST_VIDEOS // max(prompts, 1), 2), 1
    while len({*steps[::every], *steps[-1:]}) > most:
        every *= 2
    chosen = {*steps[::every], *steps[-1:]}
    return [sample for sample in run.samples if sample.step in chosen]


def chosen_steps(sizes: dict[int, int], limit: int, most: int) -> list[int]:
    """Return the steps whose samples are on the page: as many as fit, evenly spread, the first and last among them.

    Args:
        sizes: bytes of the samples of each step.
        limit: bytes in all.
        most: steps at most.
    """
    steps = sorted(sizes)
    for count in range(min(len(steps), max(most, 1)), 0, -1):
        places = np.unique(np.linspace(len(steps) - 1, 0, count).round().astype(int))
        chosen = [steps[place] for place in places]
        if sum(sizes[step] for step in chosen) <= limit:
            return chosen
    return []


def samples_tab(run: RunFiles, cache: Cache, strips: Sequence[Strip]) -> Markup | None:
    """The sample clips: a line for each prompt, with its clips at several steps beside each other."""
    if not run.samples:
        return None
    small = {sample: path for sample in shown_samples(run) if (path := small_clip(cache, sample)) is not None}
    sizes: dict[int, int] = {}
    for sample, path in small.items():
        sizes[sample.step] = sizes.get(sample.step, 0) + path.stat().st_size
    prompts = sorted({sample.number for sample in run.samples})
    steps = chosen_steps(sizes, CLIPS_BYTES, MOST_VIDEOS // len(prompts))
    signatures = np.stack([signature(strip.path) for strip in strips]) if strips and small else np.zeros((0, 0))
    parts = [
        tag("p", tag("button", "Play all", type="button", class_="plain", data_play="all"), " ",
            tag("button", "Pause", type="button", class_="plain", data_play="pause")),
        tag("p", "Reduced copies; a title links the file itself.", class_="soft"),
    ]  # fmt: skip
    for prompt in prompts:
        samples = [sample for sample in run.samples if sample.number == prompt]
        parts += _prompt(run, cache, samples, {s: p for s, p in small.items() if s.step in steps})
        shown = [sample for sample in samples if sample in small and sample.step in steps]
        found = nearest(small[shown[-1]], signatures) if shown and len(signatures) else None
        if found is not None:
            parts.append(_nearest(strips[found[0]], shown[-1].step, found[1]))
    return joined(parts)


def _prompt(run: RunFiles, cache: Cache, samples: Sequence[SampleFile], small: dict[SampleFile, Path]) -> list[Markup]:
    """The clips of one prompt, the given picture first, and links to those that are left out."""
    last = samples[-1]
    cells = []
    if last.image and (picture := small_picture(cache, Path(last.image))) is not None:
        cells.append(tag("div", tag("p", tag("b", "given picture")), _image(picture, "the given picture")))
    for sample in samples:
        if (path := small.get(sample)) is not None:
            name = f"step {sample.step}"
            link = tag("a", name, href=_relative(run.folder, sample.path))
            cells.append(tag("div", tag("p", tag("b", link)), _media(path, f"prompt {sample.number}, {name}")))
    others = [sample for sample in samples if sample not in small]
    left = [
        joined([tag("a", f"step {s.step}", href=_relative(run.folder, s.path)), " "]) for s in others[-MOST_LINKS:]
    ]
    more = f"and {len(others) - len(left):,} earlier ones in samples/" if len(others) > len(left) else ""
    title = f"prompt {last.number}"
    return [
        tag("h2", title),
        tag("p", last.prompt, dir="auto"),
        *([tag("p", last.settings, class_="soft", dir="auto")] if last.settings else []),
        tag("div", *cells, class_="run", tabindex="0", role="region", aria_label=f"clips of {title}"),
        *([tag("p", "not embedded: ", *left, more, class_="soft")] if left else []),
    ]


def _relative(folder: Path, path: Path) -> str:
    return quote(path.relative_to(folder).as_posix())


def _image(path: Path, words: str) -> Markup:
    return tag("img", src=Markup(data_uri(path)), alt=words)


def _media(path: Path, words: str) -> Markup:
    if path.suffix != ".mp4":
        return _image(path, words)
    content = Markup(data_uri(path).partition(",")[2])
    return tag("video", data_clip=content, muted=True, loop=True, playsinline=True, tabindex="0", aria_label=words)


def _nearest(strip: Strip, step: int, distance: float) -> Markup:
    words = f"Nearest training clip to step {step} among those of the tab Clips, by the pixels of three small frames"
    caption = escaped(strip.clip.get("caption") or "(no caption)", 300)
    return tag(
        "div",
        tag("p", f"{words} (mean difference {distance:.3f} of 1): row {whole(strip.clip.get('row'))}", class_="soft"),
        tag("div", _image(strip.path, "nearest training clip"), tag("p", Markup(caption), class_="caption", dir="auto"),
            class_="clip", style="max-width:420px"),
    )  # fmt: skip
