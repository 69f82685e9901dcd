"""Serves who starts a training by one of the shell scripts: each one is run, on a small model, with one process."""

from __future__ import annotations

import os
import re
from pathlib import Path

import forkserver
import pytest
import runs
import tiny

SCRIPTS = sorted(path.relative_to(runs.ROOT).as_posix() for path in runs.ROOT.glob("scripts/*/train_*.sh"))
BUILD = {
    ("wan2.1", "normal"): tiny.build_wan_t2v,
    ("hunyuanvideo", "normal"): tiny.build_hunyuan_t2v,
    ("hunyuanvideo", "i2v"): tiny.build_hunyuan_i2v,
}
# What the published sizes are replaced by: flags given to a script come last, and win.
SMALL = {
    "image_sample_size": 64, "video_sample_size": 64, "token_sample_size": 64, "video_sample_n_frames": 13,
    "dataloader_num_workers": 0, "max_train_steps": 2, "lr_warmup_steps": 1, "report_to": "none",
}  # fmt: skip
MACHINES = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "1", "NUM_PROCESS": "1", "RANK": "0"}


def backend(script: str) -> str:
    """Returns the backend that a script's name promises, for one process."""
    recipe = re.search(r"zero2|zero3|fsdp|plain", Path(script).stem)[0]
    return {"fsdp": "fsdp1", "plain": "single"}.get(recipe, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_launch_script_trains(script: str, tmp_path: Path) -> None:
    family, mode = Path(script).parent.name, "i2v" if "_i2v" in script else "normal"
    model = BUILD[family, mode](tmp_path / "model")
    metadata = tiny.make_dataset(tmp_path / "data")
    names = {"MODEL_NAME": str(model), "DATASET_NAME": str(metadata.parent), "DATASET_META_NAME": str(metadata)}
    folder = tmp_path / "run"
    # without a GPU to count, the launcher takes the number of processes from accelerate's own configuration
    config = tmp_path / "home" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\n")
    flags = runs.words({**SMALL, "output_dir": folder})
    machines = MACHINES if "_machines" in script else {}
    found = runs.run_command(["bash", script, *flags], folder, HF_HOME=str(tmp_path / "home"), **names, **machines)
    assert found.code == 0, found.stdout[-1000:] + found.stderr[-5000:]
    assert f"backend     {backend(script)} (" in found.stdout
    assert [line["step"] for line in forkserver.steps(folder)] == [1, 2]
    assert (folder / "transformer" / "config.json").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_launch_script_can_be_run_and_passes_flags_on(script: str) -> None:
    text = (runs.ROOT / script).read_text(encoding="utf-8")
    assert os.access(runs.ROOT / script, os.X_OK)
    assert text.endswith('"$@"\n')
    assert "--deepspeed_multinode_launcherr" not in text
    for name in ("MODEL_NAME", "DATASET_NAME", "DATASET_META_NAME", "NCCL_DEBUG"):
        assert f'export {name}="${{{name}:-' in text
    for name in ("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE"):
        assert f"\n# export {name}=1\n" in text
