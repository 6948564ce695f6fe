"""Which blocks of models of transformers stand for themselves in a pass that masks one site of the last."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tests.model.tiny_hf import LENGTH, MODELS, SMALL, VOCAB, padded_tokens, tokens
from torch import Tensor

from spd_hydra import rng
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.decomposition.blocks import BlockWrapper
from spd_hydra.decomposition.clean_pass import Reuse
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask
from spd_hydra.model.tokens_in import TokensIn, adapt

C = 3
_THREE: dict[str, Any] = SMALL | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": ["full_attention"] * 3,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
_GEMMA4: dict[str, Any] = _THREE | {"global_head_dim": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=2),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(**_THREE, num_kv_shared_layers=1, laurel_rank=4),
    "gemma4": lambda: transformers.Gemma4TextConfig(**_GEMMA4, num_kv_shared_layers=1),
    "gemma4 without sharing": lambda: transformers.Gemma4TextConfig(**_GEMMA4, num_kv_shared_layers=0),
    "xlm": lambda: transformers.XLMConfig(
        **{name: SMALL[name] for name in ("vocab_size", "max_position_embeddings", "bos_token_id")},
        **{"emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 3},
    ),
}


def target(name: str) -> TokensIn:
    kind, config = MODELS[name] if name in MODELS else ("causal_lm", CONFIGS[name])
    head = transformers.AutoModelForCausalLM if kind == "causal_lm" else transformers.AutoModelForMaskedLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (transformers.XLMWithLMHeadModel if name == "xlm" else head.from_config)(config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapt(model.eval(), "logits")


def decomposed(name: str, pattern: str) -> DecomposedModel:
    sites = {"all": SitePattern(pattern=pattern, C=C)}
    ci_fn = SharedMLPCausalImportance(hidden=[4])
    return DecomposedModel(target(name), Decomposition(sites=sites), ci_fn, seed=0)


def reuse(of: DecomposedModel, batch: Tensor) -> Reuse:
    clean = of.clean_pass(batch)
    return Reuse(clean, of.activations(clean), products={})


def mask(batch: Tensor) -> SiteMask:
    generator = rng.generator(0, "mask")
    return SiteMask(
        torch.rand(*batch.shape, C, generator=generator), torch.rand(batch.shape, generator=generator)
    )


def run_by(of: DecomposedModel, batch: Tensor, site: str) -> list[str]:
    """Paths of the blocks that run where one site is masked."""
    kept = reuse(of, batch)
    ran: list[str] = []
    blocks = [module for module in of.patched.module.modules() if isinstance(module, BlockWrapper)]
    hooks = [
        own.block.register_forward_pre_hook(lambda *_, path=own.path: ran.append(path)) for own in blocks
    ]
    with torch.no_grad():
        of(batch, {site: mask(batch)}, reuse=kept)
    for hook in hooks:
        hook.remove()
    return ran


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gpt2", "transformer.h.*.mlp.*"),
        ("llama", "model.layers.*.mlp.*"),
        ("gpt_neox", "gpt_neox.layers.*.mlp.*"),
        ("qwen2", "model.layers.*.mlp.*"),
        ("qwen3", "model.layers.*.mlp.*"),
        ("mistral", "model.layers.*.mlp.*"),
        ("bert", "bert.encoder.layer.*.output.dense"),
        ("gemma4 without sharing", "model.layers.*.mlp.*"),
    ],
)
def test_blocks_that_share_nothing_do_not_run_before_that_of_the_masked_site(name: str, pattern: str) -> None:
    of = decomposed(name, pattern)
    last = of.site_names[-1]
    block = ".".join(last.split(".")[: pattern.split(".").index("*") + 1])
    assert run_by(of, tokens(), last) == [block]
    assert len({site.split(".")[pattern.split(".").index("*")] for site in of.site_names}) > 1


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_of_blocks_before_it_those_run_whose_keys_later_blocks_read(name: str) -> None:
    of = decomposed(name, "model.layers.*.mlp.*")
    ran = run_by(of, tokens(), "model.layers.2.mlp.down_proj")
    assert [path for path in ran if path.startswith("model.layers.")] == ["model.layers.1", "model.layers.2"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_a_pass_of_a_model_that_shares_keys_is_the_same_with_what_the_clean_pass_gave(
    name: str, padded: bool
) -> None:
    of, batch = decomposed(name, "model.layers.*.[ms]*.*_proj"), padded_tokens() if padded else tokens()
    real = batch >= 0
    with torch.no_grad():
        kept = reuse(of, batch)
        for site in kept.clean.inputs:
            masks = {site: mask(batch)}
            found, wanted = of(batch, masks, reuse=kept)[real], of(batch, masks)[real]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=site)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gemma3n", "model.layers.*.mlp.*"),
        ("xlm", "transformer.attentions.*.*"),
        ("opt", "model.decoder.layers.*.fc*"),
    ],
)
def test_gradients_of_recomputed_blocks_that_share_more_than_their_inputs_are_those_of_blocks_that_are_kept(
    name: str, pattern: str
) -> None:
    gradients = []
    for recompute in (True, False):
        of = decomposed(name, pattern)
        masks = {site: mask(tokens()) for site in of.site_names}
        output = of(tokens(), masks, reuse=reuse(of, tokens()) if recompute else None, recompute=recompute)
        assert output.shape == (3, LENGTH, VOCAB)
        of(tokens()[:1], {site: mask(tokens()[:1]) for site in of.site_names})  # another pass in between
        torch.autograd.backward(output.square().sum())
        gradients.append(torch.cat([p.grad.flatten() for p in of.component_parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
