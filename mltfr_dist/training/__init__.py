"""The training run: loop, evaluation, tracking, report."""
