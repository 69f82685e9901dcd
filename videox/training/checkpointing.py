"""Checkpointer: publishes checkpoints, prunes old ones, exports the trained weights, and ends a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from videox.device import memory_phase
from videox.distributed.collectives import run_on_all
from videox.distributed.replicas import ReplicaCheck
from videox.engine.base import Engine
from videox.engine.export import FOLDER, earlier_exports, export_weights
from videox.engine.saved_state import find_fault
from videox.engine.train_state import TrainState
from videox.errors import NUMERICS, STOPPED, STORAGE, SaveError, UserError
from videox.lora.reader import STEM
from videox.run.checkpoint import latest_checkpoint, publish_checkpoint
from videox.run.folder import best_exports, discard, prune
from videox.tracking.overfitting import best_of, read_history
from videox.tracking.preview import plot_losses
from videox.training.context import Context
from videox.training.recorder import SAVE, Recorder
from videox.weights.expert_names import exported_name, lora_stem
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
        expert: as in ExportOptions.
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
    expert: str | None = None


class Checkpointer:
    """Saves and ends a run; all ranks call its methods together.

    Args:
        ctx: of the run.
        state: of the run.
        engine: with the weights.
        recorder: is paused during a save.
        settings: of exports and pruning.
        replicas: compares the weights of all ranks every N steps and before each save.
    """

    def __init__(
        self,
        ctx: Context,
        state: TrainState,
        engine: Engine,
        recorder: Recorder,
        settings: ExportSettings,
        replicas: ReplicaCheck,
    ) -> None:
        self.ctx, self.state, self.engine, self.recorder, self.settings = ctx, state, engine, recorder, settings
        self.replicas = replicas
        self._failure: UserError | None = None  # of the last save
        self._sound_step: int | None = None  # at which the weights and moments were checked

    def compare_replicas(self, *, due: bool = True) -> None:
        """Compare the weights that all ranks have alike if it is due, or in any case with `due` false.

        Raises:
            UserError: (NUMERICS) they differ.
        """
        step = self.state.step
        if due and not self.replicas.is_due(step):
            return
        if line := self.replicas.compare(self.engine.replicated_weights(), step):
            self.recorder.bar.note(line)

    def save(self, *, last: bool = False) -> None:
        """Publish checkpoint-N as a whole or not at all, then prune.

        Nothing is written if a weight or a moment is not finite or absurdly large. Checkpoints that are there stay.

        Args:
            last: nothing is trained after it. A disk that refuses it ends the run after the export of the weights.

        Raises:
            UserError: (STORAGE or NUMERICS) two saves in a row failed, or the last one for its numbers, or the ranks
                have different weights; otherwise a failure is a warning.
        """
        with self.recorder.paused(SAVE), memory_phase("a save"):
            self.compare_replicas(due=False)
            fault = self._fault()
            cause = fault or self._publish()
            if not cause and self.ctx.is_main:  # a part of the save: deleting may take long on a network disk
                self._finish_save()
        if cause:
            self._fail(cause, NUMERICS if fault else STORAGE, last=last)
            return
        self._failure = None

    def _finish_save(self) -> None:
        """Write cost_model.json and prune, on the main process; an error is a warning."""
        try:
            self.recorder.times.write(self.ctx.output_dir)
        except OSError as why:
            self.recorder.bar.note(f"warning: cost_model.json was not written ({why})")
        for warning in self._prune():
            self.recorder.bar.note(f"warning: {warning}")

    def _fault(self) -> str:
        """Return what is wrong with the weights and moments of this step, on any rank; "" if they are sound."""
        if self._sound_step == self.state.step:
            return ""
        faults = self.ctx.gather(find_fault(self.engine.saved_tensors()))
        for rank, fault in enumerate(faults):
            if fault:
                return fault if len(faults) == 1 else f"rank {rank}: {fault}"
        self._sound_step = self.state.step
        return ""

    def _publish(self) -> str:
        """Write and publish the checkpoint of this step; return why the disk refused it, "" if it did not."""
        ctx = self.ctx
        description = {**self.settings.facts, "base_model": base_model_name(self.settings.base_model)}
        try:
            with publish_checkpoint(
                ctx.output_dir, self.state.step, is_main=ctx.is_main, gather=ctx.gather, description=description
            ) as folder:
                if folder is not None:
                    self._write(folder)
                self.recorder.metrics.sync()  # before the publication, and after the collectives of the writes
        except SaveError as why:
            return str(why)
        return ""

    def _fail(self, cause: str, code: int, *, last: bool) -> None:
        """Print that no checkpoint was saved, or end the run; code: NUMERICS or STORAGE."""
        ctx, step = self.ctx, self.state.step
        good = ctx.gather(_last_good(ctx.output_dir) if ctx.is_main else "")[0]
        again = ", as the one before did" if self._failure else ""
        what = f"the save at step {step} failed{again} ({cause}); {good}"
        hint = "free some disk space or repair the disk, then resume with --resume_from_checkpoint latest"
        if code == NUMERICS:
            hint = "resume with --resume_from_checkpoint latest; if it happens again, lower --learning_rate or add --skip_spikes"
        ends = bool(self._failure) and not last
        self._failure = UserError(str(ctx.output_dir), what, hint, code)
        if ends or (last and code == NUMERICS):
            raise self._failure
        then = "" if last else "; training continues"
        self.recorder.bar.note(f"warning: no checkpoint at step {step} ({cause}); {good}{then}")

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
                self._export(folder, only_layouts=False)
            except (UserError, SaveError) as why:  # on all ranks, or on the main one after the last collective
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
        """Export the weights; called on all ranks.

        Raises:
            UserError: (NUMERICS) they are not finite, or absurdly large; raised on all ranks before anything is
                written, or on the main rank if only the export's dtype cannot represent a value.
            SaveError: the disk refused, on the main rank.
        """
        if fault := self._fault():
            raise UserError(f"step {self.state.step}", fault, "export an earlier checkpoint", NUMERICS)
        settings = self.settings
        facts = {**settings.facts, "steps": self.state.step, "seed": self.state.seed}
        metadata = model_metadata(settings.base_model, facts)
        options = ExportOptions(
            settings.dtype, settings.keep_fp32, settings.layouts, metadata, only_layouts, settings.expert
        )
        export_weights(self.engine, folder, options, is_main=self.ctx.is_main)

    def save_and_stop(self, signal_name: str) -> int:
        """Save and end a run that was asked to stop; plot the losses and return its exit code.

        Raises:
            UserError: (STORAGE or NUMERICS) the save failed.
        """
        self.save(last=True)
        self.recorder.close()
        if self._failure:
            raise self._failure
        by, step = signal_name or "another process", self.state.step
        line = f"stopped by {by} at step {step}; resume with --resume_from_checkpoint latest"
        self.ctx.run.status.write("stopped", step=step, exit_code=STOPPED, error=line)
        self.recorder.bar.note(line)
        self._plot()
        return STOPPED

    def export_and_finish(self) -> int:
        """Export the trained weights, plot the losses and end the run; return the exit code.

        What an earlier process exported at this very step is not written again, unless this one trained up to it.

        Raises:
            UserError: (STORAGE) the last save failed, although the weights may have been exported, or the export did;
                (NUMERICS) the weights cannot be exported.
        """
        ctx, state = self.ctx, self.state
        untouched = ctx.run.finished_step == ctx.run.resume.step == state.step
        folder = exported_name(TRANSFORMER, self.settings.expert)
        exported = untouched and (ctx.output_dir / folder).is_dir()
        if not ctx.gather(exported)[0]:
            with memory_phase("the export"):
                try:
                    run_on_all(self._export_final, gather=ctx.gather)
                except UserError as why:
                    raise self._failure or why from why  # the first cause
        self._plot()
        self.recorder.close()
        if self._failure:
            raise self._failure
        if ctx.is_main and not untouched:  # a run that was killed after its last save, before older ones were deleted
            for warning in self._prune():
                self.recorder.bar.note(f"warning: {warning}")
        ctx.run.status.write("finished", step=state.step, exit_code=0)
        lora = self.engine.weight_format.trainable_only
        stem = lora_stem(STEM, self.settings.expert)
        weights = ctx.output_dir / (f"{stem}.safetensors" if lora else folder)
        self.recorder.bar.note(f"finished at step {state.step}; trained weights: {weights}")
        return 0

    def _plot(self) -> None:
        """Write losses.png; a picture that cannot be made is a warning, since the run itself has ended well."""
        if self.ctx.is_main:
            names = ("metrics.jsonl", "validation.jsonl", "losses.png")
            try:
                plot_losses(*(self.ctx.output_dir / name for name in names))
            except (OSError, UserError, ValueError, RuntimeError, ImportError) as why:
                self.recorder.bar.note(f"warning: losses.png was not written ({why})")

    def _export_final(self) -> None:
        try:
            self._export(self.ctx.output_dir, only_layouts=False)
        except SaveError as why:
            what = f"the trained weights of step {self.state.step} were not exported ({why})"
            hint = "free some disk space or repair the disk, then resume with --resume_from_checkpoint latest"
            raise UserError(str(self.ctx.output_dir), what, hint, STORAGE) from why
        if self.ctx.is_main and (stale := earlier_exports(self.ctx.output_dir, self.state.step)):
            files = ", ".join(f"{name} (step {step})" for name, step in stale.items())
            self.recorder.bar.note(
                f"warning: {files} in {self.ctx.output_dir} are exports of an earlier step, not of step "
                f"{self.state.step}: this run's --export_layouts does not include them"
            )


def _last_good(output_dir: Path) -> str:
    """Return the words on the newest sound checkpoint of a run."""
    try:
        checkpoint, _ = latest_checkpoint(output_dir)
    except OSError as why:
        return f"the checkpoints cannot be read ({why})"
    return f"the last good checkpoint is {checkpoint.name}" if checkpoint else "there is no checkpoint yet"
