"""A GPU that computes nothing: a CPU build of torch, with CUDA tensors that have shape and dtype, but no memory.

Tensors on the host are real. An operation with a CUDA tensor runs under torch's FakeTensorMode, which computes what
its result looks like and refuses tensors of two devices; CUDA's autocast rules hold, since the dispatcher of a CPU
build has them. A number that is read from the GPU is 1. Recorded are the places where the host would wait for the GPU,
and what the attention of the transformer gets.

guard.cpp must be loaded before torch. This uses private interfaces of torch, and holds for the pinned version only.
"""

from __future__ import annotations

import contextlib
import copyreg
import ctypes
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

ROOT = Path(__file__).resolve().parents[2]
HERE, TORCH = f"{ROOT}/tests/", f"{Path(torch.__file__).parent}/"
TRANSFORMERS = "/diffusers/models/transformers/"
NAME, MEMORY = "NVIDIA H100 80GB HBM3", 80 * 2**30
FAKE = FakeTensorMode()
MISSING = object()
SIZED_BY_DATA = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}


class Record:
    """What a run did with its GPU.

    Attributes:
        step: of the run; 0 before the first one.
        waits: how often the host waited, by (step, what for, place in videox or scripts, place outside torch), both
            the innermost ones.
        attention: calls of the transformer's attention with gradients, by (where, dtypes, contiguous, masked).
        errors: operations that the GPU would refuse.
        races: memory of the GPU that an operation uses although it does not wait for one of another stream that writes
            it, or writes although it does not wait for one that uses it.
    """

    def __init__(self) -> None:
        self.step = 0
        self.waits: Counter[tuple[int, str, str, str]] = Counter()
        self.attention: Counter[tuple[str, str, bool, bool]] = Counter()
        self.errors: list[str] = []
        self.races: list[str] = []

    def wait(self, what: str) -> None:
        own, inner = places()
        self.waits[self.step, what, own, inner] += 1

    def as_json(self) -> dict[str, Any]:
        return {
            "steps": self.step,
            "errors": self.errors,
            "races": self.races,
            "waits": [[*key, count] for key, count in self.waits.items()],
            "attention": [[*key, count] for key, count in self.attention.items()],
        }


RECORD = Record()


def places() -> tuple[str, str]:
    """Return the innermost places of the stack in videox or scripts, and outside torch: "file:line function".

    videox.device is left out, since its functions wait on behalf of their callers.
    """
    frame, own, inner = sys._getframe(1), "", ""
    while frame is not None and not own:
        name = frame.f_code.co_filename
        if not name.startswith((HERE, TORCH)):
            place = f"{shortened(name)}:{frame.f_lineno} {frame.f_code.co_qualname}"
            inner = inner or place
            own = place if place.startswith(("videox/", "scripts/")) and not name.endswith("/videox/device.py") else ""
        frame = frame.f_back
    return own, inner


def shortened(file: str) -> str:
    """Return a path without the folder of the repository, of a copy of its scripts, or of the installed packages."""
    file = file.removeprefix(f"{ROOT}/").rpartition("/site-packages/")[2]
    return f"scripts/{file.rpartition('/scripts/')[2]}" if "/scripts/" in file else file


def is_fake(value: object) -> bool:
    return isinstance(value, FakeTensor)


def is_on_host(value: object) -> bool:
    return isinstance(value, Tensor) and not is_fake(value) and value.device.type == "cpu"


def like(value: object) -> object:
    """Return a fake tensor of the host like a real one or one of the meta device, anything else as it is."""
    if not isinstance(value, Tensor) or is_fake(value):
        return value
    shape = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(FAKE, shape, torch.device("cpu"))


FAKE_ATTRIBUTES = {*vars(like(torch.empty(0))), "_is_param"}


def to_host(value: object, pinned: bool) -> object:
    """Return ones on the host in place of a fake tensor there, anything else as it is."""
    if not is_fake(value) or value.device.type != "cpu":
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, pin_memory=pinned).fill_(1)


