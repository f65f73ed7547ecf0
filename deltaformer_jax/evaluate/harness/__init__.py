"""Evaluation through EleutherAI's lm-evaluation-harness: scores of text by a model, and the adapter around them."""
