"""Everything that is compiled for a run, derived from its config: model parts, optimiser, shapes of the state, steps.

Training, the dry run, restoring and `reproduce` build the same Program. Shapes and shardings are known at once. Each
step is traced and compiled when it is first used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from deltaformer_jax.data import has_loss_mask
from deltaformer_jax.host.compiler_alarm import without_alarm
from deltaformer_jax.host.paths import expand
from deltaformer_jax.layers.adapters import adapt
from deltaformer_jax.layers.linear import input_axes
from deltaformer_jax.model import LanguageModel, num_parameters
from deltaformer_jax.model_parts import ModelParts, flat, merge, model_parts, new_params
from deltaformer_jax.processes import common
from deltaformer_jax.sharding.mesh import batch_sharding
from deltaformer_jax.training.evaluation import make_evaluation_step
from deltaformer_jax.training.objectives.elastic import layer_switches
from deltaformer_jax.training.objectives.mixed import mixing
from deltaformer_jax.training.objectives.restoration import Teacher, restoring
from deltaformer_jax.training.objectives.rows import rows_beside
from deltaformer_jax.training.objectives.teacher_model import teacher_model
from deltaformer_jax.training.optimiser import learning_rate_schedule, make_optimiser
from deltaformer_jax.training.state import (
    TrainState,
    abstract_state,
    gradient_shardings,
    new_state,
    parameter_shardings,
)
from deltaformer_jax.training.step import Beside, make_train_step
from deltaformer_jax.training.watch.statistics import make_statistics_step


class Program:
    """The compiled programs of a model, an optimiser and a mesh.

    Reads only `config.model`, which must have its vocabulary size, `config.optimizer`, `config.objective` (with
    `config.run.seed` if it draws, and `config.data` if it has rows of other lengths), `config.mesh.zero1` and
    `config.mesh.sequence_parallel`. Runs that differ in other settings may share a Program.
    `make_model(config.model, rngs=rngs)` constructs the model, which must have the embedding, blocks and norm of a
    LanguageModel. With optimizer.lora_rank its model has adapters.

    Attributes: mesh; make_model; parts (ModelParts); abstract and shardings (TrainStates of ShapeDtypeStructs and of
    shardings).
    Raises the model's own ValueError for a bad config. Cost: the model's construction is traced, nothing is allocated.
    """

    def __init__(self, config: Config, mesh: Mesh, make_model: Callable[..., nnx.Module] = LanguageModel):
        self.mesh = mesh
        self.make_model = _with_adapters(make_model, config.optimizer) if config.optimizer.lora_rank else make_model
        self.parts = model_parts(config.model, self.make_model)
        self._model, self._settings = config.model, config.optimizer
        self._sequence_parallel = config.mesh.sequence_parallel
        self._config = config
        self._switches = layer_switches(config.objective, config.model.num_layers, config.run.seed)
        self._schedule = learning_rate_schedule(config.optimizer)
        decay, axes = (self.parts.divided(tree)[0] for tree in (self.parts.decay, self.parts.axes))
        self._optimiser = make_optimiser(config.optimizer, decay, axes)
        self.abstract, self.shardings = abstract_state(
            self.parts, self._optimiser, mesh, zero1=config.mesh.zero1, skip=config.optimizer.skip
        )
        self._gradient = gradient_shardings(self.parts, self.shardings.params, zero1=config.mesh.zero1)
        self._lowered: dict[tuple, jax.stages.Lowered] = {}
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    def create_state(self, seed: int) -> TrainState:
        """A new state. One compiled program creates it sharded, so that no device ever holds all of it.

        The values depend on the seed alone, not on the mesh.
        """
        create = self._create
        # gloo, the CPUs' collectives, waits 30 s for the first meeting: compiling may take one process longer.
        common.gather("creating the state", None)
        return create(jax.random.key(seed))

    @functools.cached_property
    def _create(self) -> jax.stages.Compiled:
        def create(key: jax.Array) -> TrainState:
            params = new_params(self._model, self.make_model, key)
            return new_state(self.parts, params, self._optimiser, skip=self._settings.skip)

        return jax.jit(create, out_shardings=self.shardings).lower(jax.random.key(0)).compile()

    def adapters_text(self) -> str:
        """How many parameters are trained and how many are not, as a line; "" if all are trained."""
        trained, frozen = map(num_parameters, self.parts.divided(self.parts.params))
        return (
            f"{trained:,} parameters trained, of rank {self._settings.lora_rank}; {frozen:,} frozen" if frozen else ""
        )

    def training_flops(self, length: int) -> float:
        """FLOPs of a token that is trained on, in documents of `length` tokens.

        The backward pass counts as two forward passes, one for the gradient of the activations and one for that of the
        parameters. The second is not counted for the logits and the layers' matrices if these are not trained.
        """
        model, axes = merge(self.parts, self.parts.params), dict(flat(self.parts.axes))
        _, frozen = self.parts.divided(self.parts.params)
        idle = 2.0 * sum(math.prod(leaf.shape) for path, leaf in flat(frozen) if input_axes(axes[path]))
        idle += model.embedding.flops_per_token(length) if frozen else 0.0
        return 3 * model.flops_per_token(length) - idle

    @functools.cached_property
    def teacher_parts(self) -> ModelParts:
        """The model that objective.name = "longred" compares with."""
        return model_parts(teacher_model(self._config))

    @property
    def teacher_shardings(self) -> Any:
        """The shardings of its parameters."""
        return parameter_shardings(self.teacher_parts, self.mesh)

    @functools.cached_property
    def train_step(self) -> Callable:
        """The training step of `step.make_train_step`, a jitted function that compiles once per batch shape."""
        return make_train_step(
            self._optimiser,
            self._schedule,
            self._settings,
            self.parts,
            self.mesh,
            self.shardings,
            self._gradient,
            sequence_parallel=self._sequence_parallel,
            switches=self._switches,
            beside=self._beside,
        )

    @functools.cached_property
    def _beside(self) -> Beside | None:
        if self._config.objective.name == "mixed":
            return mixing(self._config, self.parts, self.mesh)
        if self._config.objective.name != "longred":
            return None
        rows = rows_beside(self._config, self.mesh)
        return restoring(self._config, rows, self.parts, self.teacher_parts, self.mesh, self.teacher_shardings)

    def _abstract_given(self) -> tuple[Teacher, ...]:
        """What a training step takes after the batch, as ShapeDtypeStructs."""
        if self._config.objective.name != "longred":
            return ()
        rule, found = self._config.objective.compared(self._model.num_layers)
        layers = jax.ShapeDtypeStruct((found[0] + 1 if rule == "kl" else len(found),), np.int32)
        return (Teacher(self.teacher_parts.params, layers),)

    def lower_train_step(self, data: DataConfig) -> jax.stages.Lowered:
        """The training step traced for batches of this shape. Tracing runs the model's own checks of its config."""
        key = (data.batch_size, data.sequence_length, has_loss_mask(data.path))
        if key not in self._lowered:
            batch = abstract_batch(data, self.mesh)
            for name, rows in rows_beside(dataclasses.replace(self._config, data=data), self.mesh).items():
                shape = dataclasses.replace(data, batch_size=rows.number, sequence_length=rows.length)
                batch[name] = abstract_batch(shape, self.mesh)
            self._lowered[key] = self.train_step.lower(self.abstract, batch, *self._abstract_given())
        return self._lowered[key]

    def compile_train_step(self, data: DataConfig, options: dict | None = None) -> jax.stages.Compiled:
        """The compiled training step, (state, batch) -> (state, metrics), for batches of this shape. With the objective
        "longred" it also takes a Teacher.

        options: the compiler's; those of the first call for a shape count.
        """
        key = (data.batch_size, data.sequence_length, has_loss_mask(data.path))
        if key not in self._compiled:
            lowered = self.lower_train_step(data)
            with without_alarm():
                self._compiled[key] = lowered.compile(compiler_options=options)
        return self._compiled[key]

    @functools.cached_property
    def evaluation_step(self) -> Callable:
        return make_evaluation_step(self.parts, self.mesh)

    @functools.cached_property
    def statistics_step(self) -> Callable:
        return make_statistics_step(self.parts, self.mesh, self._settings.accumulation_steps)


