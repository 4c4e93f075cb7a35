"""The command line, the same for recipes and tools: one flag a setting, and errors in one line."""

import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import TypeVar

import tyro

from run_files import UserError

Settings = TypeVar("Settings")


def parse(config: type[Settings], description: str | None = None, args: Sequence[str] | None = None) -> Settings:
    """Settings, a dataclass whose field docstrings are the help, from a command line.

    Raises:
        UserError: what tyro says is wrong, in one line.
    """
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
