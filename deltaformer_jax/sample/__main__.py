"""Continue one or several prompts with a run's model, and print the text while it is generated:

    python -m deltaformer_jax.sample --workdir DIR [--prompt TEXT ...] [--prompts FILE] [--samples 1]
                                     [--tokens 200] [--temperature 0.8] [--top_k 40] [--top_p 1] [--stop TEXT ...]
                                     [--seed 0] [--step N] [--weights bfloat16] [--batch_size 32] [--json]
                                     [--logprobs] [--chat TEXT ...] [--chats FILE]
                                     [--cache INITIAL,SEPARATORS,WINDOW,CAPACITY [--separators CHARACTERS]
                                     [--all_places]]
                                     [--keep SHARE [--proxy 32] [--random 0] [--write_weight 0] [--by_head]]

--chat and --chats ask a run that was trained on conversations for an answer, in the form of its conversations: its chat
template or the plain form. A run that was converted from an instruct model is asked by that model's template.

Without a prompt the run's own is used, `run.sample_prompt`. A text ends after --tokens tokens, before a --stop string,
or where the model ends the document or its answer. --cache and --keep limit what attention layers remember
of a text (docs/generation.md). Texts go to stdout in the order of the prompts, in whole characters: the first
unfinished one while it is generated, the others after it. Messages go to stderr.

The prompts, of any lengths and any number, are continued in --batch_size rows: a row whose text ends takes the next
prompt. A text depends on its prompt, on --seed and on its number, not on its neighbours. Wrong input gives one line on
stderr and exit code 2.
"""

import os
import sys

from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.host.arguments import whole_numbers
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.waiting import begun, say_aside, waiting
from deltaformer_jax.sample.output import Output
from deltaformer_jax.sample.prompts import read_chats, read_prompts


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
    parser.add_argument(
        "--chat", action="append", default=[], metavar="TEXT", help="what the user says; may be repeated, one talk each"
    )
    parser.add_argument(
        "--chats", type=expand, metavar="FILE", help='file with one more conversation per line, {"messages": [...]}'
    )
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
    parser.add_argument(
        "--skip_in_prefill",
        default="",
        metavar="LAYERS",
        help="layers, counted from 0 and separated by commas, that only fill their caches while a prompt is read, such "
        "as those that python -m deltaformer_jax.prune ranks first (default: none)",
    )
    parser.add_argument(
        "--cache",
        default="",
        metavar="INITIAL,SEPARATORS,WINDOW,CAPACITY",
        help="such as 4,64,256,800: caches of attention layers hold at most CAPACITY tokens. When one is full, the "
        "first INITIAL tokens stay, the last WINDOW, and the last SEPARATORS of the separators between (default: all)",
    )
    parser.add_argument(
        "--separators",
        metavar="CHARACTERS",
        help="with --cache: tokens that consist of these are separators; \\n and \\t are newline and tab (default: "
        ". , ? ! ; : space tab newline; for a tokenizer of bytes newline . ; :)",
    )
    parser.add_argument(
        "--all_places",
        action="store_true",
        help="with --cache: layers with separators behind a window number their tokens by places too, for texts much "
        "longer than in training (default: they keep their positions in the text)",
    )
    parser.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="after the prompt, caches of attention layers drop all but this share of its tokens (default: all stay)",
    )
    parser.add_argument("--proxy", type=int, metavar="N", help="with --keep: the last tokens, which stay (default: 32)")
    parser.add_argument(
        "--random",
        type=float,
        metavar="SHARE",
        help="with --keep: this share is drawn, and not what the last tokens read most (default: 0)",
    )
    parser.add_argument(
        "--write_weight",
        type=float,
        metavar="WEIGHT",
        help="with --keep: what DeltaFormer's write compares counts this much beside what is read (default: 0)",
    )
    parser.add_argument(
        "--by_head",
        action="store_const",
        const=True,
        help="with --keep: each key head chooses for itself, by what its own queries read (default: each layer does)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint to use (default: the newest)")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=32,
        metavar="N",
        help="texts that are generated at once; the others wait for a free row (default: 32)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON per text, with prompt, text, tokens and finish"
    )
    parser.add_argument(
        "--logprobs",
        action="store_true",
        help="with --json: also the log-probability of each token, in nats, before temperature, top_k and top_p",
    )
    flags = parser.parse_args(arguments)

    with one_line_errors("deltaformer_jax.sample"):
        Saved.read(epath.Path(flags.workdir))  # a wrong folder is said before jax is imported
        with waiting("importing jax", say_aside):
            from deltaformer_jax.data.chat import CHAT_FILE, Encoder
            from deltaformer_jax.decoding import stream
            from deltaformer_jax.decoding.generate import with_weights_in
            from deltaformer_jax.decoding.requests import check_sampling
            from deltaformer_jax.model_parts import merge
            from deltaformer_jax.sample.chosen import chosen_entries
            from deltaformer_jax.training.checkpoints.restore import read_chat, restore

        check_sampling(flags.tokens, flags.temperature, flags.top_k, flags.top_p, flags.seed)
        if flags.samples < 1:
            raise ValueError(f"--samples {flags.samples}: give 1 or more")
        if flags.batch_size < 1:
            raise ValueError(f"--batch_size {flags.batch_size}: give 1 or more")
        if flags.logprobs and not flags.json:
            raise ValueError("--logprobs: only the records of --json have room for them; give both")
        try:
            skipped = whole_numbers(flags.skip_in_prefill)
        except ValueError as error:
            raise ValueError(f"--skip_in_prefill {error}") from None
        chosen = chosen_entries(flags)
        prompts, talks = read_prompts(flags.prompt, flags.prompts), read_chats(flags.chat, flags.chats)
        if talks and prompts:
            raise ValueError("--chat: the same call continues no --prompt; give one or the other")
        form = read_chat(flags.workdir)
        if talks and form is None:
            raise ValueError(
                f"--chat: the run in {flags.workdir} has no {CHAT_FILE}: it was not trained on conversations "
                "(data.prepare --chat), nor converted from a folder with a chat template; give a --prompt"
            )
        if not all(flags.stop):
            raise ValueError("--stop: an empty text; leave it out")
        with waiting(f"restoring the model of {flags.workdir}", say_aside):
            run = restore(flags.workdir, flags.step, say_aside)
        if not prompts and not talks:
            prompts = [run.config.run.sample_prompt]
            say_aside(f"after the run's own prompt, {prompts[0]!r}; --prompt TEXT gives another")
        asked, ends = [(prompt, prompt) for prompt in prompts], ()
        if talks:
            encoder = Encoder(run.tokenizer, form)
            asked, ends = [encoder.prompt(talk) for talk in talks], encoder.ends
        model = merge(run.program.parts, run.params)
        if flags.weights != "float32":
            model = with_weights_in(model, flags.weights)
        asked = [one for one in asked for _ in range(flags.samples)]
        output = Output([text for _, text in asked], flags.json)
        pieces = stream(
            model,
            [prompt for prompt, _ in asked],
            max_tokens=flags.tokens,
            tokenizer=run.tokenizer,
            stop=flags.stop,
            stop_tokens=ends,
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            seed=flags.seed,
            logprobs=flags.logprobs,
            batch_size=flags.batch_size,
            skip_in_prefill=skipped,
            cache=chosen,
        )
        # The first token comes after the compilation of both programs, that of prompts and that of a step.
        for piece in begun(pieces, 1, "compiling the model for these prompts", say_aside):
            output.add(piece)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        main()
    except BrokenPipeError:  # the program that reads stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
