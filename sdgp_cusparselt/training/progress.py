"""Progress on stderr: bars in a terminal, nothing in a pipe."""

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

from sdgp_cusparselt.training.run import RunSpec


class SweepProgress:
    """Context manager with a bar over the runs and one over the steps of the current run.

    Args:
        num_runs: of the sweep.
        console: where to draw; by default stderr. Nothing is drawn unless it is a terminal.
    """

    def __init__(self, num_runs: int, console: Console | None = None) -> None:
        console = Console(stderr=True) if console is None else console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._runs: TaskID = self._progress.add_task("runs", total=num_runs)
        self._steps: TaskID = self._progress.add_task("steps", total=None)
        self._started = 0

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
        description = f"{spec.task}, {spec.method.label}, seed {spec.seed}"
        self._progress.reset(
            self._steps, total=total_steps, completed=step, description=description
        )

    def on_step(self) -> None:
        """Advance the bar of the current run by one step."""
        self._progress.advance(self._steps)

    def refresh(self) -> None:
        """Draw now rather than at the next tick."""
        self._progress.refresh()
