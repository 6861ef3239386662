"""What a run's figures depend on besides its configuration and the machine: data, base, code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import ferret_flwr
from ferret_flwr.config import DatasetConfig, ModelConfig
from ferret_flwr.training.sources import read_source
from ferret_flwr.training.worker import Worker

PACKAGE = Path(ferret_flwr.__file__).parent


@lru_cache
def data_hashes(config: DatasetConfig, seed: int) -> dict[str, str]:
    """Return the SHA-256 of each data set by its name and split.

    It is that of the file, as ``sha256sum`` prints it; of a built-in, a folder, or a Hub id it is
    that of the rows, one JSON object a line.

    Raises
    ------
    DataError
        If one cannot be read.
    """
    sources = [(config.name, config.revision, config.split)]
    if config.test_name:  # the revision is that of `name`, as in `load_examples`
        revision = config.revision if config.test_name == config.name else ""
        sources.append((config.test_name, revision, config.test_split))
    found = {}
    for name, revision, split in sources:
        rows = read_source(name, config.subset, revision, split, seed)
        path = Path(name).expanduser()
        if path.is_file():
            with path.open("rb") as file:
                found[f"{name} {split}"] = hashlib.file_digest(file, "sha256").hexdigest()
            continue
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(dict(row.values), default=str).encode() + b"\n")
        found[f"{name} {split}"] = digest.hexdigest()
    return found


@lru_cache
def base_fingerprint(config: ModelConfig) -> str:
    """Return the fingerprint of the base model, which is loaded for it and forgotten.

    On the CPU: the runs have processes of their own, and need the GPU's memory.

    Raises
    ------
    ModelError
        If it cannot be loaded.
    """
    return Worker(replace(config, device="cpu")).follower.from_base().header.base


def code_hash(package: Path = PACKAGE) -> str:
    """Return the SHA-256 over a package's sources, names included.

    It is read anew each time: a run's process imports what lies there when it starts.
    """
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py")):
        source = (package / name).read_bytes()
        digest.update(f"{name}\0{len(source)}\0".encode() + source)
    return digest.hexdigest()
