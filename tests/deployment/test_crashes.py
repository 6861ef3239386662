"""Whatever crashes, the rounds are those of an uninterrupted run of the same participants."""

import json
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ferret_flwr.config import Config, parse
from ferret_flwr.ledger import Ledger, LedgerError
from ferret_flwr.methods.ferret import local_round
from ferret_flwr.rounds import next_plan, publish, server_rate
from ferret_flwr.training.worker import Node as Member
from tests.deployment.fleet import Fleet, Node, Process, Run, wait_until
from tests.flower.test_rounds_match import fresh_replica
from tests.test_app import SETTINGS

pytestmark = pytest.mark.deployment

PATIENCE = 600  # seconds
COMPLETED = "finished:completed"
LEFT_BEHIND = {
    "config.toml",
    "results.json",
    "ledger.safetensors",
    "loss.png",
    "final",
    "tensorboard",
}


def settings(rounds: int, **more: object) -> dict[str, object]:
    """Return those of a run that costs little more than Flower itself."""
    cheap = {"evaluate.every": 100, "evaluate.generate-examples": 0}
    return {**SETTINGS, **cheap, "num-server-rounds": rounds, **more}


def mean(rows: Sequence[np.ndarray], weights: Sequence[int]) -> np.ndarray:
    """Average as Flower's FedAvg does: float64 factors, float32 products and sums."""
    shares = [np.float64(weight / sum(weights)) for weight in weights]
    products = [(row * share).astype(np.float32) for row, share in zip(rows, shares, strict=True)]
    return sum(products[1:], products[0])


def expected(config: Config, schedule: Sequence[set[int]], of: int) -> Ledger:
    """Return the ledger of a plain loop in which ``schedule[i]`` take part in round i + 1."""
    replica = fresh_replica(config)
    members = {i: Member.of(config, i, of) for i in sorted(set().union(*schedule))}
    ledger = Ledger(replica.header)
    for number, present in enumerate(schedule, start=1):
        plan, rows, weights = next_plan(ledger, config.ferret, config.seed), [], []
        for index in sorted(present):
            member = members[index]
            train = partial(member.train, number)
            update, _ = local_round(replica, member.worker.parameters, plan, train)
            rows.append(update.coefficients)
            weights.append(len(member.examples))
        rate = server_rate(config.ferret, plan, ledger, config.num_server_rounds)
        ledger = ledger.append(publish(plan, mean(rows, weights), rate))
        replica.follow(ledger)
        ledger = ledger.with_fingerprint(replica.fingerprint)
    return ledger


def check_ledger(run: Run, schedule: Sequence[set[int]], of: int) -> None:
    """Compare a run's rounds and parameters with those of an uninterrupted one."""
    config = parse(flat(tomllib.loads((run.results / "config.toml").read_text())))
    same = expected(config, schedule, of)
    assert len(run.ledger) == len(schedule)
    assert run.ledger.head == same.head
    replica = fresh_replica(config)
    replica.follow(run.ledger)
    assert replica.fingerprint == same.fingerprint
    if config.evaluate.every:  # the server has a model, and so it knows
        assert run.ledger.fingerprint == same.fingerprint


