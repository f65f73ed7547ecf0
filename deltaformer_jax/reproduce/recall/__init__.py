"""Recall: Arora et al., "Zoology: measuring and improving recall in efficient language models", 2023."""
