"""The class of an installed pipeline: to its users the stock class, but for `__call__`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from diffusers.utils import BaseOutput

from . import served
from .installation import installation_of

_OWN_CALL, _STOCK = "_specedit_call", "_specedit_stock"  # what marks such a class

_MASK_DOC = """
        edit_mask (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, *optional*, keyword only):
            Where to edit: above zero = edit, any size, or a list of masks. A layer with alpha counts where it was
            painted (`specedit.method.masks.read` has the exact rules). Replaces SpecEdit's draft and verification.
"""


class Accelerated(type):
    """Metaclass that keeps `__call__` in place when another library undoes its own patch of the class.

    A library such as cache-dit that was enabled before SpecEdit has patched the stock class. When it is disabled it
    writes the old call to `type(pipe)` and deletes its marks there. Both are passed on to the stock class.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        own = vars(cls).get(_OWN_CALL)
        if name == "__call__" and own is not None and not reaches(value, own):
            stock = vars(cls)[_STOCK]
            if reaches(stock.__call__, value):  # what their wrapper around the stock call once replaced
                setattr(stock, name, value)
                return
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if name not in vars(cls) and _STOCK in vars(cls) and hasattr(cls, name):
            delattr(vars(cls)[_STOCK], name)
        else:
            super().__delattr__(name)


def subclass(stock: type, call: Callable[..., Any], **body: Any) -> type:
    """A subclass of the same name for one instance alone: save_pretrained and isinstance see what they always saw.

    Making an instance of it makes one of `stock`, so `type(pipe)(**parts)`, `from_pipe` and `from_pretrained` give
    stock pipelines.

    `call(pipe, installation, record, args, kwargs, edit_mask)` runs in place of the stock call.
    `body`: other attributes of the class.
    """

    constructed: Any = stock

    @functools.wraps(constructed.__init__)  # for inspect.signature(type(pipe))
    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs) if _OWN_CALL in vars(cls) else object.__new__(cls)

    function = _own_function(stock, call)
    body |= {
        "__new__": __new__,
        "__call__": function,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        _OWN_CALL: function,
        _STOCK: stock,
    }
    made: type = _metaclass(type(stock))(stock.__name__, (stock,), body)
    return made


def _metaclass(stock: type) -> type:
    if issubclass(stock, Accelerated):
        return stock
    return Accelerated if stock is type else type("Accelerated", (Accelerated, stock), {})


def _own_function(stock: type, call: Callable[..., Any]) -> Callable[..., Any]:
    """`__call__` of one class: the stock call's signature, annotations and docstring, and `edit_mask`."""

    @functools.wraps(stock.__call__)
    def __call__(self: Any, *args: Any, edit_mask: Any = None, **kwargs: Any) -> Any:
        installation = installation_of(self)
        if installation is None or installation.stock_class is not stock:
            more = {} if edit_mask is None else {"edit_mask": edit_mask}
            return stock.__call__(self, *args, **kwargs, **more)
        with installation.calls.record() as record, served.taken(installation, record) as seen:
            output = call(self, seen, record, args, kwargs, edit_mask)
        if isinstance(output, BaseOutput):
            output.report = record.report  # in addition to the output's items; None of a stock call
        return output

    __call__.__dict__["__signature__"] = _with_mask(inspect.signature(stock.__call__))
    __call__.__annotations__ = dict(getattr(stock.__call__, "__annotations__", {}), edit_mask=Any)
    __call__.__doc__ = f"{(stock.__call__.__doc__ or '').rstrip()}\n{_MASK_DOC}"
    return __call__


def _with_mask(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    if "edit_mask" in signature.parameters:  # a class that another library changed after an earlier installation
        return signature
    end = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    mask = inspect.Parameter("edit_mask", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Any)
    return signature.replace(parameters=[*parameters[:end], mask, *parameters[end:]])


def reaches(function: Any, other: Any) -> bool:
    """Whether `function` is `other` or a wrapper around it, by `__wrapped__` or in its closure."""
    seen, found = set(), [function]
    while found:
        one = found.pop()
        if one is other:
            return True
        if id(one) not in seen:
            seen.add(id(one))
            found += _wrapped(one)
    return False


def _wrapped(function: Any) -> Iterator[Any]:
    if (inner := getattr(function, "__wrapped__", None)) is not None:
        yield inner
    for cell in getattr(function, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if inspect.isfunction(value):
            yield value


def is_ours(cls: type) -> bool:
    return _OWN_CALL in vars(cls)


def stock_of(cls: type) -> type:
    """The first class beneath that is none of these."""
    return next(base for base in cls.__mro__ if not is_ours(base))


def acts(pipe: Any, stock: type) -> bool:
    """Whether a call of `pipe` reaches the call that was made over `stock`."""
    made = next((c for c in type(pipe).__mro__ if vars(c).get(_STOCK) is stock), None)
    return made is not None and reaches(vars(made)["__call__"], vars(made)[_OWN_CALL])


def restore_class(pipe: Any) -> None:
    """Give `pipe` its stock class.

    A class that another library has patched since stays: without an installation it behaves as stock, and the library
    finds its patch where it left it.
    """
    while is_ours(cls := type(pipe)) and vars(cls)["__call__"] is vars(cls)[_OWN_CALL]:
        pipe.__class__ = vars(cls)[_STOCK]
