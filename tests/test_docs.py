"""Tests of the documents: every command is valid, every snippet runs, figures match the code, and links resolve."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import runs
import tiny
import torch
from accelerate.commands.launch import launch_command_parser
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from videox.diffusion.conditioning import CLIP_MASKS, IMAGE_DROP, IMAGE_MASKS, MAX_BOXES
from videox.training.prompts import OPTIONS, read_prompts
from videox.weights.expert_names import EXPERTS

ROOT = tiny.ROOT
WAN_PAGE, HUNYUAN_PAGE = "scripts/wan2.1/README_TRAIN.md", "scripts/hunyuanvideo/README_TRAIN.md"
EXPERTS_PAGE = "scripts/wan2.2/README_TRAIN.md"
PAGES = (
    "README.md", WAN_PAGE, HUNYUAN_PAGE, "scripts/README_FROM_VIDEOX_FUN.md", "docs/dry_run.md", "docs/cache.md",
    "docs/walkthroughs.md", "docs/samples.md", EXPERTS_PAGE,
)  # fmt: skip
# Pages without commands of their own, whose links are checked, too.
LINKED = (
    "models/README.md", "datasets/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/how_it_works.md", "docs/flow_shift.md",
    "docs/sizes.md", "docs/defaults.md", "docs/speed.md", "docs/timesteps.md",
    "docs/map.md", "docs/import_graph.md", "benchmarks/README.md", "benchmarks/families.md",
)  # fmt: skip
# Variables that a cluster sets in the shell where the command for several machines is run.
CLUSTER = {
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "10086", "WORLD_SIZE": "2", "NUM_PROCESS": "16", "RANK": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command of a document, split into words as by the shell, with variables substituted."""

    page: str
    words: tuple[str, ...]

    @property
    def is_launch(self) -> bool:
        return self.words[:2] == ("accelerate", "launch")

    @property
    def split(self) -> tuple[list[str], str, list[str]]:
        """The launcher's flags, the script, the script's flags."""
        script = next(i for i, word in enumerate(self.words) if word.endswith(".py"))
        return list(self.words[2:script]), self.words[script], list(self.words[script + 1 :])

    @property
    def family(self) -> str:
        return next(family for family, script in runs.TRAIN_SCRIPTS.items() if script == self.split[1])

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)[:400]}"


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), flags=re.DOTALL | re.MULTILINE)


