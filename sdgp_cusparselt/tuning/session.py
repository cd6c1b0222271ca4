"""What searches at first use may cost this process, and what is said about them on stderr."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sdgp_cusparselt.tuning.decision import Decision, Key

#: Seconds that all searches at first use may take in one process, and one of them.
PROCESS_SECONDS = 60.0
SHAPE_SECONDS = 2.0

Show = Callable[[int, int, str], None]


class Session:
    """The searches at first use of one process.

    Args:
        seconds: that all of them may take together.
        clock: monotonic seconds.
    """

    def __init__(
        self, seconds: float = PROCESS_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self.clock = seconds, clock
        self.spent = 0.0
        self._found: list[tuple[Decision, float]] = []
        self._announced = False
        self._lock = threading.Lock()

    @property
    def spent_up(self) -> str:
        """Why nothing more is searched for in this process, or ""."""
        if self.spent < self.seconds:
            return ""
        return (
            f"not tuned yet: the {self.seconds:.0f} s that this process searches for are spent; "
            "the next run goes on, or run sdgp tune"
        )

    @property
    def shape_seconds(self) -> float:
        """Seconds that the next search may take."""
        return min(SHAPE_SECONDS, self.seconds - self.spent)

    @contextmanager
    def searching(self, key: Key) -> Iterator[Show]:
        """Charge the time inside to the budget, and show what goes on where stderr is a terminal.

        Yields:
            function of (done, total, what is being done).
        """
        console = Console(stderr=True)
        if not console.is_terminal and not self._announced:
            console.print(
                f"sdgp: products are tuned as they first occur, for at most {self.seconds:.0f} s",
                soft_wrap=True,
                highlight=False,
            )
        self._announced = True
        columns = (TextColumn("sdgp: {task.description}"), BarColumn(), TimeElapsedColumn())
        begun = self.clock()
        hidden = not console.is_terminal
        try:
            with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
                task = bar.add_task(f"tuning {key.gemm.describe()}")
                yield lambda done, total, step: bar.update(task, completed=done, total=total)
        finally:
            self.spent += self.clock() - begun

    def add(self, decision: Decision, seconds: float, stored: str) -> None:
        """Note a search's outcome; one message tells of all that one backward pass made.

        Args:
            decision: what was found.
            seconds: that it took.
            stored: the folder where the next run finds it, or "".
        """
        with self._lock:
            self._found.append((decision, seconds))
        # Asked for each time: a backward pass that raises runs no callback of its own.
        at_end_of_backward(lambda: self._report(stored))

    def _report(self, stored: str) -> None:
        with self._lock:
            found, self._found = self._found, []
        if not found:
            return
        sparse = sum(decision.use == "sparse" for decision, _ in found)
        seconds = sum(seconds for _, seconds in found)
        text = (
            f"sdgp: tuned {len(found)} product{'s' * (len(found) > 1)} in {seconds:.1f} s: "
            f"{sparse} sparse, {len(found) - sparse} plain. "
        )
        text += (
            f"Stored in {stored}: the next run saves these {seconds:.1f} s."
            if stored
            else "They last as long as this process."
        )
        if self.spent_up:
            text += f" What is left runs plain: {self.spent_up}."
        Console(stderr=True).print(text, soft_wrap=True, highlight=False)


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Run ``call`` when the backward pass at hand is through; now, where there is none."""
    engine = torch.autograd.Variable._execution_engine
    try:
        engine.queue_callback(call)
    except RuntimeError:  # torch: final callbacks belong to a backward pass
        call()
