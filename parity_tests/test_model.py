"""Logits and loss of whole models, causality, and the loss of a new model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from minillm_core.data.batches import Batch
from minillm_core.model.params import init_params
from minillm_jax import weights
from minillm_jax.loss import mean_loss as jax_mean_loss
from minillm_jax.loss import token_losses as jax_token_losses
from minillm_torch.loss import mean_loss as torch_mean_loss
from minillm_torch.loss import token_losses as torch_token_losses
from parity_tests.conftest import (
    LENGTHS,
    MODELS,
    TIERS,
    Pair,
    Tier,
    assert_close,
    make_pair,
    pair_of,
    random_tokens,
    to_numpy,
    to_torch,
    torch_batch,
)


@partial(jax.jit, static_argnums=0)
def jax_loss(graphdef: Any, params: weights.Params, rope: weights.Params, batch: Batch) -> jax.Array:
    return jax_mean_loss(weights.merge_model(graphdef, params, rope), batch)


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_and_loss(pair: Pair, length: int) -> None:
    tokens = random_tokens(pair.config, 2, length + 1)
    logits_jax, logits_torch = pair.logits(tokens[:, :-1])
    assert_close("logits", logits_jax, logits_torch, pair.tier.logits)
    loss_jax = jax.jit(jax_token_losses)(jnp.asarray(logits_jax, pair.tier.jax), jnp.asarray(tokens[:, 1:]))
    loss_torch = torch_token_losses(to_torch(logits_torch, pair.tier.torch), to_torch(tokens[:, 1:]))
    assert_close("loss", to_numpy(loss_jax), to_numpy(loss_torch), pair.tier.logits)
    log_probs = torch.log_softmax(to_torch(logits_torch, torch.float64), -1)
    expected = -torch.gather(log_probs, -1, to_torch(tokens[:, 1:, None]))[..., 0]
    assert_close("loss against log_softmax", to_numpy(loss_jax), to_numpy(expected), pair.tier.logits)


def test_mean_loss_predicts_the_next_token(tier: Tier) -> None:
    pair = make_pair(MODELS["gqa"], tier)
    tokens = random_tokens(pair.config, 2, 65)
    with torch.no_grad():
        theirs = torch_mean_loss(pair.torch, torch_batch(tokens))
    ours = to_numpy(jax_loss(*weights.split_model(pair.jax), Batch.from_rows(tokens)))
    assert_close("mean loss", ours, to_numpy(theirs), tier.logits)
    log_probs = torch.log_softmax(to_torch(pair.logits(tokens)[1], torch.float64), -1)
    expected = -np.mean([float(log_probs[b, t, tokens[b, t + 1]]) for b in range(2) for t in range(64)])
    assert abs(float(theirs) - expected) <= tier.logits


@pytest.mark.parametrize("name", ["gqa", "mqa-untied"])
def test_causality_by_gradient(name: str, float64: object) -> None:
    """The gradient at position t reaches the embeddings of tokens 0 to t, and of no later token."""
    config = MODELS[name]
    pair = make_pair(config, TIERS["float64"])
    length, t = 12, 7
    tokens = np.arange(length)[None]  # distinct, so that each has its own row of the embedding

    graphdef, params, rope = weights.split_model(pair.jax)

    def pick(embedding: jax.Array) -> jax.Array:
        inner = params | {"model.embed_tokens.embedding": embedding}
        hidden_BTD, _ = weights.merge_model(graphdef, inner, rope).model(jnp.asarray(tokens), None)
        return jnp.sum(hidden_BTD[0, t] * jnp.arange(1.0, config.width + 1))

    ours = np.abs(to_numpy(jax.jit(jax.grad(pick))(params["model.embed_tokens.embedding"]))).max(axis=1)
    pair.torch.zero_grad()
    hidden_BTD, _ = pair.torch.model(to_torch(tokens), None)
    (hidden_BTD[0, t] * torch.arange(1.0, config.width + 1)).sum().backward()
    theirs = np.abs(to_numpy(pair.torch.model.embed_tokens.weight.grad)).max(axis=1)
    for framework, reach in (("jax", ours), ("torch", theirs)):
        assert (reach[: t + 1] > 0).all(), f"{framework}: a visible token has no influence"
        assert (reach[t + 1 : length] == 0).all(), f"{framework}: a later token has influence"


@pytest.mark.parametrize("name", ["gqa", "mqa-untied"])
def test_initial_loss_equals_uniform_guessing(name: str) -> None:
    config = MODELS[name]
    pair = pair_of(config, TIERS["float32"], init_params(config, seed=0))
    tokens = random_tokens(config, 4, 257)
    for framework, loss in (
        ("jax", float(jax_loss(*weights.split_model(pair.jax), Batch.from_rows(tokens)))),
        ("torch", float(torch_mean_loss(pair.torch, torch_batch(tokens)).detach())),
    ):
        assert abs(loss - np.log(config.vocab_size)) < 0.05, f"{framework}: first loss {loss}"
