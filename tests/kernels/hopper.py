"""Runs the source of the ping-pong kernel on the CPU, warps side by side in an order drawn by chance.

Triton's interpreter runs no Gluon. Here the kernel's own functions run as Python, over stand-ins for the few functions
of Gluon that it calls. Tensors are PyTorch's. What a GPU does late happens late: copies by TMA land at any time
before their barrier says so, and a product reads shared memory at any time between its start and its wait. Memory that
may not be read is NaN.
"""

import inspect
import math
import random
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

from specedit_kernels import gpu
from specedit_kernels.gpu import (
    attention_launch,
    attention_order,
    attention_parts,
    attention_pingpong,
    attention_plan,
)


class Deadlock(AssertionError):
    """Every warp waits, and no copy is on its way."""


class Pointer:
    """An address in a flat tensor: an offset, or a tensor of them."""

    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, more):
        return Pointer(self.data, self.offset + more)


class Block:
    """Shared memory: a view of a tensor, or barriers of a ring."""

    def __init__(self, machine, data):
        self.machine, self.data, self.dtype = machine, data, data.dtype

    def index(self, i):
        return Block(self.machine, self.data[i])

    def reshape(self, shape):
        return Block(self.machine, self.data.view(shape))

    def permute(self, axes):
        return Block(self.machine, self.data.permute(axes))

    @property
    def place(self):
        return self.data.data_ptr()

    def store(self, value):
        self.machine.step("store", self.place)
        self.data.copy_(value)

    def load(self, layout):
        self.machine.step("load", self.place)
        return self.data.clone()


class Ring(Block):
    """Barriers, each a dict."""

    def __init__(self, machine, count):
        self.machine = machine
        machine.rings += 1
        self.barriers = [{"name": (machine.rings, i)} for i in range(count)]
        machine.barriers += self.barriers

    def index(self, i):
        return self.barriers[i]


class Descriptor:
    """A tensor (B, N, H, D) in blocks of `rows`; what lies outside reads as 0."""

    def __init__(self, tensor, rows, dim_p2):
        self.tensor, self.rows, self.dim_p2, self.layout = tensor, rows, dim_p2, None
        self.dtype = tensor.dtype
        self.block_type = SimpleNamespace(nbytes=rows * dim_p2 * tensor.element_size())

    def read(self, at):
        sample, head, row, column = at
        batch, tokens, heads, dim = self.tensor.shape
        block = torch.zeros(self.rows, self.dim_p2, dtype=self.dtype)
        if 0 <= sample < batch and 0 <= head < heads and column == 0:
            first, stop = max(row, 0), min(row + self.rows, tokens)
            if first < stop:
                block[first - row : stop - row, :dim] = self.tensor[sample, first:stop, head]
        return block


class Product:
    """A product of a warpgroup that may not have been computed."""

    def __init__(self, a, b, acc):
        self.operands, self.result = (a, b, acc), None

    def compute(self):
        if self.result is None:
            a, b, acc = (x.data if isinstance(x, Block) else x for x in self.operands)
            if isinstance(acc, Product):
                acc = acc.compute()
            product = a.float() @ b.float()
            self.result = product if acc is None else acc + product
        return self.result


