"""Tests of videox.training.prompts: kohya's options of a prompt, files of prompts, and what is wrong with them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from videox.errors import FLAGS, UserError
from videox.training.prompts import OPTIONS, SamplePrompt, parse_line, read_prompts


def given_by(prompt: SamplePrompt) -> dict[str, object]:
    """Return the prompt's text and the options that it has."""
    return {name: value for name, value in asdict(prompt).items() if value is not None and name != "place"}


CAT = "A cat walks on the grass, realistic style."
# Lines in the form of musubi-tuner's page on sampling during training, and what its options mean there.
LINES = [
    (f"{CAT} --w 640 --h 480 --f 25 --d 1 --s 20", dict(text=CAT, width=640, height=480, frames=25, seed=1, steps=20)),
    ("A dog runs --w 960 --h 544 --f 1 --d 2 --s 20",
     dict(text="A dog runs", width=960, height=544, frames=1, seed=2, steps=20)),
    ("a cat", dict(text="a cat")),
    ("a cat --w 256", dict(text="a cat", width=256)),
    ("a cat --h 256", dict(text="a cat", height=256)),
    ("a cat --f 81", dict(text="a cat", frames=81)),
    ("a cat --d 0", dict(text="a cat", seed=0)),
    ("a cat --d 18446744073", dict(text="a cat", seed=18446744073)),
    ("a cat --s 1", dict(text="a cat", steps=1)),
    ("a cat --s 1000", dict(text="a cat", steps=1000)),
    ("a cat --g 6.0", dict(text="a cat", guidance=6.0)),
    ("a cat --g 1", dict(text="a cat", guidance=1.0)),
    ("a cat --g .5", dict(text="a cat", guidance=0.5)),
    ("a cat --l 5", dict(text="a cat", cfg=5.0)),
    ("a cat --l 6.0 --g 1.0", dict(text="a cat", cfg=6.0, guidance=1.0)),
    ("a cat --fs 14.5", dict(text="a cat", flow_shift=14.5)),
    ("a cat --fs 7.0 --s 50", dict(text="a cat", flow_shift=7.0, steps=50)),
    ("a cat --i path/to/image.png", dict(text="a cat", image=Path("path/to/image.png"))),
    ("a cat --i my pictures/a cat.jpg --s 4", dict(text="a cat", image=Path("my pictures/a cat.jpg"), steps=4)),
    ("a cat --n blurry, low quality", dict(text="a cat", negative="blurry, low quality")),
    ("a cat --n blurry --w 64", dict(text="a cat", negative="blurry", width=64)),
    ("a cat --n", dict(text="a cat", negative="")),
    ("a cat --w 832 --w 480", dict(text="a cat", width=480)),
    ("a cat --W 640 --H 480 --FS 3", dict(text="a cat", width=640, height=480, flow_shift=3.0)),
    ("a cat  --w   640   --h 480  ", dict(text="a cat", width=640, height=480)),
    ("a cat\t--w 640\t--h 480", dict(text="a cat", width=640, height=480)),
    ("a cat --w=640 --h = 480", dict(text="a cat", width=640, height=480)),
    ("a cat --fps 24", dict(text="a cat", fps=24.0)),
    ("a cat --fps 23.976 --f 17", dict(text="a cat", fps=23.976, frames=17)),
    ("a well-known cat - really - -- yes", dict(text="a well-known cat - really - -- yes")),
    ("a cat--w 640", dict(text="a cat--w 640")),
    ("--w 640", dict(text="--w 640")),
    ("--a dog runs", dict(text="--a dog runs")),
    ("a cat says \"--5 degrees\"", dict(text='a cat says "--5 degrees"')),
    ("a cat at f/2.8, 50 % grey #1 --d 7", dict(text="a cat at f/2.8, 50 % grey #1", seed=7)),
    ("猫が草の上を歩く --w 640", dict(text="猫が草の上を歩く", width=640)),
    ("", dict(text="")),
    (" --w 640", dict(text="", width=640)),
    ("a cat --width 640 --height 480 --frames 9", dict(text="a cat", width=640, height=480, frames=9)),
    ("a cat --negative blurry --seed 3 --steps 5 --cfg 2 --guidance 4 --flow_shift 8 --image a.png",
     dict(text="a cat", negative="blurry", seed=3, steps=5, cfg=2.0, guidance=4.0, flow_shift=8.0, image=Path("a.png"))),
    ("a cat --n it's not a dog - no --d 1", dict(text="a cat", negative="it's not a dog - no", seed=1)),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
def test_a_line_is_read_as_musubi_tuner_describes_it(line: str, expected: dict[str, object]) -> None:
    assert given_by(parse_line(line, "here")) == expected


def refusal(*given: str) -> UserError:
    with pytest.raises(UserError) as raised:
        read_prompts(given)
    assert raised.value.exit_code == FLAGS and "\n" not in raised.value.line()
    return raised.value


@pytest.mark.parametrize(
    ("option", "what", "hint"),
    [
        ("--step 5", "--step is not an option of a prompt", "did you mean --steps"),
        ("--weight 5", "--weight is not an option of a prompt", "did you mean --height"),
        ("--guidence 5", "--guidence is not an option", "did you mean --guidance"),
        ("--x 5", "--x is not an option", "use --w, --h, --f, --fps, --d, --s, --g, --l, --fs, --n, --i"),
        ("--ci a.png", "--ci is a control image, which the models here do not take", "remove it"),
        ("--cn a.mp4", "--cn is a control video", "remove it"),
        ("--ss euler", "--ss is another sampler", "remove it"),
        ("--w wide", "--w: 'wide' is not a whole number", "write, for example, --w 832"),
        ("--w", "--w: '' is not a whole number", "--w 832"),
        ("--w 640.5", "--w: '640.5' is not a whole number", "--w 832"),
        ("--w 8", "--w: 8 is outside 16 to 8192", "--w 832"),
        ("--d -1", "--d: -1 is outside 0 to", "--d 42"),
        ("--s 0", "--s: 0 is outside 1 to 1000", "--s 30"),
        ("--g nan", "--g: nan is outside 0 to 100", "--g 5"),
        ("--fs 0", "--fs: 0 is outside 0.001 to 999", "--fs 5"),
        ("--l much", "--l: 'much' is not a number", "--l 5"),
        ("--i", "--i: a path is missing", "--i fox.png"),
    ],
)
def test_a_wrong_option_is_one_line_with_a_fix(option: str, what: str, hint: str) -> None:
    error = refusal("a dog", f"a cat {option}")
    assert error.where == "--validation_prompts, prompt 1"
    assert error.what.startswith(what) and hint in error.hint


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    (tmp_path / "fox.png").touch()
    path.write_bytes("\ufeff# cats\n\n  a cat --w 640\r\na fox --i fox.png\n#a dog\n".encode())
    found = read_prompts(["before --d 1", str(path), "after"])
    assert [(p.text, p.width, p.seed, p.image) for p in found] == [
        ("before", None, 1, None), ("a cat", 640, None, None), ("a fox", None, None, tmp_path / "fox.png"),
        ("after", None, None, None),
    ]  # fmt: skip
    path.write_text("a cat\n\na dog --q 1\n", encoding="utf-8")
    assert refusal(str(path)).where == f"{path}, line 3"


SAME = [
    {"prompt": "a cat", "width": 640, "seed": 1, "negative": "blurry", "fps": 8},
    "a fox --w 320 --fps 8",
]
EQUAL = {
    "list.yaml": SAME,
    "defaults.yml": {"fps": 8, "width": 640, "prompts": [{"prompt": "a cat --d 1 --n blurry"}, {"prompt": "a fox", "width": 320}]},
    "list.json": SAME,
    "keys.json": [
        {"prompt": "a cat", "width": 640, "seed": 1, "negative_prompt": "blurry", "frame_rate": 8, "cfg_scale": None},
        {"prompt": "a fox", "width": 320, "fps": 8.0},
    ],
}  # fmt: skip
TOML = """
[prompt]
width = 640
fps = 8
[[prompt.subset]]
prompt = "a cat"
negative_prompt = "blurry"
seed = 1
[[prompt.subset]]
prompt = "a fox"
width = 320
"""


@pytest.mark.parametrize("name", [*EQUAL, "kohya.toml"])
def test_yaml_json_and_toml_have_the_same_options(tmp_path: Path, name: str) -> None:
    path, content = tmp_path / name, EQUAL.get(name)
    text = TOML if content is None else json.dumps(content) if name.endswith("json") else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8")
    assert [given_by(prompt) for prompt in read_prompts([str(path)])] == [
        dict(text="a cat", width=640, seed=1, negative="blurry", fps=8.0), dict(text="a fox", width=320, fps=8.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- prompt: a cat\n  widht: 640\n", ("prompt 0", "widht is not an option of a prompt", "did you mean width")),
        ("- prompt: a cat\n  width: [640]\n", ("prompt 0", "width is [640]", "write a number")),
        ("- prompt: a cat\n  width: yes\n", ("prompt 0", "width is True", "write a number")),
        ("- {a: b}\n", ("prompt 0", "is not a prompt", "with the key prompt")),
        ("- 5\n", ("prompt 0", "'5' is not a prompt", "in quotes")),
        ("a cat\n", ("has str in place of a list", "write a list")),
        ("", ("has NoneType in place of a list",)),
        ("[]", ("has no prompts", "one prompt a line")),
        ("{a: [", ("cannot be parsed", "write a list")),
    ],
)
def test_a_wrong_yaml_is_one_line(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    line = refusal(str(path)).line()
    assert str(path) in line and all(word in line for word in words), line


def test_files_are_told_from_prompts(tmp_path: Path) -> None:
    sentence = "a sign that reads prompts.txt"
    assert [p.text for p in read_prompts([sentence, "a" * 5000 + ".txt"])] == [sentence, "a" * 5000 + ".txt"]
    error = refusal("missing.txt")
    assert error.where == "--validation_prompts" and error.what == "missing.txt does not exist"
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("# nothing\n", encoding="utf-8")
    assert "has no prompts" in refusal(str(empty)).what
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(str(binary)).what


def test_each_option_has_one_meaning() -> None:
    names = [name for option in OPTIONS for name in (*option.names, *option.keys)]
    assert len(names) == len({*names})
    assert {option.field for option in OPTIONS} == set(asdict(SamplePrompt("", ""))) - {"text", "place"}