def run_fake(function: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return what an operation returns for fake tensors; where that depends on values, one element matches."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError("a generator of the host for numbers on the GPU")
    if name == "nonzero":
        return args[0].new_zeros(1, args[0].dim(), dtype=torch.int64)
    if name == "masked_select":
        return args[0].new_zeros(1)
    if name.startswith("index") and isinstance(args[1], (list, tuple)):
        indices = [part for index in args[1] for part in one_match(index)]
        args = (args[0], indices, *args[2:])
    return function(*args, **kwargs)


def one_match(index: Tensor | None) -> list[Tensor | None]:
    """Return an index tensor as it is, and a mask as the index of one element."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [index.new_zeros(1, dtype=torch.int64) for _ in range(index.dim())]


class FakeGpu(TorchDispatchMode):
    """Runs operations with CUDA tensors on fake ones, and records where the host waits."""

    def __torch_dispatch__(self, function: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, Tensor) and is_traceable_wrapper_subclass(leaf) for leaf in leaves):
            return NotImplemented  # a DTensor: its own rules first, then its parts come here
        device = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not device and not any(map(is_fake, leaves)):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        note_wait(name, args, kwargs)
        if name == "_local_scalar_dense":
            return torch.ones((), dtype=args[0].dtype).item()
        if name == "equal":
            return True
        if name == "copy_" and is_on_host(args[0]):
            return args[0].fill_(1)
        try:
            with FAKE:
                result = run_fake(function, name, *pytree.tree_map(like, (args, kwargs)))
        except Exception as error:
            tensors = [f"{leaf.device} {tuple(leaf.shape)}" for leaf in leaves if isinstance(leaf, Tensor)]
            own, inner = places()
            RECORD.errors.append(f"{function} of {', '.join(tensors)} in {own or inner}: {error}")
            raise
        note_access(function, args, kwargs, result)
        pinned = bool(kwargs.get("pin_memory") or kwargs.get("non_blocking"))
        return pytree.tree_map(lambda value: to_host(value, pinned), result)


def note_wait(name: str, args: tuple, kwargs: dict) -> None:
    """Record an operation for which the host waits until the GPU has done all of its work."""
    if name in ("_local_scalar_dense", "equal") or name in SIZED_BY_DATA:
        RECORD.wait("a value")
    elif name in ("index", "index_put", "index_put_"):
        indices = [index for index in args[1] if index is not None]
        if any(is_on_host(index) or index.dtype in (torch.bool, torch.uint8) for index in indices):
            RECORD.wait("an index")
    elif name == "copy_":
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        host = next(filter(is_on_host, args[:2]), None)
        if host is not None and (blocking or not host.is_pinned()):
            RECORD.wait(f"a copy {'to' if host is args[0] else 'from'} the host")
    elif name == "_to_copy" and kwargs.get("device") is not None:
        source, target = args[0], kwargs["device"]
        if is_on_host(source) and (not kwargs.get("non_blocking") or not source.is_pinned()):
            RECORD.wait("a copy from the host")
        elif is_fake(source) and target.type == "cpu" and not kwargs.get("non_blocking"):
            RECORD.wait("a copy to the host")


# --------------------------------------------------------------------------------------------- attention


def record_attention() -> None:
    """Record what the transformer's attention gets, before autocast casts it."""
    real = torch.nn.functional.scaled_dot_product_attention

    def recorded(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ):
        where = attention_site() if query.requires_grad and is_fake(query) else ""
        if where:
            qkv = query, key, value
            dtypes = " ".join(str(tensor.dtype).removeprefix("torch.") for tensor in qkv)
            contiguous = all(tensor.transpose(1, 2).is_contiguous() for tensor in qkv)  # in [B, S, heads, D]
            RECORD.attention[where, dtypes, contiguous, attn_mask is not None] += 1
        return real(query, key, value, attn_mask, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = recorded


def attention_site() -> str:
    """Return "refiner" (of text, which has a mask) or "block" if the caller is in a transformer, else ""."""
    frame, found = sys._getframe(2), ""
    while frame is not None:
        code = frame.f_code
        if "TokenRefiner" in code.co_qualname:
            return "refiner"
        found = "block" if TRANSFORMERS in code.co_filename else found
        frame = frame.f_back
    return found


# --------------------------------------------------------------------------------------------- torch.cuda


STREAMS: list[Stream] = []


class Stream:
    """A stream on which everything is done at once; it knows which operations its own are ordered after.

    Attributes:
        clock: by number of a stream, how many of its operations the next operation of this one waits for.
    """

    device = torch.device("cuda", 0)
    cuda_stream = stream_id = device_index = 0
    device_type = 1
    count = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.number, self.clock = Stream.count, {Stream.count: 0}
        Stream.count += 1
        STREAMS.append(self)

    def wait_stream(self, other: Stream) -> None:
        self.wait_for(other.clock)

    def wait_event(self, event: Event) -> None:
        self.wait_for(event.clock)

    def wait_for(self, clock: dict[int, int]) -> None:
        for number, operations in clock.items():
            self.clock[number] = max(self.clock.get(number, 0), operations)

    def __enter__(self) -> Stream:
        self.outer, CURRENT[0] = CURRENT[0], self
        return self

    def __exit__(self, *raised: object) -> None:
        CURRENT[0] = self.outer

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.clock = dict(self.clock)
        return event

    def synchronize(self) -> None:
        RECORD.wait("a stream")
        order_after(self.clock)


CURRENT = [Stream()]  # the stream in which operations are queued


def order_after(*clocks: dict[int, int]) -> None:
    """Order what is queued from now on, in every stream, after what the host has waited for."""
    for clock in clocks:
        for stream in STREAMS:
            stream.wait_for(clock)


def synchronize(*args: Any) -> None:
    """torch.cuda.synchronize."""
    RECORD.wait("the device")
    order_after(*(dict(stream.clock) for stream in STREAMS))


class Access:
    """The last operation that wrote a memory, and those that have read it since, as (stream, its operation)."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage  # not freed, so that its address is not that of another one
        self.written: tuple[int, int] | None = None
        self.read: dict[int, int] = {}


ACCESSES: dict[int, Access] = {}


def note_access(function: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Record what an operation reads and writes, and where it does not wait for another stream."""
    if Stream.count == 1 or function.namespace == "prim":  # everything is in one order; a tensor's device is read
        return
    schema = function._schema
    if any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns):
        return  # a view
    given = [*zip(schema.arguments, args, strict=False)]
    given += [(argument, kwargs[argument.name]) for argument in schema.arguments if argument.name in kwargs]
    changed = [value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write]
    written = {id(leaf) for leaf in pytree.tree_leaves(changed)}
    stream = CURRENT[0]
    stream.clock[stream.number] += 1
    now = stream.number, stream.clock[stream.number]
    for leaf in pytree.tree_leaves((args, kwargs)):
        if is_fake(leaf) and leaf.device.type == "cuda":
            access(leaf, now, stream.clock, writes=id(leaf) in written, where=str(function))
    for leaf in pytree.tree_leaves(result):
        if is_fake(leaf) and leaf.device.type == "cuda" and id(leaf) not in written:
            access(leaf, now, stream.clock, writes=True, where=str(function))


def access(tensor: Tensor, now: tuple[int, int], clock: dict[int, int], *, writes: bool, where: str) -> None:
    """Record an access to a tensor's memory, and a race where an access before it is not waited for."""
    storage = tensor.untyped_storage()
    known = ACCESSES.setdefault(storage._cdata, Access(storage))
    before = [known.written] if known.written else []
    before += known.read.items() if writes else []
    if any(clock.get(number, 0) < operation for number, operation in before):
        own, inner = places()
        kind = "writes" if writes else "reads"
        RECORD.races.append(f"step {RECORD.step}: {where} {kind} {tuple(tensor.shape)} at {own or inner}")
    if writes:
        known.written, known.read = now, {}
    else:
        known.read[now[0]] = now[1]


class Event:
    """An event; times are counted in calls."""

    _clock = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.step, self.time, self.clock = RECORD.step, 0, dict[int, int]()

    def record(self, stream: Stream | None = None) -> None:
        Event._clock += 1
        self.step, self.time = RECORD.step, Event._clock
        self.clock = dict((stream or CURRENT[0]).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or CURRENT[0]).wait_for(self.clock)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        if self.step == RECORD.step:  # what an earlier step queued may be done by now, and later work is queued behind
            RECORD.wait("an event of this step")
        order_after(self.clock)

    def elapsed_time(self, other: Event) -> float:
        return float(other.time - self.time)


def set_data(tensor: Tensor, value: Tensor) -> None:
    """Tensor.data = value, also from real to fake and back, for which the two have to be exchanged."""
    if is_fake(tensor) == is_fake(value) and tensor.device == value.device:
        torch._C.TensorBase.data.__set__(tensor, value)
        return
    new = value.detach()
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
    swap_tensors(tensor, new)


def swap_tensors(first: Tensor, second: Tensor) -> None:
    """torch.utils.swap_tensors, without its refusal of weak references: FakeTensorMode has them to all of its tensors.

    Attributes that others have set stay at a tensor that changes from real to fake or back, as with Tensor.data.
    """
    mixed = is_fake(first) or is_fake(second)
    for name in copyreg._slotnames(type(first)):  # of a DTensor
        a, b = getattr(first, name), getattr(second, name)
        setattr(first, name, b)
        setattr(second, name, a)
    first.__class__, second.__class__ = second.__class__, first.__class__
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__
    if mixed:
        for name in (first.__dict__ | second.__dict__).keys() - FAKE_ATTRIBUTES:
            swap_attribute(first.__dict__, second.__dict__, name)
    torch._C._swap_tensor_impl(first, second)


def swap_attribute(first: dict[str, Any], second: dict[str, Any], name: str) -> None:
    values = first.pop(name, MISSING), second.pop(name, MISSING)
    for owner, value in zip((second, first), values, strict=True):
        if value is not MISSING:
            owner[name] = value


def install(devices: int, guard: ctypes.CDLL) -> None:
    """Make torch find GPUs; the process uses the first one.

    Args:
        devices: number of GPUs of the machine.
        guard: the library of guard.cpp.
    """

    def lock_pages(address: int, size: int, flags: int) -> int:
        guard.lock_pages(ctypes.c_void_p(address), ctypes.c_size_t(size))
        return 0

    properties = types.SimpleNamespace(
        name=NAME, total_memory=MEMORY, major=9, minor=0, multi_processor_count=132, gcnArchName=""
    )
    answers = {
        "is_available": True, "is_initialized": True, "device_count": devices, "current_device": 0,
        "get_device_name": NAME, "get_device_capability": (9, 0), "get_device_properties": properties,
        "get_arch_list": ["sm_90"], "is_bf16_supported": True, "is_current_stream_capturing": False,
        "default_stream": CURRENT[0], "memory_stats": {}, "mem_get_info": (MEMORY, MEMORY),
        "_is_in_bad_fork": False, "cudart": types.SimpleNamespace(cudaHostRegister=lock_pages),
    }  # fmt: skip
    answers |= dict.fromkeys(("init", "_lazy_init", "set_device", "empty_cache", "ipc_collect", "check_error"))
    answers |= dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"))
    answers |= dict.fromkeys(("reset_peak_memory_stats", "reset_max_memory_allocated"))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[name] = 0
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
    torch.cuda.synchronize = synchronize
    torch.cuda.Stream, torch.cuda.Event = Stream, Event
    torch.cuda.current_stream = lambda *args: CURRENT[0]
    torch.cuda.stream = lambda stream: stream if isinstance(stream, Stream) else contextlib.nullcontext()
    torch.cuda.device = lambda *args: contextlib.nullcontext()
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: None
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.data = property(torch._C.TensorBase.data.__get__, set_data)
    torch.utils.swap_tensors = swap_tensors
    torch.__future__.set_swap_module_params_on_conversion(True)  # a module keeps its parameters when it is moved
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1, device="cuda") is made on the host, and copied
    record_attention()
