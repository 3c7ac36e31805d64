"""The region file: every setting of a run, validated, with errors that name the nearest key.

Frozen pydantic models; they never open data and never read the environment.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from aeheight.errors import InputError

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Bounds = tuple[float, float, float, float]
Device = Literal["auto", "cpu", "gpu"]
Hrefs = str | Annotated[list[str], Field(min_length=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GridSettings(_Settings):
    """Where the pixels lie; left out where the tiles fix it."""

    crs: str
    """Such as `EPSG:32610`."""
    resolution: Annotated[float, Field(gt=0)]
    """Edge of a pixel in units of the CRS."""
    bounds: Bounds
    """West, south, east, north edges in the CRS; a whole number of pixels."""


class AccessSettings(_Settings):
    """How an object store lets readers in; credentials come from the environment, as usual."""

    anonymous: bool = False
    """Read a public bucket without credentials."""
    requester_pays: bool = False
    """Agree to pay for reading (S3: your account; Google: the project in GOOGLE_CLOUD_PROJECT)."""
    region: str | None = None
    """Of an S3 bucket, such as `us-west-2`, where the environment does not say."""


class EmbeddingSettings(_Settings):
    """Where the embeddings come from."""

    source: Literal["cog", "index", "mosaic", "earthengine"] = "cog"
    """What `href` is: AlphaEarth tiles; the index of all tiles (GeoParquet or CSV); the global Zarr
    mosaic in degrees; or float exports of Earth Engine."""
    href: Hrefs
    """File, list, glob, folder or URI; relative to the region file."""
    year: int | Annotated[list[int], Field(min_length=1)]
    """The year or years to read."""
    access: AccessSettings = AccessSettings()

    @property
    def years(self) -> tuple[int, ...]:
        """The years in order, each once."""
        return tuple(sorted({self.year} if isinstance(self.year, int) else set(self.year)))


class HeightSettings(_Settings):
    """Where a height model comes from, and what its heights mean."""

    source: Literal["raster", "stac"]
    href: Hrefs
    """File, list, glob, folder or URI of rasters, or a STAC catalogue, collection or item."""
    surface: Literal["dsm", "dtm"]
    """Surface model (with trees and roofs) or terrain model."""
    vertical_datum: str
    """Such as `EPSG:5773` (EGM96 height)."""
    epoch: str | None = None
    """When the heights were measured; recorded as unknown where not given."""
    nodata: float | None = None
    """The missing-value of files that do not declare one; NaN is always missing."""
    asset: str = "data"
    """STAC: the asset that holds the heights."""
    collection: str | None = None
    """STAC API: the collection to search."""
    convert: bool = True
    """The prior's heights are converted to the vertical datum of `height`; false leaves them."""
    access: AccessSettings = AccessSettings()


class CubeSettings(_Settings):
    """How the cube is cut."""

    shard: Positive = 1024
    """Edge of a shard, the unit of work and of writing, in pixels."""
    chunk: Positive = 256
    """Edge of a chunk, the unit of reading, in pixels."""
    halo: Natural = 128
    """Pixels that a group holds past the edge of its UTM zone, where another zone goes on."""

    @model_validator(mode="after")
    def _divides(self) -> "CubeSettings":
        if self.shard % self.chunk:
            raise ValueError(f"shard {self.shard} must be a multiple of chunk {self.chunk}")
        return self


class SplitSettings(_Settings):
    """Which ground trains, validates and tests: blocks of ground, never random patches."""

    block: Positive = 256
    """Edge of a block in pixels."""
    buffer: Natural = 32
    """Pixels kept unused between ground of different use."""
    test: Share | Bounds | str = 0.2
    """Share of the blocks, or bounds in the grid's CRS, or a GeoJSON file (degrees)."""
    validation: Share | Bounds | str = 0.1
    """The same, of the blocks that do not test."""
    seed: Natural = 0
    folds: Annotated[int, Field(ge=2)] | None = None
    """Parts of equal size that the blocks are dealt to: one of them tests, whatever `test` says."""
    fold: Natural = 0
    """Which of the `folds` tests, from 0."""

    @model_validator(mode="after")
    def _fold_exists(self) -> "SplitSettings":
        if self.folds is None and self.fold:
            raise ValueError(f"fold {self.fold} of how many? give split.folds, such as 5")
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds}: folds count from 0")
        return self