def flat(table: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Return a TOML table with dotted keys."""
    found: dict[str, object] = {}
    for key, value in table.items():
        name = prefix + key
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def check_files(folder: Path, *, killed: bool = False) -> list[Path]:
    """Check that all that the server left in ``folder`` is whole, and return what is scratch."""
    scratch = [path for path in folder.iterdir() if path.name.startswith(".")]
    assert {path.name for path in folder.iterdir()} - LEFT_BEHIND == {p.name for p in scratch}
    assert killed or not scratch
    tomllib.loads((folder / "config.toml").read_text())
    json.loads((folder / "results.json").read_text())
    if (folder / "ledger.safetensors").exists():
        Ledger.load(folder)
    if (folder / "final").exists():
        load_file(folder / "final" / "model.safetensors")
    if (folder / "loss.png").exists():
        assert (folder / "loss.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    return scratch


def cache_of(node: Node, run: Run) -> Path:
    """Return where a node keeps the ledger of ``run``."""
    return node.folder / "ledgers" / f"run-{run.id}" / f"node-{node.id}.safetensors"


def check_caches(*nodes: Node) -> None:
    """Check that every ledger and snapshot that nodes keep is whole."""
    for node in nodes:
        for path in (node.folder / "ledgers").rglob("[!.]*.safetensors"):
            Ledger.load(path)
        for path in (node.folder / "ledgers").rglob("[!.]*.npy"):
            np.load(path)


def make_stoppable(fleet: Fleet) -> Fleet:
    """Let the app stop at places, see `app_stops`."""
    shutil.copy(Path(__file__).with_name("app_stops.py"), fleet.app)
    for name, holds in {"server_app": "hold_ledgers", "client_app": "hold_all"}.items():
        path = fleet.app / f"{name}.py"
        path.write_text(f"import app_stops\n\napp_stops.{holds}()\n{path.read_text()}")
    return fleet


def stop_at(process: Process, *places: str) -> None:
    """Let the next one of the family that gets to each of ``places`` stop there."""
    for name in ("wanted", "reached"):
        (process.folder / "stops" / name).mkdir(parents=True, exist_ok=True)
    for place in places:
        (process.folder / "stops" / "wanted" / place).touch()


@contextmanager
def stopped(process: Process, place: str, run: Run) -> Iterator[None]:
    """Wait until one of the family has stopped at ``place``; let it go on in the end."""
    reached = process.folder / "stops" / "reached" / place
    wait_until(reached.exists, PATIENCE, lambda: f"{place} of {process.folder}\n{run.log[-6000:]}")
    yield
    reached.unlink()


def is_online(fleet: Fleet, node_id: int) -> bool:
    """Tell whether the SuperLink sends messages to a node."""
    nodes = fleet.ask("supernode", "list")["nodes"]
    return any(int(n["node-id"]) == node_id and n["status"] == "online" for n in nodes)


def log_of(node: Node) -> str:
    """Return what a node and its ClientApps have printed since its first start."""
    return "".join(path.read_text(errors="replace") for path in sorted(node.folder.glob("*.log")))


@dataclass
class BadDay:
    """A run in which two of four nodes raise and the server is killed, and how it was resumed."""

    raising: list[Node]
    killed: Run
    left: list[Path]
    half: list[bytes]
    resumed: Run
    status: str


@pytest.fixture(scope="module")
def bad_day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BadDay]:
    typo, wrong = {"dataset.nam": "/srv/ours.jsonl"}, {"partition-id": "three"}
    with make_stoppable(Fleet(tmp_path_factory.mktemp("fleet"))) as fleet:
        nodes = [
            fleet.node(index, of=4, wait=False, **config)
            for index, config in enumerate([{}, {}, typo, wrong])
        ]
        for node in nodes:
            node.online()
        stop_at(fleet.serverapp, "amid-2")
        config = settings(2, **{"strategy.min-available-nodes": 4})
        killed = fleet.submit(config)
        with stopped(fleet.serverapp, "amid-2", killed):
            fleet.serverapp.kill("flwr-serverapp")
        left = check_files(killed.results, killed=True)
        half = [path.read_bytes() for path in left]
        without_model = {"evaluate.every": 0, "ferret.resume": str(killed.results)}
        resumed = fleet.submit({**config, **without_model})
        yield BadDay(nodes[2:], killed, left, half, resumed, resumed.wait(PATIENCE))


def test_node_that_raises_is_named_and_left_out(bad_day: BadDay) -> None:
    answers, raises = bad_day.raising
    answered = (
        f"node {answers.id} (partition 2) is left out: ConfigError: its node-config cannot set "
        "'dataset.nam'; did you mean 'dataset.name'?"
    )
    raised = f"node {raises.id} failed: Message contains an Error"
    for run in (bad_day.killed, bad_day.resumed):
        assert answered in run.log
        assert raised in run.log
        assert "'partition-id' is 'three'" in run.log
        for row in run.rows[1:]:
            assert row["nodes"] == 2
            assert any(answered[: answered.index(" is left")] in f for f in row["failures"])
            assert any(raised in failure for failure in row["failures"])


def test_server_killed_while_it_writes_leaves_the_previous_ledger(bad_day: BadDay) -> None:
    assert len(bad_day.killed.ledger) == 1
    (scratch,), (half,) = bad_day.left, bad_day.half
    assert scratch.name.startswith(".ledger.safetensors.")
    with pytest.raises(LedgerError):
        Ledger.from_bytes(half, scratch.name)


def test_resumed_run_equals_an_uninterrupted_one(bad_day: BadDay) -> None:
    assert bad_day.status == COMPLETED, bad_day.resumed.log
    assert [row["round"] for row in bad_day.resumed.rows] == [0, 1, 2]
    assert bad_day.killed.ledger.head == bad_day.resumed.ledger.until(1).head
    check_files(bad_day.resumed.results)
    assert not list(bad_day.killed.results.glob(".*"))  # what the killed server left
    check_ledger(bad_day.resumed, 2 * [{0, 1}], of=4)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with make_stoppable(Fleet(tmp_path)) as fleet:
        yield fleet


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Fleet]:
    """Return a fleet whose nodes keep their ids when they are started again."""
    with make_stoppable(Fleet(tmp_path, tls=True, auth=True)) as fleet:
        yield fleet


ANY_NUMBER = {"strategy.min-available-nodes": 1}


@pytest.mark.slow
def test_damaged_caches_are_sent_again(fleet: Fleet) -> None:
    nodes = fleet.nodes(3)
    stop_at(fleet.serverapp, "after-2")
    run = fleet.submit(settings(3))
    with stopped(fleet.serverapp, "after-2", run):
        damage([cache_of(node, run) for node in nodes])
    assert run.wait(PATIENCE) == COMPLETED, run.log
    for index, node in enumerate(nodes):
        lost = f"node {node.id} (partition {index}) has lost its ledger cache"
        assert run.log.count(lost) == 1
        assert len(Ledger.load(cache_of(node, run))) == 2
    check_ledger(run, 3 * [{0, 1, 2}], of=3)
    check_files(run.results)
    check_caches(*nodes)


def damage(caches: Sequence[Path]) -> None:
    """Delete one, truncate one, and put another run's rounds into the third."""
    deleted, truncated, foreign = caches
    ledger = Ledger.load(foreign)
    deleted.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-100])
    other = Ledger(ledger.header)
    for _ in range(len(ledger)):
        plan = next_plan(other, parse(SETTINGS).ferret, seed=7)
        other = other.append(publish(plan, np.ones(plan.num_coefficients), 1.0))
    other.save(foreign)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["train-2", "amid-1"])
