"""Ctrl-C as a request: the first asks the run to stop after its step, the second stops it at once."""

import contextlib
import signal
import threading


class Interrupt:
    """While the context lasts, the first SIGINT only sets `asked`; the second raises KeyboardInterrupt.

    The handler that was there before is put back at the end. Signals reach Python's main thread alone: in
    another thread the context changes nothing and `asked` stays False.

    Args:
        say: called with a line when the first signal arrives.
    """

    def __init__(self, say=print):
        self.asked, self.say = False, say
        self.installed = False

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._hear)
            self.installed = True
        return self

    def __exit__(self, *_) -> None:
        if self.installed:
            # None: the earlier handler was not set from Python and cannot be put back from Python either.
            signal.signal(signal.SIGINT, signal.default_int_handler if self.before is None else self.before)
            self.installed = False

    def _hear(self, signum, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with contextlib.suppress(RuntimeError):  # the signal may come in the middle of another print
            self.say("Ctrl-C: stopping after this step; once more aborts at once")
