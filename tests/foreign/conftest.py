"""Each test counts its cases; the terminal closes with the totals of all of them."""

from collections.abc import Iterator

import pytest

from tests.foreign.tally import Tally

_TOTAL = pytest.StashKey[Tally]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TOTAL] = Tally()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Collect the cases of one test, which fails where one differs for no known reason."""
    own = Tally()
    yield own
    request.config.stash[_TOTAL].take(own)
    assert not own.unknown, "\n".join(own.lines())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    total = terminalreporter.config.stash[_TOTAL]
    if total.passed or total.known or total.unknown:
        terminalreporter.section("foreign suite")
        for line in total.lines():
            terminalreporter.write_line(line)
