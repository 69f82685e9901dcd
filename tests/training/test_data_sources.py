"""Tests of videox.training.data_sources: the data of a run from its flags, and runs over several sources."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import tiny

from videox.data.index.index import Index, build_index
from videox.data.plan.plan import plan_epoch
from videox.data.plan.settings import columns_of
from videox.errors import FLAGS, MODEL, UserError
from videox.estimate.report import plan_records
from videox.tracking.jsonl import read_lines
from videox.training.args import check_args
from videox.training.data_sources import sources_of
from videox.training.flags import make_parser
from videox.training.planning import data_location, index_path, plan_settings
from videox.training.schedule import name_of_flags

CLIPS = (("a.mp4", 64, 48, 21, 24.0), ("b.mp4", 48, 64, 9, 24.0), ("c.mp4", 48, 48, 13, 24.0))
QUICK = {
    "mixed_precision": "no", "gradient_checkpointing": None, "tokenizer_max_length": 16, "checkpointing_steps": 2,
    "max_train_steps": 2, "train_data_dir": None,
}  # fmt: skip


def parse(folder: Path, **flags: object) -> argparse.Namespace:
    (folder / "model").mkdir(exist_ok=True)
    shapes = {"video_sample_size": 64, "video_sample_n_frames": 9, "video_sample_stride": 1, "enable_bucket": True}
    base = {"pretrained_model_name_or_path": folder / "model", "output_dir": folder / "out", "train_batch_size": 1}
    args = make_parser(None, modes=("normal",), recipes=tiny.ROOT / "config/recipes/wan2.1").parse(
        runs.to_argv({**base, **shapes, **flags})
    )
    check_args(args)
    return args


def make_clips(folder: Path) -> Path:
    """Write a folder of clips with captions in .txt and .caption files."""
    for position, (name, width, height, frames, fps) in enumerate(CLIPS):
        tiny.write_clip(folder / name, frames, width, height, fps, seed=position)
        for suffix in (".txt", ".caption"):
            (folder / name).with_suffix(suffix).write_text(f"{tiny.CAPTIONS[position]}\n", encoding="utf-8")
    return folder


def configurations(folder: Path, clips: Path, repeats: int) -> dict[str, dict[str, Path]]:
    """Describe a folder of clips in seven ways; return the flag of each, by the name of the tool.

    The plain folder is left out if the clips are repeated, which it cannot state.
    """
    rows = [{"file_path": n, "text": tiny.CAPTIONS[i], "weight": repeats} for i, (n, *_) in enumerate(CLIPS)]
    files = {
        "ours/list.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows),
        "musubi/dataset.toml": "[general]\nresolution = [960, 544]\ncaption_extension = '.txt'\nenable_bucket = true\n"
        f"[[datasets]]\nvideo_directory = '{clips}'\ntarget_frames = [1, 25]\nnum_repeats = {repeats}\n",
        "diffusion-pipe/dataset.toml": "resolutions = [512]\nenable_ar_bucket = true\nframe_buckets = [1, 33]\n"
        f"[[directory]]\npath = '{clips}'\nnum_repeats = {repeats}\n",
        "SimpleTuner/multidatabackend.json": json.dumps(
            [
                {"id": "x", "type": "local", "dataset_type": "video", "instance_data_dir": str(clips),
                 "caption_strategy": "textfile", "repeats": repeats - 1, "video": {"num_frames": 125}},
                {"id": "text", "dataset_type": "text_embeds", "cache_dir": "cache"},
            ]
        ),
        "ai-toolkit/job.yaml": "job: extension\nconfig:\n  process:\n  - type: sd_trainer\n    datasets:\n"
        f"    - {{folder_path: '{clips}', caption_ext: txt, num_frames: 33, num_repeats: {repeats}}}\n",
        "kohya/dataset.toml": "[general]\ncaption_extension = '.caption'\n[[datasets]]\nresolution = 512\n"
        f"[[datasets.subsets]]\nimage_dir = '{clips}'\nnum_repeats = {repeats}\n",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    listed = {"train_data_meta": folder / "ours/list.jsonl", "train_data_dir": clips}
    ways: dict[str, dict[str, Path]] = {"folder": {"train_data_meta": clips}} if repeats == 1 else {}
    ways["ours"] = listed
    return ways | {name.split("/")[0]: {"dataset_config": folder / name} for name in files if "ours" not in name}


def content_of(index: Index, row: int) -> tuple[str, str]:
    """Return a row's caption, and the hash of its file."""
    return index.caption(row), hashlib.sha256(index.file(row).read_bytes()).hexdigest()


