"""Tests of videox.data.index.importers: dataset configurations of other tools, and our own."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from videox.data.index.importers.config_file import read_config
from videox.data.index.importers.entry import Imported
from videox.data.index.sources import CaptionEdits, Source
from videox.errors import DATA, UserError
from videox.training.flags import make_parser

ROOT = Path(__file__).resolve().parents[3]
# key -> (what is done with it, meaning), by tool; collected from the tools' own pages and sources.
FACTS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/data/dataset_keys.json").read_text(encoding="utf-8"))
FOLDER_KEY = {
    "musubi-tuner": "video_directory", "diffusion-pipe": "path", "SimpleTuner": "instance_data_dir",
    "ai-toolkit": "folder_path", "sd-scripts": "image_dir",
}  # fmt: skip
# Values other than the default of keys that are obeyed, each with the part of the source that they change.
OBEYED = {
    "caption_extension": (".cap", {"rules"}), "caption_ext": ("cap", {"rules"}), "caption_type": ("cap", {"rules"}),
    "num_repeats": (4, {"weight"}), "repeats": (3, {"weight"}), "caption_prefix": ("x, ", {"captions"}),
    "caption_suffix": ("y", {"captions"}), "class_tokens": ("z", {"captions"}), "default_caption": ("z", {"captions"}),
    "num_frames": (17, {"rules"}), "caption_strategy": ("textfile", {"captions"}), "dataset_type": ("video", {"rules"}),
    "instance_prompt": ("p", set()), "id": ("name", set()), "type": ("local", set()),
}  # fmt: skip
# Of a kind that each key accepts; all others are 1.
VALUES = {
    "resolutions": [512], "frame_buckets": [1, 33], "size_buckets": [[512, 512, 33]], "ar_buckets": [1.0],
    "target_frames": [1, 25, 45], "video": {"num_frames": 125}, "resolution": [960, 544],
    "frame_extraction": "chunk", "trigger_word": "ohwx", "enable_wildcard": True, "resolution_type": "area",
}  # fmt: skip


def toml_of(value: Any) -> str:
    """Return a value as TOML; JSON's notation is the same for these types."""
    return json.dumps(value)


def write_config(folder: Path, tool: str, *entries: dict[str, Any], shared: dict[str, Any] | None = None) -> Path:
    """Write a configuration of a tool with one section per entry."""
    shared = shared or {}
    if tool == "SimpleTuner":
        path = folder / "multidatabackend.json"
        path.write_text(json.dumps(list(entries)), encoding="utf-8")
        return path
    if tool in ("ai-toolkit", "ours"):
        path = folder / "config.yaml"
        job = {"job": "extension", "config": {"process": [{"type": "sd_trainer", "datasets": list(entries)}]}}
        ours = {"sources": list(entries), **({"defaults": shared} if shared else {})}
        path.write_text(json.dumps(ours if tool == "ours" else job), encoding="utf-8")  # JSON is yaml
        return path
    header = {"musubi-tuner": "[[datasets]]", "diffusion-pipe": "[[directory]]", "sd-scripts": "[[datasets.subsets]]"}
    lines = [] if tool == "diffusion-pipe" else ["[general]"]
    lines += [f"{key} = {toml_of(value)}" for key, value in shared.items()]
    lines += ["[[datasets]]"] if tool == "sd-scripts" else []
    for entry in entries:
        lines += [header[tool], *(f"{key} = {toml_of(value)}" for key, value in entry.items())]
    path = folder / "dataset.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read(folder: Path, tool: str, **values: Any) -> Imported:
    """Read a configuration of one entry with the folder `clips` and these values."""
    (folder / "clips").mkdir(exist_ok=True)
    base = {FOLDER_KEY[tool]: str(folder / "clips")}
    return read_config(write_config(folder, tool, {**base, **values}))


def report(found: Imported) -> str:
    return "\n".join(found.lines(Path("config")))


# --------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("tool", FACTS)
def test_every_documented_key_is_handled_as_stated(tmp_path: Path, tool: str) -> None:
    plain = read(tmp_path, tool)
    for key, (handling, meaning) in FACTS[tool]["keys"].items():
        assert meaning, key
        if handling == "refused":
            with pytest.raises(UserError) as error:
                read(tmp_path, tool, **{key: "something"})
            assert error.value.exit_code == DATA and f"key {key}" in error.value.where and error.value.hint
            off = read(tmp_path, tool, **{key: False})  # as written by tools that write all of their defaults
            assert off.sources == plain.sources and not off.unknown, key
        elif handling == "obeyed":
            value, changed = OBEYED.get(key, (None, set()))
            if value is not None:
                found = read(tmp_path, tool, **{key: value})
                before, after = plain.sources[0], found.sources[0]
                assert {name for name in vars(before) if getattr(before, name) != getattr(after, name)} == changed, key
                assert not found.unknown and key not in found.unused
        else:
            found = read(tmp_path, tool, **{key: VALUES.get(key, 1)})
            # enable_wildcard also decides how captions are read
            assert found.sources[0] == plain.sources[0] or key == "enable_wildcard", key
            assert not found.unknown
            assert (key in found.unused) == (handling == "unused"), key
            assert (f"{key} = " in found.shown[0][1]) == (handling == "shown"), key


