"""Lets `-k 2.1` select what `-k 2_1` selects and `-k ch02` a chapter; says which answers are checked."""

from pathlib import Path

from minigated.check import answers_folder


def pytest_report_header(config):
    return f"answers: {answers_folder(Path(__file__).parent)}"


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "callspec") and "exercise" in item.callspec.params:
            exercise = item.callspec.params["exercise"]
            item.extra_keyword_matches.update((exercise.id, exercise.file.removesuffix(".py")))
