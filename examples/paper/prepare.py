"""Bring published data into the files that recipes and plans read.

    python examples/paper/prepare.py natural-instructions CHECKOUT_OF_allenai/natural-instructions
    python examples/paper/prepare.py dolly databricks-dolly-15k.jsonl
    python examples/paper/prepare.py code-alpaca code_alpaca_20k.json
    python examples/paper/prepare.py gsm8k train.jsonl

The recipes read GSM8K from the Hub as it is; the last line makes data/gsm8k-by-length.jsonl, for
benchmarks/plans/gsm8k-smollm2-non-iid.toml.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ferret_flwr.files import write_atomic

LANGUAGES = ("C#", "C++", "C", "Go", "Java", "PHP", "Pascal", "Python", "Scala")


def natural_instructions(source: Path, data: Path) -> str:
    """Copy the English default split, one file a task: 738 or so to train, 119 to test."""
    counts = []
    for split, target in (("train_tasks.txt", "train"), ("test_tasks.txt", "test")):
        folder = data / "natural-instructions" / target
        folder.mkdir(parents=True, exist_ok=True)
        names = (source / "splits" / "default" / split).read_text().split()
        for name in names:
            shutil.copy(source / "tasks" / f"{name}.json", folder)
        counts.append(f"{len(names)} tasks in {folder}")
    return ", ".join(counts)


def dolly(source: Path, data: Path) -> str:
    """Hold out the last of the categories in alphabetical order."""
    rows = _read_lines(source)
    last = max(row["category"] for row in rows)
    folder = data / "dolly"
    _write(folder / "train.jsonl", (row for row in rows if row["category"] != last))
    _write(folder / "test.jsonl", (row for row in rows if row["category"] == last))
    return f"{folder}: '{last}' is held out"


def code_alpaca(source: Path, data: Path) -> str:
    """Name the language of each example that names one; the paper does not say how it did."""
    rows = json.loads(source.read_text(encoding="utf-8"))
    named = [row | {"category": language} for row in rows if (language := language_of(row))]
    return _write_named(data / "code-alpaca.jsonl", named)


def gsm8k(source: Path, data: Path) -> str:
    """Name each solution short, medium or long."""
    named = [row | {"category": length_of(row)} for row in _read_lines(source)]
    return _write_named(data / "gsm8k-by-length.jsonl", named)


def language_of(row: Mapping[str, str]) -> str:
    """Return the one of `LANGUAGES` that instruction or input name first, "" if none."""
    text = f"{row['instruction']} {row.get('input', '')}"
    places = {
        found.start(): language
        for language in LANGUAGES
        if (found := re.search(rf"(?<!\w){re.escape(language)}(?![\w+#])", text))
    }
    return places[min(places)] if places else ""


def length_of(row: Mapping[str, str]) -> str:
    """Return whether a solution has at most 2 steps, 3, or more; each line but the last is one."""
    steps = len(row["answer"].splitlines()) - 1
    return "short" if steps <= 2 else "medium" if steps == 3 else "long"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_named(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    _write(path, rows)
    counts = Counter(row["category"] for row in rows)
    return f"{path}: " + ", ".join(f"{count} {name}" for name, count in counts.items())


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


SOURCES = {
    "natural-instructions": natural_instructions,
    "dolly": dolly,
    "code-alpaca": code_alpaca,
    "gsm8k": gsm8k,
}


def main(words: list[str]) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("path", type=Path, help="where the original lies")
    parser.add_argument("--data", type=Path, default=Path("data"), help="default %(default)s")
    options = parser.parse_args(words)
    try:
        print(SOURCES[options.source](options.path, options.data))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        parser.error(f"{options.path} is not what {options.source} is published as: {error!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