def substitute(word: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$([A-Z_]+)", lambda match: variables[match[1]], word)


def commands(page: str) -> list[Command]:
    """Return the commands of a page in order; variables exported on the page are substituted in later commands."""
    variables, commands = dict(CLUSTER), []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [substitute(word, variables) for word in shlex.split(line, comments=True)]
            if words[:1] == ["export"]:
                variables |= dict(word.split("=", 1) for word in words[1:])
            elif words:
                commands.append(Command(page, tuple(words)))
    return commands


COMMANDS = [command for page in PAGES for command in commands(page)]
LAUNCHES = [command for command in COMMANDS if command.is_launch and "--recipe" not in command.words]


def name_of(command: Command) -> str:
    launcher, _, flags = command.split
    mode = next(flag.split("=")[1] for flag in flags if flag.startswith("--train_mode="))
    several = "machines" if any("num_machines" in flag for flag in launcher) else ""
    return "-".join(filter(None, (command.page.split("/")[-2] if "/" in command.page else "root", command.family, mode,
                                  several or ("ddp" if "--multi_gpu" in launcher else "plain"))))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ commands


def test_the_pages_have_the_published_recipes() -> None:
    assert {name_of(command) for command in LAUNCHES} == {
        "root-wan2.1-normal-plain", "wan2.1-wan2.1-normal-plain", "wan2.1-wan2.1-normal-ddp",
        "wan2.1-wan2.1-normal-machines", "wan2.1-wan2.1-i2v-ddp", "wan2.1-wan2.1-inpaint-plain",
        "hunyuanvideo-hunyuanvideo-normal-plain", "hunyuanvideo-hunyuanvideo-normal-ddp",
        "hunyuanvideo-hunyuanvideo-i2v-ddp", "wan2.2-wan2.2-normal-ddp",
    }  # fmt: skip


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in LAUNCHES], ids=lambda c: shlex.join(c.words))
def test_a_command_is_valid(command: Command) -> None:
    if command.words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", text("Makefile"), flags=re.MULTILINE)
        assert command.words[1] in targets, command
        variables = [word.split("=")[0] for word in command.words[2:]]
        assert all(re.search(rf"^{name} \?=", text("Makefile"), flags=re.MULTILINE) for name in variables), command
    elif command.is_launch:  # test_recipes trains the recipes
        launcher, script, flags = command.split
        parsed = launch_command_parser().parse_args([*launcher, script, *flags])
        assert (ROOT / parsed.config_file).is_file(), command
        recipe = command.words[command.words.index("--recipe") + 1]
        written = (ROOT / "config/recipes" / command.family / f"{recipe}.yaml").read_text(encoding="utf-8")
        assert f"--config_file {parsed.config_file} " in written  # the launch line of the recipe
        assert runs.train_script(command.family).parse_args(flags).mixed_precision == "bf16"
    elif command.words[0] == "bash":
        assert (ROOT / command.words[1]).is_file(), command
        family = Path(command.words[1]).parent.name  # the script passes further words to the trainer, where they win
        published = next(launch for launch in LAUNCHES if launch.family == family)
        runs.train_script(family).parse_args([*published.split[2], *command.words[2:]])
    elif command.words[1] in runs.TRAIN_SCRIPTS.values():  # test_a_command_without_a_launcher_trains_a_small_model
        assert runs.train_script(command.family).parse_args(command.split[2]).mixed_precision == "bf16"
    elif command.words[:2] == ("python", "scripts/zero_to_bf16.py"):
        # runs with real checkpoints and the same flags are in test_zero_to_bf16.py
        flags = tiny.load_script("scripts/zero_to_bf16.py").parse_flags(list(command.words[2:]))
        assert flags.output_dir.name == f"{flags.checkpoint_dir.name}-outputs"
    elif command.words[:2] == ("python", "scripts/cache.py"):  # its effect is in test_cache.py
        assert tiny.load_script("scripts/cache.py").parse_args(list(command.words[2:])).cache.name == "cache"
    elif command.words[:2] == ("python", "scripts/sample.py"):  # runs with real weights are in test_sample_script.py
        flags = tiny.load_script("scripts/sample.py").parse_flags(list(command.words[2:]))
        assert flags.source.name in ("mine", "checkpoint-500", "lora.safetensors") and read_prompts(flags.prompt)
    elif command.words[:2] == ("python", "scripts/export.py"):
        # runs with real weights are in test_export.py
        script = tiny.load_script("scripts/export.py")
        flags = script.parse_flags(list(command.words[2:]))
        script.check_output(flags.source, flags.output, flags.layout)
    else:
        assert command.words == ("source", ".venv/bin/activate"), f"{command}: this command is unknown to the test"


@pytest.mark.parametrize("command", LAUNCHES, ids=name_of)
def test_a_launch_is_accepted_by_launcher_and_train_script(command: Command) -> None:
    launcher, script, flags = command.split
    parsed = launch_command_parser().parse_args([*launcher, script, *flags])
    assert parsed.training_script == script and parsed.mixed_precision == "bf16"
    assert (parsed.num_processes or 1) > 1 if "--multi_gpu" in launcher else parsed.num_processes is None
    args = runs.train_script(command.family).parse_args(flags)
    assert args.mixed_precision == "bf16" and args.max_grad_norm == 0.05
    folder = Path(args.pretrained_model_name_or_path)
    assert f"`{folder}`" in text("models/README.md")  # the page on weights lists this folder
    assert f"{args.train_data_dir}" in text("datasets/README.md")
    assert Path(args.train_data_meta) == Path(args.train_data_dir) / "metadata.json"


@pytest.mark.parametrize("page", [WAN_PAGE, EXPERTS_PAGE, HUNYUAN_PAGE])
def test_every_launch_script_is_on_its_page(page: str) -> None:
    scripts = (ROOT / page).parent.glob("train_*.sh")
    assert not [script.name for script in scripts if f"bash {script.relative_to(ROOT)}" not in text(page)]


