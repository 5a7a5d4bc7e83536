"""What the machine code of a kernel says: registers, spills, matrix instructions, and what its main loop issues.

Read from a cubin with the cuobjdump that comes with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

# Classes of instructions in a main loop, by the start of the opcode.
_CLASSES = {
    "matrix": ("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTCQMMA"),
    "mufu": ("MUFU",),
    "fma": ("FFMA", "FMUL", "FADD"),
    "barrier": ("BAR", "SYNCS", "WARPGROUP", "WARPSYNC"),
}
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """A compiled kernel. `instructions` are (address, text) in order, of every function in a cubin that was listed."""

    registers: int
    spills: int  # bytes of stack and local memory per thread, and instructions that access them
    instructions: tuple[tuple[int, str], ...]

    def count(self, opcode: str) -> int:
        """Instructions whose opcode matches the regular expression."""
        return sum(bool(re.match(opcode, _opcode(text))) for _, text in self.instructions)

    @property
    def serialized(self) -> bool:
        """Whether each wgmma waits for the one before.

        The steps of one product share a scoreboard that the last of them sets. If ptxas serialises them ("Potential
        Performance Loss" in its log), all set it.
        """
        products = [text for _, text in self.instructions if _opcode(text).startswith("HGMMA")]
        return bool(products) and all("gsb0" in text for text in products)

    def main_loop(self) -> Counter[str]:
        """Instructions of each class ("matrix", "mufu", "fma", "barrier" and "all") in the shortest loop with matrix
        instructions; a jump back from the code of the tail spans longer ones. "tensor" has the cycles that its matrix
        instructions take. Empty if no loop has any."""
        loops = [Counter(_classes(body)) + _tensor_cycles(body) for body in self._loops()]
        return min((loop for loop in loops if loop["matrix"]), key=lambda loop: loop["all"], default=Counter())

    def _loops(self) -> list[list[str]]:
        place = {address: number for number, (address, _) in enumerate(self.instructions)}
        found = []
        for number, (address, text) in enumerate(self.instructions):
            target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < address and int(target[1], 16) in place:
                body = [one for _, one in self.instructions[place[int(target[1], 16)] : number + 1]]
                if not any(one.startswith("EXIT") for one in body):  # else from behind the kernel: a wait's next try
                    found.append(body)
        return found


def _opcode(text: str) -> str:
    words = text.split()
    return words[1] if words[0].startswith("@") and len(words) > 1 else words[0]


def _classes(body: list[str]) -> list[str]:
    opcodes = [_opcode(text) for text in body]
    named = [name for opcode in opcodes for name, starts in _CLASSES.items() if opcode.split(".")[0] in starts]
    return named + ["all"] * len(opcodes)


def _tensor_cycles(body: list[str]) -> Counter[str]:
    """Cycles of one of an SM's four tensor cores, at its peak rate: m64nNk16 takes N / 2 on sm_90, m16n8k16 8 on sm_80.

    A warp's share of a wgmma is 16 rows. Other instructions (tcgen05, float32) are not counted.
    """
    total = Counter[str]()
    for text in body:
        if wide := re.search(r"\bHGMMA\.64x(\d+)x16\b", text):
            total["tensor"] += int(wide[1]) // 2
        elif re.search(r"\bHMMA\.16816\b", text):
            total["tensor"] += 8
    return total


def bound(loop: Mapping[str, int]) -> float | None:
    """The largest share of the time in which the tensor cores can work, from what a main loop issues, or None.

    Each sub-core issues one instruction of a warp per cycle, and a MUFU occupies its unit for 8. Memory, latency and
    barriers take nothing here, so a real kernel stays below.
    """
    if not loop.get("tensor"):
        return None
    return loop["tensor"] / max(loop["tensor"], loop["all"], 8 * loop.get("mufu", 0))


def read(cubin: bytes, *, listing: bool = True) -> Code:
    """Disassemble a cubin, or without `listing` only if threads have memory of their own, which spills need.

    A disassembler takes half a second to start.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            command = [knobs.nvidia.cuobjdump.path, flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
        memory = int(usage["STACK"]) + int(usage["LOCAL"])
        lines = _LINE.findall(dump("--dump-sass")) if listing or memory else []
    instructions = tuple((int(address, 16), text) for address, text in lines)
    local = sum(_opcode(text).split(".")[0] in ("LDL", "STL") for _, text in instructions)
    return Code(int(usage["REG"]), memory + local, instructions)
