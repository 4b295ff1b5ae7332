"""Captioned pictures in Parquet files, and in data sets of Hugging Face's hub."""

import glob
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq

from data.raw.base import (
    EXTENSIONS,
    LARGEST_FILE,
    UNIT,
    Input,
    Place,
    Source,
    choose_captions,
    one_line,
    to_input,
)

BATCH = 64  # rows of Parquet in memory; a row is a whole picture


@final
class Table(Source):
    """Rows of Parquet files or of a data set of the hub, through Hugging Face `datasets`."""

    def __init__(
        self,
        path: str,
        place: Place | None,
        captions: dict[str, float] | None,
        image: str | None,
        split: str,
        streaming: bool,
    ) -> None:
        import datasets

        self.path, self.place, self.split, self.streaming = path, place, split, streaming
        self.data: Any = None  # a Dataset or an IterableDataset, opened when needed
        headers = [header(place.root / name) for name in place.files] if place else []
        self.starts = [0, *accumulate(rows for rows, _ in headers)]
        schemas = [datasets.Features.from_arrow_schema(schema) for _, schema in headers]
        self.features: Any = common(schemas) if place else self._open().features
        self.image = choose_image(image, self.features, path)
        self.captions = choose_captions(captions, [name for name, kind in self.features.items() if is_text(kind)], path)
        self.columns = [self.image, *self.captions]
        if place:
            for name, schema in zip(place.files, schemas, strict=True):
                unlike = [column for column in self.columns if not is_like(schema.get(column), self.features[column])]
                if unlike:
                    raise ValueError(f"{path}: column {unlike[0]} of {name} is not as in the other files")
            self.shards = len(place.files) if streaming else math.ceil(self.starts[-1] / UNIT)
        else:
            self.shards = self._open().num_shards if streaming else math.ceil(len(self._open()) / UNIT)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": None}  # each process opens its own

    @contextmanager
    def _library(self) -> Iterator[None]:
        """Silences the library's progress bars and makes its errors one line."""
        import datasets

        silent = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            yield
        except Exception as error:  # of the library, of the network, of pyarrow
            missing = "" if self.place else "there is nothing at this path, and as a name on Hugging Face's hub "
            cause = one_line(error.__cause__ or error)
            raise ValueError(f"{self.path}: {missing}it cannot be loaded: {cause}") from None
        finally:
            if not silent:
                datasets.enable_progress_bars()

    def _parquet(self, place: Place) -> Any:
        """The used columns, with the same types in all files."""
        import datasets

        text = datasets.Value("string")
        columns: dict[str, Any] = {self.image: datasets.Image(decode=False)}
        for name in self.captions:
            columns[name] = datasets.List(text) if is_list(self.features[name]) else text
        with self._library():
            data = datasets.load_dataset(
                "parquet",
                data_files=[glob.escape(str((place.root / name).absolute())) for name in place.files],
                split="train",
                streaming=self.streaming,
                columns=[*columns],
                features=datasets.Features(columns),
                batch_size=BATCH,
            )
        if not self.streaming and len(data) != self.starts[-1]:
            raise ValueError(f"{self.path} has changed while it was read")
        return data

    def _hub(self) -> Any:
        """All columns, with pictures not decoded."""
        import datasets

        with self._library():
            kind = datasets.load_dataset_builder(self.path).info.builder_name
            if kind == "webdataset" or (self.streaming and kind == "imagefolder"):  # it would decode any member
                raise ValueError(f"it is a {kind}, which is read from disk: download it and give its folder")
            data = datasets.load_dataset(self.path, split=self.split, streaming=self.streaming)
            data = data if data.features else data._resolve_features()
        for name, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
        return data

    def _open(self) -> Any:
        if self.data is None:
            self.data = self._parquet(self.place) if self.place else self._hub()
        return self.data

    def read(self, shard: int, start: int = 0) -> Iterator[Input]:
        data = self._open()
        first = 0 if self.streaming else shard * UNIT
        if self.streaming:
            rows = data.shard(num_shards=self.shards, index=shard).skip(start)
        else:
            numbers = range(first + start, min(first + UNIT, len(data)))
            rows = data.select(numbers) if numbers else []
        try:
            for number, row in enumerate(rows, start=first + start):
                yield to_input(self._name(shard, number), self._picture(row[self.image]), row, self.captions)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"shard {shard} of {self.path} cannot be read: {one_line(error)}") from None

    def _name(self, shard: int, number: int) -> str:
        """FILE/ROW for Parquet; else SHARD/ROW if streamed, or ROW."""
        if self.place is None:
            return f"{shard}/{number}" if self.streaming else str(number)
        file = shard if self.streaming else bisect_right(self.starts, number) - 1
        row = number if self.streaming else number - self.starts[file]
        return f"{self.place.files[file].removesuffix('.parquet')}/{row}"

    def _picture(self, value: Any) -> bytes | Path | None:
        if isinstance(value, dict):
            path = value.get("path")
            return value["bytes"] if value.get("bytes") is not None else Path(path) if path else None
        return value

    def describe(self) -> dict[str, Any]:
        common = {"kind": "parquet" if self.place else "hub", "captions": self.captions, "image": self.image}
        if self.place:
            return {**common, "streaming": self.streaming, "inputs": self.starts[-1], "files": self.place.sizes()}
        if self.streaming:
            return {**common, "shards": self.shards}
        revision = Path(self._open().cache_files[0]["filename"]).parent.name  # a hash of what was downloaded
        return {**common, "inputs": len(self._open()), "revision": revision}


