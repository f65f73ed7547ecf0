"""The update by name, with global-norm clipping, a learning-rate schedule and a weight-decay mask, all from optax."""

import math
from typing import Any

import jax
import optax
import optax.contrib

from deltaformer_jax.config import OptimizerConfig
from deltaformer_jax.layers.linear import input_axes


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of update n = 0, 1, ...; peak = learning_rate, floor = final_learning_rate * peak.

    Warm-up: peak (n + 1) / warmup_steps for n < warmup_steps, so that the first update does not have a rate of 0.
    After the warm-up, until n = decay_steps:
      cosine    floor + (peak - floor) (1 + cos(pi (n - warmup_steps) / (decay_steps - warmup_steps))) / 2
      wsd       peak, then linear to the floor over the last wsd_decay_fraction of decay_steps
    From n = decay_steps on the rate is the floor. With schedule "constant" it is the peak throughout.
    """
    peak, warmup, length = config.learning_rate, config.warmup_steps, config.decay_steps
    floor = peak * config.final_learning_rate
    if config.schedule == "cosine":
        after, boundaries = [optax.cosine_decay_schedule(peak, length - warmup, config.final_learning_rate)], []
    elif config.schedule == "wsd":
        down = min(round(length * config.wsd_decay_fraction), length - warmup)
        after = [optax.constant_schedule(peak), optax.linear_schedule(peak, floor, max(down, 1))]
        boundaries = [length - down]
    else:
        after, boundaries = [optax.constant_schedule(peak)], []
    if warmup == 0:
        return optax.join_schedules(after, boundaries)
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, *after], [warmup, *boundaries])


# The root mean square of Muon's update of a matrix, in learning rates. AdamW's is about this, so one rate serves both.
MUON_RMS = 0.2
# The axes over heads, which `optimizer.muon_per_head` takes apart.
HEADS = ("heads", "kv_heads")


def muon_matrix(axes: tuple[str | None, ...], per_head: bool = False) -> optax.contrib.MuonDimensionNumbers | None:
    """The matrix [in, out] as which Muon sees a parameter with these axis names; None: it belongs to AdamW.

    A matrix is what `layers.linear.input_axes` says is one. Whole, always: the maps of the feed-forward layer
    ("embed" x "mlp"), and the first factor of a low rank ("embed" x "rank"). With an axis over heads: queries, keys,
    values and output gates, "embed" x ("heads", "head_dim"); the output of a mixer, ("heads", "head_dim") x "embed";
    the second factor of a low rank, "rank" x ("heads", "head_dim"). These are one matrix with all heads, or with
    `per_head` a matrix for each head, such as "embed" x "head_dim", with an axis over key heads ("kv_heads") too. Axes
    are counted from the right, since stacked layers come first without a name: each layer is a matrix of its own, and
    so is each expert ("expert", ...).
    """
    axes = axes[1:] if axes[:1] == ("expert",) else axes
    cut = input_axes(axes)
    if cut is None:
        return None
    apart = HEADS if per_head else ()
    places = [place for place in range(-len(axes), 0) if axes[place] not in apart]
    inputs = tuple(place for place in places if place < cut - len(axes))
    return optax.contrib.MuonDimensionNumbers(inputs, tuple(places[len(inputs) :]))


def matrix_sides(shape: tuple[int, ...], matrix: optax.contrib.MuonDimensionNumbers) -> tuple[int, int]:
    """(in, out): the size of `matrix` in an array of this shape."""
    rows, columns = (math.prod(shape[place] for place in side) for side in matrix)
    return rows, columns


def muon_matrices(axes: Any, per_head: bool = False) -> Any:
    """`muon_matrix` of each parameter. `axes`: ModelParts.axes."""
    return jax.tree.map(lambda one: muon_matrix(one, per_head), axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def make_optimiser(config: OptimizerConfig, decay_mask: Any, axes: Any) -> optax.GradientTransformation:
    """Clip the global norm to `clip_norm` (0: no clipping), then the update of `config.name`. g: clipped gradient of w.

      adamw      m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   w -= rate (m' / (sqrt(v') + epsilon) + decay w)
      muon       m = c m + (1 - c) g, c = muon_momentum;             w -= rate (0.2 sqrt(max(in, out)) O + decay w)
                 for each matrix of `muon_matrix`, [in, out], where all heads are one matrix, or with muon_per_head
                 each head is one; all other parameters by adamw, with the same rate
      lion       u = sign(b1 m + (1 - b1) g);   m = b2 m + (1 - b2) g;                      w -= rate (u + decay w)
      adafactor  v = d v + (1 - d) g^2, d = 1 - n^-0.8, n = 1, 2, ...; u = g / sqrt(v) / max(1, rms(g / sqrt(v)))
                                                                    w -= rate (max(rms(w), 0.001) u + decay w)

    m' and v' are m and v divided by 1 - b^n. O is c m' + (1 - c) g' with its singular values brought near 1 by five
    Newton-Schulz steps (Nesterov's form of the mean). Adafactor keeps v of an array whose two largest axes have 128
    places or more as its means over each of the two; rms is over a whole array, all stacked layers together.
    Weight decay applies to the parameters that are True in `decay_mask`. `axes`: the axis names of each parameter.

    State, in numbers per parameter: adamw 2, muon 1 (2 where AdamW is used), lion 1, adafactor 1 or much less.
    Sources: Loshchilov and Hutter, arXiv 1711.05101; Jordan, github.com/KellerJordan/Muon, with the scale of Liu et
    al., arXiv 2502.16982; Chen et al., arXiv 2302.06675; Shazeer and Stern, arXiv 1804.04235. All are optax's.
    """
    update = _update(config, decay_mask, axes)
    if config.clip_norm == 0:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _update(config: OptimizerConfig, decay_mask: Any, axes: Any) -> optax.GradientTransformation:
    rate, decay = learning_rate_schedule(config), config.weight_decay
    if config.name == "lion":
        return optax.lion(rate, b1=config.b1, b2=config.b2, weight_decay=decay, mask=decay_mask)
    if config.name == "adafactor":
        # Optax subtracts this decay without the learning rate.
        return optax.adafactor(rate, weight_decay_rate=lambda n: decay * rate(n), weight_decay_mask=decay_mask)
    adamw = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.epsilon, weight_decay=decay, mask=decay_mask)
    if config.name == "adamw":
        return adamw
    if config.name != "muon":
        raise ValueError(f"optimizer.name = {config.name!r}: must be one of adamw, muon, lion, adafactor")
    return _muon(config, decay_mask, axes, adamw)


def _muon(
    config: OptimizerConfig, decay_mask: Any, axes: Any, adamw: optax.GradientTransformation
) -> optax.GradientTransformation:
    # optax.contrib.muon decays every parameter that is no matrix and gives its Adam Nesterov's form, so its parts are
    # put together here.
    found = muon_matrices(axes, config.muon_per_head)
    is_matrix = lambda leaf: leaf is None or isinstance(leaf, optax.contrib.MuonDimensionNumbers)
    labels = jax.tree.map(lambda matrix: "adamw" if matrix is None else "muon", found, is_leaf=is_matrix)
    matrices = jax.tree.map(lambda m: optax.MaskedNode() if m is None else m, found, is_leaf=is_matrix)

    def to_rms(updates: Any, _: Any) -> Any:
        def scaled(update: jax.Array, matrix: optax.contrib.MuonDimensionNumbers) -> jax.Array:
            # O has the root mean square 1 / sqrt(max(in, out)).
            return MUON_RMS * math.sqrt(max(matrix_sides(update.shape, matrix))) * update

        return jax.tree.map(scaled, updates, matrices)

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=matrices),
        optax.stateless(to_rms),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )
    return optax.partition({"muon": muon, "adamw": adamw}, labels)
