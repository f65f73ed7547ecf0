"""DeltaFormer: `api` has the public functions, `definition` the equations, `chunked` and `kernels` the fast forms."""
