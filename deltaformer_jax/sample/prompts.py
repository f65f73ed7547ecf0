"""The prompts of a sample, from the flags --prompt and --prompts."""

import sys
from pathlib import Path

from deltaformer_jax.config.lines import lines


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
    r"""The texts of --prompt, then the lines of the file of --prompts ("-": stdin); [] if neither is given.

    Only \n and \r\n end a line. A byte order mark is dropped. Raises ValueError or OSError, naming the flag.
    """
    prompts = list(prompts)
    if file is not None:
        try:
            content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            prompts += lines(content.decode("utf-8-sig"))
        except OSError as error:
            raise OSError(f"--prompts {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {file}: not UTF-8 (byte {error.start})") from None
    if file is not None and not prompts:
        raise ValueError(f"--prompts {file}: it holds no line")
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"--prompt {prompt!a}: not UTF-8") from None
    return prompts
