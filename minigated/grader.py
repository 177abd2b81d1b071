"""Runs the check of one exercise on one answer, whatever the answer does.

An answer may be missing, unfinished, raise, call `sys.exit` or never return: each becomes one message that
starts with the exercise's number. It runs in this process, so an answer that kills the process kills the
grader too.
"""

import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from minigated.expectations import Refused

SECONDS = 30.0  # an answer that takes longer is stopped; the slowest solution needs under one
_PACKAGE = Path(__file__).resolve().parent


def load_file(path: Path) -> ModuleType:
    """Runs a Python file as a module, from its text each time so that the last edit counts."""
    module = ModuleType(f"minigated_exercises_{path.parent.name}_{path.stem}")
    module.__file__ = str(path)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    return module


@dataclass(frozen=True)
class Result:
    """What came out of one check; the message of a failed one starts with the exercise's number."""

    id: str
    passed: bool
    message: str


class _TimeLimit(BaseException):
    """Not an Exception, so that a reader's `except Exception` does not swallow it."""


def run(item, function: Callable) -> Result:
    """Checks one answer. Whatever the reader's function raises becomes a message with its line."""
    return _guarded(item, lambda: function)


def grade(item, answers: Path) -> Result:
    """Checks the answer in the reader's file `answers`/chNN.py."""
    return _guarded(item, lambda: _load_answer(item, answers))


def _load_answer(item, answers: Path) -> Callable:
    path = answers / item.file
    if not path.is_file():
        raise Refused(f"no answer: there is no file {path}")
    function = vars(load_file(path)).get(item.name)
    if function is None:
        raise Refused(f"no answer: {path} has no function {item.name}")
    return function


def _guarded(item, get_function: Callable[[], Callable]) -> Result:
    try:
        with _time_limit(SECONDS), _torch_state():
            function = get_function()
            if not callable(function):
                raise Refused(f"expects a function, got {type(function).__name__}")
            item.checker(function)
    except Refused as refused:
        return Result(item.id, False, f"{item.id} {refused}")
    except _TimeLimit:
        text = f"{item.id} stopped after {SECONDS:g} seconds: is there a loop without an end?"
        return Result(item.id, False, text)
    except (Exception, SystemExit) as error:
        return Result(item.id, False, f"{item.id} {_describe(item, error)}")
    return Result(item.id, True, f"{item.id} passed: {item.title}")


def _describe(item, error: BaseException) -> str:
    if isinstance(error, RuntimeError) and error.args == (item.id,):  # the stub raises its own number
        about = f"{item.kind}, difficulty {item.difficulty} of 5, about {item.minutes} minutes"
        return f"not done yet: {item.title} ({about}); write `{item.name}` in exercises/{item.file}"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return f"{item.file} cannot be read: {text}"
    return f"your function raised {text}{_readers_line(item, error)}"


def _readers_line(item, error: BaseException) -> str:
    """Where in the reader's code it happened: the last frame outside torch, this package and the checks."""
    not_theirs = (str(_PACKAGE), str(item.folder / "checks"), str(Path(torch.__file__).parent), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_theirs)]
    return f" (line {frames[-1].lineno}: `{frames[-1].line}`)" if frames else " (when it was called)"


@contextmanager
def _time_limit(seconds: float):
    """Raises `_TimeLimit` after `seconds`, then every second; where there are no alarms (Windows) never."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise _TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _torch_state():
    """A fixed seed inside; the caller's random numbers, default dtype and gradient mode return afterwards."""
    dtype = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float32)
            yield
    finally:
        torch.set_default_dtype(dtype)


# ---------------------------------------------------------------------------------------------- wrong answers
@dataclass(frozen=True)
class Mutant:
    """A wrong answer to exercise `id`, and a part of the message that must refuse it."""

    id: str
    function: Callable
    says: str


class Mutants(list[Mutant]):
    """Collects wrong answers that all bear the name of the right one: ``@wrong("1.1", says="...")``."""

    def __call__(self, id: str, says: str) -> Callable[[Callable], Callable]:
        def keep(function: Callable) -> Callable:
            self.append(Mutant(id, function, says))
            return function

        return keep
