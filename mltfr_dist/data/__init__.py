"""Interactions: raw files to prepared shards to training batches."""
