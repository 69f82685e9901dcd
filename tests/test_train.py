"""Serves scripts/wan2.1/train.py: the users' command runs whole, and a step is what the formulas say, to the bit."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import runs
import tiny
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.optimization import get_scheduler
from PIL import Image

from videox.data.buckets import Fate

METRICS_KEYS = {
    "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "data_wait", "rows", "buckets",
}  # fmt: skip
CLOCK = ("tokens_per_second", "data_wait")  # what a run's metrics do not share with an equal run
FLOAT32 = {"mixed_precision": "no", "gradient_checkpointing": None}
RATE, CLIP, DECAY, EPSILON = 2e-3, 0.05, 3e-2, 1e-10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_wan_t2v(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"), copies=2)


def numbers(outcome: runs.Outcome) -> list[dict]:
    """Returns the metrics without what the clock measured."""
    return [{name: value for name, value in record.items() if name not in CLOCK} for record in outcome.metrics]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------- the users' command


@pytest.fixture(scope="module")
def launched(model: Path, metadata: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Outcome:
    """Returns the users' command as they launch it, with two decoding processes, over an epoch's end."""
    argv = runs.wan_plain(
        model, metadata, tmp_path_factory.mktemp("runs") / "out",
        dataloader_num_workers=2, num_train_epochs=2, checkpointing_steps=10,
    )  # fmt: skip
    return runs.launch(argv, ["--mixed_precision=bf16"])


@pytest.mark.slow
def test_the_users_command_ends_well(launched: runs.Outcome, metadata: Path) -> None:
    assert launched.code == 0, launched.stderr
    rows = len(json.loads(metadata.read_text(encoding="utf-8")))
    records = launched.metrics
    assert [record["step"] for record in records] == list(range(1, 2 * rows + 1))
    assert all(record.keys() == METRICS_KEYS for record in records)
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records)
    for epoch in (records[:rows], records[rows:]):
        assert sorted(row for record in epoch for row in record["rows"]) == list(range(rows))
    for record in records:
        ((frames, height, width),) = record["buckets"]
        assert record["tokens"] == ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
    status = launched.status
    assert (status["state"], status["exit_code"], status["step"], status["error"]) == ("finished", 0, 2 * rows, "")
    told = json.loads((launched.folder / "args.json").read_text(encoding="utf-8"))
    assert told["asked"]["video_sample_n_frames"] == 9
    assert (told["resolved"]["seed"], told["resolved"]["slots"], told["resolved"]["shift"]) == (42, 1, 5.0)
    saved = sorted(path.name for path in launched.folder.glob("checkpoint-*"))
    assert saved == ["checkpoint-10", "checkpoint-20", f"checkpoint-{2 * rows}"]


@pytest.mark.slow
def test_diffusers_samples_from_what_the_users_command_made(launched: runs.Outcome, model: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(launched.folder / "transformer")
    pipeline = WanPipeline.from_pretrained(model, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 3, "output_type": "np"}
    frames = pipeline("a rabbit walks", generator=torch.Generator().manual_seed(0), **size).frames
    assert frames.shape == (1, 9, 48, 64, 3) and np.isfinite(frames).all()
    base = runs.read_weights(model / "transformer")
    trained = launched.weights()
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[name].float(), base[name].bfloat16().float()) for name in base)


@pytest.mark.slow
def test_a_launch_and_a_run_in_this_process_are_the_same_run(
    launched: runs.Outcome, model: Path, metadata: Path, tmp_path: Path
) -> None:
    argv = runs.wan_plain(model, metadata, tmp_path / "out", num_train_epochs=2, checkpointing_steps=10)
    here = runs.train(argv)  # decodes in the loop, where the launched one has two workers
    assert numbers(here) == numbers(launched)
    assert equal(here.weights(), launched.weights())


# ----------------------------------------------------------------------------------- a step, computed once more


def stepwise(model: Path, metadata: Path, output_dir: Path, **changes: object) -> runs.Outcome:
    """Returns four optimizer steps in float32, each of two micro-batches of two samples, all of them dumped."""
    settings = {
        **FLOAT32, "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 4,
        "checkpointing_steps": 4, "vae_sample_mode": "mode", "dump_steps": [1, 2, 3, 4], **changes,
    }  # fmt: skip
    outcome = runs.train(runs.wan_plain(model, metadata, output_dir, **settings))
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def stepped(model: Path, metadata: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Outcome:
    return stepwise(model, metadata, tmp_path_factory.mktemp("stepped") / "out")


def dumps_of(outcome: runs.Outcome) -> list[list[runs.Dump]]:
    """Returns the dumped micro-batches of each step."""
    steps = range(1, 1 + len(outcome.metrics))
    return [[outcome.dump(step, micro) for micro in range(2)] for step in steps]


def real(dump: runs.Dump) -> list[int]:
    """Returns the positions of a micro-batch that are no padding."""
    return [position for position, row in enumerate(dump.rows) if row >= 0]


def decode(path: Path, frames: list[int]) -> np.ndarray:
    """Decodes a file from its first to its last frame and returns the frames asked for."""
    if path.suffix in (".png", ".jpg"):
        return np.asarray(Image.open(path).convert("RGB"))[None]
    with av.open(str(path)) as container:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return whole[frames]


def cover(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Scales frames in float until they cover height x width and cuts the centre: float32 [T, height, width, 3]."""
    scale = max(height / frames.shape[1], width / frames.shape[2])
    size = (max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale)))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    scaled = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1)


