"""`python -m specedit_kernels.tune` on the GPU that is not there: nothing is timed, the first candidate wins.

python -m benchmarks.dry_gpu.tune --out FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import dry_gpu
from specedit_kernels import tune

CAPABILITY = (9, 0)
KEYS, ROWS = 128, 64  # instead of an edit's


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if (why := dry_gpu.missing()) is not None:
        print(f"dry_gpu.tune: {why}", file=sys.stderr)
        return 2
    from specedit_kernels.gpu import launch

    tables: tune.Tables = {}
    with dry_gpu.use(CAPABILITY, generates=False) as gpu:
        for kernel, shape in tune.shapes(CAPABILITY, quick=True):
            small = shape | ({"keys": KEYS} if "keys" in shape else {})
            launch_with, _ = tune.workload(kernel, small, "cpu", rows=ROWS)
            config = next(tune.candidates(kernel, small))
            before = gpu.launches
            launch_with(config)
            assert gpu.launches == before + 1, kernel
            print(kernel, shape, config, flush=True)
            tables.setdefault(kernel, []).append({"shape": shape, "config": config})
        errors = gpu.errors
    default = json.loads((launch.CONFIG_FOLDER / launch.default_file_name(CAPABILITY)).read_text())
    header = {name: default.pop(name) for name in ("gpu", "capability", "measured")}
    tune.complete(tables, default)
    tune.write(options.out, header, tables)
    print(f"wrote {options.out}", *errors, sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
