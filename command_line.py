"""The command line, the same for recipes and tools: one flag a setting, errors in one line, and an orderly end when the
operating system asks for it."""

import ast
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import tyro

from run_files import PUBLISHED_CSV, UserError, first_line, flag

Settings = TypeVar("Settings")

# Signals that end a run, and its exit code: 128 + signal as shells have it, but for the warning a batch system sends
# before it takes the machine away (Slurm's --signal=USR1), which is "try again later" (EX_TEMPFAIL).
EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}


class Interrupted(BaseException):
    """A signal that ends the run. Like KeyboardInterrupt, it is no error that `except Exception` should see."""

    def __init__(self, name: str):
        super().__init__(name)
        self.exit_code = EXIT_CODES[name]


def parse(config: type[Settings], description: str | None = None, args: Sequence[str] | None = None) -> Settings:
    """Settings, a dataclass whose field docstrings are the help, from a command line.

    A W&B agent's way with words is understood too: `--milestones=[1, 2]` for a list, `--overwrite=True` for a switch.

    Raises:
        UserError: what tyro says is wrong, in one line.
    """
    defaults = {flag(field.name): field.default for field in dataclasses.fields(config)}
    args = [part for word in (sys.argv[1:] if args is None else args) for part in _words(word, defaults)]
    captured = StringIO()
    try:
        with redirect_stderr(captured):
            settings = tyro.cli(config, description=description, args=args, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = captured.getvalue().splitlines()[1:]  # in a box, below its title
        text = " ".join(line.strip("│ ") for line in lines)
        text = re.split("Got errors:|Argument helptext:|For full helptext", text)[0]
        text = re.sub(r"[─-]{9,} Perhaps you meant: (?:\S+, )*(\S+).*", r"(did you mean \1?)", text)
        raise UserError(text.strip("─- ")) from None
    paths = {name: value for name, value in vars(settings).items() if isinstance(value, Path)}
    home = {name: Path(os.path.expanduser(path)) for name, path in paths.items()}  # not done after a = by all shells
    return dataclasses.replace(settings, **home)


def _words(word: str, defaults: dict[str, Any]) -> list[str]:
    """A word of an agent's command line as a person would type it: a list as several words, a switch as its flag, or as
    nothing where it has its default."""
    name, _, value = word.partition("=")
    if not name.startswith("--"):
        return [word]
    if isinstance(default := defaults.get(name.replace("_", "-")), bool) and value.title() in ("True", "False"):
        return [] if value.title() == str(default) else [f"--no-{name[2:]}" if default else name]
    if value.startswith("["):
        try:
            return [name, *map(str, ast.literal_eval(value))]
        except (ValueError, SyntaxError):
            return [word]
    return [word]


@contextmanager
def orderly_end(advice: str = "") -> Iterator[None]:
    """Turn what ends the body early into one line and an exit code: 2 for a `UserError`, 74 (EX_IOERR) for a disk or
    folder that fails, `EXIT_CODES` for signals, after which `advice` says what to do. A second signal kills."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's `!` hands down its own, which is not installed here
    numbers = {getattr(signal, name): name for name in EXIT_CODES if hasattr(signal, name)}

    def interrupt(number: int, frame: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_DFL)
        raise Interrupted(numbers[number])

    # A log file has an epoch's line when the epoch is over; a ± where the locale has none is no reason to fail
    with suppress(AttributeError):  # a notebook's is another
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        if not PUBLISHED_CSV.is_file():  # nor recipes/, where only the modules were installed
            raise UserError(f"{PUBLISHED_CSV} is not there: mount it (container), or use a clone and pip install -e .")
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; what was finished before is intact", file=sys.stderr)
        sys.exit(74)
    except Interrupted as stop:
        print(f"\nstopped by {stop}{advice}", file=sys.stderr)
        sys.exit(stop.exit_code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def device_errors(advice: str) -> Iterator[None]:
    """Name a device that cannot be used, or that ran out of memory, where `advice` says what to do.

    Raises:
        UserError: for the errors of torch and its libraries, most of which say what they lack in words alone.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if re.search("no kernel image|busy or unavailable", str(error)):
            raise UserError(f"the GPU cannot be used ({first_line(error)}): see README, or use --device cpu") from None
        words = "out of memory|can't allocate memory|ALLOC(ATION)?_FAILED|could not create a primitive$"
        words += "|CU(BLAS|DNN)_STATUS_NOT_INITIALIZED"  # of a card that is full
        if not isinstance(error, MemoryError) and not re.search(words, str(error)):
            raise
        raise UserError(f"out of memory: {advice}") from None
