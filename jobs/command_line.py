"""The command line of every job: help in portions, unknown options with the ones that were meant, and a reader that leaves early.

`--help` shows the options that people use first, `--help-SECTION` those of a stage or another group, `--help-all` every one.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from wmdd_ray.errors import ConfigError
from wmdd_ray.spine.provenance import as_typed

T = TypeVar("T")
# Above it tyro puts boxes side by side.
_MOST_COLUMNS = 100


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """End the process with the exit code of `main`; quietly where whoever reads its output (`| head`) has left."""
    try:
        try:
            code: Any = main(sys.argv[1:])
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return whether a command line is a question about the options."""
    return any(word in ("-h", "--help") or word.startswith("--help-") for word in arguments)


def typed(arguments: Sequence[str], *options: str) -> dict[str, str]:
    """Return what a command line gives some options, "" for nothing: the defaults of all others may depend on these."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in options:
        parser.add_argument(f"--{option}", f"--{option.replace('-', '_')}", dest=option, default="")
    return vars(parser.parse_known_args(arguments)[0])


def parse(
    job_type: type[T],
    arguments: Sequence[str],
    *,
    description: str | None,
    default: T | None = None,
    first: str = "",
) -> T:
    """Return the job of a command line, or show what it asks about.

    Args:
        job_type: Dataclass of the options.
        arguments: Command line.
        description: What the job does, for `--help`.
        default: Job whose values are the defaults; absent, those of `job_type`.
        first: Names of the options that `--help` shows, with spaces between them; all where there are none.

    Raises:
        ConfigError: There is no such option, or no such section of them.
        SystemExit: Help was shown, or a value does not parse, which is then told.
    """
    import tyro  # here: the benchmark of a GPU runs where it is not installed

    keywords: dict[str, Any] = {"description": description and as_typed(description)}
    if default is not None:
        keywords["default"] = default
    for word in filter(lambda word: asks_for_help([word]), arguments):
        print(_portion(_help(job_type, keywords), word, {f"--{name}" for name in first.split()}))
        raise SystemExit(0)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return tyro.cli(job_type, args=arguments, **keywords)
    except SystemExit as ended:
        if ended.code:
            _refuse_unknown(arguments, _help(job_type, keywords))
        sys.stderr.write(said.getvalue())
        raise


def _help(job_type: type, keywords: dict[str, Any]) -> str:
    """Return the help text with all options."""
    import tyro

    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, _MOST_COLUMNS))
    try:
        # Later tyros draw boxes only for an output that says it can show them.
        text = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            tyro.cli(job_type, args=["--help"], **keywords)
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    text.seek(0)
    return text.read().rstrip()


def _portion(text: str, word: str, first: set[str]) -> str:
    """Return the part of a help text that `word` asks for. A section's box begins with `╭─ NAME options ─`."""
    if word == "--help-all" or (not first and word in ("-h", "--help")):
        return text
    head, *boxes = re.split(r"^(?=╭─)", text, flags=re.MULTILINE)
    sections: dict[str, str] = {}
    for box in boxes:
        name = re.findall(r"[\w-]+", box)[0]
        sections[name] = sections.get(name, "") + box
    usual = sections.pop("positional", "") + _only(sections.pop("options"), first)
    if word.removeprefix("--help-") in sections:
        return sections[word.removeprefix("--help-")].rstrip()
    more = " ".join(f"--help-{name}" for name in [*sections, "all"])
    if word not in ("-h", "--help"):
        raise ConfigError(f"{word}: expected --help or one of {more}")
    return f"{head}{usual}More options: {more}"


def _only(box: str, names: set[str]) -> str:
    """Return a box with the options of these names alone."""
    lines, shown = [], True
    for line in box.splitlines(keepends=True):
        if line.startswith(("│ -", "╰")):
            shown = line.startswith("╰") or bool(names & {*re.findall(r"--[\w.-]+", line)})
        lines += [line] if shown else []
    return "".join(lines)


def _refuse_unknown(arguments: Sequence[str], text: str) -> None:
    """Raise a ConfigError with the options that were likely meant, if one is not in the help text."""
    invocations = re.findall(r"^│ (-.*)", text, flags=re.MULTILINE)
    names = dict.fromkeys(re.findall(r"--[a-z][\w.-]*", " ".join(invocations)))
    for word in arguments:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in names:
            likeness = {known: _likeness(name, known) for known in names}
            best = sorted(names, key=lambda known: -likeness[known])
            likely = [known for known in best[:3] if likeness[known] > likeness[best[0]] - 0.1]
            raise ConfigError(
                f"{name}: there is no such option; did you mean {' or '.join(likely)}? --help-all shows every option"
            )


def _likeness(typed: str, known: str) -> float:
    """Return how much an option is like what was typed, [0, 1]; its section may have been left out."""
    last = "--" + known.rpartition(".")[2].removeprefix("--")
    whole, end = (difflib.SequenceMatcher(None, typed, name).ratio() for name in (known, last))
    return max(whole, 0.95 * end)
