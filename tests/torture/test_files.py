"""Fast parts of the areas that damage files, and of the program that runs all areas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from tests.torture.attempts import read_cases, try_area
from tests.torture.bad_media import KINDS
from tests.torture.cases import Area
from tests.torture.configs import MUTANTS, Configs
from tests.torture.media import FORMATS, Media
from tests.torture.media_kinds import MediaKinds
from tests.torture.metadata import FILES, MetadataFiles

program = tiny.load_script("benchmarks/torture.py")


@pytest.mark.parametrize(
    ("kind", "seeds", "files"),
    [
        (MetadataFiles, range(4), FILES),
        (Media, (0,), len(FORMATS)),
        (MediaKinds, (0,), len(KINDS)),
        (Configs, (0,), MUTANTS),
        pytest.param(MetadataFiles, range(4, 100), FILES, marks=pytest.mark.slow),
        pytest.param(Media, range(1, 9), len(FORMATS), marks=pytest.mark.slow),
        pytest.param(Configs, range(1, 90), MUTANTS, marks=pytest.mark.slow),
    ],
)
def test_damaged_files_are_read_or_named(kind: type[Area], seeds: range, files: int, tmp_path: Path) -> None:
    area = kind(tmp_path)
    for seed in seeds:
        found = area.try_case(seed)
        assert (found.tried, list(found.problems)) == (files, []), (seed, found)


def test_a_bad_file_of_another_class_is_wrong(tmp_path: Path) -> None:
    found = MediaKinds(tmp_path, broken=True).try_case(0)
    assert any(line.startswith("cut.mp4: truncated instead of") for line in found.problems), found


def test_an_unguarded_reader_is_wrong(tmp_path: Path) -> None:
    assert MetadataFiles(tmp_path, broken=True).try_case(0).problems


def test_a_configuration_that_is_read_without_care_is_wrong(tmp_path: Path) -> None:
    area = Configs(tmp_path, broken=True)
    assert any("JSONDecodeError" in line for line in area.try_case(0).problems)


def test_a_row_that_is_swapped_in_silence_is_wrong(tmp_path: Path) -> None:
    found = Media(tmp_path, broken=True).try_case(0)
    assert any("another row came in its place" in line for line in found.problems), found


# ----------------------------------------------------------------------------------------------------- the program


def test_cases_depend_on_their_seed_alone(tmp_path: Path) -> None:
    broken = MetadataFiles(tmp_path, broken=True)
    assert broken.try_case(3) == broken.try_case(3) != broken.try_case(4)


def test_an_area_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(program, "EARLIER", tmp_path / "torture.csv")
    short = ["--areas", "metadata", "--seconds", "0"]
    assert program.main([*short, "--output", str(tmp_path / "table.md")]) == 0
    (tmp_path / "results" / "metadata.jsonl").open("a").write('{"area": "metadata", "se')  # a kill cut this line off
    assert program.main([*short, "--continue"]) == 0
    cases = read_cases(tmp_path / "results", "metadata")
    assert [case["seed"] for case in cases] == [0, 1]
    assert f"| 200,000 | {FILES} | {FILES} | 0 |" in (tmp_path / "table.md").read_text()
    assert f"| 200,000 | {2 * FILES} | {2 * FILES} | 0 |" in capsys.readouterr().out
    assert program.main(short) == 0  # begins anew and keeps the earlier file
    assert [case["seed"] for case in read_cases(tmp_path / "results", "metadata")] == [0]
    assert read_cases(tmp_path / "results", "metadata-superseded") == cases


def test_kept_counts_are_added_up_and_their_seeds_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    results, earlier = tmp_path / "results", tmp_path / "torture.csv"
    monkeypatch.setattr(program, "RESULTS", results)
    monkeypatch.setattr(program, "EARLIER", earlier)
    (first,) = try_area("metadata", 0, results, first=7, broken=True)
    wrong = len(first["problems"])
    assert program.main(["--keep", "--note", "mended"]) == 0
    assert not (results / "metadata.jsonl").exists()
    assert program.main(["--areas", "metadata", "--seconds", "0", "--processes", "2", "--continue"]) == 0
    assert sorted(case["seed"] for case in read_cases(results, "metadata")) == [8, 9]
    text = capsys.readouterr().out
    assert f"| 200,000 | {3 * FILES} | {3 * FILES - wrong} | {wrong} |" in text
    assert f"metadata: any: {wrong} of {FILES}: mended" in text
    assert program.main(["--keep"]) == 0
    kept = [(line["tried"], line["wrong"], line["next_seed"]) for line in program.read_earlier(earlier)]
    assert kept == [(str(FILES), str(wrong), "8"), (str(2 * FILES), "0", "10")]


def test_a_wrong_case_is_printed_with_its_seed_and_counted(tmp_path: Path, capsys) -> None:
    (found,) = try_area("metadata", 0, tmp_path, first=7, broken=True)
    assert "wrong: --only metadata:7 (" in capsys.readouterr().out
    wrong = len(found["problems"])
    assert 0 < wrong <= FILES
    text = program.page(tmp_path, earlier_file=tmp_path / "torture.csv")
    assert f"| 200,000 | {FILES} | {FILES - wrong} | {wrong} |" in text
    assert "- `--only metadata:7`" in text


def test_one_case_is_tried_alone(capsys) -> None:
    assert program.main(["--only", "metadata:5"]) == 0
    case = json.loads(capsys.readouterr().out)
    assert (case["seed"], case["tried"], case["problems"]) == (5, FILES, [])
