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
        "out some layers in steps drawn at random, so that layers can be removed after training (docs/pruning.md). "
        '"mixed": the mean nats over rows of data.sequence_length and rows of short_length. "longred": the mean nats '
        "of the long rows, and how far the model has moved from teacher_workdir on short ones (docs/long_context.md).",
        choices=("language_model", "elastic", "mixed", "longred"),
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

    teacher_workdir: str = setting(
        "",
        'For "longred": the folder of the run before its context was extended. Its parameters stay as they are.',
    )
    short_data: str = setting(
        "",
        'Text of the rows of short_length of "mixed" and "longred", as in data.path. "": that of data.path.',
    )
    s2l_data: str = setting(
        "",
        'Text of the rows of the teacher\'s own length, whose positions "longred" stretches over '
        'data.sequence_length. "": that of data.path.',
    )
    short_length: int = setting(
        1024,
        'Tokens of a short row of "mixed" and "longred"; with "longred" no more than the teacher was trained on.',
        least=1,
    )
    layers: str = setting(
        "kl:6",
        'The layers after which "longred" compares the streams, beside the last one. "kl:N": the N whose attention '
        'the new rotary embedding changes most. "uniform:N": N evenly spaced ones. "all", "last", or numbers separated '
        "by commas, counted from 0 at the embedding.",
    )
    alpha_short: float = setting(5.0, 'Weight of the short rows of "longred". 0: none of them.', least=0)
    alpha_s2l: float = setting(10.0, 'Weight of the stretched rows of "longred". 0: none of them.', least=0)
    cycle: str = setting(
        "8,6,2",
        'Tokens of long, short and stretched rows in a step, as ratios; "mixed" uses the first two. The weights above '
        "are multiplied by the ratio to the long rows.",
    )
    skip: str = setting(
        "uniform",
        'How "longred" stretches the positions of a row. "uniform": its middle part lies anywhere. "cream": more '
        "often in the middle.",
        choices=("uniform", "cream"),
    )

    def shares(self) -> tuple[int, int, int]:
        """The numbers of `cycle`. Raises ValueError, naming the field."""
        try:
            numbers = whole_numbers(self.cycle)
        except ValueError:
            numbers = []
        if len(numbers) != 3 or 0 in numbers:
            raise ValueError(f"objective.cycle = {self.cycle!r}: must be three whole numbers above 0, such as 8,6,2")
        return tuple(numbers)

    def compared(self, num_layers: int) -> tuple[str, tuple[int, ...]]:
        """("kl", (N,)), the number of layers that are to be found by their attention, or ("given", the layers).

        The last layer is among those given, and beside the N others. Raises ValueError, naming the field.
        """
        rule, colon, number = self.layers.partition(":")
        last = num_layers - 1
        if self.layers in ("all", "last"):
            return "given", tuple(range(num_layers)) if self.layers == "all" else (last,)
        if colon:
            if rule not in ("kl", "uniform") or not number.isdecimal() or not 0 < int(number) < num_layers:
                raise ValueError(
                    f"objective.layers = {self.layers!r}: must be kl:N or uniform:N with N from 1 to {last}, one fewer "
                    "than the model's layers"
                )
            others = _spaced(int(number), last)
            return ("kl", (int(number),)) if rule == "kl" else ("given", (*others, last))
        given = _numbers("layers", self.layers, 0, last, 'or "kl:6", "uniform:6", "all", "last"')
        if not given:
            raise ValueError("objective.layers = '': give some, such as kl:6")
        return "given", tuple(sorted({*given, last}))

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
