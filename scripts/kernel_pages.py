"""Tables and pictures of benchmarks/results/kernels*.json; make_docs.py puts them into the pages."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

OURS = "specedit_kernels"
LARGE = 25e6  # bytes moved, above which a copy's bandwidth is a fair reference
AXES = {"tflops": "TFLOP/s (dashed: a large matmul)", "gbps": "GB/s (dashed: a large copy)"}
Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def _ops(result: dict) -> dict[str, dict[str, dict[str, dict]]]:
    """Rows by operator, case and provider, in the file's order."""
    ops: dict[str, dict[str, dict[str, dict]]] = {}
    for row in result["rows"]:
        ops.setdefault(row["op"], {}).setdefault(row["case"], {})[row["provider"]] = row
    return ops


def _unit(row: dict) -> str:
    return "tflops" if "tflops" in row else "gbps"


def _rate(row: dict) -> str:
    value = row[_unit(row)]
    return f"{value:,.1f}" if value >= 1 else f"{value:.3f}"


def measured(result: dict) -> Iterator[Table]:
    """One table per operator: time, rate, share of the roofline and error of every provider."""
    for op, cases in _ops(result).items():
        rows = []
        for case, providers in cases.items():
            for provider, row in providers.items():
                rows.append(
                    [case, provider, f"{row['ms']:.3f}", _rate(row), f"{row['of_roofline']:.0%}",
                     f"{row['error']:.1e}"]
                )  # fmt: skip
        unit = {"tflops": "TFLOP/s", "gbps": "GB/s"}[_unit(row)]
        yield op, ["case", "provider", "ms", unit, "of roofline", "error"], rows


def goals(result: dict) -> Table:
    """The goals on a GPU with the worst measured case; a dash if the peer did not run."""
    ops = _ops(result)

    def worst(op: str, of) -> tuple[float, str] | None:
        found = [(value, case) for case, providers in ops.get(op, {}).items() if OURS in providers
                 for value in [of(providers)] if value is not None]  # fmt: skip
        return min(found, default=None)

    def faster(*peers: str):
        """Speedup over the fastest of `peers`, by default of all."""

        def of(providers: dict) -> float | None:
            times = [row["ms"] for name, row in providers.items()
                     if (name in peers if peers else not name.startswith(OURS))]  # fmt: skip
            return min(times) / providers[OURS]["ms"] if times else None

        return of

    def share(providers: dict) -> float | None:
        row = providers[OURS]
        return row["of_roofline"] if row["gbps"] * row["ms"] * 1e6 >= LARGE else None

    def quarter(providers: dict) -> float | None:
        """Speedup over every key where a quarter of the blocks is kept."""
        dense = providers.get("specedit_kernels, every key")
        return dense["ms"] / providers[OURS]["ms"] if dense and providers[OURS]["share"] == 0.25 else None

    wanted = [
        ("mixed_attention", "times FlexAttention with the same bias", faster("FlexAttention with bias"), 1.3),
        ("mixed_attention", "times cuDNN without a bias", faster("SDPA cuDNN without bias"), 0.85),
        ("mixed_attention", "times two passes merged", faster("flash, two passes merged by lse"), 1.0),
        ("mixed_attention_blocks", "times every key, a quarter kept", quarter, 1 / 0.35),
        ("gather_tokens", "of copy bandwidth, from 25 MB", share, 0.9),
        ("gather_tokens", "times PyTorch's fastest", faster(), 1.0),
        ("scatter_tokens", "of copy bandwidth, from 25 MB", share, 0.9),
        ("scatter_tokens", "times PyTorch's fastest", faster(), 1.0),
        ("qk_norm_rope", "of copy bandwidth, from 25 MB", share, 0.85),
        ("qk_norm_rope", "times the eager chain", faster("eager chain"), 3.0),
        ("expand_tokens", "times the eager chain", faster("eager chain"), 5.0),
    ]
    rows = []
    for op, what, of, goal in wanted:
        found = worst(op, of)
        value, case = ("-", "-") if found is None else (f"{found[0]:.2f}", found[1])
        verdict = "-" if found is None else "yes" if found[0] >= goal else "no"
        rows.append([op, what, f"{goal:.2f}", value, case, verdict])
    return "goals", ["operator", "speed", "goal", "worst case", "which", "reached"], rows


def draw(result: dict, folder: Path, stem: str) -> list[Path]:
    """A picture per operator: rates of all providers, grouped by case, with the roofline dashed."""
    paths = []
    for op, cases in _ops(result).items():
        names = list(dict.fromkeys(name for providers in cases.values() for name in providers))
        figure = Figure(figsize=(9, 1.5 + 0.13 * len(cases) * (len(names) + 2)), layout="constrained")
        axis = figure.subplots()
        height = 0.85 / len(names)
        for i, name in enumerate(names):
            here = [(at, providers[name]) for at, providers in enumerate(cases.values()) if name in providers]
            places = [at + (i - (len(names) - 1) / 2) * height for at, _ in here]
            axis.barh(places, [row[_unit(row)] for _, row in here], height, label=name)
        row = next(iter(next(iter(cases.values())).values()))
        axis.axvline(row[_unit(row)] / row["of_roofline"], color="black", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(cases)), list(cases))
        axis.margins(y=0.01)
        axis.invert_yaxis()
        axis.set_xlabel(AXES[_unit(row)])
        axis.set_title(op)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        paths.append(folder / f"{stem}-{op}.png")
        figure.savefig(paths[-1], dpi=90)
    return paths
