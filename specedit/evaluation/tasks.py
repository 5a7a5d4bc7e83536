"""Tasks of public editing benchmarks, read from local copies: GEdit-Bench and ImgEdit-Bench."""

from __future__ import annotations

import functools
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..io import pictures

TEXTS = ("key", "task_type", "instruction", "instruction_language")  # of GEdit-Bench's columns


@dataclass(frozen=True)
class Task:
    """One edit of a benchmark.

    key, kind, prompt: as in the benchmark. language: of the prompt, if the benchmark has several. output: where the
    scorer expects the result, relative to the run's folder. image(): opens the picture to edit, RGB as a viewer shows
    it; ValueError if it cannot be read. source_output, source(): where the scorer expects the input, and that picture,
    if it needs one.
    """

    key: str
    kind: str
    prompt: str
    output: Path
    image: Callable[[], Image.Image]
    language: str | None = None
    source_output: Path | None = None
    source: Callable[[], Image.Image] | None = None


def gedit(folder: Path, language: str = "en") -> list[Task]:
    """Tasks of GEdit-Bench (arXiv 2504.17761) in the order of its files; no picture is read yet.

    As in the benchmark's example, the editor gets `input_image_raw` and the scorer `input_image`. Pictures are read one
    row group at a time and only the last group is kept, so open them in order.

    Args:
        folder: a download of the dataset stepfun-ai/GEdit-Bench, with its parquet files at any depth.
        language: of the instructions, "en" or "cn", or "all".

    Raises:
        ImportError: pyarrow is missing.
        FileNotFoundError: no such folder, or no parquet file in it.
        ValueError: a file that is not the benchmark's, no task in that language, or a duplicate task.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("GEdit-Bench: expected pyarrow, which reads its files; pip install pyarrow") from error
    files = _find(folder, "the parquet files of stepfun-ai/GEdit-Bench", "*.parquet")

    @functools.lru_cache(maxsize=1)
    def row_group(file: Path, group: int) -> Any:
        with parquet.ParquetFile(file) as opened:
            names = [name for name in ("input_image", "input_image_raw") if name in opened.schema_arrow.names]
            return opened.read_row_group(group, columns=names)

    def opener(file: Path, group: int, row: int, output: Path, *names: str) -> Callable[[], Image.Image]:
        def read() -> Image.Image:
            try:
                table = row_group(file, group)
            except (OSError, ValueError) as error:
                raise ValueError(f"task {output}: expected a picture that can be read in {file}: {error}") from error
            structs = (table[name][row].as_py() for name in names if name in table.column_names)
            held = next((s["bytes"] for s in structs if isinstance(s, dict) and s.get("bytes")), None)
            if held is None:
                raise ValueError(f"task {output}: expected a picture in {file}, got none")
            return _read(io.BytesIO(held), file, output)

        return read

    tasks, languages = [], set()
    for file in files:
        for group, row, values in _texts(parquet, file):
            languages.add(values["instruction_language"])
            if language not in ("all", values["instruction_language"]):
                continue
            kind, spoken, key = (_name(values[n], n, file) for n in ("task_type", "instruction_language", "key"))
            place = Path("fullset", kind, spoken)
            output, source = place / f"{key}.png", place / f"{key}_SRCIMG.png"
            task = Task(
                key=key,
                kind=kind,
                prompt=_prompt(values["instruction"], output, file),
                output=output,
                image=opener(file, group, row, output, "input_image_raw", "input_image"),
                language=spoken,
                source_output=source,
                source=opener(file, group, row, output, "input_image", "input_image_raw"),
            )
            tasks.append(task)
    if languages and not tasks:
        held = ", ".join(sorted(map(str, languages)))
        raise ValueError(f"--language: expected one that {folder} has tasks in, {held}, got {language}")
    return _checked(tasks, folder)


def imgedit(folder: Path) -> list[Task]:
    """Tasks of ImgEdit-Bench's basic suite (arXiv 2505.20275) in the order of its list; no picture is read yet.

    Args:
        folder: holds, at any depth, the folder of source pictures (Benchmark/singleturn in the benchmark's archive) and
            the list: `basic_edit.json` of PKU-YuanGroup/ImgEdit or, without it, the archive's `singleturn.json`.

    Raises:
        FileNotFoundError: no such folder, no list, or none of its pictures.
        ValueError: several lists, one that is not the benchmark's, or one without tasks.
    """
    files = _find(folder, "the basic_edit.json of PKU-YuanGroup/ImgEdit", "basic_edit.json", "singleturn.json")
    if len(files) > 1:
        raise ValueError(f"--data: expected one {files[0].name}, got {' and '.join(map(str, files))}")
    file = files[0]
    try:
        items = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got a file that is none: {error}") from error
    if not isinstance(items, dict):
        raise ValueError(f'{file}: expected {{key: {{"id", "prompt", "edit_type"}}}}, got a {type(items).__name__}')
    for key, item in items.items():
        if not isinstance(item, dict) or not all(isinstance(item.get(n), str) for n in ("id", "prompt", "edit_type")):
            raise ValueError(f'{file}: expected "id", "prompt" and "edit_type" of task {key}, got {item!r:.80}')
    ids = [item["id"] for item in items.values()]
    roots = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
    held = {root: sum((root / name).is_file() for name in ids) for root in roots}
    root = max(roots, key=held.__getitem__)  # the first on a tie
    if ids and not held[root]:
        raise FileNotFoundError(f"--data: expected the pictures of {file}, such as {ids[0]}, in {folder} or below")

    tasks = []
    for key, item in items.items():
        output = Path(f"{_name(key, 'key', file)}.png")
        image = functools.partial(_read, root / item["id"], root / item["id"], output)
        tasks.append(Task(key, item["edit_type"], _prompt(item["prompt"], output, file), output, image))
    return _checked(tasks, folder)


def _read(file: Any, named: Path, output: Path) -> Image.Image:
    try:
        picture = pictures.read(file, str(named))
    except pictures.PictureError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ValueError(f"task {output}: expected its picture {named}, which does not exist") from error
        raise ValueError(f"task {output}: expected a picture that can be read in {named}: {error.__cause__}") from error
    for note in picture.notes:
        print(f"specedit: task {output}: {note}", file=sys.stderr)
    return picture.image


def _find(folder: Path, what: str, *patterns: str) -> list[Path]:
    """The files in `folder` that match the first pattern with matches."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--data: expected a folder with {what}, got {folder}, which is none")
    for pattern in patterns:
        if files := sorted(path for path in folder.rglob(pattern) if path.is_file()):
            return files
    raise FileNotFoundError(f"--data: expected a folder with {what}, got {folder}, which holds none")


