"""The README does what it says: its blocks run as they stand, and it names every command and every file."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import embedkit.encoder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's Python has run."""
    folder = tmp_path_factory.mktemp("readme")
    script = "import torch\ntorch.set_num_threads(1)\n" + "\n".join(blocks("python"))
    script += "\nprint(type(tables).__name__, tables.transform(test).shape)\n"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("EmbeddingSet (2000, ")
    return folder


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith("embedkit ")]


def test_readme_commands_run_in_order(folder: Path) -> None:
    assert len(commands()) >= 6
    for line in commands():
        run = subprocess.run(
            [sys.executable, "-m", *shlex.split(line)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, f"{line}\n{run.stderr}"
    for made in ("lr.png", "tables", "features"):
        assert (folder / made).exists(), made


def test_every_module_is_in_the_picture_of_the_house() -> None:
    house = next(block for block in README.split("```")[1::2] if "serving/" in block)
    modules = {path.stem for path in (ROOT / "embedkit").iterdir() if not path.name.startswith("_")}
    modules = {name for name in modules if not name.endswith("egg-info")}
    lists = [re.split(r" {3,}", line.strip())[0] for line in house.splitlines() if line.startswith("  ")]
    assert {name.strip("/") for names in lists for name in names.split()} == modules


def test_public_names_resolve() -> None:
    for name in embedkit.__all__:
        assert getattr(embedkit, name) is not None


def test_docstring_examples_run() -> None:
    results = doctest.testmod(embedkit.encoder)
    assert results.attempted >= 8
    assert results.failed == 0
