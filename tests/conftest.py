"""Serves every test: no network, few threads, and build folders of its own, set before anything heavy is imported."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("NCCL_P2P_DISABLE", None)  # a person's shell must not change what a test sees

hypothesis.settings.register_profile("videox", deadline=None)  # a busy machine is no defect
hypothesis.settings.load_profile("videox")
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".venv" if (ROOT / ".venv").is_dir() else Path(tempfile.gettempdir())


# DeepSpeed's C++ parts, built once for these versions; every session works on a copy.
BUILT = CACHE / f"torch_extensions_test-{version('torch')}-{version('deepspeed')}"


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Points HF_HOME at an empty folder, so that no accelerate configuration of this machine changes a launch, and
    TORCH_EXTENSIONS_DIR at one that no other session builds in, or leaves a lock in when it is killed."""
    before = {name: os.environ.get(name) for name in ("HF_HOME", "TORCH_EXTENSIONS_DIR")}
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf_home"))
    extensions = tmp_path_factory.mktemp("torch_extensions")
    for part in BUILT.glob("*"):
        shutil.copytree(part, extensions / part.name)  # with its times, by which ninja tells what is built
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    yield
    for part in extensions.iterdir():
        keep_built(part)
    shutil.rmtree(extensions)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def same_scheduling() -> Iterator[None]:
    """Finds the test that makes this process, and so all that later tests start, a real-time one."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before, "this process has another scheduling policy than before"


def keep_built(part: Path) -> None:
    """Keeps what a session has built for the next ones, unless another session was first."""
    if (part / "lock").exists() or not list(part.glob("*.so")) or (BUILT / part.name).exists():
        return
    BUILT.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{part.name}-", dir=BUILT.parent))
    shutil.copytree(part, aside / part.name)
    with contextlib.suppress(OSError):  # the other session
        (aside / part.name).rename(BUILT / part.name)
    shutil.rmtree(aside)
