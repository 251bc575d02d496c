"""Prepared shards: what they hold, how they are written, verified and read, and their manifest."""
