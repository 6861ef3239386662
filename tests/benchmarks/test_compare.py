"""A comparison: what is run and what is not, what is chosen, and the numbers of its tables."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.plan import Plan
from benchmarks.runner import compare
from benchmarks.simulate import RunError
from benchmarks.summary import Outcome, best, curve, figures, final_loss, over_seeds, trouble
from benchmarks.tables import markdown, seconds_text, spread
from ferret_flwr.config import Config, parse


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the seconds of a picture that nobody looks at."""
    monkeypatch.setattr("benchmarks.runner.draw", lambda *_: None)


RATES = {0.1: 2.0, 0.5: 1.5, 2.0: 1.7}  # learning rate -> final loss of the runs made up here


def rows(loss: float, rounds: int = 2, seed: int = 0) -> list[dict]:
    """Return what a run of two nodes might leave."""
    made = [{"round": 0, "eval/loss": 3.0, "eval/rougeL": 1.0, "memory/server_peak_bytes": 9e9}]
    for r in range(1, rounds + 1):
        made.append(
            {
                "round": r,
                "nodes": 2,
                "failures": [],
                "eval/loss": loss + rounds - r,
                "eval/rougeL": 10.0 * r + seed,
                "comm/uplink_bytes": 1000 * r,
                "comm/downlink_bytes": 3000,
                "time/local_s": 1.0 * r,
                "time/project_s": 0.25,
                "time/reconstruct_s": 0.5,
                "time/aggregate_s": 0.125,
                "time/replica_s": 0.0625,
                "time/evaluate_s": 2.0,
                "time/round_s": 10.0 + r,
                "memory/node_peak_bytes": 100 + r,
                "memory/server_peak_bytes": 300 - r,
            }
        )
    return made


