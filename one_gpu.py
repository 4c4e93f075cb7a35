"""Run a command on one of this machine's GPUs: `python one_gpu.py 2 python recipes/kd_cutmix.py`, at most 2 on each.

A GPU has as many places as jobs may share it. The command takes the first that is free, waits while none is, and sees
that GPU alone. A place is a lock on a file, which the kernel takes back however the command ends. Without a GPU the
command simply runs.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path


def visible_gpus() -> list[str]:
    """Names of the GPUs this process may use, as CUDA_VISIBLE_DEVICES has them; all there are where it is not set."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return list(takewhile(lambda name: name not in ("", "-1"), names))  # CUDA sees none after these either
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]  # not the parts of one, with MIG
    return [str(index) for index in range(len(gpus))] if listed.returncode == 0 else []


def free_place(gpus: Sequence[str], jobs_per_gpu: int, folder: Path) -> tuple[str, int] | None:
    """A GPU with a place left, and the open file that holds the place; None where all are taken. Empty GPUs first."""
    for place in range(jobs_per_gpu):
        for gpu in gpus:
            file = os.open(folder / f"{gpu.replace('/', '_')}-{place}", os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return gpu, file
            except BlockingIOError:
                os.close(file)
    return None


def main(jobs_per_gpu: int, command: Sequence[str]) -> None:
    if gpus := visible_gpus():
        # Within a Slurm job, GPUs are numbered for that job alone
        name = f"gpus-{os.getuid()}-{os.environ.get('SLURM_JOB_ID', 'machine')}"
        folder = Path(tempfile.gettempdir(), name)
        folder.mkdir(exist_ok=True)
        while (taken := free_place(gpus, jobs_per_gpu, folder)) is None:
            time.sleep(1)
        os.environ["CUDA_VISIBLE_DEVICES"], file = taken
        os.set_inheritable(file, True)  # held until the command, which takes this process over, has ended
    os.execvp(command[0], command)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("jobs_per_gpu", type=int, help="how many commands may share a GPU")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what is run, with its arguments")
    words = parser.parse_args()
    if words.jobs_per_gpu < 1 or not words.command:
        parser.error("needs a number from 1 (commands that may share a GPU) and a command to run")
    try:
        main(words.jobs_per_gpu, words.command)
    except OSError as error:  # no such command, or a folder of locks that is somebody else's
        parser.error(f"{error.filename or words.command[0]}: {error.strerror}")
