"""All that is compiled of a run: one walk of the config to the parts, the optimiser, the state's shapes and the steps.

Training, the dry run, restoring and `reproduce` build the same Program and use what they need of it: shapes and
shardings are known at once, and each step is traced and compiled when it is first asked for.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from deltaformer_jax.config import Config, DataConfig
from deltaformer_jax.data import is_task
from deltaformer_jax.host.compiler_alarm import without_alarm
from deltaformer_jax.host.paths import expand
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import model_parts, new_params
from deltaformer_jax.sharding.mesh import batch_sharding
from deltaformer_jax.training.evaluation import make_evaluation_step
from deltaformer_jax.training.optimiser import learning_rate_schedule, make_optimiser
from deltaformer_jax.training.state import TrainState, abstract_state, new_state
from deltaformer_jax.training.step import make_train_step
from deltaformer_jax.training.watch.statistics import make_statistics_step


class Program:
    """The programs of a model, an optimiser and a mesh: `config.model`, with its vocabulary size, and
    `config.optimizer`. What else a config says is not looked at, so runs that differ in it may share a Program.

    `make_model(config.model, rngs=rngs)` makes the model, whose embedding, blocks and norm are a LanguageModel's.

    Attributes: mesh; parts (ModelParts); abstract and shardings (TrainState, of ShapeDtypeStructs and of shardings).
    Raises the model's own ValueError for a bad config. Cost: the model's construction is traced, nothing allocated.
    """

    def __init__(self, config: Config, mesh: Mesh, make_model: Callable[..., nnx.Module] = LanguageModel):
        self.mesh = mesh
        self.parts = model_parts(config.model, make_model)
        self._model, self._make_model, self._settings = config.model, make_model, config.optimizer
        self._schedule = learning_rate_schedule(config.optimizer)
        self._optimiser = make_optimiser(config.optimizer, self.parts.decay)
        self.abstract, self.shardings = abstract_state(self.parts, self._optimiser, mesh)
        self._lowered: dict[tuple, jax.stages.Lowered] = {}
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    def create_state(self, seed: int) -> TrainState:
        """A new state, made by one compiled program straight into its shardings: no device ever holds it all.

        The values depend on the seed alone, not on the mesh.
        """
        return self._create(jax.random.key(seed))

    @functools.cached_property
    def _create(self) -> Callable:
        def create(key: jax.Array) -> TrainState:
            return new_state(new_params(self._model, self._make_model, key), self._optimiser)

        return jax.jit(create, out_shardings=self.shardings)

    @functools.cached_property
    def train_step(self) -> Callable:
        """`step.make_train_step`'s, compiled by itself for each shape of a batch."""
        return make_train_step(self._optimiser, self._schedule, self._settings, self.parts, self.mesh, self.shardings)

    def lower_train_step(self, data: DataConfig) -> jax.stages.Lowered:
        """The train step traced for such batches: the model's forward pass checks the rest of its config."""
        key = (data.batch_size, data.sequence_length, is_task(data.path))
        if key not in self._lowered:
            self._lowered[key] = self.train_step.lower(self.abstract, abstract_batch(data, self.mesh))
        return self._lowered[key]

    def compile_train_step(self, data: DataConfig) -> jax.stages.Compiled:
        """(state, batch) -> (state, metrics) for such batches, ready to run."""
        key = (data.batch_size, data.sequence_length, is_task(data.path))
        if key not in self._compiled:
            lowered = self.lower_train_step(data)
            with without_alarm():
                self._compiled[key] = lowered.compile()
        return self._compiled[key]

    @functools.cached_property
    def evaluation_step(self) -> Callable:
        return make_evaluation_step(self.parts, self.mesh)

    @functools.cached_property
    def statistics_step(self) -> Callable:
        return make_statistics_step(self.parts, self.mesh, self._settings.accumulation_steps)


def abstract_batch(data: DataConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch over all devices: tokens, targets, segment_ids, and of a task loss_mask."""
    leaf = jax.ShapeDtypeStruct((data.batch_size, data.sequence_length), np.int32, sharding=batch_sharding(mesh))
    batch = {name: leaf for name in ("tokens", "targets", "segment_ids")}
    return {**batch, "loss_mask": leaf.update(dtype=np.bool_)} if is_task(data.path) else batch


def use_compilation_cache(folder: str) -> None:
    """Keep every program compiled from now on in `folder` (also gs://), so that a run that goes on compiles nothing it
    has compiled before. "" leaves jax's own setting, which is JAX_COMPILATION_CACHE_DIR, as it is.

    Raises OSError, naming run.compilation_cache, if the folder can't be made.
    """
    if not folder:
        return
    folder = expand(folder)
    try:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"run.compilation_cache = {folder!r}: cannot be made: {error}") from None
    jax.config.update("jax_compilation_cache_dir", folder)
    # jax keeps nothing small or quick by default: a restart would compile those programs again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
