"""Datasets of the Hugging Face Hub, streamed: of what is not taken nothing is read, but for the rows read ahead."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from distill.data.source_names import Source
from kernels.errors import UserError, first_line

COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


def commit_of(source: Source) -> str:
    """The commit that a dataset's revision stands for, now."""
    if source.revision and COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi

    try:
        return cast(str, HfApi().dataset_info(source.path, revision=source.revision).sha)
    except Exception as error:  # the client raises errors of many libraries
        raise _unreachable(source, error) from None


def rows_of(source: Source) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number from 1, row) of a dataset's split, `train` by default. UserError where it has no such configuration or
    split, which names those that it has."""
    rows = None
    try:
        rows = _split(source)
        yield from enumerate(rows, 1)
    except UserError:
        raise
    except Exception as error:
        raise _unreachable(source, error) from None
    finally:
        rows = None
        gc.collect()  # a parquet file that was left early has a thread, which would abort Python as it ends


def _split(source: Source) -> Any:
    import datasets

    try:
        splits = datasets.load_dataset(source.path, source.config, revision=source.revision, streaming=True)
    except ValueError:
        configs = datasets.get_dataset_config_names(source.path, revision=source.revision)
        if source.config in configs or (source.config is None and len(configs) == 1):
            raise
        said = "has several configurations" if source.config is None else f"has no configuration {source.config}"
        raise UserError(f"{source.name}: {said}; choose one of {', '.join(configs)} as {source.path}:NAME") from None
    wanted = source.split or "train"
    if wanted not in splits:
        start = f"{source.path}:{source.config or ''}"
        raise UserError(f"{source.name}: has no split {wanted}; choose one of {', '.join(splits)} as {start}:NAME")
    return splits[wanted]


def _unreachable(source: Source, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {first_line(error)}"
    return UserError(f"{source.path}: no such file, and not readable as a Hugging Face dataset ({reason})")
