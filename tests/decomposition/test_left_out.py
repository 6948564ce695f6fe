"""What patterns match and cannot be decomposed, said in a line."""

import torch
import transformers
from tests.decomposition.test_sites import Scaled, Target, patterns, tms
from torch import nn

from spd_hydra.decomposition.left_out import left_out
from spd_hydra.decomposition.sites import find_sites


def said(target: nn.Module, **given: str) -> str | None:
    found = patterns(**{name: (pattern, 2) for name, pattern in given.items()})
    return left_out(target, found, find_sites(target, found))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.zeros(3, 4, 5))
        self.scale = nn.Parameter(torch.zeros(4))


def blocks(*layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(10, 10, bias=False)})


def test_where_all_matrices_that_patterns_match_are_decomposed_nothing_is_said() -> None:
    assert said(Target(), every="*") is None
    assert said(Target(), fc="layers.*.fc") is None
    assert said(tms(1), every="*") is None
    assert said(tms(), one="unembed") is None


def test_tensors_of_experts_are_named_with_their_number_and_share() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"router": nn.Linear(5, 4, bias=False), "experts": Experts()})

    # of 2 · (20 + 60 + 4) + 100 parameters, 2 · 60 are left out: 44.8 %
    assert said(blocks(block(), block()), all="layers.*") == (
        "not decomposed, though the patterns match: 2 tensors, 44.8% of the target's parameters, which are "
        "no matrices of Linear, Embedding or Conv1D layers: layers.*.experts.matrices (Experts)"
    )
    assert said(blocks(block(), block()), router="layers.*.router") is None


def test_an_embedding_with_a_forward_of_its_own_is_named_also_where_its_weight_is_shared() -> None:
    target = nn.ModuleDict({"embed": Scaled(7, 2), "head": nn.Linear(2, 7, bias=False)})
    target["head"].weight = target["embed"].weight
    assert said(target, every="*") == (
        "not decomposed, though the patterns match: 1 tensors, 100.0% of the target's parameters, which are "
        "no matrices of Linear, Embedding or Conv1D layers: embed.weight (Scaled)"
    )


def test_the_experts_and_routers_of_mixtral_are_named() -> None:
    small = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    with torch.device("meta"):
        line = said(
            transformers.MixtralForCausalLM(transformers.MixtralConfig(**small, **heads)), b="*.[0-9]*.*"
        )
    # by hand: a block has experts of 4 · (96 · 32 + 32 · 48), a router of 4 · 32, attention of
    # 2 · 32² + 2 · 32 · 16 and two norms of 32; besides there are two matrices of 50 · 32 and a norm
    experts, attention = 4 * (96 * 32 + 32 * 48) + 4 * 32, 2 * 32**2 + 2 * 32 * 16
    share = 2 * experts / (2 * (experts + attention + 64) + 2 * 50 * 32 + 32)
    assert line is not None
    assert line.startswith(
        f"not decomposed, though the patterns match: 6 tensors, {share:.1%} of the target's"
    )
    for name in ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        assert f"model.layers.*.{name} (Mixtral" in line
