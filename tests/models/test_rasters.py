"""Thirty kinds of raster through whole decode and windows: equal pixels, and a plane of known brightness in each."""

from __future__ import annotations

import io
import itertools

import cv2
import numpy as np
import pytest
import rasterio
from PIL import Image

from models.errors import DataError, RecipeError
from models.images.decoding import image_size, read_image
from models.images.raster import WindowedImage
from models.images.rendering import (
    TURNS,
    Block,
    Rendering,
    depth_bounds,
    find_bounds,
    map_to_file,
    oriented,
    parse_rendering,
)
from models.images.windows import fills_little

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

HEIGHT, WIDTH = 150, 210
# A plane 40 pixels long on ground of another brightness, off the middle, so that every turn shows.
PLANE = np.zeros((HEIGHT, WIDTH), bool)
PLANE[20:60, 30:38] = PLANE[34:40, 14:54] = True
NOISE = np.random.default_rng(0).normal(0, 1, (3, HEIGHT, WIDTH))


def scene(ground: float, plane: float, noise: float, dtype: str, bands: int = 3) -> np.ndarray:
    """(bands, H, W): a plane of one brightness on noisy ground."""
    values = np.where(PLANE, plane, ground) + noise * NOISE[[i % 3 for i in range(bands)]]
    if np.dtype(dtype).kind in "iu":
        values = values.round().clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    return values.astype(dtype)


def tiff(path, values, mask=None, orientation=None, **options):
    """Write (bands, H, W) as a TIFF, with an orientation tag where one is given."""
    count, height, width = values.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype}
    profile |= {"tiled": True, "blockxsize": 64, "blockysize": 64}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile | options) as file:
        file.write(values)
        if mask is not None:
            file.write_mask(mask)
        if orientation:
            file.update_tags(TIFFTAG_ORIENTATION=str(orientation))
    return path


def rotated(path, values, orientation, **options):
    """As `tiff`, but stored so that it must be turned by its tag to look as it should."""
    swap, rows, columns = TURNS[orientation]
    stored = values[:, :: -1 if rows else 1, :: -1 if columns else 1]
    stored = stored.swapaxes(1, 2) if swap else stored
    tiff(path, np.ascontiguousarray(stored), **options)
    _set_orientation(path, orientation)
    return path


def _set_orientation(path, orientation):
    """GDAL writes no orientation tag: put one into the file's first directory, in place of a tag that nobody reads."""
    content = bytearray(path.read_bytes())
    offset = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[offset : offset + 2], "little")
    entries = [bytes(content[offset + 2 + 12 * i : offset + 14 + 12 * i]) for i in range(count)]
    entries.append(
        (274).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little") + bytes([orientation, 0, 0, 0])
    )
    entries.sort(key=lambda e: int.from_bytes(e[:2], "little"))
    # The directory has grown: it moves to the end of the file.
    content += b"\0" * (len(content) % 2)
    new = len(content)
    content += (count + 1).to_bytes(2, "little") + b"".join(entries) + b"\0\0\0\0"
    content[4:8] = new.to_bytes(4, "little")
    path.write_bytes(content)


def rgb8(ground=90, plane=230):
    return scene(ground, plane, 6, "uint8")


def palette(path):
    Image.fromarray(rgb8().transpose(1, 2, 0)).quantize(60).save(path)
    return path


def bilevel(path):
    Image.fromarray(np.where(PLANE, 255, 0).astype(np.uint8)).convert("1").save(path)
    return path


def cmyk(path):
    Image.fromarray(rgb8().transpose(1, 2, 0)).convert("CMYK").save(path)
    return path


def with_alpha(values):
    """A fourth band; transparent, with wild values, in one corner."""
    alpha = np.full((1, HEIGHT, WIDTH), np.iinfo(values.dtype).max, values.dtype)
    alpha[0, -30:, -30:] = 0
    wild = values.copy()
    wild[:, -30:, -30:] = np.iinfo(values.dtype).max
    return np.concatenate([wild, alpha])


def with_hole(values, nodata):
    """The lower right corner missing."""
    values = values.copy()
    values[:, -40:, -50:] = nodata
    return values


