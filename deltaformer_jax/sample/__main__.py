"""Continue one or several prompts with a run's model, and print the text while it is generated:

    python -m deltaformer_jax.sample --workdir DIR [--prompt TEXT ...] [--prompts FILE] [--samples 1]
                                     [--tokens 200] [--temperature 0.8] [--top_k 40] [--top_p 1] [--stop TEXT ...]
                                     [--seed 0] [--step N] [--weights bfloat16] [--json]

Without a prompt the run's own is used, `run.sample_prompt`. A text ends after --tokens tokens, before a --stop string,
or where the model ends the document. Texts go to stdout in the order of the prompts, in whole characters: the first
unfinished one while it is generated, the others after it. Messages go to stderr. All prompts, of any lengths, are one
batch. Wrong input gives one line on stderr and exit code 2.
"""

import os
import sys

from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.waiting import begun, say_aside, waiting
from deltaformer_jax.sample.output import Output
from deltaformer_jax.sample.prompts import read_prompts


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m deltaformer_jax.sample", description="Continue prompts with a run's model.")
    parser.add_argument("--workdir", type=expand, required=True, metavar="DIR", help="the run's folder; may be gs://")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue; may be empty, and may be repeated (default: the run's run.sample_prompt)",
    )
    parser.add_argument("--prompts", type=expand, metavar="FILE", help="file with one more prompt per line; -: stdin")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts per prompt (default: 1)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="most tokens per text (default: 200)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="divides the logits before sampling; 0: always take the likeliest token (default: 0.8)",
    )
    parser.add_argument(
        "--top_k", type=int, default=40, help="sample from this many likeliest tokens; 0: all tokens (default: 40)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens whose probabilities sum to this; 1: all tokens (default: 1)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end a text before this string; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts (default: 0)")
    parser.add_argument(
        "--weights",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype in which the kernels and the embedding are read for every token; bfloat16 halves the memory, and "
        "rounds the weights unless the model computes in bfloat16 (default: float32)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint to use (default: the newest)")
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON per text, with prompt, text, tokens and finish"
    )
    flags = parser.parse_args(arguments)

    with one_line_errors("deltaformer_jax.sample"):
        Saved.read(epath.Path(flags.workdir))  # a wrong folder is said before jax is imported
        with waiting("importing jax", say_aside):
            from deltaformer_jax.decoding.generate import check_sampling, generate_batch, with_weights_in
            from deltaformer_jax.decoding.text_stream import TextStream
            from deltaformer_jax.model_parts import merge
            from deltaformer_jax.training.checkpoints.restore import restore

        check_sampling(flags.tokens, flags.temperature, flags.top_k, flags.top_p, flags.seed)
        if flags.samples < 1:
            raise ValueError(f"--samples {flags.samples}: give 1 or more")
        prompts = read_prompts(flags.prompt, flags.prompts)
        if not all(flags.stop):
            raise ValueError("--stop: an empty text; leave it out")
        with waiting(f"restoring the model of {flags.workdir}", say_aside):
            run = restore(flags.workdir, flags.step, say_aside)
        if not prompts:
            prompts = [run.config.run.sample_prompt]
            say_aside(f"after the run's own prompt, {prompts[0]!r}; --prompt TEXT gives another")
        model = merge(run.program.parts, run.params)
        if flags.weights != "float32":
            model = with_weights_in(model, flags.weights)
        prompts = [prompt for prompt in prompts for _ in range(flags.samples)]
        streams = [TextStream(run.tokenizer, flags.stop) for _ in prompts]
        output = Output(prompts, flags.json)
        steps = generate_batch(
            model,
            [[run.tokenizer.eot, *run.tokenizer.encode(prompt)] for prompt in prompts],
            flags.tokens,
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            seed=flags.seed,
        )
        # The first token compiles the prompts' program, the second one that of a step.
        for tokens in begun(steps, 2, "compiling the model for these prompts", say_aside):
            for i, (stream, token) in enumerate(zip(streams, tokens)):
                if not stream.finish:
                    output.add(i, stream.push(int(token)), stream.finish)
            if all(stream.finish for stream in streams):
                break
        for i, stream in enumerate(streams):
            if not stream.finish:
                rest = stream.end()
                output.add(i, rest, stream.finish or "length", tokens=0)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        main()
    except BrokenPipeError:  # the program that reads stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
