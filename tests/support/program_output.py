"""What a program under test wrote to stderr, without what a library it loads writes there in every process."""

PREAMBLE = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR"


def ours(stderr: str) -> str:
    """`stderr` without the lines in which JAX's CUDA plugin says that there is no GPU.

    The plugin is there because jax-triton needs it; as it is loaded it writes them past Python and past every setting.
    """
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if line.rstrip() != PREAMBLE and "cudart_stub.cc" not in line)
