import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from aeheight.embeddings import ATTRIBUTION
from aeheight.figures import Maps
from aeheight.metrics import GLOSSARY, Scatter, Stats
from aeheight.report import Prediction, Report, render
from aeheight.rows import judged_split
from aeheight.seams import Seams
from aeheight.terms import format_metric

VOID = {"meta", "img", "br", "hr", "link", "input"}
EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """The page as a person and a browser meet it; unbalanced tags are an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    @property
    def images(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]

    def row(self, label):
        return next(row for row in self.rows if row[0] == label and len(row) > 1)


def stats(d, reference):
    return Stats.of(reference + d, reference)


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    shape = (60, 90)
    reference = rng.normal(100, 30, shape).astype(np.float32)
    d = rng.normal(0.5, 2, shape).astype(np.float32)
    test = stats(d, reference)
    splits = ("train", "validation", "test", "all")
    model = {split: test.summary() for split in splits}
    ridge = {split: stats(2 * d, reference).summary() for split in splits}
    mean = {split: stats(100 - reference, reference).summary() for split in splits}
    prior = {split: stats(4 * d, reference).summary() for split in splits}
    rows = [
        {"split": split, "lo": lo, "hi": hi, **test.summary()}
        for split in splits
        for lo, hi in ((0, 5), (5, None))
    ]
    holed = (reference + d).copy()
    holed[:10, :10] = np.nan
    maps = Maps(
        group="utm10n",
        crs="EPSG:32610",
        bounds=(403200.0, 4279500.0, 616500.0, 4431600.0),
        pixel=(900.0, 900.0),
        reference=reference,
        predicted=holed,
        difference=holed - reference,
        split=rng.integers(0, 4, shape, dtype=np.uint8),
    )
    return Report(
        name="norcal",
        model="U-Net++",
        metrics={
            "model": model,
            "baselines": {"mean": mean, "ridge": ridge, "prior": prior},
            "by": {"slope": rows, "height": rows},
            "provenance": {
                "height": {"surface": "dsm", "epoch": None},
                "sources": [{"href": "https://example.org/a.tiff"}, {"href": "b.tiff"}],
                "split": {"seed": 0, "bounds": [1, 2, 3]},
            },
        },
        maps=[maps],
        scatter=Scatter.of(reference + d, reference).dense(),
        errors=test.errors(),
        history=[
            {"epoch": e, "train_loss": 1 / (e + 1), "validation_rmse": abs(e - 3) + 2.5}
            for e in range(6)
        ],
        cost={
            "ingest": {"seconds": 12.34},
            "train": {"seconds": 3725.0, "pixels_per_second": 1234567.0, "device": "cpu"},
            "predict": {"seconds": 75.0, "pixels_per_second": None, "windows": 8},
        },
        notes=["Dates differ by six years."],
    )


@pytest.fixture(scope="module")
def page(report):
    return Page(render(report))


def bare(report):
    """The report without its figures, which take the time."""
    return dataclasses.replace(report, maps=(), scatter=None, errors=None, history=())


def only(report, split):
    """The bare report with one split left in the metrics."""

    def keep(by_split):
        return {split: by_split[split]} if split else {}

    metrics = dict(report.metrics)
    metrics["model"] = keep(metrics["model"])
    metrics["baselines"] = {name: keep(row) for name, row in metrics["baselines"].items()}
    return dataclasses.replace(bare(report), metrics=metrics)


CURVE = Seams(
    edge=512,
    pixels=10**6,
    halos=(0, 32, 64, 128),
    rms=(0.18, 0.012, 0.0034, 0.0),
    step=(0.56, 0.037, 0.0076, 2e-6),
    largest=(14.6, 0.83, 0.32, 0.009),
)


def predicted(report, **changes):
    """The bare report with an account of the prediction."""
    made = {"window_px": 1152, "halo_px": 64, "extra": 1.2656, "seams": CURVE, "limit": 0.021}
    return dataclasses.replace(bare(report), prediction=Prediction(**(made | changes)))


def test_the_prediction_tells_its_windows_and_seams(report):
    page = Page(render(predicted(report)))
    assert "windows of 1152 px, of which a halo of 64 px" in page.words
    assert "1.27 pixels computed for each pixel" in page.words
    assert "a step of 0.0076 m at seams, an RMS error of 0.0034 m beside the cut and" in page.words
    assert "1 % of the map's own RMSE is 0.021 m" in page.words
    assert len(page.images) == 1
    far = Page(render(predicted(report, halo_px=128))).words
    assert "a step of under 0.01 mm at seams" in far
    near = Page(render(predicted(report, halo_px=0))).words
    assert "a step of 0.56 m at seams" in near
    assert "seams may be seen" in near
    assert "seams may be seen" not in page.words + far


@pytest.mark.parametrize("changes", [{"seams": None}, {"halo_px": 96}, {"limit": None}])
def test_what_was_not_measured_is_not_told(report, changes):
    page = Page(render(predicted(report, **changes)))
    assert ("training measured" in page.words) == ("limit" in changes)
    assert "1 % of the map" not in page.words
    assert len(page.images) == ("seams" not in changes)
    assert "Estimate and truth" not in page.words


def test_estimate_and_truth_stand_side_by_side(report):
    about = {"shards": 40, "failed": 1, "windows": 6400, "workers": 4, "device": "cpu"}
    sessions = [
        {"estimate_seconds": 610.0, "seconds": 671.0, **about},
        {"estimate_seconds": None, "seconds": 9.1, "device": EVIL},
    ]
    page = Page(render(predicted(report, sessions=sessions)))
    assert page.row("1") == [
        *("1", "10 min 10 s", "11 min 11 s", "1.10", "40", "1", "6\u202f400", "4", "cpu")
    ]
    assert page.row("2") == ["2", "–", "9.1 s", "–", "–", "–", "–", "–", EVIL]


def test_zones_stand_beside_the_map_s_own_error(report):
    found = stats(np.full((10, 10), 1.5), np.zeros((10, 10))).summary()
    row = {"between": ["utm31n", "utm32n"], **found}
    metrics = {**report.metrics, "zones": [row]}
    page = Page(render(dataclasses.replace(bare(report), metrics=metrics)))
    rmse = report.metrics["model"]["test"]["rmse"]
    assert f"The map's own RMSE on test ground is {rmse:.2f} m" in page.words
    shown = page.row("utm31n and utm32n")
    assert shown[1:] == ["1.50", f"{150 / rmse:.0f} %", "0.00", "1.50", "+1.50", "+1.50", "100"]
    without = Page(render(dataclasses.replace(bare(report), metrics={**metrics, "zones": []})))
    assert "Where two zones meet" not in without.words


def test_novelty_is_a_map_and_a_table(report):
    test = report.metrics["model"]["test"]
    rows = [
        {"split": split, "lo": lo, "hi": hi, **test, "n": n}
        for split in ("test", "all")
        for lo, hi, n in ((0.0, 0.5, 600), (0.5, 1.0, 280), (1.0, 2.0, 100), (2.0, None, 20))
    ]
    novelty = np.full(report.maps[0].reference.shape, np.nan, np.float32)
    novelty[:20] = np.linspace(0, 9, novelty.shape[1])
    whole = dataclasses.replace(
        bare(report),
        maps=[
            dataclasses.replace(report.maps[0], novelty=novelty),
            dataclasses.replace(report.maps[0], novelty=np.full_like(novelty, np.nan)),
        ],
        metrics={**report.metrics, "by": {"novelty": rows}},
    )
    page = Page(render(whole))
    assert len(page.images) == 10
    assert "12 % of test ground has a novelty above 1" in page.words
    assert page.row("2 or more")[-1] == "20"
    assert page.row("0 to 0.5")[-1] == "600"


def test_one_epoch_is_no_curve(report):
    one = dataclasses.replace(bare(report), history=report.history[:1])
    assert "Learning" not in Page(render(one)).words


def test_the_page_asks_the_network_for_nothing(report):
    html = render(report)
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"srcset", "poster", "background"} & set(attributes)
        assert re.fullmatch(r"#\w+|[\w.]+", attributes.get("href", "#here"))
        assert attributes.get("src", "data:").startswith("data:")
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_the_figures_are_whole_pictures(page):
    assert len(page.images) == 4 + 3
    for source in page.images:
        kind, _, data = source.partition(";base64,")
        content = base64.b64decode(data)
        if kind == "data:image/png":
            picture = Image.open(io.BytesIO(content))
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(10**6)) > 4
        else:
            assert kind == "data:image/svg+xml"
            assert b"</svg>" in content
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_the_same_report_is_the_same_page(report):
    assert render(report) == render(report)


def test_every_metric_is_shown_and_defined(report, page):
    model = report.metrics["model"]
    labels = [row[0].removesuffix(" [m]") for row in page.rows]
    for name, meaning in GLOSSARY.items():
        label = next(x for x in labels if x.lower().split(" ")[0].replace("²", "2") == name)
        row = next(row for row in page.rows[-60:] if row[0].removesuffix(" [m]") == label)
        assert row[1] == format_metric(model["test"][name], name)
        assert " ".join(meaning.split()) in page.words
    assert "P90(|d|)" in page.words


def test_the_headline_says_how_wrong_the_map_is(report, page):
    test = report.metrics["model"]["test"]
    for number in (test["le68"], test["le90"], test["mean"]):
        assert f"{number:.2f} m" in page.words[:400]
    assert "too high" in page.words[:400]
    assert "50 % lower than that of ridge regression" in page.words
    assert "more accurate than the model" not in page.words
    assert "no test ground" not in page.words


def test_a_stronger_baseline_is_not_hidden(report):
    baselines = report.metrics["baselines"]
    swapped = {"model": baselines["ridge"], "baselines": {"prior": report.metrics["model"]}}
    words = Page(render(dataclasses.replace(bare(report), metrics=swapped))).words
    assert "100 % higher than that of the prior DEM" in words
    assert "On this ground the prior DEM is more accurate than the model." in words


def test_a_model_named_like_a_baseline_is_kept_apart(report):
    same = Page(render(dataclasses.replace(bare(report), model="ridge regression")))
    rmse = report.metrics["model"]["test"]["rmse"], report.metrics["baselines"]["ridge"]["test"]
    assert same.row("ridge regression")[1] == format_metric(rmse[0], "rmse")
    assert same.row("ridge regression (baseline)")[1] == format_metric(rmse[1]["rmse"], "rmse")


def test_the_best_of_each_column_is_bold(report):
    html = render(bare(report))
    rmse = format_metric(report.metrics["model"]["test"]["rmse"], "rmse")
    ridge = format_metric(report.metrics["baselines"]["ridge"]["test"]["rmse"], "rmse")
    assert f'<td class="best">{rmse}</td>' in html
    assert f'<td class="best">{ridge}</td>' not in html


def test_tables_by_class_show_the_test_rows_only(page):
    assert "Slope of the reference, test ground" in page.words
    assert [row[0] for row in page.rows].count("0 to 5°") == 1
    assert [row[0] for row in page.rows].count("5° or more") == 1
    assert [row[0] for row in page.rows].count("5 m or more") == 1


def test_provenance_is_flat_and_whole(page):
    assert page.row("height.surface") == ["height.surface", "dsm"]
    assert page.row("height.epoch") == ["height.epoch", "–"]
    assert page.row("sources.0.href") == ["sources.0.href", "https://example.org/a.tiff"]
    assert page.row("split.bounds") == ["split.bounds", "1, 2, 3"]
    assert ATTRIBUTION in page.words
    assert "trained with Copernicus DEM and GEDI" in page.words
    assert "Dates differ by six years." in page.words


def test_costs_are_durations_and_rates(page):
    assert page.row("ingest") == ["ingest", "12.3 s", "–", "–", "–"]
    assert page.row("train")[1:] == ["1 h 02 min", "1\u202f234\u202f567", "cpu", "–"]
    assert page.row("predict")[1:] == ["1 min 15 s", "–", "–", "8"]


def test_what_users_write_is_escaped(report):
    evil = dataclasses.replace(
        report,
        name=EVIL,
        model=EVIL,
        maps=[dataclasses.replace(report.maps[0], group=EVIL, crs=EVIL)],
        notes=[EVIL],
        cost={EVIL: {"seconds": 1.0}},
        metrics={**report.metrics, "provenance": {EVIL: EVIL}},
    )
    html = render(evil)
    assert EVIL not in html
    assert Page(html).words.count(EVIL) >= 9


def test_a_bare_report_renders(report):
    metrics = {"model": report.metrics["model"], "baselines": {}}
    page = Page(render(Report(name="bare", metrics=metrics)))
    assert page.images == []
    for title in ("Maps", "Learning", "Provenance", "What it cost", "Where the errors are"):
        assert title not in page.words


def test_without_a_prior(report):
    baselines = {"mean": report.metrics["baselines"]["mean"]}
    metrics = {**report.metrics, "baselines": baselines}
    words = Page(render(dataclasses.replace(bare(report), metrics=metrics))).words
    assert "the prior DEM" not in words
    assert "the mean height" in words


@pytest.mark.parametrize("left", ["validation", "train", "all"])
def test_without_test_ground_the_page_says_so(report, left):
    without = only(report, left)
    assert judged_split(without.metrics["model"]) == left
    words = Page(render(without)).words
    assert "There is no test ground that has both" in words
    assert f"{left} ground" in words


def test_nothing_to_compare(report):
    empty = {split: Stats.zero().summary() for split in ("test", "all")}
    nothing = np.full((40, 50), np.nan, np.float32)
    maps = Maps(
        group="epsg4326",
        crs="EPSG:4326",
        bounds=(0.0, 0.0, 1.0, 1.0),
        pixel=(0.5, 0.8),
        reference=nothing,
        predicted=nothing,
        difference=nothing,
    )
    empty_report = Report(
        name="empty",
        metrics={"model": empty, "baselines": {"mean": empty}, "by": {"slope": []}},
        maps=[maps],
        scatter=Scatter.zero().dense(),
        errors=Stats.zero().errors(),
        history=[{"epoch": 0, "train_loss": None, "validation_rmse": float("nan")}],
    )
    page = Page(render(empty_report))
    assert "there is no accuracy to report" in page.words
    assert page.row("RMSE [m]") == ["RMSE [m]", "–", "–"]
    assert len(page.images) == 3
    assert Page(render(only(report, None))).words.count("there is no accuracy to report") == 1


def test_flat_ground_and_a_perfect_map(report):
    flat = np.full((30, 30), 7.0, np.float32)
    summary = Stats.of(flat, flat).summary()
    maps = dataclasses.replace(
        report.maps[0], reference=flat, predicted=flat, difference=flat - flat, split=None
    )
    perfect = Report(
        name="flat",
        metrics={"model": {"test": summary}, "baselines": {"mean": {"test": summary}}},
        maps=[maps],
        scatter=Scatter.of(flat, flat).dense(),
        errors=Stats.of(flat, flat).errors(),
        history=[{"epoch": 0, "train_loss": 0.0, "validation_rmse": 0.0}],
    )
    words = Page(render(perfect)).words
    assert "neither too high nor too low" in words
    assert "nan" not in re.findall(r"\w+", words.lower())


def test_many_zones_do_not_swell_the_page(report):
    without = len(render(bare(report)))
    one = len(render(dataclasses.replace(bare(report), maps=report.maps))) - without
    six = len(render(dataclasses.replace(bare(report), maps=list(report.maps) * 6))) - without
    assert one < six < 5 * one


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (None, "rmse", "–"),
        (float("nan"), "rmse", "–"),
        (1234567, "n", "1\u202f234\u202f567"),
        (0.99999, "coverage", "99.9 %"),
        (1.0, "coverage", "100.0 %"),
        (0.29, "coverage", "29.0 %"),
        (-0.5, "mean", "−0.50"),
        (0.5, "mean", "+0.50"),
        (-0.001, "mean", "+0.00"),
        (12.345, "rmse", "12.35"),
        (-0.04, "r2", "−0.040"),
        (-0.0001, "r2", "0.000"),
    ],
)
def test_numbers_as_people_read_them(value, name, text):
    assert format_metric(value, name) == text
