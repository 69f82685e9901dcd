"""Serves the reader who expects everything where the layout says it is: the rules of the house, kept by machine."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file imports from lower floors only; scripts stand above all of them. A new module needs a line here.
FLOORS = {
    "videox": 0,
    "videox.errors": 0,
    "videox.files": 0,
    "videox.flag_parser": 1,
    "videox.keys": 0,
    "videox.shapes": 0,
    "videox.build_lock": 1,
    "videox.conditioning": 1,
    "videox.estimate": 1,
    "videox.flow_matching": 1,
    "videox.hub": 1,
    "videox.jsonl": 1,
    "videox.late_step": 4,
    "videox.layout_tables": 0,
    "videox.layouts": 1,
    "videox.lora_files": 3,
    "videox.lora_layouts": 2,
    "videox.model_configs": 2,
    "videox.meeting": 1,
    "videox.model_folder": 1,
    "videox.model_parts": 4,
    "videox.network": 1,
    "videox.offload": 1,
    "videox.peak": 1,
    "videox.host_optimizer": 2,
    "videox.optim": 3,
    "videox.optimizers": 1,
    "videox.peer_hub": 1,
    "videox.pickles": 1,
    "videox.transfer": 1,
    "videox.progress": 1,
    "videox.recompute": 1,
    "videox.status": 1,
    "videox.straggling": 3,
    "videox.weights": 1,
    "videox.checkpoint": 2,
    "videox.creation": 2,
    "videox.kept": 2,
    "videox.lora": 2,
    "videox.distributed": 2,
    "videox.ema": 2,
    "videox.latents": 2,
    "videox.memory": 2,
    "videox.merging": 5,
    "videox.metrics": 2,
    "videox.local_steps": 3,
    "videox.optimizer_state": 2,
    "videox.preview": 2,
    "videox.shards": 2,
    "videox.sharing": 5,
    "videox.agreement": 3,
    "videox.cost_model": 3,
    "videox.dry_run": 3,
    "videox.plan_picture": 3,
    "videox.dump": 3,
    "videox.explain": 3,
    "videox.encoding": 3,
    "videox.exports": 4,
    "videox.provenance": 3,
    "videox.fsdp_shards": 3,
    "videox.report": 3,
    "videox.run_folder": 3,
    "videox.state": 3,
    "videox.streaming": 3,
    "videox.tensor_files": 3,
    "videox.tracker": 3,
    "videox.utilization": 3,
    "videox.transformer": 5,
    "videox.validation": 3,
    "videox.zero_creation": 3,
    "videox.zero_shards": 3,
    "videox.args": 5,
    "videox.first_minute": 6,
    "videox.text": 4,
    "videox.lifecycle": 4,
    "videox.engine": 4,
    "videox.zero_universal": 4,
    "videox.adapter_files": 6,
    "videox.averaging": 7,
    "videox.cache_fill": 5,
    "videox.fsdp": 5,
    "videox.peers": 5,
    "videox.watch": 5,
    "videox.steps": 6,
    "videox.validator": 6,
    "videox.scheduling": 7,
    "videox.exporting": 8,
    "videox.wiring": 9,
    "videox.planning": 10,
    "videox.zero": 5,
}
# videox.data is floor 2 as a whole; inside it imports go only leftwards.
DATA = (
    "formats",
    "metadata",
    "media",
    "deadline",
    "image",
    "decord_reader",
    "video",
    "probing",
    "index_file",
    "survey",
    "index",
    "buckets",
    "settings",
    "slots",
    "dealing",
    "epoch",
    "plan",
    "balance",
    "extent",
    "shard_file",
    "cache",
    "cache_care",
    "dataset",
    "bucket_sampler",
    "loader",
)
DATA_FLOOR = 2

LINES = 460  # a train.py tells a whole family; a module of the package is split long before
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "core", "manager", "misc"}
IMPORT_NAMES = {
    "av": "av",
    "PIL": "pillow",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "yaml": "pyyaml",
}  # unlike the package


def files(*suffixes: str, under: tuple[str, ...] = (".",)) -> list[Path]:
    """Returns the repository's own files with these suffixes: nothing that git ignores, nothing that starts with a dot
    but .ci."""
    found = []
    for folder in under:
        for path in sorted((ROOT / folder).rglob("*")):
            parts = path.relative_to(ROOT).parts
            ignored = any(p in {"outputs", "build", "__pycache__"} or p.endswith(".egg-info") for p in parts)
            hidden = any(p.startswith(".") for p in parts) and parts[0] != ".ci"
            local_data = parts[0] in {"datasets", "models"} and path.suffix not in {".md", ".py"}
            if path.is_file() and path.suffix in suffixes and not ignored and not hidden and not local_data:
                found.append(path)
    return found


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yields (module, imported name or "", line) of every import in a file, wherever it stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            yield from ((node.module, alias.name, node.lineno) for alias in node.names)


def modules_of_videox() -> list[Path]:
    return files(".py", under=("videox",))


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (module of videox, line), with `from videox.data import plan` resolved to videox.data.plan."""
    known = {module_name(p) for p in modules_of_videox()}
    for module, name, line in imports(path):
        if module.split(".")[0] == "videox":
            full = f"{module}.{name}"
            yield (full if full in known else module), line