def header(file: Path) -> tuple[int, pa.Schema]:
    """Number of rows and schema of a Parquet file.

    Raises:
        ValueError: it is truncated, no Parquet, or holds rows that are larger than a picture.
    """
    try:
        with pq.ParquetFile(file) as opened:
            for group in map(opened.metadata.row_group, range(opened.num_row_groups)):
                if group.total_byte_size > LARGEST_FILE * max(1, group.num_rows):
                    rows = f"{group.num_rows} rows of {group.total_byte_size:,} bytes"
                    raise ValueError(f"{file} holds {rows}, more than {LARGEST_FILE:,} a row")
            return opened.metadata.num_rows, opened.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no whole Parquet file: {one_line(error)}") from None


def common(schemas: list[Any]) -> dict[str, Any]:
    """The columns of files, each as in the first file where it holds values."""
    found: dict[str, Any] = {}
    for schema in schemas:
        for name, kind in schema.items():
            if name not in found or is_empty(found[name]):
                found[name] = kind
    return found


def is_empty(kind: Any) -> bool:
    """Whether a column of `datasets` holds no values."""
    return getattr(kind, "dtype", None) == "null"


def is_list(kind: Any) -> bool:
    """Whether a column of `datasets` holds lists."""
    return hasattr(kind, "feature")


def is_text(kind: Any) -> bool:
    """Whether a column of `datasets` holds strings or lists of strings."""
    return getattr(getattr(kind, "feature", kind), "dtype", None) in ("string", "large_string", "string_view")


def is_picture(kind: Any, named: bool) -> bool:
    """Whether a column of `datasets` holds pictures; bytes only if `named` like a picture."""
    if isinstance(kind, dict):
        return "bytes" in kind and kind.keys() <= {"bytes", "path"}
    dtype = getattr(kind, "dtype", None)
    return type(kind).__name__ == "Image" or (named and dtype in ("binary", "large_binary", "binary_view"))


def is_like(kind: Any, first: Any) -> bool:
    """Whether a column can be read like another one; a column without values can."""
    if is_empty(kind):
        return True
    return (is_picture(kind, True) and is_picture(first, True)) or (is_text(kind) and is_list(kind) == is_list(first))


def choose_image(image: str | None, features: Mapping[str, Any], where: str) -> str:
    """The picture's column among those of `datasets`; ValueError if there is none or several."""
    names = {image, "image", "img", *EXTENSIONS}
    likely = [name for name, kind in features.items() if is_picture(kind, name in names)]
    if image in likely or (image is None and len(likely) == 1):
        return image or likely[0]
    missing = f"column {image} with pictures" if image else "one column with pictures: name it with image"
    raise ValueError(f"{where} has no {missing}; there are: {', '.join(f'{n}: {k}' for n, k in features.items())}")
