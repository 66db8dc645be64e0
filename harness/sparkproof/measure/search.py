"""The largest batch that fits, found by prediction and then upward with measured peaks: nothing is ever tried that is not
predicted to fit, so that nothing runs out.

A first guess of each batch's peak is a planner's. What was measured corrects it: by the worst ratio of measured to planned so
far, and by the line through the two largest batches measured; the greater of both counts, with 3% to spare. A batch is at most
doubled, however much is predicted to fit, so that a wrong guess is found out while little is at stake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

SPARE = 1.03


@dataclass(frozen=True)
class Tried:
    """One batch: its planned and its measured peak in GiB, and seconds of a step."""

    batch: int
    planned: float
    measured: float
    seconds: float


@dataclass
class Found:
    """batch: the largest measured (0: none fits); predicted: the largest that is predicted to fit; why no larger was tried."""

    batch: int
    predicted: int
    why: str
    tried: list[Tried] = field(default_factory=list)


class Forecast:
    """Peaks in GiB of batches not yet tried."""

    def __init__(self, plan: Callable[[int], float]) -> None:
        self.plan = plan
        self.tried: list[Tried] = []

    def peak(self, batch: int) -> float:
        """What `batch` would take, GiB."""
        factor = max((t.measured / t.planned for t in self.tried), default=1.0)
        guesses = [self.plan(batch) * factor]
        if len(self.tried) > 1:
            a, b = self.tried[-2:]
            guesses.append(b.measured + (b.measured - a.measured) / (b.batch - a.batch) * (batch - b.batch))
        return max(guesses) * SPARE

    def largest(self, limit: float, low: int, high: int) -> int:
        """The largest batch in [low, high] whose peak is within `limit`; low - 1 where none is. Peaks rise with the batch."""
        found = low - 1
        while low <= high:
            middle = (low + high) // 2
            if self.peak(middle) <= limit:
                found, low = middle, middle + 1
            else:
                high = middle - 1
        return found


def search(
    plan: Callable[[int], float],
    measure: Callable[[int], tuple[float, float]],
    limit: float,
    most: int,
    most_s: float,
) -> Found:
    """Search upward from 1. `plan(batch)` is a peak in GiB, `measure(batch)` (peak in GiB, seconds of a step)."""
    forecast = Forecast(plan)
    best, step = 0, 1
    while True:
        ready = forecast.largest(limit, best + 1, min(most, step))
        if ready <= best:
            break
        seconds = forecast.tried[-1].seconds / best * ready if best else 0.0
        if seconds > most_s:
            why = f"a step of {ready} rows would take about {seconds:.0f} s, longer than the {most_s:g} s of a search"
            return Found(best, forecast.largest(limit, best + 1, most), why, forecast.tried)
        measured, took = measure(ready)
        forecast.tried.append(Tried(ready, plan(ready), measured, took))
        best, step = ready, 2 * ready
        if measured > limit:  # the prediction was wrong, but less so than the spare: say so, and stop
            why = f"{measured:.2f} GiB were measured at {ready} rows, more than the {limit:.2f} GiB that it may take"
            return Found(forecast.tried[-2].batch if len(forecast.tried) > 1 else 0, best - 1, why, forecast.tried)
    if best == most:
        return Found(best, best, f"no larger batch than {most} was asked for", forecast.tried)
    why = f"{best + 1} rows would take {forecast.peak(best + 1):.2f} GiB by prediction, of {limit:.2f} GiB"
    return Found(best, best, why, forecast.tried)