def test_every_module_has_a_floor() -> None:
    names = {module_name(path) for path in modules_of_videox()}
    unknown = {n for n in names if not n.startswith("videox.data")} - set(FLOORS)
    unknown |= {n for n in names if n.startswith("videox.data.") and n.split(".")[2] not in DATA}
    assert not unknown, f"no floor in tests/test_house.py for {sorted(unknown)}"


def floor(module: str) -> int:
    return DATA_FLOOR if module.startswith("videox.data") else FLOORS[module]


@pytest.mark.parametrize("path", modules_of_videox(), ids=module_name)
def test_imports_go_down(path: Path) -> None:
    name = module_name(path)
    for target, line in imported_modules(path):
        where = f"{name}:{line} imports {target}"
        if name.startswith("videox.data.") and target.startswith("videox.data."):
            assert DATA.index(target.split(".")[2]) < DATA.index(name.split(".")[2]), f"{where}: not leftwards"
        else:
            assert floor(target) < floor(name), f"{where}: not a lower floor"


def test_nothing_below_imports_scripts_or_tests() -> None:
    for path in modules_of_videox():
        for module, _, line in imports(path):
            assert module.split(".")[0] not in {"scripts", "tests", "tiny", "benchmarks"}, f"{path}:{line}"


@pytest.mark.parametrize("path", files(".py", under=("videox/data",)), ids=module_name)
def test_data_knows_no_training_library(path: Path) -> None:
    banned = {"diffusers", "accelerate", "transformers", "deepspeed", "peft"}
    for module, _, line in imports(path):
        assert module.split(".")[0] not in banned, f"{path}:{line} imports {module}"


@pytest.mark.parametrize("name", sorted(n for n, f in FLOORS.items() if f == 0))
def test_floor_0_needs_no_torch(name: str) -> None:
    path = ROOT / Path(*name.split(".")).with_suffix(".py")
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    assert path.exists(), f"{name} has a floor but no file"
    assert not [m for m, _, _ in imports(path) if m.split(".")[0] in {"torch", "diffusers", "accelerate"}]


def test_no_family_class_below_scripts() -> None:
    for path in modules_of_videox():
        for module, name, line in imports(path):
            assert not re.match(r"(AutoencoderKL)?(Wan|HunyuanVideo)", name), f"{path}:{line} imports {module}.{name}"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute):
                assert not re.match(r"(AutoencoderKL)?(Wan|HunyuanVideo)[A-Z0-9]", node.attr), f"{path}:{node.lineno}"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    a = function.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else [])]


@pytest.mark.parametrize("path", modules_of_videox(), ids=module_name)
def test_every_signature_is_annotated(path: Path) -> None:
    for function in functions(path):
        where = f"{path}:{function.lineno} {function.name}"
        assert function.returns is not None or function.name == "__init__", f"{where}: no return type"
        bare = [p.arg for p in parameters(function) if p.annotation is None and p.arg not in {"self", "cls"}]
        assert not bare, f"{where}: {bare} without a type"


@pytest.mark.parametrize("path", modules_of_videox(), ids=module_name)
def test_parsed_flags_stay_in_args(path: Path) -> None:
    if module_name(path) in (
        "videox.args",
        "videox.flag_parser",
        "videox.planning",
        "videox.scheduling",
        "videox.wiring",
    ):
        return
    for function in functions(path):
        for parameter in parameters(function):
            where = f"{path}:{function.lineno} {function.name}({parameter.arg})"
            variadic = function.args.vararg is parameter
            assert variadic or parameter.arg != "args", f"{where}: take named parameters"
            assert "Namespace" not in ast.unparse(parameter.annotation or ast.Constant("")), where
    assert not [m for m, _, _ in imports(path) if m == "argparse"], f"{path} imports argparse"


