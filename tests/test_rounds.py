"""What the server decides: plans from the past, energies, rates, and the published entry."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ferret_flwr.config import ConfigError, FerretConfig
from ferret_flwr.ledger import Entry, Header, Ledger
from ferret_flwr.projection import projection
from ferret_flwr.projection.allocation import expected_squared_error
from ferret_flwr.projection.families import FAMILIES
from ferret_flwr.projection.layout import Blocks, InterleavedBlocks, Layout
from ferret_flwr.projection.plan import PlanError, RoundPlan
from ferret_flwr.rounds import block_energies, next_plan, publish, server_rate

SIZE = 4 * 128 - 40
LAYOUT = Layout(("w",), ((SIZE,),))
BLOCKS = Blocks(SIZE, 128)
HEADER = Header(LAYOUT.fingerprint, SIZE, "base")
CONFIG = FerretConfig(coefficients=64, blocks=4)
INTERLEAVED = FerretConfig(coefficients=64)
SCALES = np.float32([1, 3, 0.3, 1])  # of the update, block by block
DELTA = (
    np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    * np.repeat(SCALES, 128)[:SIZE]
)
ENERGIES = np.add.reduceat(DELTA.astype(np.float64) ** 2, np.arange(0, SIZE, 128))


pytestmark = pytest.mark.usefixtures("one_thread")


def make_plan(counts=(2, 1, 3, 2), round=1, seed=0, family="rademacher", blocks=BLOCKS):
    return RoundPlan(round, seed, family, blocks, np.array(counts))


def published(plan, rate=1.0, delta=DELTA):
    return publish(plan, projection.project([delta], LAYOUT, plan), rate)


def make_ledger(*entries):
    return Ledger(HEADER, entries)


def a_run(config, seed, rounds, delta=DELTA):
    """Return the ledger of a run in which every update is ``delta``."""
    ledger = make_ledger()
    for _ in range(rounds):
        plan = next_plan(ledger, config, seed)
        ledger = ledger.append(published(plan, server_rate(config, plan, ledger, rounds), delta))
    return ledger


def values(plan):
    return plan.round, plan.seed, plan.family, plan.blocks, plan.bases_per_block.tolist()


# next_plan


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_plan_is_a_function_of_ledger_config_and_seed(tmp_path, rounds):
    ledger = a_run(CONFIG, seed=5, rounds=rounds)
    plan = next_plan(ledger, CONFIG, 5)
    ledger.with_fingerprint("somebody computed it").save(tmp_path / "ledger")
    resumed = Ledger.load(tmp_path / "ledger")
    assert values(next_plan(resumed, CONFIG, 5)) == values(plan)
    assert plan.round == rounds + 1
    assert plan.num_coefficients == CONFIG.coefficients


def test_a_resumed_run_publishes_the_same_rounds(tmp_path):
    whole = a_run(CONFIG, seed=5, rounds=4)
    whole.until(2).save(tmp_path / "ledger")
    ledger = Ledger.load(tmp_path / "ledger")
    for round in (3, 4):
        plan = next_plan(ledger, CONFIG, 5)
        assert plan.round == round
        ledger = ledger.append(published(plan, server_rate(CONFIG, plan, ledger, 4)))
    assert ledger.head == whole.head


@pytest.mark.parametrize("allocation", ["energy", "variance", "norm", "uniform"])
def test_the_first_round_is_uniform(allocation):
    counts = next_plan(make_ledger(), replace(CONFIG, allocation=allocation), 0).bases_per_block
    if allocation in ("energy", "uniform"):
        assert counts.tolist() == [16, 16, 16, 16]
    else:  # but for the weight of the shorter last block
        assert np.ptp(counts[:-1]) <= 1 and counts[-1] < counts[0]
    assert counts.sum() == CONFIG.coefficients


def test_bases_go_where_the_energy_was():
    counts = next_plan(a_run(CONFIG, 5, rounds=1), CONFIG, 5).bases_per_block
    assert counts.argmax() == 1 and counts[1] > 30
    assert counts.argmin() == 2
    elsewhere = DELTA * 0
    elsewhere[300:350] = 1
    counts = next_plan(a_run(CONFIG, 5, rounds=1, delta=elsewhere), CONFIG, 5).bases_per_block
    assert counts.argmax() == 2


def test_the_cap_is_for_energy_only():
    ledger = a_run(CONFIG, 5, rounds=1)
    capped = replace(CONFIG, max_per_block=25)
    assert next_plan(ledger, capped, 5).bases_per_block.max() == 25
    other = replace(capped, allocation="norm")
    assert next_plan(ledger, other, 5).bases_per_block.max() > 25


def test_seeds_differ_between_rounds_and_runs():
    ledger = a_run(CONFIG, 5, rounds=3)
    plans = [next_plan(ledger.until(n), CONFIG, seed) for n in range(4) for seed in range(20)]
    assert len({plan.seed for plan in plans}) == len(plans)
    assert all(0 <= plan.seed < 2**63 for plan in plans)


def test_blocks_are_interleaved_one_for_each_coefficient_unless_told():
    big = Ledger(Header("layout", 10**6, "base"))
    plan = next_plan(big, FerretConfig(coefficients=400), 0)
    assert plan.blocks == InterleavedBlocks(10**6, 400)
    assert plan.counts.tolist() == [1] * 400
    assert next_plan(big, FerretConfig(coefficients=400, blocks=9), 0).blocks.count == 9
    few = next_plan(make_ledger(), FerretConfig(coefficients=SIZE + 1), 0)
    assert few.num_coefficients == SIZE


def test_more_blocks_than_coefficients():
    message = r"'ferret\.blocks' must be at most 'ferret\.coefficients' = 3, got 4"
    with pytest.raises(ConfigError, match=message):
        next_plan(make_ledger(), FerretConfig(coefficients=3, blocks=4), 0)
    assert next_plan(make_ledger(), FerretConfig(coefficients=4, blocks=4), 0).num_coefficients == 4


def test_an_allocation_needs_contiguous_blocks():
    with pytest.raises(ConfigError, match=r"is for contiguous blocks: set 'ferret\.blocks'"):
        next_plan(make_ledger(), replace(INTERLEAVED, allocation="norm"), 0)


def test_what_was_published_does_not_change_interleaved_blocks():
    ledger = a_run(INTERLEAVED, 5, rounds=2)
    plan = next_plan(ledger, INTERLEAVED, 5)
    assert plan.blocks == ledger.entries[0].plan.blocks
    assert plan.seed != ledger.entries[-1].plan.seed


# block_energies


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_energies_approach_those_of_the_update(family, rate):
    counts = np.array([4000, 3000, 2000, 1000])
    entry = published(make_plan(counts, seed=3, family=family), rate)

    def right(energies):  # the variance of (v·Δ)²/ρ is below 2‖Δ‖⁴
        return (np.abs(energies / ENERGIES - 1) <= 5 * np.sqrt(2 / counts)).all()

    energies = block_energies(make_ledger(entry), BLOCKS, replace(CONFIG, energy_floor=0.0))
    assert right(energies)
    assert not right(0.75 * energies)
    assert not right(1.33 * energies)
    assert not right(energies[::-1])


def test_energies_of_clients_with_bases_of_their_own():
    counts = np.array([2000, 2000, 2000, 2000])
    plan = make_plan(counts)
    seeds = (1, 2, 3)
    rows = [projection.project([DELTA], LAYOUT, plan.with_seed(seed)) for seed in seeds]
    entry = publish(plan, np.array(rows), 0.5, seeds)
    energies = block_energies(make_ledger(entry), BLOCKS, CONFIG)
    np.testing.assert_allclose(energies, ENERGIES, rtol=5 * math.sqrt(2 / 2000 / 3))


def _entry(round, energies, rate=1.0, blocks=BLOCKS):
    """Return one round with these energies, one basis a block."""
    plan = make_plan(np.ones(len(energies), dtype=int), round, blocks=blocks)
    return publish(plan, np.sqrt(energies), rate)


def test_energies_are_a_moving_average():
    ledger = make_ledger(
        _entry(1, [16, 4, 1, 1], rate=0.1), _entry(2, [0, 4, 4, 1]), _entry(3, [4, 0, 0, 1])
    )
    for decay, expected in (
        (0.5, [6, 2, 1.25, 1]),
        (0.25, [4, 1, 0.8125, 1]),
        (0.0, [4, 0, 0, 1]),
        (1.0, [16, 4, 1, 1]),
    ):
        config = replace(CONFIG, energy_decay=decay, energy_floor=0.0)
        np.testing.assert_allclose(block_energies(ledger, BLOCKS, config), expected, rtol=1e-6)


def test_no_block_is_forgotten():
    ledger = make_ledger(_entry(1, [8, 0, 0, 0]))
    energies = block_energies(ledger, BLOCKS, replace(CONFIG, energy_floor=0.25))
    np.testing.assert_allclose(energies, [8, 0.5, 0.5, 0.5], rtol=1e-6)
    assert (block_energies(ledger, BLOCKS, CONFIG) > 0).all()


def test_energies_without_a_past():
    other = _entry(1, [1, 2], blocks=Blocks(SIZE, 256))
    for entries in ((), (_entry(1, [9, 1, 1, 1], rate=0.0),), (_entry(1, [0, 0, 0, 0]),), (other,)):
        assert block_energies(make_ledger(*entries), BLOCKS, CONFIG).tolist() == [1, 1, 1, 1]


def test_rounds_cut_otherwise_do_not_count():
    other, own = _entry(1, [1, 2], blocks=Blocks(SIZE, 256)), _entry(2, [9, 4, 1, 1])
    energies = block_energies(make_ledger(other, own), BLOCKS, CONFIG)
    np.testing.assert_allclose(energies, [9, 4, 1, 1], rtol=1e-6)


# server_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_first_round_warms_up(schedule):
    config = FerretConfig(server_rate=2.0, warmup_rate=0.25, rate_schedule=schedule)
    first = next_plan(make_ledger(), CONFIG, 5)
    assert server_rate(config, first, make_ledger(), 8) == 0.5
    assert server_rate(config, first, make_ledger(), 1) == 0.5


@pytest.mark.parametrize(
    "config", [INTERLEAVED, replace(CONFIG, allocation="uniform")], ids=["interleaved", "uniform"]
)
def test_who_needs_no_energies_needs_no_warm_up(config):
    config = replace(config, server_rate=2.0)
    first = next_plan(make_ledger(), config, 5)
    assert server_rate(config, first, make_ledger(), 8) == 2.0


def test_blocks_cut_anew_warm_up_again():
    ledger = a_run(CONFIG, seed=5, rounds=2)
    other = replace(CONFIG, blocks=2, warmup_rate=0.25)
    assert other.blocks != ledger.entries[0].plan.blocks.count
    plan = next_plan(ledger, other, 5)
    assert server_rate(other, plan, ledger, 4) == 0.25
    again = next_plan(ledger, CONFIG, 5)
    assert server_rate(CONFIG, again, ledger, 4) == 1.0


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [2, 2, 2, 2, 2]),
        ("linear", [1.5, 1, 0.5, 0, 0]),
        ("cosine", [1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0, 0]),
    ],
)
def test_schedules(schedule, rates):
    config = FerretConfig(server_rate=2.0, warmup_rate=0.1, rate_schedule=schedule)
    ledger, computed = a_run(CONFIG, seed=5, rounds=1), []
    for _ in range(5):
        plan = next_plan(ledger, CONFIG, 5)
        computed.append(server_rate(config, plan, ledger, 4))
        ledger = ledger.append(published(plan))
    np.testing.assert_allclose(computed, rates, atol=1e-12)


# publish


@pytest.mark.parametrize("family", FAMILIES)
def test_publish_folds_every_factor(family):
    plan = make_plan(family=family)
    gamma = np.arange(1.0, plan.num_coefficients + 1)
    rho = 1.0 if family == "rademacher" else 1 / (3 * 128)
    entry = publish(plan, gamma, 0.3)
    expected = 0.3 * gamma / (rho * np.array([2, 2, 1, 3, 3, 3, 2, 2]))
    np.testing.assert_allclose(entry.coefficients, [expected], rtol=2e-3)  # ρ ≈ 1/(3 d_l)
    assert entry.coefficients.dtype == np.float32
    assert (entry.rate, entry.seeds, entry.fingerprint) == (0.3, (plan.seed,), "")
    assert entry.plan is plan


def test_publish_keeps_the_clients_apart():
    plan = make_plan()
    rows = np.random.default_rng(0).standard_normal((3, plan.num_coefficients))
    entry = publish(plan, rows, 0.5, [7, 8, 9])
    assert entry.seeds == (7, 8, 9)
    for i in range(3):
        assert (entry.coefficients[i] == publish(plan, rows[i], 0.5).coefficients[0]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_round_is_the_update_on_average(family):
    draws = 2000
    plan = make_plan((2, 6, 3, 2), family=family)

    def mean_update(other_seed=0):
        total = np.zeros(SIZE)
        for seed in range(draws):
            (row,) = published(plan.with_seed(seed), rate=1.0).coefficients
            bases = plan.with_seed(seed + other_seed)
            total += next(projection.reconstruct(row, LAYOUT, bases))
        return total / draws

    # Along Δ, where a wrong factor shows, and in all directions together.
    counts = plan.bases_per_block
    along = np.sqrt((2 * ENERGIES**2 / counts).sum() / draws) / ENERGIES.sum()
    trace = 1.02 * expected_squared_error(ENERGIES, BLOCKS, counts) / draws  # κ of normals, < 3
    spread = math.sqrt(2 * (2 * ENERGIES / counts).max() / draws * trace)

    def unbiased(mean):
        error = float(mean @ DELTA) / ENERGIES.sum() - 1
        return abs(error) <= 5 * along and ((mean - DELTA) ** 2).sum() <= trace + 5 * spread

    mean = mean_update()
    assert unbiased(mean)
    assert not unbiased(0.9 * mean)
    assert not unbiased(3 * mean)
    assert not unbiased(mean_update(other_seed=1))


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_published():
    plan = make_plan()
    good = np.ones(8)
    for change, message in (
        ({3: np.nan}, "the aggregate: 1 of 8 .* not finite, the first at 3"),
        ({2: np.inf, 5: -np.inf}, "the aggregate: 2 of 8 .* not finite, the first at 2"),
        ({6: 1e39}, "of seed 0: 1 of 8 .* not finite, the first at 6"),
    ):
        bad = good.copy()
        bad[list(change)] = list(change.values())
        with pytest.raises(PlanError, match=message):
            publish(plan, bad, 1.0)
    with pytest.raises(PlanError, match=r"K = 8 coefficients, got shape \(7,\)"):
        publish(plan, good[:-1], 1.0)
    with pytest.raises(PlanError, match="1 seeds for 2 rows"):
        publish(plan, np.ones((2, 8)), 1.0)
    with pytest.raises(PlanError, match="3 seeds for 2 rows"):
        publish(plan, np.ones((2, 8)), 1.0, [1, 2, 3])
    assert isinstance(publish(plan, good, 1.0), Entry)