HOLE = np.full((HEIGHT, WIDTH), 255, np.uint8)
HOLE[-40:, -50:] = 0
RGB = {"photometric": "RGB"}

# kind -> maker; what each must show is asserted for all of them alike.
RASTERS = {
    "8-bit RGB": lambda p: tiff(p, rgb8(), **RGB),
    "8-bit gray": lambda p: tiff(p, rgb8()[:1]),
    "8-bit gray, white is 0": lambda p: tiff(p, 255 - rgb8()[:1], photometric="MINISWHITE"),
    "8-bit RGB, deflate, strips": lambda p: tiff(p, rgb8(), **RGB, compress="deflate", tiled=False, blockysize=16),
    "8-bit RGB, JPEG": lambda p: tiff(p, rgb8(), **RGB, compress="jpeg", interleave="pixel"),
    "8-bit RGBA": lambda p: tiff(p, with_alpha(rgb8()), **RGB, alpha="yes"),
    "8-bit RGB, nodata 255": lambda p: tiff(p, with_hole(rgb8(), 255), **RGB, nodata=255),
    "8-bit RGB, mask": lambda p: tiff(p, rgb8(), mask=HOLE, **RGB),
    "8-bit RGB, BigTIFF": lambda p: tiff(p, rgb8(), **RGB, bigtiff="YES"),
    "4-bit gray": lambda p: tiff(p, scene(4, 13, 0.5, "uint8", 1), nbits=4),
    "1-bit": bilevel,
    "palette": palette,
    "CMYK": cmyk,
    "signed 8-bit": lambda p: tiff(p, scene(-50, 60, 5, "int8")),
    "11-bit RGB": lambda p: tiff(p, scene(400, 1500, 20, "uint16"), **RGB, nbits=11),
    "11 bits in 16, RGB": lambda p: tiff(p, scene(400, 1500, 20, "uint16"), **RGB),
    "12 bits in 16, gray": lambda p: tiff(p, scene(900, 3500, 40, "uint16", 1)),
    "8 bits in 16, RGB": lambda p: tiff(p, scene(90, 230, 6, "uint16"), **RGB),
    "16-bit RGB": lambda p: tiff(p, scene(20000, 60000, 900, "uint16"), **RGB),
    "16-bit RGBA": lambda p: tiff(p, with_alpha(scene(400, 1500, 20, "uint16")), **RGB, alpha="yes"),
    "16-bit gray, white is 0": lambda p: tiff(p, 65535 - scene(20000, 60000, 900, "uint16", 1), photometric="MINISWHITE"),
    "16-bit, 8 bands": lambda p: tiff(p, scene(400, 1500, 20, "uint16", 8)),
    "16-bit, nodata 0": lambda p: tiff(p, with_hole(scene(400, 1500, 20, "uint16"), 0), **RGB, nodata=0),
    "signed 16-bit, nodata -9999": lambda p: tiff(p, with_hole(scene(-300, 900, 20, "int16"), -9999), nodata=-9999),
    "32-bit whole": lambda p: tiff(p, scene(1e6, 4e6, 2e4, "uint32", 1)),
    "signed 32-bit": lambda p: tiff(p, scene(-1e6, 4e6, 2e4, "int32")),
    "float 0 to 1": lambda p: tiff(p, scene(0.2, 0.8, 0.01, "float32")),
    "float reflectance with NaN": lambda p: tiff(p, with_hole(scene(0.02, 0.4, 0.004, "float32"), np.nan)),
    "float with nodata": lambda p: tiff(p, with_hole(scene(0.2, 0.8, 0.01, "float32"), -3.4e38), nodata=-3.4e38),
    "double": lambda p: tiff(p, scene(200, 8000, 50, "float64", 1)),
    "8-bit RGB, turned (6)": lambda p: rotated(p, rgb8(), 6, **RGB),
    "16-bit RGB, turned (8)": lambda p: rotated(p, scene(400, 1500, 20, "uint16"), 8, **RGB),
    "8-bit gray, mirrored (5)": lambda p: rotated(p, rgb8()[:1], 5),
    "8-bit RGB, upside down (3)": lambda p: rotated(p, rgb8(), 3, **RGB),
}
# A JPEG blurs the plane's edge.
SHARP = [kind for kind in RASTERS if "JPEG" not in kind]


