"""What a long run shows: a bar on a terminal, a line every tenth of the way elsewhere."""

import sys
import time

from tqdm import tqdm


class Clock:
    """Seconds between each `start` and the next `stop`, added up from `seconds` on."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.since = seconds, None

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.seconds, self.since = self.read(), None

    def read(self) -> float:
        return self.seconds + (time.perf_counter() - self.since if self.since is not None else 0.0)


class Progress:
    """Loss, speed and time left of one run; a context manager.

    Args:
        name: what to call the run.
        total: steps of the run. done: steps already done.
        show: False for silence (`say` still speaks).
        leads: False in processes that must stay silent altogether.
        unit: what the speed counts.
    """

    def __init__(self, name: str, total: int, done: int = 0, show: bool = True, leads: bool = True, unit="tokens"):
        self.unit = unit
        self.name, self.total, self.done, self.leads = name or "training", total, done, leads
        self.lines = show and leads and not sys.stderr.isatty()
        self.bar, self.first, self.started = None, done, time.perf_counter()
        if show and leads and not self.lines:
            self.bar = tqdm(total=total, initial=done, desc=self.name, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int, loss: float, speed: float) -> None:
        """Shows that `done` steps are done; `speed` in units a second, 0 while unknown."""
        figures = f"loss {loss:.4f}" + (f" · {_short(speed)} {self.unit}/s" if speed else "")
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(done - self.done)
        elif self.lines and (done == self.total or 10 * done // self.total > 10 * self.done // self.total):
            spent = time.perf_counter() - self.started
            left = spent / max(1, done - self.first) * (self.total - done)
            print(f"{self.name}: step {done}/{self.total} · {figures} · {_clock(left)} left", flush=True)
        self.done = done

    def note(self, text: str) -> None:
        """A line for those who watch the progress; silent with the bar."""
        if self.bar is not None or self.lines:
            self.say(text)

    def say(self, text: str) -> None:
        """A line that must be read, bar or no bar."""
        if self.bar is not None:
            self.bar.write(f"{self.name}: {text}")
        elif self.leads:
            print(f"{self.name}: {text}", flush=True)


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
    )
