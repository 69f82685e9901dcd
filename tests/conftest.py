"""Serves every test: no network, few threads, and build folders of its own, set before anything heavy is imported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("NCCL_P2P_DISABLE", None)  # a person's shell must not change what a test sees

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".venv" if (ROOT / ".venv").is_dir() else Path(tempfile.gettempdir())


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Points HF_HOME at an empty folder, so that no accelerate configuration of this machine changes a launch, and
    TORCH_EXTENSIONS_DIR at one without a stale build lock, at which DeepSpeed would wait for ever."""
    before = {name: os.environ.get(name) for name in ("HF_HOME", "TORCH_EXTENSIONS_DIR")}
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf_home"))
    extensions = CACHE / "torch_extensions_test"
    for lock in extensions.glob("**/lock"):
        lock.unlink()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value
