"""Read pipelines from a folder or the hub; every problem is one sentence that says what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..versions import suppress_torchvision_warning

INDEX = "model_index.json"
TEXT_WIDTH = 192  # of the embedded editors' transformers, which no released model has
EMBEDDED = {
    "FluxKontextPipeline": "kontext",
    "QwenImageEditPipeline": "qwen",
    "OwnSizeQwenImageEditPipeline": "qwen",  # its own class in specedit.micro
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
AGAIN = "download or save the pipeline again"


def check_model(model: str, editors: tuple[str, ...] = ()) -> None:
    """Check that `model` can name a pipeline, before anything is imported or downloaded.

    Args:
        model: a folder or a hub id.
        editors: further names to list in the message.

    Raises:
        ValueError: neither, or a folder that `check_folder` rejects.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return check_folder(path)
    expected = f"--model: expected {''.join(f'{name}, ' for name in editors)}a pipeline folder or a hub id (owner/name)"
    if model and path.exists():
        raise ValueError(f"{expected}, got the file {model}; save the pipeline with save_pretrained(FOLDER)")
    if not HUB_ID.fullmatch(model):
        raise ValueError(f"{expected}, got {model!r}, which does not exist")


def check_supported(model: str) -> None:
    """Whether `install` takes the pipeline in a folder or on the hub, from its index alone.

    Raises:
        ValueError: it is of another class. What cannot be looked up is left to `from_pretrained`.
    """
    import diffusers

    from ..models import pipeline_names, takes_class

    try:
        kind = diffusers.DiffusionPipeline.load_config(Path(model).expanduser() if Path(model).exists() else model)
        kind = kind["_class_name"]
        with suppress_torchvision_warning():
            known = kind in EMBEDDED or takes_class(getattr(diffusers, kind))
    except Exception:
        return
    if not known:
        raise ValueError(f"--model: expected one of {', '.join(pipeline_names())}, got {model}, which is a {kind}")


def embedded_editor(model: str) -> str | None:
    """Which embedded editor a folder holds, or one trained like it; None of any other folder and of hub ids."""
    folder = Path(model).expanduser()
    try:
        kind = json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"]
        width = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))["joint_attention_dim"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return EMBEDDED.get(kind) if width == TEXT_WIDTH and isinstance(kind, str) else None


def check_folder(folder: Path) -> None:
    """Check that a folder holds a complete pipeline with readable weights.

    Raises:
        ValueError: a missing or broken index, an unknown pipeline class, missing parts, damaged weights, or pickled
            ones, which can run code when they are read.
    """
    for name, (library, kind) in _parts(folder).items():
        if library is None or kind is None:  # an optional part that is absent
            continue
        part = folder / name
        if not part.is_dir() or not any(part.iterdir()):
            raise ValueError(
                f"--model: expected the part {name} in {folder}, got no such folder or an empty one; {AGAIN}"
            )
        _check_weights(part)


def _parts(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """The parts in the index, each with its library and class."""
    import diffusers

    file = folder / INDEX
    if not file.is_file():
        raise ValueError(f"--model: expected a pipeline directory with a {INDEX}, got {folder}")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"--model: expected JSON in {file}: {_line(error)}; {AGAIN}") from error
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f'--model: expected the pipeline\'s class as "_class_name" in {file}, got none; {AGAIN}')
    with suppress_torchvision_warning():
        known = kind in EMBEDDED or isinstance(getattr(diffusers, kind, None), type)
    if not known:
        raise ValueError(
            f"--model: expected a pipeline of diffusers in {file}, got {kind!r}, which diffusers "
            f"{diffusers.__version__} does not have; pip install -U diffusers, if a newer one does"
        )
    return {name: tuple(value) for name, value in index.items() if isinstance(value, list) and len(value) == 2}


def _check_weights(part: Path) -> None:
    from safetensors import SafetensorError, safe_open

    files = sorted(part.glob("*.safetensors"))
    pickled = [file.name for file in sorted(part.iterdir()) if file.suffix in PICKLES]
    if pickled and not files:
        raise ValueError(
            f"--model: expected weights as .safetensors in {part}, got {pickled[0]}, a pickle, which could run code "
            "when it is read; save the pipeline with safe_serialization=True"
        )
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--model: expected whole weights in {file}: {_line(error)}; {AGAIN}") from error
    for index in part.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"--model: expected a list of weights in {index}: {_line(error)}; {AGAIN}") from error
        if missing := sorted(shard for shard in shards if not (part / shard).is_file()):
            raise ValueError(f"--model: expected the weights {missing[0]} in {part}, got no such file; {AGAIN}")


def from_pretrained(model: str, dtype: Any, read: Callable[..., Any] | None = None) -> Any:
    """The pipeline in a folder or on the hub, which `check_model` has let through.

    read: an embedded editor's own way to read its folder.

    Raises:
        ValueError: it cannot be read, or parts of it are wrong.
        MemoryError, or torch's OutOfMemoryError: out of memory.
    """
    from diffusers import DiffusionPipeline

    folder = Path(model).expanduser()
    local = folder.is_dir()
    try:
        read = read or DiffusionPipeline.from_pretrained
        pipe = read(folder if local else model, torch_dtype=dtype, use_safetensors=True)
    except MemoryError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
            raise
        install = (
            "install it, or " if isinstance(error, ImportError) else ""
        )  # also where a tokenizer's file is missing
        reason = f"{_line(error)}; {install}{AGAIN}" if local or install else _hub(model, error)
        raise ValueError(f"--model: expected a pipeline that can be read, got {model}: {reason}") from error
    _check_parts(pipe, folder if local else None, model)
    return pipe


def _hub(model: str, error: Exception) -> str:
    """Why the hub did not return a pipeline, and what to do."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    page = f"https://huggingface.co/{model}"
    if "GatedRepoError" in kinds:
        return f"its licence has to be accepted first; do so at {page}, then run `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return f"the hub has no such pipeline, or not for you; look at {page}, and run `hf auth login` if it is private"
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return f"the hub has it without {INDEX} or without .safetensors; look at {page}"
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "Timeout"}:
        return (
            "it is not in the local cache, and the hub cannot be reached; check the network and HF_HUB_OFFLINE, run "
            f"`hf download {model}` where there is one, or name a folder"
        )
    return _line(error)


def _check_parts(pipe: Any, folder: Path | None, model: str) -> None:
    """Reject empty tokenizers, and modules whose weights are missing from their files."""
    from safetensors import safe_open

    for name, part in getattr(pipe, "components", {}).items():
        if "tokenizer" in name and part is not None and not _reads_words(part):
            raise ValueError(f"--model: expected a {name} that knows words, got an empty one in {model}; {AGAIN}")
        if folder is None or not hasattr(part, "state_dict"):
            continue
        stored = 0
        for file in (folder / name).glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                stored += len(opened.keys())
        # Names differ between versions and shared tensors are stored once, so compare counts.
        if 0 < stored < (held := len(part.state_dict())) // 2:
            raise ValueError(
                f"--model: expected the weights of {type(part).__name__} in {folder / name}, got {stored} tensors of "
                f"{held}; {AGAIN}"
            )


def _reads_words(tokenizer: Any) -> bool:
    special = set(getattr(tokenizer, "all_special_ids", ()))
    try:
        return any(token not in special for token in tokenizer("make the circle red").input_ids)
    except Exception:  # whatever it is, it does not read
        return False


def _line(error: BaseException) -> str:
    """The error's message in one line, truncated."""
    words = " ".join((str(error) or type(error).__name__).split())
    return words if len(words) <= 300 else f"{words[:297]}..."
