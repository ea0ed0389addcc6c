"""What `--help` and completion say: examples that parse, 80 columns, scripts of every shell."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from afpq.cli import afpq, main

COMMANDS = sorted(afpq.commands)


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([command, "--help"]) == 0
    return capsys.readouterr().out


def examples(text: str) -> list[str]:
    block = text.partition("Examples:\n")[2].partition("\n\n")[0]
    lines = block.replace("\\\n", " ").splitlines()
    return [
        line.partition("|")[0].partition(" # ")[0].partition(" > ")[0].strip() for line in lines
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    assert max(map(len, text.splitlines())) <= 80
    found = [shlex.split(line) for line in examples(text) if "afpq" in line and "eval" not in line]
    assert found
    for words in found:
        arguments = words[words.index("afpq") + 1 :]
        assert arguments[0] == command
        # Parses without running: names, choices and ranges are checked.
        with afpq.commands[command].make_context(command, arguments[1:]):
            pass


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_AFPQ_COMPLETE" in script and "afpq" in script
    program = shutil.which(shell)
    if program is not None:
        assert subprocess.run([program, "-n"], input=script, text=True, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("afpq quan", "plain,quantize"),
        ("afpq quantize --max", "plain,--max-drop"),
        ("afpq quantize --mode b", "plain,best"),
        ("afpq inspect mod", "file,mod"),
    ],
)
def test_words_are_completed(words: str, expected: str) -> None:
    command = Path(sys.executable).with_name("afpq")
    if not command.exists():
        pytest.skip("needs the installed command")
    last = len(words.split()) - 1
    variables = {"COMP_WORDS": words, "COMP_CWORD": str(last), "_AFPQ_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [command], env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == [expected]
