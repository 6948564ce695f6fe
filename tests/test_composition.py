"""What the shipped configuration composes to, which of two settings wins, and what mistakes are told as."""

import dataclasses
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.composer import Composer, apply_overrides
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.decomposition.subcomponents import Init
from spd_hydra.logger.wandb import Wandb
from spd_hydra.model.training import TrainableTarget
from spd_hydra.plan import make_plan
from spd_hydra.preflight import preflight
from spd_hydra.saved_config import from_dict, to_dict, to_yaml
from spd_hydra.schedule import ScheduleKind
from spd_hydra.section import ConfigError

CONF = Path(str(resources.files("spd_hydra.conf")))
EXPERIMENTS = sorted(
    path.relative_to(CONF / "experiment").with_suffix("").as_posix()
    for path in (CONF / "experiment").rglob("*.yaml")
    if path.stem != "none"
)
OPTIONS = sorted(
    path.relative_to(CONF).with_suffix("").as_posix()
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF
    and not any(part.startswith("_") for part in path.parts)
    and path.relative_to(CONF).parts[0] not in {"hydra", "local", "suite"}  # test_suite.py has the suites
    and path.relative_to(CONF).with_suffix("").as_posix().removeprefix("experiment/") not in EXPERIMENTS
)


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with Composer.open() as opened:
        yield opened


def errors(overrides: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value).splitlines()


# ---- what is shipped


def test_there_is_an_experiment_for_every_toy_with_both_settings() -> None:
    toys = ["tms_5-2", "tms_5-2-id", "tms_40-10", "tms_40-10-id", "resid_mlp1", "resid_mlp2", "resid_mlp3"]
    others = ["induction_heads", "lm_hf", "lm_tiny", "tms_5-2-untied"]
    assert sorted([*toys, *(f"paper/{toy}" for toy in toys), *others]) == EXPERIMENTS


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_composes_builds_and_survives_saving(composer: Composer, experiment: str) -> None:
    given = ["model.name=gpt2", "data.name=imdb"] if experiment == "lm_hf" else []
    config = composer.run_config([f"experiment={experiment}", *given])
    assert config.name == experiment
    assert from_dict(to_dict(config)) == config
    if given:  # of a model that is not here
        return
    parts = preflight(config)
    assert set(config.decomposition.tied) == (
        {"unembed"} if "tms" in experiment and "untied" not in experiment else set()
    )
    assert all(
        shape.C in {20, 64, 96, 100, 110, 160, 200, 400, 500} for shape in parts.model.site_shapes().values()
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_every_shipped_file_is_an_option_that_composes(composer: Composer, option: str) -> None:
    group, _, name = option.partition("/")
    assert name in composer.groups()[group]
    given = {
        "experiment/none": ["name=mine"],
        "model/hf": ["model.name=gpt2"],
        "data/tokens": ["data.name=imdb"],
        "experiment/lm_hf": ["model.name=gpt2", "data.name=imdb"],
    }.get(option, [])
    assert isinstance(composer.run_config([f"{group}={name}", *given]), RunConfig)


def test_every_shipped_file_begins_with_its_meaning_and_experiments_are_short() -> None:
    for path in CONF.rglob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line for line in lines[:2] if line.startswith("# ") and not line.startswith("# @")]
        assert comments, f"{path} does not say what it is"
        assert "experiment" not in path.parts or len(lines) <= 25


def test_an_experiment_sets_nothing_but_its_name_and_chooses_the_rest() -> None:
    for experiment in EXPERIMENTS:
        given = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")
        assert set(given) == {"defaults", "name"}


def test_the_paper_settings_are_those_of_the_paper(composer: Composer) -> None:
    config = composer.run_config(["experiment=paper/resid_mlp3"])
    active = {name: term.coeff for name, term in config.loss.active_terms().items()}
    assert active == {
        "faithfulness": 1.0,
        "importance_minimality": 5e-6,
        "stochastic_recon": 1.0,
        "stochastic_recon_layerwise": 1.0,
    }
    assert not config.decomposition.use_delta
    assert config.decomposition.init is Init.aligned
    assert (config.train.steps, config.train.lr, config.train.batch_size) == (200_000, 1e-3, 2048)
    assert config.train.faithfulness_warmup.steps == 0
    assert to_dict(config.ci_fn)["hidden"] == 128


