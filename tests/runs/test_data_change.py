"""Tests of runs whose data changes between two launches: what the refusal names, and --accept_data_change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import forkserver
import pytest
import runs
import tiny
from launches import output_of

MODEL = 4  # exit code
MEDIA = (
    ("a.mp4", 96, 64, 13, 24.0),
    ("b.mp4", 96, 64, 13, 24.0),
    ("c.mp4", 64, 96, 9, 24.0),
    ("d.png", 64, 64, 0, 0.0),
)
EPOCH = 4  # steps: one for each row


class ChangingRuns:
    """A model, data, and the same data with a new clip and another caption; a run stopped within its second epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.build_wan_t2v(folder / "model")
        self.metadata = tiny.make_dataset(folder / "data", MEDIA)
        self.reference = folder / "reference"
        assert self.run(self.reference, steps=2 * EPOCH).code == 0
        self.stopped = folder / "stopped"
        assert self.run(self.stopped, steps=EPOCH + 1).code == 0
        tiny.write_clip(folder / "data/new.mp4", 13, 96, 64, seed=9)
        self.changed = folder / "data/changed.json"
        rows = json.loads(self.metadata.read_text(encoding="utf-8"))
        rows[1]["text"] = "a tall tower"
        rows = [{"file_path": "new.mp4", "text": "a new clip", "type": "video"}, *rows]
        self.changed.write_text(json.dumps(rows), encoding="utf-8")

    def run(self, output_dir: Path, steps: int, metadata: Path | None = None, **flags: object):
        settings = {"max_train_steps": steps, "checkpointing_steps": 100, "mixed_precision": "no", **flags}
        argv = runs.wan_flags(self.model, metadata or self.metadata, output_dir, **settings)
        return forkserver.shared().run(argv, self.folder / f"{len([*self.folder.glob('*.log')])}.log")

    def run_two_ranks(self, output_dir: Path, steps: int, metadata: Path | None = None, **flags: object) -> str:
        """Run on two ranks (DDP), which must end well; return what the first one printed."""
        settings = {"max_train_steps": steps, "checkpointing_steps": 100, "mixed_precision": "no", **flags}
        argv = runs.wan_flags(self.model, metadata or self.metadata, output_dir, **settings)
        log = self.folder / f"{len([*self.folder.glob('*.log')])}.log"
        ranks = forkserver.shared().start_ranks(2, argv, log)
        assert [rank.wait() for rank in ranks] == [0, 0], output_of(ranks)
        return ranks[0].output()

    def go_on(self, output_dir: Path, steps: int, **flags: object):
        """Resume with the changed data."""
        flags = {"resume_from_checkpoint": "latest", "metadata": self.changed, **flags}
        return self.run(output_dir, steps, **flags)

    def copy(self, output_dir: Path) -> Path:
        return shutil.copytree(self.stopped, output_dir)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> ChangingRuns:
    return ChangingRuns(tmp_path_factory.mktemp("setup"))


def rows_of(output_dir: Path) -> list[list[int]]:
    return [line["rows"] for line in forkserver.read_steps(output_dir)]


def data_changes(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "args.json").read_text(encoding="utf-8"))["resolved"]["data_changes"]


def test_the_refusal_names_the_rows_and_the_way_out(setup: ChangingRuns, tmp_path: Path) -> None:
    trainer = setup.go_on(setup.copy(tmp_path / "run"), 2 * EPOCH)
    assert trainer.code == MODEL
    line = trainer.error_line()
    caption = json.loads(setup.metadata.read_text(encoding="utf-8"))[1]["text"]
    named = f"row 0 new.mp4: is new; row 2 b.mp4: caption was {caption!r} and is 'a tall tower'"
    assert f"the data's rows, captions or sizes have changed: {named}." in line
    assert "add --accept_data_change to train the new data from the next epoch on" in line
    # a checkpoint in another place finds the rows beside it
    trainer = setup.run(
        tmp_path / "other", 2 * EPOCH, setup.changed, resume_from_checkpoint=setup.stopped / f"checkpoint-{EPOCH + 1}"
    )
    assert named in trainer.error_line()


def test_the_epoch_ends_with_its_own_rows_and_the_new_data_follows(setup: ChangingRuns, tmp_path: Path) -> None:
    folder, steps = setup.copy(tmp_path / "run"), 3 * EPOCH + 1
    trainer = setup.go_on(folder, steps, accept_data_change=True)
    assert trainer.code == 0, trainer.output()[-4000:]
    assert f"epoch 1 ends at step {2 * EPOCH} with the rows that it began with" in trainer.output()
    reference, found = forkserver.read_steps(setup.reference), forkserver.read_steps(folder)
    assert found[: 2 * EPOCH] == reference
    assert sorted(row for rows in rows_of(folder)[2 * EPOCH :] for row in rows) == [0, 1, 2, 3, 4]
    (change,) = data_changes(folder)
    assert (change["step"], change["epoch"]) == (2 * EPOCH, 2)
    state = json.loads((folder / f"checkpoint-{steps}/trainer_state.json").read_text(encoding="utf-8"))
    assert state["data_changes"] == [change]
    assert (state["index"], state["next_data"]) == (change["after"], None)

    # stopped again before the epoch ends, and resumed without the flag: the same numbers
    twice = setup.copy(tmp_path / "twice")
    assert setup.go_on(twice, EPOCH + 2, accept_data_change=True).code == 0
    trainer = setup.go_on(twice, steps)
    assert trainer.code == 0, trainer.output()[-4000:]
    assert forkserver.differences(twice, folder, steps) == []

    # the old data is now the changed one
    trainer = setup.run(folder, steps + 1, resume_from_checkpoint="latest")
    assert "row 0 new.mp4: is gone" in trainer.error_line()
    trainer = setup.go_on(folder, steps + 1, accept_data_change=True)
    assert trainer.code == 0
    assert "--accept_data_change has no effect: the data has not changed" in trainer.output()


