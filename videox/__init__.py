"""Serves both train.py scripts: the shared package of the videox trainer."""

import logging
import warnings

__version__ = "0.1.0"

# What optional packages say in each process that imports diffusers, and that nobody who trains can act on: kernels for
# 4-bit weights and for other GPUs, and tensors of quantized checkpoints, none of which the trainer uses.
NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "<enum '",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


def _is_heard(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE[record.name])


for _name in NOISE:
    logging.getLogger(_name).addFilter(_is_heard)

# Weights of norms are float32 masters on purpose; that autocast then takes another kernel is nothing to act on.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
