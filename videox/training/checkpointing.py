"""Checkpointer: publishes checkpoints, prunes old ones, exports the trained weights, and ends a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from videox.device import memory_phase
from videox.distributed.collectives import run_on_all
from videox.engine.base import Engine
from videox.engine.export import FOLDER, earlier_exports, export_weights
from videox.engine.train_state import TrainState
from videox.errors import STOPPED, STORAGE, SaveError, UserError
from videox.lora.reader import STEM
from videox.run.checkpoint import publish_checkpoint
from videox.run.folder import best_exports, discard, prune
from videox.tracking.preview import plot_losses
from videox.training.context import Context
from videox.training.overfitting import best_of, read_history
from videox.training.recorder import SAVE, Recorder
from videox.weights.format import TRANSFORMER, ExportOptions
from videox.weights.header import base_model_name, model_metadata


@dataclass(frozen=True)
class ExportSettings:
    """How trained weights are exported, and how many checkpoints are kept.

    Attributes:
        dtype: of the floating-point tensors.
        keep_fp32: parts of tensor names that stay float32.
        layouts: layouts to write besides diffusers'.
        base_model: the model that is trained, as the user named it.
        facts: task, backend, flow shift and sizes, for the headers of the files and the manifest.
        keep: newest checkpoints to keep; None keeps all.
        at_end_only: these layouts are written at the end of the run, not in each checkpoint.
        keep_best: the checkpoint with the lowest held-out loss is kept beyond `keep`, and exported.
        save_every: steps between checkpoints; one at another step was saved as the best or the last one.
    """

    dtype: torch.dtype
    keep_fp32: Sequence[str]
    layouts: Sequence[str]
    base_model: str
    facts: Mapping[str, object]
    keep: int | None
    at_end_only: bool = False
    keep_best: bool = False
    save_every: int = 1


class Checkpointer:
    """Saves and ends a run; all ranks call its methods together.

    Args:
        ctx: of the run.
        state: of the run.
        engine: with the weights.
        recorder: is paused during a save.
        settings: of exports and pruning.
    """

    def __init__(
        self, ctx: Context, state: TrainState, engine: Engine, recorder: Recorder, settings: ExportSettings
    ) -> None:
        self.ctx, self.state, self.engine, self.recorder, self.settings = ctx, state, engine, recorder, settings
        self._save_failed = False

    def save(self) -> None:
        """Publish checkpoint-N as a whole or not at all, then prune.

        Raises:
            UserError: (STORAGE) two saves in a row failed; the first one is a warning.
        """
        ctx, step, note = self.ctx, self.state.step, self.recorder.bar.note
        description = {**self.settings.facts, "base_model": base_model_name(self.settings.base_model)}
        with self.recorder.paused(SAVE), memory_phase("a save"):
            self.recorder.metrics.sync()
            try:
                with publish_checkpoint(
                    ctx.output_dir, step, is_main=ctx.is_main, gather=ctx.gather, description=description
                ) as folder:
                    if folder is not None:
                        self._write(folder)
            except SaveError as why:
                if self._save_failed:
                    what = f"the save at step {step} failed, as the one before did ({why})"
                    hint = "free some disk space or repair the disk, then resume"
                    raise UserError(str(ctx.output_dir), what, hint, STORAGE) from why
                self._save_failed = True
                note(f"warning: no checkpoint at step {step} ({why}); training continues")
                return
        self._save_failed = False
        if ctx.is_main:
            self.recorder.times.write(ctx.output_dir)
            for warning in self._prune():
                note(f"warning: {warning}")

    def _prune(self) -> list[str]:
        """Delete checkpoints beyond the limit, but not the best one with --keep_best; on the main process."""
        if not self.settings.keep:
            return []
        best = best_of(read_history(self.ctx.output_dir / "validation.jsonl")) if self.settings.keep_best else None
        return prune(self.ctx.output_dir, self.settings.keep, best.step if best else None)

    def export_best(self) -> None:
        """Export the weights of this step, of the lowest held-out loss, to best-STEP, and delete the one before.

        Without a limit on checkpoints, that one's checkpoint is deleted, too, if it was saved as the best one only.
        """
        ctx, step, note = self.ctx, self.state.step, self.recorder.bar.note
        folder = ctx.output_dir / f"best-{step}"
        with self.recorder.paused(), memory_phase("the export"):
            try:
                folder.mkdir(exist_ok=True)
                self._export(folder, only_layouts=False)
            except (UserError, SaveError, OSError) as why:  # on the main process, after the last collective
                note(f"warning: the best weights, of step {step}, were not exported ({why})")
                return
        if not ctx.is_main:
            return
        note(f"step {step}: the lowest held-out loss so far; its weights are in {folder}")
        for earlier, exported in best_exports(ctx.output_dir).items():
            if earlier == step:
                continue
            stale = [exported]
            if earlier % self.settings.save_every and not self.settings.keep:
                stale.append(ctx.output_dir / f"checkpoint-{earlier}")
            for warning in discard(stale):
                note(f"warning: {warning}")

    def _write(self, folder: Path) -> None:
        """Write the files of a checkpoint, and the other layouts into its exports/.

        Raises:
            OSError, SafetensorError, SaveError: a write failed; raised after the last collective.
        """
        self.engine.save(folder, self.state)
        if self.settings.at_end_only or not self.settings.layouts:
            return
        try:
            self._export(folder / FOLDER, only_layouts=True)
        except UserError as why:  # on the main process, after the last collective
            step, note = self.state.step, self.recorder.bar.note
            note(f"warning: checkpoint-{step} lacks some exports: {why.where} {why.what}")

    def _export(self, folder: Path, *, only_layouts: bool) -> None:
        settings = self.settings
        facts = {**settings.facts, "steps": self.state.step, "seed": self.state.seed}
        metadata = model_metadata(settings.base_model, facts)
        options = ExportOptions(settings.dtype, settings.keep_fp32, settings.layouts, metadata, only_layouts)
        export_weights(self.engine, folder, options, is_main=self.ctx.is_main)

    def stopped(self, signal_name: str) -> int:
        """End a run that was asked to stop and has been saved; plot the losses and return its exit code."""
        self.recorder.close()
        by, step = signal_name or "another process", self.state.step
        line = f"stopped by {by} at step {step}; resume with --resume_from_checkpoint latest"
        self.ctx.run.status.write("stopped", step=step, exit_code=STOPPED, error=line)
        self.recorder.bar.note(line)
        self._plot()
        return STOPPED

    def export_and_finish(self) -> int:
        """Export the trained weights, plot the losses and end the run; return the exit code.

        What an earlier process exported at this very step is not written again, unless this one trained up to it.
        """
        ctx, state = self.ctx, self.state
        untouched = ctx.run.finished_step == ctx.run.resume.step == state.step
        exported = untouched and (ctx.output_dir / TRANSFORMER).is_dir()
        if not ctx.gather(exported)[0]:
            with memory_phase("the export"):
                run_on_all(self._export_final, gather=ctx.gather)
        self._plot()
        self.recorder.close()
        ctx.run.status.write("finished", step=state.step, exit_code=0)
        lora = self.engine.weight_format.trainable_only
        weights = ctx.output_dir / (f"{STEM}.safetensors" if lora else TRANSFORMER)
        self.recorder.bar.note(f"finished at step {state.step}; trained weights: {weights}")
        return 0

    def _plot(self) -> None:
        """Write losses.png; the disk's refusal is a warning."""
        if self.ctx.is_main:
            names = ("metrics.jsonl", "validation.jsonl", "losses.png")
            try:
                plot_losses(*(self.ctx.output_dir / name for name in names))
            except OSError as why:
                self.recorder.bar.note(f"warning: losses.png was not written ({why})")

    def _export_final(self) -> None:
        self._export(self.ctx.output_dir, only_layouts=False)
        if self.ctx.is_main and (stale := earlier_exports(self.ctx.output_dir, self.state.step)):
            files = ", ".join(f"{name} (step {step})" for name, step in stale.items())
            self.recorder.bar.note(
                f"warning: {files} in {self.ctx.output_dir} are exports of an earlier step, not of step "
                f"{self.state.step}: this run's --export_layouts does not include them"
            )