def test_the_delta_settings_train_no_faithfulness_and_keep_the_delta(composer: Composer) -> None:
    config = composer.run_config(["experiment=tms_40-10-id"])
    active = {name: term.coeff for name, term in config.loss.active_terms().items()}
    assert active == {
        "importance_minimality": 1e-4,
        "stochastic_recon": 1.0,
        "stochastic_recon_layerwise": 1.0,
    }
    assert config.decomposition.use_delta
    assert config.loss.importance_minimality.p_start == 2.0
    assert (config.train.steps, config.train.lr_schedule.kind) == (7_500, ScheduleKind.cosine)
    assert {site: pattern.C for site, pattern in config.decomposition.sites.items()} == dict.fromkeys(
        ["embed", "unembed", "hidden"], 200
    )


@pytest.mark.parametrize(
    ("words", "settled"),
    [
        ([], "kl"),
        (["model.auto_class=masked_lm"], "kl"),
        (["model.auto_class=base"], "mse"),
        (["model.auto_class=base", "loss=vpd"], "mse"),
        (["model.output=hidden_states.1"], "mse"),
        (["model.output=hidden_states.1", "loss.divergence=kl"], "kl"),
        (["loss.divergence=mse"], "mse"),
    ],
)
def test_outputs_of_a_language_model_are_compared_by_kl_only_where_they_are_logits(
    composer: Composer, words: list[str], settled: str
) -> None:
    config = composer.run_config(["experiment=lm_hf", "model.name=m", "data.name=d", *words])
    assert config.loss.divergence.name == settled
    assert to_dict(config)["loss"]["divergence"] == settled


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if "lm_" not in name])
def test_toys_are_compared_by_squared_error_but_for_induction_heads(
    composer: Composer, experiment: str
) -> None:
    config = composer.run_config([f"experiment={experiment}"])
    assert config.loss.divergence.name == ("kl" if "induction" in experiment else "mse")
    auto = composer.run_config([f"experiment={experiment}", "loss.divergence=auto"])
    assert auto.loss.divergence is config.loss.divergence


# ---- which of two settings wins


def test_the_default_is_the_smallest_toy(composer: Composer) -> None:
    assert composer.run_config([]) == composer.run_config(["experiment=tms_5-2"])


def test_an_experiment_wins_over_the_defaults(composer: Composer) -> None:
    assert composer.run_config([]).train.steps == 6_000
    assert composer.run_config(["experiment=resid_mlp1"]).train.steps == 15_000


def test_a_typed_value_wins_over_experiment_and_debug(composer: Composer) -> None:
    config = composer.run_config(["train.steps=7", "experiment=resid_mlp1", "debug=smoke"])
    assert config.train.steps == 7
    assert config.eval.batch_size == 64


@pytest.mark.parametrize("experiment", ["tms_5-2", "induction_heads", "lm_tiny", "lm_hf"])
def test_debug_smoke_is_for_every_kind_of_target(composer: Composer, experiment: str) -> None:
    given = ["model.name=gpt2", "data.name=texts"] if experiment == "lm_hf" else []
    config = composer.run_config([f"experiment={experiment}", "debug=smoke", *given])
    assert (config.train.steps, config.train.batch_size) == (20, 4 if experiment == "lm_hf" else 64)
    if isinstance(config.model, TrainableTarget):
        assert (config.model.training.steps, config.model.training.max_tries) == (20, 1)


