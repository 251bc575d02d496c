"""Shards to batches: exact, the same at any division over ranks, resumable."""
