"""KV shifting attention (Xu et al., ICML 2025, arXiv 2411.19574)."""