@pytest.mark.parametrize("kind", RASTERS)
def test_windows_are_parts_of_the_whole_and_show_the_plane(kind, tmp_path):
    path = RASTERS[kind](tmp_path / "a.tif")
    whole, image = read_image(path), WindowedImage(path)
    assert whole.dtype == np.uint8
    assert image.shape == whole.shape == (HEIGHT, WIDTH, 3)
    assert image_size(path) == (HEIGHT, WIDTH)
    assert (image[:, :] == whole).all()
    assert (read_image(path.read_bytes()) == whole).all()
    for y1, y2, x1, x2 in ((0, 64, 0, 64), (50, 149, 3, 210), (149, 400, 209, 500), (10, 10, 5, 9)):
        assert np.array_equal(image[y1:y2, x1:x2], whole[y1:y2, x1:x2])
    inner = cv2.erode(PLANE.astype(np.uint8), np.ones((5, 5))).astype(bool)
    outer = ~cv2.dilate(PLANE.astype(np.uint8), np.ones((5, 5))).astype(bool)
    outer[-40:, -50:] = False
    assert whole[inner].mean() - whole[outer].mean() > 100, (whole[inner].mean(), whole[outer].mean())
    assert whole[inner].mean() > 180
    if "nodata" in kind or "NaN" in kind or "mask" in kind:
        assert not whole[-40:, -50:].any()
        assert whole[:-40].any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_looks_the_same(orientation, tmp_path):
    upright = read_image(tiff(tmp_path / "upright.tif", scene(400, 1500, 20, "uint16"), **RGB))
    turned = rotated(tmp_path / "turned.tif", scene(400, 1500, 20, "uint16"), orientation, **RGB)
    assert (read_image(turned) == upright).all()
    image = WindowedImage(turned)
    for y1, y2, x1, x2 in ((0, 40, 0, 50), (100, 150, 7, 210), (33, 34, 209, 210)):
        assert (image[y1:y2, x1:x2] == upright[y1:y2, x1:x2]).all()
    small = image.shrunk(75, 105).astype(int)
    assert np.abs(small - cv2.resize(upright, (105, 75), interpolation=cv2.INTER_AREA)).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_of_a_turned_image_are_found_in_its_file(orientation):
    stored = np.arange(6).reshape(2, 3)
    shown = oriented(stored, orientation)
    a, b, c, d, e, f = map_to_file(*shown.shape, orientation)
    for y, x in itertools.product(range(shown.shape[0]), range(shown.shape[1])):
        column, row = a * (x + 0.5) + b * (y + 0.5) + c, d * (x + 0.5) + e * (y + 0.5) + f
        assert stored[int(row), int(column)] == shown[y, x]


def png(values: np.ndarray) -> bytes:
    return cv2.imencode(".png", values)[1].tobytes()


@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize(("ground", "plane", "noise"), [(400, 1500, 20), (90, 230, 6), (20000, 60000, 900)])
def test_a_16_bit_png_shows_what_a_tiff_of_the_same_values_shows(bands, ground, plane, noise, tmp_path):
    values = scene(ground, plane, noise, "uint16", min(bands, 3))
    options = RGB if bands > 1 else {}
    if bands == 4:
        values, options = with_alpha(values), {**RGB, "alpha": "yes"}
    expected = read_image(tiff(tmp_path / "a.tif", values, **options))
    bgr = values[[2, 1, 0, *range(3, bands)]] if bands > 1 else values
    assert (read_image(png(bgr.transpose(1, 2, 0))) == expected).all()


def test_one_hot_pixel_changes_little():
    values = scene(90, 230, 6, "uint16", 1)[0]
    hot = values.copy()
    hot[0, 0] = 65535
    assert np.abs(read_image(png(values)).astype(int) - read_image(png(hot)))[1:].max() <= 2


def test_a_fixed_range_makes_tiles_of_one_scene_alike():
    values = scene(400, 1500, 20, "uint16", 1)[0]
    fixed = Rendering(range=(0, 2047))
    whole = read_image(png(values), fixed)
    assert (read_image(png(np.ascontiguousarray(values[:70, :80])), fixed) == whole[:70, :80]).all()
    assert whole[PLANE].mean() == pytest.approx(1500 / 2047 * 255, abs=2)
    assert read_image(png(values), Rendering(range="depth")).max() <= 7


