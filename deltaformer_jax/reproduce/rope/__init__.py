"""Rotary embeddings: Men et al., "Base of RoPE bounds context length", NeurIPS 2024, arXiv 2405.14591."""
