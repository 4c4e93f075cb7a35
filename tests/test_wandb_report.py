"""The W&B report, as the object that it sends."""

import json
import sys
from types import SimpleNamespace

import pytest
import wandb
import yaml
from conftest import ROOT, ROWS, run_row

import report
import wandb_report
from run_files import UserError

wr = pytest.importorskip("wandb_workspaces.reports.v2")


@pytest.fixture
def sent(monkeypatch) -> list[dict]:
    """What goes to the server."""
    calls = []

    def execute(api, query, variables):
        calls.append(variables)
        return {"upsertView": {"view": json.loads(VIEW)}}

    interface = sys.modules["wandb_workspaces.reports.v2.interface"]
    api = SimpleNamespace(projects=lambda entity: [SimpleNamespace(name="project")], client=None)
    monkeypatch.setattr(interface, "_get_api", lambda: api)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.example")
    monkeypatch.setattr(interface, "execute_graphql", execute)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # nobody listens there
    wandb.teardown()
    yield calls
    wandb.teardown()


VIEW = json.dumps(
    {"id": "Vm1", "displayName": "t", "description": "", "project": {"name": "project", "entityName": "me"},
     "spec": {"blocks": []}}
)  # fmt: skip


def panels(spec: dict, kind: str) -> list[dict]:
    """All panels of a kind, with their configuration."""
    grids = [block for block in spec["blocks"] if block["type"] == "panel-grid"]
    sections = [grid["metadata"]["panelBankSectionConfig"]["panels"] for grid in grids]
    return [panel["config"] for section in sections for panel in section if panel["viewType"] == kind]


def test_the_report_that_is_sent(sent, tmp_path, capsys):
    run_row("student_baseline", tmp_path, protocol="quick", dataset="digits", wandb_mode="disabled")
    (tmp_path / "README.md").write_text("\n".join(report.MARKERS))
    assert report.main(report.Config(results_dir=tmp_path, wandb="me/project", readme=tmp_path / "README.md")) == 0
    assert "report: https://wandb.example/me/project/reports/" in capsys.readouterr().out
    (call,) = sent
    assert (call["entityName"], call["projectName"], call["displayName"]) == ("me", "project", wandb_report.TITLE)
    spec = json.loads(call["spec"])
    text = next(block["content"] for block in spec["blocks"] if block["type"] == "markdown-block")
    assert all(f"`{row}`" in text for row in ROWS) and "0.1104" in text

    (curves,) = panels(spec, "Vega2")
    assert curves["panelDefId"] == "wandb/line/v0"
    assert curves["fieldSettings"] == {"x": "confidence", "y": "accuracy"}
    (query,) = curves["userQuery"]["queryFields"]
    table = next(field for field in query["fields"] if field["name"] == "summaryTable")
    assert {"name": "tableKey", "value": "calibration/curve_table"}.items() <= table["args"][0].items()
    (points,) = panels(spec, "Scatter Plot")
    assert (points["xAxis"], points["yAxis"]) == ("summary:best/accuracy", "summary:best/ece")
    assert [line["metrics"] for line in panels(spec, "Run History Line Plot")] == [
        ["test/accuracy"], ["test/ece"], ["test/oe"]
    ]  # fmt: skip
    (sweeps,) = panels(spec, "Parallel Coordinates Plot")
    shown = [column["accessor"] for column in sweeps["columns"]]
    assert shown[-2:] == ["summary:val/accuracy", "summary:val/ece"]
    for path in (ROOT / "sweeps").glob("*.yaml"):
        swept = yaml.safe_load(path.read_text())["parameters"]
        for name in {name for name, values in swept.items() if "value" not in values} - {"seed"}:
            assert f"c::{name}" in shown or f"config:{name}.value" in shown, name

    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    for grid in grids[:3]:
        assert [runs["name"] for runs in grid["runSets"]] == ["Teachers", "Students", "Distillation", "Ensembles"]
        kinds = [json.dumps(runs["filters"]) for runs in grid["runSets"]]
        for kind, filters in zip(("teacher", "student", "kd", "ensemble"), kinds, strict=True):
            assert '"jobType"' in filters and f'"{kind}"' in filters
    assert [runs["grouping"] for runs in grids[1]["runSets"]] == [[{"section": "run", "name": "group"}]] * 4
    for grid in grids[1:3]:
        assert all('"finished"' in json.dumps(runs["filters"]) for runs in grid["runSets"])
    assert "val_size" in json.dumps(grids[3]["runSets"][0]["filters"])  # held-out images choose, never the test set
    (importance,) = panels(spec, "Parameter Importance")
    assert importance["targetKey"] == "val/accuracy"
    assert not any(runs.get("grouping") for runs in grids[0]["runSets"])  # curves of runs, not of groups


def test_the_runs_are_of_the_tables_protocol():
    for protocol in ("quick", None):
        draft = wandb_report.build("me", "project", protocol, "")
        grids = [block for block in draft.blocks if isinstance(block, wr.PanelGrid)][:3]
        filters = [str(runs.filters) for grid in grids for runs in grid.runsets]
        assert len(filters) == 12 and all(("quick" in text) == bool(protocol) for text in filters), filters


def test_what_it_needs(sent, monkeypatch, tmp_path):
    for target in ("project", "me/", "/project", "a/b/c"):
        with pytest.raises(UserError, match="--wandb takes entity/project"):
            wandb_report.publish(target, None, report.sort_into_rows([])[0])
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UserError, match="--wandb needs wandb-workspaces"):
        wandb_report.build("me", "project", None, "")