class Machine:
    """One program at a time.

    `traces` has what each warp of the last one did, in its own order: ("wait", barrier, parity), ("arrive", barrier),
    ("expect", barrier, bytes), ("copy", barrier, bytes, place), ("store", place), ("load", place), ("mma", place) and
    ("mma wait", how many it leaves open).
    """

    def __init__(self, seed=0):
        self.random = random.Random(seed)
        self.traces, self.barriers, self.rings, self.program = [], [], 0, 0
        self.landing, self.groups = [], {}
        self.turn = threading.Condition()
        self.running = self.blocked = None
        self.failure = None

    # --- scheduling: exactly one thread runs, the others wait for their turn ---

    def step(self, *action):
        """Record an action of this warp, and let chance choose who acts next."""
        if self.running is None:
            return
        me = threading.current_thread().number
        self.traces[me].append(action)
        self.yield_to_any(me)

    def yield_to_any(self, me, ready=lambda: True):
        self.waiting[me] = ready
        with self.turn:
            self.choose()
            self.turn.notify_all()
            while self.running != me:
                self.turn.wait()
        if self.failure is not None:
            raise self.failure

    def choose(self):
        """Copies land and products compute by chance; then a warp that can go on does."""
        for copy in [one for one in self.landing if self.random.random() < 0.3]:
            self.land(copy)
        for products in self.groups.values():
            if products and self.random.random() < 0.2:
                products[0].compute()
        able = [number for number, ready in self.waiting.items() if ready()]
        while not able and self.landing:
            self.land(self.random.choice(self.landing))
            able = [number for number, ready in self.waiting.items() if ready()]
        if not able and self.waiting:
            self.failure = self.failure or Deadlock(f"all warps wait: {[trace[-1:] for trace in self.traces]}")
            able = list(self.waiting)
        self.running = self.random.choice(able) if able else -1

    def specialize(self, functions, warps, registers):
        self.traces = [[] for _ in functions]
        self.waiting = {number: (lambda: True) for number in range(len(functions))}
        self.running = -1

        def work(number, function, arguments):
            with self.turn:
                while self.running != number:
                    self.turn.wait()
            try:
                if self.failure is None:
                    function(*arguments)
            except Exception as error:
                self.failure = self.failure or error
            with self.turn:
                del self.waiting[number]
                self.choose()
                self.turn.notify_all()

        threads = [threading.Thread(target=work, args=(n, *one), daemon=True) for n, one in enumerate(functions)]
        for number, thread in enumerate(threads):
            thread.number = number
            thread.start()
        with self.turn:
            self.choose()
            self.turn.notify_all()
        for thread in threads:
            thread.join()
        self.running = None
        if self.failure is not None:
            raise self.failure
        assert not self.landing, "a program ended before its copies had landed"
        assert not any(products for products in self.groups.values()), "a program ended before its products"

    # --- barriers ---

    def init(self, barrier, count):
        barrier.update(count=count, pending=count, bytes=0, phase=0)

    def complete(self, barrier):
        assert barrier["pending"] >= 0 and barrier["bytes"] >= 0, barrier
        if barrier["pending"] == 0 and barrier["bytes"] == 0:
            barrier["pending"] = barrier["count"]
            barrier["phase"] += 1

    def arrive(self, barrier, count=1):
        self.step("arrive", barrier["name"])
        barrier["pending"] -= count
        self.complete(barrier)

    def expect(self, barrier, size):
        self.step("expect", barrier["name"], size)
        barrier["pending"] -= 1
        barrier["bytes"] += size
        self.complete(barrier)

    def wait(self, barrier, parity):
        me = threading.current_thread().number
        self.traces[me].append(("wait", barrier["name"], parity))
        self.yield_to_any(me, lambda: barrier["phase"] % 2 != parity)

    # --- copies and products ---

    def copy(self, descriptor, at, barrier, target):
        self.step("copy", barrier["name"], descriptor.block_type.nbytes, target.place)
        target.data.fill_(math.nan)
        self.landing.append((descriptor, at, barrier, target))

    def land(self, copy):
        descriptor, at, barrier, target = copy
        self.landing.remove(copy)
        target.data.view(descriptor.rows, descriptor.dim_p2).copy_(descriptor.read(at))
        barrier["bytes"] -= descriptor.block_type.nbytes
        self.complete(barrier)

    def mma(self, a, b, acc, use_acc=True, is_async=False):
        assert is_async and isinstance(b, Block)
        product = Product(a, b, acc if use_acc else None)
        self.groups.setdefault(threading.current_thread().number, []).append(product)
        self.step("mma", b.place)
        return product

    def mma_wait(self, outstanding, deps):
        products = self.groups[threading.current_thread().number]
        while len(products) > outstanding:
            products.pop(0).compute()
        self.step("mma wait", outstanding)
        (product,) = deps
        assert product.result is not None, "waited for another product"
        return product.result

    # --- the language ---

    def language(self):
        """What stands for `gl`, and for `tl` in functions that both kernels share."""

        def load(pointer, mask=None, other=0):
            if not isinstance(pointer.offset, torch.Tensor):
                return pointer.data[pointer.offset].item() if mask is None or mask else other
            offset, mask = torch.broadcast_tensors(pointer.offset, torch.tensor(True) if mask is None else mask)
            inside = offset[mask]
            assert not inside.numel() or (inside.min() >= 0 and inside.max() < len(pointer.data)), "outside of a tensor"
            result = torch.full(offset.shape, other, dtype=pointer.data.dtype)
            result[mask] = pointer.data[inside]
            return result

        def store(pointer, value, mask):
            offset, mask = torch.broadcast_tensors(pointer.offset, mask)
            inside = offset[mask]
            assert not inside.numel() or (inside.min() >= 0 and inside.max() < len(pointer.data)), "outside of a tensor"
            assert pointer.data[inside].isnan().all(), "written twice"
            pointer.data[inside] = value[mask]

        def maximum(a, b):
            return torch.maximum(a, b) if isinstance(a, torch.Tensor) else max(a, b)

        def where(condition, a, b):
            if isinstance(condition, torch.Tensor):
                return torch.where(condition, a, b)
            return a if condition else b

        def allocate(dtype, shape, layout):
            if dtype == torch.int64:
                return Ring(self, shape[0])
            return Block(self, torch.full(shape, math.nan, dtype=dtype))

        def nothing(*args, **kwargs):
            return None

        return SimpleNamespace(
            load=load, store=store, maximum=maximum, where=where, minimum=min, allocate_shared_memory=allocate,
            arange=lambda start, stop, layout: torch.arange(start, stop),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2,
            convert_layout=lambda x, layout: x, cast=lambda x, dtype: x, cdiv=lambda a, b: -(-a // b),
            program_id=lambda axis: self.program, static_range=range, warp_specialize=self.specialize,
            float32=torch.float32, int64=torch.int64, NVMMADistributedLayout=nothing, DotOperandLayout=nothing,
            NVMMASharedLayout=gl.NVMMASharedLayout, SliceLayout=nothing, BlockedLayout=nothing,
            SwizzledSharedLayout=nothing,
        )  # fmt: skip


@contextmanager
def simulated(monkeypatch, seed=0):
    """A machine on which `attention_pingpong`'s functions are called as Python."""
    machine = Machine(seed)
    language = machine.language()
    with monkeypatch.context() as patch:
        for module in (attention_pingpong, attention_plan, attention_order):
            for name, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    patch.setattr(module, name, function.fn)
        for module in (attention_plan, attention_order):
            patch.setattr(module, "tl", language)
        barriers = SimpleNamespace(
            init=machine.init, expect=machine.expect, arrive=machine.arrive, wait=machine.wait, MBarrierLayout=list
        )
        for name, stand_in in (
            ("gl", language), ("mbarrier", barriers), ("_copy", machine.copy), ("warpgroup_mma", machine.mma),
            ("warpgroup_mma_wait", machine.mma_wait), ("fence_async_shared", lambda: None),
            ("LOG2_E", attention_parts.LOG2_E.value),
        ):  # fmt: skip
            patch.setattr(attention_pingpong, name, stand_in)
        patch.setattr(attention_launch, "Launch", type("OfMachine", (Launch,), {"machine": machine}))
        patch.setattr(attention_launch, "why_no_pingpong", lambda: None)
        patch.setattr(gpu, "check_device", lambda device: None)
        yield machine


class Launch:
    """In place of `prepared.Launch`: runs every program of a grid on a machine."""

    machine = None

    def __init__(self, kernel, grid, descriptors, **options):
        assert options == {"num_warps": 4}
        self.kernel, self.grid, self.descriptors = kernel, grid, descriptors

    def __call__(self, *arguments):
        given = dict(zip(inspect.signature(self.kernel).parameters, arguments, strict=True))
        for name, value in given.items():
            if name.endswith("_desc"):
                fields = self.descriptors[list(given).index(name)](value)
                given[name] = Descriptor(value if value.dim() == 4 else value[None], *fields.block_shape[2:])
            elif isinstance(value, torch.Tensor):
                given[name] = Pointer(torch.as_strided(value, (reach(value),), (1,)))
        for name in ("out", "lse"):
            if given[name] is not None:
                given[name].data.fill_(math.nan)  # `store` writes where nothing was
        for program in range(self.grid[0]):
            self.machine.program = program
            self.kernel(**given)


def reach(tensor):
    """Elements from a tensor's first to its last in memory."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
