"""The two experts of Wan2.2, one for each side of a noise level: which one is trained, and where it is. No torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from videox.diffusion.noise_window import NoiseWindow
from videox.errors import MODEL, UserError
from videox.models.config_files import read_json, read_yaml
from videox.models.configured import Component
from videox.run.checkpoint import read_manifest
from videox.weights.expert_names import EXPERTS

# Keys of a yaml that name the folders of the original layout, and the names in the published folders.
ORIGINAL_FOLDERS = {
    expert: (f"transformer_additional_kwargs.transformer_{expert}_model_subpath", f"{expert}_model")
    for expert in EXPERTS
}
BOUNDARY_KEY = "transformer_additional_kwargs.boundary"
BOTH = "both"  # value of --expert: the experts are trained one after the other, in the order of EXPERTS


def other_expert(expert: str) -> str:
    """Return the name of the other expert."""
    return next(name for name in EXPERTS if name != expert)


def check_expert(args: argparse.Namespace) -> None:
    """Check --expert, and the flags that both experts cannot share. Raises UserError."""
    if args.expert is None:
        hint = f"pass --expert {BOTH} to train one after the other, --expert {' or '.join(EXPERTS)}, or for TI2V-5B "
        hint += "--train_mode ti2v"
        raise UserError("--expert", "is required: Wan2.2 A14B has two transformers, and a run trains one", hint)
    if args.expert != BOTH:
        inside = Path(args.output_dir) / args.expert
        if (inside / "run_status.json").is_file():
            what = f"{args.output_dir} is of a run with --expert {BOTH}: that of this expert is in {inside}"
            raise UserError("--output_dir", what, f"pass {inside}, or --expert {BOTH}")
        return
    if args.other_transformer_path:
        what = f"contradicts --expert {BOTH}, where each expert is sampled with the other one"
        raise UserError("--other_transformer_path", what, "remove the flag")
    given = args.transformer_path
    if given and not all((Path(given) / folder / "config.json").is_file() for folder in EXPERTS.values()):
        what = f"{given} does not contain the folders {' and '.join(EXPERTS.values())}, one for each expert"
        raise UserError("--transformer_path", what, "pass a folder with both, or train one --expert at a time", MODEL)
    if args.resume_from_checkpoint not in (None, "latest"):
        what = f"{args.resume_from_checkpoint} is a checkpoint of one expert, and --expert is {BOTH}"
        hint = "pass latest, or --expert and --output_dir of the run that the checkpoint belongs to"
        raise UserError("--resume_from_checkpoint", what, hint)


def runs_of(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the flags of the runs that a command asks for: one run, or with --expert both one for each expert.

    Each of both has a folder inside --output_dir that is named for its expert.
    """
    if args.expert != BOTH:
        return [args]
    folder = Path(args.output_dir)
    return [argparse.Namespace(**{**vars(args), "expert": name, "output_dir": str(folder / name)}) for name in EXPERTS]


def window_of(expert: str, boundary: float) -> NoiseWindow:
    """Return the noise levels that an expert denoises: as WanPipeline decides, high noise from the boundary on."""
    return NoiseWindow(lowest=boundary) if expert == "high_noise" else NoiseWindow(end=boundary)


def read_index(root: Path) -> Component:
    """Return model_index.json of a Wan2.2 in diffusers layout.

    Raises:
        UserError: (MODEL) the model has one transformer.
    """
    index = read_json(root / "model_index.json")
    if index.get("boundary_ratio") is None:
        what = f"{root} has no boundary_ratio in its model_index.json: it is not a Wan2.2 of two experts"
        hint = "use scripts/wan2.1/train.py, or pass a Wan2.2 A14B model"
        if index.get("expand_timesteps"):
            hint = "it is TI2V-5B: pass --train_mode ti2v and no --expert"
        raise UserError("--pretrained_model_name_or_path", what, hint, MODEL)
    return Component(root, index)


def original_index(root: Path, yaml: str) -> Component:
    """Return what model_index.json would say of a model in the original layout: the boundary that the yaml has.

    Raises:
        UserError: the yaml has none.
    """
    from omegaconf import OmegaConf  # imported where a yaml is read, because it loads slowly

    boundary: Any = OmegaConf.select(read_yaml(yaml), BOUNDARY_KEY)
    if boundary is None:
        hint = f"set {BOUNDARY_KEY} in it: 0.875 for text-to-video, 0.9 for image-to-video"
        raise UserError("--config_path", f"{yaml} has no boundary between the two experts", hint)
    return Component(root, {"boundary_ratio": boundary})


def original_folders(root: Path, yaml: str) -> dict[str, Path]:
    """Return the folder of each expert inside a model in the original layout."""
    from omegaconf import OmegaConf

    content = read_yaml(yaml)
    return {
        expert: root / str(OmegaConf.select(content, key, default=published))
        for expert, (key, published) in ORIGINAL_FOLDERS.items()
    }


def boundary_of(index: Component, checkpoint: Path | None) -> float:
    """Return the noise level between the experts, 0 to 1: that of the model, or of the run that is resumed.

    Raises:
        UserError: (MODEL) it is not a number between 0 and 1.
    """
    stored = read_manifest(checkpoint)["description"].get("boundary") if checkpoint else None
    value = index.config["boundary_ratio"] if stored is None else stored
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        what = f"boundary_ratio is {value!r}, not a number between 0 and 1"
        raise UserError(str(index.path), what, "correct it: 0.875 for text-to-video, 0.9 for image-to-video", MODEL)
    return float(value)


def check_same_expert(expert: str, checkpoint: Path | None) -> None:
    """Check that a run resumes with the expert that it began with. Raises UserError (MODEL)."""
    stored = read_manifest(checkpoint)["description"].get("expert") if checkpoint else None
    if checkpoint and stored != expert:
        what = f"{expert}, {checkpoint.name} is of the {stored} expert" if stored else "the run has no experts"
        hint = f"pass --expert {stored}" if stored else "use the script that the run began with"
        hint += ", or start a new run in another --output_dir"
        raise UserError("--expert", what, hint, MODEL)


def check_window(window: NoiseWindow, shift: float, train_sampling_steps: int) -> None:
    """Check that some of the trained timesteps lie in the expert's window. Raises UserError."""
    if not window.steps(shift, train_sampling_steps):
        what = f"{train_sampling_steps}: none of these noisiest timesteps is in the expert's window"
        raise UserError("--train_sampling_steps", what, "remove the flag: an expert trains its whole window")
