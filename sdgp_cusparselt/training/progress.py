"""Progress on stderr: bars in a terminal, a plain line every few seconds in a pipe."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from torch import Tensor

from sdgp_cusparselt.training.run import RunSpec

#: Seconds between two looks at the loss, each of which waits for the device, and two plain lines.
LOSS_EVERY_S, LINE_EVERY_S = 1.0, 5.0


class SweepProgress:
    """Context manager that shows the runs of a sweep, and steps and loss of the current one.

    Args:
        num_runs: of the sweep.
        console: where to draw; by default stderr.
        quiet: draw nothing.
        clock: seconds.
    """

    def __init__(
        self,
        num_runs: int,
        console: Console | None = None,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = Console(stderr=True, markup=False) if console is None else console
        self._clock, self._quiet, self._num_runs = clock, quiet, num_runs
        self._lines = not quiet and not (
            self._console.is_terminal and not self._console.is_dumb_terminal
        )
        # What names the run gives way first in a narrow terminal, then the bar.
        name = Column(ratio=2, no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=name),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[loss]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=self._console,
            disable=quiet or self._lines,
            transient=True,
            expand=True,
        )
        self._runs: TaskID = self._progress.add_task("runs", total=num_runs, loss="")
        self._steps: TaskID = self._progress.add_task("steps", total=None, loss="")
        self._started = 0
        self._name, self._step, self._total, self._first = "", 0, 0, 0
        self._began = self._looked = self._printed = clock()

    def __enter__(self) -> "SweepProgress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def on_run(self, spec: RunSpec, step: int, total_steps: int) -> None:
        """Show the run that starts, or goes on, at ``step``."""
        self._progress.update(self._runs, completed=self._started)
        self._started += 1
        self._name = f"{spec.task}, {spec.method.label}, seed {spec.seed}"
        self._step = self._first = step
        self._total, self._began = total_steps, self._clock()
        self._progress.reset(
            self._steps, total=total_steps, completed=step, description=self._name, loss=""
        )
        if self._lines and (self._started == 1 or self._is_due(LINE_EVERY_S, self._printed)):
            more = f"from step {step} of {total_steps}" if step else f"{total_steps} steps"
            self._line("done before" if step == total_steps else more)

    def on_step(self, loss: Tensor) -> None:
        """Advance the current run by one step; read its loss if it is time to show it."""
        self._step += 1
        self._progress.advance(self._steps)
        if self._quiet:
            return
        if self._lines:
            if self._is_due(LINE_EVERY_S, self._printed):
                self._line(f"step {self._step}/{self._total}, loss {float(loss):.4g}{self._left()}")
        elif self._step == self._first + 1 or self._is_due(LOSS_EVERY_S, self._looked):
            self._looked = self._clock()
            self._progress.update(self._steps, loss=f"loss {float(loss):.4g}")

    def refresh(self) -> None:
        """Draw now rather than at the next tick."""
        self._progress.refresh()

    def _is_due(self, every: float, last: float) -> bool:
        return self._clock() - last >= every

    def _left(self) -> str:
        """Return how long the rest of this run takes at its speed so far."""
        done, seconds = self._step - self._first, self._clock() - self._began
        if not done or seconds <= 0:
            return ""
        return f", about {(self._total - self._step) * seconds / done:.0f} s left"

    def _line(self, text: str) -> None:
        self._printed = self._clock()
        place = f"run {self._started} of {self._num_runs}"
        print(f"{place}: {self._name}: {text}", file=self._console.file, flush=True)
