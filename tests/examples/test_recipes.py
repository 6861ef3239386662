"""The paper's recipes start: their keys are valid, and their data are read and divided."""

import json
import tomllib
from pathlib import Path

import pytest
from flwr.common.config import flatten_dict

from examples.paper import prepare
from ferret_flwr.config import parse
from ferret_flwr.training.worker import Node, Worker, score

FOLDER = Path(prepare.__file__).parent
RECIPES = sorted(FOLDER.glob("*.toml"))
FEW = {  # a tiny model and short sequences in the model's place
    "model.name": "builtin:tiny",
    "model.dtype": "float32",
    "train.seq-length": 256,
    "train.steps": 2,
    "train.gradient-accumulation": 1,
    "evaluate.max-examples": 2,
    "evaluate.generate-examples": 1,
    "evaluate.max-new-tokens": 2,
}
CLIENTS = 9


def natural_instructions(folder: Path) -> list[str]:
    checkout = folder / "natural-instructions"
    (checkout / "splits" / "default").mkdir(parents=True)
    (checkout / "tasks").mkdir()
    names = [f"task{i:03}_numbers" for i in range(CLIENTS + 1)]
    for i, name in enumerate(names):
        instances = [{"id": f"{i}-{j}", "input": f"{j}", "output": [f"{i + j}"]} for j in range(4)]
        task = {"Definition": [f"Add {i}."], "Categories": ["Sums"], "Instances": instances}
        (checkout / "tasks" / f"{name}.json").write_text(json.dumps(task))
    (checkout / "splits" / "default" / "train_tasks.txt").write_text("\n".join(names[:-1]) + "\n")
    (checkout / "splits" / "default" / "test_tasks.txt").write_text(names[-1] + "\n")
    return ["natural-instructions", str(checkout)]


def dolly(folder: Path) -> list[str]:
    rows = [
        {"instruction": f"Say {i}.", "context": "", "response": f"{i}", "category": category}
        for i in range(60)
        for category in ("brainstorming", "open_qa", "summarization")
    ]
    path = folder / "databricks-dolly-15k.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return ["dolly", str(path)]


def code_alpaca(folder: Path) -> list[str]:
    rows = [
        {"instruction": f"Write {i} in {language}.", "input": "", "output": f"print({i})"}
        for i in range(5)
        for language in (*prepare.LANGUAGES, "English")
    ]
    path = folder / "code_alpaca_20k.json"
    path.write_text(json.dumps(rows))
    return ["code-alpaca", str(path)]


PUBLISHED = {"ni": natural_instructions, "dolly": dolly, "code-alpaca": code_alpaca}


def settings_of(recipe: Path, folder: Path) -> dict[str, object]:
    """Return a recipe's, with data as they are published below ``folder`` and `FEW`."""
    settings = flatten_dict(tomllib.loads(recipe.read_text()))
    kind = next((kind for kind in PUBLISHED if recipe.stem.startswith(kind)), "")
    if kind:
        prepare.main([*PUBLISHED[kind](folder), "--data", str(folder / "data")])
        for key in ("dataset.name", "dataset.test-name"):
            if key in settings:
                settings[key] = str(folder / settings[key])
    else:
        assert settings["dataset.name"] == settings["dataset.test-name"] == "openai/gsm8k"
        rows = [{"question": f"{i} + {i}?", "answer": f"It is #### {2 * i}"} for i in range(40)]
        path = folder / "gsm8k.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        settings |= {"dataset.name": str(path), "dataset.test-name": str(path)}
    return settings | FEW


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_starts(recipe: Path, tmp_path: Path) -> None:
    config = parse(settings_of(recipe, tmp_path))
    clients = min(config.strategy.min_available_nodes, CLIENTS)
    node = Node.of(config, clients - 1, clients)
    result = node.train(1)
    assert result.steps == 2
    assert not node.held_out
    server = Worker(config.model)
    metrics = score(server.lm, server.split(config.dataset, config.seed).test, config)
    assert metrics["loss"] > 0
    assert "rougeL" in metrics


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_what_is_published_is_what_is_measured(recipe: Path) -> None:
    config = parse(flatten_dict(tomllib.loads(recipe.read_text())))
    assert config.evaluate.every == config.num_server_rounds  # once, at the end
    assert config.evaluate.generate_examples == config.evaluate.max_examples >= 1319
    assert config.train.steps == 10 and config.train.gradient_accumulation == 4


def test_each_published_row_has_its_recipe() -> None:
    small = [
        f"{data}-{model}" for data in ("ni", "dolly") for model in ("datajuicer-1.3b", "llama-3b")
    ]
    large = [
        f"{data}-{model}"
        for data in ("code-alpaca", "gsm8k")
        for model in ("llama2-7b", "llama2-13b", "llama3-8b", "qwen2.5-7b")
    ]
    assert [recipe.stem for recipe in RECIPES] == sorted(small + large)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_commands_name_the_file_and_its_nodes(recipe: Path) -> None:
    text = recipe.read_text()
    nodes = tomllib.loads(text)["strategy"]["min-available-nodes"]
    assert f"--run-config examples/paper/{recipe.name} " in text
    assert f"num-supernodes={nodes} " in text


@pytest.mark.parametrize(
    ("instruction", "language"),
    [
        ("Sort a list in C++ or C.", "C++"),
        ("Rewrite this C program in Java.", "C"),
        ("Use C#, please.", "C#"),
        ("JavaScript, not Java", "Java"),
        ("Going to Scalable Pythons", ""),
    ],
)
def test_language_is_a_whole_word(instruction: str, language: str) -> None:
    assert prepare.language_of({"instruction": instruction}) == language


def test_gsm8k_is_named_by_the_lines_before_the_answer(tmp_path: Path) -> None:
    answers = ["2\n3\n#### 5", "1\n#### 1", "1\n1\n1\n#### 3", "1\n1\n1\n1\n#### 4"]
    rows = [{"question": "?", "answer": answer} for answer in answers]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prepare.main(["gsm8k", str(tmp_path / "train.jsonl"), "--data", str(tmp_path)])
    lines = (tmp_path / "gsm8k-by-length.jsonl").read_text().splitlines()
    named = [json.loads(line) for line in lines]
    assert [row.pop("category") for row in named] == ["short", "short", "medium", "long"]
    assert named == rows


@pytest.mark.parametrize(
    ("source", "name", "text"),
    [
        ("code-alpaca", "rows.json", '[{"question": "?"}]'),
        ("gsm8k", "rows.jsonl", '[{"question": "?", "answer": "#### 1"}]'),
        ("gsm8k", "rows.jsonl", '{"instruction": "?"}'),
    ],
)
def test_data_of_another_layout_are_refused(
    source: str, name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit):
        prepare.main([source, str(tmp_path / name), "--data", str(tmp_path)])
    assert f"{name} is not what {source} is published as" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
