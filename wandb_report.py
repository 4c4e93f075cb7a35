"""A report in Weights & Biases: the table, and its runs' calibration curves, accuracy against ECE, and sweeps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import report
from run_files import UserError, first_line
from tracking import log_in

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report

TITLE = "Improved Distillation with Ensemble of Calibrated Models"
GROUPS = {"Teachers": "teacher", "Students": "student", "Distillation": "kd", "Ensembles": "ensemble"}  # name: job type
SWEPT = ("row", "temperature", "kd_weight", "ce_weight", "alpha", "lr", "batch_size")


def build(entity: str, project: str, protocol: str | None, table: str) -> "Report":
    """The report, which is not sent anywhere.

    Args:
        protocol: the table's, whose runs are shown; None shows all.
        table: Markdown.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError:
        raise UserError("--wandb needs wandb-workspaces: uv sync --extra wandb-report installs it") from None
    from wandb_workspaces.expr import And, Config, Metric

    def runs(*wanted: Any, **how: Any) -> list[wr.Runset]:
        """A run set for each kind of row."""
        wanted += (Config("protocol") == protocol,) if protocol else ()
        filters = {name: And(Metric("JobType") == kind, *wanted) for name, kind in GROUPS.items()}
        return [wr.Runset(name=name, filters=filters[name], **how) for name in GROUPS]

    rows = runs(Metric("State") == "finished", groupby=["group"])  # runs that differ in their seeds alone are one
    curves = wr.CustomChart(
        query={"summaryTable": {"tableKey": "calibration/curve_table"}},
        chart_name="wandb/line/v0",
        chart_fields={"x": "confidence", "y": "accuracy"},
        chart_strings={"title": "Accuracy over confidence"},
        layout=wr.Layout(w=14, h=12),
    )
    beside = wr.MediaBrowser(media_keys=["calibration/reliability"], num_columns=3, layout=wr.Layout(x=14, w=10, h=12))
    points = wr.ScatterPlot(
        title="Accuracy against ECE, best epoch",
        x=wr.SummaryMetric("best/accuracy"),
        y=wr.SummaryMetric("best/ece"),
        layout=wr.Layout(w=24, h=12),
    )
    epochs = [
        wr.LinePlot(title=title, x="epoch", y=[metric], layout=wr.Layout(x=x, w=8, h=8))
        for x, title, metric in ((0, "Test accuracy", "test/accuracy"), (8, "ECE", "test/ece"), (16, "OE", "test/oe"))
    ]
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(name)) for name in SWEPT]
    columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(f"val/{name}")) for name in ("accuracy", "ece")]
    sweeps = [
        wr.ParallelCoordinatesPlot(
            title="Settings and what came of them", columns=columns, layout=wr.Layout(w=24, h=10)
        ),
        wr.ParameterImportancePlot(with_respect_to="val/accuracy", layout=wr.Layout(y=10, w=24, h=8)),
    ]
    held_out = wr.Runset(name="Runs with held-out images", filters=And(Config("val_size") >= 1))
    blocks = [
        wr.TableOfContents(),
        wr.H1("The table"),
        wr.MarkdownBlock(table),
        wr.H1("Calibration"),
        wr.P("Below the diagonal a model is more confident than it is right. One run set for each kind of row."),
        wr.PanelGrid(runsets=runs(), panels=[curves, beside]),
        wr.H1("Accuracy against ECE"),
        wr.PanelGrid(runsets=rows, panels=[points]),
        wr.H1("Training"),
        wr.PanelGrid(runsets=rows, panels=epochs),
        wr.H1("Sweeps"),
        wr.P("Settings are judged on held-out training images; the test set chooses none."),
        wr.PanelGrid(runsets=[held_out], panels=sweeps),
    ]
    return wr.Report(project=project, entity=entity, title=TITLE, blocks=blocks, width="fluid")


def publish(target: str, protocol: str | None, rows: Sequence[report.Row]) -> str:
    """Build the report in a project and save it there. Returns where it is.

    Args:
        target: entity/project.
        protocol, rows: as `report.readme_block` takes them.

    Raises:
        UserError: not an entity and a project, or W&B cannot be reached.
    """
    entity, _, project = target.partition("/")
    if not entity or not project or "/" in project:
        raise UserError(f"--wandb takes entity/project, not {target}")
    draft = build(entity, project, protocol, report.readme_block(protocol, rows))
    log_in(f"--wandb {target}")
    try:
        return draft.save().url
    except Exception as error:  # of many kinds, by what W&B or the way to it lacks
        raise UserError(f"--wandb {target}: {first_line(error)}") from None
