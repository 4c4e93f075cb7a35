"""Logs a run to Weights & Biases, without ever stopping or delaying the training.

A separate thread makes all calls to W&B, in their order, so neither a slow server nor drawing a diagram keeps the
device waiting. If something fails there, a warning is printed and the rest is not logged; the run goes on.
"""

import io
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

import data_parallel
from calibration import CalibrationMetrics, calibration_metrics, reliability_diagram
from command_line import EXIT_CODES, Interrupted
from run_files import (
    CHOICES,
    HALF,
    UserError,
    atomic_write,
    first_line,
    load_probabilities,
    locked,
    read_csv,
    read_result,
    variant,
)

PROJECT = "calibrated-distillation"
TEST_METRICS = ("accuracy", "ece", "oe", "nll", "brier")
ARTIFACT = re.compile(r"[^/\\]+/[^/\\]+/[^/\\:]+:[^/\\:]+")  # entity/project/name:alias
THUMBNAILS = 64
PATIENCE = {"init_timeout": 30, "finish_timeout": 60}  # seconds; then a warning says how to send what is not uploaded
SWEEP = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")  # what an agent tells the run that it starts


def in_sweep() -> bool:
    """Whether a W&B agent started this process."""
    return "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ


def metric_name(column: str) -> str:
    """What W&B calls a column of `history.csv`: train_loss -> train/loss, ece -> test/ece, val_nll -> val/nll."""
    if column in TEST_METRICS:
        return f"test/{column}"
    if column == "train_loss":
        return "train/loss"
    if column.endswith("_loss"):
        return f"train/{column}"
    return re.sub("^val_", "val/", column)


