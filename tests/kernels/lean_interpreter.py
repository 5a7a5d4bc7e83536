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
    describe_tensors_once()


def describe_tensors_once():
    """Blocks of one shape and type share the description of it, which takes as long as their numbers."""
    of_block, of_tensor, block_init, tensor_init = {}, {}, tl.block_type.__init__, tl.tensor.__init__

    def known_block(self, element_ty, shape):
        key = element_ty.name, *[tl.core._unwrap_if_constexpr(size) for size in shape]
        if key not in of_block:
            block_init(self, element_ty, shape)
            of_block[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        self.__dict__.update(of_block[key], element_ty=element_ty)

    def known_tensor(self, handle, type):
        if type.name not in of_tensor:
            tensor_init(self, handle, type)
            of_tensor[type.name] = {"shape": self.shape, "numel": self.numel}
        self.__dict__.update(of_tensor[type.name], handle=handle, type=type, dtype=type.scalar)

    tl.block_type.__init__, tl.tensor.__init__ = known_block, known_tensor
