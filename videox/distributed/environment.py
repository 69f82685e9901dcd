"""Checks of the environment variables that launchers set, before torch is imported: left-over ones end a run at once.

torch and accelerate read RANK, WORLD_SIZE, ACCELERATE_USE_DEEPSPEED and others from the environment, also where no
launcher set them. One that was left over ends in a traceback, or in a wait for processes that nobody starts. Here each
of them either ends the run with one line that names it, or, where one process is all that was started, is set aside.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path

from videox.distributed import gpus
from videox.distributed.accelerate_config import launch_options, parent_command, unasked_config
from videox.distributed.backends import TRUE_VALUES, requested_engine
from videox.errors import PeerFailed, UserError

# What every launcher sets for every process that it starts. One that sets fewer is none that torch can work with.
PROCESS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Variables that accelerate reads as true or false, and the words that it knows.
SWITCHES = (
    "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "FORK_LAUNCHED",
)  # fmt: skip
SWITCH_VALUES = (*TRUE_VALUES, "y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0")
ACCUMULATION, DYNAMO = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND"
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "GROUP_RANK")
# torchrun's further variables, named in the command that unsets them all.
TORCHRUN_VARIABLES = (
    "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
)  # fmt: skip
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
# Number of processes as MPI launchers export it; accelerate joins them into a world on CPUs.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# Variables of which accelerate's launcher sets at least one whenever it sets the one on the left.
SET_TOGETHER = {
    "ACCELERATE_USE_DEEPSPEED": (
        "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    ),
    "ACCELERATE_USE_FSDP": ("FSDP_VERSION", "FSDP_SHARDING_STRATEGY", "FSDP_AUTO_WRAP_POLICY"),
}  # fmt: skip
OTHER_ENGINES = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_SAGEMAKER": "SageMaker's libraries"}
LAUNCH_FLAGS = {
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed --deepspeed_config_file config/zero_stage2_config.json",
    "ACCELERATE_USE_FSDP": "--config_file config/accelerate/fsdp2.yaml",
}
# Layer classes of the models' original code, which VideoX-Fun has too, and their names in diffusers.
DIFFUSERS_LAYERS = {
    "WanAttentionBlock": "WanTransformerBlock",
    "MMDoubleStreamBlock": "HunyuanVideoTransformerBlock",
    "MMSingleStreamBlock": "HunyuanVideoSingleTransformerBlock",
}
LAYERS_FLAG = "--fsdp_transformer_layer_cls_to_wrap"
SECONDS_FOR_FIRST = 20.0  # that other processes leave to the one that prints; the launcher ends them sooner
SECONDS_FOR_AGENT = 3.0


def is_launched(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher's variables for one of several processes are all there."""
    return all(environment.get(name) for name in PROCESS_VARIABLES) and environment["LOCAL_RANK"] != "-1"


def check_environment(environment: Mapping[str, str], mixed_precision: str | None = None) -> None:
    """Raise UserError if the environment describes a launch that cannot work.

    Args:
        environment: of this process.
        mixed_precision: of the flags; None = the launcher's.

    Raises:
        UserError: with the variable or the configuration file, its value, and the command that unsets it.
    """
    if sys.platform == "win32":
        what, hint = "native Windows is not supported", "run it in WSL2, see README.md, Windows"
        raise UserError("platform", what, hint)
    refuse_invalid_numbers(environment)
    refuse_invalid_settings(environment)
    refuse_thread_limit(environment)
    refuse_mpi(environment)
    refuse_incomplete(environment)
    refuse_left_over_engine(environment)
    refuse_other_engine(environment)
    refuse_ended_launcher(environment)
    options = launch_options(parent_command())
    refuse_too_many_processes(environment, options)
    if (
        requested_engine(environment) == "fsdp"
        and environment.get("FSDP_AUTO_WRAP_POLICY") == "TRANSFORMER_BASED_WRAP"
    ):
        layers = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
        refuse_unknown_layers(layers.split(","), asked_by(environment, options, LAYERS_FLAG, LAYERS_FLAG))
    if mixed_precision is None:
        refuse_precision(environment, options)