def test_every_printed_flag_exists(tmp_path: Path) -> None:
    flags = set(make_parser(None, modes=("normal",), recipes=tmp_path)._option_string_actions)
    for tool in FACTS:
        shown = {key: VALUES.get(key, 1) for key, facts in FACTS[tool]["keys"].items() if facts[0] == "shown"}
        for changes in ({}, {"frame_extraction": "full"}, {"frame_extraction": "slide"}, {"enable_bucket": False}):
            changes = {key: value for key, value in changes.items() if key in shown}
            extra = {"ai-toolkit": {"num_frames": 81}, "SimpleTuner": {"dataset_type": "video"}}.get(tool, {})
            found = read(tmp_path, tool, **{**shown, **changes, **extra})
            words = [word for word in found.shown[0][2].split() if word.startswith("--")]
            assert words and not set(words) - flags


@pytest.mark.parametrize(
    ("tool", "values", "flags"),
    [
        ("musubi-tuner", {}, "--fix_sample_size 544 960"),
        ("musubi-tuner", {"resolution": [960, 544], "enable_bucket": True}, "--video_sample_size 723"),
        ("musubi-tuner", {"target_frames": [1, 25, 46]}, "--video_sample_n_frames 45"),
        ("musubi-tuner", {"frame_extraction": "uniform", "frame_sample": 4},
         "--clip_sampling uniform --clips_per_video 4"),
        ("musubi-tuner", {"source_fps": 30.0}, "--video_sample_fps 16 (Wan2.1) or 24 (HunyuanVideo)"),
        ("musubi-tuner", {}, "--video_sample_stride 1"),
        ("diffusion-pipe", {"resolutions": [512, [1280, 720]], "frame_buckets": [1, 33, 65]},
         "--video_sample_size 960 --image_sample_size 960 --video_sample_n_frames 65"),
        ("SimpleTuner", {"resolution": 1.0, "resolution_type": "area"}, "--image_sample_size 1000"),
        ("ai-toolkit", {"resolution": [512, 768], "num_frames": 81}, "--video_sample_size 768"),
        ("ai-toolkit", {"num_frames": 41, "shrink_video_to_frames": False, "fps": 24}, "--video_sample_fps 24"),
        ("sd-scripts", {"resolution": 768, "batch_size": 4}, "--train_batch_size 4"),
    ],
)  # fmt: skip
def test_the_nearest_flags_are_printed(tmp_path: Path, tool: str, values: dict[str, Any], flags: str) -> None:
    assert flags in report(read(tmp_path, tool, **values))


@pytest.mark.parametrize("tool", FACTS)
def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path, tool: str) -> None:
    key = "num_repeats" if "num_repeats" in FACTS[tool]["keys"] else "caption_strategy"
    text = report(read(tmp_path, tool, **{key[:-1]: 3, "of_next_year": 1}))
    assert f"{key[:-1]} (did you mean {key})" in text and "of_next_year" in text


# ------------------------------------------------------------------------------------------------------------- formats


