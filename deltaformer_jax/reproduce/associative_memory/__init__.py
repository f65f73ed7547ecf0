"""Retrieval noise of associative memories: Zhong et al., "Understanding Transformer from the perspective of associative
memory", arXiv 2505.19488."""
