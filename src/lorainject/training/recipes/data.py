"""The data of a recipe: rows of files or of the package `datasets`, and what a model gets of each row.

A row becomes a mapping from roles to values, whatever the columns of the file are called:

    text: text                        chat: messages                    prompt-completion: prompt, completion
    label: text, label (text_pair)    pair: query, positive             preference: prompt, chosen, rejected
    image: image, label

TRL's trainers take the roles as they are. For the Trainer of transformers `encoder` turns each row into tensors when it
is needed. A loss on text counts every token; a loss on a completion does not count the tokens of its prompt.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ...errors import FileError, SpecError

ROLES = {
    "text": ("text",), "chat": ("messages",), "prompt-completion": ("prompt", "completion"),
    "label": ("text", "label"), "pair": ("query", "positive"), "preference": ("prompt", "chosen", "rejected"),
    "image": ("image", "label"),
}  # fmt: skip
"""The roles of each format. Every row has a value for each."""
OPTIONAL = {"label": ("text_pair",)}
"""Roles of a format that count only if a column is named for them."""
TYPES: dict[str, Any] = {"messages": list, "label": (int, str), "image": object}
"""What a value of a role is; a text for all others."""
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
NUMBER = re.compile("[0-9]{1,9}")
CLASSES = 100_000
"""More classes than any data have. A number above it is taken for a wrong column."""
IGNORED = -100
"""The label of a token that does not count in the loss."""
Row = dict[str, Any]
Encode = Callable[[Row], Any]
Collate = Callable[[list[Any]], Any]


class Examples(Dataset[Any]):
    """Rows that are encoded when they are needed."""

    def __init__(self, rows: Sequence[Row], encode: Encode) -> None:
        self.rows, self.encode = rows, encode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.encode(self.rows[index])


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSONL, JSON, CSV, parquet or text file (one row per line that is not blank).

    Raises:
        FileError: The file is missing, or is not what its name says.
    """
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in SUFFIXES:
        what = f"{path} is of no known kind" if path.is_file() else f"there is no file {path}"
        raise FileError(what, way_out=f"give a file whose name ends in {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_table(path).to_pylist())
        with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as file:  # Excel writes a mark
            if suffix == ".csv":
                rows: Any = _csv_rows(file)
            elif suffix == ".json":
                rows = json.load(file)
            elif suffix == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                rows = [{"text": line.rstrip("\n")} for line in file if line.strip()]
    except ModuleNotFoundError as e:
        raise FileError(f"{path} needs the package pyarrow", way_out="pip install pyarrow") from e
    except (ValueError, OSError, RecursionError, csv.Error) as e:
        raise FileError(f"{path} cannot be read: {e}", way_out="correct the file") from e
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FileError(f"{path} is not a list of objects", way_out="write one object with named values per row")
    return rows


def _csv_rows(file: Iterable[str]) -> list[Row]:
    """Return the rows of a CSV file. Raise ValueError for a column that is there twice, and fields without a name."""
    reader = csv.DictReader(file, restkey="")
    columns = list(reader.fieldnames or ())
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"these columns are there twice: {', '.join(twice)}")
    rows = list(reader)
    if long := [str(n) for n, row in enumerate(rows, 1) if "" in row and "" not in columns]:
        listed = ", ".join(long[:5]) + ", ..." * (len(long) > 5)
        raise ValueError(f"rows {listed} have more fields than the header: write texts with commas in quotes")
    return rows


def with_roles(rows: Sequence[Row], format: str, columns: Mapping[str, str], source: str, folder: Path) -> list[Row]:
    """Return the rows with the values of the format's roles alone.

    Args:
        rows: What was read.
        format: A key of ROLES.
        columns: The columns of roles that are called otherwise in the data.
        source: What the rows were read from, for errors.
        folder: The folder that names of image files are relative to.

    Raises:
        SpecError: With every column that is missing, and the rows whose values are missing or of another type.
    """
    present = list(rows[0]) if rows else []
    roles = [*ROLES[format], *(role for role in OPTIONAL.get(format, ()) if role in columns)]
    names = {role: columns.get(role, role) for role in roles}
    problems = []
    for role in columns.keys() - {*ROLES[format], *OPTIONAL.get(format, ())}:
        known = [*ROLES[format], *OPTIONAL.get(format, ())]
        problems.append(f"data.columns.{role}: the format {format!r} has the roles {', '.join(known)}")
    columns_present = ", ".join(map(repr, present)) or "no rows"
    problems += [
        f"the format {format!r} needs the column {name!r}, and {source} has {columns_present}: name the column with"
        f" data.columns.{role}"
        for role, name in names.items()
        if name not in present
    ]
    chosen = [{role: row.get(name) for role, name in names.items()} for row in rows]
    if not problems:
        if format == "image":
            for row in chosen:
                if isinstance(row["image"], str):
                    row["image"] = folder / row["image"]
        labels: list[Any] = [row["label"] for row in chosen if "label" in row]
        if labels and all(isinstance(label, bool) or NUMBER.fullmatch(str(label)) for label in labels):
            for row, label in zip(chosen, labels, strict=True):  # CSV has numbers as texts
                row["label"] = int(label)
        problems += _value_problems(chosen, names, source)
    if problems:
        raise SpecError(f"{source} does not fit", problems, "correct the data or the names of columns")
    return chosen