def test_8_bit_values_stay_as_they_are_unless_a_range_is_given():
    dark = scene(20, 40, 1, "uint8").transpose(1, 2, 0)
    content = png(np.ascontiguousarray(dark[:, :, ::-1]))
    assert (read_image(content) == dark).all()
    stretched = read_image(content, Rendering(range="percentile"))
    assert stretched[PLANE].mean() - stretched[~PLANE].mean() > 150
    assert (read_image(content, Rendering(range=(0, 51))) == (dark * 5.0).clip(0, 255)).all()


def test_bands_are_chosen(tmp_path):
    values = np.stack([np.full((HEIGHT, WIDTH), v, np.uint8) for v in (10, 20, 30, 40)])
    path = tiff(tmp_path / "a.tif", values)
    assert read_image(path)[0, 0].tolist() == [10, 20, 30]
    assert read_image(path, Rendering(bands=(4, 3, 2)))[0, 0].tolist() == [40, 30, 20]
    assert read_image(path, Rendering(bands=(4,)))[0, 0].tolist() == [40, 40, 40]
    assert WindowedImage(path, Rendering(bands=(4, 3, 2)))[:1, :1].tolist() == [[[40, 30, 20]]]
    photo = io.BytesIO()
    Image.fromarray(values[:3].transpose(1, 2, 0)).save(photo, "PNG")
    assert read_image(photo.getvalue(), Rendering(bands=(3, 2, 1)))[0, 0].tolist() == [30, 20, 10]
    with pytest.raises(DataError, match=r"has 3 bands, --bands asks for band 4"):
        read_image(photo.getvalue(), Rendering(bands=(4, 3, 2)))
    with pytest.raises(DataError, match=r"a\.tif: has 4 bands, --bands asks for band 5"):
        WindowedImage(path, Rendering(bands=(5,)))


def test_bands_named_by_the_file_come_first(tmp_path):
    from rasterio.enums import ColorInterp as Colour

    values = np.stack([np.full((HEIGHT, WIDTH), v, np.uint8) for v in (10, 20, 30, 40)])
    path = tiff(tmp_path / "a.tif", values)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [Colour.undefined, Colour.blue, Colour.green, Colour.red]
    assert read_image(path)[0, 0].tolist() == [40, 30, 20]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("value", [0, 7])
def test_an_image_of_one_value_is_no_error(dtype, value, tmp_path):
    image = read_image(tiff(tmp_path / "a.tif", np.full((3, HEIGHT, WIDTH), value, dtype)))
    assert len(np.unique(image)) == 1


def test_an_image_that_is_missing_everywhere_is_black(tmp_path):
    path = tiff(tmp_path / "a.tif", np.full((1, HEIGHT, WIDTH), np.nan, np.float32))
    assert not read_image(path).any()
    path = tiff(tmp_path / "b.tif", np.full((1, HEIGHT, WIDTH), 9, np.uint16), nodata=9)
    assert not WindowedImage(path)[:, :].any()


def test_complex_values_and_damage_say_so(tmp_path):
    with pytest.raises(DataError, match=r"c\.tif: complex64 values have no RGB reading"):
        read_image(tiff(tmp_path / "c.tif", np.zeros((1, HEIGHT, WIDTH), np.complex64)))
    for content in (b"II*\0", b"II*\0 nonsense", b"MM\0*\0\0\0\x08\xff\xff", b"II+\0\x08\0\0\0"):
        (tmp_path / "x.tif").write_bytes(content)
        for call in (read_image, image_size, WindowedImage):
            with pytest.raises(DataError, match=r"x\.tif"):
                call(tmp_path / "x.tif")
        with pytest.raises(DataError, match="image bytes"):
            read_image(content)