@pytest.mark.parametrize("accept", ["now", pytest.param(None, marks=pytest.mark.slow)])
def test_now_leaves_out_the_rest_of_the_epoch(setup: ChangingRuns, tmp_path: Path, accept: str | None) -> None:
    folder, steps = setup.copy(tmp_path / "run"), 2 * EPOCH + 2
    if accept is None:  # a change that waits for the end of the epoch can still be trained at once
        assert setup.go_on(folder, EPOCH + 2, accept_data_change=True).code == 0
    trainer = setup.go_on(folder, steps + (accept is None), accept_data_change="now")
    assert trainer.code == 0, trainer.output()[-4000:]
    begin = EPOCH + 1 + (accept is None)
    assert f"the new data is trained from here on (step {begin}, epoch 2)" in trainer.output()
    assert sorted(row for rows in rows_of(folder)[begin:] for row in rows) == [0, 1, 2, 3, 4]
    assert (data_changes(folder)[-1]["step"], data_changes(folder)[-1]["epoch"]) == (begin, 2)


@pytest.mark.slow
def test_a_run_of_an_older_version_needs_now(setup: ChangingRuns, tmp_path: Path) -> None:
    folder = setup.copy(tmp_path / "run")
    shutil.rmtree(folder / "rows")
    trainer = setup.go_on(folder, 2 * EPOCH, accept_data_change=True)
    assert trainer.code == MODEL
    assert "add =now to leave out the rest of the epoch" in trainer.error_line()
    line = setup.go_on(folder, 2 * EPOCH).error_line()
    assert "have changed. Fix: add --accept_data_change=now to train the new data at once" in line  # no rows' names
    assert setup.go_on(folder, 2 * EPOCH, accept_data_change="now").code == 0


@pytest.mark.slow
def test_the_number_of_steps_counts_both_data_sets(setup: ChangingRuns, tmp_path: Path) -> None:
    folder = setup.copy(tmp_path / "run")
    epochs = {"max_train_steps": None, "accept_data_change": True}
    trainer = setup.go_on(folder, 0, num_train_epochs=2, **epochs)
    assert trainer.code == 0
    assert "warning: the new data is not trained, because the run ends with epoch 1" in trainer.output()
    assert len(rows_of(folder)) == 2 * EPOCH
    trainer = setup.go_on(folder, 0, num_train_epochs=3, **epochs)
    assert trainer.code == 0, trainer.output()[-4000:]
    assert len(rows_of(folder)) == 2 * EPOCH + 5


@pytest.mark.slow
def test_a_cache_and_held_out_rows_follow_the_change(setup: ChangingRuns, tmp_path: Path) -> None:
    """Cached and not, a run whose data changes within an epoch trains the same numbers."""
    losses = []
    for name, cache in (("plain", {}), ("cached", {"latent_cache": tmp_path / "cache"})):
        folder, flags = tmp_path / name, {"validation_rows": 1, "validation_steps": 2, **cache}
        assert setup.run(folder, EPOCH, **flags).code == 0
        trainer = setup.go_on(folder, 2 * EPOCH + 3, accept_data_change=True, **flags)
        assert trainer.code == 0, trainer.output()[-4000:]
        losses.append([line["loss"] for line in forkserver.read_steps(folder)])
        if cache:
            assert "to encode" in trainer.output()
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_ranks_go_on_with_the_new_data_as_one_process_does(setup: ChangingRuns, tmp_path: Path) -> None:
    """Two rows per step: epochs of two steps, then of three with the new clip; the data changes within the second."""
    resume = {"resume_from_checkpoint": "latest", "metadata": setup.changed}
    plain, once, twice = (tmp_path / name for name in ("plain", "once", "twice"))
    setup.run_two_ranks(plain, 4)
    setup.run_two_ranks(once, 3)
    shutil.copytree(once, twice)
    printed = setup.run_two_ranks(once, 7, accept_data_change=True, **resume)
    assert "epoch 1 ends at step 4 with the rows that it began with" in printed
    assert forkserver.read_steps(once)[:4] == forkserver.read_steps(plain)
    assert {row for rows in rows_of(once)[4:] for row in rows} == {0, 1, 2, 3, 4}
    (change,) = data_changes(once)
    assert (change["step"], change["epoch"]) == (4, 2)

    # stopped in the epoch of the new data, and resumed without the flag: the same numbers
    setup.run_two_ranks(twice, 5, accept_data_change=True, **resume)
    setup.run_two_ranks(twice, 7, **resume)
    assert forkserver.differences(twice, once, 7) == []

    # one process with two micro-batches per step trains the same rows; its sums differ in rounding
    alone, flags = tmp_path / "alone", {"gradient_accumulation_steps": 2}
    assert setup.run(alone, 3, **flags).code == 0
    assert setup.go_on(alone, 7, accept_data_change=True, **flags).code == 0
    assert [sorted(rows) for rows in rows_of(alone)] == [sorted(rows) for rows in rows_of(once)]
    losses = [[line["loss"] for line in forkserver.read_steps(folder)] for folder in (alone, once)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
