"""The noise of a memory: Zhong et al., "Understanding Transformer from the perspective of associative memory", arXiv
2505.19488."""