@pytest.mark.parametrize("path", modules_of_videox(), ids=module_name)
def test_no_failure_is_hidden_and_nothing_is_printed(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            assert not caught & {"Exception", "BaseException"}, f"{path}:{node.lineno}: catches everything"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path}:{node.lineno}: prints"


def test_no_vague_file_names() -> None:
    assert not [p for p in files(".py", ".sh") if p.stem in VAGUE_NAMES]


@pytest.mark.parametrize("folder", ["datasets", "models", "config"])
def test_folders_that_would_hide_a_package_hold_no_python(folder: str) -> None:
    tracked = files(".py", under=(folder,)) if folder == "config" else list((ROOT / folder).glob("__init__.py"))
    assert not tracked, f"{tracked}: an import of `{folder}` would find this instead of the installed package"


@pytest.mark.parametrize("path", files(".py", ".sh"), ids=lambda p: str(p.relative_to(ROOT)))
def test_first_line_says_whom_it_serves(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    first = lines[1] if lines[0].startswith("#!") else lines[0]
    assert re.match(r'("""|# )Serves ', first), f"{path}: {first!r}"


@pytest.mark.parametrize("path", files(".py", ".sh", ".md", ".toml", ".yaml"), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    if path.is_relative_to(ROOT / "tests"):
        return
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= LINES, f"{path} has {length} lines"


def test_text_is_about_the_project_alone() -> None:
    # A folder of somebody's machine, an unfinished place, or a test that does not run.
    unwanted = re.compile(
        r"(?<![\w.$}~-])/(root/|home/(?!me\b)|work/|tmp/|Users/|mnt/|opt/wheels)"
        r"|\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|Not" + r"ImplementedError)\b"
        r"|pytest\.(mark\.)?(sk" + r"ip|xf" + r"ail)"
    )
    found = []
    for path in [*files(".py", ".sh", ".md", ".toml", ".yaml", ".json", ".txt"), ROOT / "Makefile", ROOT / ".ci/run"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if unwanted.search(line) and path != Path(__file__).resolve():
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirements_are_pinned() -> None:
    lines = requirements()
    assert lines[0] == "torch==2.13.0"
    assert lines[-1] == "-e ."
    assert not [line for line in lines[:-1] if not re.match(r"[\w-]+==[\w.]+( ; .+)?$", line)]
    names = [line.split("==")[0] for line in lines[:-1]]
    assert len(set(names)) == len(names)


def top_level_imports(path: Path) -> set[str]:
    """Returns the packages that importing the file itself imports (not those that a function imports when called)."""
    found = set()
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", files(".py", under=("videox", "scripts")), ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_imported_is_pinned(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for group in project["optional-dependencies"].values() for line in group]
    assert not [line for line in extras if not re.match(r"[\w-]+==[\w.]+$", line)]
    always, sometimes = (
        {line.split("==")[0].lower().replace("-", "_") for line in lines} for lines in (requirements()[:-1], extras)
    )
    own = set(sys.stdlib_module_names) | {"videox"} | {p.stem for p in path.parent.glob("*.py")}
    at_start = top_level_imports(path)
    for module, _, line in imports(path):
        top = module.split(".")[0]
        package = IMPORT_NAMES.get(top, top).lower().replace("-", "_")
        if top not in own:  # what only an extra brings is imported where it is used
            assert package in always or (package in sometimes and top not in at_start), f"{path}:{line}: {top}"


def makefile_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", text, flags=re.MULTILINE))


def test_makefile_has_its_targets() -> None:
    assert {"demo", "test", "test-all", "check", "style"} <= makefile_targets()


def test_commands_in_documents_exist() -> None:
    for path in files(".md"):
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"```(?:sh|bash|shell)?\n(.*?)```", text, flags=re.DOTALL) + re.findall(
            r"`([^`\n]+)`", text
        )
        for line in (line.strip() for block in blocks for line in block.splitlines()):
            if match := re.match(r"(?:[A-Z_]+=\S+ )*make ([a-z-]+)", line):
                assert match[1] in makefile_targets(), f"{path}: `{line}`"
            for script in re.findall(r"(?:python|bash|launch .*?) (scripts/\S+\.(?:py|sh))", line):
                assert (ROOT / script).exists(), f"{path}: `{line}`"