class ModelSettings(_Settings):
    """What is trained, and how."""

    architecture: Literal["ridge", "unet", "unetplusplus"] = "unetplusplus"
    encoder: str = "resnet18"
    """An encoder of segmentation-models-pytorch."""
    base: Literal["auto", "none", "ridge", "prior"] = "auto"
    """What the network corrects: nothing (absolute heights, as in the study), the ridge
    regression, or the prior; `auto` is the prior where there is one, else the ridge."""
    patch: Positive = 256
    """Edge of a training patch in pixels, a multiple of 32."""
    batch: Positive = 16
    """Patches in one optimiser step."""
    epochs: Positive = 50
    patches_per_epoch: Positive | None = None
    """None: as many as cover the training ground once, but 128 at least."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    patience: Positive = 10
    """Epochs without a better validation RMSE before training stops."""
    ridge_alpha: Annotated[float, Field(gt=0)] = 1e-3
    """Ridge penalty, as a share of the mean variance of a band."""
    seed: Natural = 0

    @model_validator(mode="after")
    def _fits_encoder(self) -> "ModelSettings":
        if self.architecture != "ridge" and self.patch % 32:
            raise ValueError(
                f"patch {self.patch} must be a multiple of 32 (the encoder's stride); "
                f"the next are {self.patch // 32 * 32 or 32} and {(self.patch // 32 + 1) * 32}"
            )
        return self


class PredictSettings(_Settings):
    """How a region is covered by the network's windows, and what runs the network."""

    window: Positive | None = None
    """Edge of a window in pixels; None: the halo, around the fewest pixels from 1024 on for which
    a window is at most 1.35 times the area, or around a part of `shard`, where that is given."""
    halo: Natural | None = None
    """Pixels cut from every side of a window's result; None: what training measured to suffice."""
    blend: Natural = 0
    """Pixels over which neighbouring windows are blended; 0 is a plain crop."""
    batch: Positive = 1
    """Windows in one forward pass; always filled, so that results do not depend on the cut."""
    shard: Positive | None = None
    """Edge of a shard of the map, a multiple of `cube.chunk`; None: the whole number of windows'
    kept cores that is no less than `cube.shard`, so that nothing is computed twice."""
    novelty: bool = True
    """Tell beside each height how far its embedding is from those that were trained on."""
    spread: bool = True
    """Tell beside each height half the width of its 90 % interval, where the model knows it."""
    device: Device = "auto"
    """`auto`: GPUs where workers have them; `gpu` refuses to begin without one."""
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of the network but its last layer; `auto` is float16 on a GPU, float32 on a CPU."""


class ExportSettings(_Settings):
    """How a map becomes files that every GIS opens."""

    map: Literal["heights", "calibrated"] = "heights"
    """Which of the run's maps: as predicted, or as `calibrate` corrected it."""
    tile: Positive = 8192
    """Largest edge of a file in pixels; a zone that is smaller is one file."""
    block: Annotated[int, Field(ge=128, le=1024, multiple_of=16)] = 512
    """Edge of a COG's internal blocks in pixels; larger ones would not fit into the memory that
    is planned for."""
    compress: Literal["deflate", "zstd"] = "deflate"
    """Deflate opens everywhere; zstd is quicker, and needs GDAL's of 2018 or later."""
    reference: bool = True
    """Also files of the cube's reference, and of the map's difference from it; false where the
    reference's licence forbids copies."""
    pyramids: bool = False
    """Also a Zarr pyramid of every zone, GeoZarr multiscales; once made, it is kept up."""
    area: Bounds | str | None = None
    """Bounds in degrees, or a GeoJSON file of polygons: plain GeoTIFFs of this area only, beside
    whatever was exported."""
    crs: str | None = None
    """Such as `EPSG:3035`: further files, a mosaic of all zones in this CRS, blended where zones
    meet."""
    resolution: Annotated[float, Field(gt=0)] | None = None
    """Edge of the mosaic's pixels in units of `crs`; None: that of the zones' pixels."""

    @model_validator(mode="after")
    def _resolution_of_a_mosaic(self) -> "ExportSettings":
        if self.resolution is not None and self.crs is None:
            raise ValueError("export.resolution is the mosaic's: give export.crs too")
        return self


class ClassSettings(_Settings):
    """A raster of classes, such as land cover, that the report is divided by."""

    href: Hrefs
    """File, list, glob, folder or URI of rasters of whole numbers."""
    nodata: int | None = None
    """The missing-value of files that do not declare one."""
    names: dict[int, str] = {}
    """What to call each value; others are `class 7`."""
    access: AccessSettings = AccessSettings()


CRITERIA = (
    *("slope", "roughness", "aspect", "height", "predicted", "novelty", "distance", "zone"),
    *("model", "scatter", "zones", "cell"),
)
"""Names that class rasters cannot have: the report's own."""


