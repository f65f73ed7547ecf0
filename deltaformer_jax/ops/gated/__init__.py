"""The gated delta rule and gated linear attention: `api` has the public functions, `definition` the equations,
`chunked` and `kernels` the fast forms."""
