"""Edits of saved configurations, so that any supported version of the libraries reads them."""

import json
from pathlib import Path


def strip_name_or_path(folder: Path) -> None:
    """Remove `_name_or_path`, the directory a pipeline was read from, from every configuration in `folder`."""
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        written = json.loads(file.read_text())
        if written.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(written, indent=2) + "\n")


def write_transformers4_config(folder: Path) -> None:
    """Rewrite what only transformers 5 reads with the names of transformers 4, which both read."""
    for file in folder.glob("*/tokenizer_config.json"):
        written = json.loads(file.read_text())
        if isinstance(written.get("extra_special_tokens"), list):
            written["additional_special_tokens"] = written.pop("extra_special_tokens")
        words = json.loads((file.parent / "tokenizer.json").read_text())["pre_tokenizer"]
        written["add_prefix_space"] = bool(words.get("add_prefix_space"))
        file.write_text(json.dumps(written, indent=2) + "\n")
    for file in folder.glob("processor/preprocessor_config.json"):
        written = json.loads(file.read_text())
        written |= dict(min_pixels=written["size"]["shortest_edge"], max_pixels=written["size"]["longest_edge"])
        file.write_text(json.dumps(written, indent=2) + "\n")
    for file in folder.glob("text_encoder/config.json"):
        written = json.loads(file.read_text())
        text = written.get("text_config", {})
        if (rope := text.pop("rope_parameters", None)) is not None:
            text["rope_theta"] = rope.pop("rope_theta")
            text["rope_scaling"] = rope
            file.write_text(json.dumps(written, indent=2) + "\n")
