"""Data that changes between two launches of a run: the rows of each, how they differ, and --accept_data_change."""

from __future__ import annotations

import argparse
from pathlib import Path

from videox.data.choices import AT_ONCE
from videox.data.index.captions import rows_without_caption
from videox.data.index.index import Index
from videox.data.index.row_changes import RowChange, compare_rows, join_rows, load_rows, save_rows
from videox.data.plan.epoch import EpochPlan
from videox.data.plan.plan import held_out_rows, plan_epoch
from videox.data.plan.settings import PlanColumns, PlanSettings, columns_fingerprint, columns_of
from videox.distributed.collectives import run_on_main
from videox.engine.resume import IndexedData, shorten
from videox.engine.train_state import TrainState
from videox.errors import MODEL, UserError, plural
from videox.training.context import Context
from videox.training.data_sources import sources_of

ROWS = "rows"  # folder in output_dir: the rows of the run's data, one file for each state of the data


def indexed_data(args: argparse.Namespace, ctx: Context, index: Index, columns: PlanColumns) -> IndexedData:
    """Return the data of this launch as resume_or_begin needs it.

    Args:
        index: of this launch.
        columns: what the plan reads of it.
    """

    def changes_since(fingerprint: str) -> list[RowChange] | None:
        then = stored_rows(args, ctx, fingerprint, index)
        return None if then is None else compare_rows(then, index)

    return IndexedData(
        columns_fingerprint(index, columns),
        index.rows_fingerprint(),
        columns,
        captionless=rows_without_caption(index.text),
        name_of=lambda row: repr(index.file_path[row].as_py()),
        sources=tuple(source.describe() for source in sources_of(args).sources),
        accept=args.accept_data_change or "",
        changes_since=changes_since,
        start_flag="--init_lora_from" if args.lora_rank else "--transformer_path",
    )


def _rows_file(output_dir: Path, fingerprint: str) -> Path:
    return output_dir / ROWS / f"{fingerprint[:16]}.arrow"


def stored_rows(args: argparse.Namespace, ctx: Context, fingerprint: str, now: Index) -> Index | None:
    """Return the rows with this fingerprint, as the run or the run that it resumes from stored them; None without.

    Args:
        fingerprint: of an index, see columns_fingerprint.
        now: the index of this launch, whose data folder the paths are relative to.
    """
    folders = [ctx.output_dir, *([ctx.checkpoint.parent] if ctx.checkpoint else [])]
    for folder in folders:
        rows = load_rows(_rows_file(folder, fingerprint), now.data_dir)
        by_second = args.video_sample_fps > 0
        if rows is not None and columns_fingerprint(rows, columns_of(rows, by_second=by_second)) == fingerprint:
            return rows
    return None


def keep_rows(args: argparse.Namespace, ctx: Context, state: TrainState, data: IndexedData, index: Index) -> None:
    """Store the rows of the run that are not stored yet: those of this launch, and those of an unfinished epoch.

    Raises:
        UserError: (STORAGE) they cannot be written.
    """

    def store() -> None:
        if data.fingerprint in (state.index, state.next_data and state.next_data.index):
            save_rows(index, _rows_file(ctx.output_dir, data.fingerprint))
        if state.next_data and (rows := stored_rows(args, ctx, state.index, index)) is not None:
            save_rows(rows, _rows_file(ctx.output_dir, state.index))

    run_on_main(store, is_main=ctx.is_main, gather=ctx.gather)


def rows_of_epoch(
    args: argparse.Namespace, ctx: Context, index: Index, state: TrainState, settings: PlanSettings
) -> tuple[Index, EpochPlan, int]:
    """Return the index and the plan of the current epoch, and where the plan's rows begin in the index.

    If the data has changed within the epoch, its rows follow those of the new data.

    Raises:
        UserError: (MODEL) these rows are not stored.
    """
    columns = state.columns or columns_of(index, by_second=args.video_sample_fps > 0)
    plan = plan_epoch(columns, settings, state.epoch, state.quarantined, state.first_step_of_epoch)
    if not state.next_data:
        return index, plan, 0
    rows = stored_rows(args, ctx, state.index, index)
    if rows is None:
        what = f"the rows that epoch {state.epoch} began with are not in {ctx.output_dir / ROWS}"
        hint = f"restore that folder, or add --accept_data_change={AT_ONCE} to leave out the rest of the epoch"
        raise UserError("--resume_from_checkpoint", what, hint, MODEL)
    return join_rows(index, rows), plan, len(index)


def change_lines(
    args: argparse.Namespace, ctx: Context, index: Index, state: TrainState, settings: PlanSettings, plan: EpochPlan
) -> list[str]:
    """Return lines on data that changed before this launch or in this epoch; [] if it did not.

    Args:
        index: of this launch.
        state: of the run.
        settings: of the plan.
        plan: of the epoch that the run is in.
    """
    last = state.data_changes[-1] if state.data_changes else None
    if state.next_data:
        before, end = state.index, state.step - state.epoch_step + plan.n_steps
        when = f"epoch {state.epoch} ends at step {end} with the rows that it began with; the new data is trained from epoch {state.epoch + 1} on"
        first_epoch = state.epoch + 1
    elif last and last["step"] == state.step and args.accept_data_change:
        before, first_epoch = last["before"], last["epoch"]
        when = f"the new data is trained from here on (step {state.step}, epoch {state.epoch})"
    else:
        unchanged = "--accept_data_change has no effect: the data has not changed"
        return [unchanged] if args.accept_data_change and ctx.checkpoint else []
    rows = stored_rows(args, ctx, before, index)
    changes = [] if rows is None else compare_rows(rows, index)
    lines = [f"the data has changed: {'; '.join([*shorten(changes), when])}"]
    if rows is not None and settings.holds_out:
        lines += held_out_warning(rows, index, args.video_sample_fps > 0, settings)
    if not args.max_train_steps and first_epoch >= args.num_train_epochs:
        lines.append(
            f"warning: the new data is not trained, because the run ends with epoch {first_epoch - 1}: raise "
            f"--num_train_epochs above {first_epoch}"
        )
    return lines


def held_out_warning(then: Index, now: Index, by_second: bool, settings: PlanSettings) -> list[str]:
    """Return a warning if files are held out for validation that were trained before the data changed; [] if none.

    Args:
        then: the rows before the change.
        now: the rows after it.
        by_second: frames are sampled by frame rate.
        settings: of the plan.
    """
    chosen = [held_out_rows(columns_of(index, by_second=by_second), settings) for index in (then, now)]
    before, after = (
        {index.file_path[int(row)].as_py() for row in rows} for index, rows in zip((then, now), chosen, strict=True)
    )
    trained = sorted((after - before) & set(then.file_path.to_pylist()))
    if not trained:
        return []
    return [
        f"warning: {len(trained)} of the {len(after)} held-out {plural(len(after), 'row')} of the new data "
        f"{plural(len(trained), 'was', 'were')} trained before "
        f"({', '.join(trained[:5])}): the held-out loss is not comparable with that before the change"
    ]
