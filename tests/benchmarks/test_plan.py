"""Plans: what they mean, and that every mistake in one is named before anything runs."""

import argparse
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compare import _parser, main, raw_plan
from benchmarks.plan import Plan, flattened, read_toml
from benchmarks.runner import Comparison
from ferret_flwr.config import Config, ConfigError, flatten
from ferret_flwr.methods.registry import METHODS

ROOT = Path(__file__).parents[2]
PLAN = """
title = "A title"
seeds = [5, 6]
nodes = 3
[settings]
num-server-rounds = 4
train.steps = 7
[variants.fedavg]
[variants.ferret-8k]
method = "ferret"
ferret.coefficients = 8000
train.steps = 9
search = { train.learning-rate = [0.1, 1], ferret.max-norm-ratio = [64] }
"""


def options(*arguments: str) -> argparse.Namespace:
    return _parser().parse_args([*arguments, "--output", "unused"])


def test_a_plan_means_what_it_says() -> None:
    plan = Plan.of(tomllib.loads(PLAN))
    assert (plan.title, plan.seeds, plan.nodes) == ("A title", (5, 6), 3)
    fedavg, ferret = plan.variants
    assert fedavg.choices == [{}]
    assert ferret.choices == [
        {"train.learning-rate": 0.1, "ferret.max-norm-ratio": 64},
        {"train.learning-rate": 1, "ferret.max-norm-ratio": 64},
    ]
    plain = flatten(plan.config(fedavg, {}, 5))
    assert (plain["method"], plain["train.steps"], plain["seed"]) == ("fedavg", 7, 5)
    assert plain["strategy.min-available-nodes"] == 3
    own = flatten(plan.config(ferret, ferret.choices[0], 6))
    assert (own["method"], own["train.steps"], own["seed"]) == ("ferret", 9, 6)
    assert (own["ferret.coefficients"], own["train.learning-rate"]) == (8000, 0.1)


def test_a_search_may_have_settings_of_its_own() -> None:
    raw = tomllib.loads("search-settings.num-server-rounds = 2\nsearch-seed = 9" + PLAN)
    plan = Plan.of(raw)
    ferret = plan.variants[1]
    for seed, rounds in ((5, 4), (6, 4), (9, 2)):
        config = plan.config(ferret, ferret.choices[1], seed)
        assert (config.num_server_rounds, config.train.steps) == (rounds, 9)
        assert config.train.learning_rate == 1
    raw["search-settings"] |= {"train.learning-rate": 3.0, "train.steps": 1}
    fedavg, ferret = (plan := Plan.of(raw)).variants
    config = plan.config(ferret, ferret.choices[1], 9)
    assert (config.train.learning_rate, config.train.steps) == (1, 9)  # a variant's own stays
    config = plan.config(fedavg, {}, 9)
    assert (config.train.learning_rate, config.train.steps) == (3.0, 1)


def test_a_recipe_lies_under_the_settings(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "seed = 9\nnum-server-rounds = 2\ntrain.steps = 3\nstrategy.min-available-nodes = 4\n"
    )
    plan = Plan.of(tomllib.loads(PLAN) | {"recipe": str(recipe)})
    config = plan.config(plan.variants[0], {}, 5)
    assert (config.num_server_rounds, config.train.steps, config.seed) == (4, 7, 5)
    plan = Plan.of({"recipe": str(recipe), "variants": {"ferret": {}}})
    config = plan.config(plan.variants[0], {}, 5)
    assert (config.num_server_rounds, config.train.steps) == (2, 3)
    assert plan.nodes == config.strategy.min_available_nodes == 4


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "plans").glob("*.toml")))
def test_plans_that_come_with_the_project_are_valid(path: Path) -> None:
    plan = Plan.of(read_toml(path))
    assert plan.variants and plan.search_seed not in plan.seeds
    assert all(len(values) >= 3 for v in plan.variants for values in v.search.values())
    runs = [plan.config(v, choice, 1) for v in plan.variants for choice in v.choices]
    assert all(run not in runs[:i] for i, run in enumerate(runs))  # no two names for one run