def test_client_killed_mid_round(place: str, fleet: Fleet) -> None:
    """It trains, or writes what it has received; Flower notices within about a minute."""
    nodes = fleet.nodes(2)
    stop_at(nodes[1], place)
    run = fleet.submit(settings(3))
    with stopped(nodes[1], place, run):
        nodes[1].kill("flwr-clientapp")
    assert run.wait(PATIENCE) == COMPLETED, run.log
    assert f"node {nodes[1].id} did not take part in round 2" in run.log
    check_ledger(run, [{0, 1}, {0}, {0, 1}], of=2)
    check_files(run.results)
    check_caches(*nodes)
    assert len(Ledger.load(cache_of(nodes[1], run))) == 2


@pytest.mark.slow
def test_node_killed_mid_round_comes_back_with_another_id(fleet: Fleet) -> None:
    nodes = fleet.nodes(2)
    stop_at(nodes[1], "train-2")
    stop_at(fleet.serverapp, "after-3")
    run = fleet.submit(settings(4, **ANY_NUMBER))
    with stopped(nodes[1], "train-2", run):
        before = nodes[1].id
        nodes[1].kill()
    with stopped(fleet.serverapp, "after-3", run):
        nodes[1].start()
        assert nodes[1].id != before
    assert run.wait(PATIENCE) == COMPLETED, run.log
    assert f"node {before} did not take part in round 2" in run.log
    check_ledger(run, [{0, 1}, {0}, {0}, {0, 1}], of=2)
    check_files(run.results)
    check_caches(*nodes)