def test_the_dumped_pixels_are_the_named_frames(stepped: runs.Outcome, metadata: Path) -> None:
    table = json.loads(metadata.read_text(encoding="utf-8"))
    kinds = Counter()
    for dump in (dump for step in dumps_of(stepped) for dump in step):
        for position in real(dump):
            row, indices = table[dump.rows[position]], dump.frame_indices[position]
            frames, height, width = dump.bucket
            assert len(indices) == frames and all(b - a == 2 for a, b in zip(indices, indices[1:], strict=False))
            wanted = cover(decode(metadata.parent / row["file_path"], indices), height, width)
            assert (dump["pixels"][position].float() - wanted).abs().max() <= 3
            assert dump.captions[position] in (row["text"], "")
            kinds[row["type"]] += 1
    assert kinds["video"] >= 3 and kinds["image"] >= 2


def test_the_schedule_of_the_dump_is_that_of_the_metrics(stepped: runs.Outcome) -> None:
    for record, step in zip(stepped.metrics, dumps_of(stepped), strict=True):
        assert [dump.rows[i] for dump in step for i in real(dump)] == record["rows"]
        assert [dump.bucket for dump in step for _ in real(dump)] == record["buckets"]
        weights = torch.cat([dump["weight"][real(dump)] for dump in step])
        assert weights.tolist() == [1 / len(record["rows"])] * len(record["rows"])
        assert all(dump["weight"][i] == 0 for dump in step for i, row in enumerate(dump.rows) if row < 0)


def posterior(model: Path, dump: runs.Dump) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the posterior's mean and standard deviation on dumped pixels, and the latents' mean and deviation."""
    vae = AutoencoderKLWan.from_pretrained(model / "vae").eval()
    with torch.no_grad():
        found = vae.encode(dump["pixels"].permute(0, 4, 1, 2, 3).float() / 255 * 2 - 1).latent_dist
    middle, spread = (
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return found.mean, found.std, middle, spread


def test_the_dumped_latents_are_those_of_the_autoencoder(stepped: runs.Outcome, model: Path) -> None:
    for dump in (dump for step in dumps_of(stepped) for dump in step):
        mean, _, middle, spread = posterior(model, dump)
        assert torch.allclose(dump["latents"], (mean - middle) / spread, rtol=0, atol=1e-5)


def test_the_prompt_embeddings_are_those_of_the_pipeline(stepped: runs.Outcome, model: Path) -> None:
    pipeline = WanPipeline.from_pretrained(model, transformer=None, vae=None)
    for dump in (dump for step in dumps_of(stepped) for dump in step):
        with torch.no_grad():
            wanted, _ = pipeline.encode_prompt(dump.captions, do_classifier_free_guidance=False)
        assert wanted.shape[1] == 512
        assert torch.equal(dump["model.encoder_hidden_states"], wanted)
        length = len(pipeline.tokenizer(dump.captions[0])["input_ids"])
        assert not dump["model.encoder_hidden_states"][0, length:].any()


def test_sigmas_are_stratified_over_the_step_and_shifted(stepped: runs.Outcome) -> None:
    for step in dumps_of(stepped):
        sigma = torch.cat([dump["sigma"][real(dump)] for dump in step]).double()
        assert torch.equal(
            torch.cat([dump["timestep"] for dump in step]), 1000 * torch.cat([d["sigma"] for d in step])
        )
        place = 1000 * (1 - sigma / (5 - 4 * sigma))  # sigma = 5 t / (1 + 4 t), t = 1 - place / 1000
        assert (place - place.round()).abs().max() < 1e-2  # one of 1000 timesteps
        grid = sorted(place.round().long().tolist())
        assert torch.allclose(sigma, 5 * (1 - place.round() / 1000) / (1 + 4 * (1 - place.round() / 1000)), atol=1e-7)
        for stratum, index in enumerate(grid):  # each sample lies in a share of the range that only it has
            assert 1000 * stratum / len(grid) - 1 < index < 1000 * (stratum + 1) / len(grid)


def key_of(*parts: int) -> int:
    """Returns the key of a combination of whole numbers: splitmix64's finaliser, folded over them."""
    key, top = 0, 2**64
    for part in parts:
        key = (key * 0xD1342543DE82EF95 + part + 0x9E3779B97F4A7C15) % top
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % top
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB % top
        key ^= key >> 31
    return key


