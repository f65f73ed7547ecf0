"""Let a run's model write on from one prompt or several, as it goes:

    python -m deltaformer_jax.sample --workdir DIR --prompt TEXT [--prompt TEXT ...] [--prompts FILE] [--samples 1]
                                     [--tokens 200] [--temperature 0.8] [--top_k 40] [--top_p 1] [--stop TEXT ...]
                                     [--seed 0] [--step N] [--json]

A text ends at --tokens, at a --stop text (which is not shown) or where the model ends the document. The texts go to
stdout, whole characters only, the first one as it comes and the others when it is their turn; everything else goes to
stderr. Several prompts, of any lengths, run as one batch. Bad input: one line, exit code 2.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.command_line import one_line_errors


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.sample", description="Lets a run's model write on from prompts."
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder; may be gs://")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help='may be "", and be repeated')
    parser.add_argument("--prompts", metavar="FILE", help="more prompts, one a line (-: stdin)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="how many to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=40, help="draw from so many; 0: from all (default: 40)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest that sum to it (default: 1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default: 0)")
    parser.add_argument("--step", type=int, metavar="N", help="of which checkpoint (default: the newest)")
    parser.add_argument("--json", action="store_true", help="a line of JSON a text: prompt, text, tokens, finish")
    flags = parser.parse_args(arguments)

    with one_line_errors("deltaformer_jax.sample"):
        from deltaformer_jax.decoding.generate import check_sampling, generate_batch
        from deltaformer_jax.decoding.text_stream import TextStream
        from deltaformer_jax.training.checkpoints.restore import restore

        check_sampling(flags.tokens, flags.temperature, flags.top_k, flags.top_p, flags.seed)
        if flags.samples < 1:
            raise ValueError(f"samples = {flags.samples}: give 1 or more")
        prompts = [prompt for prompt in read_prompts(flags.prompt, flags.prompts) for _ in range(flags.samples)]
        if not all(flags.stop):
            raise ValueError("--stop: an empty text; leave it out")
        run = restore(flags.workdir, flags.step, lambda text: print(text, file=sys.stderr))
        streams = [TextStream(run.tokenizer, flags.stop) for _ in prompts]
        output = Output(prompts, flags.json)
        for tokens in generate_batch(
            run.program.parts,
            run.params,
            [[run.tokenizer.eot, *run.tokenizer.encode(prompt)] for prompt in prompts],
            flags.tokens,
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            seed=flags.seed,
        ):
            for i, (stream, token) in enumerate(zip(streams, tokens)):
                if not stream.finish:
                    output.add(i, stream.push(int(token)), stream.finish)
            if all(stream.finish for stream in streams):
                break
        for i, stream in enumerate(streams):
            if not stream.finish:
                rest = stream.end()
                output.add(i, rest, stream.finish or "length", tokens=0)


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
    """--prompt's texts, then the lines of --prompts. Raises ValueError or OSError naming the flag."""
    prompts = list(prompts)
    if file is not None:
        try:
            content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            prompts += content.decode("utf-8").splitlines()
        except OSError as error:
            raise OSError(f"--prompts {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {file}: not UTF-8 (byte {error.start})") from None
    if not prompts:
        raise ValueError('no prompt; give --prompt TEXT (--prompt "" to begin from nothing) or --prompts FILE')
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"--prompt {prompt!a}: not UTF-8") from None
    return prompts


class Output:
    """Texts that grow side by side, printed one after the other: the first unfinished one as it grows."""

    def __init__(self, prompts: list[str], as_json: bool):
        self._prompts = prompts
        self._json = as_json
        self._texts = [""] * len(prompts)
        self._tokens = [0] * len(prompts)
        self._finish: list[str | None] = [None] * len(prompts)
        self._turn = 0  # whose text is on stdout
        self._shown = -1  # characters of it; -1: not even the prompt

    def add(self, i: int, text: str, finish: str | None, tokens: int = 1) -> None:
        self._texts[i] += text
        self._tokens[i] += tokens
        self._finish[i] = finish
        while self._turn < len(self._prompts) and self._show(self._turn):
            self._turn, self._shown = self._turn + 1, -1

    def _show(self, i: int) -> bool:
        """Prints what there is of text i; True if that is all."""
        done = self._finish[i] is not None
        if self._json:
            if done:
                print(json.dumps(self._record(i), ensure_ascii=False), flush=True)
            return done
        if self._shown < 0:
            if len(self._prompts) > 1:
                print(f"--- {i + 1} of {len(self._prompts)}")
            sys.stdout.write(self._prompts[i])
            self._shown = 0
        sys.stdout.write(self._texts[i][self._shown :])
        self._shown = len(self._texts[i])
        if done:
            print()
        sys.stdout.flush()
        return done

    def _record(self, i: int) -> dict[str, Any]:
        return {
            "prompt": self._prompts[i],
            "text": self._texts[i],
            "tokens": self._tokens[i],
            "finish": self._finish[i],
        }


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        main()
    except BrokenPipeError:  # the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