@pytest.mark.slow
def test_nodes_leave_come_back_and_join_at_round_5(keyed: Fleet) -> None:
    nodes = [keyed.node(index, of=3) for index in range(2)]
    stop_at(keyed.serverapp, "after-2", "after-4")
    run = keyed.submit(settings(6, **ANY_NUMBER))
    with stopped(keyed.serverapp, "after-2", run):
        before = nodes[1].id
        nodes[1].stop()
        assert not is_online(keyed, before)
    with stopped(keyed.serverapp, "after-4", run):
        assert len(Ledger.load(cache_of(nodes[1], run))) == 1
        nodes[1].start()
        nodes.append(keyed.node(2, of=3))
    assert run.wait(PATIENCE) == COMPLETED, run.log
    assert nodes[1].id == before
    check_ledger(run, 2 * [{0, 1}] + 2 * [{0}] + 2 * [{0, 1, 2}], of=3)
    check_files(run.results)
    check_caches(*nodes)
    joins, all_present = run.rows[5], run.rows[6]
    whole = joins["comm/downlink_bytes_per_node"]
    one_entry = all_present["comm/downlink_bytes_per_node"]
    missed = joins["comm/downlink_bytes"] - whole - one_entry  # what went to the one that is back
    assert one_entry < missed < whole - one_entry / 2


@pytest.mark.slow
def test_node_started_again_while_its_reply_is_awaited(keyed: Fleet) -> None:
    """Flower never delivers that request again, nor gives it up: the timeout does."""
    nodes = keyed.nodes(2)
    stop_at(nodes[1], "train-2")
    stop_at(keyed.serverapp, "after-2")
    run = keyed.submit(settings(3, **ANY_NUMBER, **{"strategy.round-timeout": 90}))
    with stopped(nodes[1], "train-2", run):
        keyed.serverapp.send(signal.SIGSTOP, "flwr-serverapp")  # it does not see the node leave
        nodes[1].stop()
        nodes[1].start()
        keyed.serverapp.send(signal.SIGCONT, "flwr-serverapp")
    with stopped(keyed.serverapp, "after-2", run):
        assert is_online(keyed, nodes[1].id)
    assert run.wait(PATIENCE) == COMPLETED, run.log
    assert f"node {nodes[1].id} did not take part in round 2" in run.log
    check_ledger(run, [{0, 1}, {0}, {0, 1}], of=2)
    check_files(run.results)
    check_caches(*nodes)


@pytest.mark.slow
def test_server_killed_between_rounds(fleet: Fleet) -> None:
    fleet.nodes(2)
    stop_at(fleet.serverapp, "after-1")
    killed = fleet.submit(settings(2))
    with stopped(fleet.serverapp, "after-1", killed):
        fleet.serverapp.kill("flwr-serverapp")
    assert check_files(killed.results) == []
    resumed = fleet.submit(settings(2, **{"ferret.resume": str(killed.results)}))
    assert resumed.wait(PATIENCE) == COMPLETED, resumed.log
    check_ledger(resumed, 2 * [{0, 1}], of=2)
    check_files(resumed.results)
    assert killed.wait(PATIENCE) == "finished:failed"