def noise_of(key: int, shape: torch.Size) -> torch.Tensor:
    drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(drawn)


SAMPLE, POSTERIOR, NOISE = 1, 13, 14  # purposes of a key


def test_noise_is_normal_and_of_each_samples_own_key(stepped: runs.Outcome) -> None:
    pool = []
    for dump in (dump for step in dumps_of(stepped) for dump in step):
        for i in real(dump):
            sample = key_of(42, 0, dump.rows[i], 0, SAMPLE)  # seed, epoch, row, copy
            assert torch.equal(dump["noise"][i], noise_of(key_of(sample, NOISE), dump["noise"][i].shape))
            pool.append(dump["noise"][i].flatten())
    values = torch.cat(pool)
    share = len(values) ** -0.5  # one standard error of the mean
    assert abs(values.mean()) < 4 * share and abs(values.std() - 1) < 4 * share
    assert abs((values.abs() < 1).float().mean() - 0.6827) < 4 * share and abs(values.pow(4).mean() - 3) < 40 * share
    starts = torch.stack([noise[:192] for noise in pool])
    assert (torch.corrcoef(starts) - torch.eye(len(starts))).abs().max() < 0.4


def test_a_posteriors_sample_is_its_mean_and_keyed_noise(model: Path, metadata: Path, tmp_path: Path) -> None:
    outcome = stepwise(model, metadata, tmp_path / "out", vae_sample_mode="sample", max_train_steps=1, dump_steps=[1])
    far = 0.0
    for dump in dumps_of(outcome)[0]:
        mean, deviation, middle, spread = posterior(model, dump)
        for i in real(dump):
            key = key_of(key_of(42, 0, dump.rows[i], 0, SAMPLE), POSTERIOR)
            z = mean[i] + deviation[i] * noise_of(key, mean.shape[1:])
            assert torch.allclose(dump["latents"][i], ((z - middle) / spread)[0], rtol=0, atol=1e-5)
            far = max(far, float((dump["latents"][i] - ((mean[i] - middle) / spread)[0]).abs().max()))
    assert far > 1e-3  # so that the mean alone would not pass


def test_plain_torch_gives_the_same_losses_and_weights(stepped: runs.Outcome, model: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(model / "transformer").train()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=RATE, weight_decay=DECAY, eps=EPSILON)
    warm_up = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=2)
    for record, step in zip(stepped.metrics, dumps_of(stepped), strict=True):
        assert record["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        total = 0.0
        for dump in step:
            sigma = dump["sigma"].view(-1, 1, 1, 1, 1)
            noisy = (1 - sigma) * dump["latents"] + sigma * dump["noise"]
            assert torch.equal(noisy, dump["model.hidden_states"])
            target = dump["noise"] - dump["latents"]
            assert torch.equal(target, dump["target"])
            velocity = transformer(noisy, dump["timestep"], dump["model.encoder_hidden_states"]).sample
            assert torch.allclose(velocity, dump["prediction"], atol=1e-6)
            losses = torch.nn.functional.mse_loss(velocity, target, reduction="none").mean(dim=(1, 2, 3, 4))
            assert torch.allclose(losses, dump["loss"], atol=1e-6)
            loss = (losses * dump["weight"]).sum()
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(record["loss"], abs=1e-6)
        norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), CLIP)
        assert norm.item() == pytest.approx(record["grad_norm"], rel=1e-5) and norm > 4 * CLIP  # clipping binds
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()
    saved, base = stepped.weights("checkpoint-4/transformer"), runs.read_weights(model / "transformer")
    for name, tensor in transformer.state_dict().items():
        assert torch.allclose(tensor, saved[name], rtol=0, atol=1e-6), name
    assert max((saved[name] - base[name]).abs().max() for name in base) > RATE  # and they had moved far more


