"""Writes every figure of README.md, CONTRIBUTING.md and docs/ from the JSON files in benchmarks/results.

    python scripts/make_docs.py [--check]

The text between `<!-- table: NAME -->` and `<!-- end -->` is replaced. --check writes nothing, and fails if a page is
out of date. Pictures go to docs/images. The files beside this one make the tables and pictures.
"""

import argparse
import re
import sys

import docs_choosing
import docs_few_steps
import docs_figures as figures
import docs_gallery
import docs_inpainting
import docs_measured as measured
import docs_methods
import docs_predicted as predicted
import docs_quality as quality
import docs_readme as readme
import docs_scale
import kernel_pages
from docs_results import RESULTS, ROOT, load

from specedit.micro import words

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKERS = {
    "kernels": measured.kernels,
    "forecast": quality.forecast,
    "forecast-plan": predicted.forecast_plan,
    "forecast-paper": predicted.forecast_paper,
    "quality": quality.quality,
    "methods": docs_methods.methods,
    "all-methods": docs_methods.all_methods,
    "ablations": docs_methods.ablations,
    "kinds": quality.kinds,
    "small": quality.small_edits,
    "sweep": quality.sweep,
    "few": docs_few_steps.few,
    "texture-steps": quality.texture_steps,
    "bench": measured.bench,
    "plan": predicted.plan,
    "plan-models": predicted.plan_models,
    "plan-inpainting": docs_inpainting.inpainting,
    "plan-qwen": predicted.plan_qwen,
    "switches": predicted.switches,
    "modulation": predicted.modulation,
    "training": measured.training,
    "verification": measured.verification,
    "decoding": measured.decoding,
    "call-overhead": measured.call_overhead,
    "roofline": predicted.roofline,
    "scale": docs_scale.machines,
    "scale-count": docs_scale.count,
    "throughput": docs_scale.throughput,
    "host-time": predicted.host_time,
    "kernel-loops": predicted.kernel_loops,
    "real": measured.real,
    "session": measured.session,
    "steps": measured.steps,
    "gains": readme.gains,
    "models": readme.models,
    "gpu-state": readme.gpu_state,
    "choosing": docs_choosing.choosing,
    "gallery": docs_gallery.gallery,
    "setup": readme.setup,
    "test-times": readme.test_times,
    "words": lambda _: f"```\n{words.help_text()}\n```",
}


def fill(text: str) -> str:
    """Fill every marker of a page. A name is MAKER:FILE, FILE without .json."""

    def place(match: re.Match) -> str:
        maker, _, file = match["name"].partition(":")
        return f"<!-- table: {match['name']} -->\n{MAKERS[maker](file + '.json')}\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>\S+) -->\n.*?<!-- end -->", place, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        text = page.read_text()
        filled = fill(text)
        if filled != text:
            stale.append(page)
            if not args.check:
                page.write_text(filled)
    if args.check:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is out of date; run python scripts/make_docs.py")
        return 1 if stale else 0
    for file in sorted(RESULTS.glob("quality-*.json")):
        figures.pareto(file.name, ROOT / "docs" / "images" / f"{file.stem}.png")
    for file in sorted(RESULTS.glob("methods-*.json")):
        docs_methods.pareto(file.name, ROOT / "docs" / "images" / f"{file.stem}.png")
    for file in sorted(RESULTS.glob("few-steps-*.json")):
        docs_few_steps.pareto(file.name, ROOT / "docs" / "images" / f"{file.stem}.png")
    for file in sorted(RESULTS.glob("sweep-*.json")):
        figures.sweep_curves(file.name, ROOT / "docs" / "images" / f"{file.stem}.png")
    for file in sorted(RESULTS.glob("kernels*.json")):
        kernel_pages.draw(load(file.name), ROOT / "docs" / "images", file.stem)
    for file in sorted(RESULTS.glob("forecast-*.json")):
        figures.forecast_pareto(file.name, ROOT / "docs" / "images" / f"{file.stem}.png")
    for file in sorted(RESULTS.glob("end_to_end-real*.json")):
        figures.clock_figure(file.name, ROOT / "docs" / "images" / f"{file.stem}-clock.png")
        figures.stages_figure(file.name, ROOT / "docs" / "images" / f"{file.stem}-stages.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
