"""The region file: what the contract promises, and what an error says of a slip."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from aeheight.errors import InputError
from aeheight.settings import (
    CubeSettings,
    ModelSettings,
    PredictSettings,
    RegionSettings,
    SplitSettings,
    differences,
    fingerprint,
    load_region,
)

CONTRACT = """
name: norcal
store: runs/norcal                 # folder or URI: all that the run makes lies under it
grid: {crs: EPSG:32610, resolution: 900, bounds: [403200, 4279500, 616500, 4431600]}
embeddings: {source: cog, href: ../../../shared/data/norcal_900m/aef2021_900m_west.tif, year: 2021}
height: {source: raster, href: ../../../shared/data/norcal_900m/srtm3_900m_west.tif, surface: dsm, \
vertical_datum: EPSG:5773}
prior: null                        # or a source like height: a coarse DEM that the model corrects
split: {block: 20, buffer: 2, test: 0.2, validation: 0.1, seed: 0}     # pixels; blocks of ground
model: {architecture: unetplusplus, encoder: resnet18, patch: 64, epochs: 30, learning_rate: 1.0e-3}
predict: {window: 256, halo: 64, batch: 8}
"""
SMALL = """
name: small
store: runs/small
embeddings: {source: cog, href: tiles, year: 2021}
"""
TRACKED = sorted((Path(__file__).parents[1] / "pipelines/regions").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    """A region from text and overrides."""

    def from_text(text, *overrides):
        path = tmp_path / "region.yaml"
        path.write_text(text, encoding="utf-8")
        return load_region(path, overrides)

    return from_text


# --- what is promised --------------------------------------------------------------------------


def test_the_contract_loads(load):
    region = load(CONTRACT)
    assert region.name == "norcal"
    assert region.store == "runs/norcal"
    assert region.grid.bounds == (403200, 4279500, 616500, 4431600)
    assert (region.grid.crs, region.grid.resolution) == ("EPSG:32610", 900)
    assert region.embeddings.years == (2021,)
    assert (region.height.surface, region.height.vertical_datum) == ("dsm", "EPSG:5773")
    assert region.height.epoch is None
    assert region.prior is None
    assert region.split == SplitSettings(block=20, buffer=2, test=0.2, validation=0.1, seed=0)
    assert (region.model.patch, region.model.epochs) == (64, 30)
    assert region.model.learning_rate == 1e-3
    assert region.predict == PredictSettings(window=256, halo=64, batch=8)


@pytest.mark.parametrize("path", TRACKED, ids=lambda path: path.name)
def test_every_tracked_region_loads(path):
    assert load_region(path).name == path.stem.replace("_", "-")


def test_there_are_tracked_regions():
    assert {"demo.yaml", "norcal.yaml"} <= {path.name for path in TRACKED}


def test_little_is_required(load):
    region = load(SMALL)
    for part in ("grid", "aoi", "height", "prior"):
        assert getattr(region, part) is None
    assert region.cube == CubeSettings()
    assert region.model == ModelSettings()


@pytest.mark.parametrize("form", [CubeSettings, SplitSettings, ModelSettings, PredictSettings])
def test_every_default_would_be_accepted_if_it_were_given(form):
    """Defaults are not validated by pydantic itself."""
    assert form.model_validate(form().model_dump()) == form()
    assert form.model_validate(json.loads(json.dumps(form().model_dump(mode="json")))) == form()


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("embeddings.source", ["cog", "index", "mosaic", "earthengine"]),
        ("height.source", ["raster", "stac"]),
        ("height.surface", ["dsm", "dtm"]),
        ("model.architecture", ["ridge", "unet", "unetplusplus"]),
        ("model.base", ["auto", "none", "ridge"]),
        ("split.test", [0, 0.0, 0.5, 1, 1.0, "half.geojson"]),
        ("height.href", ["a.tif", "dsm/*.tif", "s3://bucket/dsm"]),
    ],
)
def test_what_may_be_given(load, key, values):
    for value in values:
        region = load(CONTRACT, f"{key}={value}")
        part, name = key.split(".")
        assert getattr(getattr(region, part), name) == value


def test_settings_of_several_forms(load):
    region = load(SMALL, "embeddings.year=[2023, 2021, 2023]", "embeddings.href=[a, b]")
    assert region.embeddings.years == (2021, 2023)
    assert region.embeddings.href == ["a", "b"]
    region = load(SMALL, "split.test=[0, 0, 10, 20.5]", "split.validation=v.geojson")
    assert region.split.test == (0, 0, 10, 20.5)
    assert region.split.validation == "v.geojson"
    assert load(SMALL, "aoi=[-1, 44, 1, 45]").aoi == (-1, 44, 1, 45)


@pytest.mark.parametrize(
    ("overrides", "base"),
    [
        ([], "ridge"),
        (["prior={source: raster, href: p, surface: dtm, vertical_datum: EPSG:3855}"], "prior"),
        (["model.base=none"], "none"),
    ],
)
def test_what_the_model_corrects(load, overrides, base):
    assert load(CONTRACT, *overrides).base == base


# --- slips -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "  modle: unknown key; did you mean 'model'?"),
        ("split: {tset: 0.2}", "  split.tset: unknown key; did you mean 'test'?"),
        ("model: {learning-rate: 1}", "model.learning-rate: unknown key; did you mean 'learning_r"),
        ("grid: {crs: a, resolution: 1, bound: [0, 0, 1, 1]}", "grid.bound: unknown key; did you"),
        ("prior: {year: 3}", "prior.year: unknown key; known: access, asset, collection, convert"),
        ("zzz: 1", "zzz: unknown key; known: also, aoi, cube, embeddings, evaluate, export, grid"),
    ],
)
def test_an_unknown_key_names_the_nearest(load, text, message):
    with pytest.raises(InputError) as error:
        load(SMALL + text)
    assert message in str(error.value)
    assert "region.yaml" in str(error.value)


def test_a_letter_amiss_anywhere_names_the_key_that_was_meant(load):
    for part in ("", "grid", "height", "split", "model", "predict"):
        for key in yaml.safe_load(CONTRACT)[part] if part else ["store", "embeddings", "predict"]:
            for place in range(len(key) if len(key) > 3 else 0):
                raw = yaml.safe_load(CONTRACT)
                target = raw[part] if part else raw
                slip = f"{key[:place]}q{key[place + 1 :]}"
                target[slip] = target.pop(key)
                with pytest.raises(InputError) as error:
                    load(yaml.safe_dump(raw))
                line = f"  {part}{'.' * bool(part)}{slip}: unknown key; did you mean {key!r}?"
                assert line in str(error.value).splitlines()


@pytest.mark.parametrize(
    ("override", "where", "what"),
    [
        ("model.epochs=0", "model.epochs", "greater than 0 (given: 0)"),
        ("model.epochs=many", "model.epochs", "(given: 'many')"),
        ("model.architecture=vit", "model.architecture", "'unetplusplus' (given: 'vit')"),
        ("model.learning_rate=0", "model.learning_rate", "(given: 0)"),
        ("model.learning_rate=.nan", "model.learning_rate", "(given: nan)"),
        ("model.seed=-1", "model.seed", "(given: -1)"),
        ("model.patch=40", "model", "patch 40 must be a multiple of 32 (the encoder's stride); "
         "the next are 32 and 64"),
        ("model.patch=20", "model", "the next are 32 and 32"),
        ("model=3", "model", "(given: 3)"),
        ("split.seed=-1", "split.seed", "(given: -1)"),
        ("split.test=1.5", "split.test", "less than or equal to 1 (given: 1.5)"),
        ("split.validation=-0.1", "split.validation", "(given: -0.1)"),
        ("split.block=0", "split.block", "(given: 0)"),
        ("split.buffer=-1", "split.buffer", "(given: -1)"),
        ("cube.shard=100", "cube", "shard 100 must be a multiple of chunk 256"),
        ("cube.chunk=0", "cube.chunk", "(given: 0)"),
        ("grid.resolution=0", "grid.resolution", "(given: 0)"),
        ("grid.resolution=.inf", "grid.resolution", "(given: inf)"),
        ("grid.bounds=[0, 0, .inf, 1]", "grid.bounds.2", "(given: inf)"),
        ("grid.bounds=[0, 0, 1]", "grid.bounds.3", "required, but not given"),
        ("grid.bounds=[0, 0, 1, 2, 3]", "grid.bounds", "(given: [0, 0, 1, 2, 3])"),
        ("height.surface=chm", "height.surface", "'dsm' or 'dtm' (given: 'chm')"),
        ("height.nodata=.nan", "height.nodata", "finite number (given: nan)"),
        ("height.href=[]", "height.href", "(given: [])"),
        ("height={source: raster, href: a}", "height.surface", "required, but not given"),
        ("height={source: raster, href: a}", "height.vertical_datum", "required, but not given"),
        ("embeddings.source=zarr", "embeddings.source", "(given: 'zarr')"),
        ("embeddings.year=[]", "embeddings.year", "(given: [])"),
        ("embeddings.year=last", "embeddings.year", "(given: 'last')"),
        ("predict.window=64.5", "predict.window", "(given: 64.5)"),
        ("predict.halo=-1", "predict.halo", "(given: -1)"),
        ("predict.batch=0", "predict.batch", "(given: 0)"),
        ("name=../up", "name", "(given: '../up')"),
        ("store=null", "store", "(given: None)"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_key(load, override, where, what):
    with pytest.raises(InputError) as error:
        load(CONTRACT, override)
    lines = str(error.value).splitlines()[1:]
    assert any(line.startswith(f"  {where}: ") and line.endswith(what) for line in lines), lines
    assert "Value error" not in str(error.value)


def test_a_prior_is_needed_to_correct_one(load):
    with pytest.raises(InputError, match=r"model\.base is prior, .* has no prior: give"):
        load(CONTRACT, "model.base=prior")


def test_every_slip_is_told_at_once(load):
    with pytest.raises(InputError) as error:
        load("store: 3\nembeddings: {href: a}\nheigth: null\n")
    lines = {line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]}
    assert lines == {"name", "store", "embeddings.year", "heigth"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must hold settings \(`name: ...`\), not NoneType"),
        ("- a\n- b", "must hold settings .*, not list"),
        ("norcal", "must hold settings .*, not str"),
        ("name: [", "is no valid YAML"),
        ("name: {a: b", "is no valid YAML"),
        ("1: 3", "1: Keys should be strings"),
    ],
)
def test_what_is_no_region_file_is_bad_input(load, text, message):
    with pytest.raises(InputError, match=message):
        load(text)


def test_bytes_that_are_no_text_are_bad_input(tmp_path):
    path = tmp_path / "region.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(InputError, match="is no valid YAML"):
        load_region(path)


def test_a_file_that_cannot_be_read_is_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the region file .*missing\.yaml: No such"):
        load_region(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="cannot read the region file"):
        load_region(tmp_path)


# --- overrides ---------------------------------------------------------------------------------


def test_overrides_reach_any_depth_and_the_last_one_counts(load):
    region = load(CONTRACT, "model.epochs=3", "name=other", "model.epochs=4", "cube.shard=512")
    assert (region.name, region.model.epochs, region.cube.shard) == ("other", 4, 512)
    assert region.model.patch == 64


def test_overrides_are_yaml(load):
    assert load(CONTRACT, "height=null").height is None
    assert load(CONTRACT, "height.epoch='2019'").height.epoch == "2019"
    assert load(CONTRACT, "height.href=a=b.tif").height.href == "a=b.tif"
    assert load(SMALL, "model={epochs: 7}").model.epochs == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.epochs", "--set 'model.epochs': write key=value, such as model.epochs=3"),
        ("=3", "--set '=3': write key=value"),
        ("name.first=a", "--set 'name.first=a': name is 'norcal', which has no keys"),
        ("prior.href=a", "--set 'prior.href=a': prior is None, which has no keys"),
        ("model.epochs=[", r"--set 'model.epochs=\[': '\[' is no valid YAML value"),
        ("model.epoch=3", "model.epoch: unknown key; did you mean 'epochs'"),
        ("modle.epochs=3", "modle: unknown key; did you mean 'model'"),
    ],
)
def test_an_override_that_cannot_be_is_bad_input(load, override, message):
    with pytest.raises(InputError, match=message):
        load(CONTRACT, override)


# --- hrefs -------------------------------------------------------------------------------------


def test_relative_hrefs_start_at_the_region_file(load, tmp_path, monkeypatch):
    region = load(SMALL)
    assert region.resolve("tiles/a.tif") == str(tmp_path / "tiles/a.tif")
    assert region.resolve("../a*.tif") == str(tmp_path.parent / "a*.tif")
    for href in ("/data/a.tif", "s3://bucket/a.tif", "https://host/a/catalog.json"):
        assert region.resolve(href) == href
    monkeypatch.chdir(tmp_path)
    region = load_region("region.yaml")
    monkeypatch.chdir(tmp_path.parent)
    assert region.resolve("a") == str(tmp_path / "a")
    assert load_region(f"{tmp_path.name}/region.yaml").resolve("a") == str(tmp_path / "a")


# --- values ------------------------------------------------------------------------------------


def test_settings_cannot_be_changed(load):
    region = load(CONTRACT)
    for part, name in ((region, "name"), (region.grid, "crs"), (region.model, "epochs")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, 3)


def test_the_same_settings_are_equal_and_differ_with_any_of_them(load):
    assert load(CONTRACT) == load(CONTRACT)
    assert load(CONTRACT) != load(CONTRACT, "model.epochs=31")


def test_settings_survive_json(load):
    region = load(CONTRACT, "split.test=[0, 0, 1, 1]", "embeddings.year=[2020, 2021]")
    again = RegionSettings.model_validate_json(json.dumps(region.model_dump(mode="json")))
    assert again.model_dump() == region.model_dump()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), json_values), st.randoms())
def test_a_fingerprint_is_that_of_the_content(value, random):
    keys = list(value)
    random.shuffle(keys)
    again = json.loads(json.dumps({key: value[key] for key in keys}))
    assert fingerprint(again) == fingerprint(value)
    assert fingerprint(value | {"more": 1}) != fingerprint(value | {"more": 2})
    assert len(fingerprint(value)) == 16


def test_a_fingerprint_is_known():
    """Receipts are compared with what earlier versions wrote."""
    assert fingerprint({"b": [1, 2.5, None], "a": {"é": "x"}}) == "04ad78a1b4d8b224"


def test_what_json_cannot_hold_has_no_fingerprint():
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


def test_differences_name_keys_and_both_values():
    old = {"a": 1, "b": {"c": [1], "d": {"e": None}}, "f": "x", "h": {"i": 1}}
    new = {"a": 1, "b": {"c": [2], "d": {"e": 0}}, "g": "y", "h": 3}
    assert differences(old, new) == [
        "b.c: [1] -> [2]",
        "b.d.e: None -> 0",
        "f: 'x' -> None",
        "g: None -> 'y'",
        "h: {'i': 1} -> 3",
    ]


@settings(deadline=None)
@given(*[st.dictionaries(st.text(max_size=3), json_values)] * 2)
def test_differences_are_found_both_ways_and_only_where_there_are_any(one, other):
    assert differences(one, one) == []
    assert len(differences(one, other)) == len(differences(other, one))
    assert bool(differences(one | {"x": 1}, other | {"x": 2}))
