"""What is told of a run: metrics.jsonl, TensorBoard, report.md, matrices of runs."""
