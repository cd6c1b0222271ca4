"""The timer on a device of its own clock: it waits as long as the host needs to issue a call."""

import pytest
import torch

from sdgp_cusparselt.tuning import timing
from sdgp_cusparselt.tuning.timing import CudaTimer

GHZ = 2.0


class Device:
    """A host and a device that works through a queue; microseconds."""

    def __init__(self) -> None:
        self.host = 0.0
        self.free = 0.0
        self.sleeps: list[float] = []

    def launch(self, us: float, issue_us: float = 2.0) -> float:
        """Issue a kernel; return when it ends."""
        self.host += issue_us
        self.free = max(self.free, self.host) + us
        return self.free

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles / GHZ / 1e3)
        self.launch(self.sleeps[-1])

    def event(self) -> "Event":
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = self.device.launch(0.0)

    def query(self) -> bool:
        return self.at <= self.device.host

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.at)

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) / 1e3


class Flush:
    def __init__(self, device: Device) -> None:
        self.device = device

    def zero_(self) -> None:
        self.device.launch(30.0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    properties = type("Properties", (), {"L2_cache_size": 1 << 25})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "_sleep", device.sleep, raising=False)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Flush(device))
    monkeypatch.setattr(timing, "cuda_event", device.event)
    return device


def kernels(device: Device, count: int, us: float, issue_us: float) -> object:
    return [device.launch(us, issue_us) for _ in range(count)]


def test_a_call_that_is_issued_in_time_is_timed_at_once(device: Device) -> None:
    timer = CudaTimer(torch.device("cuda", 0))
    assert timer(lambda: kernels(device, 2, 50.0, 10.0), "") == pytest.approx(100.0)
    assert len(device.sleeps) == 1


@pytest.mark.parametrize("issue_us", [30.0, 100.0, 400.0])
def test_host_time_does_not_count_however_long_it_is(device: Device, issue_us: float) -> None:
    """Ten kernels of 5 us, issued more slowly than they run: 50 us, not ten times the issue."""
    timer = CudaTimer(torch.device("cuda", 0))
    run = lambda: kernels(device, 10, 5.0, issue_us)
    assert timer(run, "") == pytest.approx(50.0)
    assert device.sleeps[-1] > 9 * issue_us and device.sleeps == sorted(device.sleeps)
    before = len(device.sleeps)
    assert timer(run, "") == pytest.approx(50.0)
    assert len(device.sleeps) == before + 1, "it has learned how long"


def test_a_call_that_waits_for_the_device_ends_all_the_same(device: Device) -> None:
    def waits() -> None:
        device.launch(5.0)
        device.host = max(device.host, device.free)
        device.launch(5.0, issue_us=40.0)

    assert CudaTimer(torch.device("cuda", 0))(waits, "") == pytest.approx(50.0, abs=10.0)
