"""LoRA adapters: on the model, in files of several layouts, merged into a base."""