def hash_of_plan(lines: list[dict], index: Index) -> str:
    """Return sha256 of the lines of a plan, with caption and content in place of the row number."""
    named = [{**line, "row": content_of(index, line["row"])} for line in lines]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def planned(args: argparse.Namespace) -> tuple[str, str]:
    """Return the hashes of the plans of one and two processes."""
    index = build_index(data_location(args), workers=2, progress=False)
    columns, settings = columns_of(index, by_second=False), plan_settings(args, seed=7, slots=1)
    worlds = ((world, replace(settings, slots=world)) for world in (1, 2))
    one, two = (list(plan_records(plan_epoch(columns, changed, 0), world)) for world, changed in worlds)
    return hash_of_plan(one, index), hash_of_plan(two, index)


# --------------------------------------------------------------------------------------------------------------- flags


def test_one_value_is_stored_as_before(tmp_path: Path) -> None:
    make_folder = [tmp_path / name for name in ("one", "two")]
    for folder in make_folder:
        folder.mkdir()
    args = parse(tmp_path, train_data_meta=make_folder[0])
    assert args.train_data_meta == str(make_folder[0])
    location = data_location(args)
    assert location.sources == () and location.index_path == tmp_path / "one.videox-index.arrow"
    # A flag that older versions did not have is no part of a run's name at its default.
    asked = vars(args)
    without = {name: value for name, value in asked.items() if name != "dataset_config"}
    assert name_of_flags(asked) == name_of_flags(without)
    assert name_of_flags({**asked, "dataset_config": "x.yaml"}) != name_of_flags(without)


def test_several_lists_and_a_common_folder(tmp_path: Path) -> None:
    for name in ("data/one", "data/two"):
        (tmp_path / name).mkdir(parents=True)
    paths = [tmp_path / "data/one", tmp_path / "data/two"]
    args = parse(tmp_path, train_data_meta=paths)
    assert args.train_data_meta == [str(path) for path in paths]
    assert sources_of(args).data_dir == tmp_path / "data"
    location = data_location(args)
    assert [source.metadata_path for source in location.sources] == paths
    assert location.index_path == index_path(args) and location.index_path.parent == tmp_path / "data"
    other = index_path(parse(tmp_path, train_data_meta=[paths[1], paths[0]]))
    assert len({other.name, location.index_path.name, "one.videox-index.arrow"}) == 3
    both = parse(tmp_path, train_data_meta=paths, train_data_dir=tmp_path / "data")
    assert {source.data_dir for source in data_location(both).sources} == {tmp_path / "data"}


def test_a_folder_alone_may_be_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    location = data_location(parse(tmp_path, train_data_dir=tmp_path / "clips"))
    assert (location.metadata_path, location.data_dir) == (tmp_path / "clips", tmp_path / "clips")


@pytest.mark.parametrize("flag", ["train_data_meta", "train_data_dir"])
def test_a_configuration_names_all_data(tmp_path: Path, flag: str) -> None:
    with pytest.raises(UserError) as error:
        parse(tmp_path, dataset_config=tmp_path / "data.yaml", **{flag: tmp_path})
    assert error.value.exit_code == FLAGS and error.value.where == "--dataset_config"
    assert f"--{flag}" in error.value.what


def test_the_output_folder_may_not_contain_a_source(tmp_path: Path) -> None:
    (tmp_path / "out/clips").mkdir(parents=True)
    (tmp_path / "data.yaml").write_text("sources: [out/clips]")
    with pytest.raises(UserError) as error:
        parse(tmp_path, dataset_config=tmp_path / "data.yaml")
    assert error.value.where == "--output_dir" and "--dataset_config" in error.value.what


def test_a_configuration_of_one_plain_folder_shares_its_index(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "data.yaml").write_text("sources: [clips]")
    from_config = data_location(parse(tmp_path, dataset_config=tmp_path / "data.yaml"))
    assert from_config == data_location(parse(tmp_path, train_data_meta=tmp_path / "clips"))


# -------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("repeats", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_folder_described_in_seven_ways_has_one_plan(tmp_path: Path, repeats: int) -> None:
    clips = make_clips(tmp_path / "clips")
    ways = configurations(tmp_path, clips, repeats)
    assert len(ways) == (7 if repeats == 1 else 6)
    hashes = {name: planned(parse(tmp_path, **flags)) for name, flags in ways.items()}
    assert len(set(hashes.values())) == 1, hashes
    (tmp_path / "clips/a.txt").write_text("another caption", encoding="utf-8")
    assert planned(parse(tmp_path, **ways["musubi"])) != hashes["musubi"]  # the hash sees captions