def test_every_launch_has_the_published_flags() -> None:
    """The tests train the published command flag by flag at small sizes, so the pages must show the same flags."""
    paths = {"pretrained_model_name_or_path", "train_data_dir", "train_data_meta", "output_dir"}
    for command in LAUNCHES:
        names = {word[2:].split("=")[0] for word in command.split[2] if word.startswith("--")}
        assert names == paths | set(runs.FAMILY_FLAGS[command.family]), command


# Flags that make a published command small.
SMALL = {
    "image_sample_size": 96, "video_sample_size": 64, "token_sample_size": 64, "video_sample_n_frames": 13,
    "video_sample_stride": 2, "dataloader_num_workers": 2, "num_train_epochs": 1, "report_to": "none",
    "report_seconds": 0,
}  # fmt: skip
MODELS: dict[tuple[str, str], Callable[[Path], Path]] = {
    ("wan2.1", "normal"): tiny.build_wan_t2v,
    ("wan2.1", "i2v"): tiny.build_wan_i2v,
    ("wan2.1", "inpaint"): tiny.build_wan_i2v,
    ("wan2.2", "normal"): tiny.build_wan22_t2v,
    ("hunyuanvideo", "normal"): tiny.build_hunyuan_t2v,
    ("hunyuanvideo", "i2v"): tiny.build_hunyuan_i2v,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in LAUNCHES if "machines" not in name_of(c)], ids=name_of)
def test_a_published_launch_trains_a_small_model(command: Command, tmp_path: Path) -> None:
    launcher, _, flags = command.split
    mode = runs.train_script(command.family).parse_args(flags).train_mode
    metadata = tiny.make_dataset(tmp_path / "data")
    paths = {
        "pretrained_model_name_or_path": MODELS[command.family, mode](tmp_path / "model"),
        "train_data_dir": metadata.parent, "train_data_meta": metadata, "output_dir": tmp_path / "out",
    }  # fmt: skip
    launcher = ["--num_processes=2" if word == "--num_processes=8" else word for word in launcher]
    launched = runs.launch(replaced(flags, {**paths, **SMALL}), launcher, family=command.family)
    experts = EXPERTS if command.family == "wan2.2" else {"": "transformer"}
    assert launched.code == 0, launched.stderr
    expert, weights = list(experts.items())[-1]
    outcome = replace(launched, folder=tmp_path / "out" / expert)  # --output_dir= is one word
    assert outcome.status["state"] == "finished" and outcome.metrics
    assert f"processes   {2 if '--multi_gpu' in launcher else 1}\n" in outcome.stdout
    assert runs.read_weights(outcome.folder / weights)


@pytest.mark.slow
def test_a_command_without_a_launcher_trains_a_small_model(tmp_path: Path) -> None:
    plain = [c for c in COMMANDS if c.words[0] == "python" and c.words[1] in runs.TRAIN_SCRIPTS.values()]
    (command,) = (c for c in plain if "--recipe" not in c.words)  # test_recipes trains the recipes
    metadata = tiny.make_dataset(tmp_path / "data")
    paths = {
        "pretrained_model_name_or_path": MODELS[command.family, "normal"](tmp_path / "model"),
        "train_data_meta": metadata, "output_dir": tmp_path / "out", "lora_rank": 2,
    }  # fmt: skip
    flags = replaced(command.split[2], {**paths, **SMALL})
    outcome = runs.run_command([sys.executable, command.words[1], *flags], tmp_path / "out")
    assert outcome.code == 0, outcome.stderr
    assert outcome.status["state"] == "finished" and "processes   1\n" in outcome.stdout
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def replaced(flags: list[str], values: dict[str, object]) -> list[str]:
    """Return the flags with these values; values whose flag is not among them come first."""
    argv = [
        f"{word.split('=')[0]}={values[word[2:].split('=')[0]]}" if word[2:].split("=")[0] in values else word
        for word in flags
    ]
    names = {word[2:].split("=")[0] for word in flags}
    return [*runs.to_argv({name: value for name, value in values.items() if name not in names}), *argv]


