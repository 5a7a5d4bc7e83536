"""Run a plan: every result is recorded as it comes, and the results file is written however the run ends."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from .jobs import Job
from .planning import Plan
from .results import FAILED, Folder, Journal, Result
from .worker import Worker

Edits = Callable[[Sequence[Job]], Iterator[Result]]  # results in any order, at most one a job


@dataclass(frozen=True)
class Summary:
    """Results of all rows in the input's order, and how many of them were done before."""

    results: list[Result]
    before: int

    @property
    def edited(self) -> int:
        """Rows that this run has done."""
        return len(self.results) - len(self.failed) - self.before

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.status == FAILED]


def run(plan: Plan, folder: Folder, edits: Edits, show: Callable[[Result], None] = lambda result: None) -> Summary:
    """Edit what `plan` has to do, and write the results file.

    Args:
        edits: edits jobs; a job without a result counts as failed. `one_process` makes one.
        show: gets every result of this run as it comes.

    Raises:
        KeyboardInterrupt, and whatever `edits` raises: the results so far are written first.
    """
    results = {result.key: result for result in (*plan.kept, *plan.failed)}
    folder.sweep()
    try:
        with Journal(folder) as journal:
            for result in plan.failed:
                journal.add(result)
            if plan.todo:
                for result in _once(plan.todo, edits):
                    journal.add(result)
                    results[result.key] = result
                    show(result)
        for job in plan.todo:
            results.setdefault((job.id, job.row), _lost(job))
    finally:
        folder.sweep()
        folder.write([results[key] for key in plan.order if key in results])
    return Summary([results[key] for key in plan.order], len(plan.kept))


def _once(todo: Sequence[Job], edits: Edits) -> Iterator[Result]:
    """The first result of every job, under the job's own key."""
    jobs = {job.id: job for job in todo}
    found = edits(todo)
    try:
        for result in found:
            job = jobs.pop(result.id, None)
            if job is not None:
                yield replace(result, row=job.row)
    finally:
        if isinstance(found, Generator):  # leaves a cluster before the temporary files are removed
            found.close()


def _lost(job: Job) -> Result:
    error = "expected a result, got none: each worker that ran this row or its neighbours died"
    return Result(job.id, job.row, status=FAILED, error=error)


def one_process(worker: Worker) -> Edits:
    """Edits rows one after the other with a worker of this process."""

    def edits(jobs: Iterable[Job]) -> Iterator[Result]:
        for job in jobs:
            yield worker.edit(job)[0]

    return edits
