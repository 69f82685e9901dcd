"""Tests of videox.distributed.cuda_variables: defaults of the variables that CUDA reads when it starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import tiny

from videox.distributed.cuda_variables import ALLOCATOR, ALLOCATOR_NAMES, CUBLAS, set_cuda_variables
from videox.errors import UserError


def test_segments_are_expandable_by_default() -> None:
    variables: dict[str, str] = {}
    set_cuda_variables(variables, deterministic=False)
    assert variables == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    set_cuda_variables(variables, deterministic=False)
    assert variables == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ALLOCATOR_NAMES)
def test_the_users_allocator_settings_stay(name: str) -> None:
    variables = {name: "max_split_size_mb:512"}
    set_cuda_variables(variables, deterministic=False)
    assert variables == {name: "max_split_size_mb:512"}


def test_a_deterministic_run_sets_the_workspace_of_cublas() -> None:
    for before, after in (({}, ":4096:8"), ({CUBLAS: ":16:8"}, ":16:8")):
        variables = dict(before)
        set_cuda_variables(variables, deterministic=True)
        assert variables[CUBLAS] == after
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG: ':0:0'.*unset it, or set it to :4096:8 or :16:8"):
        set_cuda_variables({CUBLAS: ":0:0"}, deterministic=True)


PROBE = """
import os, sys, runpy
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch._C":  # torch itself is looked up before, and not imported
            print(name, *(os.environ.get(each) for each in {names}))
            sys.exit(0)
sys.meta_path.insert(0, Watch())
sys.argv = ["train.py", "--pretrained_model_name_or_path=m", "--train_data_meta=m.json", "--deterministic"]
runpy.run_path("{script}", run_name="__main__")
"""


@pytest.mark.parametrize("script", ["scripts/wan2.1/train.py", "scripts/hunyuanvideo/train.py"])
def test_they_are_set_before_torch_is_imported(script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (*ALLOCATOR_NAMES, CUBLAS)}
    code = PROBE.format(names=(ALLOCATOR, CUBLAS), script=script)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["torch._C", "expandable_segments:True", ":4096:8"], done.stderr
