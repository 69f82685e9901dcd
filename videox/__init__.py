"""videox: a trainer that fine-tunes the video diffusion models Wan2.1 and HunyuanVideo."""

import logging
import warnings

__version__ = "0.1.0"

# Log messages of optional packages, by logger, that every process prints when it imports diffusers. They are about
# kernels for 4-bit weights or other GPUs and about quantized checkpoints. The trainer uses none of these.
IGNORED_MESSAGES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "<enum '",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


def _is_relevant(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(IGNORED_MESSAGES[record.name])


for _name in IGNORED_MESSAGES:
    logging.getLogger(_name).addFilter(_is_relevant)

# The weights of norms are float32 masters on purpose; torch warns that autocast then uses another kernel.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
