"""Reading another project's config.json field by field: every field is taken, known to have no effect, or refused."""

from __future__ import annotations

from typing import Any

from deltaformer_jax.interop.kinds import misfits, unknown

# Fields of every config of transformers, and of programs around it, that say nothing about the model's function: how
# it runs, what training drops and how it begins, how texts are drawn, and what else a folder says of itself.
EVERYWHERE = frozenset(
    """architectures auto_map attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder label2id max_position_embeddings model_type
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type return_dict
    torch_dtype transformers_version use_cache is_llama_config transformers.js_config unsloth_version unsloth_fixed
    attn_implementation cache_implementation flash_attention gradient_checkpointing keys_to_ignore_at_inference
    use_flash_attention use_flash_attention_2 use_flash_attn use_sdpa
    attn_dropout attn_pdrop classifier_dropout dropout embd_pdrop embedding_dropout hidden_dropout hidden_dropout_prob
    residual_dropout resid_pdrop
    begin_suppress_tokens bad_words_ids diversity_penalty encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences repetition_penalty suppress_tokens
    temperature top_k top_p typical_p
    decoder_start_token_id finetuning_task max_sequence_length model_max_length name_or_path prefix sep_token_id
    task_specific_params tokenizer_class""".split()
)

# Fields of models that are not read here, or that do not exist any more. false or {} says that they are switched off.
_OFF = frozenset(
    """add_cross_attention do_sample early_stopping output_scores pruned_heads remove_invalid_values
    return_dict_in_generate rope_interleaved tf_legacy_loss tie_encoder_decoder torchscript use_bfloat16""".split()
)

# Why a field that no table takes is refused, where that is known.
_REASONS = dict.fromkeys(
    ("quantization_config", "compression_config"),
    "its tensors are quantised; give the folder from before that, in float32, float16 or bfloat16",
)

_REQUIRED = object()


def of_text(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text model in config.json, which those of a multimodal qwen3_5 hold apart. Its class ties the
    embeddings by the outer field."""
    text = values.get("text_config")
    if values.get("model_type") != "qwen3_5" or not isinstance(text, dict):
        return values
    outer = {name: values[name] for name in ("tie_word_embeddings",) if values.get(name) is not None}
    return {"model_type": "qwen3_5_text"} | text | outer


class Fields:
    """The fields of one config.json. `finish` raises one ValueError with all that has no equivalent here.

    Raises ValueError at once for values of another kind, such as a text for a number, all of them.
    """

    def __init__(self, values: dict[str, Any], ignored: str = ""):
        if wrong := misfits(values):
            raise ValueError("config.json: " + "; ".join(wrong))
        ours = {name for name in values if not name.startswith("_")}  # not a package's notes to itself
        self._values, self._rest = values, ours - EVERYWHERE - set(ignored.split())
        self._problems: list[str] = []

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field's value; `default` if it is absent or null."""
        self._rest.discard(name)
        value = self._values.get(name)
        if value is None:
            if default is _REQUIRED:
                self._problems.append(f"{name}: missing")
                return 1
            return default
        return value

    def has(self, name: str) -> bool:
        """Whether the config has the field, be it null."""
        return name in self._values

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a value other than these. The first is the one that an absent field stands for."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            self.refuse(f"{name} = {value!r}: only {' or '.join(map(repr, allowed))} has an equivalent here")

    def divides(self, part: str, whole: str) -> None:
        """Refuse a field `whole` that is no multiple of the field `part`."""
        one, all_of_it = self._values.get(part), self._values.get(whole)
        if one and all_of_it and all_of_it % one:
            self.refuse(f"{whole} = {all_of_it}: must be a multiple of {part} = {one}")

    def refuse(self, problem: str) -> None:
        self._problems.append(problem)

    def take_object(self, name: str, known: str) -> dict[str, Any]:
        """The fields of an object, without those that are null or refused; {} if it is absent. known: those that it may
        have."""
        given = self.take(name, {})
        self._problems += misfits(given, f"{name}.") + unknown(given, known, f"{name}.")
        return {key: value for key, value in given.items() if value is not None and not misfits({key: value})}

    def finish(self) -> None:
        """Raise ValueError if a field was refused, or if one is left that nothing took and that is not switched off."""
        left = {name: self._values[name] for name in sorted(self._rest)}
        off = {name for name, value in left.items() if (value is False or value == {}) and name in _OFF}
        why = {name: reason for name, reason in _REASONS.items() if left.get(name)}
        problems = self._problems + [f"{name}: {reason}" for name, reason in why.items()]
        problems += unknown(left, " ".join({*off, *why}))
        if problems:
            raise ValueError("config.json: " + "; ".join(problems))
