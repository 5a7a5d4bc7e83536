"""Takes work out of Triton's interpreter whose result nobody uses: more than half of its time on small blocks."""

import dataclasses
from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


def install():
    """Replace the interpreter's functions in this process."""
    builder, np_dtype, patch = interpreter.interpreter_builder, interpreter._get_np_dtype, interpreter._patch_lang
    # Whether an integer overflows is computed for every sum and product, and then dropped, as nothing asserts it.
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    known = {}

    def known_np_dtype(kind):
        if kind.name not in known:
            known[kind.name] = np_dtype(kind)
        return known[kind.name]

    patched = []

    def patch_once(function):
        # Every launch, and every call inside it, would replace each function of triton.language again.
        if not patched:
            patched.append(patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core})))
        return interpreter._LangPatchScope()  # of no changes: nothing is restored

    interpreter._get_np_dtype, interpreter._patch_lang = known_np_dtype, patch_once