def test_the_page_on_samples_has_every_option_of_a_prompt() -> None:
    page = text("docs/samples.md")
    assert not [option.field for option in OPTIONS if f"`--{option.names[0]}`" not in page]
    assert not [option.field for option in OPTIONS if f"`{option.field}`" not in page]


# ------------------------------------------------------------------------------------------------------------ snippets

SNIPPETS = [(page, code) for page in PAGES for code in blocks(page, "python")]
FOLDERS = {
    "Wan2.1-T2V-1.3B": tiny.build_wan_t2v, "Wan2.1-T2V-14B": tiny.build_wan_t2v,
    "Wan2.1-I2V-14B-480P": tiny.build_wan_i2v,
    "HunyuanVideo": tiny.build_hunyuan_t2v, "HunyuanVideo-I2V": tiny.build_hunyuan_i2v,
}  # fmt: skip
ON_THE_HUB = {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "Wan2.1-T2V-1.3B"}  # ids in snippets -> their folders


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(SNIPPETS)])
def test_a_snippet_runs(page: str, code: str, tmp_path: Path) -> None:
    """Only paths, sizes and the device are replaced; the model is a small one of the same class."""
    for hub_id, folder in ON_THE_HUB.items():
        code = code.replace(f'"{hub_id}"', f'"models/Diffusion_Transformer/{folder}"')
    (name,) = set(re.findall(r'"models/Diffusion_Transformer/([^"/]+)"', code))
    model = FOLDERS[name](tmp_path / "model")
    image = tiny.write_image(tmp_path / "first_frame.png")
    for pattern, replacement in (
        (rf'"models/Diffusion_Transformer/{name}"', f'"{model}"'),
        (r'"outputs/[a-z0-9_]+/transformer"', f'"{model / "transformer"}"'),
        (r'"datasets/internal_datasets/[a-z_]+\.png"', f'"{image}"'),
        (r"\bheight=\d+", "height=48"), (r"\bwidth=\d+", "width=64"), (r"\bnum_frames=\d+", "num_frames=9"),
        ('"cuda"', '"cpu"'),
    ):  # fmt: skip
        code = re.sub(pattern, replacement, code)
    lora = str(tmp_path / "lora.safetensors")
    if "load_lora_weights" in code:
        code = re.sub(r"outputs/\w+/pytorch_lora_weights\.safetensors", lora, code)
        weight = WanTransformer3DModel.from_pretrained(model / "transformer").blocks[0].attn1.to_q.weight
        layer, (rows, columns) = "transformer.blocks.0.attn1.to_q", weight.shape
        adapter = {"lora_A": torch.zeros(2, columns), "lora_B": torch.zeros(rows, 2)}
        save_file({f"{layer}.{name}.weight": tensor for name, tensor in adapter.items()}, lora)
    assert "models/" not in code and "outputs/" not in code and "datasets/" not in code
    names: dict[str, object] = {}
    with contextlib.chdir(tmp_path):
        exec(compile(code, page, "exec"), names)
    pipeline = names["pipeline"]
    assert isinstance(pipeline, DiffusionPipeline)
    assert pipeline.transformer.peft_config if lora in code else pipeline.transformer is names["transformer"]
    assert pipeline.transformer.dtype is torch.bfloat16
    if "frames" in names:
        assert isinstance(names["image"], Image.Image) and len(names["frames"]) == 9
        assert (tmp_path / "sample.mp4").stat().st_size > 0
    else:
        assert "export_to_video" not in code


# ------------------------------------------------------------------------------------------------------------- figures

