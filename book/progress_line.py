"""One line that says which chapters run and how long it will take."""

import sys
import threading
import time

from execute import Job
from tqdm import tqdm

FORMAT = "{percentage:3.0f}%|{bar:24}| {desc}"


class ProgressLine:
    """A bar over all chapters.

    Args:
        expected: seconds of each code cell by chapter, from earlier runs; a chapter without is counted by cells.
        workers: chapters that run at once.
        stream: where the line goes; a stream that is not a terminal gets a line every 20 seconds.
    """

    def __init__(self, expected: dict[str, list[float]], workers: int, stream=sys.stderr):
        self.expected, self.workers, self.stream = expected, workers, stream
        self.jobs: list[Job] = []
        self.begin = time.monotonic()
        self.terminal = stream.isatty()
        self.bar = tqdm(total=1.0, bar_format=FORMAT, file=stream, disable=not self.terminal, leave=False)
        self.spoken = self.begin
        self.lock = threading.Lock()

    def shares(self) -> tuple[float, float]:
        """(done, all) in expected seconds, the running cell counted for what it has used, up to its expectation."""
        done = 0.0
        for job in list(self.jobs):
            plan = self.expected[job.name]
            count = len(job.times)
            done += sum(plan[:count])
            if job.cell > count and not job.error and count < len(plan):
                done += min(time.monotonic() - job.started, 0.95 * plan[count])
        return done, sum(map(sum, self.expected.values()))

    def left(self) -> float:
        """Seconds to go: expectations not used up, stretched by how the run has gone so far."""
        done, total = self.shares()
        elapsed = time.monotonic() - self.begin
        longest = max((self._rest(job) for job in self.jobs), default=0.0)
        rest = max((total - done) / self.workers, longest)
        measured = sum(len(job.times) for job in self.jobs) >= 5 and done > 0
        return rest * (elapsed * min(self.workers, max(len(self.jobs), 1)) / done if measured else 1.0)

    def _rest(self, job: Job) -> float:
        return 0.0 if job.error else sum(self.expected[job.name][len(job.times) :])

    def text(self) -> str:
        running = [job for job in list(self.jobs) if len(job.times) < job.cells and not job.error]
        names = ", ".join(f"{job.name} (cell {job.cell}/{job.cells})" for job in running) or "starting"
        return f"{names}; about {clock(self.left())} left"

    def tick(self) -> None:
        """Draws the line again."""
        with self.lock:
            done, total = self.shares()
            if self.terminal:
                self.bar.n = min(done / total, 1.0) if total else 1.0
                self.bar.set_description_str(self.text())
            elif time.monotonic() - self.spoken > 20:
                self.spoken = time.monotonic()
                print(f"{100 * done / max(total, 1e-9):3.0f}%  {self.text()}", file=self.stream, flush=True)

    def say(self, words: str) -> None:
        """A line of its own above the bar."""
        with self.lock:
            if self.terminal:
                self.bar.write(words, file=self.stream)
            else:
                print(words, file=self.stream, flush=True)

    def close(self) -> None:
        self.bar.close()


def clock(seconds: float) -> str:
    """ "40 s", "3 min 20 s"."""
    seconds = max(round(seconds), 1)
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02d} s"
