"""The gated delta rule and gated linear attention. `api` is the door, `definition` what they compute, `chunked` and
`kernels` how they are fast."""
