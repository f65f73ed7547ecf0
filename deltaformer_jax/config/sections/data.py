"""The section `data`: the text or task to train on, and the shape of a batch."""

import dataclasses

from deltaformer_jax.config.fields import setting


@dataclasses.dataclass
class DataConfig:
    """The text or task to train on, and the shape of a batch."""

    path: str = setting(
        "",
        'What to train on. "": the running Python\'s standard library. "FOLDER": a corpus that '
        "deltaformer_jax.data.prepare made; from a gs:// folder each host reads what its rows need. "
        '"FOLDER=WEIGHT,FOLDER=WEIGHT": several corpora, mixed so that each gives its weight\'s share of the '
        'rows. "task:NAME,option=value": a synthetic task of deltaformer_jax.tasks; each row is one example.',
    )
    tokenizer: str = setting(
        "bytes",
        'Tokenizer of the standard library\'s text, when path is "": "bytes", the path of a tokenizer.json, or '
        '"bpe:SIZE", which learns a tokenizer of SIZE tokens from the text. Other data has a tokenizer of its '
        "own.",
    )
    eval_tail: float = setting(
        0.0,
        "For one prepared corpus without evaluation documents, such as one long text: the fraction at the end "
        "of each document that is kept from training and used for evaluation. 0: none.",
        least=0,
        below=1,
    )
    sequence_length: int = setting(
        256,
        "Tokens per row. Documents are laid end to end and cut into rows, conversations are packed whole; a token "
        "sees its own document only.",
        least=1,
    )
    batch_size: int = setting(
        16,
        "Rows per step, over all devices and hosts. A multiple of mesh.data * mesh.fsdp * "
        "optimizer.accumulation_steps.",
        least=1,
    )
