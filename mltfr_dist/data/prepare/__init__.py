"""Raw interactions to prepared shards, out of core and restartable."""
