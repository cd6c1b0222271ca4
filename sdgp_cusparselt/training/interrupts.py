"""Ctrl-C and a scheduler's SIGTERM, turned into a question that the training loop asks."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Context manager: the first signal is remembered, a second one interrupts at once.

    ``number`` is the signal that came, or None. Outside the main thread, where Python delivers no
    signals, nothing is installed.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING_SIGNALS:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def __call__(self, step: int) -> bool:
        """Whether a signal came; fits ``Trainer.train(should_stop=...)``."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it; 130 for Ctrl-C."""
        return 128 + (self.number if self.number is not None else signal.SIGINT)
