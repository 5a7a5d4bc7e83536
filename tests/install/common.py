"""What several tests in this folder use."""

QUICK = dict(steps=(1, 1, 1), draft_steps=1)


def processors(pipe):
    return list(pipe.transformer.attn_processors.values())


def same_objects(first, second):
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