MODULES = {WAN_PAGE: "attn1", HUNYUAN_PAGE: "attn"}
WAN_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
TRANSFORMERS: dict[str, Callable[[], torch.nn.Module]] = {
    "Wan2.1-T2V-1.3B": lambda: wan(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30),
    "Wan2.1-T2V-14B": lambda: wan(**WAN_14B),
    "Wan2.1-I2V-14B": lambda: wan(**WAN_14B, in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    "HunyuanVideo": HunyuanVideoTransformer3DModel,
    "HunyuanVideo-I2V, token_replace": lambda: HunyuanVideoTransformer3DModel(image_condition_type="token_replace"),
    "HunyuanVideo-I2V, latent_concat": lambda: HunyuanVideoTransformer3DModel(
        in_channels=33, out_channels=16, image_condition_type="latent_concat", guidance_embeds=False
    ),
}


def wan(**sizes: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(out_channels=16, qk_norm="rms_norm_across_heads", cross_attn_norm=True, **sizes)


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128320, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip


def vision(**sizes: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(num_attention_heads=16, patch_size=14, **sizes)


def umt5() -> UMT5EncoderModel:
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return UMT5EncoderModel(UMT5Config(vocab_size=256384, feed_forward_proj="gated-gelu", **sizes))


def llava() -> LlavaForConditionalGeneration:
    vision_config = vision(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=336)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=llama(), vision_config=vision_config))


ENCODERS: dict[str, Callable[[], torch.nn.Module]] = {
    "UMT5-XXL (text)": umt5,
    "CLIP ViT-H (image encoder)": lambda: CLIPVisionModel(
        vision(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, image_size=224)
    ),
    "Llama 3 8B (text-to-video)": lambda: LlamaModel(llama()),
    "Llava Llama 3 8B (image-to-video)": llava,
    "CLIP ViT-L text (pooled)": lambda: CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    ),
    f"VAE {WAN_PAGE}": AutoencoderKLWan,
    f"VAE {HUNYUAN_PAGE}": AutoencoderKLHunyuanVideo,
}


def table(page: str, first: str) -> list[list[str]]:
    """Return the rows, without the header, of the table whose first column is named `first`."""
    lines = text(page).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("page", [WAN_PAGE, HUNYUAN_PAGE])
def test_documented_transformer_memory_matches_the_classes(page: str) -> None:
    for name, parameters, full_memory, partial_memory in table(page, "model"):
        with torch.device("meta"):
            sizes = {key: p.numel() for key, p in TRANSFORMERS[name]().named_parameters()}
        count, trainable = sum(sizes.values()), sum(size for key, size in sizes.items() if MODULES[page] in key)
        assert parameters == f"{count / 1e9:.2f} billion", name
        assert full_memory == f"{16 * count / 2**30:.0f} GiB", name
        assert partial_memory == f"{(4 * count + 12 * trainable) / 2**30:.0f} GiB", name
    assert f"--trainable_modules {MODULES[page]}" in text(page)


@pytest.mark.parametrize("page", [WAN_PAGE, HUNYUAN_PAGE])
def test_documented_encoder_memory_matches_the_classes(page: str) -> None:
    rows = table(page, "encoder")
    assert len(rows) >= 3
    for name, parameters, memory in rows:
        with torch.device("meta"):
            count = sum(p.numel() for p in ENCODERS.get(name, ENCODERS.get(f"{name} {page}"))().parameters())
        size, precision = memory.split(" GiB in ")
        assert parameters == f"{count / 1e9:.2f} billion", name
        assert size == f"{count * {'bf16': 2, 'float32': 4}[precision] / 2**30:.1f}", name


def test_documented_mask_shares_match_the_code() -> None:
    page = text(WAN_PAGE)
    names = {
        "first": "first frame", "first_and_last": "first and last frame", "boxes": "all but one to four boxes",
        "frames": "some frames", "nothing": "nothing",
    }  # fmt: skip
    clips, images = (
        ", ".join(f"{names[family]} {100 * share:.0f} %" for family, share in shares.items())
        for shares in (CLIP_MASKS, IMAGE_MASKS)
    )
    assert f"drawn per sample: {clips} | {images} |" in page
    assert f"Images without known pixels have conditioning dropout {IMAGE_DROP:g}" in page
    assert MAX_BOXES == 4


def test_links_resolve() -> None:
    for page in (*PAGES, *LINKED):
        for target in re.findall(r"\]\(([^)]+)\)", text(page)):
            file, _, anchor = target.partition("#")
            if file.startswith("http"):
                continue
            linked = (ROOT / page).parent / file if file else ROOT / page
            assert linked.exists(), f"{page}: {target}"
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in anchors, f"{page}: {target}"