@pytest.mark.slow
def test_server_machine_loses_power(fleet: Fleet) -> None:
    nodes = fleet.nodes(2)
    stop_at(fleet.serverapp, "amid-2")
    lost = fleet.submit(settings(3))
    with stopped(fleet.serverapp, "amid-2", lost):
        fleet.superlink.kill()
    assert len(lost.ledger) == 1
    fleet.superlink.start()
    for node in nodes:
        node.wait(PATIENCE)  # it is unknown there now, and ends
        node.start()
    resumed = fleet.submit(settings(3, **{"ferret.resume": str(lost.results)}))
    assert resumed.wait(PATIENCE) == COMPLETED, resumed.log
    check_ledger(resumed, 3 * [{0, 1}], of=2)
    check_files(lost.results, killed=True)
    check_files(resumed.results)


@pytest.mark.slow
def test_superlink_killed_and_started_again(tmp_path: Path) -> None:
    """The nodes train meanwhile: a reply that is on its way would be lost."""
    with make_stoppable(Fleet(tmp_path, isolation="process", database=True)) as fleet:
        nodes = fleet.nodes(2)
        for node in nodes:
            stop_at(node, "train-2")
        run = fleet.submit(settings(3))
        with stopped(nodes[0], "train-2", run), stopped(nodes[1], "train-2", run):
            fleet.superlink.kill()
            fleet.superlink.start()
        assert run.wait(PATIENCE) == COMPLETED, run.log
        check_ledger(run, 3 * [{0, 1}], of=2)
        check_files(run.results)
        check_caches(*nodes)


@pytest.fixture
def small_disks(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Return what makes a folder a disk of its own, of 4 MiB."""
    disks = []

    def mount(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
        disks.append(folder)
        return folder

    yield mount
    for folder in disks:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free: int = 0) -> Path:
    """Fill a disk up to ``free`` bytes, and return the file to delete again."""
    left = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(left - free))
    return disk / "filler"


@pytest.mark.slow
def test_full_disks(fleet: Fleet, small_disks: Callable[[Path], Path]) -> None:
    disks = [small_disks(fleet.folder / name) for name in ("results", "node-0/ledgers")]
    nodes = fleet.nodes(2)
    stop_at(fleet.serverapp, "after-1", "after-2")
    run = fleet.submit(settings(3))
    with stopped(fleet.serverapp, "after-1", run):
        fillers = [fill(disk) for disk in disks]
    with stopped(fleet.serverapp, "after-2", run):
        assert len(run.ledger) == 1
        assert check_files(run.results) == []
        assert "cannot write the ledger cache" in log_of(nodes[0])
        assert not [p for p in cache_of(nodes[0], run).parent.rglob("*") if p.is_file()]
        for filler in fillers:
            filler.unlink()
    assert run.wait(PATIENCE) == COMPLETED, run.log
    assert run.log.count("No space left on device; the previous one is kept") == 1
    assert "cannot write the results" in run.log
    assert [row["round"] for row in run.rows] == [0, 1, 2, 3]
    check_ledger(run, 3 * [{0, 1}], of=2)
    check_files(run.results)
    check_caches(*nodes)
    assert [len(Ledger.load(cache_of(node, run))) for node in nodes] == [2, 2]


@pytest.mark.slow
def test_disk_full_at_the_end(fleet: Fleet, small_disks: Callable[[Path], Path]) -> None:
    disk = small_disks(fleet.folder / "results")
    fleet.nodes(2)
    stop_at(fleet.serverapp, "after-1")
    run = fleet.submit(settings(1))
    with stopped(fleet.serverapp, "after-1", run):
        fill(disk, free=100 * 1024)
    assert run.wait(PATIENCE) == "finished:failed", run.log
    assert "No space left on device" in run.log
    check_ledger(run, [{0, 1}], of=2)
    assert check_files(run.results) == []
    assert not (run.results / "final").exists()
