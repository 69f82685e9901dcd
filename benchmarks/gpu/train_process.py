"""Runs a train script as `python scripts/FAMILY/train.py FLAGS` does, in a process that has imported torch before.

The process imports the libraries, then waits for one line of JSON on standard input: the script and its flags. So the
imports of a run happen while the run before it uses the GPU.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from videox.distributed.cuda_variables import set_cuda_variables

if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # whose modules have names of libraries
    set_cuda_variables(os.environ, deterministic=False)  # as the script does before torch loads
    import accelerate
    import diffusers
    import torch
    import transformers

    loaded = (accelerate, torch, diffusers.WanPipeline, diffusers.HunyuanVideoPipeline, transformers.UMT5EncoderModel)
    assert all(loaded)
    line = sys.stdin.readline()
    if line:
        sys.argv = json.loads(line)
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
