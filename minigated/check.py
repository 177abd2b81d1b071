"""The exercises' one registry and its doors: a notebook, pytest, and the grader's own tests.

In a notebook: ``from minigated.check import check`` and ``check("2.1", my_function)``. In a shell:
``pytest exercises -k 2_1``. The checks live in ``exercises/checks/chNN.py``; nothing here knows what
they ask.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minigated.errors import InputError, one_of
from minigated.exercise_text import Source, details_html, exercise_html, read_function
from minigated.grader import grade, load_file, run

KINDS = ("fill", "break", "prove", "predict")


# ---------------------------------------------------------------------------------------------- the registry
@dataclass(frozen=True)
class Exercise:
    """One exercise and its check.

    Attributes:
        id: "chapter.number". title: a few words. kind: fill, break, prove or predict.
        difficulty: 1 to 5. minutes: what a reader needs.
        hint, pseudo: the first two steps of help; the third is the solution.
        name: the function the reader writes.
        checker: called with that function, raises `Refused` with a hint.
        folder: the folder that holds `checks/`, `solutions/` and the stubs.
    """

    id: str
    title: str
    kind: str
    difficulty: int
    minutes: int
    hint: str
    pseudo: str
    name: str
    checker: Callable[[Callable], None]
    folder: Path

    @property
    def file(self) -> str:
        return f"ch{int(self.id.split('.')[0]):02d}.py"

    @property
    def test_id(self) -> str:
        return f"{self.id.replace('.', '_')}_{self.name}"


def exercise(id: str, title: str, *, kind: str, difficulty: int, minutes: int, hint: str, pseudo: str):
    """Makes an `Exercise` of the check below it, which bears the name of the function the reader writes."""
    if not re.fullmatch(r"[1-9]\d?\.[1-9]", id):  # one digit, so that `-k 2_1` never means 2.10 too
        raise InputError(f"exercise id {id!r}; accepted: chapter.number with a number from 1 to 9")
    one_of("kind of exercise", kind, KINDS)
    one_of("difficulty", difficulty, range(1, 6))

    def register(checker: Callable[[Callable], None]) -> Exercise:
        folder = Path(checker.__code__.co_filename).resolve().parent.parent
        return Exercise(id, title, kind, difficulty, minutes, hint, pseudo, checker.__name__, checker, folder)

    return register


def exercises_folder() -> Path:
    """The folder with `checks/chNN.py`: up from the working directory, else beside the package."""
    here = Path.cwd().resolve()
    for root in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if any((root / "exercises" / "checks").glob("ch*.py")):
            return root / "exercises"
    raise InputError(
        f"no exercises/checks/ch*.py above {here} or beside the package; start from a clone of the repository"
    )


def load_exercises(folder: Path | None = None) -> dict[str, Exercise]:
    """Every exercise by id, in order, from `folder`/checks."""
    folder = exercises_folder() if folder is None else Path(folder)
    found = [
        item
        for path in sorted((folder / "checks").glob("ch*.py"))
        for item in vars(load_file(path)).values()
        if isinstance(item, Exercise)
    ]
    registry = {item.id: item for item in sorted(found, key=_order)}
    if not registry or len(registry) != len(found):
        raise InputError(f"{folder / 'checks'} has {len(found)} exercises with {len(registry)} different ids")
    return registry


def _order(item: Exercise) -> tuple[int, ...]:
    return tuple(map(int, item.id.split(".")))


def answers_folder(folder: Path) -> Path:
    """Where the answers are: `MINIGATED_EXERCISES` if it is set, else the stubs in `folder`."""
    return Path(os.environ.get("MINIGATED_EXERCISES") or folder)


def find_exercise(id: str | float) -> Exercise:
    """The exercise of this id; InputError names the ids there are."""
    registry = load_exercises()
    one_of("exercise", str(id), registry)
    return registry[str(id)]


# ---------------------------------------------------------------------------------------------- in a notebook
def check(id: str | float, function: Callable | None = None) -> None:
    """Checks an answer and prints one line: passed, or the hint.

    Args:
        id: "chapter.number", for example "2.1".
        function: the answer; without it the one in exercises/chNN.py (or `MINIGATED_EXERCISES`) is taken.
    """
    item = find_exercise(id)
    result = grade(item, answers_folder(item.folder)) if function is None else run(item, function)
    print(result.message)


def statement(id: str | float) -> str:
    """The text of an exercise, as in the docstring of its stub."""
    return _source(find_exercise(id)).statement


def hints_markdown(id: str | float) -> str:
    """Hint, pseudo-code and solution as three folded `<details>`, for a page in Markdown or HTML."""
    item = find_exercise(id)
    return details_html(item, _source(item))


def exercises_html(which: str | int | float) -> str:
    """The exercises of a chapter ("2"), or one of them ("2.1"), with their folded hints, as HTML."""
    registry = load_exercises()
    chosen = [item for item in registry.values() if str(which) in (item.id, item.id.split(".")[0])]
    if not chosen:
        chapters = dict.fromkeys(id.split(".")[0] for id in registry)
        one_of("chapter or exercise", str(which), [*chapters, *registry])
    return "\n".join(exercise_html(item, _source(item)) for item in chosen)


def show_exercises(which: str | int | float) -> None:
    """Displays `exercises_html(which)` in a notebook."""
    from IPython.display import HTML, display  # only notebooks need IPython

    display(HTML(exercises_html(which)))


def _source(item: Exercise) -> Source:
    return read_function(item.folder / "solutions" / item.file, item.name)
