"""Two reports side by side: known figures, a run against itself, and what is not comparable."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from aeheight.errors import InputError, NotYetError
from aeheight.steps.compare import HEADLINE, Comparison, Figure, Judged, Table, compare, describe
from tests.runs import one_message


def row(n: int, rmse: float, **more: Any) -> dict[str, Any]:
    return {"n": n, "coverage": n / 1000, "mean": -1.0, "nmad": 4.0, "rmse": rmse, **more}


def report(rmse: float, lo: float, hi: float) -> dict[str, Any]:
    reference = {"surface": "dsm", "vertical_datum": "EPSG:5773", "files": ["a/dsm.tif"]}
    ends = {"rmse": {"value": rmse, "lo": lo, "hi": hi}}
    slopes = [
        {"split": "train", "lo": 0.0, "hi": 2.0, **row(7, 1.0)},
        {"split": "test", "lo": 0.0, "hi": 2.0, **row(400, rmse - 1)},
        {"split": "test", "lo": 2.0, "hi": None, **row(500, rmse + 1)},
    ]
    return {
        "model": {"train": row(800, 2.0), "test": row(900, rmse, le90=2 * rmse, r2=None)},
        "baselines": {"ridge": {"test": row(900, 12.0)}},
        "by": {"slope": slopes},
        "intervals": {"model": {"test": {"coverage": 0.9, "spread": rmse}}},
        "confidence": {"split": "test", "level": 0.95, "metrics": ends},
        "provenance": {
            "region": "small",
            "year": 2021,
            "reference": reference,
            "prior": None,
            "grids": {"utm31n": {"crs": "EPSG:32631", "bounds": [0, 0, 10, 10]}},
            "classes": {},
            "model": {"architecture": "unet"},
            "settings": {"split": {"test": 0.2}, "model": {"epochs": 3}},
        },
    }


A, B = report(10.0, 8.0, 12.0), report(7.5, 6.0, 8.5)


def changed(metrics: dict[str, Any], value: Any, *keys: str) -> dict[str, Any]:
    """A copy in which what lies under the keys is another value; None removes it."""
    out = deepcopy(metrics)
    *parents, last = keys
    inner = out
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return out


def held(a: dict[str, Any], b: dict[str, Any], split: str = "test") -> Comparison:
    return compare(Judged("a", a), Judged("b", b), split)


def all_figures(found: Comparison) -> list[Figure]:
    tables = (found.baselines, *found.by.values())
    rows = [found.model, found.intervals, *(row for t in tables for row in t.rows.values())]
    return [figure for row in rows for figure in row.values()]


def test_known_reports_give_known_figures():
    found = held(A, B)
    assert found.warnings == found.differences == found.left_out == ()
    assert tuple(found.model) == HEADLINE
    assert found.model["rmse"] == Figure(10.0, 7.5, -2.5, (8.0, 12.0), (6.0, 8.5), overlap=True)
    assert found.model["le90"] == Figure(20.0, 15.0, -5.0)
    assert found.model["r2"] == found.model["median"] == Figure(None, None, None)
    assert found.intervals["coverage"] == Figure(0.9, 0.9, 0.0)
    assert found.baselines.rows["ridge"]["rmse"] == Figure(12.0, 12.0, 0.0)
    assert list(found.by["slope"].rows) == ["0 to 2", "2 or more"]
    assert found.by["slope"].rows["2 or more"]["rmse"] == Figure(11.0, 8.5, -2.5)


def test_intervals_that_share_no_value_are_apart():
    assert held(A, report(5.0, 4.0, 7.9)).model["rmse"].overlap is False
    assert held(A, report(5.0, 4.0, 8.0)).model["rmse"].overlap is True
    other = changed(B, 0.9, "confidence", "level")
    assert held(A, other).model["rmse"].overlap is None
    assert held(A, other).left_out == ("confidence intervals: of 0.95 in A, of 0.9 in B",)


def test_other_splits_have_their_own_figures_but_no_intervals():
    found = held(A, B, "train")
    assert found.model["rmse"] == Figure(2.0, 2.0, 0.0)
    assert list(found.by["slope"].rows) == ["0 to 2"]
    assert "confidence intervals: A has those of test ground" in found.left_out


def test_what_one_report_lacks_is_named():
    classes = [{"split": "test", "lo": None, "hi": None, "class": "trees", **row(5, 1.0)}]
    steep = [*A["by"]["slope"], {"split": "test", "lo": -1.0, "hi": 0.0, **row(5, 1.0)}]
    other = changed(B, {"slope": steep[1:2] + steep[3:], "landcover": classes}, "by")
    other["baselines"]["prior"] = {"test": row(900, 3.0)}
    found = held(A, other)
    slope = found.by["slope"]
    assert (slope.only_a, slope.only_b) == (("2 or more",), ("−1 to 0",))
    assert list(found.by) == ["slope"]
    assert found.left_out == ("table by landcover: only B has it",)
    assert found.baselines.only_b == ("prior",)
    assert {"  only in A: 2 or more", "  only in B: prior"} <= set(describe(found))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("confidence", "confidence intervals: A has none"),
        ("intervals", "intervals of the spread: A has none"),
        ("by", "table by slope: only B has it"),
        ("baselines", "baselines: A has none"),
    ],
)
def test_an_older_form_leaves_its_tables_out(key, told):
    found = held(changed(A, None, key), B)
    assert found.left_out == (told,)
    assert found.model["rmse"].difference == -2.5
    assert f"left out: {told}" in describe(found)
    assert found.baselines == Table({}, (), ("ridge",)) or key != "baselines"


VITAL = [
    ("vertical datum", "EPSG:3855", "reference", "vertical_datum"),
    ("surface", "dtm", "reference", "surface"),
    ("reference", ["b/other.tif"], "reference", "files"),
    ("year", 2022, "year"),
    ("ground", {"utm32n": {"crs": "EPSG:32632", "bounds": [0, 0, 10, 10]}}, "grids"),
    ("split", {"test": 0.3}, "settings", "split"),
]


@pytest.mark.parametrize(("topic", "value", "keys"), [(t, v, k) for t, v, *k in VITAL])
def test_unlike_figures_are_not_comparable(topic, value, keys):
    found = held(A, changed(B, value, "provenance", *keys))
    (warning,) = found.warnings
    assert warning.startswith(f"not comparable: unlike {topic} (")
    assert {d.topic for d in found.differences} == {topic}
    assert describe(found)[2] == f"WARNING: {warning}"


def test_the_datum_and_the_surface_are_told_first():
    other = deepcopy(B)
    for _, value, *keys in reversed(VITAL):
        other = changed(other, value, "provenance", *keys)
    told = [text.split("unlike ")[1].split(" (")[0] for text in held(A, other).warnings]
    assert told == [topic for topic, *_ in VITAL]


@pytest.mark.parametrize(
    ("value", "keys", "line"),
    [
        ("ridge", ("model", "architecture"), "  model architecture: unet -> ridge"),
        (5, ("settings", "model", "epochs"), "  settings of the model epochs: 3 -> 5"),
        ({"lc": ["lc.tif"]}, ("classes",), "  classes lc: none -> lc.tif"),
        ({"files": ["p.tif"]}, ("prior",), "  prior: none -> {'files': ['p.tif']}"),
        (
            ["b/dsm.tif"],
            ("reference", "files"),
            "  reference files (same names, elsewhere): a/dsm.tif -> b/dsm.tif",
        ),
    ],
)
def test_other_differences_are_told_without_a_warning(value, keys, line):
    found = held(A, changed(B, value, "provenance", *keys))
    assert found.warnings == ()
    assert line in describe(found)


def test_files_of_one_name_are_known_by_their_folders():
    a, b = (
        changed(m, [f"{k}/1/dem.tif", f"{k}/2/dem.tif"], "provenance", "reference", "files")
        for m, k in ((A, "a"), (B, "b"))
    )
    assert held(a, b).warnings[0].startswith("not comparable: unlike reference")
    assert held(a, a).warnings == ()


def test_settings_that_one_version_did_not_have_are_no_difference():
    found = held(A, changed(B, {"test": 0.2, "folds": None}, "provenance", "settings", "split"))
    assert found.warnings == found.differences == ()
    assert found.left_out == ("split: only B tells folds",)
    bare = changed(A, None, "provenance", "year")
    assert held(bare, B).left_out == ("year: only B tells it",)
    assert held(bare, bare).left_out == ("year: neither tells it",)


def test_pixels_betray_another_reference_of_the_same_name():
    other = changed(B, row(900, 7.5, coverage=0.8), "model", "test")
    (warning,) = held(A, other).warnings
    assert "unlike reference (1000 pixels of test ground have one in A, 1125 in B)" in warning
    other = changed(B, row(500, 7.5), "model", "test")
    assert "A has heights for 90.0% of the reference, B for 50.0%" in held(A, other).warnings[0]


def test_ground_that_nobody_judged_is_no_silent_number():
    empty = changed(B, row(0, 7.5) | {"coverage": None}, "model", "test")
    assert held(A, empty).warnings == (
        "B judges no test ground; another --split may have pixels in both",
    )


def test_a_run_against_itself_differs_in_nothing(aeheight, small_run):
    places = [small_run.path, small_run.store, small_run.store / "report" / "metrics.json"]
    outs = []
    for place in places:
        result = aeheight("compare", place, small_run.path, "--json")
        assert (result.code, result.err) == (0, "")
        outs.append(json.loads(result.out))
    assert outs[0] == outs[1] == outs[2]
    a = Judged.at(str(small_run.store))
    found = compare(a, a)
    assert json.loads(json.dumps(found.to_dict())) == outs[0]
    assert found.warnings == found.differences == found.left_out == ()
    figures = all_figures(found)
    assert len(figures) > 300
    assert all(figure.a == figure.b for figure in figures)
    assert all(f.difference == 0 for f in figures if f.a is not None)
    assert set(found.by) == set(small_run.metrics()["by"])
    test = small_run.metrics()["model"]["test"]
    assert {name: f.a for name, f in found.model.items()} == {name: test[name] for name in HEADLINE}
    told = small_run.metrics()["confidence"]["metrics"]["nmad"]
    assert found.model["nmad"].interval_b == (told["lo"], told["hi"])
    assert all(found.model[name].overlap for name in ("rmse", "mean", "nmad", "le90"))


def test_another_datum_is_warned_of_on_the_terminal(aeheight, small_run, tmp_path):
    other = changed(small_run.metrics(), "EPSG:3855", "provenance", "reference", "vertical_datum")
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(other))
    result = aeheight("compare", small_run.store, path, "--split", "all")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[2] == (
        "WARNING: not comparable: unlike vertical datum (EPSG:5773 in A, EPSG:3855 in B)"
    )
    assert "model on all ground (metres; differences are B - A)" in lines
    assert max(map(len, lines[5:])) < 160


def test_a_report_that_is_not_there_is_asked_for(aeheight, small_run, regions, tmp_path):
    fresh = regions.write("fresh")
    for place in (fresh.path, fresh.store, tmp_path / "no.json"):
        result = aeheight("compare", small_run.path, place)
        assert result.code == 2
        one_message(result.err, str(place), "there is no report at", "run aeheight evaluate")
    with pytest.raises(NotYetError):
        Judged.at(str(fresh.store))
    assert not fresh.store.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no metrics.json: "),
        ("\xff", "is no metrics.json: "),
        ("[1]", "it has no model and no provenance; name a region file"),
        ('{"model": {"test": {}}}', "it has no provenance;"),
    ],
)
def test_other_files_are_no_reports(text, words, aeheight, tmp_path):
    path: Path = tmp_path / "history.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=words):
        Judged.at(str(path))
    result = aeheight("compare", path, path, "--json")
    assert result.code == 2
    assert words in json.loads(result.err)["error"]
