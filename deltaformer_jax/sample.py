"""Let a run's model write on from a prompt, as it goes:

    python -m deltaformer_jax.sample --workdir DIR --prompt TEXT [--tokens 200] [--temperature 0.8] [--top_k 40]
                                     [--seed 0] [--step N]

The text goes to stdout, whole characters only; everything else to stderr. Bad input: one line, exit code 2.
"""

import argparse
import sys

from deltaformer_jax.training.command_line import one_line_errors


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deltaformer_jax.sample", description="Lets a run's model write on from a prompt."
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder; may be gs://")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help='may be ""')
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="how many to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=40, help="draw from so many; 0: from all (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default: 0)")
    parser.add_argument("--step", type=int, help="of which checkpoint (default: the newest)")
    flags = parser.parse_args(arguments)

    with one_line_errors("deltaformer_jax.sample"):
        from deltaformer_jax.training.restore import restore
        from deltaformer_jax.training.sampling import check_sampling, generate

        check_sampling(flags.tokens, flags.temperature, flags.top_k, flags.seed)
        run = restore(flags.workdir, flags.step, lambda text: print(text, file=sys.stderr))
        prompt = [run.tokenizer.eot, *run.tokenizer.encode(flags.prompt)]
        stream = run.tokenizer.stream()
        sys.stdout.write(flags.prompt)
        sys.stdout.flush()
        for token in generate(
            run.parts, run.params, prompt, flags.tokens,
            temperature=flags.temperature, top_k=flags.top_k, seed=flags.seed,
        ):  # fmt: skip
            sys.stdout.write(stream.push(token))
            sys.stdout.flush()
        print(stream.end())


if __name__ == "__main__":
    main()
