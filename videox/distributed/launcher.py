"""Checks inside `accelerate launch`, before it starts a process: the default configuration that it read unasked.

torchrun, which `accelerate launch` runs for several processes, loads the packages that register a rendezvous backend
(entry points of the group torchrun.handlers, see pyproject.toml). This module registers `videox`, which is torch's own
static rendezvous, and uses the moment: a default configuration for more GPUs or machines than there are ends the
launch with one line, or, where machines are missing, after the usual seconds. Only launches of a train.py of this
repository are checked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from videox.distributed import gpus
from videox.distributed.accelerate_config import (
    CONFIG_OPTION,
    AccelerateConfig,
    launch_options,
    read_config,
    unasked_config,
)
from videox.distributed.backends import TRUE_VALUES
from videox.distributed.environment import LAYERS_FLAG, refuse_unknown_layers, too_many_processes
from videox.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

    Creator = Callable[[RendezvousParameters], RendezvousHandler]


def check_launcher() -> Creator:
    """Check the launch of this process, and return the creator of the rendezvous backend `videox`.

    torch calls it in every launcher. Raises SystemExit where the launch cannot work, after one line on stderr.
    """
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import create_rdzv_handler

    try:
        check_launch(sys.argv, os.environ)
    except UserError as error:
        sys.stderr.write(f"{error.line()}\n")
        sys.exit(error.exit_code)
    return create_rdzv_handler


def starts_train_script(command: Sequence[str]) -> bool:
    """Return whether the first script on a command line is a train.py of this repository."""
    script = next((Path(word) for word in command[1:] if word.endswith(".py")), None)
    return script is not None and (script.name, script.absolute().parents[1].name) == ("train.py", "scripts")


def check_launch(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raise UserError if a left-over variable or default configuration changes a launch of this repository.

    Args:
        command: of the launcher.
        environment: of the launcher.

    Raises:
        UserError: with the variable, or with the configuration file and the flags that overrule it.
    """
    options = launch_options(command)
    if options is None or not starts_train_script(command):
        return
    config = unasked_config(environment, options)
    asked = read_config(Path(options[CONFIG_OPTION])) if options.get(CONFIG_OPTION) else config
    kind = asked.text("distributed_type") if asked is not None else ""
    for name, flag in (("DEEPSPEED", "--use_deepspeed"), ("FSDP", "--use_fsdp")):
        variable = f"ACCELERATE_USE_{name}"
        if environment.get(variable, "").lower() in TRUE_VALUES and flag not in options and kind != name:
            what = f"left over: {flag} is not among the flags of this launch"
            raise UserError(f"{variable}={environment[variable]}", what, f"`unset {variable}`, or add {flag}")
    layers = options.get(LAYERS_FLAG) or (config.text(f"fsdp_config.{LAYERS_FLAG[2:]}") if config else "")
    if ("--use_fsdp" in options or kind == "FSDP") and layers:
        named = LAYERS_FLAG in options or config is None
        refuse_unknown_layers(layers.split(","), LAYERS_FLAG if named or config is None else describe(config))
    if config is None or config.problem:
        return
    machines = config.number("num_machines") if "--num_machines" not in options else 1
    if "--num_processes" not in options:
        refuse_processes(config, machines, environment)
    if machines > 1:
        meet_machines(config, machines, environment)


def describe(config: AccelerateConfig) -> str:
    """Return the file's name for an error."""
    return f"{config.path}, accelerate's default configuration"


def refuse_processes(config: AccelerateConfig, machines: int, environment: Mapping[str, str]) -> None:
    """Raise UserError if a configuration for so many machines asks for more processes here than there are GPUs."""
    processes = config.number("num_processes") // machines
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in TRUE_VALUES or config.text("use_cpu") == "True"
    sharded = config.text("distributed_type") in ("DEEPSPEED", "FSDP")  # these also run on CPUs
    count = gpus.visible_gpus(environment)
    if count is None or on_cpu or processes <= max(count, 1) or (count == 0 and sharded):
        return
    error = too_many_processes(describe(config), processes, count)
    what = f"it is for {machines} machines, and {error.what}" if machines > 1 else error.what
    raise UserError(error.where, what, f"{error.hint}; or set the file aside: {config.set_aside}")


def meet_machines(config: AccelerateConfig, machines: int, environment: Mapping[str, str]) -> None:
    """Wait for the machines of a configuration. Raises UserError if one is missing after the usual seconds."""
    from videox.distributed.rendezvous import meet

    address, port = config.text("main_process_ip"), config.text("main_process_port") or "29500"
    alone = (
        f"for this machine alone pass --num_machines=1 --num_processes=N, or set the file aside: {config.set_aside}"
    )
    where, rank = describe(config), config.text("machine_rank") or "0"
    if not address or not port.isdecimal() or not rank.isdecimal():
        what = f"it is for {machines} machines, without a valid main_process_ip, main_process_port and machine_rank"
        raise UserError(where, what, alone)
    sys.stderr.write(f"waiting for {machines} machines at {address}:{port}, as {where}, says; {alone}\n")
    variables = {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": str(machines), "RANK": rank}
    try:
        meet({**environment, **variables, "NUM_PROCESS": str(config.number("num_processes"))})
    except UserError as error:
        what = f"it is for {machines} machines, and {error.what} (at {error.where})"
        raise UserError(
            where, what, f"{alone}; for {machines} machines pass --num_machines={machines}, and {error.hint}"
        ) from error
