"""Every order in which warps can act, of the actions that a `hopper.Machine` recorded.

What a warp does depends on lengths alone, so its actions in one order are its actions in all. A state is how far each
warp has come, which copies are on their way, and the barriers. Warps take turns before a wait and before an arrival
only: a write at its earliest and a read's end at its latest conflict if any do.
"""

from collections import defaultdict


def explore(traces, counts):
    """Walk through all orders, and return the number of states.

    traces: the actions of each warp, the loading one last. counts: barrier -> arrivals that complete its phase.

    Raises:
        AssertionError: a state from which nothing goes on, or an action that a GPU would answer with wrong numbers: a
            write over what is still to be read, a read of what has not landed, an arrival too many.
    """
    model = _Model(traces, counts)
    fresh = tuple((count, 0, 0) for count in counts.values())  # arrivals and bytes that are missing, and the parity
    start = ((0,) * len(traces), frozenset(), fresh)
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        found = list(model.next(state))
        at, flying, _ = state
        if not found:
            waits = [trace[i] for i, trace in zip(at, traces) if i < len(trace)]
            assert not waits, f"all wait: {waits}"
            assert not flying, "a copy is on its way at the end"
        for one in found:
            if one not in seen:
                seen.add(one)
                todo.append(one)
    return len(seen)


class _Model:
    def __init__(self, traces, counts):
        self.traces, self.numbers = traces, {name: i for i, name in enumerate(counts)}
        self.counts = list(counts.values())
        self.began, self.over = zip(*map(_reads, traces[:-1]))
        self.writes = defaultdict(list)  # place -> which of the loading warp's actions write it
        for i, action in enumerate(traces[-1]):
            if action[0] in ("copy", "store"):
                self.writes[action[-1]].append(i)

    def next(self, state):
        at, flying, barriers = state
        for copy in flying:
            _, name, size, _ = self.traces[-1][copy]
            yield at, flying - {copy}, self.changed(barriers, name, size=-size)
        for warp, trace in enumerate(self.traces):
            if at[warp] < len(trace) and (then := self.act(warp, state)) is not None:
                while then[0][warp] < len(trace) and trace[then[0][warp]][0] not in ("wait", "arrive"):
                    then = self.act(warp, then)
                yield then

    def act(self, warp, state):
        """The state after a warp's next action, or None if it has to wait."""
        at, flying, barriers = state
        number = at[warp]
        what, *which = self.traces[warp][number]
        if what == "wait":
            name, parity = which
            if barriers[self.numbers[name]][2] == parity:
                return None
        elif what == "arrive":
            barriers = self.changed(barriers, which[0], arrivals=1)
        elif what == "expect":
            barriers = self.changed(barriers, which[0], arrivals=1, size=which[1])
        elif warp == len(self.traces) - 1:
            earlier = self.writes[which[-1]].index(number)
            for i, over in zip(at, self.over):
                assert over[i].get(which[-1], 0) >= min(earlier, over[-1].get(which[-1], 0)), "written too soon"
            flying = flying | {number} if what == "copy" else flying
        elif what in ("mma", "load") and which[0] in self.writes:
            written = [write for write in self.writes[which[0]] if write < at[-1]]
            assert len(written) == self.began[warp][number].get(which[0], 0) + 1, "read too soon or too late"
            assert flying.isdisjoint(written), "read before it has landed"
        return (*at[:warp], number + 1, *at[warp + 1 :]), flying, barriers

    def changed(self, barriers, name, arrivals=0, size=0):
        number = self.numbers[name]
        missing, flying, parity = barriers[number]
        missing, flying = missing - arrivals, flying + size
        assert missing >= 0, "an arrival too many"
        if missing == 0 and flying == 0:
            missing, parity = self.counts[number], 1 - parity
        return (*barriers[:number], (missing, flying, parity), *barriers[number + 1 :])


def _reads(trace):
    """Before each action and at the end: how often each place was read, and how often that is over."""
    began, over, running = defaultdict(int), defaultdict(int), []
    all_began, all_over = [{}], [{}]
    for what, *which in trace:
        if what in ("mma", "load"):
            began[which[0]] += 1
            running.append(which[0])
        left = which[0] if what == "mma wait" else len(running) - (what == "load")
        while len(running) > left:
            over[running.pop(-1 if what == "load" else 0)] += 1
        all_began.append(dict(began))
        all_over.append(dict(over))
    return all_began, all_over
