"""The code against its formula, for every value that a byte can hold, and on real pixels."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st

from aeheight.embeddings import (
    BAND_NAMES,
    BANDS,
    NODATA,
    TileName,
    decode,
    decode_table,
    encode,
    parse_tile_name,
    valid,
)

CODES = np.arange(-128, 128, dtype=np.int16).astype(np.int8)
REAL = Path(__file__).parents[1] / "../shared/data/wisconsin_10m"
EXACT = REAL / "aef_wi_1km_2024_utm16n_int8_exact.tif"


def test_decoding_is_the_formula():
    assert np.isnan(decode(CODES)[0])
    for code, value in zip(CODES[1:], decode(CODES)[1:], strict=True):
        unit = int(code) / 127.5
        assert value == np.float32(np.sign(unit) * unit**2)
    assert decode(CODES).dtype == np.float32


def test_known_values():
    codes = np.array([0, 1, -1, 127, -127, 64], dtype=np.int8)
    expected = [0, 6.151e-5, -6.151e-5, 0.992172, -0.992172, 0.251965]
    np.testing.assert_allclose(decode(codes), expected, rtol=1e-4)


def test_encoding_gives_back_every_code():
    np.testing.assert_array_equal(encode(decode(CODES)), CODES)
    np.testing.assert_array_equal(encode(decode(CODES).astype(np.float64)), CODES)
    unit = CODES[1:] / 127.5
    np.testing.assert_array_equal(encode(np.sign(unit) * unit**2), CODES[1:])  # as exports hold it


def test_nodata_is_what_was_asked_for():
    assert decode(CODES, nodata=0.0)[0] == 0
    assert decode(CODES, nodata=-9.0)[0] == -9
    np.testing.assert_array_equal(decode(CODES, nodata=5.0)[1:], decode(CODES)[1:])
    assert encode(np.array([np.nan]))[0] == NODATA


def test_the_table_is_looked_up_by_the_unsigned_byte():
    table = decode_table()
    assert (table.shape, table.dtype) == ((256,), np.float32)
    np.testing.assert_array_equal(table[CODES.view(np.uint8)], decode(CODES))
    np.testing.assert_array_equal(table[CODES], decode(CODES))  # as negative indices count


@settings(deadline=None)
@given(st.floats(-1, 1))
def test_a_value_becomes_the_nearest_code(value):
    """Nearest in the space of the codes, where they are even."""
    code = int(encode(np.array(value)))
    unit = np.sign(value) * np.sqrt(abs(value)) * 127.5
    assert abs(code - unit) <= 0.5 + 1e-9
    assert code != NODATA


@pytest.mark.parametrize("value", [1.0, 1.5, 1e30, np.inf])
def test_what_lies_beyond_the_codes_is_clipped(value):
    assert encode(np.array([value, -value])).tolist() == [127, -127]


def test_shapes_and_views_are_kept():
    codes = np.random.default_rng(0).integers(-128, 128, (4, 6, 10), dtype=np.int8)
    assert decode(codes[:, ::-1, ::2]).shape == (4, 6, 5)
    np.testing.assert_array_equal(decode(codes[:, ::-1, ::2]), decode(codes)[:, ::-1, ::2])
    np.testing.assert_array_equal(
        encode(decode(codes).transpose(2, 0, 1)), codes.transpose(2, 0, 1)
    )


def test_a_pixel_is_there_or_not():
    codes = np.zeros((BANDS, 2, 3), dtype=np.int8)
    codes[:, 0, 1] = codes[:, 1, 2] = NODATA
    assert valid(codes).tolist() == [[True, False, True], [True, True, False]]


def test_bands_are_named():
    assert (BAND_NAMES[0], BAND_NAMES[63], len(BAND_NAMES)) == ("A00", "A63", BANDS)


@pytest.mark.parametrize(
    ("path", "year", "zone"),
    [
        ("annual/2024/10N/xcyo46pot2fg6a61t-0000008192-0000000000.tiff", 2024, "10N"),
        ("2017/1S/a.tiff", 2017, "1S"),
        ("gs://alphaearth_foundations/satellite_embedding/v1/annual/2018/60S/b.tiff", 2018, "60S"),
        ("/data/2020/2021/33N/c.tif", 2021, "33N"),
        ("10N/a.tiff", None, None),
        ("2024/10N", None, None),
        ("2024/10N/deeper/a.tiff", None, None),
        ("12024/10N/a.tiff", None, None),
        ("2024/10X/a.tiff", None, None),
        ("aef2021_900m_west.tif", None, None),
        ("", None, None),
    ],
)
def test_tile_names(path, year, zone):
    assert parse_tile_name(path) == TileName(year, zone)


@pytest.mark.skipif(not EXACT.exists(), reason="needs ../shared/data/wisconsin_10m")
def test_real_pixels_have_unit_length():
    with rasterio.open(EXACT) as source:
        codes = source.read()
    assert (codes.shape, codes.dtype) == ((BANDS, 99, 98), np.int8)
    there = valid(codes)
    np.testing.assert_array_equal((codes == NODATA).any(axis=0), ~there)
    length = np.linalg.norm(decode(codes)[:, there], axis=0)
    assert length.min() > 0.99
    assert length.max() < 1.01
    np.testing.assert_array_equal(encode(decode(codes)), codes)
