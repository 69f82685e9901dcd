"""Cache of encoder outputs (latents, embeddings), addressed by content key, stored in shards."""
