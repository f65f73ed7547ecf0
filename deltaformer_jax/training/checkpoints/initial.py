"""`run.init_from`: a new run that starts from the weights of another run, or of a folder of the Hugging Face hub's
format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.config.init_from import check_init_from
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data import Tokenizer, load_tokenizer
from deltaformer_jax.interop import load_pretrained
from deltaformer_jax.interop.files import is_pretrained
from deltaformer_jax.interop.load import read_config
from deltaformer_jax.interop.own import name_of
from deltaformer_jax.layers.adapters import merged
from deltaformer_jax.model_parts import flat, merge, model_parts, nested, params_of
from deltaformer_jax.training.checkpoints.restore import TOKENIZER_FILE, read_tokenizer, restore
from deltaformer_jax.training.checkpoints.vocabulary import with_vocabulary
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.state import TrainState


def initial_state(
    program: Program, seed: int, init_from: str, tokenizer: Tokenizer, note: Callable[[str], Any]
) -> TrainState:
    """The state before the first batch: the parameters of `init_from`, and an optimiser that has seen nothing.

    Raises ValueError, naming run.init_from, if its tokenizer is not `tokenizer`, or if its parameters are not those of
    the model, with every difference, before they are read. Adapters are not read but begin anew: A drawn, B zero.
    """
    model, theirs = _described(init_from)
    if theirs is not None and theirs.hash != tokenizer.hash:
        raise ValueError(
            f"run.init_from = {init_from!r}: was trained with another tokenizer than data.path has; prepare the data "
            f"with --tokenizer {Path(init_from) / TOKENIZER_FILE}"
        )
    _check(init_from, program, model)
    params = _read(init_from, note)
    state = program.create_state(seed)
    leaves, shardings = dict(flat(state.params)), dict(flat(program.shardings.params))
    for path, leaf in flat(params):
        place = path if path in leaves else (*path, "kernel")  # of an AdaptedKernel
        leaves[place] = jax.device_put(leaf, shardings[place])
    return state._replace(params=nested(leaves))


def check_same_model(program: Program, init_from: str) -> None:
    """Raise ValueError as `initial_state` for a model with other parameters. None of them is read."""
    _check(init_from, program, _described(init_from)[0])


def _described(init_from: str) -> tuple[ModelConfig, Tokenizer | None]:
    """(the model, the tokenizer or None) that the folder says it has. Its parameters are not read."""
    check_init_from(init_from)
    folder = epath.Path(init_from)
    if not is_pretrained(folder):
        saved = Saved.read(folder)
        tokenizer = read_tokenizer(folder, saved)
        return with_vocabulary(saved.config, tokenizer).model, tokenizer
    _, model = read_config(Path(init_from))
    file = Path(init_from) / TOKENIZER_FILE
    return model, load_tokenizer(file) if file.exists() else None


def _read(init_from: str, note: Callable[[str], Any]) -> Any:
    """The parameters."""
    folder = epath.Path(init_from)
    return params_of(load_pretrained(init_from)[0]) if is_pretrained(folder) else restore(folder, note=note).params


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {name_of(path): tuple(leaf.shape) for path, leaf in flat(params)}


def _check(init_from: str, program: Program, model: ModelConfig) -> None:
    """Raise ValueError unless the program's model, its adapters in their kernels, has the parameters of `model`."""
    plain = jax.eval_shape(lambda params: params_of(merged(merge(program.parts, params))), program.parts.params)
    ours, theirs = _shapes(plain), _shapes(model_parts(model).params)
    problems = [f"{name}: missing there" for name in ours if name not in theirs]
    problems += [f"{name}: not in this model" for name in theirs if name not in ours]
    for name, shape in ours.items():
        if theirs.get(name, shape) != shape:
            problems.append(f"{name}: {list(theirs[name])} there, {list(shape)} here")
    if problems:
        raise ValueError(
            f"run.init_from = {init_from!r}: not the same model: {'; '.join(problems)}. Without --config the model is "
            "that of run.init_from"
        )
