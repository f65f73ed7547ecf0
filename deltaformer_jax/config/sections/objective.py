"""The section `objective`: what a training step minimises."""

import dataclasses

from deltaformer_jax.config.fields import setting
from deltaformer_jax.host.arguments import whole_numbers


@dataclasses.dataclass
class ObjectiveConfig:
    """What a training step minimises. Evaluations always take the mean nats of a token by the whole model."""

    name: str = setting(
        "language_model",
        'What is minimised. "language_model": the mean nats of a token. "elastic": the same, of a model that leaves '
        "out some layers in steps drawn at random, so that layers can be removed after training. docs/pruning.md.",
        choices=("language_model", "elastic"),
    )
    depths: str = setting(
        "",
        'Numbers of layers that a step of "elastic" may train beside all of them, separated by commas: "9,6".',
    )
    depth_probability: float = setting(
        0.5,
        'The probability that a step of "elastic" trains one of `depths`, each as likely as the others. Other steps '
        "train all layers. The draw follows from run.seed and the step.",
        least=0,
        most=1,
    )
    drop: str = setting(
        "last",
        'The layers that a smaller depth of "elastic" leaves out. "last": the last ones. "even": evenly spaced ones. '
        'Numbers separated by commas, counted from 0 at the embedding: the first ones of this order, "7,5,6".',
    )

    def left_out(self, num_layers: int) -> list[tuple[int, ...]]:
        """The layers that each of `depths` leaves out of `num_layers`. Raises ValueError, naming the field."""
        depths = _numbers("depths", self.depths, 1, num_layers - 1, "of at least 1 layer and fewer than all")
        if not depths:
            raise ValueError('objective.depths = \'\': objective.name = "elastic" needs some, such as "9,6"')
        most = num_layers - min(depths)
        if self.drop == "last":
            return [tuple(range(depth, num_layers)) for depth in depths]
        if self.drop == "even":
            return [_spaced(num_layers - depth, num_layers) for depth in depths]
        order = _numbers("drop", self.drop, 0, num_layers - 1, 'or "last" or "even"')
        if len(order) < most:
            raise ValueError(
                f"objective.drop = {self.drop!r}: has {len(order)} layers; a depth of {min(depths)} of {num_layers} "
                f"leaves out {most}"
            )
        return [tuple(sorted(order[: num_layers - depth])) for depth in depths]


def _spaced(count: int, length: int) -> tuple[int, ...]:
    """`count` numbers below `length`, each in the middle of one of as many equal parts."""
    return tuple((2 * i + 1) * length // (2 * count) for i in range(count))


def _numbers(field: str, text: str, least: int, most: int, otherwise: str) -> list[int]:
    """The different whole numbers from least to most in `text`, which commas separate."""
    try:
        numbers = whole_numbers(text)
        fit = all(least <= number <= most for number in numbers)
    except ValueError:
        fit = False
    if not fit:
        raise ValueError(
            f"objective.{field} = {text!r}: must be numbers from {least} to {most}, separated by commas, {otherwise}"
        )
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"objective.{field} = {text!r}: a number is given once")
    return numbers
