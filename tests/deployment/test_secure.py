"""Secure aggregation with real processes, one of which is killed."""

import json

import pytest

from ferret_flwr.config import parse
from tests.deployment.fleet import Fleet
from tests.deployment.test_crashes import flat, settings

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

PATIENCE = 900  # seconds
SECURE = {
    "privacy.secure-aggregation": True,
    "strategy.min-train-nodes": 3,
    "strategy.min-available-nodes": 3,
    "evaluate.every": 1,
}


def test_the_others_go_on_without_a_node_that_is_killed(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with Fleet(tmp_path) as fleet:
        nodes = fleet.nodes(4)
        run = fleet.submit(settings(3, **SECURE))
        run.wait_for("round   1 |", PATIENCE)
        nodes[3].kill()
        assert run.wait(PATIENCE) == "finished:completed", run.log
        rows = run.rows
        assert [row["round"] for row in rows] == [0, 1, 2, 3]
        assert rows[1]["nodes"] == 4
        assert rows[3]["nodes"] == 3
        assert rows[3]["eval/loss"] < rows[0]["eval/loss"]
        assert not any({"train/loss", "ferret/fidelity"} & row.keys() for row in rows)
        config = json.loads((run.results / "results.json").read_text())["config"]
        assert parse(flat(config)).privacy.secure_aggregation
        assert len(run.ledger) >= 2  # of the round in which it was killed nothing may be left
