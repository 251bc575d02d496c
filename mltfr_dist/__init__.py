"""mltfr_dist: distributed training of MLTFR, Multi-LLM Token Filtering and Routing (arXiv 2604.18200)."""

__version__ = "0.1.0"