def check_environment_once(environment: Mapping[str, str], mixed_precision: str | None = None) -> None:
    """Call check_environment; of several processes of a machine, one reports the error.

    Raises:
        UserError: see check_environment; in a single process, and in the first of several.
        PeerFailed: in the others, later: a launcher ends all processes as soon as one has failed, and the one that
            reports must be the first.
    """
    try:
        check_environment(environment, mixed_precision)
    except UserError as error:
        if not is_launched(environment) or environment["LOCAL_RANK"] == "0":
            raise
        time.sleep(SECONDS_FOR_FIRST)
        raise PeerFailed(error.line(), error.exit_code, should_print=False) from error


def settle_environment(environment: MutableMapping[str, str]) -> list[str]:
    """Set aside the variables of a world of one process, which needs no address, and return lines that say so.

    A world of one would still wait at MASTER_ADDR for itself, an hour at a wrong one. DeepSpeed and FSDP need a
    process group even then: it is opened on this machine.

    Args:
        environment: of this process; check_environment has passed.
    """
    if not environment.get("ACCELERATE_MIXED_PRECISION", "no"):
        del environment["ACCELERATE_MIXED_PRECISION"]
    if int(environment.get("WORLD_SIZE") or 1) > 1:
        return []
    present = _present(environment, PROCESS_VARIABLES)
    if requested_engine(environment) == "replicated":
        for name in (*present, "LOCAL_WORLD_SIZE", AGENT_STORE):
            environment.pop(name, None)
        if not present or "TORCHELASTIC_RUN_ID" in environment:
            return []
        return [f"{' '.join(present)} set, but this is one process: ignored"]
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if environment.get(AGENT_STORE) == "True" and _answers(address, port, seconds=1.0):
        return []
    environment.pop(AGENT_STORE, None)
    environment.update(RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port(port)))
    return []


# ------------------------------------------------------------------------------------------------------ the checks


def refuse_invalid_numbers(environment: Mapping[str, str]) -> None:
    """Raise UserError for a number of a launcher that is none, or a rank outside the world."""
    for name in NUMBERS:
        text = environment.get(name, "0")
        none = name == "LOCAL_RANK" and text == "-1"  # accelerate's value for a process that no launcher started
        if text and not none and not text.isdecimal():
            raise UserError(f"{name}={text!r}", "is not a number", unset(environment))
    world, rank = int(environment.get("WORLD_SIZE") or 1), int(environment.get("RANK") or 0)
    if is_launched(environment) and rank >= max(world, 1):
        raise UserError(f"RANK={rank}", f"does not exist with WORLD_SIZE={world}", unset(environment))


def refuse_invalid_settings(environment: Mapping[str, str]) -> None:
    """Raise UserError for a variable of accelerate that it cannot read, or that would compile the model."""
    for name in SWITCHES:
        text = environment.get(name)
        if text is not None and text.lower() not in SWITCH_VALUES:
            raise UserError(f"{name}={text!r}", "is neither true nor false", f"`unset {name}`")
    steps = environment.get(ACCUMULATION, "1")
    if not steps.isdecimal():
        what = "is not a number, and --gradient_accumulation_steps is what holds"
        raise UserError(f"{ACCUMULATION}={steps!r}", what, f"`unset {ACCUMULATION}`")
    backend = environment.get(DYNAMO, "no")
    if backend.lower() not in ("", "no"):
        what = "asks accelerate to compile the model, which this trainer does by --compile"
        raise UserError(
            f"{DYNAMO}={backend}", what, f"`unset {DYNAMO}`, or set dynamo_backend to no in `accelerate config`"
        )


def refuse_thread_limit(environment: Mapping[str, str]) -> None:
    """Raise UserError if OpenMP gives torch fewer threads than torch divides its work by.

    oneDNN divides the gradient of a convolution's weight by OMP_NUM_THREADS (default: the number of cores) and leaves
    out the parts of threads that OMP_THREAD_LIMIT forbids: the gradient is wrong, without an error.
    """
    limit, threads = environment.get("OMP_THREAD_LIMIT", ""), environment.get("OMP_NUM_THREADS", "")
    used = threads.split(",")[0].strip() or str(os.cpu_count() or 1)  # OpenMP takes a list, one number for each level
    if limit.isdecimal() and used.isdecimal() and 0 < int(limit) < int(used):
        what = f"is below the {used} threads that torch uses: its gradients on the CPU are wrong then"
        raise UserError(
            f"OMP_THREAD_LIMIT={limit}", what, f"export OMP_NUM_THREADS={limit}, or unset OMP_THREAD_LIMIT"
        )


