"""Hooks on a transformer belong to everyone who shares it: they go with the last installation and the last call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..hold import Hold
from ..method.adapter import Adapter
from .installation import Installation, Token, installation_of

_USERS = "_specedit_users"  # on the transformer
LOCK = threading.RLock()  # while hooks come and go; never during a call


class Users:
    """The installed pipelines and running calls that need the hooks on one transformer."""

    def __init__(self) -> None:
        self.pipes: weakref.WeakSet[Any] = weakref.WeakSet()
        self.runs: weakref.WeakSet[Token] = weakref.WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:  # a copied transformer has no users yet
        return Users, ()

    def __bool__(self) -> bool:
        return bool(len(self.pipes) or len(self.runs))


def attach(pipe: Any, installation: Installation) -> Users:
    """Put the hooks in place for `pipe`; idempotent."""
    model = _inner(pipe.transformer)
    with Hold(LOCK):
        users: Users = vars(model).setdefault(_USERS, Users())
        if installation_of(pipe) is installation:  # or it was uninstalled between its call and here
            users.pipes.add(pipe)
            installation.transformers.add(model)
        installation.adapter.attach(pipe)
    return users


@contextmanager
def running(pipe: Any, installation: Installation) -> Iterator[None]:
    """The hooks stay in place inside this block, even if a pipeline is uninstalled meanwhile."""
    run, model = Token(), _inner(pipe.transformer)
    try:
        with Hold(LOCK):
            attach(pipe, installation).runs.add(run)
        yield
    finally:
        with Hold(LOCK):
            if (users := _users(model)) is not None:
                users.runs.discard(run)
            detach_unused(model, installation.adapter)


def leave(pipe: Any, installation: Installation | None, adapter: Adapter | None) -> None:
    """Take `pipe` off the transformers that were hooked for it, and remove hooks that have no other user."""
    models = set(installation.transformers) if installation is not None else set()
    current = _inner(getattr(pipe, "transformer", None))
    if isinstance(current, nn.Module):  # it may already be removed, to free memory
        models.add(current)
    for model in models:
        if (users := _users(model)) is not None:
            users.pipes.discard(pipe)
        if adapter is not None:
            detach_unused(model, adapter)


def detach_unused(model: nn.Module, adapter: Adapter) -> None:
    """Take the hooks off unless an installed pipeline or a running call needs them."""
    if not _users(model):
        adapter.detach(SimpleNamespace(transformer=model))
        vars(model).pop(_USERS, None)


def _users(model: nn.Module) -> Users | None:
    return vars(model).get(_USERS)


def _inner(transformer: Any) -> Any:
    """The module that torch.compile wrapped, or the transformer itself."""
    return getattr(transformer, "_orig_mod", transformer)