def test_the_sampled_range_does_not_depend_on_how_the_file_is_read(monkeypatch):
    monkeypatch.setattr("models.images.rendering.MOST_PIXELS", 1000)
    values = scene(0.2, 0.8, 0.05, "float32")
    none = np.zeros((3, HEIGHT, WIDTH), bool)

    def bounds(rows, columns, skip=0):
        pieces = [
            Block(values[:, y : y + rows, x : x + columns], none[:, y : y + rows, x : x + columns], y, x)
            for y in range(skip, HEIGHT, rows)
            for x in range(skip, WIDTH, columns)
        ]
        return find_bounds(Rendering(), values.dtype, None, pieces, (HEIGHT, WIDTH))

    assert bounds(HEIGHT, WIDTH) == bounds(37, 51) == bounds(1, WIDTH)
    assert bounds(HEIGHT, WIDTH) != bounds(HEIGHT, WIDTH, 1)


def test_the_percentiles_are_those_of_numpy():
    values = np.random.default_rng(1).integers(100, 3000, (3, 200, 200)).astype(np.uint16)
    low, high = find_bounds(
        Rendering(), values.dtype, None, [Block(values, np.zeros((3, 200, 200), bool), 0, 0)], (200, 200)
    )
    assert low == pytest.approx(np.percentile(values, 0.5), abs=1)
    assert high == pytest.approx(np.percentile(values, 99.5), abs=1)


def test_depths():
    assert depth_bounds(np.dtype("uint16")) == (0, 65535)
    assert depth_bounds(np.dtype("uint8"), 4) == (0, 15)
    assert depth_bounds(np.dtype("int8")) == (0, 127)


def test_command_line_texts():
    assert parse_rendering("0,2047", None).range == (0, 2047)
    assert parse_rendering("depth", "3").bands == (3,)
    base = Rendering(range=(0, 9), bands=(4, 3, 2))
    assert parse_rendering(None, None, base) == base
    assert parse_rendering(None, "auto", base) == Rendering(range=(0, 9))
    for value, bands in (
        ("9,0", None),
        ("1,1", None),
        ("0,inf", None),
        ("wide", None),
        (None, "1,2"),
        (None, "0"),
        (None, "a,b,c"),
    ):
        with pytest.raises(RecipeError, match=r"--(range|bands) .*expected"):
            parse_rendering(value, bands)


def test_what_fills_little_of_its_range_is_noticed(tmp_path):
    eleven = tiff(tmp_path / "a.tif", scene(400, 1500, 20, "uint16"), **RGB)
    for read in (read_image, WindowedImage):
        assert fills_little(read(eleven, Rendering(range="depth")))
        assert not fills_little(read(eleven))
        assert not fills_little(read(eleven, Rendering(range=(0, 2047))))
        assert fills_little(read(tiff(tmp_path / "b.tif", scene(3, 7, 0.3, "uint8"), **RGB)))
        assert not fills_little(read(tiff(tmp_path / "c.tif", np.zeros((3, HEIGHT, WIDTH), np.uint8), **RGB)))


@pytest.mark.parametrize("name", ["GTIFF_DIR:1:x.tif", "http:x.tif", "a!b.tif", "ü ?#.tif"])
def test_names_that_gdal_takes_for_something_else_are_files(name, tmp_path, monkeypatch):
    tiff(tmp_path / "a.tif", rgb8(), **RGB).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert read_image(name).shape == (HEIGHT, WIDTH, 3)


def test_no_other_format_is_opened_as_a_raster(tmp_path):
    tiff(tmp_path / "a.tif", rgb8(), **RGB)
    (tmp_path / "a.vrt.tif").write_text(
        f'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{tmp_path / 'a.tif'}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    for read in (read_image, WindowedImage):
        with pytest.raises(DataError, match=r"a\.vrt\.tif"):
            read(tmp_path / "a.vrt.tif")


def test_nodata_in_one_band_hides_no_plane(tmp_path):
    """Each band may have its own holes: 0 is nodata, and the first band is 0 where the plane is."""
    values = scene(400, 1500, 20, "uint16")
    values[0][PLANE] = 0
    path = tiff(tmp_path / "one.tif", values, photometric="RGB", nodata=0)
    image = read_image(path)
    assert (image[PLANE][:, 0] == 0).all()
    assert image[PLANE][:, 1:].min() > 200 > 60 > image[~PLANE].max()
    assert np.array_equal(WindowedImage(path)[0:HEIGHT, 0:WIDTH], image)