def test_a_dump_changes_nothing(stepped: runs.Outcome, model: Path, metadata: Path, tmp_path: Path) -> None:
    without = stepwise(model, metadata, tmp_path / "out", dump_steps=None)
    assert not (without.folder / "dump").exists()
    assert numbers(without) == numbers(stepped)
    assert equal(without.weights("checkpoint-4/transformer"), stepped.weights("checkpoint-4/transformer"))


# ------------------------------------------------------------------------------------------ what is trained


def changed(outcome: runs.Outcome, model: Path, step: int) -> set[str]:
    """Returns the names of the tensors that a run's checkpoint does not share, to the bit, with the base model."""
    base, now = runs.read_weights(model / "transformer"), outcome.weights(f"checkpoint-{step}/transformer")
    assert base.keys() == now.keys()
    return {name for name in base if not torch.equal(base[name], now[name])}


def test_a_dot_trains_everything_the_top_level_table_too(stepped: runs.Outcome, model: Path) -> None:
    names = set(runs.read_weights(model / "transformer"))
    assert "scale_shift_table" in names
    assert changed(stepped, model, 4) == names


def test_chosen_modules_leave_the_rest_alone(model: Path, metadata: Path, tmp_path: Path) -> None:
    argv = runs.wan_plain(model, metadata, tmp_path / "out", **FLOAT32, max_train_steps=3, trainable_modules=["attn1"])
    names = set(runs.read_weights(model / "transformer"))
    assert changed(runs.train(argv), model, 3) == {name for name in names if "attn1" in name}


def test_the_low_rate_list_gets_half(model: Path, metadata: Path, tmp_path: Path) -> None:
    rate = 0.25  # of which float32 keeps enough digits after it is added to a weight
    settings = {
        **FLOAT32, "max_train_steps": 1, "lr_warmup_steps": 0, "learning_rate": rate, "adam_weight_decay": 0,
        "trainable_modules": ["attn1"], "trainable_modules_low_learning_rate": ["ffn", "attn1.to_q"],
    }  # fmt: skip
    outcome = runs.train(runs.wan_plain(model, metadata, tmp_path / "out", **settings))
    base, now = runs.read_weights(model / "transformer"), outcome.weights("checkpoint-1/transformer")
    assert changed(outcome, model, 1) == {name for name in base if "attn1" in name or "ffn" in name}
    for name in base:  # Adam's first step is the rate itself, whatever the gradient
        wanted = rate * ("attn1" in name) or rate / 2 * ("ffn" in name)
        assert (now[name] - base[name]).abs().median().item() == pytest.approx(wanted, rel=1e-4), name


# ------------------------------------------------------------------------------------------ one epoch


def mixed_data(folder: Path) -> Path:
    """Writes 17 good rows of three lengths and four aspect ratios, and one row of each kind that cannot be trained."""
    media = [
        (f"clip-{number}.mp4", *size, frames, 24.0)
        for number, (size, frames) in enumerate(
            (size, frames) for size in ((128, 128), (160, 96), (96, 160), (144, 112)) for frames in (9, 17, 33)
        )
    ]
    images = [(f"image-{number}.png", 96 + 32 * number, 128, 0, 0.0) for number in range(5)]
    metadata = tiny.make_dataset(folder, (*media, *images))
    rows = json.loads(metadata.read_text(encoding="utf-8"))
    tiny.write_image(folder / "speck.png", 8, 8)
    rows[3:3] = [
        {"file_path": "gone.mp4", "text": "a file that is not there"},
        {"text": "a row without a file"},
        {"file_path": "speck.png", "text": "eight pixels"},
    ]
    metadata.write_text(json.dumps(rows), encoding="utf-8")
    return metadata


