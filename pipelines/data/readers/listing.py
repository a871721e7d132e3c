"""Lists of images without annotations as streams of paths, for lists that memory need not hold."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from models.errors import DataError, one_line
from models.images.decoding import IMAGE_SUFFIXES
from pipelines.data.readers.opening import has_annotations, images_of, listed_path
from pipelines.data.remote import AnyPath, absolute, fingerprints, list_remote, mark_of_entry, to_path

if TYPE_CHECKING:
    import pandas as pd
    from upath import UPath

LISTS = (".csv", ".parquet")
# Rows of a list that are read at a time.
PIECE = 50_000


class Entry(NamedTuple):
    """An image of a list: its absolute path or URL, and the fingerprint of its file where the list came with it."""

    path: str
    mark: str = ""


@dataclass(frozen=True)
class Listing:
    """Images of a folder, a glob, a list or a URL, none of them annotated.

    Attributes:
        where: as it was given.
        sort: whether they are to be sorted by path; a list has an order of its own.
        stream: images after the first ``done`` of them, of which ``last`` was the last's path; ``(0, "")``: all.
        resumes: whether a stream may begin later than at its start, since it comes in the same order every time.
        mark: of a list that is a file, by which a changed one is told.
    """

    where: str
    sort: bool
    stream: Callable[[int, str], Iterator[Entry]]
    resumes: bool = True
    mark: str = ""

    def has_more_than(self, count: int) -> bool:
        """Whether there are more than ``count`` images; no more than those are listed.

        Raises:
            DataError: the list cannot be read, or the store cannot be reached.
        """
        return next(islice(self.stream(0, ""), count, None), None) is not None


def open_listing(where: str | Path, split: str = "all") -> Listing | None:
    """What `open_dataset` would list, as a stream; None where there are annotations, or a single image.

    Local folders and globs are gone through anew whenever they are listed; lists and object stores that speak S3 go on
    where they stopped. Of other URLs the whole list is in memory.

    Raises:
        DataError: nothing there, or no such split.
    """
    path, text = to_path(where), str(where)
    if path.suffix.lower() == ".json":
        return None
    if path.suffix.lower() in LISTS and (path.is_file() or not isinstance(path, Path)):
        (mark,) = fingerprints([path])
        return Listing(text, sort=False, stream=lambda done, _: map(Entry, islice(_listed(path), done, None)), mark=mark)
    if not isinstance(path, Path):
        if "s3" in str(path.protocol):
            return Listing(text, sort=True, stream=lambda _, last: _in_bucket(path, last))
        return Listing(text, sort=True, stream=lambda done, _: (Entry(str(p)) for p in list_remote(path)[done:]))
    if path.is_dir():
        if "+" in split or has_annotations(path, split):
            return None
        folder = Path(os.path.abspath(images_of(path, split)))
        return Listing(text, sort=True, stream=lambda *_: map(Entry, _in_folder(folder)), resumes=False)
    if path.is_file() or not glob.has_magic(text):
        return None
    matching = partial(glob.iglob, os.path.abspath(text), recursive=True)
    return Listing(text, sort=True, stream=lambda *_: map(Entry, filter(os.path.isfile, matching())), resumes=False)


def _in_folder(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # Only links are looked at: for all others the folder itself says what they are.
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                yield entry.path


def _listed(path: AnyPath) -> Iterator[str]:
    """The column ``path`` of a CSV or parquet file, a piece of the file at a time."""
    import pyarrow as pa

    try:
        with path.open("rb") as handle:
            for table in _tables(path, handle):
                if "path" not in table.columns:
                    raise DataError(f"{path}: no column 'path'; it has: {', '.join(map(str, table.columns))}")
                yield from (absolute(listed_path(path, str(one))) for one in table["path"].dropna())
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable list ({one_line(error, 160)})") from error


def _tables(path: AnyPath, handle: BinaryIO) -> Iterator[pd.DataFrame]:
    """The rows of a list, some ten thousand at a time; none of them where there is no such row, but always the columns."""
    import pandas as pd
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".csv":
        with pd.read_csv(handle, dtype=str, chunksize=PIECE) as pieces:
            yield from pieces
        return
    file = pq.ParquetFile(handle)
    yield file.schema_arrow.empty_table().to_pandas()
    named = "path" in file.schema_arrow.names
    for batch in file.iter_batches(PIECE, columns=["path"]) if named else ():
        yield batch.to_pandas()


def _in_bucket(path: UPath, last: str) -> Iterator[Entry]:
    """The images directly in a folder of a bucket, or those that a glob matches, by key, after the key of ``last``.

    They come with their fingerprints. Pages of ListObjectsV2 (Amazon S3 API reference), a thousand keys each.

    Raises:
        DataError: nothing there, or the store cannot be reached.
    """
    from fsspec.utils import glob_translate

    fs, whole = path.fs, path.path
    bucket, _, key = whole.partition("/")
    # As fsspec: a question mark alone is a sign like others.
    magic = re.search(r"[*\[?]", key) if "*" in key or "[" in key else None
    request: dict[str, str] = {"Bucket": bucket}
    if magic:
        request["Prefix"] = key[: magic.start()]
    elif not last and fs.isfile(whole):
        yield Entry(str(path))
        return
    else:
        request |= {"Prefix": f"{key.rstrip('/')}/" if key else "", "Delimiter": "/"}
    wanted = re.compile(glob_translate(whole) if magic else ".*", re.DOTALL)
    if last:
        request["StartAfter"] = last.removeprefix(f"s3://{bucket}/")
    any_there = False
    while True:
        try:
            page = fs.call_s3("list_objects_v2", **request)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file or folder") from error
        except Exception as error:
            # botocore's and aiohttp's errors have no common kind.
            raise DataError(f"{path}: cannot be listed ({one_line(error, 200)})") from error
        entries = page.get("Contents", ())
        any_there = any_there or bool(entries or page.get("CommonPrefixes"))
        for entry in entries:
            name = f"{bucket}/{entry['Key']}"
            if name.lower().endswith(IMAGE_SUFFIXES) and wanted.match(name):
                yield Entry(f"s3://{name}", mark_of_entry(entry["Size"], entry))
        if not page.get("IsTruncated"):
            break
        request["ContinuationToken"] = page["NextContinuationToken"]
        request.pop("StartAfter", None)
    if not any_there and not last:
        raise DataError(f"{path}: no such file or folder")
