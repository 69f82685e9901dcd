"""LoRA: adapters in the model, adapter files, and merging adapters into the base model."""
