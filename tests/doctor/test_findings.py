"""Tests of videox.doctor.findings: the report names what blocks, with the fix, and shows no secrets."""

from __future__ import annotations

from videox.doctor.findings import BLOCKS, NOTE, Finding, from_error, mask, report, shown_variables
from videox.errors import UserError


def test_the_report_lists_what_blocks_with_the_fix() -> None:
    error = UserError("LOCAL_RANK=0", "is left over", "`unset LOCAL_RANK`")
    sections = {
        "system": [Finding("python", "3.11")],
        "variables": [from_error("variables", error), Finding("disk", "2 GiB free", NOTE, "free some space")],
    }
    lines = report(sections)
    begin = lines.index("what blocks a run")
    assert lines[begin + 1] == "  variables: LOCAL_RANK=0: is left over. Fix: `unset LOCAL_RANK`."
    assert lines[lines.index("what to know") + 1] == "  disk: 2 GiB free. Fix: free some space."
    assert lines[-1] == "1 blocking, 1 to know"
    assert any(line.split() == ["ok", "python", "3.11"] for line in lines)
    assert any(line.startswith(f"  {BLOCKS}") for line in lines)


def test_secrets_and_the_home_folder_are_not_shown() -> None:
    shown = shown_variables({
        "HF_TOKEN": "hf_abc", "NCCL_DEBUG": "INFO", "WANDB_API_KEY": "k", "AWS_SECRET_ACCESS_KEY": "s", "MY_NAME": "x",
        "HF_ENDPOINT": "https://me:secret@mirror.example/hub", "RANK": "0", "ACCELERATE_AUTH": "y",
    })  # fmt: skip
    assert shown == {
        "HF_TOKEN": "(set)", "NCCL_DEBUG": "INFO", "HF_ENDPOINT": "https://***@mirror.example/hub", "RANK": "0",
        "ACCELERATE_AUTH": "(set)",
    }  # fmt: skip
    assert mask("in /home/me/clips: /home/me, /home/me-too", "/home/me") == "in ~/clips: ~, /home/me-too"
    assert mask("a\nb\x1b[0m", "/home/me") == "a b [0m"
