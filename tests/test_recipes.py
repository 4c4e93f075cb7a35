"""All 16 rows, end to end, in the order in which they need each other."""

import json

import pytest
from conftest import ROWS, run_row

import common


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("row", sorted(ROWS, key=lambda row: (row == "student_ensemble", row[0] != "t", row)))
def test_row(row, results):
    result, path = run_row(row, results)
    assert result["row"] == row and path.is_relative_to(results / "smoke" / row)
    assert 0 <= result["last"]["accuracy"] <= 1 and 0 <= result["last"]["oe"] <= result["last"]["ece"] <= 1
    assert result["published"] == common.published(row, {})
    kind = row.split("_")[0]
    assert result["model"] == (
        None
        if row.endswith("_ensemble")
        else {"teacher": "wrn_40_2", "kd": "shufflenet_v1", "student": "shufflenet_v1"}[kind]
    )
    assert {p.name for p in path.iterdir()} >= {"result.json", "reliability.png", "probabilities.npz"}


def test_teachers_were_shared(results):
    """15 trained or evaluated rows and no run twice: one folder a row, all of the same seed and data."""
    folders = sorted(path.parent for path in results.rglob("result.json"))
    assert sorted(folder.parent.name for folder in folders) == ROWS
    assert len({json.loads((folder / "result.json").read_text())["fingerprint"] for folder in folders}) == 1