def test_steps_of_a_target_are_at_most_as_many_as_asked_for(composer: Composer) -> None:
    for words, steps in ((["target_steps=7"], 7), (["target_steps=7", "model.training.steps=3"], 3)):
        config = composer.run_config(words)
        assert isinstance(config.model, TrainableTarget)
        assert (config.model.training.steps, config.model.training.max_tries) == (steps, 1)
    whole = composer.run_config([])
    short = dataclasses.replace(whole, target_steps=7)
    assert isinstance(whole.model, TrainableTarget)
    assert isinstance(short.model, TrainableTarget)
    assert (whole.model.training.steps, short.model.training.steps) == (10_000, 7)
    with pytest.raises(ConfigError, match=r"^target_steps: got 0, must be ≥ 1$"):
        composer.run_config(["target_steps=0"])


def test_a_typed_group_wins_over_the_choice_of_the_experiment(composer: Composer) -> None:
    config = composer.run_config(
        ["experiment=tms_40-10", "loss=delta", "ci_fn=shared_mlp", "ci_fn.hidden=[8,4]"]
    )
    assert config.loss == composer.run_config(["loss=delta"]).loss
    assert config.ci_fn == SharedMLPCausalImportance(hidden=[8, 4])
    assert config.decomposition == composer.run_config(["decomposition=tms_40-10"]).decomposition


def test_a_typed_logger_wins_over_debug_which_wins_over_the_settings_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /logger: wandb\nthreads: 3\n"
    )
    assert isinstance(compose([], config_dir=tmp_path).logger, Wandb)
    smoke = compose(["debug=smoke"], config_dir=tmp_path)
    assert not isinstance(smoke.logger, Wandb)
    assert smoke.threads == 3
    assert isinstance(compose(["debug=smoke", "logger=wandb"]).logger, Wandb)


def test_an_experiment_of_your_own_is_found_in_config_dir(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /loss: tms_40-10\nname: mine\n"
    )
    config = compose(["experiment=mine", "seed=4"], config_dir=tmp_path)
    assert (config.name, config.seed) == ("mine", 4)
    assert config.loss.importance_minimality.coeff == 2e-4


def test_folders_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    monkeypatch.delenv("SPD_CACHE_DIR", raising=False)
    config = compose([])
    assert config.out_dir == str(tmp_path / "out")
    assert config.cache_dir == "~/.cache/spd_hydra"
    assert compose(["out_dir=here"]).out_dir == "here"


def test_the_project_of_the_environment_is_the_default_and_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    saved = compose([])
    assert to_dict(compose(["logger=wandb"]))["logger"]["project"] == "spd_hydra"
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert to_dict(compose(["logger=wandb"]))["logger"]["project"] == "theirs"
    assert to_dict(compose(["logger=wandb", "logger.project=mine"]))["logger"]["project"] == "mine"
    changed = from_dict(to_dict(apply_overrides(saved, ["logger=wandb"])))
    monkeypatch.setenv("WANDB_PROJECT", "others")
    assert to_dict(changed)["logger"]["project"] == "theirs"


def test_entries_of_a_mapping_can_be_added_and_dropped(composer: Composer) -> None:
    added = composer.run_config(["++decomposition.sites={ffn:{pattern:layers.*,C:64}}"])
    assert added.decomposition.sites["ffn"].C == 64
    dropped = composer.run_config(["experiment=tms_5-2-id", "~decomposition.sites.hidden"])
    assert sorted(dropped.decomposition.sites) == ["embed", "unembed"]


HF = ["experiment=lm_hf", "model.name=m", "data.name=d"]
MLP = "decomposition.sites.mlp.pattern=transformer.h.*.mlp.*"