def refuse_mpi(environment: Mapping[str, str]) -> None:
    """Raise UserError if an MPI launcher started several processes that would each train alone."""
    for name in MPI_SIZES:
        size = environment.get(name, "1")
        if size.isdecimal() and int(size) > 1 and not is_launched(environment):
            what = f"mpirun or srun started {size} processes, which torch cannot join without RANK and MASTER_ADDR"
            hint = (
                f"start one process per machine that runs `accelerate launch --num_processes={size}`, "
                f"or for one process `unset {name}`"
            )
            raise UserError(f"{name}={size}", what, hint)


def refuse_incomplete(environment: Mapping[str, str]) -> None:
    """Raise UserError if several processes are asked for, but no launcher started this one."""
    world = int(environment.get("WORLD_SIZE") or 1)
    if world <= 1 or is_launched(environment):
        return
    where = ", ".join(f"{name}={environment[name]}" for name in ("WORLD_SIZE", "RANK") if environment.get(name))
    missing = next((name for name in PROCESS_VARIABLES if not environment.get(name)), "LOCAL_RANK")
    what = f"exported, but no launcher started this one process ({missing} is not set)"
    hint = (
        f"{unset(environment)} for one process; for several machines pass --num_machines, --machine_rank, "
        "--main_process_ip, --main_process_port and --num_processes to `accelerate launch`"
    )
    raise UserError(where, what, hint)


def refuse_left_over_engine(environment: Mapping[str, str]) -> None:
    """Raise UserError if a variable asks for DeepSpeed or FSDP that the launcher of this process did not set."""
    for name, together in SET_TOGETHER.items():
        if environment.get(name, "").lower() not in TRUE_VALUES:
            continue
        title = "DeepSpeed" if name == "ACCELERATE_USE_DEEPSPEED" else "FSDP"
        if not is_launched(environment):
            what = f"asks for {title}, but no launcher started this process"
        elif not any(variable in environment for variable in together):
            what = f"asks for {title}, but the launcher of this process does not: the variable is left over"
        else:
            continue
        hint = f"`unset {name}`, or start it by `accelerate launch {LAUNCH_FLAGS[name]}`"
        raise UserError(f"{name}={environment[name]}", what, hint)


def refuse_other_engine(environment: Mapping[str, str]) -> None:
    """Raise UserError if a variable asks for an engine of accelerate that these models are not trained with."""
    for name, title in OTHER_ENGINES.items():
        if environment.get(name, "").lower() in TRUE_VALUES:
            what = f"asks for {title}, which this trainer does not use"
            hint = (
                f"`unset {name}`; if accelerate's configuration sets it, set distributed_type: MULTI_GPU or NO there"
            )
            raise UserError(f"{name}={environment[name]}", what, hint)


def refuse_ended_launcher(environment: Mapping[str, str]) -> None:
    """Raise UserError if the launcher that exported the variables has ended: torchrun on this machine answers at once.

    Only for the first machine, where torchrun opens its store before it starts a process.
    """
    several = int(environment.get("WORLD_SIZE") or 1) > 1 and is_launched(environment)
    if not several or environment.get(AGENT_STORE) != "True" or environment.get("GROUP_RANK") != "0":
        return
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if not _answers(address, port, SECONDS_FOR_AGENT):
        run = f"TORCHELASTIC_RUN_ID={environment.get('TORCHELASTIC_RUN_ID', '')}"
        what = (
            f"its launcher, which exported WORLD_SIZE={environment['WORLD_SIZE']}, does not answer at {address}:{port}"
        )
        raise UserError(run, what, f"{unset(environment)}, or start the launcher again")


def refuse_too_many_processes(environment: Mapping[str, str], options: Mapping[str, str] | None) -> None:
    """Raise UserError if more processes were started on this machine than it has GPUs.

    Args:
        environment: of this process.
        options: of `accelerate launch`, if it started this process.
    """
    processes = int(environment.get("LOCAL_WORLD_SIZE") or 1)
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in TRUE_VALUES
    if not is_launched(environment) or processes == 1 or on_cpu:
        return
    count = gpus.visible_gpus(environment)
    # DeepSpeed and FSDP also run on CPUs.
    if count is None or processes <= count or (count == 0 and requested_engine(environment) != "replicated"):
        return
    raise too_many_processes(asked_by(environment, options, "--num_processes", "accelerate launch"), processes, count)


