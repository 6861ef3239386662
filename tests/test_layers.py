"""Layers: what may be imported where, and what the package never uses."""

import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import ferret_flwr

PACKAGE = Path(ferret_flwr.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
FOR_GPUS = set(PACKAGE.glob("projection/kernels/cuda*.py"))  # imported when a tensor asks for them
FLOWER, PROJECTION = PACKAGE / "flower", PACKAGE / "projection"

SCRIPT = """
import importlib, sys
blocked, modules = (argument.split(",") for argument in sys.argv[1:])
sys.modules.update(dict.fromkeys(blocked))  # importing None raises ImportError
for module in modules:
    importlib.import_module(module)
"""


def _module(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _import_without(blocked, modules):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(blocked), ",".join(modules)],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_only_flower_imports_flwr():
    assert len(FOR_GPUS) == 2
    modules = [_module(path) for path in SOURCES if FLOWER not in path.parents]
    modules = [module for module in modules if module not in map(_module, FOR_GPUS)]
    result = _import_without(["flwr", "ray", "triton"], modules)
    assert result.returncode == 0, result.stderr


def test_projection_needs_neither_torch_nor_transformers():
    modules = [_module(path) for path in SOURCES if PROJECTION in path.parents]
    modules = [module for module in modules if module not in map(_module, FOR_GPUS)]
    assert "ferret_flwr.projection.kernels.cpu" in modules
    result = _import_without(["flwr", "ray", "triton", "torch", "transformers"], modules)
    assert result.returncode == 0, result.stderr


def test_blocking_blocks():
    result = _import_without(["numpy"], ["ferret_flwr.projection.projection"])
    assert result.returncode != 0
    assert "numpy" in result.stderr


def _names(path):
    """Return every identifier in a source file; prose in comments and strings may say anything."""
    with tokenize.open(path) as file:
        tokens = tokenize.generate_tokens(file.readline)
        return {token.string for token in tokens if token.type == tokenize.NAME}


@pytest.mark.parametrize("name", ["manual_seed", "pickle"])
def test_the_package_never_uses(name):
    users = [_module(path) for path in SOURCES if any(name in word for word in _names(path))]
    assert not users


def test_a_use_would_be_seen(tmp_path):
    source = tmp_path / "user.py"
    source.write_text("import pickle\n# no manual_seed here\n")
    assert "pickle" in _names(source)
    assert "manual_seed" not in _names(source)