@pytest.mark.parametrize(
    ("words", "sites"),
    [
        ([], {"default": ("*.[0-9]*.*", 512)}),
        (["decomposition.C=7"], {"default": ("*.[0-9]*.*", 7)}),
        ([MLP], {"mlp": ("transformer.h.*.mlp.*", 512)}),
        ([MLP, "decomposition.C=7"], {"mlp": ("transformer.h.*.mlp.*", 7)}),
        ([MLP, "decomposition.sites.mlp.C=9"], {"mlp": ("transformer.h.*.mlp.*", 9)}),
        (["decomposition.sites.mlp.C=9", MLP], {"mlp": ("transformer.h.*.mlp.*", 9)}),
        ([f"+{MLP}", "+decomposition.sites.mlp.C=9"], {"mlp": ("transformer.h.*.mlp.*", 9)}),
        (["decomposition.sites={a:{pattern:x},b:{pattern:y,C:3}}"], {"a": ("x", 512), "b": ("y", 3)}),
        (
            [MLP, "decomposition.sites.attn={pattern:*.attn.*,C:3}", "decomposition.C=7"],
            {"mlp": ("transformer.h.*.mlp.*", 7), "attn": ("*.attn.*", 3)},
        ),
    ],
)
def test_entries_that_are_given_stand_in_place_of_the_default_one(
    composer: Composer, words: list[str], sites: dict[str, tuple[str, int]]
) -> None:
    found = composer.run_config([*HF, *words]).decomposition.sites
    assert {name: (one.pattern, one.C) for name, one in found.items()} == sites


def test_identities_leave_the_default_entry_and_take_the_common_number(composer: Composer) -> None:
    words = [*HF, "decomposition.identities.mlp.pattern=transformer.h.*.mlp", "decomposition.C=7"]
    found = composer.run_config(words).decomposition
    assert {name: one.C for name, one in {**found.sites, **found.identities}.items()} == {
        "default": 7,
        "mlp": 7,
    }


def test_an_entry_of_a_preset_is_changed_and_another_added_beside_it(composer: Composer) -> None:
    words = ["model=tms_5-2-id", "decomposition.sites.middle.pattern=hidden.0", "decomposition.C=8"]
    sites = composer.run_config([*words, "decomposition.sites.embed.C=4"]).decomposition.sites
    assert {name: (one.pattern, one.C) for name, one in sites.items()} == {
        "embed": ("embed", 4),
        "unembed": ("unembed", 20),
        "middle": ("hidden.0", 8),
    }


@pytest.mark.parametrize("words", [[], [MLP, "decomposition.C=7"], ["decomposition.sites.a={pattern:x,C:3}"]])
def test_a_saved_configuration_says_what_is_decomposed_and_is_read_as_it_was(
    composer: Composer, words: list[str]
) -> None:
    config = composer.run_config([*HF, *words])
    again = from_dict(yaml.safe_load(to_yaml(config)))
    assert again.decomposition == config.decomposition
    assert apply_overrides(config, ["train.steps=7"]).decomposition == config.decomposition


def test_each_job_of_a_sweep_has_its_own_number_in_a_new_entry(composer: Composer) -> None:
    jobs = composer.jobs([*HF, MLP, "decomposition.sites.mlp.C=8,16"])
    assert [composer.run_config(job).decomposition.sites["mlp"].C for job in jobs] == [8, 16]


def test_composing_leaves_another_hydra_application_as_it_was() -> None:
    GlobalHydra.instance().clear()
    with hydra.initialize(config_path=None, version_base="1.2"):
        before = GlobalHydra.instance().hydra
        compose(["seed=1"])
        assert GlobalHydra.instance().hydra is before
        assert hydra.compose(overrides=["+a=1"]) == {"a": 1}
    assert not GlobalHydra.instance().is_initialized()


