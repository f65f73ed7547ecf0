"""Warnings about allowed but surprising settings: unused fields, a schedule that ends before the run, a base of the
rotary embedding that is too small for the context."""

from deltaformer_jax.config.remarks.rotary_bound import beyond_bound
from deltaformer_jax.config.saved import flatten
from deltaformer_jax.config.sections import Config

# The fields of the section objective, by the names that use them.
OBJECTIVES = (
    (("elastic",), ("depths", "depth_probability", "drop")),
    (("mixed", "longred"), ("short_data", "short_length", "cycle")),
    (("longred",), ("teacher_workdir", "s2l_data", "layers", "alpha_short", "alpha_s2l", "skip")),
)


def remarks(config: Config) -> list[str]:
    """One line per warning, beginning with the field's name."""
    values, defaults = flatten(config), flatten(Config())
    optimizer, run = config.optimizer, config.run
    objective = config.objective.name
    is_task = config.data.path.startswith("task:")
    found = []
    if optimizer.schedule != "constant" and run.steps > optimizer.decay_steps:
        rate = optimizer.learning_rate * optimizer.final_learning_rate
        found.append(
            f"run.steps = {run.steps} is past optimizer.decay_steps = {optimizer.decay_steps}: later steps use the "
            f"learning rate {rate:g}, optimizer.learning_rate times optimizer.final_learning_rate"
        )
    for field, is_read, why in (
        ("data.tokenizer", not config.data.path, "the data of data.path has its own tokenizer"),
        ("optimizer.wsd_decay_fraction", optimizer.schedule == "wsd", "only optimizer.schedule = 'wsd' uses it"),
        ("optimizer.decay_steps", optimizer.schedule != "constant", "optimizer.schedule = 'constant' never decays"),
        (
            "optimizer.final_learning_rate",
            optimizer.schedule != "constant",
            "optimizer.schedule = 'constant' never decays",
        ),
        ("optimizer.skip_deviations", optimizer.skip == "deviations", "optimizer.skip = 'ratio' has its own settings"),
        ("optimizer.skip_ratio", optimizer.skip == "ratio", "only optimizer.skip = 'ratio' uses it"),
        ("optimizer.skip_floor", optimizer.skip == "ratio", "only optimizer.skip = 'ratio' uses it"),
        ("optimizer.skip_in_a_row", optimizer.skip == "ratio", "only optimizer.skip = 'ratio' uses it"),
        ("optimizer.lora_alpha", optimizer.lora_rank > 0, "optimizer.lora_rank = 0 trains all parameters"),
        ("optimizer.lora_kernels", optimizer.lora_rank > 0, "optimizer.lora_rank = 0 trains all parameters"),
        *(
            (f"objective.{field}", objective in names, f"only objective.name = {' or '.join(map(repr, names))} uses it")
            for names, fields in OBJECTIVES
            for field in fields
        ),
        ("data.eval_tail", not is_task, "a task draws examples for its evaluation"),
        ("run.sample_prompt", not is_task, "a task has no text to continue"),
        ("run.sample_tokens", not is_task, "a task has no text to continue"),
        ("run.eval_batches", run.eval_every > 0, "run.eval_every = 0 makes no evaluation"),
    ):
        if not is_read and values[field] != defaults[field]:
            found.append(f"{field} = {values[field]!r} is not used: {why}")
    return [*found, *beyond_bound(config.model, config.data.sequence_length)]
