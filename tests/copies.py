"""Copies of models, several times faster than those of `copy.deepcopy`."""

import copy
import functools
import io
import pickle

import torch


class _Writer(pickle.Pickler):
    """Writes a number in place of each tensor."""

    def __init__(self, file):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors = {}

    def persistent_id(self, obj):
        if not isinstance(obj, torch.Tensor):
            return None
        return self.tensors.setdefault(id(obj), (len(self.tensors), obj))[0]


class _Reader(pickle.Unpickler):
    """Reads a copy of the tensor of each number."""

    def __init__(self, file, tensors):
        super().__init__(file)
        self.tensors, self.copied = tensors, {}

    def persistent_load(self, number):
        return copy.deepcopy(self.tensors[number], self.copied)


class Copies:
    """Calling it returns a copy of `original`, as it was when this was made, which shares nothing with it."""

    def __init__(self, original):
        file = io.BytesIO()
        writer = _Writer(file)
        writer.dump(original)
        self.written = file.getvalue()
        self.tensors = copy.deepcopy([tensor for _, tensor in writer.tensors.values()])

    def __call__(self):
        return _Reader(io.BytesIO(self.written), self.tensors).load()


def copying(make):
    """`make`, run once with each combination of options; every call returns a copy of what that gave."""
    made = functools.cache(lambda **options: Copies(make(**options)))
    return lambda **options: made(**options)()


def copies_of(parts):
    """{name: `Copies` of the part}."""
    return {name: Copies(part) for name, part in parts.items()}
