"""The report of a whole run, as a browser, a spreadsheet and a catalogue meet it."""

import csv
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pystac
import pytest
from affine import Affine

from aeheight.cube import open_tree
from aeheight.metrics import Scatter, Stats
from aeheight.report import Report, render
from aeheight.rows import FEW, bars, comparison
from aeheight.sheets import SHEETS, sheets
from aeheight.store import Store
from tests.browser import CHROMIUM, visit
from tests.runs import copied, one_message
from tests.test_report import Page
from tests.tifs import write_tif

browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page with")

LOOK = {
    "width": "document.documentElement.scrollWidth",
    "blank": "[...document.images].filter(i => !i.naturalWidth || !i.alt).length",
    "images": "document.images.length",
    "lost": """[...document.querySelectorAll("a[href^='#']")]
        .filter(a => !document.getElementById(a.hash.slice(1))).map(a => a.hash)""",
    "anchors": """document.querySelectorAll("a[href^='#']").length""",
    "files": """[...document.querySelectorAll("a:not([href^='#'])")]
        .map(a => a.getAttribute("href"))""",
    "twice": """[...document.querySelectorAll("[id]")].map(e => e.id)
        .filter((id, k, all) => all.indexOf(id) !== k)""",
    "cut": """[...document.querySelectorAll("td, th, dd, .value, figcaption")]
        .filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.textContent)""",
}


def report(region):
    return region.store / "report"


@browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(small_run, tmp_path, width):
    page = report(small_run) / "index.html"
    seen = visit(page, tmp_path / "profile", width=width, ask=LOOK)
    assert seen.errors == []
    assert seen.requests == [page.absolute().as_uri()]
    assert seen.told["width"] <= width
    assert seen.told["cut"] == []
    assert seen.told["blank"] == 0
    assert seen.told["images"] >= 9
    assert seen.told["lost"] == seen.told["twice"] == []
    assert seen.told["anchors"] >= 12
    assert {path.name for path in report(small_run).iterdir()} - {"index.html"} == set(
        seen.told["files"]
    )
    assert 5 < len(re.findall(rb"/Type\s*/Page\b", seen.pdf)) < 25