def too_many_processes(where: str, processes: int, count: int) -> UserError:
    """Return the error for more processes than GPUs.

    Args:
        where: what asked for them.
        processes: on this machine.
        count: of its visible GPUs.
    """
    found = {0: "no GPU was found", 1: "it has 1 GPU"}.get(count, f"it has {count} GPUs")
    hint = f"pass --num_machines=1 --num_processes={max(count, 1)} to `accelerate launch`"
    if count <= 1:
        hint = f"for one process start `python {_script()}` without a launcher, or {hint}"
    if count == 0:
        hint += "; to train on CPUs `export ACCELERATE_USE_CPU=true`"
    return UserError(where, f"{processes} processes are asked for on this machine, but {found}", hint)


def refuse_unknown_layers(names: Iterable[str], where: str) -> None:
    """Raise UserError if FSDP is to wrap a layer class that no transformer of diffusers has.

    Args:
        names: of the classes.
        where: what names them.
    """
    folder = importlib.util.find_spec("diffusers")
    if folder is None or not folder.submodule_search_locations:
        return
    models = Path(folder.submodule_search_locations[0]) / "models" / "transformers"
    texts = [path.read_text(encoding="utf-8") for path in models.rglob("*.py")]
    classes = {name for text in texts for name in re.findall(r"^class (\w+)", text, flags=re.MULTILINE)}
    names = [name.strip() for name in names if name.strip()]
    missing = [name for name in names if name not in classes]
    if missing and classes:
        repeated = {n for text in texts for block in _block_lists(text) for n in re.findall(r"\w+", block)}
        nearest = {name: _nearest_layer(name, repeated) for name in missing}
        proposal = ",".join(nearest.get(name, name) for name in names)
        what = f"no layer of diffusers' transformers is called {missing[0]}"
        raise UserError(where, what, f"pass {LAYERS_FLAG}={proposal} to `accelerate launch`")


def _block_lists(text: str) -> list[str]:
    return re.findall(r"^    _(?:repeated_blocks|no_split_modules) = \[(.*?)\]", text, flags=re.MULTILINE | re.DOTALL)


def _nearest_layer(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1, 0.0)
    return DIFFUSERS_LAYERS.get(name, near[0] if near else name)


def refuse_precision(environment: Mapping[str, str], options: Mapping[str, str] | None) -> None:
    """Raise UserError if the launcher asks for a precision that these models are not trained in."""
    name = "ACCELERATE_MIXED_PRECISION"
    value = environment.get(name, "no").lower()
    if value in ("no", "bf16", ""):  # "": settle_environment removes it
        return
    what = f"{value} overflows in these models" if value == "fp16" else f"{value} is not supported"
    where = asked_by(environment, options, "--mixed_precision", f"{name}={environment[name]}")
    hint = f"or `unset {name}`" if options is None else "or to `accelerate launch`"
    raise UserError(where, what, f"pass --mixed_precision=bf16 to the script, {hint}")


# -------------------------------------------------------------------------------------------------------- the words


def asked_by(environment: Mapping[str, str], options: Mapping[str, str] | None, option: str, otherwise: str) -> str:
    """Return what set a launcher's option: the default configuration, or the launcher itself.

    Args:
        environment: of this process.
        options: of `accelerate launch`; None if it did not start this process.
        option: its name, with "--".
        otherwise: returned where no default configuration set it.
    """
    config = unasked_config(environment, options)
    name = option.removeprefix("--")
    has_it = config is not None and (config.text(name) or config.text(f"fsdp_config.{name}"))
    if config is None or not has_it or option in (options or {}):
        return otherwise
    return f"{config.path}, accelerate's default configuration"


def unset(environment: Mapping[str, str]) -> str:
    """Return the command that unsets all variables of a launcher that are present."""
    names = ("WORLD_SIZE", *(name for name in PROCESS_VARIABLES if name != "WORLD_SIZE"), *TORCHRUN_VARIABLES)
    return f"`unset {' '.join(_present(environment, names))}`"


def _present(environment: Mapping[str, str], names: Iterable[str]) -> list[str]:
    return [name for name in names if name in environment]


def _script() -> str:
    # of this process, or of the launcher that this is
    return next((word for word in sys.argv if Path(word).name == "train.py"), "scripts/wan2.1/train.py")


def _answers(address: str, port: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=seconds).close()
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        else:
            return True


def _free_port(wanted: int) -> int:
    """Return the wanted port if nothing listens there, else another one."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    return wanted