@pytest.mark.parametrize("name", ["gsm8k-smollm2", "code-alpaca-smollm2"])
def test_methods_are_compared_at_equal_work(name: str) -> None:
    folder = ROOT / "benchmarks" / "plans"
    plan = Plan.of(read_toml(folder / f"{name}.toml"))
    configs = {v.name: plan.config(v, v.choices[0], plan.seeds[0]) for v in plan.variants}
    assert {config.method for config in configs.values()} == {"ferret", *METHODS}
    work = {  # a forward pass is 1, a backward pass 2
        key: config.train.steps * (2 if config.method.startswith(("fedzo", "fedkseed")) else 3)
        for key, config in configs.items()
    }
    assert set(work.values()) == {work["fedavg"]}
    sketch = configs["fetchsgd-33kB"].sketch
    uplink = configs["ferret"].ferret.coefficients
    assert 0.999 * uplink < sketch.rows * sketch.columns <= uplink

    ablation = Plan.of(read_toml(folder / f"{name}-ablation.toml"))
    first, other = plan.variants[1], ablation.variants[0]
    assert first.name == other.name == "ferret"
    rate = {"train.learning-rate": ablation.config(other, {}, 1).train.learning_rate}
    assert rate in first.choices
    assert plan.config(first, rate, 1) == ablation.config(other, {}, 1)  # one run serves both
    assert ablation.seeds == plan.seeds
    apart = Plan.of(read_toml(folder / f"{name}-non-iid.toml"))
    same, own = (
        flatten(plan.config(first, rate, 1)),
        flatten(apart.config(apart.variants[1], {}, 1)),
    )
    assert apart.variants[1].name == "ferret" and apart.seeds == plan.seeds
    assert {k for k in own if own[k] != same[k]} == {"dataset.name", "dataset.partitioner"}
    for variant in ablation.variants:
        kind = variant.name.split("-")[1] if variant.name.startswith("contiguous") else "energy"
        assert ablation.config(variant, variant.choices[0], 1).ferret.allocation == kind


def test_the_search_seed_is_none_of_the_seeds() -> None:
    assert Plan.of(tomllib.loads(PLAN)).search_seed == 7
    assert Plan.of(tomllib.loads("search-seed = 4" + PLAN)).search_seed == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sedes = [1]", "the plan has no key 'sedes'; allowed are title, recipe, seeds"),
        ("seeds = [1, 1]", "'seeds' must be different whole numbers"),
        ("seeds = []", "'seeds' must be different whole numbers"),
        ("seeds = [1.5]", "'seeds' must be different whole numbers"),
        ("seeds = [1, 2]\nsearch-seed = 2", "'search-seed' must be none of its 'seeds', got 2"),
        ("search-seed = -1", "'seed' must be at least 0"),
        ("search-seed = 'x'", "'search-seed' must be of type int"),
        ("search-settings = 2", "'search-settings' must be of type dict"),
        ("search-settings.seed = 2", "'search-settings' cannot set 'seed'; use 'seeds' and"),
        ("search-settings.train.steps = 0", "'train.steps' must be at least 1, got 0"),
        ("search-settings.train.step = 1", "train.step"),
        ("search-settings.method = 'fedavg'", "'search-settings' cannot set 'method'"),
        ("nodes = 0", "'nodes' must be at least 1"),
        ("nodes = true", "'nodes' must be of type int"),
        ("recipe = 'gone.toml'", "cannot read 'gone.toml'"),
        ("settings.seed = 3", "'settings' cannot set 'seed'; use 'seeds'"),
        ("settings.train.stepps = 3", "unknown key 'train.stepps'; did you mean 'train.steps'"),
        ("settings.train.steps = 0", "'train.steps' must be at least 1, got 0"),
        ("settings.evaluate.every = 0", "'evaluate.every' must be at least 1"),
        ("variants.fedavgg = {}", "variant 'fedavgg': .*\n'method' must be one of ferret, fedavg"),
        ("variants.fedavg.seed = 2", "variant 'fedavg' cannot set 'seed'"),
        ("variants.fedavg = 2", "variant 'fedavg' must be a table"),
        ("variants.fedavg.search = 2", "'search' must be a table of lists"),
        ("variants.fedavg.search.train.steps = 2", "must list values for 'train.steps', got 2"),
        ("variants.fedavg.search.train.steps = []", "must list values for 'train.steps'"),
        ("variants.fedavg.search.train.steps = [1, 0]", "'train.steps' must be at least 1, got 0"),
        ("variants.fedavg.search.results-dir = ['x']", "cannot set 'results-dir'; use '--output'"),
    ],
)
def test_mistakes_are_named(line: str, message: str) -> None:
    plan = "" if line.startswith("variants") else "\n[variants.ferret]"
    with pytest.raises(ConfigError, match=message):
        Plan.of(tomllib.loads(line + plan))


