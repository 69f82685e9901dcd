"""Starts a run in environments that were left over or belong to another launch, and shows the line that it ends with.

    python benchmarks/environments.py [--only NAME ...] [--limit SECONDS] [--output benchmarks/environments.md]

Each environment is a real start of scripts/wan2.1/train.py with a small model and one step. It either trains as one
process, or ends with one line that names the variable or the file. Seconds are wall time from the start of the command
to the line, or to the end of the run. tests/runs/test_environments.py runs the same list.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

from machine import machine_line

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "scripts/wan2.1/train.py"
PYTHON = (sys.executable, SCRIPT)
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision=bf16")
LAUNCHED = (*LAUNCH, SCRIPT)
LIMIT = 100.0  # seconds after which a start counts as waiting; more on a busy machine
CLOSED = "closed-port"  # replaced by a port of this machine where nothing listens
FSDP_LINE = (
    "--use_fsdp", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap=WanAttentionBlock", "--fsdp_sharding_strategy", "FULL_SHARD",
    "--fsdp_state_dict_type=SHARDED_STATE_DICT", "--fsdp_backward_prefetch", "BACKWARD_PRE",
    "--fsdp_cpu_ram_efficient_loading", "False", "--num_processes=2",
)  # fmt: skip
EIGHT_GPUS = """compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_GPU
downcast_bf16: 'no'
gpu_ids: all
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 8
rdzv_backend: static
same_network: true
use_cpu: false
"""
TWO_MACHINES = EIGHT_GPUS.replace("num_machines: 1", "num_machines: 2").replace(
    "main_training", "main_process_ip: 127.0.0.1\nmain_process_port: 29511\nmain_training"
)
FSDP_YAML = EIGHT_GPUS.replace("MULTI_GPU", "FSDP").replace("num_processes: 8", "num_processes: 2") + (
    "fsdp_config:\n  fsdp_version: 2\n  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
    "  fsdp_transformer_layer_cls_to_wrap: WanAttentionBlock\n"
)
TORCHRUN = {
    "LOCAL_RANK": "0", "RANK": "0", "GROUP_RANK": "0", "ROLE_RANK": "0", "ROLE_NAME": "default", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": CLOSED, "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """One environment.

    Attributes:
        name: of the environment.
        variables: exported before the start.
        command: what is started; the trainer's flags are appended.
        config: content of accelerate's default configuration file; "" = there is none.
        expected: regular expression of the line that the start ends with; "" = it trains.
    """

    name: str
    variables: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = PYTHON
    config: str = ""
    expected: str = ""


def world(size: int, count: int | None = None) -> dict[str, str]:
    return {**TORCHRUN, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(count or size)}


ENVIRONMENTS = (
    Environment("LOCAL_RANK alone", {"LOCAL_RANK": "0"}),
    Environment("LOCAL_RANK and RANK", {"LOCAL_RANK": "3", "RANK": "3"}),
    Environment("WORLD_SIZE of a cluster", {"WORLD_SIZE": "8"}, expected=r"WORLD_SIZE=8: .*unset WORLD_SIZE"),
    Environment(
        "machine 0 of two, by accelerate launch",
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456"},
        LAUNCHED,
        expected=r"WORLD_SIZE=2, RANK=0: .*one process.*unset WORLD_SIZE RANK.*--num_machines",
    ),
    Environment("WORLD_SIZE is not a number", {"WORLD_SIZE": "two"}, expected=r"WORLD_SIZE='two'.*unset WORLD_SIZE"),
    Environment(
        "a world of one at a far address",
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "192.0.2.7", "MASTER_PORT": "10086"},
    ),
    Environment("a cluster's variables, one machine", {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "192.0.2.7"}),
    Environment("torchrun's variables, world of one", world(1)),
    Environment(
        "torchrun's variables, world of two", world(2), expected=r"TORCHELASTIC_RUN_ID.*unset .*RANK.*WORLD_SIZE"
    ),
    Environment(
        "ACCELERATE_USE_DEEPSPEED left over",
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        expected=r"ACCELERATE_USE_DEEPSPEED.*unset ACCELERATE_USE_DEEPSPEED",
    ),
    Environment(
        "ACCELERATE_USE_DEEPSPEED left over, by accelerate launch",
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        LAUNCHED,
        expected=r"ACCELERATE_USE_DEEPSPEED.*unset ACCELERATE_USE_DEEPSPEED",
    ),
    Environment(
        "ACCELERATE_USE_DEEPSPEED left over, two processes",
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"},
        (*LAUNCH, "--multi_gpu", "--num_processes=2", SCRIPT),
        expected=r"ACCELERATE_USE_DEEPSPEED.*unset ACCELERATE_USE_DEEPSPEED",
    ),
    Environment(
        "ACCELERATE_USE_FSDP left over", {"ACCELERATE_USE_FSDP": "1"}, expected=r"ACCELERATE_USE_FSDP.*unset ACCELERATE_USE_FSDP"
    ),
    Environment(
        "ACCELERATE_MIXED_PRECISION=fp16 left over",
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        expected=r"ACCELERATE_MIXED_PRECISION=fp16.*unset ACCELERATE_MIXED_PRECISION",
    ),
    Environment("Slurm's variables", {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}),
    Environment(
        "started by mpirun",
        {
            "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "ACCELERATE_USE_CPU": "true",
        },
        expected=r"OMPI_COMM_WORLD_SIZE=4.*unset OMPI_COMM_WORLD_SIZE",
    ),
    Environment(
        "started by srun with PMI", {"PMI_SIZE": "2", "PMI_RANK": "0", "ACCELERATE_USE_CPU": "true"}, expected=r"PMI_SIZE=2.*unset PMI_SIZE"
    ),
    Environment(
        "default configuration for 8 GPUs, by accelerate launch",
        command=LAUNCHED, config=EIGHT_GPUS, expected=r"default_config\.yaml.*8.*--num_processes",
    ),
    Environment("default configuration for 8 GPUs, by python", config=EIGHT_GPUS),
    Environment(
        "default configuration for two machines, by accelerate launch",
        command=LAUNCHED, config=TWO_MACHINES, expected=r"default_config\.yaml.*2 machines.*--num_machines",
    ),
    Environment(
        "default configuration for two machines, by train_plain.sh",
        command=("bash", "scripts/wan2.1/train_plain.sh"),
        config=TWO_MACHINES,
        expected=r"default_config\.yaml.*2 machines",
    ),
    Environment("default configuration for two machines, by python", config=TWO_MACHINES),
    Environment(
        "VideoX-Fun's line for FSDP",
        command=(*LAUNCH, *FSDP_LINE, SCRIPT),
        expected=r"no layer .*WanAttentionBlock.*--fsdp_transformer_layer_cls_to_wrap.*WanTransformerBlock",
    ),
    Environment(
        "VideoX-Fun's layer for FSDP in the default configuration",
        command=LAUNCHED, config=FSDP_YAML, expected=r"no layer .*WanAttentionBlock.*WanTransformerBlock",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """How a start ended: its code (None = it still ran after LIMIT), the line, seconds until it, processor seconds of
    all processes until the end, and the output."""

    code: int | None
    line: str
    seconds: float
    processor: float
    output: str

    @property
    def traceback(self) -> bool:
        """Whether a traceback was printed, by the run or by its launcher."""
        return "Traceback (most recent call last)" in self.output


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def entry_points(folder: Path) -> Path:
    """Write the entry points of pyproject.toml as an installation does, for a checkout whose .venv is older."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    text = "".join(
        f"[{group}]\n" + "".join(f"{n} = {o}\n" for n, o in names.items()) for group, names in groups.items()
    )
    package = folder / "videox_launcher-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: videox-launcher\nVersion: 1\n", encoding="utf-8")
    (package / "entry_points.txt").write_text(text, encoding="utf-8")
    return folder


