"""Every method but Ferret by the name that ``method`` has in a run configuration."""

from __future__ import annotations

from ferret_flwr.methods.fedavg import FedAvg
from ferret_flwr.methods.fedit import FedIT, FedITSGD
from ferret_flwr.methods.fedkseed import FedKSeed, FedKSeedPro
from ferret_flwr.methods.fedprompt import FedPrompt
from ferret_flwr.methods.fedptuning import FedPTuning
from ferret_flwr.methods.fedzo import FedZO
from ferret_flwr.methods.fetchsgd import FetchSGD
from ferret_flwr.methods.method import Method

METHODS: dict[str, type[Method]] = {
    "fedavg": FedAvg,
    "fedzo": FedZO,
    "fedkseed": FedKSeed,
    "fedkseed-pro": FedKSeedPro,
    "fedit": FedIT,
    "fedit-sgd": FedITSGD,
    "fedprompt": FedPrompt,
    "fedptuning": FedPTuning,
    "fetchsgd": FetchSGD,
}
