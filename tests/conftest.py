"""Settings of all tests: no network, few threads, private build folders. Set before slow imports."""

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
os.environ.pop("NCCL_P2P_DISABLE", None)  # the user's shell must not change the tests

pytest.register_assert_rewrite("launch_checks")  # its assertions then show the compared values
# No deadline: a busy machine must not fail a test. The same examples in every run, so that a change is not refused for
# a fault that it did not bring; `make test-all` draws new ones, twice as many (--hypothesis-profile random).
hypothesis.settings.register_profile("videox", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("random", deadline=None, derandomize=False)
hypothesis.settings.load_profile("videox")
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".venv" if (ROOT / ".venv").is_dir() else Path(tempfile.gettempdir())


# DeepSpeed's C++ extensions, built once for these versions; every pytest session uses a copy.
BUILT = CACHE / f"torch_extensions_test-{version('torch')}-{version('deepspeed')}"


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set HF_HOME to an empty folder, so that the user's accelerate configuration does not change a launch, and
    TORCH_EXTENSIONS_DIR to a private one: no other pytest session builds there or leaves a lock when it is killed."""
    before = {name: os.environ.get(name) for name in ("HF_HOME", "TORCH_EXTENSIONS_DIR")}
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf_home"))
    extensions = session_extensions(tmp_path_factory.getbasetemp())
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    yield
    for extension in extensions.iterdir():
        cache_extension(extension)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


def session_extensions(base: Path) -> Path:
    """A folder for the extensions of one pytest session, with a copy of those in BUILT.

    The workers of pytest-xdist share it: an extension takes minutes to build, and the second worker waits for it.
    """
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "torch_extensions"
    if not folder.exists():
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        for extension in BUILT.glob("*"):
            shutil.copytree(extension, temporary / extension.name)  # with modification times, by which ninja rebuilds
        try:
            temporary.rename(folder)
        except OSError:  # another worker was faster
            shutil.rmtree(temporary)
    return folder


@pytest.fixture(autouse=True)
def same_scheduling() -> Iterator[None]:
    """Fail the test that changes the scheduling policy of this process, which all later child processes inherit."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before, "this process has another scheduling policy than before"


def cache_extension(extension: Path) -> None:
    """Copy an extension that was built in this session to BUILT, unless another session has done so."""
    if (extension / "lock").exists() or not list(extension.glob("*.so")) or (BUILT / extension.name).exists():
        return
    BUILT.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{extension.name}-", dir=BUILT.parent))
    shutil.copytree(extension, temporary / extension.name)
    with contextlib.suppress(OSError):  # another session was faster
        (temporary / extension.name).rename(BUILT / extension.name)
    shutil.rmtree(temporary)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count what was skipped at the end of the run; each reason is in the summary above it (-ra)."""
    skipped = len(terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"{skipped} tests were skipped: see the reasons above")