class Tracker:
    """One run in Weights & Biases.

    The run's id is kept in `<folder>/wandb/id`, so that a run that resumes continues there; in a sweep it is the
    agent's. An epoch is a W&B step, and is logged once: see `log`.

    Args:
        folder: the run's, where `wandb/` goes.
        mode: `online`, `offline` or `disabled`; `auto` obeys WANDB_MODE, else is online where a key is configured and
            offline elsewhere. Processes of a rank other than 0 are disabled.
        project: if None, WANDB_PROJECT or `calibrated-distillation`.
        sweep: report to the sweep whose agent started this process.
        epochs: how many the run has.
        charts: at how many of them, evenly spaced up to the last, calibration curves are logged.
        sources: run folders, or artifacts (entity/project/name:alias), that the run learns from: its inputs.
        about: what `wandb.init` is told besides: group, job_type, name, tags, config.
    """

    def __init__(
        self, folder: Path, *, mode: str = "auto", project: str | None = None, sweep: bool = False, epochs: int = 0,
        charts: int = 10, sources: Sequence[str] = (), **about: Any,
    ):  # fmt: skip
        if mode == "auto":
            mode = (os.environ.get("WANDB_MODE") or "auto").lower()
        if mode not in ("auto", "online", "offline", "disabled", "dryrun", "run", "shared"):
            raise UserError(f"WANDB_MODE={mode}: set it to online, offline or disabled, or unset it")
        self.folder, self.epochs, self.charts, self.sweep = folder, epochs, charts, sweep
        self.wandb_run = None
        self.logged = 0  # epochs that W&B has
        self._advice = ""  # what to do if it is broken off
        self._thread: ThreadPoolExecutor | None = None
        if mode != "disabled" and data_parallel.rank() == 0:
            self._thread = ThreadPoolExecutor(1, "wandb")
            project = project or os.environ.get("WANDB_PROJECT") or PROJECT
            agent = {name: os.environ.get(name) for name in SWEEP} if sweep else {}
            self._later(self._start, mode, {"project": project, **about}, list(sources), agent, needs_run=False)

    # What a run calls; of it, only what ends the run waits for W&B -----------------------------------------

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        """End the run, as preempted or as failed, if it is broken off; else it goes on."""
        if isinstance(error, Interrupted):
            self.preempted(error.exit_code)
        elif error and self._thread:
            self._close(1)

    def log(
        self, history: Sequence[dict[str, float]], images_per_second: float | None = None,
        probabilities: Any = None, labels: Any = None,
    ) -> None:  # fmt: skip
        """Log the epochs of a run's history that W&B does not have yet: one as a rule, more where a stop has cost some.

        Args:
            history: all epochs so far, as in `history.csv`.
            images_per_second: in the training of the last of them.
            probabilities, labels: (n, classes) and (n,), of the test images after it; for the curves.
        """
        if not self._thread:
            return
        metrics = None
        if probabilities is not None and self.due(len(history)):
            metrics = calibration_metrics(probabilities, labels)  # here, for it sets the threads of the process
        self._later(self._log, list(history), images_per_second, metrics)

    def due(self, epoch: int) -> bool:
        """Whether the calibration curves of an epoch, counted from 1, are logged."""
        before, now = (e * self.charts // max(self.epochs, 1) for e in (epoch - 1, epoch))
        return before < now

    def finish(self, result: dict[str, Any], classes: Sequence[str], images: Any = None) -> None:
        """Log what a finished run's folder holds: the summary, a table of all test images, the model as an artifact.

        Args:
            result: what `result.json` holds.
            classes: their names.
            images: uint8 (n, 3, H, W), the test images, if the most overconfident mistakes shall be seen.
        """
        if self._thread:
            self._later(self._finish, result, list(classes), images)
            self._close(0)

    def preempted(self, exit_code: int) -> None:
        """End a run that is stopped from outside and will go on, by the same command, under the same id.

        W&B is told that it was preempted, but not of a person's Ctrl-C, nor in a sweep: there it stops runs itself, as
        Hyperband has it, and would queue them again.
        """
        if self._thread:
            if not self.sweep and exit_code != EXIT_CODES["SIGINT"]:
                self._later(lambda: self.wandb_run.mark_preempting())
            self._close(exit_code)

    def report(self, result: dict[str, Any]) -> None:
        """Log a run that was finished before, from its folder."""
        file = self.folder / "history.csv"
        if file.is_file():  # an ensemble has none
            self.log(read_csv(file))
        self.finish(result, result["classes"])

    # In the thread ----------------------------------------------------------------------------------------

    def _later(self, job: Callable, *args: Any, needs_run: bool = True) -> None:
        def guarded() -> None:
            if needs_run and not self.wandb_run:
                return
            try:
                job(*args)
            except Exception as error:
                _warn(f"not tracked any more: {first_line(error)}{self._advice}")
                run, self.wandb_run = self.wandb_run, None
                with suppress(Exception):
                    run and run.finish(1)

        self._thread.submit(guarded)

    def _close(self, exit_code: int) -> None:
        self._later(lambda: self.wandb_run.finish(exit_code))
        thread, self._thread = self._thread, None  # first, for a signal may come while W&B takes its time
        thread.shutdown()
        self.wandb_run = None

    def _start(self, mode: str, about: dict[str, Any], sources: list[str], agent: dict[str, Any]) -> None:
        # Else teachers that a run of a sweep trains on its way would be taken for it, and WANDB_MODE for --wandb-mode.
        with _hidden((*SWEEP, "WANDB_MODE")):
            self._init(mode, about, agent)
        for source in sources:
            try:
                self._declare_input(source)
            except Exception as error:
                _warn(f"{source} is not recorded as an input: {first_line(error)}")

    def _init(self, mode: str, about: dict[str, Any], agent: dict[str, Any]) -> None:
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        if mode in ("auto", "online"):  # asked for here, since `wandb.init` would prompt for a key
            lacking = "no key is configured (wandb login)" if mode == "online" else ""
            try:
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
            except wandb.Error as error:  # what is configured cannot be a key
                mode, lacking = "offline", first_line(error)
            if mode == "offline" and lacking:
                _warn(f"{lacking}: recorded offline; wandb sync uploads it")
        run_id = agent.get("WANDB_RUN_ID") or self._run_id()
        quiet: dict[str, Any] = {"silent": True, "console": "off", "finish_timeout_raises": True, **PATIENCE}
        quiet["sweep_id"] = agent.get("WANDB_SWEEP_ID")
        settings = wandb.Settings(**quiet, reinit="create_new")

        def init(mode: str):
            return wandb.init(id=run_id, resume="allow", mode=mode, dir=self.folder, settings=settings, **about)

        recorded = offline_epochs(self.folder, run_id)
        try:
            self.wandb_run = init(mode)
        except Exception as error:
            if mode != "online":
                raise
            _warn(f"{first_line(error)}: recorded offline; wandb sync uploads it")
            wandb.teardown()  # else the id is taken
            self.wandb_run = init("offline")
        if self.wandb_run.url:  # online
            print(f"Weights & Biases: {self.wandb_run.url}")
            self._advice = f"; wandb sync --include-online {Path(self.wandb_run.dir).parent} sends it anew"
        self.logged = max(recorded, self.wandb_run.starting_step - 1)
        self.wandb_run.define_metric("epoch", hidden=True)
        self.wandb_run.define_metric("*", step_metric="epoch", step_sync=False)

    def _declare_input(self, source: str) -> None:
        if ARTIFACT.fullmatch(source):
            self.wandb_run.use_artifact(source)
        else:
            # What `use_artifact` does itself with an artifact that is not logged yet, but for refusing offline. W&B
            # knows by its content one that it has, so that the graph leads to the run that made it.
            artifact = self._artifact(Path(source), read_result(Path(source)))
            self.wandb_run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def _run_id(self) -> str:
        file = self.folder / "wandb" / "id"
        if not file.is_file() or not file.read_text().strip():  # of a disk that was full
            with atomic_write(file) as new:
                new.write(secrets.token_hex(4).encode())
        return file.read_text().strip()

    def _log(self, history: list[dict[str, float]], speed: float | None, metrics: CalibrationMetrics | None) -> None:
        for line in history[self.logged :]:
            values = {metric_name(column): value for column, value in line.items() if column != "seconds"}
            if line is history[-1]:
                values |= {"images_per_second": speed} if speed else {}
                values |= _charts(metrics, int(line["epoch"])) if metrics else {}
            self.wandb_run.log(values, step=int(line["epoch"]), commit=True)
        self.logged = max(self.logged, len(history))
        best = max(history, key=lambda line: line["accuracy"])
        for name, line in {"best": best, "last": history[-1]}.items():
            self.wandb_run.summary.update({f"{name}/{k}": line[k] for k in ("epoch", *TEST_METRICS) if k in line})

    def _finish(self, result: dict[str, Any], classes: list[str], images: Any) -> None:
        import wandb

        arrays = load_probabilities(self.folder / "probabilities.npz")
        probabilities, labels = arrays["last"], arrays["labels"]
        prediction, confidence = probabilities.argmax(1), probabilities.max(1)
        correct = prediction == labels
        names, step = np.array(classes, object), (result["last"]["epoch"] or 0) + 1
        columns = [names[labels], names[prediction], confidence.astype(float), correct]
        rows = [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        tables = {"predictions": wandb.Table(["label", "prediction", "confidence", "correct"], rows)}
        if images is not None:
            worst = np.flatnonzero(~correct)
            worst = worst[np.argsort(-confidence[worst], kind="stable")][:THUMBNAILS]
            pictures = images[worst].permute(0, 2, 3, 1).cpu().numpy()
            shown = [[wandb.Image(p), *rows[i][:3]] for p, i in zip(pictures, worst, strict=True)]
            tables["overconfident"] = wandb.Table(["image", "label", "prediction", "confidence"], shown)
        if not result["last"]["epoch"]:  # an ensemble has no epochs, but is as calibrated as others
            tables |= _charts(calibration_metrics(probabilities, labels), None)
        self.wandb_run.log(tables, step=step, commit=True)
        for name in CHOICES:
            if numbers := dict(result.get(name, {})):
                numbers |= {f"scaled_{k}": v for k, v in numbers.pop("scaled").items()}
                numbers["temperature"] = float(np.mean(numbers.pop("temperatures")))  # W&B draws no lists
                self.wandb_run.summary.update({f"{name}/{k}": v for k, v in numbers.items()})
        self.wandb_run.log_artifact(self._artifact(self.folder, result))

    @staticmethod
    def _artifact(folder: Path, result: dict[str, Any]):
        """A finished run's folder as an artifact: what a distillation or an ensemble needs of it."""
        import wandb

        artifact = wandb.Artifact(artifact_name(result), "model" if result["model"] else "ensemble", metadata=result)
        for name, half in HALF.items():  # not result.json, which may be computed anew: the model stays the same version
            file = next(filter(Path.is_file, (folder / name, folder / half)), None)
            if file:
                artifact.add_file(str(file), policy="immutable")  # not copied first
        return artifact


def artifact_name(result: dict[str, Any]) -> str:
    """<row>-<protocol>-s<seed>, with the variant's hash where settings are not the row's own, as its folder has it."""
    return f"{result['row']}-{result['protocol']}-s{result['seed']}{variant(result['changes'])}"


def fetch_artifact(name: str, folder: Path) -> Path:
    """Bring a finished run from W&B into a folder of its own below `folder`, and return that.

    Args:
        name: entity/project/name:alias.

    Raises:
        UserError: there is no such artifact, or no way to it.
    """
    import wandb

    try:
        log_in(name)
        artifact = wandb.Api(timeout=30).artifact(name)
        path = folder / artifact.qualified_name.replace("/", "-").replace(":", "-")
        entries = artifact.manifest.entries
        with locked(path):
            for file in (*HALF, *HALF.values()):  # nothing else in there is looked at
                if file in entries:
                    entries[file].download(str(path))
            with atomic_write(path / "result.json") as file:
                file.write(json.dumps(artifact.metadata, indent=2).encode())
    except UserError:
        raise
    except Exception as error:  # of many kinds
        raise UserError(f"{name} cannot be fetched from Weights & Biases: {first_line(error)}") from None
    return path


def log_in(what: str) -> None:
    """Make sure that W&B can be asked.

    Raises:
        UserError: no key is configured, or WANDB_MODE forbids it; it begins with `what` needs that.
    """
    import wandb

    with _hidden(SWEEP):
        try:
            wandb.setup(wandb.Settings(silent=True))  # else it asks the server whose key it is, only to print that
            known = wandb.login(prompt=False, verify=False)
        except (wandb.Error, ValueError) as error:  # what is configured cannot be
            raise UserError(f"{what} needs Weights & Biases: {first_line(error)}") from None
    if not known:
        mode = os.environ.get("WANDB_MODE")
        advice = f"unset WANDB_MODE={mode}" if mode else "log in first, with wandb login (and wandb online)"
        raise UserError(f"{what} needs Weights & Biases: {advice}")


def offline_epochs(folder: Path, run_id: str) -> int:
    """The last epoch in the records that offline processes of a run have left in its folder; 0 if there are none.

    `wandb sync` sends them one after the other, as they are: what is in one of them must not be in another. It stops at
    one whose end is torn off, as by a power cut; that is renamed, and its epochs are logged anew.
    """
    from wandb.util import get_core_path

    epochs = [0]
    for file in folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb"):
        command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file)]
        reader = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if reader.returncode or "incomplete" in reader.stderr or not reader.stdout:
            file.rename(file.with_suffix(".torn"))
            continue
        records = [json.loads(line) for line in reader.stdout.splitlines() if '"history"' in line]
        epochs += [record["history"]["item"].get("epoch", 0) for record in records if record["type"] == "history"]
    return int(max(epochs))


def _warn(text: str) -> None:
    print(f"warning: Weights & Biases: {text}", file=sys.stderr)


@contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    """Without these environment variables."""
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


def _charts(metrics: CalibrationMetrics, epoch: int | None) -> dict[str, Any]:
    """The calibration of an epoch: a curve that W&B overlays over runs, the reliability diagram, a histogram."""
    import wandb
    from PIL import Image

    count, accuracy, confidence = (values.tolist() for values in metrics.merged(20))
    filled = [i for i, n in enumerate(count) if n]
    rows = [[confidence[i], accuracy[i], int(count[i]), confidence[i] - accuracy[i]] for i in filled]
    table = wandb.Table(["confidence", "accuracy", "count", "gap"], rows)
    picture = io.BytesIO()
    reliability_diagram(metrics, f"epoch {epoch}" if epoch else "").savefig(picture, dpi=100)
    edges = np.linspace(0, 1, len(count) + 1).tolist()
    return {
        "calibration/curve": wandb.plot.line(table, "confidence", "accuracy", title="Calibration"),
        "calibration/reliability": wandb.Image(Image.open(picture)),
        "calibration/confidence": wandb.Histogram(np_histogram=([int(n) for n in count], edges)),
    }
