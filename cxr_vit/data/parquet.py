"""Read columns of a Parquet file as text; the extra `parquet` installs pyarrow."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

import numpy as np

from cxr_vit.data.text_files import TABLE_LIMITS
from cxr_vit.errors import DataError

#: Rows that are read at a time: the limit of text is checked after each of these.
_BATCH = 1024


def parquet_header(path: Path, raw: bytes) -> List[str]:
    """Return the names of the columns of a file with this content."""
    with _file(path, raw) as file:
        return list(file.schema_arrow.names)


def parquet_columns(path: Path, raw: bytes, names: Sequence[str]) -> List[List[str]]:
    """Return columns of a file with this content as text, stripped; nothing and NaN are "".

    Raises DataError if pyarrow is not installed, if the file is damaged or too large, or if a
    column holds neither text nor numbers.
    """
    texts: Dict[str, List[np.ndarray]] = {name: [] for name in names}
    characters = 0
    with _file(path, raw) as file:
        for name in names:
            _refuse_type(path, name, file.schema_arrow.field(name).type)
    import pyarrow

    # Dictionaries keep a long text that all rows share in memory once.
    with _file(path, raw, read_dictionary=list(names)) as file:
        rows = file.metadata.num_rows
        if rows > TABLE_LIMITS.lines:
            raise DataError(f"{path}: {rows:,} rows; at most {TABLE_LIMITS.lines:,} are read.")
        size = _uncompressed_size(file.metadata, names)
        if size > TABLE_LIMITS.size:
            raise DataError(
                f"{path}: {size:,} bytes in the columns that are read; at most"
                f" {TABLE_LIMITS.size:,} are read. Give a table of images."
            )
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(names)):
            for name in names:
                column = batch.column(batch.schema.get_field_index(name)).dictionary_encode()
                # The dictionary may be that of a whole file.
                used, codes = np.unique(_codes(column), return_inverse=True)
                found = column.dictionary.take(pyarrow.array(used[used >= 0])).to_pylist()
                words = [""] * int((used < 0).sum()) + [_text(value) for value in found]
                lengths = np.array([*map(len, words)])
                characters += int(lengths[codes].sum())
                if characters > TABLE_LIMITS.size:
                    raise DataError(
                        f"{path}: more than {TABLE_LIMITS.size:,} characters. Give a table of"
                        " images."
                    )
                texts[name].append(np.array(words, dtype=object)[codes])
    return [np.concatenate([np.empty(0, object), *parts]).tolist() for parts in texts.values()]


def _codes(column: Any) -> np.ndarray:
    """Return the places of a column's values in its dictionary, -1 for none."""
    codes: np.ndarray = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return codes


def _uncompressed_size(metadata: Any, names: Sequence[str]) -> int:
    """Return the bytes of columns after decompression, as the file has them."""
    size = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        size += sum(
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in names
        )
    return size


def _refuse_type(path: Path, name: str, kind: Any) -> None:
    from pyarrow import BaseExtensionType, types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    refused = types.is_nested, types.is_binary, types.is_large_binary, types.is_fixed_size_binary
    if isinstance(kind, BaseExtensionType) or any(is_kind(kind) for is_kind in refused):
        raise DataError(
            f"{path}: the column {name!r} is of the type {kind}. Write it as text or numbers."
        )


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes numbers of patients float where one is missing
    return "" if value is None or value != value else str(value).strip()


@contextlib.contextmanager
def _file(path: Path, raw: bytes, **options: Any) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        text = 'a Parquet file, which needs pyarrow. Run: pip install "cxr-vit[parquet]"'
        raise DataError(f"{path}: {text}") from error
    try:
        yield ParquetFile(pyarrow.BufferReader(raw), **options)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a readable Parquet file ({reason}).") from error
