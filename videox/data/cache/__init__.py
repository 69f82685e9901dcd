"""Cache of encoder outputs (latents, text embeddings), addressed by content and stored in shards."""
