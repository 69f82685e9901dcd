"""Tests of the repository itself: order of packages, sizes of functions and files, language, pins, documents."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The packages of videox from the bottom up. A file imports from its own package and from lines above its own; scripts
# stand above all of them. `GROUND` are the files directly under videox/.
ORDER = (
    ("GROUND",),
    ("weights", "run", "distributed", "diffusion"),
    ("data", "lora", "optim"),
    ("models", "encoders", "tracking"),
    ("engine", "estimate"),
    ("training",),
    ("families",),
    ("doctor",),
)
LEVELS = {package: level for level, packages in enumerate(ORDER) for package in packages}
TAKE_ARGS = {"training", "families"}  # the packages whose functions take the parsed flags
MOST_ENTRIES = 22  # files and packages directly under videox/

LINES = 460  # a train.py tells a whole family; a module of the package is split long before
FUNCTION_LINES, MOST_PARAMETERS = 60, 8
ALIKE, EQUAL_LINES = 0.45, 25  # of the Wan story in the HunyuanVideo story; consecutive code lines
# The training of a family is in its script and in the module that the scripts of the family share.
STORIES = (("scripts/wan2.1/train.py", "videox/families/wan.py"), ("scripts/hunyuanvideo/train.py",))
MAY_PRINT = {"videox.doctor.__main__"}
# Functions that may catch Exception, as "module.function": decoder child, sample, compile probe, a script's main. Each
# reports what it caught.
BROAD_BOUNDARIES = {
    "videox.run.lifecycle.run_script",
    "videox.data.dataset._read_or_refuse",
    "videox.data.index.probe.serve_probes",
    "videox.models.attention_backend.failure_of",
    "videox.models.compiled_blocks.probe",
    "videox.training.sampling._sample",
    "videox.training.validator.sample_all",
}
# Figures of speech and private words that this code once had in their place.
BANNED = re.compile(
    r"\b(Serves|what becomes of|to the bit|to the last bit|by computation|without a goodbye|the way out|whoever|whom it)\b|Mend:"
)
SKIP_HELPER = "tests/support/skips.py"
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "core", "manager", "misc"}
IMPORT_NAMES = {
    "av": "av",
    "PIL": "pillow",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "yaml": "pyyaml",
}  # unlike the package


@cache
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


@cache
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


@cache
def modules_of_videox() -> list[Path]:
    return files(".py", under=("videox",))


@cache
def module_names() -> frozenset[str]:
    return frozenset(module_name(p) for p in modules_of_videox())


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (module of videox, line), with `from videox.data import plan` resolved to videox.data.plan.plan."""
    known = module_names()
    for module, name, line in imports(path):
        if module.split(".")[0] == "videox":
            full = f"{module}.{name}"
            yield (full if full in known else module), line


