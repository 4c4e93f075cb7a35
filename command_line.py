"""The command line, the same for recipes and tools: one flag a setting, and errors in one line."""

import ast
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import TypeVar

import tyro

from run_files import UserError

Settings = TypeVar("Settings")


def parse(config: type[Settings], description: str | None = None, args: Sequence[str] | None = None) -> Settings:
    """Settings, a dataclass whose field docstrings are the help, from a command line.

    A W&B agent's way with words is understood too: `--seeds=[0, 1]` for a list, `--overwrite=True` for a flag.

    Raises:
        UserError: what tyro says is wrong, in one line.
    """
    args = [part for word in (sys.argv[1:] if args is None else args) for part in _words(word)]
    captured = StringIO()
    try:
        with redirect_stderr(captured):
            return tyro.cli(config, description=description, args=args, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = captured.getvalue().splitlines()[1:]  # in a box, below its title
        text = " ".join(line.strip("│ ") for line in lines)
        text = re.split("Got errors:|Argument helptext:|For full helptext", text)[0]
        text = re.sub(r"[─-]{9,} Perhaps you meant: (\S+).*", r"(did you mean \1?)", text)
        raise UserError(text.strip("─- ")) from None


def _words(word: str) -> list[str]:
    """A word of an agent's command line as the words that a person would type."""
    name, _, value = word.partition("=")
    if not name.startswith("--"):
        return [word]
    if value in ("True", "False"):
        return [name] if value == "True" else []
    if value.startswith("["):
        try:
            return [name, *map(str, ast.literal_eval(value))]
        except (ValueError, SyntaxError):
            return [word]
    return [word]
