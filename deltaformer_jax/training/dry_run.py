"""What a config costs. Nothing is allocated: the training step is compiled from shapes alone."""

import dataclasses
import math

import jax

from deltaformer_jax.config import Config
from deltaformer_jax.config.checks import check
from deltaformer_jax.data import ByteTokenizer, load_tokenizer
from deltaformer_jax.data.tokenizer import bpe_size
from deltaformer_jax.host.waiting import say_aside, waiting
from deltaformer_jax.model import num_parameters, parameters_of_a_token
from deltaformer_jax.model_parts import flat, merge
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.checkpoints.initial import check_same_model
from deltaformer_jax.training.checkpoints.vocabulary import with_vocabulary
from deltaformer_jax.training.memory import fitting_program, size_text, step_bytes
from deltaformer_jax.training.on_mesh.kept_whole import check_split
from deltaformer_jax.training.optimiser import matrix_sides, muon_matrix
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.setup import check_batch, load_data


def dry_run(config: Config, begun: bool = False) -> None:
    """Print parameters, FLOPs, shapes, shardings and the memory of the compiled step per device. Write nothing.

    Needs the devices of the mesh. If data.path is set and model.vocab_size is not, it also needs the corpus. A
    data.tokenizer "bpe:SIZE" counts as SIZE tokens, the most it can learn. begun: whether the run has a checkpoint of
    its own, so that it does not read run.init_from. Raises the same errors as `setup.prepare`.
    """
    check(config)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    full = with_any_vocabulary(config)
    program = fitting_program(full, mesh, say_aside)
    if full.run.init_from and not begun:
        check_same_model(program, full.run.init_from)
    check_split(program.parts, mesh, full.mesh.strict, say_aside, zero1=full.mesh.zero1)
    print_sizes(full, program)
    with waiting("compiling", say_aside):
        compiled = program.compile_train_step(full.data)
    print_memory(program, compiled)


def print_sizes(full: Config, program: Program) -> None:
    """The mesh, the model, the batch, and a line for each parameter. The config has its vocabulary size."""
    mesh, parts, abstract = program.mesh, program.parts, program.abstract
    length = full.data.sequence_length
    model = merge(parts, parts.params)
    forward = model.flops_per_token(length)
    print(f"mesh        {', '.join(f'{name} {size}' for name, size in mesh.shape.items())}")
    training = program.training_flops(length)
    total, used = num_parameters(model), parameters_of_a_token(model)
    print(f"parameters  {total:,}" + (f", of which a token uses {used:,}" if used < total else ""))
    if adapters := program.adapters_text():
        print(f"LoRA        {adapters}")
    print(f"FLOPs       {forward:,.0f} per token forward, {training:,.0f} with backward, at length {length}")
    tokens, steps, parts_of_batch = full.data.batch_size * length, full.run.steps, full.optimizer.accumulation_steps
    print(f"batch       {full.data.batch_size} x {length} = {tokens:,} tokens per step, in {parts_of_batch} part(s)")
    print(f"run         {steps:,} steps, {steps * tokens:,} tokens, {training * steps * tokens:.3g} FLOPs")

    lines = [("parameter", "shape", "sharded over", "on one device", "weight decay")]
    by_muon = full.optimizer.name == "muon"
    if by_muon:
        lines = [(*lines[0], "muon's matrix")]
    names_of_axes = jax.tree.leaves(parts.axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    leaves = jax.tree_util.tree_leaves_with_path(abstract.params)
    decayed = {True: "yes", False: "no", None: "frozen"}
    decays = dict(flat(parts.divided(parts.decay)[0]))
    for (path, leaf), named in zip(leaves, names_of_axes):
        keys = tuple(key.key for key in path)
        name, decay = ".".join(map(str, keys)), decays.get(keys)
        axes = [axis for axis in leaf.sharding.spec if axis and mesh.shape[axis] > 1]
        shard = leaf.sharding.shard_shape(leaf.shape)
        lines.append((name, _shape(leaf.shape), ", ".join(axes) or "-", _shape(shard), decayed[decay]))
        if by_muon:
            matrix = None if decay is None else muon_matrix(named, full.optimizer.muon_per_head)
            lines[-1] += ("-" if matrix is None else _shape(matrix_sides(leaf.shape, matrix)),)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def print_memory(program: Program, compiled: jax.stages.Compiled) -> None:
    """What the compiled step needs on each device."""
    total = step_bytes(compiled)
    if total is None:
        print(f"memory      not reported by the {jax.devices()[0].platform} compiler")
        return
    memory, abstract = compiled.memory_analysis(), program.abstract
    print("memory of the compiled step, per device:")
    print(f"  parameters        {size_text(_bytes(abstract.params))}")
    print(f"  optimiser         {size_text(_bytes(abstract.opt_state))}")
    print(f"  state and batch   {size_text(memory.argument_size_in_bytes)}")
    print(f"  temporaries       {size_text(memory.temp_size_in_bytes)} (gradients, activations)")
    print(f"  in all            {size_text(total)} (the new state takes the place of the old one)")


def with_any_vocabulary(config: Config) -> Config:
    """The config with model.vocab_size filled in, and model.separator_tokens. The standard library's corpus is not
    prepared for that: of a BPE that is not learned yet the separators are those of its 256 bytes."""
    if config.model.vocab_size and not config.model.separators:
        return config
    if config.data.path:
        return with_vocabulary(config, load_data(config).tokenizer)
    tokenizer = config.data.tokenizer
    if size := bpe_size(tokenizer):
        sized = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
        return with_vocabulary(sized, ByteTokenizer())
    return with_vocabulary(config, ByteTokenizer() if tokenizer == "bytes" else load_tokenizer(tokenizer))


def _bytes(tree) -> int:
    """The bytes of the arrays' shards on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
