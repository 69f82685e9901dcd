"""Tests of captions in runs: plan, report and --explain, resume, latent cache, and rows without a caption."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import plans
import pytest
import runs
import tiny

from videox.data.dataset import TokenLengthDataset
from videox.data.index.captions import CaptionRules, RowCaptions, pack_captions
from videox.data.index.index import Index, MediaColumns
from videox.data.plan.epoch import PlannedSample
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import PlanColumns, columns_of
from videox.engine.resume import IndexedData, refuse_changed_plan, resume_or_begin
from videox.engine.train_state import (
    TrainState,
    plan_inputs,
    write_state,
)
from videox.errors import UserError
from videox.estimate.data_report import caption_lines, check_captions
from videox.estimate.explain_row import explain_row
from videox.shapes import Bucket
from videox.training.schedule import name_of_flags

NONE = CaptionRules()


def index_of(texts: list[str], usable: list[bool] | None = None) -> Index:
    rows = len(texts)
    sides = np.full(rows, 256)
    media = MediaColumns(kind=np.ones(rows), width=sides, height=sides, frames=np.full(rows, 99))
    return Index.from_columns(
        media, text=texts, usable=None if usable is None else np.array(usable),
        file_path=[f"{row}.mp4" for row in range(rows)],
    )  # fmt: skip


def test_epochs_draw_the_captions_of_a_row_anew_and_repeat_on_resume() -> None:
    captions = ("first", "second", "third")
    index = index_of([pack_captions(RowCaptions(captions)), "plain"])
    dataset = TokenLengthDataset(index, policy=plans.POLICY, reader="pyav", caption_dropout=0.0)
    settings = replace(plans.SETTINGS, slots=1, batch_size=1)

    def drawn(epoch: int) -> dict[int, str]:
        plan = plan_epoch(columns_of(index, by_second=False), settings, epoch)
        return {
            int(row): dataset.caption_of(
                PlannedSample(int(row), 0, int(key), 0, 1.0, 0.5, Bucket(1, 64, 64), 0, 0, True)
            )
            for row, key in zip(plan.row, plan.key, strict=True)
        }

    epochs = [drawn(epoch) for epoch in range(60)]
    assert {epoch[1] for epoch in epochs} == {"plain"}
    assert min(Counter(epoch[0] for epoch in epochs).values()) > 8
    assert [drawn(epoch) for epoch in range(60)] == epochs


def test_default_rules_leave_names_and_plans_of_runs_as_they_were() -> None:
    assert not {"caption_prefix", "trigger_word", "caption_shuffle_tags"} & plan_inputs(plans.SETTINGS).keys()
    flags = {"seed": 1, "train_data_meta": "x"}
    defaults = {"caption_prefix": "", "trigger_word": "", "caption_shuffle_tags": False, "missing_caption": "empty"}
    assert name_of_flags(flags) == name_of_flags(flags | defaults)
    assert name_of_flags(flags) == name_of_flags(flags | {"missing_caption": "refuse"})
    for changed in ({"caption_prefix": "p"}, {"trigger_word": "t"}, {"caption_shuffle_tags": True}):
        assert name_of_flags(flags) != name_of_flags(flags | defaults | changed)


@pytest.mark.parametrize(
    ("setting", "value", "shown"),
    [
        ("caption_prefix", "photo of", "--caption_prefix was '', is 'photo of'"),
        ("trigger_word", "ohwx", "--trigger_word was '', is ohwx"),
        ("caption_shuffle_tags", True, "--caption_shuffle_tags was False, is True"),
    ],
)
def test_a_resumed_run_with_other_caption_settings_is_refused_by_name(setting: str, value: object, shown: str) -> None:
    changed = replace(plans.SETTINGS, **{setting: value})
    for then, now in ((plans.SETTINGS, changed), (changed, plans.SETTINGS)):
        state = TrainState(then.seed, then.slots, "same", plan_inputs(then), run="a run")
        refuse_changed_plan(state, then)
        with pytest.raises(UserError) as refused:
            refuse_changed_plan(state, now)
        if now is changed:
            assert refused.value.what == f"the schedule would change: {shown}"
        assert setting in refused.value.what


def test_a_run_that_began_without_rows_that_have_no_caption_goes_on_without_them(tmp_path: Path) -> None:
    """Older versions did not train them."""
    then = columns_of(index_of(["a", "", "b"], usable=[True, False, True]), by_second=False)
    now = columns_of(index_of(["a", "", "b"]), by_second=False)

    def data(columns: PlanColumns, name: str, captionless: list[bool]) -> IndexedData:
        return IndexedData(name, "names", columns, captionless=np.array(captionless))

    def resume(checkpoint: Path | None, known: IndexedData) -> TrainState:
        return resume_or_begin(
            checkpoint, lambda **changes: replace(plans.SETTINGS, **changes), known, seed=42, slots=12, world_size=1,
            flags_name="a run", gather=lambda value: [value],
        )[0]  # fmt: skip

    write_state(tmp_path, resume(None, data(then, "old", [False, True, False])))
    assert resume(tmp_path, data(now, "new", [False, True, False])).columns.usable.tolist() == [True, False, True]
    with pytest.raises(UserError, match="1 row has changed since the run began: row 1"):
        resume(tmp_path, data(now, "new", [False, False, False]))


def test_rows_without_a_caption_are_counted_and_named() -> None:
    index = index_of(["a dog", "", "x", " "], usable=[True, True, True, True])
    assert caption_lines(index, NONE) == ["2 rows have no caption and are trained with an empty caption: rows 1, 3"]
    assert "with the caption 'ohwx': rows 1, 3" in caption_lines(index, CaptionRules(trigger_word="ohwx"))[0]
    check_captions(index, "empty")
    with pytest.raises(UserError) as refused:
        check_captions(index, "refuse")
    assert "2 rows have no caption: rows 1 ('1.mp4'), 3 ('3.mp4')" in refused.value.line()
    assert caption_lines(index_of(["a", "b"]), NONE) == []
    check_captions(index_of(["a", ""], usable=[True, False]), "refuse")  # a row that is not trained needs none


def test_several_captions_and_a_forgotten_trigger_word_are_said() -> None:
    index = index_of([pack_captions(RowCaptions(("a", "b", "c"))), "[trigger] runs"])
    several, warning = caption_lines(index, NONE)
    assert "1 row has several captions (up to 3)" in several
    assert "--trigger_word" in warning and "1 row is trained as it is" in warning
    assert caption_lines(index, CaptionRules(trigger_word="tok")) == [several]


def test_placeholders_that_stay_are_reported() -> None:
    rules = CaptionRules(prefix="[TRIGGER],", trigger_word="tok")
    index = index_of(["[Trigger] runs", "[trigger] runs", "a [name]", "[name]"], [True, True, True, False])
    assert caption_lines(index, rules) == [
        "warning: --caption_prefix has [TRIGGER], but only [trigger] is replaced by the trigger word",
        "warning: the captions of 2 rows have [Trigger], [name], but only [trigger] is replaced by the trigger word: "
        "rows 0, 2",
    ]
    assert caption_lines(index_of(["[trigger]"]), CaptionRules(trigger_word="tok")) == []


def test_explain_shows_the_caption_of_each_epoch() -> None:
    index = index_of([pack_captions(RowCaptions(("a, b", "c, d")))])
    settings = replace(plans.SETTINGS, trigger_word="tok", caption_shuffle_tags=True)
    columns = columns_of(index, by_second=False)
    lines = explain_row(index, columns, settings, 0, epochs=40, caption_dropout=0.3)
    assert lines[1:3] == ["caption 1 of 2: 'a, b'", "caption 2 of 2: 'c, d'"]
    dataset = TokenLengthDataset(
        index, policy=settings.policy, reader="pyav", caption_dropout=0.3, caption_rules=settings.caption_rules
    )
    shown = []
    for epoch, line in enumerate(lines[4:]):
        (key,) = plan_epoch(columns, settings, epoch).key.tolist()
        caption = dataset.caption_of(PlannedSample(0, 0, key, 0, 1.0, 0.5, Bucket(1, 64, 64), 0, 0, True))
        assert line.rstrip().endswith(repr(caption) if caption else "'' (dropped)")
        shown.append(caption)
    assert set(shown) == {"", "tok, a, b", "tok, b, a", "tok, c, d", "tok, d, c"}


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("model") / "wan")


def write_list(folder: Path) -> Path:
    metadata = tiny.make_dataset(folder / "data")
    rows = json.loads(metadata.read_text(encoding="utf-8"))
    for row, text in zip(
        rows, (["one, two, three, four", "five, six, seven, eight"], None, "[trigger], nine"), strict=False
    ):
        row["text"] = text
    metadata.write_text(json.dumps(rows), encoding="utf-8")
    return metadata


RUN = {
    "mixed_precision": "no", "gradient_checkpointing": None, "tokenizer_max_length": 16, "caption_dropout": 0.0,
    "train_batch_size": 2, "num_train_epochs": 2, "lr_warmup_steps": 0, "fix_sample_size": [64, 64],
    "random_hw_adapt": None, "training_with_video_token_length": None, "video_sample_n_frames": 1,
}  # fmt: skip


def test_a_run_trains_what_explain_shows_with_and_without_a_cache(model: Path, tmp_path: Path) -> None:
    """Prefix, trigger word, lists and shuffled tags; the cache keeps the latents and encodes shuffled text anew."""
    metadata = write_list(tmp_path)
    rules = {"caption_prefix": "film of", "trigger_word": "ohwx", "caption_shuffle_tags": True}
    steps = {**RUN, **rules, "max_train_steps": 2, "dump_steps": [1, 2]}

    def train(name: str, **changes: object) -> runs.Outcome:
        outcome = runs.train(runs.wan_flags(model, metadata, tmp_path / name, **{**steps, **changes}))
        assert outcome.code == 0, outcome.stderr
        return outcome

    plain = train("plain")
    assert "1 row has no caption and is trained with the caption 'ohwx, film of': row 1" in plain.stdout
    assert "1 row has several captions (up to 2)" in plain.stdout
    captions = [caption for step in (1, 2) for caption in plain.dump(step).captions]
    assert captions and all("ohwx" in caption and "film of" in caption for caption in captions)
    filled = train("cached", latent_cache=tmp_path / "cache", dump_steps=None, cache_only=True)
    cached = train("cached", latent_cache=tmp_path / "cache", dump_steps=None)
    assert "--caption_shuffle_tags: prompt_embeds are not cached" in filled.stdout
    assert "to encode" in filled.stdout and "to encode" not in cached.stdout
    assert cached.losses == plain.losses


def test_each_caption_of_a_list_is_cached(model: Path, tmp_path: Path) -> None:
    metadata = write_list(tmp_path)
    flags = {**RUN, "num_train_epochs": 6, "cache_variants": 1, "latent_cache": tmp_path / "cache"}
    only = runs.train(runs.wan_flags(model, metadata, tmp_path / "run", **flags, cache_only=True))
    assert only.code == 0, only.stderr
    trained = runs.train(runs.wan_flags(model, metadata, tmp_path / "run", **flags, max_train_steps=6))
    assert trained.code == 0 and "; no encoder is needed for training" in trained.stdout, trained.stderr


@pytest.mark.parametrize("dry_run", [True, False])
def test_missing_captions_may_end_the_run(model: Path, tmp_path: Path, dry_run: bool) -> None:
    metadata = write_list(tmp_path)
    flags = runs.wan_flags(model, metadata, tmp_path / "run", **RUN, missing_caption="refuse", dry_run=dry_run)
    refused = runs.train(flags)
    assert refused.code == 3 and "1 row has no caption: row 1 (" in refused.stderr and not refused.metrics
