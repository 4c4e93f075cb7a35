"""A run in Weights & Biases, which is never in the run's way."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Tracker:
    """Logs a run. Whatever goes wrong here costs a warning, never the run.

    Args:
        mode: `online`, `offline`, `disabled`; `auto` obeys WANDB_MODE, else is online where a key is configured.
        folder: where the records go.
        run_id: the same one continues a run.
        about: what `wandb.init` is told of it: group, name, tags, config.
    """

    def __init__(self, mode: str, folder: Path, run_id: str, **about: Any):
        self.wandb_run = None
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE", "auto")
        if mode == "disabled":
            return
        with self._never_fatal():
            import wandb

            if mode == "auto":
                mode = "online" if wandb.login(prompt=False) else "offline"
            folder.mkdir(parents=True, exist_ok=True)
            quiet = wandb.Settings(silent=True, console="off", init_timeout=30)
            self.wandb_run = wandb.init(
                project="calibrated-distillation",
                id=run_id,
                resume="allow",
                mode=mode,
                dir=folder,
                settings=quiet,
                **about,
            )
            self.wandb_run.define_metric("*", step_metric="epoch")

    def log(self, values: dict[str, float]) -> None:
        """An epoch's numbers, `epoch` among them."""
        if self.wandb_run:
            with self._never_fatal():
                self.wandb_run.log(values)

    def finish(self, result: dict[str, Any], diagram: Path) -> None:
        """The summary, from what `result.json` holds, and the reliability diagram."""
        if self.wandb_run:
            with self._never_fatal():
                import wandb

                self.wandb_run.log({"reliability": wandb.Image(str(diagram))})
                for name in {"best", "last", "selected"} & result.keys():
                    self.wandb_run.summary.update({f"{name}/{k}": v for k, v in result[name].items()})
                self.wandb_run.finish()

    def preempted(self, exit_code: int) -> None:
        """Close the run as one that its machine was taken from, and that will go on."""
        if self.wandb_run:
            with self._never_fatal():
                self.wandb_run.mark_preempting()
                self.wandb_run.finish(exit_code=exit_code)

    @contextmanager
    def _never_fatal(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            print(f"warning: not tracked by Weights & Biases: {error}", file=sys.stderr)
            self.wandb_run = None
