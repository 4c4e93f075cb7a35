"""Kill a row and its teacher at random moments until they are finished, and compare what they leave, byte for byte,
with the same row left alone.

    python benchmarks/kills.py --kills 50

Every other kill waits for a file to be under way and falls into its writing. Each process is forked from this one,
which saves the seconds of importing torch; from there on it is the recipe's own command.
"""

import csv
import json
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ.update(WANDB_MODE="disabled", OMP_WAIT_POLICY="passive")

import checkpoint
import common
from command_line import orderly_end, parse


@dataclass
class Config:
    kills: common.Count = 50
    """how often the row is killed"""
    row: str = "kd_cutmix"
    """which row; its teacher's training is killed too"""
    epochs: common.Count = 8
    """epochs of 96 digits; if kills are left at the end, another run starts"""
    seed: int = 0
    """seed of the random moments"""


def start(cfg: Config, folder: Path) -> int:
    """Run the row's command in `folder`, in a process of its own. Returns its number."""
    if child := os.fork():
        return child
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    flags = f"--protocol smoke --device cpu --train-size 96 --epochs {cfg.epochs}"
    sys.argv = [f"{cfg.row}.py", *flags.split()]
    status = 1
    try:
        common.cli(common.load_recipe(cfg.row))
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        os._exit(status)


def unfinished(folder: Path) -> set[tuple[Path, int]]:
    """Files that are, or were, being written, with the time of the last write."""
    found = set()
    for path in folder.glob("results/smoke/*/seed*/*.tmp"):
        with suppress(FileNotFoundError):  # finished just now
            found.add((path, path.stat().st_mtime_ns))
    return found


def epochs_kept(folder: Path) -> dict[str, int]:
    """Epochs that the next start goes on from, by row."""
    kept = {}
    for path in sorted(folder.glob("results/smoke/*/seed*")):
        if (path / "result.json").is_file():
            kept[path.parent.name] = len((path / "history.csv").read_text().splitlines()) - 1
        else:
            kept[path.parent.name] = len((checkpoint.load(path) or {"history": []})["history"])
    return kept


def content(folder: Path) -> dict[str, object]:
    """All files of a finished row and its teacher, without what a clock wrote."""
    found = {}
    for path in sorted(folder.glob("results/**/*")):
        name, data = str(path.relative_to(folder)), path.read_bytes() if path.is_file() else None
        if path.name == "history.csv":
            data = [{**line, "seconds": None} for line in csv.DictReader(data.decode().splitlines())]
        elif path.name == "result.json":
            data = {k: v for k, v in json.loads(data).items() if k not in ("train_seconds", "images_per_second")}
        if not path.name.endswith(".lock"):
            found[name] = data
    return found


def run_once(cfg: Config, folder: Path, moment: float, in_writing: bool) -> bool:
    """Run the row's command and kill it after `moment` seconds, or at the first write after that. Whether it was killed
    before it ended."""
    stale = unfinished(folder)
    child, began = start(cfg, folder), time.perf_counter()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended and status:
            sys.exit((folder / "log").read_text())
        if ended:
            return False
        if time.perf_counter() - began > moment and (not in_writing or unfinished(folder) - stale):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.0003)


def kill_until_finished(cfg: Config, folder: Path, kills: int, random: Random, epoch_seconds: float) -> tuple[int, int]:
    """Kill the row up to `kills` times, then let it finish. Returns how often it was killed, and how often while it
    wrote a file.

    Raises:
        SystemExit: a kill cost an epoch that had been reported as done.
    """
    killed = in_writing = 0
    log, before = folder / "log", {}
    while True:
        read = log.stat().st_size if log.exists() else 0
        moment = random.uniform(0, 2 * epoch_seconds) if killed < kills else float("inf")
        stale = unfinished(folder)
        if not run_once(cfg, folder, moment, in_writing=killed % 2 == 1):
            return killed, in_writing
        killed += 1
        in_writing += bool(unfinished(folder) - stale)
        kept = epochs_kept(folder)
        active = kept.get(cfg.row) or max(kept.values(), default=0)
        done = [int(n) for n in re.findall(r"^epoch +(\d+)/", log.read_text()[read:], re.MULTILINE)]
        if any(kept[row] < epochs for row, epochs in before.items()) or (done and active < done[-1]):
            sys.exit(f"epoch {done[-1:]} was done, and {kept} are kept, after {before} at the kill before")
        before = kept


def main(cfg: Config) -> None:
    common.load_recipe(cfg.row)  # a wrong name is told here: in the run it would go into a log that is deleted
    random = Random(cfg.seed)
    common.load_dataset("digits", Path())  # for what it imports
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary, "whole")
        whole.mkdir()
        began = time.perf_counter()
        run_once(cfg, whole, float("inf"), in_writing=False)
        epoch_seconds = (time.perf_counter() - began) / cfg.epochs / 2  # there is a teacher, too
        kills = in_writing = runs = 0
        while kills < cfg.kills:
            runs += 1
            folder = Path(temporary, f"killed{runs}")
            folder.mkdir()
            counts = kill_until_finished(cfg, folder, cfg.kills - kills, random, epoch_seconds)
            kills, in_writing = kills + counts[0], in_writing + counts[1]
            expected, found = content(whole), content(folder)
            if differ := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
                sys.exit(f"after {kills} kills these are not what a run that was left alone has: {', '.join(differ)}")
    print(
        f"{kills} kills, {in_writing} of them in the middle of a write, over {runs} runs of {cfg.row} and its teacher: "
        "every file is byte for byte that of a run left alone, its times aside"
    )


if __name__ == "__main__":
    with orderly_end():
        main(parse(Config, __doc__))
