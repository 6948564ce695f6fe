"""RunConfig: what is refused, what is saved, and that it loads back as the same thing."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.ci_fn.sigmoid import Sigmoid
from spd_hydra.config import Device, RunConfig, Task, problems, sections
from spd_hydra.data.sparse_features import SparseFeatures
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.importance_minimality import ImportanceMinimality
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.persistent_recon import PersistentPGDRecon
from spd_hydra.loss.recon import Recon
from spd_hydra.model.tms import TMS, BiasInit
from spd_hydra.precision import Precision
from spd_hydra.saved_config import differences, from_dict, load_config, to_dict, to_yaml
from spd_hydra.schedule import Schedule, ScheduleKind
from spd_hydra.section import ConfigError, Section, checks_deferred
from spd_hydra.trainer_config import FaithfulnessWarmup, Training


def config(**changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "name": "tms",
        "model": TMS(n_features=6, bias_init=BiasInit.zero),
        "data": SparseFeatures(feature_probability=0.1),
        "ci_fn": MLPCausalImportance(hidden=8),
        "decomposition": Decomposition(
            sites={
                "embed": SitePattern(pattern="embed", C=20),
                "hidden": SitePattern(pattern="hidden.*", C=5),
            },
            tied={"unembed": "embed", "hidden.0": "embed"},
            sigmoid=Sigmoid.leaky_hard_paper,
        ),
        "loss": LossSet(
            divergence=Divergence.kl,
            stochastic_recon=Recon(coeff=0.5, n_samples=3),
            extra={"mine": Recon(coeff=0.25)},
        ),
        "train": Training(
            steps=7,
            lr_schedule=Schedule(kind=ScheduleKind.linear, final_fraction=0.1),
            precision=Precision.bf16,
            clip_components=0.01,
        ),
    }
    return RunConfig(**(fields | changes))


def without_extra() -> RunConfig:
    return config(loss=LossSet(stochastic_recon=Recon(coeff=0.5, n_samples=3)))


def changed(path: str, value: object) -> dict[str, Any]:
    """Plain data of a configuration with one value set."""
    data = to_dict(without_extra())
    inner = data
    *parents, last = path.split(".")
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return data


def test_plain_data_loads_back_as_the_same_configuration() -> None:
    original = without_extra()
    again = from_dict(to_dict(original))
    assert again == original
    assert type(again.model) is TMS
    assert again.train.lr_schedule.kind is ScheduleKind.linear
    assert again.decomposition.tied == {"unembed": "embed", "hidden.0": "embed"}


def test_another_kind_of_a_group_loads_back_as_that_kind() -> None:
    original = config(
        ci_fn=SharedMLPCausalImportance(hidden=[3, 4]), loss=LossSet(unmasked_recon=Recon(coeff=1))
    )
    assert from_dict(to_dict(original)).ci_fn == SharedMLPCausalImportance(hidden=[3, 4])


def test_plain_data_is_plain() -> None:
    data = to_dict(config())
    assert json.loads(json.dumps(data)) == data
    assert data["task"] == "decompose"
    assert data["model"]["_kind_"] == "model/tms"
    assert data["train"]["lr_schedule"]["kind"] == "linear"
    assert data["train"]["clip_ci_fn"] is None


def test_plain_data_shares_nothing_with_the_configuration() -> None:
    original = config(ci_fn=SharedMLPCausalImportance(hidden=[3]))
    before = copy.deepcopy(original)
    data = to_dict(original)
    data["ci_fn"]["hidden"].append(4)
    data["decomposition"]["tied"]["a"] = "b"
    assert original == before


def test_a_saved_file_loads_back(tmp_path: Path) -> None:
    original = without_extra()
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(original), encoding="utf-8")
    assert load_config(path) == original


def test_every_value_of_the_first_level_survives_the_round_trip() -> None:
    original = without_extra()
    for values in (
        {"task": Task.analyse, "run": "outputs/α"},
        {"device": Device.cuda},
        {"seed": 12},
        {"resume": "12"},
        {"allow_extra": True},
    ):
        again = from_dict(yaml.safe_load(to_yaml(dataclasses.replace(original, **values))))
        assert {field: getattr(again, field) for field in values} == values


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("train.lr", -1.0, ["train.lr: got -1.0, must be > 0"]),
        ("train.lr", float("nan"), ["train.lr: got nan"]),
        ("decomposition.sites.embed.C", 0, ["decomposition.sites.embed.C: got 0, must be ≥ 1"]),
        ("loss.stochastic_recon.coeff", -0.5, ["loss.stochastic_recon.coeff: got -0.5, must be ≥ 0"]),
        ("model._kind_", "model/nothing", ["model: unknown kind 'model/nothing'", "tms"]),
        ("logger._kind_", "model/tms", ["logger: cannot be of kind 'model/tms'"]),
        ("train._kind_", "model/tms", ["train: cannot be of kind 'model/tms'"]),
        ("_kind_", "model/tms", ["a run is of no kind"]),
        ("evil", {"_kind_": "model/tms"}, ["evil: cannot be of kind 'model/tms'"]),
        (
            "loss.extra.evil",
            {"_kind_": "logger/wandb"},
            ["loss.extra.evil: cannot be of kind 'logger/wandb'"],
        ),
        ("logger.project", "${oc.env:HOME}", ["logger.project: got '${oc.env:HOME}'", "not references"]),
        ("decomposition.sites", {"../x": {"pattern": "embed", "C": 2}}, ["got the name '../x', must be"]),
        ("train.lr_schedule.kind", "wavy", ["wavy"]),
        ("train.stepz", 3, ["stepz"]),
        ("sed", 3, ["sed"]),
        ("model.n_featurez", 3, ["n_featurez"]),
        ("train.steps", "many", ["train.steps", "many"]),
        ("task", "sing", ["task", "sing"]),
        ("model", None, ["model"]),
    ],
)
def test_saved_data_that_does_not_fit_is_refused_by_key_and_value(
    path: str, value: object, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(changed(path, value))
    for word in words:
        assert word in str(caught.value)


def test_every_problem_of_saved_data_is_told_at_once() -> None:
    data = changed("train.lr", -1.0)
    data["eval"]["batches"] = 0
    with pytest.raises(ConfigError, match=r"train\.lr: got -1\.0.*; eval\.batches: got 0"):
        from_dict(data)


def test_missing_parts_are_refused() -> None:
    data = to_dict(without_extra())
    del data["model"]
    with pytest.raises(ConfigError, match="model"):
        from_dict(data)


def test_a_folder_without_a_configuration_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run directory: it holds no config\.yaml"):
        load_config(tmp_path / "config.yaml")


def test_a_file_is_no_run_directory_and_the_one_that_it_is_in_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    for name, hint in (("config.yaml", f"; did you mean {tmp_path}?"), ("deeper/notes.txt", "")):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
        with pytest.raises(ConfigError) as caught:
            load_config(file / "config.yaml")
        assert str(caught.value) == f"{file} is a file and no run directory{hint}"


@pytest.mark.parametrize(
    ("runs", "listed"),
    [
        (["0"], "0"),
        (["10", "9", "0"], "0, 9, 10"),
        ([str(n) for n in range(12)], "0, 1, 2, …, 11"),
    ],
)
def test_a_folder_of_runs_is_no_run_directory_and_says_which_it_holds(
    tmp_path: Path, runs: list[str], listed: str
) -> None:
    for name in runs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "figures").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml")
    assert str(caught.value) == (
        f"{tmp_path} is no run directory: it holds runs, {listed}: take one of them, e.g. {tmp_path / '0'}"
    )


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n- 2\n", b"", b"name: caf\xe9\n", b"a: 2026-99-99\n"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        load_config(path)


def test_a_loss_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^loss: all coefficients are 0"):
        config(loss=LossSet())


def test_a_decomposition_without_sites_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^decomposition\.sites: got none"):
        config(decomposition=Decomposition())


def test_all_problems_are_listed_with_full_keys() -> None:
    with checks_deferred():
        wrong = config(
            seed=-1,
            train=Training(lr=-1, faithfulness_warmup=FaithfulnessWarmup(steps=-1)),
            loss=LossSet(importance_minimality=ImportanceMinimality(coeff=1, p_end=0)),
        )
    assert [problem.key for problem in problems(wrong)] == [
        "seed",
        "loss.importance_minimality.p_end",
        "train.lr",
        "train.faithfulness_warmup.steps",
    ]


def test_equal_configurations_have_no_differences() -> None:
    assert differences(config(), config()) == []


def test_differences_are_full_keys_with_both_values() -> None:
    old = config()
    new = config(
        seed=3,
        train=dataclasses.replace(old.train, steps=9, clip_components=None),
        decomposition=Decomposition(
            sites={"embed": SitePattern(pattern="embed", C=20), "u": SitePattern(pattern="unembed", C=4)},
            tied=old.decomposition.tied,
            sigmoid=Sigmoid.leaky_hard_paper,
        ),
    )
    assert {(key, before, after) for key, before, after in differences(old, new)} == {
        ("seed", 0, 3),
        ("train.steps", 7, 9),
        ("train.clip_components", 0.01, None),
        ("decomposition.sites.hidden.pattern", "hidden.*", None),
        ("decomposition.sites.hidden.C", 5, None),
        ("decomposition.sites.hidden.lr_factor", 1.0, None),
        ("decomposition.sites.u.pattern", None, "unembed"),
        ("decomposition.sites.u.C", None, 4),
        ("decomposition.sites.u.lr_factor", None, 1.0),
    }


def test_another_kind_is_a_difference() -> None:
    keys = {key for key, _, _ in differences(config(), config(ci_fn=SharedMLPCausalImportance()))}
    assert keys == {"ci_fn._kind_", "ci_fn.hidden"}


def test_sections_walks_the_whole_tree() -> None:
    found: dict[str, Section] = dict(sections(config()))
    assert {"", "model", "train.lr_schedule", "decomposition.sites.embed", "loss.extra.mine"} <= found.keys()
    assert isinstance(found["train.lr_schedule"], Schedule)


def test_no_field_can_be_mistaken_for_the_name_of_a_kind() -> None:
    for key, section in sections(config()):
        names = [field.name for field in dataclasses.fields(section)]
        assert not any(name.startswith("_") for name in names), key


def test_every_field_of_every_section_says_what_it_means() -> None:
    for key, section in sections(config()):
        for field in dataclasses.fields(section):
            assert field.metadata.get("help"), f"{key}.{field.name}"


def test_replicas_have_no_adversary_that_lasts() -> None:
    message = (
        "^train.replicas: got 2 with persistent_pgd_recon, whose sources last, must be 1; make runs of their"
    )
    with pytest.raises(ConfigError, match=message):
        config(
            loss=LossSet(persistent_pgd_recon=PersistentPGDRecon(coeff=0.5)),
            train=dataclasses.replace(config().train, replicas=2),
        )