def _value_problems(rows: Sequence[Row], names: Mapping[str, str], source: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        for role, value in row.items():
            if value is None or value == "" or not isinstance(value, TYPES.get(role, str)):
                yield f"row {number} of {source}: {names[role]!r} is {value!r:.60}"
            elif role == "image" and isinstance(value, Path) and not value.is_file():
                yield f"row {number} of {source}: there is no file {value}"
            elif role == "label" and isinstance(value, int) and not 0 <= value < CLASSES:
                yield f"row {number} of {source}: {names[role]!r} is {value}, which is no class from 0 to {CLASSES - 1}"


def label_names(rows: Sequence[Row]) -> list[str]:
    """Return the name of each class: the texts in their order, or 0, 1, 2, ... for numbers."""
    values = {row["label"] for row in rows}
    if all(isinstance(value, int) for value in values):
        return [str(n) for n in range(max(values, default=-1) + 1)]
    return sorted(map(str, values))


def encoder(format: str, processing: Any, max_length: int, labels: Sequence[str]) -> tuple[Encode, Collate]:
    """Return a function that encodes a row, and one that makes a batch of encoded rows.

    Args:
        format: A key of ROLES, but not "preference", which only TRL trains with.
        processing: The tokenizer or image processor of the model.
        max_length: The tokens that are kept of each text.
        labels: The names of the classes, for formats with labels.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, default_data_collator

    def tokens(text: str, pair: str | None = None) -> Any:
        return processing(text, pair, truncation=True, max_length=max_length)

    def with_loss(prompt: list[int], rest: list[int]) -> Row:
        ids = (prompt + rest)[:max_length]
        return {"input_ids": ids, "labels": ([IGNORED] * len(prompt) + rest)[:max_length]}

    end = [] if getattr(processing, "eos_token_id", None) is None else [processing.eos_token_id]
    encode: dict[str, Encode] = {
        "text": lambda row: with_loss([], processing(row["text"])["input_ids"] + end),
        "chat": lambda row: with_loss([], processing.apply_chat_template(row["messages"], return_dict=False)),
        "prompt-completion": lambda row: with_loss(
            processing(row["prompt"])["input_ids"],
            processing(row["completion"], add_special_tokens=False)["input_ids"] + end,
        ),
        "label": lambda row: {
            **tokens(row["text"], row.get("text_pair")), "labels": labels.index(str(row["label"])),
        },
        "image": lambda row: {
            "pixel_values": processing(_image(row["image"]), return_tensors="pt")["pixel_values"][0],
            "labels": labels.index(str(row["label"])),
        },
        "pair": lambda row: {role: tokens(row[role]) for role in ROLES["pair"]},
    }  # fmt: skip
    pad: Any = DataCollatorWithPadding(processing) if format in ("label", "pair") else None
    collate: dict[str, Any] = {
        "image": default_data_collator,
        "label": pad,
        "pair": lambda batch: {role: pad([row[role] for row in batch]) for role in ROLES["pair"]},
    }
    return encode[format], collate.get(format) or DataCollatorForSeq2Seq(processing)


def require_counted_tokens(rows: Sequence[Row], encode: Encode, max_length: int) -> None:
    """Raise SpecError with the rows of which no token counts in the loss, because the prompt fills the length."""
    is_counted = (any(label != IGNORED for label in encode(row)["labels"]) for row in rows)
    if numbers := [str(n) for n, counted in enumerate(is_counted, 1) if not counted]:
        listed = ", ".join(numbers[:20]) + f", ... ({len(numbers)} in all)" * (len(numbers) > 20)
        what = f"of these rows no token of the completion is within data.max_length={max_length}: {listed}"
        raise SpecError(what, way_out="raise data.max_length, or leave the rows out")


def _image(value: Any) -> Any:
    from PIL import Image

    return (Image.open(value) if isinstance(value, Path) else value).convert("RGB")
