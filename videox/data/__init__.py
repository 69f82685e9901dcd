"""Data pipeline, from metadata to batches: index, media decoding, cache, plan, dataset, sampler and loader.

Imports go in one direction: loader > bucket_sampler > dataset > plan > index > media. The cache imports none of them.
"""
