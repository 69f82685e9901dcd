"""The tabs of the page on numbers: state, curves, speed, data, events and settings. Each is None without content."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from videox.errors import plural
from videox.tracking.overfitting import Measured, sentence
from videox.tracking.preview import smooth
from videox.tracking.report.charts import Curve, chart, stacked
from videox.tracking.report.collect import LISTED, Listing, Record, RunFiles, finite, mapping, whole
from videox.tracking.report.markup import Markup, duration, facts, joined, moment, number, table, tag

RECENT = 200  # steps whose median duration the time left follows from
MOST_EVENTS = 1000
PARTS = {
    "encode_seconds": "encoders", "forward_seconds": "forward", "backward_seconds": "backward",
    "optimizer_seconds": "optimizer", "data_wait": "data wait",
}  # fmt: skip
MEMORY = {
    "peak_allocated_gib": "peak allocated", "peak_reserved_gib": "peak reserved", "predicted_gib": "predicted",
}  # fmt: skip
SHOWN = {"loss", "loss_corrected", "lr", "grad_norm", "tokens", "tokens_per_second", "planned_balance", "straggler_share", "mfu",
         "step_seconds", *PARTS, *MEMORY}  # fmt: skip
STATES = {
    "running": "running", "finished": "finished", "stopped": "stopped and saved", "failed": "ended with an error",
}  # fmt: skip
FATES = {
    "trained": "trained", "held_out": "held out for validation", "too_short": "too few frames",
    "too_small": "a side below 16 pixels", "quarantined": "unreadable during training", "refused": "refused",
    "not_drawn": "not drawn in this epoch (weight below 1)",
}  # fmt: skip


def last_step(run: RunFiles) -> int:
    """Return the optimizer steps that are done, as far as the files say."""
    recorded = int(run.metrics.steps[-1]) if len(run.metrics.steps) else 0
    return max(recorded, run.status.step if run.status else 0)


def state_of(run: RunFiles) -> str:
    """Return the state in words; a run whose process is gone without a status was killed."""
    if run.status is None:
        return "not started"
    return "killed" if run.status.was_killed else STATES.get(run.status.state, run.status.state)


def time_left(run: RunFiles, seconds_left: float | None) -> float:
    """Return the seconds until the end: as the run itself estimates them, else by the median of the last steps."""
    if seconds_left is not None:
        return seconds_left
    recent = run.metrics.column("step_seconds")[-RECENT:]
    left = whole(run.resolved.get("total_steps")) - last_step(run)
    known = recent[np.isfinite(recent)]
    return float(np.median(known)) * left if len(known) and left >= 0 else math.nan


def overview(run: RunFiles, seconds_left: float | None) -> Markup:
    """State, progress and the last numbers, the losses, and the command."""
    step, total = last_step(run), whole(run.resolved.get("total_steps"))
    status, state = run.status, state_of(run)
    kind = "state bad" if state in ("killed", STATES["failed"]) else "state good" if state == "finished" else "state"
    share = min(step / total, 1.0) if total else 0.0
    progress = tag("div", tag("i", style=f"width:{100 * share:.2f}%"), class_="bar", role="progressbar",
                   aria_valuenow=step, aria_valuemin=0, aria_valuemax=total, aria_label="steps done")  # fmt: skip
    running = state == "running"
    left = time_left(run, seconds_left) if running else math.nan
    epoch = run.data.get("epoch")
    shown = facts([
        ("steps", f"{step:,} of {total:,}" if total else f"{step:,}"),
        ("time left", duration(left) if math.isfinite(left) else None),
        *((name, _last(run, key)) for name, key in (("loss, smoothed", "loss"), ("learning rate", "lr"),
                                                    ("tokens/s", "tokens_per_second"))),
        ("epoch at the start of this launch", epoch if isinstance(epoch, int) else None),
        ("checkpoints", ", ".join(map(str, run.checkpoints[-6:])) or None),
        ("weights of the lowest held-out loss", ", ".join(f"best-{step}" for step in run.best) or None),
        ("status written", moment(status.updated) if status else None),
        ("host", status.host if status else None),
    ])  # fmt: skip
    error = tag("p", status.error, class_="bad", dir="auto") if status and status.error else None
    problems = [tag("p", problem, class_="bad") for problem in run.problems]
    return joined([
        tag("p", tag("span", state, class_=kind)), progress, error, *problems, _validation_words(run), shown,
        _grid([loss_chart(run), held_out_chart(run)]), command_box(run),
    ])  # fmt: skip


def _last(run: RunFiles, name: str) -> float | None:
    values = run.metrics.column(name)
    if name == "loss" and len(values):
        values = smooth(values)
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _validation_words(run: RunFiles) -> Markup | None:
    """What the last validation says together with those before it, as the log has it."""
    history = _history(run)
    if not history:
        return None
    last, words = history[-1], sentence(history)
    loss = "not finite" if last.held_out is None else f"{last.held_out:.4f}"
    return tag("p", tag("b", f"Held-out loss at step {last.step}: {loss}"), f"; {words}" if words else "")


def _history(run: RunFiles) -> list[Measured]:
    """The validations of the run in order; a loss that is missing or not finite is None."""

    def loss(line: Record, name: str) -> float | None:
        value = finite(line.get(name))
        return value if math.isfinite(value) else None

    return [Measured(whole(line.get("step")), loss(line, "loss"), loss(line, "train_loss")) for line in run.validation]


def command_box(run: RunFiles) -> Markup | None:
    """The command of the last launch, and how to repeat the run with its recorded flags."""
    launches = [event for event in run.events if event.get("event") == "launch" and event.get("command")]
    if not run.asked:
        return None
    script = str(launches[-1].get("script") or "train.py") if launches else "train.py"
    again = f"python {script} --config {run.folder / 'args.json'} --output_dir NEW_FOLDER"
    parts: list[Markup | None] = [tag("h2", "Command")]
    if launches:
        recipe = run.asked.get("recipe")
        said = f"recipe {recipe}; " if recipe else ""
        processes, backend = whole(launches[-1].get("processes"), 1), launches[-1].get("backend")
        count = f"{processes} processes" if processes != 1 else "1 process"
        parts += [
            tag("p", f"{said}{count}, backend {backend}", class_="soft"),
            *_copyable("command", str(launches[-1]["command"])),
        ]
    parts += [tag("p", "The same flags in another folder:", class_="soft"), *_copyable("again", again)]
    return joined(parts)


def _copyable(name: str, text: str) -> list[Markup]:
    box = tag("pre", text, id=name, tabindex="0", dir="ltr")
    return [box, tag("button", "Copy", type="button", class_="plain", data_copy=name)]


def _grid(charts: Sequence[Markup | None]) -> Markup | None:
    shown = [one for one in charts if one is not None]
    return tag("div", *shown, class_="charts") if shown else None


def _resumes(run: RunFiles) -> list[int]:
    return [whole(event.get("step")) for event in run.events if event.get("event") == "launch"]


def loss_chart(run: RunFiles) -> Markup | None:
    """The training loss of each step and its moving average, and the corrected loss where the run has it."""
    steps, loss, corrected = run.metrics.steps, run.metrics.column("loss"), run.metrics.column("loss_corrected")
    if not len(steps):
        return None
    note = "The loss of a step depends on its timesteps and sizes: single steps scatter, the average shows the trend."
    curves = [Curve("range of single steps", steps, loss, "spread"), Curve("smoothed", steps, smooth(loss, 50.0))]
    if np.isfinite(corrected).any():
        note += " The corrected loss is divided by how hard the noise levels and buckets of a step are."
        curves.append(Curve("corrected, smoothed", steps, smooth(corrected)))
    return chart("Training loss", curves, note=note, marks=_resumes(run))


def held_out_chart(run: RunFiles) -> Markup | None:
    """Every loss of validation.jsonl: of the held-out rows, of the EMA, and others that a run measures."""
    names = {"loss": "held-out rows", "train_loss": "training rows", "ema_loss": "held-out rows, EMA"}
    found = dict.fromkeys(
        name for line in run.validation for name, value in line.items() if name != "step" and finite(value) == value
    )
    steps = np.array([finite(line.get("step")) for line in run.validation], np.float64)
    curves = [
        Curve(names.get(name, name.replace("_", " ")), steps, _values(run.validation, name), "points")
        for name in found
        if isinstance(name, str)
    ]
    note = "Measured at the same noise and noise levels every time, so that two steps can be compared."
    return chart("Loss at fixed noise", curves, note=note, marks=_resumes(run))


def _values(lines: Sequence[Record], name: str) -> np.ndarray:
    return np.array([finite(line.get(name)) for line in lines], np.float64)


def band_chart(run: RunFiles) -> Markup | None:
    """The held-out loss at each noise level."""
    bands: dict[float, list[tuple[float, float]]] = {}
    for line in run.validation:
        pairs = line.get("per_sigma")
        for pair in pairs if isinstance(pairs, list) else ():
            if isinstance(pair, list) and len(pair) == 2 and math.isfinite(finite(pair[0])):
                bands.setdefault(finite(pair[0]), []).append((finite(line.get("step")), finite(pair[1])))
    curves = []
    for sigma in sorted(bands):
        columns = np.array(bands[sigma], np.float64)
        curves.append(Curve(f"sigma {sigma:.3g}", columns[:, 0], columns[:, 1], "points"))
    return chart("Held-out loss by noise level (1 = pure noise)", curves)


def curves_tab(run: RunFiles) -> Markup | None:
    """Losses, learning rate and gradient norm over the steps."""
    steps, column = run.metrics.steps, run.metrics.column
    norm = column("grad_norm")
    others = [
        chart(name.replace("_", " "), [Curve("range of single steps", steps, values, "spread"),
                                       Curve("smoothed", steps, smooth(values, 50.0))])
        for name, values in run.metrics.columns.items() if name not in SHOWN
    ]  # fmt: skip
    return _grid([
        loss_chart(run), held_out_chart(run), band_chart(run),
        chart("Learning rate", [Curve("learning rate", steps, column("lr"))], marks=_resumes(run)),
        chart("Gradient norm before clipping", [Curve("range of single steps", steps, norm, "spread"),
                                                Curve("smoothed", steps, smooth(norm, 50.0))], log=True),
        *others,
    ])  # fmt: skip


def speed_tab(run: RunFiles) -> Markup | None:
    """Throughput, the parts of a step, balance and memory."""
    steps, column = run.metrics.steps, run.metrics.column
    parts = {label: column(name) for name, label in PARTS.items()}
    seconds = column("step_seconds")
    known = np.nansum([np.nan_to_num(values) for values in parts.values()], axis=0) if len(steps) else seconds
    if np.isfinite(seconds).any():
        parts["other"] = np.maximum(np.nan_to_num(seconds) - known, 0)
    speed = column("tokens_per_second")
    wait, measured = column("data_wait") / np.maximum(seconds, 1e-9), 1 - column("straggler_share")
    return _grid([
        chart("Tokens per second", [Curve("range of single steps", steps, speed, "spread"),
                                    Curve("smoothed", steps, smooth(speed))]),
        stacked("Seconds of a step, by part", steps, parts,
                note="Of the first process; waiting for other processes is part of forward and backward."),
        chart("Share of a step spent waiting for data", [Curve("smoothed", steps, smooth(wait))]),
        chart("Balance: share of time in which no process waits", [
            Curve("planned", steps, smooth(column("planned_balance"))), Curve("measured", steps, smooth(measured)),
        ]),
        chart("Share of the GPUs' peak FLOPs (MFU)", [Curve("smoothed", steps, smooth(column("mfu")))]),
        chart("GPU memory, GiB", [Curve(label, steps, column(name)) for name, label in MEMORY.items()]),
    ])  # fmt: skip


def data_tab(run: RunFiles) -> Markup | None:
    """What the rows of the metadata became: fates, buckets, cropped, held-out, refused and unreadable rows."""
    data = run.data
    if not data and not run.refused.total and not run.bad.total:
        return None
    fates, cropped = mapping(data.get("fates")), mapping(data.get("cropped"))
    shares = ", ".join(f"{name} {finite(value):.1%}" for name, value in cropped.items())
    rows = whole(data.get("rows"))
    parts: list[Markup | None] = []
    if fates:
        parts += [
            tag("h2", f"{rows:,} {plural(rows, 'row')}"),
            facts((FATES.get(name, name), whole(n)) for name, n in fates.items()),
        ]
    if shares:
        parts.append(tag("p", f"Share of a sample's area that is cropped: {shares}."))
    buckets = _records(data, "buckets")
    if buckets:
        total = sum(whole(b.get("tokens")) * whole(b.get("samples")) for b in buckets) or 1
        lines = [
            (f"{b.get('frames')} x {b.get('height')} x {b.get('width')}", whole(b.get("tokens")), whole(b.get("samples")),
             whole(b.get("batches")), f"{whole(b.get('tokens')) * whole(b.get('samples')) / total:.1%}")
            for b in buckets
        ]  # fmt: skip
        parts += [tag("h2", f"Buckets of epoch {data.get('epoch')}"),
                  table(("frames x height x width", "tokens", "samples", "batches", "share of tokens"), lines)]  # fmt: skip
    parts += _list_of_rows(
        "Held-out rows", _records(data, "held_out"), ("row", "path", "caption"), data.get("held_out_total")
    )
    lost = [{**row, "cropped": f"{finite(row.get('cropped')):.0%}"} for row in _records(data, "cropped_rows")]
    parts += _list_of_rows("Much cropped rows", lost, ("row", "path", "cropped"), data.get("cropped_rows_total"))
    parts += _listing("Rows that are not trained", run.refused, ("row", "path", "class", "detail"))
    parts += _listing(
        "Samples that could not be read during training", run.bad, ("step", "row", "path", "class", "detail")
    )
    return joined(parts)


def _records(data: Record, name: str) -> list[Record]:
    value = data.get(name)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _list_of_rows(title: str, records: Sequence[Record], names: Sequence[str], total: object) -> list[Markup]:
    return _listing(title, Listing(records, max(whole(total), len(records))), names)


def _listing(title: str, listing: Listing, names: Sequence[str]) -> list[Markup]:
    if not listing.total:
        return []
    shown = len(listing.records)
    more = [tag("p", f"The first {shown:,} of {listing.total:,}.", class_="soft")] if shown < listing.total else []
    rows = [[_plain(record.get(name)) for name in names] for record in listing.records[:LISTED]]
    return [tag("h2", f"{title}: {listing.total:,}"), *more, table(names, rows)]


def _plain(value: object) -> object:
    return value if isinstance(value, (str, int, float)) or value is None else json.dumps(value, ensure_ascii=False)


def _events(run: RunFiles) -> Iterator[tuple[float, int, str, str, str]]:
    """Yield (time or NaN, step, kind, text, time in words) of everything that happened, in no order."""
    for event in run.events:
        time, step, kind = finite(event.get("time")), whole(event.get("step")), str(event.get("event"))
        if kind == "launch":
            source = event.get("resumed_from")
            yield time, step, "resumed" if source else "started", f"from {source}" if source else "", moment(time)
            if moved := event.get("moved"):
                yield time, step, "went back", f"what came after step {step} is in {moved}", moment(time)
            changed = event.get("changed")
            for line in changed if isinstance(changed, list) else ():
                yield time, step, "flag changed", str(line), moment(time)
        else:
            words = [str(event[key]) for key in ("state", "error", "text") if event.get(key)]
            yield time, step, kind.replace("_", " "), ": ".join(words), moment(time)
    for step in run.metrics.not_finite:
        yield math.nan, step, "skipped", "loss or gradient was not finite; the weights were not changed", ""
    for step in run.metrics.skipped:
        yield math.nan, step, "skipped", "a spike, or no readable sample; the weights were not changed", ""
    per_step = Counter(whole(record.get("step")) for record in run.bad.records)
    for step, count in per_step.items():
        yield (
            math.nan,
            step,
            "unreadable",
            f"{count} {plural(count, 'sample was', 'samples were')} skipped (tab Data)",
            "",
        )
    for line in run.validation:
        text = f"loss at fixed noise {number(finite(line.get('loss')))}"
        yield math.nan, whole(line.get("step")), "validation", text, ""
    for step in run.checkpoints:
        yield math.nan, step, "checkpoint", f"checkpoint-{step}", ""
    for step in run.best:
        yield math.nan, step, "best", f"best-{step}: the weights of the lowest held-out loss", ""
    for step, count in Counter(sample.step for sample in run.samples).items():
        yield math.nan, step, "samples", f"{count} {plural(count, 'clip')}", ""


def events_tab(run: RunFiles) -> Markup | None:
    """What happened, newest first."""
    events = sorted(_events(run), key=lambda e: (e[1], e[0] if math.isfinite(e[0]) else 0.0), reverse=True)
    if not events:
        return None
    more = (
        tag("p", f"The newest {MOST_EVENTS:,} of {len(events):,}.", class_="soft")
        if len(events) > MOST_EVENTS
        else None
    )
    rows = [(step, kind, text, when) for _, step, kind, text, when in events[:MOST_EVENTS]]
    return joined([more, table(("step", "what", "", "time"), rows, page_size=50)])


def settings_tab(run: RunFiles) -> Markup | None:
    """Every flag with its value, and what followed from them."""
    if not run.asked:
        return None
    flags = [(f"--{name}", json.dumps(value, ensure_ascii=False)) for name, value in sorted(run.asked.items())]
    resolved = json.dumps(run.resolved, indent=1, ensure_ascii=False)
    return joined([
        tag("h2", "Flags"), table(("flag", "value"), flags, page_size=1000),
        tag("h2", "What followed from them"), tag("pre", resolved[:20_000], tabindex="0", dir="ltr"),
    ])  # fmt: skip