class Start:
    """Stands for the simulation: counts, and makes rows up from the learning rate and the seed."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, int]] = []
        self.rounds: list[tuple[int, int]] = []

    def __call__(self, config: Config, nodes: int, folder: Path, log: Path) -> list[dict]:
        rate = config.train.learning_rate
        self.asked.append((config.method, rate, config.seed))
        self.rounds.append((config.seed, config.num_server_rounds))
        if rate > 100:
            raise RunError("MemoryError: no memory left (exit status 1)")
        made = rows(RATES.get(rate, 1.0) + config.seed / 100, seed=config.seed)
        if rate > 10:
            made[1]["failures"] = ["node 7 failed: the model is not finite"]
        return made


def plan(**changes: object) -> Plan:
    rates = {"train.learning-rate": [*RATES, 20.0]}
    variants = {"fedavg": {"search": rates}, "ferret": {"ferret.coefficients": 64}}
    return Plan.of({"seeds": [1, 2, 3], "search-seed": 9, "variants": variants} | changes)


def test_the_search_has_a_seed_of_its_own_and_the_best_gets_the_others(tmp_path, capsys) -> None:
    start = Start()
    fedavg, ferret = compare(plan(), tmp_path, start)
    searched = [("fedavg", rate, 9) for rate in (0.1, 0.5, 2.0, 20.0)]
    best_ones = [("fedavg", 0.5, seed) for seed in (1, 2, 3)]
    assert start.asked == searched + best_ones + [("ferret", 1.0, seed) for seed in (1, 2, 3)]
    assert fedavg.choice == {"train.learning-rate": 0.5}
    assert [final_loss(run) for run in fedavg.runs] == pytest.approx([1.51, 1.52, 1.53])
    assert ferret.choice == {}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(start.asked) == 10
    expected = "[1/10] fedavg, train.learning-rate = 0.1, seed 9: held-out loss 2"
    assert printed[0].startswith(expected)
    assert "round 1: node 7 failed: the model is not finite" in printed[3]
    assert "; 6 left, about " in printed[3]
    assert printed[-1].endswith("; 0 left")


def test_a_second_call_runs_nothing(tmp_path, capsys) -> None:
    first, second = Start(), Start()
    before = compare(plan(), tmp_path, first)
    pages = {name: (tmp_path / name).read_bytes() for name in ("table.md", "results.json")}
    after = compare(plan(), tmp_path, second)
    assert second.asked == []
    assert after == before
    assert all((tmp_path / name).read_bytes() == page for name, page in pages.items())
    printed = capsys.readouterr().out
    assert "(done before)" in printed and "warning" not in printed


def test_only_what_is_new_is_run(tmp_path) -> None:
    compare(plan(), tmp_path, Start())
    for changes, expected in (
        ({"seeds": [1, 2, 3, 4]}, [("fedavg", 0.5, 4), ("ferret", 1.0, 4)]),
        ({"seeds": [1], "title": "of no importance"}, []),
        ({"search-seed": 8}, [("fedavg", rate, 8) for rate in (*RATES, 20.0)]),
    ):
        start = Start()
        compare(plan(**changes), tmp_path, start)
        assert start.asked == expected
    for changes in ({"nodes": 5}, {"settings": {"train.steps": 3}}):
        start = Start()
        compare(plan(seeds=[1], **changes), tmp_path, start)
        assert len(start.asked) == 6, changes


def test_keys_of_other_methods_make_no_difference(tmp_path) -> None:
    compare(plan(seeds=[1]), tmp_path, Start())
    start = Start()
    settings = {"ferret.server-rate": 0.5, "adapter.rank": 2}
    compare(plan(seeds=[1], settings=settings), tmp_path, start)
    assert start.asked == [("ferret", 1.0, 1)]


def test_a_key_that_is_new_keeps_earlier_runs_and_another_default_does_not(tmp_path) -> None:
    one = plan(seeds=[1], variants={"ferret": {}})
    compare(one, tmp_path, Start())
    (path,) = (tmp_path / "runs").glob("*.json")
    record = json.loads(path.read_text())
    for change, runs in (({}, 0), ({"train.schedule": "linear"}, 1)):
        record["config"].pop("train.schedule", None)
        record["config"] |= change
        path.write_text(json.dumps(record))
        start = Start()
        compare(one, tmp_path, start)
        assert len(start.asked) == runs


def test_other_data_or_another_base_are_other_runs(tmp_path, monkeypatch) -> None:
    one = plan(seeds=[1], variants={"ferret": {}})
    compare(one, tmp_path, Start())
    for name, result in (("data_hashes", {"x": "y"}), ("base_fingerprint", "z")):
        start = Start()
        with monkeypatch.context() as patch:
            patch.setattr(f"benchmarks.runner.{name}", lambda *_, result=result: result)
            compare(one, tmp_path, start)
        assert len(start.asked) == 1, name


def test_a_stopped_comparison_goes_on(tmp_path) -> None:
    class Stopped(Start):
        def __call__(self, *arguments):  # type: ignore[no-untyped-def]
            if len(self.asked) == 3:
                raise KeyboardInterrupt
            return super().__call__(*arguments)

    first, second = Stopped(), Start()
    with pytest.raises(KeyboardInterrupt):
        compare(plan(), tmp_path, first)
    kept = sorted(path.suffix for path in (tmp_path / "runs").iterdir())
    assert kept == [".json"] * 3
    compare(plan(), tmp_path, second)
    assert len(first.asked) + len(second.asked) == 10
    assert not set(first.asked) & set(second.asked)


def test_a_page_has_every_variant_that_is_finished(tmp_path) -> None:
    compare(plan(), tmp_path, Start())
    whole = (tmp_path / "table.md").read_bytes()
    start = Start()
    (outcome,) = compare(plan(), tmp_path, start, names=["ferret"])
    assert (outcome.name, start.asked) == ("ferret", [])
    assert (tmp_path / "table.md").read_bytes() == whole

    other = tmp_path / "other"
    start = Start()
    compare(plan(), other, start, names=["ferret"])
    assert {method for method, *_ in start.asked} == {"ferret"}
    assert "| fedavg |" not in (other / "table.md").read_text()
    compare(plan(), other, Start(), names=["fedavg"])
    assert (other / "table.md").read_bytes() == whole


def test_a_crash_is_shown_and_tried_again(tmp_path, capsys) -> None:
    crashing = plan(seeds=[1], settings={"train.learning-rate": 1000.0}, variants={"ferret": {}})
    for _ in range(2):
        start = Start()
        (outcome,) = compare(crashing, tmp_path, start)
        assert len(start.asked) == 1
        assert not outcome.good
    table = (tmp_path / "table.md").read_text()
    assert "| ferret | failed |" in table
    assert "- ferret, seed 1: failed: MemoryError: no memory left" in table
    assert "failed: MemoryError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("Message contains an Error (reason: <class 'ray.exceptions.OutOfMemoryError'>)", False),
        ("torch.OutOfMemoryError: CUDA out of memory", False),
        ("_ArrayMemoryError: Unable to allocate 3. GiB for an array with shape (10,)", False),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to", False),
        ("DivergenceError: the loss is nan", True),
    ],
)
def test_only_a_want_of_memory_is_tried_again(tmp_path, reason: str, kept: bool) -> None:
    class Failing(Start):
        def __call__(self, *arguments):  # type: ignore[no-untyped-def]
            made = super().__call__(*arguments)
            made[1]["failures"] = ["node 3 failed: not there", f"node 7 failed: {reason}"]
            return made

    one = plan(seeds=[1], variants={"ferret": {}})
    first, second = Failing(), Start()
    (failed,) = compare(one, tmp_path, first)
    assert not failed.good and len(first.asked) == 1
    (again,) = compare(one, tmp_path, second)
    assert len(second.asked) == (0 if kept else 1)
    assert bool(again.good) is not kept


def test_a_search_without_any_good_run_ends_there(tmp_path, capsys) -> None:
    rates = {"search": {"train.learning-rate": [20.0, 1000.0]}}
    start = Start()
    (outcome,) = compare(plan(variants={"ferret": rates}), tmp_path, start)
    assert [seed for *_, seed in start.asked] == [9, 9]
    assert outcome.choice is None and not outcome.runs
    table = (tmp_path / "table.md").read_text()
    assert "| ferret | failed |" in table and "- ferret, seed 9: round 1: node 7" in table
    assert "; 0 left" not in capsys.readouterr().out  # it cannot know until the last has failed


def test_a_row_says_how_many_seeds_it_is_over(tmp_path) -> None:
    class Unlucky(Start):
        def __call__(self, config: Config, *arguments: object) -> list[dict]:
            made = super().__call__(config, *arguments)  # type: ignore[arg-type]
            if (config.method, config.seed) == ("ferret", 1):
                made[2]["eval/loss"] = math.nan
            return made

    drawn = []
    two = plan(seeds=[1, 2], variants={"fedavg": {}, "ferret": {}})
    _, ferret = compare(two, tmp_path, Unlucky())
    assert final_loss(ferret.runs[0]) == math.inf
    table = (tmp_path / "table.md").read_text()
    assert table.count("| ferret (1 of 2 seeds) | ") == 3  # figures, loss and Rouge-L by round
    assert "| fedavg | " in table
    assert "- ferret, seed 1: round 2: the held-out loss is not finite" in table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables.plots, "curves", lambda good, *_: drawn.extend(good))
        patch.setattr(tables.plots, "costs", lambda *_: None)
        tables.draw(two, [ferret], tmp_path)
    assert drawn == ["ferret (1 of 2 seeds)"]


@pytest.mark.parametrize(
    ("tried", "keys"),
    [
        ([{"a": 0.1}, {"a": 0.5}, {"a": 2}], []),
        ([{"a": 0.5}, {"a": 2.0}, {"a": 3.0}], ["a"]),
        ([{"a": 0.5}, {"a": 0.1}], ["a"]),
        ([{"a": 0.5}], []),
        ([{"a": 0.5, "b": 1}, {"a": 0.1, "b": 1}, {"a": 0.7, "b": 1}], []),
        ([{"a": 0.5, "b": 1}, {"a": 0.1, "b": 2}, {"a": 0.7, "b": 2}], ["b"]),
        ([{"a": 0.5, "c": "SGD"}, {"a": 0.1, "c": "Adam"}, {"a": 1.0, "c": "SGD"}], []),
        ([{"a": 0.5, "c": True}, {"a": 0.1, "c": False}, {"a": 1.0, "c": True}], []),
    ],
)
def test_the_edge_of_a_search(tried: list[dict], keys: list[str]) -> None:
    (choice,) = (settings for settings in tried if settings["a"] == 0.5)
    outcome = Outcome("x", [(settings, {"error": ""}) for settings in tried], choice, [])
    assert outcome.at_edge == keys
    assert Outcome("x", outcome.searched, None, []).at_edge == []


def test_a_choice_at_the_edge_is_marked(tmp_path) -> None:
    for rates, marked in ((list(RATES), False), ([0.5, 2.0], True)):
        variants = {"fedavg": {"search": {"train.learning-rate": rates}}}
        compare(plan(variants=variants), tmp_path, Start())
        searched = (tmp_path / "table.md").read_text().split("## Search")[1]
        rows = [line for line in searched.splitlines() if line.startswith("| fedavg")]
        assert [f"**1.590**{', at the edge of the search' * marked}" in row for row in rows] == [
            rate == 0.5 for rate in rates
        ]
        assert ("at the edge" in searched) == marked
        assert "with seed 9 decides" in searched
        assert "Its runs have" not in searched


def test_a_search_with_fewer_rounds_says_so(tmp_path) -> None:
    shorter = {"search-settings": {"num-server-rounds": 1}}
    start = Start()
    compare(plan(**shorter), tmp_path, start)
    searched = (tmp_path / "table.md").read_text().split("## Search")[1]
    assert "Its runs have `num-server-rounds = 1`." in searched
    every = Config().num_server_rounds
    assert set(start.rounds) == {(9, 1), (1, every), (2, every), (3, every)}


def test_runs_of_other_code_stay_and_are_told(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("benchmarks.runner.code_hash", lambda: "a" * 64)
    compare(plan(variants={"fedavg": {}}), tmp_path, Start())
    (run, *_) = json.loads((tmp_path / "results.json").read_text())["variants"][0]["runs"]
    assert run["code"] == "a" * 64
    assert "kinds of code" not in (tmp_path / "table.md").read_text()

    monkeypatch.setattr("benchmarks.runner.code_hash", lambda: "b" * 64)
    capsys.readouterr()
    start = Start()
    both = plan(variants={"fedavg": {}, "ferret": {}})
    compare(both, tmp_path, start)
    assert {method for method, *_ in start.asked} == {"ferret"}
    warning = capsys.readouterr().out.splitlines()[0]
    assert warning.startswith(
        "warning: finished runs are of other code than today's (3, of fedavg)"
    )
    page = (tmp_path / "table.md").read_text()
    mixed = f"**2 kinds of code**: {'a' * 16} (fedavg); {'b' * 16} (ferret)"
    assert mixed in page and "kinds of hardware" not in page
    assert page.index(mixed) < page.index("by round")

    start = Start()
    compare(both, tmp_path, start, fresh_code=True)
    assert {method for method, *_ in start.asked} == {"fedavg"}
    assert "warning" not in capsys.readouterr().out
    assert "kinds of code" not in (tmp_path / "table.md").read_text()


def test_other_hardware_is_told(tmp_path, monkeypatch, capsys) -> None:
    one = {"ferret": {}}
    compare(plan(seeds=[1], variants=one), tmp_path, Start())
    (path,) = (tmp_path / "runs").glob("*.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"hardware": "an abacus"}))
    start = Start()
    compare(plan(seeds=[1, 2], variants=one), tmp_path, start, fresh_code=True)
    assert [seed for *_, seed in start.asked] == [2]
    assert "warning: finished runs are of other hardware" in capsys.readouterr().out
    page = (tmp_path / "table.md").read_text()
    assert "**2 kinds of hardware**: an abacus (ferret); " in page and "kinds of code" not in page


def test_a_run_that_does_not_know_its_code_is_of_other_code(tmp_path, capsys) -> None:
    one = plan(seeds=[1], variants={"ferret": {}})
    compare(one, tmp_path, Start())
    (path,) = (tmp_path / "runs").glob("*.json")
    record = json.loads(path.read_text())
    del record["code"]
    path.write_text(json.dumps(record))
    for fresh, runs in ((False, 0), (True, 1)):
        start = Start()
        compare(one, tmp_path, start, fresh)
        assert len(start.asked) == runs
        assert ("other code" in capsys.readouterr().out) == (not fresh)


def test_methods_with_a_footnote(tmp_path) -> None:
    variants = {
        "pool": {"method": "fedkseed"},
        "fedkseed-pro": {},
        "fetchsgd": {"sketch.top-k": 1000},
    }
    compare(plan(seeds=[1], variants=variants), tmp_path, Start())
    page = (tmp_path / "table.md").read_text()
    assert "- pool, fedkseed-pro: a node holds float32 copies" in page
    assert "- fetchsgd: what a node receives is for nodes that keep nothing" in page
    assert "the paper's 8k bytes a round, 8 kB with k = 1000." in page
    compare(plan(seeds=[1], variants={"fedavg": {}}), tmp_path, Start())
    page = (tmp_path / "table.md").read_text()
    assert "float32 copies" not in page and "a figure of this implementation" in page


def test_every_run_carries_what_it_depends_on(tmp_path) -> None:
    compare(plan(), tmp_path, Start())
    results = json.loads((tmp_path / "results.json").read_text())
    for variant in results["variants"]:
        for run in [*variant["runs"], *(tried["run"] for tried in variant["searched"])]:
            assert parse(run["config"]).seed == run["seed"]
            assert run["environment"]["torch"] and run["hardware"] and run["nodes"] == 2
            (digest,) = run["data"].values()
            assert len(digest) == 64 and len(run["base"]) == 16
            assert run["rounds"][-1]["round"] == 2


def test_failed_runs_are_infinite() -> None:
    good, diverged, broken = ({"rounds": rows(1.0)} for _ in range(3))
    diverged["rounds"][1]["eval/loss"] = None  # as JSON has NaN
    broken["rounds"][1]["failures"] = ["node 3: it is not finite\nand more"]
    crashed = {"error": "Killed"}
    assert trouble(good) == ""
    assert trouble(diverged) == "round 1: the held-out loss is not finite"
    assert trouble(broken) == "round 1: node 3: it is not finite and more"
    assert trouble(crashed) == "failed: Killed"
    wrapped = "ray::run() File x.py\nException E occurred. Message: too high'>). It originated"
    assert trouble({"error": wrapped}) == "failed: too high"
    assert [final_loss(r) for r in (good, diverged, broken, crashed)] == [1.0] + [math.inf] * 3
    better = {"rounds": rows(0.5)}
    assert best([({"a": 1}, good), ({"a": 2}, better), ({"a": 3}, crashed)]) == {"a": 2}
    assert best([({"a": 1}, good), ({"a": 2}, good)]) == {"a": 1}
    assert best([({"a": 1}, diverged), ({"a": 2}, crashed)]) is None


def test_figures_by_hand() -> None:
    found = figures({"rounds": rows(1.25, rounds=3)})
    assert found == {
        "loss": 1.25,
        "rougeL": 30.0,
        "up": (1000 + 2000 + 3000) / 6,
        "down": 9000 / 6,
        "bytes": 15_000,
        "local_s": 2.0,
        "reach_s": 0.5,
        "project_s": 0.25,
        "aggregate_s": 0.125,
        "replica_s": 0.0625,
        "round_s": 10.0,
        "node_bytes": 103,
        "server_bytes": 299,  # the most during a round: what came before it counts for nothing
    }
    bare = rows(1.0)
    for row in bare:
        for key in ("eval/rougeL", "time/project_s", "memory/node_peak_bytes", "time/evaluate_s"):
            row.pop(key, None)
    assert not {"rougeL", "project_s", "node_bytes"} & figures({"rounds": bare}).keys()
    assert figures({"rounds": bare})["round_s"] == 11.5


def test_means_and_curves_by_hand() -> None:
    runs = [{"rounds": rows(loss)} for loss in (1.0, 1.5, 1.7)]
    assert over_seeds(runs)["loss"] == pytest.approx((1.4, statistics.stdev([1.0, 1.5, 1.7])))
    assert math.isnan(over_seeds(runs[:1])["loss"][1])
    by_round = curve(runs, "eval/loss", "round")
    assert [point[0] for point in by_round] == [0, 1, 2]
    assert [point[1] for point in by_round] == pytest.approx([3.0, 2.4, 1.4])
    assert [point[0] for point in curve(runs, "eval/loss", "bytes")] == [0, 4000, 9000]
    assert [point[0] for point in curve(runs, "eval/loss", "seconds")] == [0, 9, 19]
    for run, offset in zip(runs, (0.0, 0.25, 0.5), strict=True):  # seeds that begin elsewhere
        for row in run["rounds"]:
            row["eval/loss"] += offset
    apart = curve(runs, "eval/loss", "round")
    assert [p[1] for p in apart] == pytest.approx([p[1] + 0.25 for p in by_round])
    assert [p[2] for p in apart] == pytest.approx([p[2] for p in by_round])
    assert over_seeds(runs)["loss"] == pytest.approx((1.65, statistics.stdev([1.0, 1.5, 1.7])))
    runs[0]["rounds"][1].pop("eval/loss")
    assert [point[0] for point in curve(runs, "eval/loss", "round")] == [0, 2]
    assert curve(runs, "eval/nothing", "round") == []


def test_the_table_by_hand() -> None:
    made = [{"seed": s, "rounds": rows(loss)} for s, loss in ((1, 1.0), (2, 1.5))]
    extra = {"config": {}, "environment": {}, "data": {}, "base": "", "hardware": ""}
    runs = [run | extra | {"config": {"model.name": "m", "method": "fedavg"}} for run in made]
    two = Plan.of({"title": "T", "seeds": [1, 2], "variants": {"fedavg": {}}})
    page = markdown(two, [Outcome("fedavg", [], {}, runs)])
    cells = next(line for line in page.splitlines() if line.startswith("| fedavg")).split(" | ")
    assert cells[1:] == [
        "1.250 ± 0.354", "20.0", "750 B", "1.5 kB", "9 kB",
        "1.5", "0.5", "0.25", "0.125", "0.0625", "9.5", "102 B", "299 B |",
    ]  # fmt: skip
    assert re.search(r"\| round \| 0 \| 1 \| 2 \|\n.*\n\| fedavg \| 3.000 \| 2.250 ± 0.354", page)
    assert "## Search" not in page


def test_numbers_for_people() -> None:
    texts = [seconds_text(s) for s in (0.012345, 1.5, 99.9, 99.96, 1234.5)]
    assert texts == ["0.0123", "1.5", "99.9", "100", "1234"]
    assert spread(1.0, math.nan, seconds_text) == spread(1.0, 0.0, seconds_text) == "1"
    assert spread(1000.0, 0.1, seconds_text) == "1000"
    assert spread(10.0, 0.5, seconds_text) == "10 ± 0.5"


def test_the_plots_are_pictures(tmp_path) -> None:
    made = plan()
    outcomes = compare(made, tmp_path, Start())
    tables.draw(made, outcomes, tmp_path)
    for name in ("curves.png", "costs.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_curves_are_as_wide_as_their_names(tmp_path) -> None:
    run = {"rounds": rows(1.0)}
    widths = []
    for name in ("ferret", "ferret, on nodes that differ in what they have"):
        tables.plots.curves({name: [run]}, tmp_path / "curves.png", "")
        header = (tmp_path / "curves.png").read_bytes()[:20]
        widths.append(int.from_bytes(header[16:20]))
    assert widths[1] > widths[0] + 100


@pytest.mark.slow
def test_the_real_app(tmp_path) -> None:
    small = {
        "num-server-rounds": 2,
        "train.steps": 2,
        "train.batch-size": 4,
        "evaluate.max-examples": 16,
        "evaluate.generate-examples": 4,
        "ferret.coefficients": 512,
    }
    rates = {"search": {"train.learning-rate": [1.0, 1e38]}}
    tiny = Plan.of({"seeds": [1], "settings": small, "variants": {"ferret": {}, "fedavg": rates}})
    ferret, fedavg = compare(tiny, tmp_path)
    assert fedavg.choice == {"train.learning-rate": 1.0}
    assert "the gradient norm nan" in trouble(fedavg.searched[1][1])
    one, other = figures(ferret.runs[0]), figures(fedavg.runs[0])
    assert 4 * 512 < one["up"] < 4 * 512 + 2000 < 4 * 110_000 < other["up"]
    assert one["project_s"] > 0 and "project_s" not in other
    for found in (one, other):
        assert found["node_bytes"] > 100e6 and found["server_bytes"] > 100e6
        assert found["round_s"] > found["local_s"] > 0 and found["aggregate_s"] > 0
        assert found["reach_s"] > 0
    assert {path.suffix for path in (tmp_path / "runs").iterdir()} == {".json", ".log"}

    def never(*_: object) -> list[dict]:
        raise AssertionError("a finished run was run again")

    assert [o.runs for o in compare(tiny, tmp_path, never)] == [ferret.runs, fedavg.runs]
