"""The commands of jobs/COOKBOOK.md, typed from top to bottom, print what the page shows."""

from __future__ import annotations

import os
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs import compare, distill, doctor, evaluate, export, prepare, report
from tests.conftest import ROOT, S3Uri

COOKBOOK = ROOT / "jobs" / "COOKBOOK.md"
FASHION = "/usr/share/datasets/fashion-mnist"
JOBS: dict[str, Callable[[list[str]], int]] = {
    "compare": compare.main,
    "distill": distill.main,
    "doctor": doctor.main,
    "evaluate": evaluate.main,
    "export": export.main,
    "prepare": prepare.main,
    "report": report.main,
}
_FENCE = re.compile(r"(?:<!-- (?P<mark>.*?) -->\n)?```(?P<kind>bash|text)\n(?P<body>.*?)```", re.S)
_HERE_DOCUMENT = re.compile(r"python - <<'EOF'\n(.*?)\nEOF\n", re.S)


@dataclass
class Block:
    """Commands of the page, the lines that it shows of their output, and the mark of one that is not run here."""

    task: str
    commands: str
    mark: str = ""
    shown: str = ""


def blocks(page: str) -> list[Block]:
    found: list[Block] = []
    for fence in _FENCE.finditer(page):
        if fence["kind"] == "text":
            assert found and not found[-1].shown, "an output follows its commands"
            found[-1].shown = fence["body"]
        else:
            tasks = re.findall(r"^## (.*)$", page[: fence.start()], re.M)
            found.append(Block(tasks[-1] if tasks else "", fence["body"], fence["mark"] or ""))
    return found


def missing_lines(shown: str, said: str) -> list[str]:
    """Return the shown lines that were not said in this order, whatever their numbers and spaces."""
    lines = iter([loose(line) for line in said.splitlines()])
    wanted = [line for line in shown.splitlines() if line.strip() not in ("", "...")]
    patterns = [re.escape(loose(line)).replace(re.escape("..."), ".*") for line in wanted]
    return [
        line
        for line, pattern in zip(wanted, patterns, strict=True)
        if not any(re.fullmatch(pattern, found) for found in lines)
    ]


def loose(line: str) -> str:
    """Return a line without its numbers but counts such as 3/4, and without what a slow unit adds to a line of progress."""
    line = re.sub(r"\bdone in .*", "done", line)
    line = re.sub(r"\d+ min \d+ s", "0 s", line)
    line = re.sub(r"\d+(\.\d+)? (B|KB|MB|GB|TB|ms|s|min)\b", "0", line)
    words = line.split()
    counts = [re.fullmatch(r"\d+/\d+", word) for word in words]
    return " ".join(
        word if count else re.sub(r"\d+(\.\d+)?", "0", word)
        for word, count in zip(words, counts, strict=True)
    )


class Shell:
    """Types commands: those of this project in this process, which costs no import of torch each, others in bash."""

    def __init__(self, bucket: str, terminal: pytest.CaptureFixture[str]) -> None:
        self.bucket = bucket
        self._terminal = terminal
        self._variables: dict[str, str] = {}

    def type(self, commands: str) -> str:
        """Type commands and return what they said, one after the other."""
        commands = commands.replace("my-bucket", self.bucket)
        if code := _HERE_DOCUMENT.fullmatch(commands):
            exec(compile(code[1], "<cookbook>", "exec"), {})
        elif "&" in commands.split():
            commands = commands.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
            variables = {**os.environ, **self._variables}
            subprocess.run(["bash", "-c", commands], env=variables, check=True, timeout=400)
        else:
            lines = commands.replace("\\\n", " ").splitlines()
            return "".join(self._line(line) for line in lines)
        return self._heard()

    def _heard(self) -> str:
        captured = self._terminal.readouterr()
        return captured.err + captured.out

    def _line(self, line: str) -> str:
        if line.startswith("export "):
            # Those of the tests are in the environment already.
            assert all(word.partition("=")[0] in os.environ for word in line.split()[1:])
            return ""
        if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', line):
            self._variables[assigned[1]] = assigned[2]
            return ""
        words = shlex.split(string.Template(line).substitute(self._variables))
        if words[0] == "python":
            job = re.fullmatch(r"jobs/(\w+)\.py", words[1])
            assert job, line
            assert JOBS[job[1]](words[2:]) == 0, line
        else:
            subprocess.run(words, check=True, timeout=300)
        return self._heard()


@pytest.fixture
def shell(
    tmp_path: Path,
    s3_server: S3Uri,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Shell:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    return Shell(bucket=s3_server().removeprefix("s3://").partition("/")[0], terminal=capsys)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_cookbook_s_commands_print_what_it_shows(shell: Shell) -> None:
    for block in blocks(COOKBOOK.read_text(encoding="utf-8")):
        if block.mark or (FASHION in block.commands and not Path(FASHION).exists()):
            continue
        said = shell.type(block.commands)
        shown = block.shown.replace("my-bucket", shell.bucket)
        absent = missing_lines(shown, said)
        assert not absent, f"{block.task}: {absent} is not in\n{said}"


def test_only_what_cannot_run_here_is_left_out() -> None:
    found = blocks(COOKBOOK.read_text(encoding="utf-8"))
    assert len({block.task for block in found if not block.mark}) >= 10
    marks = [block.mark for block in found if block.mark]
    assert len(marks) <= 2
    for mark in marks:
        assert mark.startswith("not run: ") or (ROOT / mark.removeprefix("run by ")).is_file()


def test_a_line_that_was_not_printed_is_missed() -> None:
    said = "teacher  1/1 done in 3.2 s\nsize     20 images\n"
    assert missing_lines("teacher 1/1 done in 7 s\n...\nsize 100 images\n", said) == []
    assert missing_lines("size 100 images\nteacher 1/1 done\n", said) == ["teacher 1/1 done"]
    assert missing_lines("teacher 2/2 done in 7 s\n", said) == ["teacher 2/2 done in 7 s"]
    assert missing_lines("size 100 pictures\n", said) == ["size 100 pictures"]
    assert missing_lines("... 1 image\n", said) == ["... 1 image"]
    assert missing_lines("teacher ... done in 3 min\n... images", said) == []