def start(environment: Environment, model: Path, metadata: Path, folder: Path, limit: float = LIMIT) -> Result:
    """Start a run in an environment and wait for its end, `limit` seconds at most."""
    home = folder / "hf_home"
    home.mkdir(parents=True)
    if environment.config:
        (home / "accelerate").mkdir()
        (home / "accelerate" / "default_config.yaml").write_text(environment.config, encoding="utf-8")
    port = closed_port()
    variables = {name: port if value == CLOSED else value for name, value in environment.variables.items()}
    ours = ("ACCELERATE_", "FSDP_", "SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_", "CUDA_")  # of the shell, left out
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in TORCHRUN}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    python_path = f"{ROOT}{os.pathsep}{entry_points(folder / 'site')}"
    env |= {"HF_HOME": str(home), "PYTHONPATH": python_path, "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    env |= variables
    settings = {
        "pretrained_model_name_or_path": model, "train_data_dir": metadata.parent, "train_data_meta": metadata,
        "output_dir": folder / "run", "video_sample_size": 64, "image_sample_size": 64, "token_sample_size": 64,
        "video_sample_stride": 1, "video_sample_n_frames": 9, "train_batch_size": 1, "seed": 42,
        "max_train_steps": 1, "report_to": "none",
    }  # fmt: skip
    flags = ["--enable_bucket", *(f"--{name}={value}" for name, value in settings.items())]
    begin, spent = time.monotonic(), processor_seconds()
    process = subprocess.Popen(
        [*environment.command, *flags],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        start_new_session=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    killer = threading.Timer(limit, os.killpg, (process.pid, 9))
    killer.start()
    lines, seen = [], None
    for line in process.stdout or ():
        lines.append(line)
        if seen is None and line.startswith("error:"):
            seen = time.monotonic() - begin
    code = process.wait()
    waited = time.monotonic() - begin >= limit
    killer.cancel()
    found = [line.strip() for line in lines if line.startswith("error:")] or [
        line.strip() for line in lines if re.match(r"finished|[A-Za-z.]*Error:", line)
    ]
    seconds, processor = seen or time.monotonic() - begin, processor_seconds() - spent
    return Result(None if waited else code, found[0] if found else "", seconds, processor, "".join(lines))


def processor_seconds() -> float:
    """Return the processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def outcome(environment: Environment, result: Result) -> str:
    """Return "trains" or "refused" where this is expected, else what is wrong in bold."""
    if result.code is None:
        return "**waits**"
    if not environment.expected:
        return "trains" if result.code == 0 else f"**fails** with code {result.code}"
    if not re.search(environment.expected, result.line):
        return f"**another line**, code {result.code}"
    return "refused" if result.code else "**refused with code 0**"


def small_model(folder: Path) -> Path:
    import tiny

    return tiny.build_wan_t2v(folder / "model")


def small_clips(folder: Path) -> Path:
    import tiny

    return tiny.make_dataset(folder / "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of environments")
    parser.add_argument("--model", type=Path, help="model folder (a small one is made)")
    parser.add_argument("--metadata", type=Path, help="metadata.json in a folder of clips (a few are made)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which a start counts as waiting")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, metadata = asked.model or small_model(folder), asked.metadata or small_clips(folder)
        for number, environment in enumerate(ENVIRONMENTS):
            if asked.only and not any(part in environment.name for part in asked.only):
                continue
            result = start(environment, model, metadata, folder / str(number), asked.limit)
            line = result.line.replace(str(folder / str(number) / "hf_home"), "~/.cache/huggingface")
            line = line.replace(f"{folder / str(number)}/", "outputs/")
            rows.append(
                (
                    environment.name,
                    outcome(environment, result),
                    f"{result.seconds:.1f}",
                    f"{result.processor:.1f}",
                    line,
                )
            )
            print(f"{rows[-1]}{' TRACEBACK' if result.traceback else ''}", flush=True)
    if asked.output:
        asked.output.write_text(page(rows), encoding="utf-8")


def page(rows: Sequence[Sequence[str]]) -> str:
    """Return the markdown page."""
    table = "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |" for row in rows)
    return f"""# Environments that were left over or belong to another launch

Measured by `python benchmarks/environments.py`: a start of `scripts/wan2.1/train.py` with a small model, one step, and
the seconds until the line (or until the end of the run), which grow with what else the machine does; the processor
seconds of all processes do not. Where the launcher is `accelerate launch`, it may print a
traceback of its own after the line.

| environment | outcome | seconds | processor seconds | line |
| --- | --- | --- | --- | --- |
{table}

{machine_line("torch", "accelerate")}.
"""


if __name__ == "__main__":
    main()