@browser
def test_the_browser_tells_what_is_wrong(tmp_path):
    """The test above can fail: a page that complains, asks for another file, and is too wide."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<meta name='viewport' content='width=device-width'><p style='width:900px'>wide</p>"
        "<img src='gone.png'><a href='#gone'>x</a><script>console.error('no'); nothing()</script>"
    )
    seen = visit(bad, tmp_path / "profile", width=390, ask=LOOK)
    assert len(seen.errors) >= 2
    assert any(url.endswith("gone.png") for url in seen.requests)
    assert seen.told["lost"] == ["#gone"]
    assert seen.told["blank"] == 1
    assert seen.told["width"] > 390


def rows(region, name):
    with (report(region) / name).open(newline="") as file:
        return list(csv.DictReader(file))


def same(row, figures):
    """Every figure of metrics.json stands in the row, to the last digit."""
    for name, value in figures.items():
        text = row[name]
        known = "" if value is None else str(value)
        assert text == known or float(text) == value, name


def place(row):
    return (
        row["split"],
        *(str(row.get(key) or "") for key in ("class",)),
        *(None if row.get(key) in (None, "") else float(row[key]) for key in ("lo", "hi")),
    )


def test_every_figure_of_the_csv_is_that_of_metrics_json(small_run):
    metrics = small_run.metrics()
    found = {(row["predictor"], row["split"]): row for row in rows(small_run, "metrics.csv")}
    for name, table in {"model": metrics["model"], **metrics["baselines"]}.items():
        for split, figures in table.items():
            same(found.pop((name, split)), figures)
    assert not found
    (sure,) = (r for r in rows(small_run, "metrics.csv") if r["rmse_lo"])
    assert (sure["predictor"], sure["split"]) == ("model", "test")
    for metric, interval in metrics["confidence"]["metrics"].items():
        same(sure, {f"{metric}_{end}": interval[end] for end in ("lo", "hi")})
    for name, by in (
        ("classes.csv", metrics["by"]),
        ("spread.csv", metrics["intervals"]["by"]),
    ):
        kept = [row for row in rows(small_run, name) if row["criterion"] != "split"]
        found = {(row["criterion"], *place(row)): row for row in kept}
        assert len(found) == len(kept) == sum(map(len, by.values()))
        for criterion, table in by.items():
            for figures in table:
                edges = ("split", "lo", "hi", "class")
                row = found[criterion, *place(figures)]
                same(row, {k: v for k, v in figures.items() if k not in edges})
    whole = [row for row in rows(small_run, "spread.csv") if row["criterion"] == "split"]
    for row in whole:
        same(row, metrics["intervals"]["model"][row["split"]])
    assert len(whole) == 4


def test_the_checks_and_the_variogram_are_those_of_metrics_json(small_run):
    metrics = small_run.metrics()
    found = {
        (row["table"], row["item"], row["figure"]): row["value"]
        for row in rows(small_run, "checks.csv")
    }
    wanted = {
        (table, item, figure): value
        for table in ("skill", "regression", "shift", "seams")
        for item, figures in metrics[table].items()
        for figure, value in figures.items()
    }
    for item in ("raw", "coregistered"):
        for figure, value in (metrics["coregistration"].get(item) or {}).items():
            wanted["coregistration", item, figure] = value
    assert len(wanted) > 40
    for key, value in wanted.items():
        same({"value": found[key]}, {"value": value})
    assert found["correlation", "test", "sill_m2"] == str(metrics["correlation"]["sill_m2"])
    reach = metrics["correlation"]
    told = rows(small_run, "variogram.csv")
    assert [float(row["lag_px"]) for row in told] == reach["lags_px"]
    for row, pairs, value in zip(told, reach["pairs"], reach["semivariance_m2"], strict=True):
        same(row, {"pairs": pairs, "semivariance_m2": value})


def test_the_item_is_valid_and_tells_the_same(small_run):
    item = json.loads((report(small_run) / "item.json").read_bytes())
    metrics = small_run.metrics()
    pystac.validation.validate_dict(item | {"stac_extensions": []})
    for name, value in metrics["model"]["test"].items():
        assert item["properties"][f"aeheight:{name}"] == value
    assert item["properties"]["aeheight:split"] == "test"
    assert (
        item["properties"]["aeheight:baselines"]["prior"] == metrics["baselines"]["prior"]["test"]
    )
    assert item["properties"]["aeheight:confidence"] == metrics["confidence"]
    assert item["properties"]["start_datetime"].startswith(str(metrics["provenance"]["year"]))
    (grid,) = metrics["provenance"]["grids"].values()
    west, south, east, north = item["bbox"]
    corners = np.array(item["geometry"]["coordinates"][0])
    assert (corners >= [west - 1e-9, south - 1e-9]).all()
    assert (corners <= [east + 1e-9, north + 1e-9]).all()
    middle = pystac.Item.from_dict(item)
    assert middle.id == "small-report-2021"
    metres = 111_320 * (north - south)
    assert metres == pytest.approx(grid["bounds"][3] - grid["bounds"][1], rel=0.02)
    assert set(item["assets"]) == {"metrics.json", "index.html", *SHEETS}
    for name, asset in item["assets"].items():
        content = (report(small_run) / name).read_bytes()
        assert asset["href"] == f"./{name}"
        assert asset["file:size"] == len(content)
        assert asset["file:checksum"] == "1220" + hashlib.sha256(content).hexdigest()
        assert asset["roles"]
    assert item["assets"]["metrics.csv"]["type"] == "text/csv"
    (link,) = item["links"]
    assert (link["rel"], link["href"], link["type"]) == ("alternate", "./index.html", "text/html")


def test_small_classes_show_their_number_alone(small_run):
    """What so few pixels err by is no figure; and no R² of a class is shown."""
    page = Page((report(small_run) / "index.html").read_text())
    judged = [row for row in small_run.metrics()["by"]["height"] if row["split"] == "test"]
    assert any(0 < row["n"] < FEW for row in judged) or all(row["n"] >= FEW for row in judged)
    for row in judged:
        shown = [r for r in page.rows if r[0] == f"{row['lo']:g} to {row['hi']:g} m"]
        (shown,) = (r for r in shown if r[-1] == f"{row['n']:,}".replace(",", "\u202f"))
        assert (set(shown[1:-1]) == {"–"}) == (row["n"] < FEW)
    assert f"fewer than {FEW} pixels" in page.words


def test_a_report_of_nothing_has_tables_of_nothing():
    made = sheets({"model": {}, "baselines": {}})
    assert set(made) == set(SHEETS)
    assert set(made.values()) == {b""}


def test_cells_of_the_csv_are_never_nan(small_run):
    for name in SHEETS:
        for row in rows(small_run, name):
            for value in row.values():
                assert value.lower() not in ("nan", "inf", "-inf", "none")
                if re.fullmatch(r"-?[\d.e+-]+", value):
                    assert math.isfinite(float(value))


# Bad input.


def pixels(path, values, world, nodata):
    west, _, _, north = world.bounds
    return str(write_tif(path, values, Affine(10, 0, west, 0, -10, north), world.crs, nodata))


def test_ground_without_reference_and_a_raster_without_classes_are_told(
    aeheight, regions, small_run, world, scheduler, tmp_path
):
    """No reference on the test half; one class raster that is empty, one of a single class."""
    heights = np.random.default_rng(0).normal(100, 20, (256, 256)).astype(np.float32)
    heights[:, 120:] = -9999
    dsm = pixels(tmp_path / "half.tif", heights, world, -9999)
    empty = pixels(tmp_path / "empty.tif", np.zeros((256, 256), np.uint8), world, 0)
    single = pixels(tmp_path / "one.tif", np.ones((256, 256), np.uint8), world, 0)
    about = {"source": "raster", "surface": "dtm", "vertical_datum": "EPSG:3855"}
    half = regions.write(
        "half",
        height={"href": dsm} | about,
        prior=None,
        cube={"shard": 256, "chunk": 64},
        evaluate={"classes": {"empty": {"href": empty}, "single": {"href": single}}},
    )
    trained = ("--checkpoint", small_run.store, "--scheduler", scheduler)
    result = aeheight("run", half.path, *trained)
    assert result.code == 0, result.err
    page = Page((report(half) / "index.html").read_text())
    assert "There is no test ground that has both a reference and predictions" in page.words
    assert "Empty, validation ground No judged pixel lies in a class of this raster" in page.words
    assert page.words.count("No judged pixel lies") == 1
    assert len([row for row in page.rows if row[0] == "class 1"]) == 1
    assert "the reference is dtm in EPSG:3855: part of the difference is that" in page.words
    metrics, item = half.metrics(), json.loads((report(half) / "item.json").read_bytes())
    assert set(metrics["model"]["test"].values()) == {0, None}
    assert metrics["confidence"] == {}
    assert metrics["by"]["empty"] == []
    assert item["properties"]["aeheight:split"] == "validation"
    (test,) = (
        row
        for row in rows(half, "metrics.csv")
        if (row["predictor"], row["split"]) == ("model", "test")
    )
    assert (test["n"], test["rmse"]) == ("0", "")
    pystac.validation.validate_dict(item | {"stac_extensions": []})


def test_an_infinite_height_in_the_map_is_no_figure(aeheight, regions, small_run, scheduler):
    """What is missing is NaN; anything else that is no number fails its shard, and is named."""
    twin = copied(small_run, regions)
    tree = open_tree(Store.at(twin.heights))
    shard = tree.template.shards("height")[0]
    values = tree.read(shard.group, "height", shard.year, shard.region)
    values[3, 4] = np.inf
    tree.write(shard, values)
    result = aeheight("evaluate", twin.path, "--overwrite", "--scheduler", scheduler)
    assert result.code == 1
    assert "1 of " in result.out + result.err
    assert "pixels to be judged have an infinite prediction" in result.out + result.err
    assert twin.metrics() == small_run.metrics()  # the report of before


def test_a_report_is_always_that_of_its_settings(aeheight, regions, small_run, scheduler):
    """What only the summary asks makes the report anew, from the sums that lie there."""
    twin = copied(small_run, regions)
    page = report(twin) / "index.html"

    def evaluated(*more):
        result = aeheight("evaluate", twin.path, "--scheduler", scheduler, *more)
        assert result.code == 0, result.err
        assert "0 shards done" in result.out
        return twin.metrics()

    wanted = ("--set", "evaluate.draws=200", "--set", "evaluate.seed=5", "--set", "note=look here")
    confidence = evaluated(*wanted)["confidence"]
    assert (confidence["draws"], confidence["seed"]) == (200, 5)
    assert "look here" in page.read_text()
    written = page.stat().st_mtime_ns
    evaluated(*wanted)
    assert page.stat().st_mtime_ns == written
    # A driver that died before it had told what the sums say.
    page.unlink()
    assert evaluated()["confidence"]["draws"] == 1000
    assert "look here" not in page.read_text()


def test_a_driver_that_dies_before_the_summary_leaves_the_old_report_and_then_the_new(
    aeheight, regions, small_run, scheduler, monkeypatch
):
    twin = copied(small_run, regions)
    shorter = ("evaluate", twin.path, "--scheduler", scheduler, "--set", "evaluate.block=8")

    def dies(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("aeheight.steps.evaluate.summarise", dies)
        assert aeheight(*shorter).code == 1
    assert twin.metrics() == small_run.metrics()
    assert aeheight(*shorter).code == 0
    assert twin.metrics()["confidence"]["block_px"] == 8


def test_damaged_sums_are_named(aeheight, regions, small_run, scheduler):
    """Wherever a bit of them has turned over."""
    twin = copied(small_run, regions)
    part = min((twin.store / "report.receipts").rglob("*.npz"))
    sound = part.read_bytes()
    for place in (3, len(sound) // 3, len(sound) - 2):
        part.unlink()
        part.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        result = aeheight("evaluate", twin.path, "--scheduler", scheduler)
        assert result.code == 2
        one_message(result.err, part.name, "is damaged", "evaluate --overwrite")


@pytest.mark.slow
def test_the_plan_of_evaluate_has_room_for_its_workers(aeheight, regions, small_run):
    twin = copied(small_run, regions)
    plan = json.loads(aeheight("evaluate", twin.path, "--plan", "--json").out)
    assert aeheight("evaluate", twin.path, "--overwrite", "--workers", "1").code == 0
    receipts = (twin.store / "report.receipts").rglob("r*.json")
    peak = max(json.loads(path.read_bytes())["peak"] for path in receipts)
    assert 0 < peak < plan["peak_worker_bytes"] < 3 * peak


def test_a_baseline_on_other_ground_is_not_compared():
    """A prior that is void where the ground is hard would look better than the model."""
    rng = np.random.default_rng(0)
    reference = rng.normal(100, 30, 5000)
    hard = np.arange(5000) < 2000
    model = reference + rng.normal(0, np.where(hard, 30, 5))
    prior = reference + rng.normal(0, 8, 5000)
    own = Stats.of(model, reference).summary()
    other = Stats.of(prior, reference, predicted_valid=~hard).summary()
    assert other["rmse"] < own["rmse"]
    metrics = {"model": {"test": own}, "baselines": {"prior": {"test": other}}}
    assert [bar["name"] for bar in bars(metrics, "U-Net++", "test")] == ["U-Net++"]
    ((_, compared),) = comparison(metrics, "U-Net++")
    assert [best for _, _, best in compared] == [set(), set()]
    page = Page(render(Report(name="void", metrics=metrics, model="U-Net++")))
    assert "more accurate than the model" not in page.words


def test_a_reference_elsewhere_is_refused(aeheight, regions, world, tmp_path):
    far = np.zeros((256, 256), np.float32)
    west, _, _, north = world.bounds
    place = Affine(10, 0, west + 50_000, 0, -10, north)
    path = write_tif(tmp_path / "far.tif", far, place, world.crs, -9999)
    about = {"source": "raster", "surface": "dsm", "vertical_datum": "EPSG:5773"}
    elsewhere = regions.write("far", height={"href": str(path)} | about)
    result = aeheight("ingest", elsewhere.path, "--plan")
    assert result.code == 2
    one_message(result.err, "touches the grid", "embeddings and heights must share ground")


def test_errors_of_any_size_are_counted_and_drawn():
    """No histogram has an end: errors of a million kilometres have their metrics and a picture."""
    reference = np.linspace(0, 100, 1000)
    far = 1e9 + np.linspace(0, 10, 1000)
    stats = Stats.of(reference + far, reference)
    summary = stats.summary()
    assert summary["median"] == pytest.approx(np.median(far), abs=0.005)
    assert summary["le90"] == pytest.approx(np.quantile(far, 0.9), abs=0.005)
    assert summary["nmad"] == pytest.approx(1.4826 * 2.5, abs=0.02)
    drawn = Report(
        name="far",
        metrics={"model": {"test": summary}, "baselines": {}},
        errors=stats.errors(),
        scatter=Scatter.of(reference + far, reference).dense(trim=0.0005),
    )
    assert drawn.errors[1].sum() >= 0.99 * 1000
    page = Page(render(drawn))
    assert "1000000005" in page.words
    assert len(page.images) == 2


def test_the_memory_of_a_worker_is_measured(small_run):
    """The peak holds what was held and let go, to the byte that the system tells."""
    held = (
        "from aeheight.memory import peak_bytes; before = peak_bytes();"
        "data = bytearray(200_000_000); del data; print(peak_bytes() - before)"
    )
    grown = int(
        subprocess.run([sys.executable, "-c", held], capture_output=True, check=True).stdout
    )
    assert 190_000_000 < grown < 230_000_000 or not Path("/proc/self/status").exists()
    page = Page((report(small_run) / "index.html").read_text())
    assert page.row("evaluate")[-1].endswith(" GB") or not Path("/proc/self/status").exists()