def test_a_plan_without_variants_is_none() -> None:
    for raw in ({}, {"variants": {}}):
        with pytest.raises(ConfigError, match="variants"):
            Plan.of(raw)


def test_options_say_what_a_file_would(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    raw = raw_plan(options(str(path), "--variants", "ferret-8k", "--seeds", "8", "--nodes", "2"))
    plan = Plan.of(raw)
    assert [v.name for v in plan.variants] == ["fedavg", "ferret-8k"]
    assert (plan.seeds, plan.search_seed, plan.nodes, plan.title) == ((8,), 9, 2, "A title")
    raw = raw_plan(options(str(path), "--search-seed", "3"))
    assert Plan.of(raw).search_seed == 3
    line = (
        "--methods ferret fedavg --set train.steps=2 train.optimizer=AdamW "
        "--search train.learning-rate 0.1 1 --search-for fedavg train.batch-size 2 4"
    )
    raw = raw_plan(options(*line.split()))
    ferret, fedavg = Plan.of(raw).variants
    assert ferret.settings == {"method": "ferret", "train.steps": 2, "train.optimizer": "AdamW"}
    assert ferret.search == {"train.learning-rate": (0.1, 1)}
    assert fedavg.search == {"train.learning-rate": (0.1, 1), "train.batch-size": (2, 4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give a plan file, or --methods"),
        ("plan.toml --methods ferret", "give a plan file, or --methods"),
        ("gone.toml", "cannot read 'gone.toml'"),
        ("--methods fedavgg", "'method' must be one of ferret, fedavg"),
        ("--methods ferret --set train.steps", "--set needs KEY=VALUE"),
        ("--methods ferret --set train.stepps=1", "did you mean 'train.steps'"),
        ("--methods ferret --variants fedavg", "no variant 'fedavg'; it has ferret"),
        ("--methods ferret --search train.steps", "needs a key and values"),
        ("--methods ferret --search-for fedavg train.steps 1", "no variant 'fedavg'"),
        ("--methods ferret --set train.optimizer=Foo", "'Foo' is not in torch.optim"),
        ("--methods ferret --search-set train.steps", "--search-set needs KEY=VALUE"),
        (
            "--methods ferret --search train.steps 1 2 --search-set train.optimizer=Foo",
            "'Foo' is not in torch.optim",
        ),
        ("--methods ferret --set dataset.name=builtin:no", "there is no such built-in"),
    ],
)
def test_bad_options_stop_before_any_run(tmp_path, capsys, arguments, message) -> None:
    output = tmp_path / "output"
    assert main([*arguments.split(), "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_fresh_code_is_passed_on(tmp_path, monkeypatch) -> None:
    asked = []

    def compare(plan: Plan, folder: Path, fresh_code: bool, names: object) -> list:
        asked.append(fresh_code)
        (folder / "table.md").write_text("")
        return []

    monkeypatch.setattr("benchmarks.compare.compare", compare)
    for extra in ([], ["--fresh-code"]):
        assert main(["--methods", "ferret", "--output", str(tmp_path), *extra]) == 0
    assert asked == [False, True]


def test_a_search_that_its_method_would_not_obey(tmp_path, monkeypatch) -> None:
    def by_sgd(config: Config) -> Config:
        return replace(config, train=replace(config.train, optimizer="SGD"))

    monkeypatch.setattr(METHODS["fedavg"], "configured", by_sgd)
    search = {"train.optimizer": ["SGD", "AdamW"]}
    plan = Plan.of({"variants": {"fedavg": {"search": search}}})
    with pytest.raises(ConfigError, match="'train.optimizer' = AdamW, where .*'fedavg' would take"):
        Comparison(plan, tmp_path)


def test_tables_flatten_to_dotted_keys() -> None:
    nested = {"a": 1, "b": {"c-d": 2, "e": {"f": "x"}}, "g.h": True}
    assert flattened(nested) == {"a": 1, "b.c-d": 2, "b.e.f": "x", "g.h": True}
