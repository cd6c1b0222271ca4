"""Counts cases: what passed, what differs for a known reason, and what differs for none."""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tests.foreign.known import KNOWN


@dataclass
class Tally:
    """Cases of a run; a name is words from the general to the particular, split by spaces."""

    passed: int = 0
    known: Counter[str] = field(default_factory=Counter)
    unknown: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Count what the body does; an error of it is kept, and the next case goes on."""
        try:
            yield
        except Exception as error:
            pattern = next((p for p in KNOWN if fnmatchcase(name, p)), None)
            if pattern is not None:
                self.known[pattern] += 1
                return
            *_, frame = traceback.extract_tb(error.__traceback__)
            where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
            message = " ".join(str(error).split())[:300]
            self.unknown[name] = f"{type(error).__name__} at {where}: {message}"
        else:
            self.passed += 1

    def check(self, name: str, function: Callable[[], object]) -> None:
        """Count a call of function as a case."""
        with self.case(name):
            function()

    def take(self, other: "Tally") -> None:
        """Add the counts of another tally."""
        self.passed += other.passed
        self.known += other.known
        self.unknown |= other.unknown

    def lines(self) -> list[str]:
        """Return the report: one line of totals, one a known difference, one an unknown one."""
        known = sum(self.known.values())
        cases = self.passed + known + len(self.unknown)
        yielded = [
            f"{cases} cases: {self.passed} passed, {known} known differences, "
            f"{len(self.unknown)} unknown"
        ]
        yielded += [f"known    {n:5} {p}: {KNOWN[p]}" for p, n in sorted(self.known.items())]
        yielded += [f"unknown  {name}: {text}" for name, text in self.unknown.items()]
        return yielded
