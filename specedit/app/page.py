"""The page: what stands where. `events.connect` makes it work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..config import CHOICES, DEFAULT_PRESET, presets
from ..micro import words
from .examples import Example
from .models import Models
from .settings import LONGEST, PRESET

TITLE = "SpecEdit"
INTRO = "Drop a picture, paint what may change, and say what to change. Without paint, a draft finds it."
CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
#heading h1 {margin: 0}
#heading p {margin: 0.2em 0 0}
#words pre {white-space: pre-wrap; font-size: 12px; line-height: 1.45}
#stages pre {font-size: 11.5px; line-height: 1.4; overflow-x: auto}
#cost table {width: 100%}
#cost table, #cost tr, #cost td, #cost th {border-color: var(--border-color-primary)}
#cost td:not(:first-child), #cost th:not(:first-child) {text-align: right}
#overlay img {width: 100%; height: 100%; object-fit: contain}
#examples td {padding: 2px 10px; text-align: left}
#examples .container {height: 52px; width: 52px; min-height: 0; border: none}
"""
BRUSH = "#d1495b"
# System fonts: the theme's own would be loaded from the net.
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Any:
    """The page's look."""
    return gr.themes.Default(primary_hue="rose", neutral_hue="slate", font=list(SANS), font_mono=list(MONO))


@dataclass
class Parts:
    """The components that events read and write."""

    file: Any
    painter: Any
    prompt: Any
    vocabulary: Any
    model: Any
    preset: Any
    restore: Any
    seed: Any
    negative_prompt: Any
    true_cfg_scale: Any
    edit: Any
    cancel: Any
    examples: Any
    heading: Any
    slider: Any
    overlay: Any
    stock: Any
    compare: Any
    go_on: Any
    undo: Any
    redo: Any
    cost: Any
    stages: Any
    picture_file: Any
    report_file: Any
    history: Any


def lay_out(models: Models, examples: list[Example]) -> Parts:
    """Draw the components into the Blocks that is open."""
    gr.Markdown(f"# {TITLE}\n{INTRO}", elem_id="heading")
    with gr.Row():
        with gr.Column(scale=5, min_width=380):
            asked = _asking(models, examples)
        with gr.Column(scale=5, min_width=380):
            shown = _showing()
    return Parts(**asked, **shown)


def _asking(models: Models, examples: list[Example]) -> dict[str, Any]:
    """Left: the picture, the instruction and the settings."""
    parts: dict[str, Any] = {}
    parts["file"] = gr.File(label="Picture", file_types=["image"], height=140, elem_id="file")
    parts["painter"] = gr.ImageEditor(
        label="Paint what may change, or leave it to the draft", type="pil", format="png", sources=(), transforms=(),
        brush=gr.Brush(colors=[BRUSH], color_mode="fixed"), layers=False, height=430, buttons=[], elem_id="painter",
        interactive=True,
    )  # fmt: skip
    parts["prompt"] = gr.Textbox(
        label="Instruction", placeholder="make the red circle blue", lines=1, max_length=LONGEST, elem_id="prompt"
    )
    embedded = models.is_embedded(models.names[0])
    with gr.Accordion("What this editor understands", open=False, visible=embedded, elem_id="words") as vocabulary:
        gr.Code(words.help_text(), language=None, show_label=False, interactive=False, show_line_numbers=False)
    parts["vocabulary"] = vocabulary
    with gr.Row():
        parts["edit"] = gr.Button("Edit", variant="primary", elem_id="edit", scale=3)
        parts["cancel"] = gr.Button("Cancel", elem_id="cancel", scale=1)
    with gr.Row():
        parts["model"] = gr.Dropdown(list(models.names), value=models.names[0], label="Model", elem_id="model")
        parts["preset"] = gr.Dropdown(list(presets), value=DEFAULT_PRESET, label="Preset", elem_id="preset")
        parts["restore"] = gr.Dropdown(
            [("as the preset", PRESET), *CHOICES["restore"]], value=PRESET, label="Restore", elem_id="restore"
        )
    with gr.Accordion("Seed and guidance", open=False):
        with gr.Row():
            parts["seed"] = gr.Number(0, label="Seed", elem_id="seed")
            parts["true_cfg_scale"] = gr.Number(None, label="Guidance scale", placeholder="the model's own")
        parts["negative_prompt"] = gr.Textbox(label="Negative prompt", max_length=LONGEST)
    parts["examples"] = gr.Dataset(
        components=[gr.Image(render=False), gr.Textbox(render=False)], label="Examples", headers=["", "Instruction"],
        samples=[[str(example.file), example.prompt] for example in examples], type="index", elem_id="examples",
    )  # fmt: skip
    return parts


def _showing() -> dict[str, Any]:
    """Right: the result, its cost, and what to do next."""
    parts: dict[str, Any] = {}
    parts["heading"] = gr.Markdown("No edit yet.", elem_id="result-heading")
    with gr.Tab("Before and after"):
        parts["slider"] = gr.ImageSlider(
            label="Before and after", type="pil", format="png", interactive=False, max_height=480, elem_id="result"
        )
    with gr.Tab("Where it looked"):
        parts["overlay"] = gr.Image(
            label="Bright: edited", type="pil", format="png", interactive=False, height=430, elem_id="overlay",
            buttons=["download", "fullscreen"],
        )  # fmt: skip
    with gr.Tab("Stock beside it"):
        parts["stock"] = gr.ImageSlider(
            label="Stock and SpecEdit", type="pil", format="png", interactive=False, max_height=480, elem_id="stock"
        )
        parts["compare"] = gr.Button("Run stock on the same picture", elem_id="compare")
    with gr.Row():
        parts["go_on"] = gr.Button("Edit this result", elem_id="go-on")
        parts["undo"] = gr.Button("Undo", elem_id="undo")
        parts["redo"] = gr.Button("Redo", elem_id="redo")
    parts["cost"] = gr.Markdown(elem_id="cost")
    with gr.Accordion("Stages", open=False):
        parts["stages"] = gr.Code(
            language=None, show_label=False, interactive=False, show_line_numbers=False, elem_id="stages"
        )
    with gr.Row():
        parts["picture_file"] = gr.DownloadButton("Download result", interactive=False, elem_id="download")
        parts["report_file"] = gr.DownloadButton("Download report", interactive=False, elem_id="download-report")
    parts["history"] = gr.Gallery(
        label="History", columns=4, height=230, object_fit="contain", fit_columns=False, format="png",
        interactive=False, buttons=["download", "download_all"], elem_id="history", preview=False,
    )  # fmt: skip
    return parts