def _with_adapters(make_model: Callable[..., nnx.Module], settings: OptimizerConfig) -> Callable[..., nnx.Module]:
    def make(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
        model = make_model(config, rngs=rngs)  # draws first, so that it is the model without adapters
        return adapt(model, settings.lora_rank, settings.lora_alpha, settings.lora_kernels, rngs=rngs)

    return make


def abstract_batch(data: DataConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch: tokens, targets, segment_ids and, for a task or conversations, loss_mask."""
    leaf = jax.ShapeDtypeStruct((data.batch_size, data.sequence_length), np.int32, sharding=batch_sharding(mesh))
    batch = {name: leaf for name in ("tokens", "targets", "segment_ids")}
    return {**batch, "loss_mask": leaf.update(dtype=np.bool_)} if has_loss_mask(data.path) else batch


def use_compilation_cache(folder: str) -> None:
    """Store every program compiled from now on in `folder` (also gs://), so that a resumed run need not compile again.

    "" leaves jax's own setting, JAX_COMPILATION_CACHE_DIR, as it is. Raises OSError, naming run.compilation_cache, if
    the folder cannot be created.
    """
    if not folder:
        return
    folder = expand(folder)
    try:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"run.compilation_cache = {folder!r}: cannot be made: {error}") from None
    jax.config.update("jax_compilation_cache_dir", folder)
    # By default jax does not store small or quickly compiled programs: a restart would compile them again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
