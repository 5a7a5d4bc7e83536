"""Whether steps matter: the texture distance of the stock embedded editor with few steps and with many.

    python -m benchmarks.texture_steps --cases 12 --size 256 --out benchmarks/results/texture-steps-256.json

The editor is a vehicle for comparing samplers if one step is clearly worse than 28, and more steps are better
throughout. All step counts edit the same unseen textures with the same seeds, in turns; no other table has them.
--resume continues the run in the file, also with more tasks.
"""

from benchmarks.scores import Scores, editor, options, some
from specedit import micro

STEPS = (1, 2, 4, 8, 28)
FIRST = 20_000  # seeds of the tasks, beyond those of quality.py and sweep.py


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__, cases=12, textures=False).parse_args(arguments)
    chosen = some({f"stock-{steps}": steps for steps in STEPS}, args.only)
    cases = micro.texture_cases(args.cases, args.size, FIRST)
    scores = Scores.asked("texture_steps", args, cases)
    pipe = editor(args.model)
    for name, todo in scores.turns(chosen):
        scores.score(pipe, name, todo, chosen[name], steps=chosen[name])


if __name__ == "__main__":
    main()