@pytest.mark.parametrize("slot_fill", ["fixed", "cost"])
def test_an_epoch_trains_each_row_once_and_accounts_for_the_rest(model: Path, tmp_path: Path, slot_fill: str) -> None:
    metadata = mixed_data(tmp_path / "data")
    argv = runs.wan_plain(
        model, metadata, tmp_path / "out", train_batch_size=2, gradient_accumulation_steps=2, slot_fill=slot_fill
    )
    outcome = runs.train(argv)
    assert outcome.code == 0, outcome.stderr
    seen = [row for record in outcome.metrics for row in record["rows"]]
    assert sorted(seen) == [0, 1, 2, *range(6, 20)] and len(seen) % 2
    assert f"rows: 20 = 17 {Fate.TRAINED.name.lower()} + 1 too_small + 2 refused" in outcome.stdout
    assert all(len(record["rows"]) == len(record["buckets"]) for record in outcome.metrics)
    buckets = {tuple(bucket) for record in outcome.metrics for bucket in record["buckets"]}
    assert len({frames for frames, _, _ in buckets}) >= 3 and len({h / w for _, h, w in buckets}) >= 4
    largest = max(len(record["rows"]) for record in outcome.metrics)
    assert largest == 4 if slot_fill == "fixed" else largest > 4  # small samples come in greater number


# ------------------------------------------------------------------------------------------ validation


def test_validation_repeats_to_the_bit_while_nothing_trains(model: Path, metadata: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 0, "validation_rows": 2, "validation_steps": 2, "num_train_epochs": 2}
    outcome = runs.train(runs.wan_plain(model, metadata, tmp_path / "out", **settings))
    assert outcome.code == 0, outcome.stderr
    records = outcome.validation
    assert [record["step"] for record in records] == [0, *range(2, 21, 2)]
    assert len({json.dumps([record["loss"], record["per_sigma"]]) for record in records}) == 1
    assert len(records[0]["per_sigma"]) == 4 and len({loss for _, loss in records[0]["per_sigma"]}) == 4
    trained = Counter(row for record in outcome.metrics for row in record["rows"])
    assert len(trained) == 10 and set(trained.values()) == {2}  # of 12 rows, two never occur


def test_a_validation_changes_nothing(model: Path, metadata: Path, tmp_path: Path) -> None:
    settings = {"validation_rows": 2, "max_train_steps": 4}
    rarely = runs.train(runs.wan_plain(model, metadata, tmp_path / "rarely", **settings))
    prompts = {"validation_prompts": ["a rabbit walks"], "validation_steps": 2}
    often = runs.train(runs.wan_plain(model, metadata, tmp_path / "often", **settings, **prompts))
    assert numbers(rarely) == numbers(often) and equal(rarely.weights(), often.weights())
    assert [record["step"] for record in rarely.validation] == [0, 4]
    assert [record["step"] for record in often.validation] == [0, 2, 4]
    assert often.validation[0]["loss"] == rarely.validation[0]["loss"] != often.validation[2]["loss"]


def test_sample_clips_play_as_fast_as_the_data(model: Path, tmp_path: Path) -> None:
    clips = [(f"{fps}.mp4", 128, 128, 21, float(fps)) for fps in (12, 24, 30)]
    metadata = tiny.make_dataset(tmp_path / "data", tuple(clips))
    settings = {"validation_prompts": ["a rabbit walks", "a red ball"], "max_train_steps": 2, "validation_steps": 1}
    outcome = runs.train(runs.wan_plain(model, metadata, tmp_path / "out", video_sample_stride=3, **settings))
    assert outcome.code == 0, outcome.stderr
    samples = outcome.folder / "samples"
    for step in range(3):
        assert (samples / f"step-{step:06d}.png").is_file()
        for prompt in range(2):
            with av.open(str(samples / f"step-{step:06d}-prompt-{prompt}.mp4")) as container:
                stream = container.streams.video[0]
                assert float(stream.average_rate) == 24 / 3  # the median of the sources, every third frame kept
                assert (stream.frames, stream.height, stream.width) == tuple(outcome.metrics[0]["buckets"][0])
