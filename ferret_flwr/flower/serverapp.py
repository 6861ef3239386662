"""From a run configuration to what Flower runs on the server."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.common import Metrics, Scalar
from flwr.server import Server, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

from ferret_flwr import accounting, report
from ferret_flwr.config import Config, ConfigError, flatten, parse
from ferret_flwr.files import remove_scratch
from ferret_flwr.flower.inner import build_inner
from ferret_flwr.flower.nodes import SeededClientManager
from ferret_flwr.flower.private import price
from ferret_flwr.flower.recording import Recorded, RecordingServer, Row
from ferret_flwr.flower.strategy import Ferret
from ferret_flwr.ledger import Ledger
from ferret_flwr.report import weights_nbytes
from ferret_flwr.tracking import Tracking, check_installed

if TYPE_CHECKING:
    from ferret_flwr.methods.method import Method
    from ferret_flwr.replica import Replica
    from ferret_flwr.training.worker import Worker

log = logging.getLogger("ferret_flwr")


class Run:
    """One run on the server: its strategy, its rows, and the folder that it leaves behind."""

    def __init__(self, config: Config) -> None:
        """Check the configuration and load what the server needs.

        Raises
        ------
        ConfigError, LedgerError, ModelError, DataError
            Naming what is wrong, before the first round.
        """
        other = None if config.method == "ferret" else _other_method(config.method)
        self.config = config = other.configured(config) if other else config
        trackers = config.tracking.split()
        check_installed(trackers)
        resume = config.ferret.resume
        path = Path(resume).expanduser()
        ledger = Ledger.load(path) if resume else None
        earlier = path if path.is_dir() else path.parent
        if ledger:
            remove_scratch(earlier)  # of a server that was killed while it wrote
        if resume and config.method != "ferret":
            raise ConfigError(f"'ferret.resume' needs 'method' = 'ferret', got '{config.method}'")
        self.done = len(ledger) if ledger else 0
        self.rows: list[Row] = report.read_rows(earlier, self.done) if ledger else []
        if self.done >= config.num_server_rounds:
            raise ConfigError(
                f"'num-server-rounds' must be more than the {self.done} rounds of the ledger "
                f"'{resume}', got {config.num_server_rounds}"
            )
        needed = other or config.evaluate.every
        self.worker = _worker(config, other.adapter if other else "") if needed else None
        self.method: Method | None = None  # unless it is Ferret
        if config.privacy.mechanism != "none":
            accounting.check_library()
        self.folder = _new_folder(Path(config.results_dir).expanduser())
        self.strategy = self._comparison(other) if other else self._ferret(ledger)
        self.spent = self._spent_before()  # of privacy, by the rounds of the ledger
        report.write_config(self.folder, config)
        self.tracking = Tracking(trackers, self.folder, flatten(config))
        for row in self.rows:
            self.tracking.log(row)
        log.info("results go to %s", self.folder)

    def components(self) -> ServerAppComponents:
        """Return what Flower runs."""
        recorded = Recorded(self.strategy, self._on_row, first_round=self.done)
        manager = SeededClientManager(self.config.seed)
        if self.config.privacy.secure_aggregation:
            from ferret_flwr.flower.secure import SecureServer

            threshold = self.config.privacy.secure_threshold
            server: Server = SecureServer(manager, recorded, self._on_end, self.tracking, threshold)
        else:
            server = RecordingServer(manager, recorded, self._on_end, self.tracking)
        return ServerAppComponents(
            server=server,
            config=ServerConfig(
                num_rounds=self.config.num_server_rounds - self.done,
                round_timeout=self.config.strategy.round_timeout or None,
            ),
        )

    def _ferret(self, ledger: Ledger | None) -> Ferret:
        replica: Replica | None = None
        if self.worker is not None:
            from ferret_flwr.training.worker import live_replica

            replica = live_replica(self.worker)
        return Ferret(
            build_inner(self.config.strategy, self.config.privacy, _sampling(self.config)),
            self.config.ferret,
            seed=self.config.seed,
            num_rounds=self.config.num_server_rounds,
            replica=replica,
            evaluate=self._evaluate_replica if replica is not None else None,
            ledger=ledger,
            ledger_path=self.folder / "ledger.safetensors",
            round_timeout=self.config.strategy.round_timeout or None,
            secure=self.config.privacy.secure_aggregation,
        )

    def _comparison(self, kind: type[Method]) -> FedAvg:
        from ferret_flwr.flower.comparison import MethodStrategy

        assert self.worker is not None
        method = self.method = kind(self.config, self.worker)

        def evaluate(round: int) -> tuple[float, dict[str, Scalar]] | None:
            if not self._is_due(round):
                return None
            method.load(method.state())
            return self._evaluate()

        return MethodStrategy(method, evaluate, **_sampling(self.config))

    def _evaluate_replica(
        self, server_round: int, replica: Replica
    ) -> tuple[float, dict[str, Scalar]] | None:
        round = self.done + server_round
        if not self._is_due(round):
            return None
        assert self.worker is not None
        from ferret_flwr.training.tensors import load_masters

        load_masters(self.worker.parameters, replica.arrays)
        return self._evaluate()

    def _evaluate(self) -> tuple[float, dict[str, Scalar]]:
        """Evaluate the server's model."""
        assert self.worker is not None
        from ferret_flwr.training.worker import score

        held_out = self.worker.split(self.config.dataset, self.config.seed).test
        metrics = score(self.worker.lm, held_out, self.config)
        loss = metrics.pop("loss")
        return loss, {f"eval/{name}": value for name, value in metrics.items()}

    def _is_due(self, round: int) -> bool:
        """Tell whether to evaluate: every few rounds and after the last."""
        every = self.config.evaluate.every
        return bool(every) and (round == self.config.num_server_rounds or not round % every)

    def _fedavg_nbytes(self) -> int:
        ledger = getattr(self.strategy, "ledger", None)
        if ledger is not None:
            return weights_nbytes(ledger.header.size, ledger.header.dtype)
        if self.worker is not None:
            return weights_nbytes(self.worker.model_size, self.config.model.dtype)
        return max((row.get("comm/uplink_bytes_per_node", 0) for row in self.rows), default=0)

    def _on_row(self, row: Row) -> None:
        if not self.rows or row["round"] > self.rows[-1]["round"]:  # else a resumed run's first
            self.rows.append(row | self._told(row["round"]))
            row = self.rows[-1]
            self.tracking.log(row)
        log.info(report.line(row, self._fedavg_nbytes()))
        try:
            report.write_results(self.folder, self.config, self.rows, self._fedavg_nbytes())
        except OSError as error:
            log.error("cannot write the results: %s", error)

    def _price(self) -> float:
        """Return what a round costs of privacy, see `accounting`."""
        privacy = self.config.privacy
        if privacy.mechanism == "local":  # two vectors of length C are at most 2C apart
            return 4 / privacy.noise_multiplier**2
        wrapper = getattr(self.strategy, "wrapper", None)
        return price(wrapper) if wrapper else math.inf

    def _spent_before(self) -> float:
        """Return what the rounds of the resumed ledger have spent, or raise `ConfigError`."""
        if self.config.privacy.mechanism == "none" or not self.done:
            return 0.0
        last = self.rows[-1] if self.rows else {}
        if "privacy/spent" not in last:
            raise ConfigError(
                f"'privacy.mechanism' = '{self.config.privacy.mechanism}' cannot continue "
                f"'{self.config.ferret.resume}': no results.json beside it says what its rounds "
                "have told about the nodes"
            )
        unsaid = self.done - last["round"]  # of a server that was killed before it said so
        return last["privacy/spent"] + unsaid * self._price()

    def _told(self, round: int) -> Row:
        """Return what has been told about a node up to ``round``, as (ε, δ)."""
        privacy = self.config.privacy
        if privacy.mechanism == "none":
            return {}
        if privacy.mechanism == "local":
            spent = self.spent + (round - self.done) * self._price()
        else:
            assert isinstance(self.strategy, Ferret)
            spent = self.spent + self.strategy.spent
        return {
            "privacy/spent": spent,
            "privacy/epsilon": accounting.epsilon(spent, privacy.delta),
            "privacy/epsilon_round": accounting.epsilon(self._price(), privacy.delta),
            "privacy/delta": privacy.delta,
        }

    def _on_end(self) -> None:
        """Leave the model and the plot."""
        if "privacy/epsilon" in self.rows[-1]:
            log.info(
                "this run is (%.4g, %g)-differentially private (%s), see docs/privacy.md",
                self.rows[-1]["privacy/epsilon"],
                self.rows[-1]["privacy/delta"],
                self.config.privacy.mechanism,
            )
        if isinstance(self.strategy, Ferret) and not self.strategy.ledger:
            raise RuntimeError("no round was published: see the messages of the nodes above")
        if self.method is not None:
            self.method.load(self.method.state())
        if self.worker is not None:
            from ferret_flwr.training.saving import save_model

            save_model(self.worker.lm, self.folder / "final")
            log.info("the tuned model is in %s", self.folder / "final")
        elif isinstance(self.strategy, Ferret):
            log.info(
                "the server held no model; for a Hugging Face folder: ferret-flwr ledger apply "
                "%s --base %s --output FOLDER",
                self.folder / "ledger.safetensors",
                self.config.model.name,
            )
        try:
            report.plot_runs({self.config.method: self.rows}, self.folder / "loss.png")
        except (ImportError, OSError) as error:
            log.warning("no plot is drawn: %s", error)