# ---- mistakes


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "trian.steps=5",
            "trian.steps: there is no such key; did you mean train.steps? (given as trian.steps=5)",
        ),
        ("modle=tms_5-2", "modle: there is no such key; did you mean model? (given as modle=tms_5-2)"),
        ("+sed=1", "sed: there is no such key; did you mean seed? (allow_extra=true accepts and ignores it)"),
        (
            "++train.stepz=1",
            "train.stepz: there is no such key; did you mean train.steps? "
            "(allow_extra=true accepts and ignores it)",
        ),
        (
            "loss={stochastic_recn:1}",
            "loss.stochastic_recn: there is no such key; did you mean loss.stochastic_recon? "
            "(given as loss={stochastic_recn:1})",
        ),
        ("train.steps=abc", "train.steps: got 'abc', must be a whole number ≥ 1"),
        ("train.steps=2.5", "train.steps: got 2.5, must be a whole number ≥ 1"),
        ("train.steps=", "train.steps: got nothing, must be a whole number ≥ 1"),
        ("train.lr=null", "train.lr: got null, must be a number > 0"),
        ("train.clip_ci_fn=x", "train.clip_ci_fn: got 'x', must be a number > 0 or null"),
        ("train.compile=maybe", "train.compile: got 'maybe', must be true or false"),
        ("ci_fn.hidden=[3]", "ci_fn.hidden: got [3], must be a whole number ≥ 1"),
        ("device=gpu", "device: got 'gpu', must be one of auto, cpu, cuda"),
        (
            "task=chek",
            "task: got 'chek', must be one of decompose, train_target, analyse, check, prefetch, "
            "sweep_status; did you mean check?",
        ),
        (
            "model.training=3",
            "model.training: got 3, must be a section with the keys steps, batch_size, lr, lr_schedule, "
            "weight_decay, max_tries, max_loss",
        ),
        ("train.lr=-1", "train.lr: got -1.0, must be > 0"),
        ("train.lr=nan", "train.lr: got nan, must be finite and > 0"),
        ("loss.stochastic_recon.coeff=-1", "loss.stochastic_recon.coeff: got -1.0, must be ≥ 0"),
        ("decomposition.sites.embed.C=0", "decomposition.sites.embed.C: got 0, must be ≥ 1"),
        ("debug=null", "debug: got null; debug=none switches it off; otherwise choose one of none, smoke"),
        ("logger=null", "logger: got null; choose one of files, wandb"),
        (
            "data=tm",
            "data: got tm; did you mean tms? Choose one of induction, lm_tiny, resid_mlp, tms, tokens",
        ),
        ("eval=", "eval: got nothing; must be one of coarse, default, language, lm_hf, lm_tiny, sequences"),
        ("+experiment=tms_5-2", "experiment: is chosen without +: experiment=tms_5-2"),
        ("+seed=1", "seed: is there already, write it without +: seed=1"),
        ("~train.lr", "train.lr: cannot be removed, only set to another value"),
        ("experiment=none", "name: must be given, name=…"),
        ("seed", "seed: not understood; write key=value, e.g. seed=1"),
        (
            "seed=1,2",
            "seed: got several values (1,2); to run once with each add -m, for a list write seed=[1,2]",
        ),
        (
            "decomposition.sites.ffn.C=4",
            "decomposition.sites.ffn.pattern: decomposition.sites has no entry ffn, only embed, unembed. To "
            "add one give its pattern: decomposition.sites.ffn.pattern=…",
        ),
        (
            "decomposition.sites.unembd.C=4",
            "decomposition.sites.unembd.pattern: decomposition.sites has no entry unembd, only embed, "
            "unembed; did you mean decomposition.sites.unembed? To add one give its pattern: "
            "decomposition.sites.unembd.pattern=…",
        ),
        (
            "decomposition.identities.ffn.C=4",
            "decomposition.identities.ffn.pattern: decomposition.identities has no entry ffn. To add one "
            "give its pattern: decomposition.identities.ffn.pattern=…",
        ),
        (
            "decomposition.sites.x={pattern:hidden.0,D:8}",
            "decomposition.sites.x.D: there is no such key; did you mean decomposition.sites.x.C? (given as "
            "decomposition.sites.x={pattern:hidden.0,D:8})",
        ),
        (
            "~decomposition.sites.foo",
            "decomposition.sites.foo: decomposition.sites has no entry foo, only embed, unembed. "
            "(given as ~decomposition.sites.foo)",
        ),
        (
            "decomposition.C=30",
            "decomposition.C: got 30, but every entry has a C of its own; set decomposition.sites.embed.C, "
            "decomposition.sites.unembed.C",
        ),
        (
            "++loss.extra={mine:{coeff:1}}",
            "loss.extra.mine: names no term; choose the one of a plug-in: "
            "'+loss_term@loss.extra.mine=<term>_schema'",
        ),
        (
            "++decomposition.sites.x=8",
            "decomposition.sites.x: got 8, must be an entry {pattern: …, C: …, init: …, lr_factor: …}",
        ),
        (
            "seed=${oc.env:SPD_NO_SUCH}",
            "seed: KeyError raised while resolving interpolation: "
            "\"Environment variable 'SPD_NO_SUCH' not found\"",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(typed: str, message: str) -> None:
    assert errors([typed]) == [message]


def test_a_short_key_is_met_with_the_full_ones() -> None:
    (line,) = errors(["steps=3"])
    assert line.startswith("steps: there is no such key; did you mean train.steps or ")


def test_an_unknown_experiment_is_met_with_the_nearest_one() -> None:
    (line,) = errors(["experiment=tms5-2"])
    assert line.startswith("experiment: got tms5-2; did you mean tms_5-2? Choose one of induction_heads,")


def test_unbalanced_quotes_are_told_how_to_write_them() -> None:
    (line,) = errors(["name='a b"])
    assert line.startswith(
        "name='a b: not understood; write key=value, put the whole into quotes for the shell"
    )


def test_all_mistakes_are_told_at_once() -> None:
    lines = errors(["loss=foo", "sede=1", "train.compile=maybe", "seed=-1", "train.lr=0", "x y"])
    assert [line.partition(":")[0] for line in lines] == [
        "loss",
        "x y",
        "sede",
        "train.compile",
        "seed",
        "train.lr",
    ]


def test_unknown_keys_pass_only_when_asked_for(composer: Composer) -> None:
    assert composer.run_config(["+sed=1", "allow_extra=true"]).allow_extra
    with pytest.raises(ConfigError, match="sed: there is no such key"):
        composer.run_config(["+sed=1"])


@pytest.mark.parametrize(
    ("given", "example"),
    [("seed=1", "['seed=1']"), (["seed=1", 2], "['seed=1', '2']")],
)
def test_overrides_that_are_no_list_of_texts_are_told_so_once(given: Any, example: str) -> None:
    assert errors(given) == [f"overrides: got {given!r}, must be a list of texts, e.g. compose({example})"]


def test_a_missing_config_dir_is_named() -> None:
    with pytest.raises(ConfigError, match="--config-dir: there is no folder /no/such"):
        compose([], config_dir="/no/such")


# ---- sweeps and resumes


def test_a_sweep_has_a_job_for_every_combination(composer: Composer) -> None:
    jobs = composer.jobs(["experiment=tms_5-2,tms_40-10", "seed=range(2)", "hydra.verbose=true"])
    assert jobs == [
        ["experiment=tms_5-2", "seed=0"],
        ["experiment=tms_5-2", "seed=1"],
        ["experiment=tms_40-10", "seed=0"],
        ["experiment=tms_40-10", "seed=1"],
    ]
    assert composer.jobs(["experiment=glob(tms_40*)"]) == [
        ["experiment=tms_40-10"],
        ["experiment=tms_40-10-id"],
    ]


def test_a_sweep_over_nothing_is_a_mistake(composer: Composer) -> None:
    with pytest.raises(ConfigError, match=r"^the sweep has no jobs: experiment=glob\(x\*\) matches nothing$"):
        composer.jobs(["experiment=glob(x*)"])


def test_a_configuration_may_ask_for_a_sweep_itself(composer: Composer) -> None:
    assert composer.is_sweep(["hydra.mode=MULTIRUN"])
    assert not composer.is_sweep([])


def test_overrides_go_on_top_of_a_saved_configuration(composer: Composer) -> None:
    saved = composer.run_config(["experiment=resid_mlp1", "seed=3"])
    changed = apply_overrides(saved, ["resume=there", "train.steps=9", "logger=wandb", "hydra.verbose=true"])
    assert (changed.resume, changed.train.steps, changed.seed) == ("there", 9, 3)
    assert isinstance(changed.logger, Wandb)
    assert changed.model == saved.model
    assert to_yaml(apply_overrides(saved, [])) == to_yaml(saved)


@pytest.mark.parametrize("number", ["0", "2026_11", "1e3", "true", "nan"])
@pytest.mark.parametrize("words", [["resume={}"], ["task=analyse", "run={}"]])
def test_a_run_directory_may_be_called_as_a_number_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], number: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(number).mkdir()
    Path(number, "config.yaml").write_text(to_yaml(compose(["experiment=resid_mlp1", "seed=3"])))
    config = compose([word.format(number) for word in words])
    assert (config.name, config.seed) == ("resid_mlp1", 3)
    assert number in (config.resume, config.run)


