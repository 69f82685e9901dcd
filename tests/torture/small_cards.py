"""Area small_cards: SIGKILL of a LoRA run with streamed blocks and a base in 8 or 4 bits, then a resume."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import forkserver
import tiny

from tests.torture.cases import Area, Outcome, Row
from tests.torture.ground import STEPS, shared
from videox.models.base_precision import BF16, PRECISIONS
from videox.run.checkpoint import find_checkpoints

STREAMED = {"stream_blocks": "all", "offload_activations": True}
BLOCKS = 4  # at most two of the streamed blocks have their weights at a time


class SmallCards(Area):
    """Ends a run with streamed blocks; resumed with or without streaming, it must equal one whose blocks stay."""

    rows = (
        Row("streamed", "streamed blocks, killed at a random moment, resumed with or without the flag: as resident blocks", 200),
        Row("quantised", "the same with a base in 8 or 4 bits", 600),
    )  # fmt: skip

    def __init__(self, folder: Path, *, broken: bool = False) -> None:
        super().__init__(folder, broken=broken)
        self.ground = shared()
        self.model = tiny.build_wan_t2v(folder / "model", layers=BLOCKS)

    def attempt(self, seed: int, draw: random.Random) -> Outcome:
        precision = PRECISIONS[seed % len(PRECISIONS)]
        changes: dict[str, object] = {
            "pretrained_model_name_or_path": self.model, "lora_rank": 4, "trainable_modules": None,
            "mixed_precision": "bf16", "gradient_checkpointing": True, "base_precision": precision,
        }  # fmt: skip
        reference, seconds = self.ground.reference(**changes)
        place, moment = self.ground.new_place(f"small-{seed}"), draw.uniform(0, seconds)
        run = self.ground.start(place, **changes, **STREAMED)
        if self.broken:
            run.wait_until(lambda: find_checkpoints(place / "run"))
        else:
            time.sleep(moment)
        run.kill()
        run.wait()
        resumed = STREAMED if draw.random() < 0.5 else {}
        if self.broken:  # another base than that of the checkpoint
            changes["base_precision"] = PRECISIONS[(seed + 1) % len(PRECISIONS)]
        again = self.ground.resume(place, **changes, **resumed)
        what = f"{precision}, killed after {moment:.2f} s, resumed {'streamed' if resumed else 'resident'}"
        problems = forkserver.differences(place / "run", reference, STEPS)
        if again.code != 0:
            problems = [f"the resume ended with {again.code}: {again.output()[-1500:]}"]
        shutil.rmtree(place)
        return Outcome("streamed" if precision == BF16 else "quantised", what, problems=problems)
