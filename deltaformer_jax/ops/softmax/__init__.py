"""Softmax attention: `api` has the public function, `definition` the equations, `chunked` and `kernels` the fast
forms."""