def test_a_sweep_goes_on_with_the_jobs_of_another(
    composer: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for job in ("0", "1"):
        Path(job).mkdir()
        Path(job, "config.yaml").write_text(to_yaml(compose([f"seed={job}"])))
    plan = make_plan(composer, ["resume=0,1", "train.steps=30000"], multirun=True)
    assert [(job.config.resume, job.config.seed) for job in plan.jobs] == [("0", 0), ("1", 1)]
    assert all(job.saved is not None for job in plan.jobs)


def test_words_that_a_saved_run_cannot_follow_are_refused_for_that_and_not_by_the_default_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine", "config.yaml").write_text(to_yaml(compose(["experiment=resid_mlp1"])))
    assert errors(["task=analyse", "run=mine", "decomposition.C=4"]) == [
        "task=analyse measures a run as it was trained, so it takes task, run, eval, device, threads, "
        "launcher, trust_remote_code only; leave out decomposition.C=4"
    ]
    assert errors(["resume=mine", "decomposition.C=4", "train.steps=9"]) == [
        "decomposition.C: got 4, but every entry has a C of its own; set decomposition.sites.mlp_in.C, "
        "decomposition.sites.mlp_out.C",
        "A run that goes on takes train.steps, threads, device, train.accumulate, "
        "train.checkpoint_activations, train.shard, and keys of compiling, logging, evaluation and "
        "checkpoints, and of where model and text lie only; leave out decomposition.C=4, or begin a new run "
        "with what this one has learned: 'start_from=\"mine\"'",
    ]
    for others in ([], ["launcher=local_parallel", "eval.every=3"]):
        assert errors(["resume=mine", "train.steps=-9", *others]) == ["train.steps: got -9, must be ≥ 1"]


@pytest.mark.parametrize(("key", "words"), [("resume", []), ("run", ["task=analyse"])])
def test_a_run_directory_is_looked_for_in_the_home_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, words: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text(to_yaml(compose(["seed=3"])))
    config = compose([*words, f'{key}="~/x"'])
    assert (getattr(config, key), config.seed) == (str(tmp_path / "x"), 3)
    assert (
        "~nobody-of-that-name/x is no run directory" in errors([*words, f'{key}="~nobody-of-that-name/x"'])[0]
    )


def test_a_sweep_to_look_at_is_no_word_of_a_training(composer: Composer) -> None:
    assert composer.run_config(["task=sweep_status", "sweep=there"]).sweep == "there"
    assert errors(["sweep=there"]) == [
        "sweep: got there, which only task=sweep_status reads; add that, or leave it out"
    ]


def test_overrides_of_a_saved_configuration_are_checked_alike(composer: Composer) -> None:
    saved = composer.run_config(["experiment=resid_mlp1"])
    with pytest.raises(ConfigError) as caught:
        apply_overrides(saved, ["experiment=tms_5-2", "train.stepz=4", "train.lr=-1", "logger=wandbb", "a b"])
    assert str(caught.value).splitlines() == [
        "experiment: a run that goes on keeps its own; leave it out",
        "logger: got wandbb; did you mean wandb? Choose one of files, wandb",
        "a b: not understood; write key=value, e.g. seed=1",
        "train.stepz: there is no such key; did you mean train.steps? (given as train.stepz=4)",
        "train.lr: got -1.0, must be > 0",
    ]
