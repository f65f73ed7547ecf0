"""Softmax attention. `api` is the door, `definition` what it computes, `chunked` and `kernels` how it is fast."""
