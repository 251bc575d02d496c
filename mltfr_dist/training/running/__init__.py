"""A run from its checks to its result: stages, epochs, steps."""