@pytest.mark.slow
def test_dry_runs_of_seven_ways_write_one_plan(tmp_path: Path) -> None:
    model, clips = tiny.build_wan_t2v(tmp_path / "tiny"), make_clips(tmp_path / "clips")
    hashes = {}
    for name, flags in configurations(tmp_path, clips, 1).items():
        given = {**QUICK, "train_data_meta": None, **flags, "dry_run": True, "dry_run_plan": [1, 2]}
        outcome = runs.train(runs.wan_flags(model, clips, tmp_path / f"out-{name}", **given))
        assert outcome.code == 0, outcome.stderr
        index = build_index(data_location(parse(tmp_path, **flags)), workers=1, progress=False)
        lines = [read_lines(outcome.folder / f"plan-{world}.jsonl") for world in (1, 2)]
        hashes[name] = tuple(hash_of_plan(plan, index) for plan in lines)
        if "dataset_config" in flags:
            assert "not taken over: " in outcome.stdout and "nearest flags: --" in outcome.stdout
    assert len(hashes) == 7 and len(set(hashes.values())) == 1


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("model") / "tiny")


def two_sources(folder: Path) -> list[Path]:
    """Write two folders of clips with captions; return them."""
    places = []
    for position, (name, width, height, frames, fps) in enumerate(CLIPS[:2]):
        places.append(folder / f"source-{position}")
        tiny.write_clip(places[-1] / name, frames, width, height, fps, seed=position)
        (places[-1] / name).with_suffix(".txt").write_text(tiny.CAPTIONS[position], encoding="utf-8")
    return places


@pytest.mark.slow
def test_a_run_over_several_sources_resumes_with_the_same_ones_only(model: Path, tmp_path: Path) -> None:
    one, two = two_sources(tmp_path / "data")

    def train(steps: int, *sources: Path, resume: bool = True) -> runs.Outcome:
        changes = {**QUICK, "train_data_meta": sources, "max_train_steps": steps, "num_train_epochs": 9}
        changes |= {"resume_from_checkpoint": "latest"} if resume else {}
        return runs.train(runs.wan_flags(model, one, tmp_path / "run", **changes))

    first = train(2, one, two, resume=False)
    assert first.code == 0, first.stderr
    assert sorted(row for record in first.metrics for row in record["rows"]) == [0, 1]
    assert f"rows 1 to 1: {two}" in first.stdout
    three = shutil.copytree(two, tmp_path / "data/source-2")
    refused = train(4, one, three)
    assert refused.code == MODEL
    assert f"with its sources (no longer: {two}; new: {three})" in refused.stderr
    assert f"no longer: {two})" in train(4, one).stderr
    assert "the same ones in another order" in train(4, two, one).stderr
    (tmp_path / "data/data.yaml").write_text("sources: [source-0, {path: source-1, repeats: 2}]")
    heavier = {**QUICK, "train_data_meta": None, "dataset_config": tmp_path / "data/data.yaml"}
    changed = runs.train(runs.wan_flags(model, one, tmp_path / "run", **heavier, resume_from_checkpoint="latest"))
    assert changed.code == MODEL and f"new: {two} (repeats 2)" in changed.stderr
    (tmp_path / "data/data.yaml").write_text("sources: [source-0, source-1]")  # the same rows from another flag
    same = runs.train(
        runs.wan_flags(
            model, one, tmp_path / "run", **{**heavier, "max_train_steps": 3}, resume_from_checkpoint="latest"
        )
    )
    assert same.code == 0, same.stderr
    assert len(same.metrics) == 3


@pytest.mark.slow
def test_cache_and_explain_know_rows_of_every_source(model: Path, tmp_path: Path) -> None:
    sources = two_sources(tmp_path / "data")
    flags = {**QUICK, "train_data_meta": sources, "latent_cache": tmp_path / "cache"}
    losses = []
    for name in ("filled", "found"):
        outcome = runs.train(runs.wan_flags(model, sources[0], tmp_path / name, **flags))
        assert outcome.code == 0, outcome.stderr
        losses.append(outcome.losses)
    uncached = runs.train(runs.wan_flags(model, sources[0], tmp_path / "uncached", **{**flags, "latent_cache": None}))
    assert losses == [uncached.losses] * 2
    explained = runs.train(runs.wan_flags(model, sources[0], tmp_path / "explained", **flags, explain=1))
    assert explained.code == 0 and "source-1/b.mp4" in explained.stdout and tiny.CAPTIONS[1] in explained.stdout


@pytest.mark.slow
def test_two_processes_train_the_rows_of_one(model: Path, tmp_path: Path) -> None:
    sources = two_sources(tmp_path / "data")
    flags = {**QUICK, "train_data_meta": sources, "gradient_accumulation_steps": 2}
    one = runs.train(runs.wan_flags(model, sources[0], tmp_path / "one", **flags))
    assert one.code == 0, one.stderr
    words = runs.wan_flags(model, sources[0], tmp_path / "two", **{**flags, "gradient_accumulation_steps": 1})
    two = runs.launch(words, ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"])
    assert two.code == 0, two.stderr
    assert [sorted(record["rows"]) for record in two.metrics] == [sorted(record["rows"]) for record in one.metrics]
