"""One test for each exercise: `pytest exercises` checks them all, `pytest exercises -k 2_1` one of them."""

from pathlib import Path

import pytest

from minigated.check import answers_folder, load_exercises
from minigated.grader import grade

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("exercise", load_exercises(HERE).values(), ids=lambda exercise: exercise.test_id)
def test_exercise(exercise):
    result = grade(exercise, answers_folder(HERE))
    if not result.passed:
        pytest.fail(result.message, pytrace=False)