class EvaluateSettings(_Settings):
    """How the map is judged."""

    classes: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], ClassSettings] = {}
    """Class rasters by name: the report has a table by each."""
    block: Positive | None = None
    """Edge in pixels of the blocks of ground that confidence intervals are drawn from; None:
    `split.block`, or as many of those as errors go together over."""
    draws: Annotated[int, Field(ge=100)] = 1000
    """Draws of the bootstrap."""
    seed: Natural = 0
    """Of the draws."""

    @model_validator(mode="after")
    def _own_names(self) -> "EvaluateSettings":
        if taken := sorted(set(self.classes) & set(CRITERIA)):
            raise ValueError(f"classes: {taken[0]!r} is one of the report's own tables; rename it")
        return self


class RegionSettings(_Settings):
    """One run: one region file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    note: str | None = None
    """What a reader of the report must know first."""
    store: Annotated[str, Field(min_length=1)]
    """Folder (relative to where the command runs) or URI under which all results lie."""
    grid: GridSettings | None = None
    aoi: Bounds | str | None = None
    """Bounds in degrees, or a GeoJSON file of polygons: shards outside are not made."""
    embeddings: EmbeddingSettings
    height: HeightSettings | None = None
    prior: HeightSettings | None = None
    also: tuple[str, ...] = ()
    """Stores of other runs whose training and validation ground is trained on too."""
    cube: CubeSettings = CubeSettings()
    split: SplitSettings = SplitSettings()
    model: ModelSettings = ModelSettings()
    predict: PredictSettings = PredictSettings()
    export: ExportSettings = ExportSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _base_exists(self) -> "RegionSettings":
        if self.model.base == "prior" and self.prior is None:
            raise ValueError("model.base is prior, but the region has no prior: give one")
        return self

    @model_validator(mode="after")
    def _shard_holds_chunks(self) -> "RegionSettings":
        if (self.predict.shard or 0) % self.cube.chunk:
            raise ValueError(
                f"predict.shard {self.predict.shard} must be a multiple of cube.chunk "
                f"{self.cube.chunk}"
            )
        return self

    @property
    def base(self) -> Literal["none", "ridge", "prior"]:
        """`model.base` with `auto` resolved."""
        if self.model.base != "auto":
            return self.model.base
        return "prior" if self.prior else "ridge"

    def resolve(self, href: str) -> str:
        """An href as written to one that can be opened: relative ones start at the region file."""
        if "://" in href or Path(href).is_absolute():
            return href
        return str((self._folder / href).resolve())


def load_region(path: str | Path, overrides: Sequence[str] = ()) -> RegionSettings:
    """Read and validate a region file.

    Args:
        path: a YAML file.
        overrides: `key=value` with dotted keys (`model.epochs=3`); values are YAML.

    Raises:
        InputError: the file cannot be read, is no mapping, or has an unknown or wrong setting.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the region file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold settings (`name: ...`), not {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    try:
        settings = RegionSettings.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}:\n" + "\n".join(_explain(error))) from None
    settings._folder = path.resolve().parent
    return settings


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override!r}: write key=value, such as model.epochs=3")
    *parents, last = key.split(".")
    target = raw
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override!r}: {parent} is {child!r}, which has no keys")
        target = child
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: {value!r} is no valid YAML value") from error


def _explain(error: ValidationError) -> list[str]:
    lines: dict[str, str] = {}
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"] if not _is_variant(part))
        if problem["type"] == "extra_forbidden":
            known = _keys_at(problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            text = f"unknown key; {hint}"
        elif problem["type"] == "missing":
            text = "required, but not given"
        else:
            text = problem["msg"].removeprefix("Value error, ")
            text += "" if problem["type"] == "value_error" else f" (given: {problem['input']!r})"
        # A setting of several forms fails once a form: the first says enough.
        lines.setdefault(where, f"  {where}: {text}" if where else f"  {text}")
    return list(lines.values())


def _is_variant(part: int | str) -> bool:
    """Whether a part of pydantic's location names the member of a union, not a key."""
    return isinstance(part, str) and (
        part in ("float", "str", "int") or part.startswith(("tuple[", "list[", "constrained"))
    )


def _keys_at(location: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = RegionSettings
    for part in location:
        if str(part) not in model.model_fields:  # a name that the user gave
            continue
        annotation = model.model_fields[str(part)].annotation
        choices = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in choices if isinstance(c, type) and issubclass(c, BaseModel))
    return sorted(model.model_fields)


def fingerprint(value: object) -> str:
    """A short hash of anything that JSON can hold: the same settings, the same hash."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested settings, as lines `key: old -> new`."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
