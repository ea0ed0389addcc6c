"""The documentation: its examples run, its options and links exist, and its site builds."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from afpq.cli import afpq

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
# A fence with its language and its text; `sh`, `cpp` and `text` are not run.
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
RUNS = {"bash", "python"}


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(language, text) for language, text in BLOCK.findall(page.read_text())]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a copy of the shipped models, as a reader of the pages has it."""
    shutil.copytree(ROOT / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: list[str], folder: Path) -> None:
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment
    )
    assert result.returncode == 0, f"{command[-1]}\n{result.stdout}{result.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if RUNS & dict(blocks(p)).keys()], ids=name)
def test_the_blocks_of_a_page_run_in_their_order(page: Path, workplace: Path) -> None:
    if shutil.which("afpq", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs the installed command")
    for language, block in blocks(page):
        if "import torch" in block and find_spec("onnxscript") is None:
            continue  # the extra `torch` is not installed
        if language == "bash":
            run(["bash", "-euc", block], workplace)
        elif language == "python":
            run([sys.executable, "-W", "error", "-c", block], workplace)


def test_readme_shows_commands_and_python() -> None:
    assert {"bash", "python"} <= dict(blocks(ROOT / "README.md")).keys()


COMMANDS = afpq.commands


def section(command: str) -> str:
    """What docs/cli.md says under the heading of a command, to the next one."""
    text = (ROOT / "docs/cli.md").read_text()
    found = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found is not None, f"docs/cli.md has no section of {command}"
    return found[1]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_of_a_command_is_named_and_no_other(command: str) -> None:
    options = {
        text
        for parameter in COMMANDS[command].params
        if isinstance(parameter, click.Option)
        for text in (*parameter.opts, *parameter.secondary_opts)
        if text.startswith("--")
    }
    rows = re.findall(r"^\| (`-.*?) \|", section(command), re.M)
    named = set(re.findall(r"--[a-z][a-z-]*", " ".join(rows)))
    assert named == options - {"--help"}


LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    targets = [t.partition("#")[0] for t in LINK.findall(page.read_text()) if "://" not in t]
    missing = [t for t in targets if t and not (page.parent / t).is_file()]
    assert not missing


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("needs mkdocs-material (the extra `docs`)")
    if not (ROOT / "mkdocs.yml").is_file():
        pytest.skip("needs the git checkout")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stderr
    built = {page.stem: page.read_text() for page in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in DOCS} <= built.keys()
    for page, text in built.items():
        loaded = re.findall(r"<(?:script|link|img)[^>]*?(?:src|href)=\"?(https?:[^\" >]+)", text)
        assert not loaded, f"{page} loads {loaded} from elsewhere"
