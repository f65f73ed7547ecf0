"""The generalized delta rule: `api` has the public function, `definition` the equations, `chunked` the fast form."""
