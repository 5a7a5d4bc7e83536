"""The scenes' vocabulary: names, colours, places and the phrasings of each edit.

Renderer, tokenizer and tests share it.
"""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 215, 50),
    "green": (50, 160, 70),
    "cyan": (60, 200, 215),
    "blue": (45, 85, 215),
    "purple": (130, 60, 180),
    "pink": (245, 130, 185),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "star", "hexagon", "ring", "cross")

# Column and row of a 3 x 3 board laid over the image.
PLACES: dict[str, tuple[int, int]] = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "center": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}

# Radius as a share of the shorter side.
SIZES: dict[str, float] = {"small": 0.10, "": 0.13, "large": 0.15}

# Edits with one right answer. A seed alone draws one of these.
KINDS: tuple[str, ...] = ("recolor", "remove", "add", "shape", "background", "greyscale")
# All edits: a texture has many right answers.
ALL_KINDS: tuple[str, ...] = (*KINDS, "texture")

# Several phrasings each; scenes.describe fills in the fields.
PHRASES: dict[str, tuple[str, ...]] = {
    "recolor": (
        "make the {object} {colour}",
        "change the color of the {object} to {colour}",
        "paint the {object} {colour}",
        "turn the {object} {colour}",
        "recolor the {object} to {colour}",
    ),
    "remove": (
        "remove the {object}",
        "delete the {object}",
        "take away the {object}",
        "erase the {object} from the picture",
    ),
    "add": (
        "add a {new} at the {place}",
        "put a {new} in the {place}",
        "place a {new} at the {place} of the image",
        "draw a {new} at the {place}",
    ),
    "shape": (
        "turn the {object} into a {shape}",
        "replace the {object} with a {shape}",
        "change the {object} to a {shape}",
        "make the {object} a {shape}",
    ),
    "background": (
        "change the background to {background}",
        "replace the background with {background}",
        "make the background {background}",
    ),
    "greyscale": (
        "make it greyscale",
        "convert the image to greyscale",
        "turn the picture black and white",
        "remove all color",
    ),
    "texture": (
        "fill the {region} with {material}",
        "cover the {region} with {material}",
        "paint the {region} with {material}",
        "turn the {region} into {material}",
    ),
}

# Materials of textures.py, in its order: probes and recorded tasks count on it.
MATERIALS: tuple[str, ...] = ("clouds", "marble", "wood grain", "pebbles", "ripples", "brush strokes")

# Backgrounds that an edit can name; c1 and c2 are colour names.
BACKGROUNDS: dict[str, str] = {
    "plain": "plain {c1}",
    "stripes": "{c1} and {c2} stripes",
    "checks": "a {c1} and {c2} checkerboard",
    "gradient": "a gradient from {c1} to {c2}",
}
