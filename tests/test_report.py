import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from aeheight.metrics import GLOSSARY, Scatter, Stats
from aeheight.report import ATTRIBUTION, Maps, Report, format_metric, judged_split, render

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


def test_the_page_asks_the_network_for_nothing(report):
    html = render(report)
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"href", "srcset", "poster", "background"} & set(attributes)
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
    assert [row[0] for row in page.rows].count("5° and more") == 1
    assert [row[0] for row in page.rows].count("5 m and more") == 1


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
    assert "There is no test ground with predictions" in words
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
