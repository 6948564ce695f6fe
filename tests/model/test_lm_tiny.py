"""The small language model: its shape, its loss, its seeds, its mistakes."""

import math

import pytest
import torch

from spd_hydra import rng
from spd_hydra.model.lm_tiny import TinyLM
from spd_hydra.section import ConfigError

SMALL = TinyLM(vocabulary=300, context=8, d_model=16, d_mlp=24, n_layers=2, n_heads=2)
TOKENS = torch.arange(24).view(3, 8) * 7 % 300


def test_logits_at_a_position_depend_on_no_later_token() -> None:
    module = SMALL.build(rng.generator(0, "weights")).eval()
    changed = TOKENS.clone()
    changed[:, 5:] = 1
    with torch.no_grad():
        before, after = module(TOKENS), module(changed)
    assert before.shape == (3, 8, 300)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


def test_the_loss_is_the_mean_of_minus_log_the_chance_of_the_next_token() -> None:
    module = SMALL.build(rng.generator(0, "weights")).eval()
    with torch.no_grad():
        chances = module(TOKENS).double().softmax(dim=-1)
        loss = SMALL.training_loss(module, TOKENS).item()
    own = [-math.log(chances[row, place, TOKENS[row, place + 1]]) for row in range(3) for place in range(7)]
    assert loss == pytest.approx(sum(own) / 21, rel=1e-5)


def test_weights_follow_from_the_seed_and_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (SMALL.build(rng.generator(seed, "weights")).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.2)


def test_the_embedding_is_the_unembedding() -> None:
    module = SMALL.build(rng.generator(0, "weights"))
    assert module.get_parameter("model.embed_tokens.weight") is module.get_parameter("lm_head.weight")


def test_heads_that_do_not_share_the_stream_evenly_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"d_model: got 20, must be a multiple of 2 \* n_heads = 8"):
        TinyLM(d_model=20, n_heads=4)
