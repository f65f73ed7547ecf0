"""How far two models are apart, against the definition with whole attention matrices in float64."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from deltaformer_jax.config import MeshConfig, Mixer, ModelConfig
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import merge, model_parts, params_of
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.on_mesh import drift as module

MODEL = ModelConfig(vocab_size=32, d_model=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8)
IDS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]], np.int32)


def log_weights(query, key, ids, strict, window, log_decay=None, behind=False):
    """[B, H, T, T] in float64, −inf where a token is not seen."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scores = np.einsum("bthk,bihk->bhti", query, key)
    if log_decay is not None:
        summed = np.cumsum(np.moveaxis(np.asarray(log_decay, np.float64), 1, 2), axis=-1)
        scores += summed[..., None] - summed[..., None, :]
    ahead = np.arange(ids.shape[1])[:, None] - np.arange(ids.shape[1])
    seen = (
        (ahead >= strict)
        & ((ahead < (window or 99)) | behind)
        & (ids[:, :, None] == ids[:, None])
        & (ids > 0)[:, :, None]
    )
    scores = np.where(seen[:, None], scores, -np.inf)
    total = np.exp(scores).sum(-1, keepdims=True)
    return scores - np.log(np.where(total > 0, total, 1.0))  # a row that sees nothing has the weights 0


def divergence(one, other):
    seen = np.isfinite(one)
    values = np.where(seen, np.exp(np.where(seen, one, 0.0)) * (np.where(seen, one, 0) - np.where(seen, other, 0)), 0)
    return values.sum(-1).sum() / seen.any(-1).sum()


def test_similarity_and_divergence_are_their_definition(monkeypatch):
    """A pattern of a window, DeltaFormer with a projected write, a mixer without attention, and a forgetting gate; the
    second has a window too, behind which it sees first tokens and separators."""
    monkeypatch.setattr(module, "_WEIGHTS", 2 * 4 * 12 * 5)  # five rows of the weights at once: three pieces of twelve
    mixers = (
        Mixer("softmax_attention", window=3),
        Mixer(
            "delta_former",
            write_query="projected",
            qk_norm=True,
            window=2,
            initial_tokens=1,
            separator_tokens=(3, 4, 5),
        ),
        "delta_net",
        Mixer("softmax_attention", forget_gate=True),
    )
    old = dataclasses.replace(MODEL, mixers=mixers, num_layers=8)
    new = dataclasses.replace(old, rope_base=500.0)
    teacher, model = model_parts(old), model_parts(new)
    params = [params_of(LanguageModel(old, rngs=nnx.Rngs(seed))) for seed in (0, 1)]
    batch = {"tokens": np.random.default_rng(0).integers(0, 32, IDS.shape).astype(np.int32), "segment_ids": IDS}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    found = module.drift(mesh, (teacher, params[0]), (model, params[1]), [batch, batch])
    streams = []
    for parts, own in ((teacher, params[0]), (model, params[1])):
        _, seen = merge(parts, own).look(batch["tokens"], lambda a, b, _: (a, b), segment_ids=IDS)
        streams.append([np.asarray(x, np.float64) for x in seen])
    a, b = streams[0][1], streams[1][1]
    cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    np.testing.assert_allclose(found.similarity, cosine[:, IDS > 0].mean(-1), rtol=1e-5)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0], [0, *range(11)]])
    for layer in range(8):
        kinds = {"read": [], "write": []}
        for (parts, own), (before, _) in zip(((teacher, params[0]), (model, params[1])), streams):
            block = jax.tree.map(lambda x, n=layer // 4: x[n], merge(parts, own).blocks[layer % 4])
            if layer % 4 == 2:
                continue
            given = block.mixer_norm(before[layer].astype(np.float32))
            compared = block.mixer.compared(given, segment_ids=IDS, positions=positions)
            for kind, of in compared.items():
                window = (3, 2, None, None)[layer % 4]
                lasts = (positions == 0) | np.isin(batch["tokens"], (3, 4, 5))
                behind = lasts[:, None] if layer % 4 == 1 else False
                weights = log_weights(**of, ids=IDS, strict=kind == "write", window=window, behind=behind)
                kinds[kind].append(weights)
        for kind, pair in kinds.items():
            value = getattr(found, kind)[layer]
            if pair:
                np.testing.assert_allclose(value, divergence(*pair), rtol=1e-4)
            else:
                assert np.isnan(value)
    both = module.divergence(mesh, (teacher, params[0]), (model, params[1]), batch)
    assert (both[2::4] == 0).all() and (both[1::4] > found.read[1::4]).all()


def test_what_the_attention_compares_is_what_it_attends_with():
    """The weights from `compared`, times the values, are the mixer's output before its last product."""
    for entry in ("softmax_attention", "delta_former", Mixer("delta_former", write_rope_base=0.0)):
        config = dataclasses.replace(MODEL, mixers=(entry,), num_layers=1)
        mixer = jax.tree.map(lambda x: x[0], LanguageModel(config, rngs=nnx.Rngs(0)).blocks[0]).mixer
        x = np.random.default_rng(0).normal(size=(*IDS.shape, 16)).astype(np.float32)
        x = np.where((IDS > 0)[..., None], x, 0)
        positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0], [0, *range(11)]])
        compared = mixer.compared(x, segment_ids=IDS, positions=positions)
        *_, value, _, _ = mixer.inputs(x, positions=positions, segment_ids=IDS)
        value = np.asarray(value, np.float64)
        if "write" in compared:
            weights = np.exp(log_weights(**compared["write"], ids=IDS, strict=True, window=None))
            beta = np.asarray(mixer._beta(x), np.float64)
            u = np.zeros_like(value)
            for t in range(value.shape[1]):
                past = np.einsum("bgi,bigv->bgv", weights[:, :, t], u)
                u[:, t] = value[:, t] - beta[:, t, :, None] * past
            value = u
        weights = np.exp(log_weights(**compared["read"], ids=IDS, strict=False, window=None))
        read = np.einsum("bhti,bihv->bthv", weights, np.repeat(value, 2, axis=2))
        expected = np.einsum("bthv,hvd->btd", read, np.asarray(mixer.output[...], np.float64))
        found, _ = mixer(x, segment_ids=IDS, positions=positions)
        np.testing.assert_allclose(found, np.where((IDS > 0)[..., None], expected, 0), rtol=1e-4, atol=1e-5)