def _texts(parquet: Any, file: Path) -> list[tuple[int, int, dict[str, Any]]]:
    """Row group, row within it, and texts of each row."""
    try:
        with parquet.ParquetFile(file) as opened:
            missing = {*TEXTS, "input_image"}.difference(opened.schema_arrow.names)
            if not missing:
                groups = [opened.read_row_group(g, columns=list(TEXTS)) for g in range(opened.num_row_groups)]
    except (OSError, ValueError) as error:  # include pyarrow's errors
        raise ValueError(f"{file}: expected a parquet file that can be read: {error}") from error
    if missing:
        raise ValueError(
            f"{file}: expected the columns of GEdit-Bench, got a file without {', '.join(sorted(missing))}"
        )
    return [(g, row, values) for g, table in enumerate(groups) for row, values in enumerate(table.to_pylist())]


def _name(value: Any, what: str, file: Path) -> str:
    """Check that `value` is a plain file name: it becomes part of a path."""
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value or "\\" in value:
        raise ValueError(f"{file}: expected a {what} that can name a file, got {value!r}")
    return value


def _prompt(value: Any, output: Path, file: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"task {output}: expected an instruction in {file}, got {value!r}")
    return value


def _checked(tasks: list[Task], folder: Path) -> list[Task]:
    if not tasks:
        raise ValueError(f"--data: expected tasks, got {folder}, which holds none")
    seen: set[Path] = set()
    for task in tasks:
        if task.output in seen:
            raise ValueError(f"--data: expected every task once, got {task.output} twice in {folder}")
        seen.add(task.output)
    return tasks
