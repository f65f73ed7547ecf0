"""A comparison of the mixers as language models, which is this project's own and not from a paper."""