def package(module: str) -> str:
    """Returns the package of videox that a module belongs to; GROUND for the files directly under videox/."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / "videox" / parts[1]).is_dir() else "GROUND"


def test_every_package_has_a_level() -> None:
    entries = [p for p in (ROOT / "videox").iterdir() if p.suffix == ".py" or (p.is_dir() and list(p.rglob("*.py")))]
    assert not {p.name for p in entries if p.is_dir()} - set(LEVELS), "a package without a level in ORDER"
    assert len(entries) <= MOST_ENTRIES


def test_every_package_states_its_rule_and_exports_nothing() -> None:
    for path in (p for p in modules_of_videox() if p.name == "__init__.py" and p.parent.name != "videox"):
        assert len(tree(path).body) == 1 and ast.get_docstring(tree(path)), f"{path}: only the rule as a docstring"


@pytest.mark.parametrize("path", modules_of_videox(), ids=module_name)
def test_imports_go_down(path: Path) -> None:
    name = module_name(path)
    for target, line in imported_modules(path):
        where = f"{name}:{line} imports {target}"
        if package(target) != package(name):
            assert LEVELS[package(target)] < LEVELS[package(name)], f"{where}: not a lower level of ORDER"


def test_no_circle_between_modules() -> None:
    graph = {module_name(p): {target for target, _ in imported_modules(p)} for p in modules_of_videox()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_nothing_below_imports_scripts_or_tests() -> None:
    for path in modules_of_videox():
        for module, _, line in imports(path):
            assert module.split(".")[0] not in {"scripts", "tests", "tiny", "benchmarks"}, f"{path}:{line}"


@pytest.mark.parametrize("path", files(".py", under=("videox/data",)), ids=module_name)
def test_data_knows_no_training_library(path: Path) -> None:
    banned = {"diffusers", "accelerate", "transformers", "deepspeed", "peft"}
    for module, _, line in imports(path):
        assert module.split(".")[0] not in banned, f"{path}:{line} imports {module}"


@pytest.mark.parametrize("path", files(".py", under=("videox/data/plan",)), ids=module_name)
def test_the_plan_needs_no_torch(path: Path) -> None:
    assert not [m for m, _, _ in imports(path) if m.split(".")[0] == "torch"]


def test_no_family_class_below_scripts() -> None:
    for path in (p for p in modules_of_videox() if package(module_name(p)) != "families"):
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
    if package(module_name(path)) in TAKE_ARGS:
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
    boundaries = {
        handler.lineno
        for function in functions(path)
        if f"{module_name(path)}.{function.name}" in BROAD_BOUNDARIES
        for handler in ast.walk(function)
        if isinstance(handler, ast.ExceptHandler)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            broad = caught & {"Exception", "BaseException"} and node.lineno not in boundaries
            assert not broad, f"{path}:{node.lineno}: catches everything and is not in BROAD_BOUNDARIES"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and module_name(path) not in MAY_PRINT:
            assert node.func.id != "print", f"{path}:{node.lineno}: prints"


@pytest.mark.parametrize("path", files(".py", under=("videox", "scripts")), ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short_and_take_few_parameters(path: Path) -> None:
    for function in functions(path):
        where, lines = f"{path}:{function.lineno} {function.name}", function.end_lineno - function.lineno + 1
        assert lines <= FUNCTION_LINES, f"{where}: {lines} lines"
        taken = [p.arg for p in parameters(function) if p.arg not in {"self", "cls"}]
        assert len(taken) <= MOST_PARAMETERS, (
            f"{where}: {len(taken)} parameters; put those that go together in a dataclass"
        )


def code_lines(path: Path) -> list[str]:
    """Returns the lines of code, stripped, without blank lines, comments and docstrings."""
    text, documented = path.read_text(encoding="utf-8"), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [line for number, line in lines if number not in documented and line and not line.startswith("#")]


def test_the_two_stories_are_not_copies() -> None:
    wan, hunyuan = ([line for part in story for line in code_lines(ROOT / part)] for story in STORIES)
    runs = difflib.SequenceMatcher(None, wan, hunyuan, autojunk=False).get_matching_blocks()
    share, longest = sum(run.size for run in runs) / len(wan), max(runs, key=lambda run: run.size)
    print(f"{share:.1%} of the code lines of {STORIES[0][0]} are in {STORIES[1][0]}, at most {longest.size} in a row")
    assert share <= ALIKE
    assert longest.size <= EQUAL_LINES, "\n".join(wan[longest.a : longest.a + longest.size])


def test_no_function_body_stands_in_two_scripts() -> None:
    seen: dict[str, str] = {}
    for path in files(".py", under=("scripts",)):
        for function in functions(path):
            body = function.body[1:] if ast.get_docstring(function) else function.body
            text = "\n".join(map(ast.unparse, body))
            if len(body) < 3 and len(text) < 200:
                continue
            where = f"{path.relative_to(ROOT)} {function.name}"
            assert text not in seen, f"{where} is {seen[text]}"
            seen[text] = where


def test_text_is_plain() -> None:
    found = []
    for path in [*files(".py", ".sh", ".md", ".toml", ".yaml"), ROOT / "Makefile", ROOT / ".ci/run"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if BANNED.search(line) and path != Path(__file__).resolve():
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_sizes_come_from_one_builder() -> None:
    built = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files(".py", under=("videox", "scripts"))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "SizePolicy"
    ]
    assert len(built) == 1 and built[0].startswith("videox/training/args.py"), built


def test_no_vague_file_names() -> None:
    assert not [p for p in files(".py", ".sh") if p.stem in VAGUE_NAMES]


@pytest.mark.parametrize("folder", ["datasets", "models", "config"])
def test_folders_that_would_hide_a_package_hold_no_python(folder: str) -> None:
    tracked = files(".py", under=(folder,)) if folder == "config" else list((ROOT / folder).glob("__init__.py"))
    assert not tracked, f"{tracked}: an import of `{folder}` would find this instead of the installed package"


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
        r"|pytest\.(mark\.)?(sk" + r"ip|xf" + r"ail|import" + r"orskip)"
    )
    found = []
    for path in [*files(".py", ".sh", ".md", ".toml", ".yaml", ".json", ".txt"), ROOT / "Makefile", ROOT / ".ci/run"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if unwanted.search(line) and path not in (Path(__file__).resolve(), ROOT / SKIP_HELPER):
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
    assert {"demo", "test", "test-all", "check", "style", "map"} <= makefile_targets()


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


# ------------------------------------------------------------------------------------------------------------ map


def load_import_graph() -> ModuleType:
    spec = importlib.util.spec_from_file_location("import_graph", ROOT / "benchmarks/import_graph.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_map_names_every_package_and_only_paths_that_exist() -> None:
    text = (ROOT / "docs/map.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:videox|scripts|tests|benchmarks|config|datasets|models)/[^`<>]*)`", text))
    assert not [path for path in paths if not (ROOT / path).exists()]
    packages = {f"{p.parent.relative_to(ROOT)}/" for p in modules_of_videox() if p.name == "__init__.py"} - {"videox/"}
    assert not packages - paths, "packages without a line in docs/map.md"


def test_contributing_names_functions_that_every_family_has() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z_]+)`", text[text.index("## Add a family") : text.index("2. Write a small model")]))
    assert len(names) > 5
    for path in (ROOT / "scripts").glob("*/train.py"):
        shared = {name for module, name, _ in imports(path) if module.startswith("videox.families.")}
        assert not names - {function.name for function in functions(path)} - shared, path


def test_the_import_graph_page_is_current() -> None:
    graph = load_import_graph()
    assert graph.LIST.read_text(encoding="utf-8") == graph.page(graph.import_graph()), "run `make map`"


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "docs/images").glob("*"))
    assert pictures and not [path.name for path in pictures if path.stat().st_size > 150_000]