def test_settings_of_outer_sections_are_defaults(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for tool in ("musubi-tuner", "sd-scripts", "diffusion-pipe"):
        entry = {FOLDER_KEY[tool]: str(tmp_path / "clips")}
        path = write_config(tmp_path, tool, entry, {**entry, "num_repeats": 2}, shared={"num_repeats": 5})
        assert [source.weight for source in read_config(path).sources] == [5, 2], tool


def test_captions_are_read_as_each_tool_does(tmp_path: Path) -> None:
    (source,) = read(tmp_path, "sd-scripts", caption_prefix="a", caption_suffix="b", class_tokens="c").sources
    assert source.captions == CaptionEdits(first_line=True, missing="c", prefix="a ", suffix=" b")
    assert source.rules.caption_suffixes == (".caption",) and not source.rules.recursive
    (source,) = read(tmp_path, "diffusion-pipe", caption_prefix="a").sources
    assert source.captions == CaptionEdits(prefix="a") and source.rules.caption_suffixes == (".txt",)
    prompt = {"instance_prompt": "p", "caption_strategy": "textfile"}
    (source,) = read(tmp_path, "SimpleTuner", **prompt, prepend_instance_prompt=True).sources
    assert source.captions == CaptionEdits(prefix="p ") and source.rules.recursive
    (source,) = read(tmp_path, "SimpleTuner", **prompt, only_instance_prompt=True).sources
    assert source.captions == CaptionEdits(fixed="p")
    (source,) = read(tmp_path, "SimpleTuner").sources
    assert source.captions == CaptionEdits(from_name=True) and source.weight == 1
    (source,) = read(tmp_path, "ai-toolkit", num_frames=17).sources
    assert source.rules.kind == "video" and source.rules.recursive


def test_entries_without_samples_are_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    entries = [
        {"id": "off", "disabled": True, "instance_data_dir": "gone"},
        {"id": "clips", "dataset_type": "video", "instance_data_dir": "clips", "caption_strategy": "textfile"},
        {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache"},
    ]
    found = read_config(write_config(tmp_path, "SimpleTuner", *entries))
    assert [source.metadata_path for source in found.sources] == [tmp_path / "clips"]
    assert "entry 1 ('off') is disabled" in report(found) and "text_embeds: it has no samples" in report(found)


def test_a_musubi_list_may_be_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists").mkdir()
    listed = tmp_path / "lists" / "list.jsonl"
    listed.write_text('{"video_path": "clips/a.mp4", "caption": "a"}\n', encoding="utf-8")
    config = write_config(tmp_path, "musubi-tuner", {"video_jsonl_file": str(listed)})
    assert read_config(config).sources == [Source(listed, listed.parent, allow_absolute=True)]
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").touch()
    monkeypatch.chdir(tmp_path)
    assert read_config(config).sources == [Source(listed, tmp_path, allow_absolute=True)]


def test_our_own_yaml(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/a.jsonl").touch()
    (tmp_path / "data.yaml").write_text(
        "defaults:\n  caption_prefix: 'film, '\n"
        "sources:\n  - clips\n"
        "  - path: lists/a.jsonl\n    data_dir: clips\n    repeats: 0.5\n    caption_prefix: ''\n"
        "  - {path: clips, caption_extension: caption, only: videos, recursive: false}\n"
    )
    one, two, three = read_config(tmp_path / "data.yaml").sources
    clips = tmp_path / "clips"
    assert one == Source(clips, clips, captions=CaptionEdits(prefix="film, "), allow_absolute=True)
    assert two == Source(tmp_path / "lists/a.jsonl", clips, weight=0.5)
    assert (three.rules.caption_suffixes, three.rules.kind, three.rules.recursive) == ((".caption",), "video", False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "sources:\n  - {path: clips, repeat: 2}", "repeat (did you mean repeats)"),
        ("a.yaml", "sources:\n  - {path: gone}", "there is no "),
        ("a.yaml", "sources:\n  - {path: clips, repeats: many}", "'many' is not a number of at least 0"),
        ("a.yaml", "sources:\n  - {data_dir: clips}", "path is missing"),
        ("a.yaml", "sources: [", "not a valid yaml"),
        ("a.yaml", "sources: []", "without any data set"),
        ("a.toml", "[[datasets]]\nvideo_directory = clips", "not valid TOML"),
        ("a.toml", "[[datasets]]\nvido_directory = 'clips'", "vido_directory (did you mean video_directory)"),
        ("a.toml", "[[datasets]]\nvideo_directory = 'clips'\nimage_directory = 'clips'", "give exactly one"),
        ("a.toml", "[[datasets]]\nvideo_directory = 'clips'\nnum_repeats = '2'", "'2' is not a number"),
        ("a.toml", "dataset = 'dataset.toml'\n[model]\ntype = 'wan'", "pass its dataset file, dataset.toml"),
        ("a.json", '[{"id": "x", "type": "aws"}]', "'aws' is not a local folder"),
        ("a.json", '[{"caption_strategy": "parquet", "instance_data_dir": "clips"}]', "'parquet' is not one of"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "5", "is not a dataset configuration"),
        ("a.txt", "", "unknown suffix '.txt'"),
        ("a.toml", "[[datasets]]\n[[datasets.subsets]]\nclass_tokens = 'cat'", "key image_dir: is missing"),
        ("a.toml", "[[directory]]\nnum_repeats = 2", "key path: is missing"),
        ("a.json", '[{"id": "x", "caption_strategy": "textfile"}]', "key instance_data_dir: is missing"),
        ("a.yaml", "datasets: [{folder_path: clips}, {caption_ext: txt}]", "key folder_path: is missing"),
        ("a.toml", "[[datasets]]\nvideo_directory = 'D:\\clips'", "a path on a drive of Windows"),
        ("a.toml", '[[datasets]]\nvideo_directory = "my\\clips"', "write / in place of"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_config(tmp_path / name)
    assert message in str(error.value) and name in error.value.where


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_configurations_written_on_windows_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "my/clips").mkdir(parents=True)
    text = "[[datasets]]\r\nvideo_directory = 'my\\clips'\r\n"
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "dataset.toml").write_bytes(mark + text.encode(encoding))
    assert [source.data_dir for source in read_config(tmp_path / "dataset.toml").sources] == [tmp_path / "my/clips"]


def test_captions_in_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/captions.json").write_text("{}")
    with pytest.raises(UserError, match=r"captions\.json, which is not read"):
        read(tmp_path, "diffusion-pipe")
    with pytest.raises(UserError, match="is a file of captions"):
        read_config(write_config(tmp_path, "ai-toolkit", {"dataset_path": str(tmp_path / "clips/captions.json")}))


def test_the_page_has_every_key() -> None:
    page = (ROOT / "docs/dataset_config.md").read_text(encoding="utf-8")
    keys = {key for tool in FACTS.values() for key in tool["keys"]}
    assert not [key for key in keys if f"`{key}`" not in page]