def _other_method(name: str) -> type[Method]:
    from ferret_flwr.methods.registry import METHODS

    return METHODS[name]


def _worker(config: Config, adapter: str) -> Worker:
    """Load the server's model and check everything that would otherwise fail in a round."""
    from ferret_flwr.training.optimizers import check_optimizer
    from ferret_flwr.training.worker import Worker

    check_optimizer(config.train)
    worker = Worker(config.model, adapter, config.adapter)
    if config.evaluate.every:  # else the data may lie on the nodes alone
        split = worker.split(config.dataset, config.seed)
        log.info(
            "%d examples to divide among the nodes, %d held out", len(split.train), len(split.test)
        )
    return worker


def _sampling(config: Config) -> dict[str, Any]:
    return {
        "fraction_fit": config.strategy.fraction_train,
        "fraction_evaluate": config.strategy.fraction_evaluate,
        "min_fit_clients": config.strategy.min_train_nodes,
        "min_evaluate_clients": 1 if config.strategy.fraction_evaluate else 0,
        "min_available_clients": config.strategy.min_available_nodes,
        "fit_metrics_aggregation_fn": _no_metrics,
        "evaluate_metrics_aggregation_fn": _no_metrics,
    }


def _no_metrics(metrics: list[tuple[int, Metrics]]) -> Metrics:
    """Keep Flower from warning: `Recorded` averages the metrics."""
    return {}


def _new_folder(parent: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, copies = parent / stamp, 1
    while folder.exists():
        folder, copies = parent / f"{stamp}-{copies}", copies + 1
    folder.mkdir(parents=True)
    return folder.resolve()


def server_components(run_config: Mapping[str, Any]) -> ServerAppComponents:
    """Return the server of a run, see `Run`."""
    report.show_progress()
    return Run(parse(run_config)).components()
