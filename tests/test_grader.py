"""The grader is graded: right answers pass, everything else is refused with its number and the right hint."""

import ast
import html
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from minigated import grader
from minigated.check import (
    answers_folder,
    check,
    exercises_html,
    hints_markdown,
    load_exercises,
    show_exercises,
    statement,
)
from minigated.errors import InputError
from minigated.exercise_text import Source, details_html
from minigated.expectations import Refused, expect_cases, expect_dtypes, expect_property
from minigated.grader import grade, load_file, run
from minigated.variants import PAPER_LAYERS, PAPER_SHAPE, VARIANTS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "exercises"
REGISTRY = load_exercises(FOLDER)
MUTANTS = [mutant for path in sorted((FOLDER / "mutants").glob("ch*.py")) for mutant in load_file(path).wrong]
KINDS = {"fill", "break", "prove", "predict"}
each_exercise = pytest.mark.parametrize("item", REGISTRY.values(), ids=lambda item: item.test_id)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory) -> Path:
    """Untouched stubs, made afresh: the ones in the repository are the reader's to edit."""
    folder = tmp_path_factory.mktemp("stubs")
    load_file(FOLDER / "stubs.py").write_stubs(folder)
    return folder


def run_pytest(answers: Path, *more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"MINIGATED_EXERCISES": str(answers), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "exercises", "-q", "-p", "no:cacheprovider", *more]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


# --------------------------------------------------------------------------- the registry
def test_five_or_more_exercises_a_chapter_of_all_four_kinds():
    chapters = Counter(item.file for item in REGISTRY.values())
    assert set(chapters) == {path.name for path in (FOLDER / "solutions").glob("ch*.py")}
    for file, count in chapters.items():
        assert count >= 5
        assert {item.kind for item in REGISTRY.values() if item.file == file} == KINDS


@each_exercise
def test_four_or_more_mutants_with_different_hints(item):
    hints = {mutant.says for mutant in MUTANTS if mutant.id == item.id}
    assert len(hints) >= 4
    assert {mutant.function.__name__ for mutant in MUTANTS if mutant.id == item.id} == {item.name}


def test_every_mutant_belongs_to_an_exercise():
    assert {mutant.id for mutant in MUTANTS} == set(REGISTRY)


def test_folder_without_checks_is_refused(tmp_path):
    with pytest.raises(InputError, match="0 exercises"):
        load_exercises(tmp_path)


def test_same_id_twice_is_refused(tmp_path):
    (tmp_path / "checks").mkdir()
    text = (FOLDER / "checks" / "ch02_measures.py").read_text()
    (tmp_path / "checks" / "ch02.py").write_text(text)
    (tmp_path / "checks" / "ch03.py").write_text(text)
    with pytest.raises(InputError, match="4 exercises with 2 different ids"):
        load_exercises(tmp_path)


# --------------------------------------------------------------------------- right and wrong
@each_exercise
def test_solution_passes(item):
    assert grade(item, FOLDER / "solutions").message == f"{item.id} passed: {item.title}"


@each_exercise
def test_stub_fails_with_its_own_number(item, stubs):
    result = grade(item, stubs)
    assert not result.passed
    assert result.message.startswith(f"{item.id} not done yet: ")
    assert item.name in result.message and item.file in result.message


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.id}-{re.sub('[^a-z0-9]+', '-', m.says.lower())[:50]}")
def test_mutant_is_refused_with_its_hint(mutant):
    result = run(REGISTRY[mutant.id], mutant.function)
    assert not result.passed
    assert result.message.startswith(f"{mutant.id} ")
    assert mutant.says in result.message


EMPTY = {
    "None": lambda *inputs: None,
    "the first input": lambda *inputs: inputs[0] if inputs else (),
    "True": lambda *inputs: True,
    "False": lambda *inputs: False,
    "0": lambda *inputs: 0,
    "an empty tuple": lambda *inputs: (),
    "an empty dictionary": lambda *inputs: {},
    "zeros": lambda *inputs: torch.zeros_like(inputs[0]) if inputs and isinstance(inputs[0], torch.Tensor) else 0.0,
    "NaN": lambda *inputs: torch.full((2, 3, 4, 6), torch.nan),
}


@each_exercise
@pytest.mark.parametrize("answer", EMPTY.values(), ids=EMPTY.keys())
def test_empty_function_earns_nothing(item, answer):
    result = run(item, answer)
    assert not result.passed
    assert result.message.startswith(f"{item.id} ")


@each_exercise
def test_missing_and_empty_files_earn_nothing(item, tmp_path):
    missing = grade(item, tmp_path)
    (tmp_path / item.file).write_text("")
    empty = grade(item, tmp_path)
    assert not missing.passed and missing.message.startswith(f"{item.id} no answer: there is no file")
    assert not empty.passed and empty.message.endswith(f"has no function {item.name}")


def is_stub(function: ast.FunctionDef) -> bool:
    return len(function.body) == 2 and isinstance(function.body[1], ast.Raise)


def still_stubs(text: str) -> dict[str, str]:
    """Functions that only raise, with the comment line above them, by name."""
    lines = text.splitlines()
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {f.name: f"{lines[f.lineno - 2]}\n{ast.unparse(f)}" for f in functions if is_stub(f)}


def compare_stubs(found: str, wanted: str) -> None:
    names = {node.name for node in ast.parse(found).body if isinstance(node, ast.FunctionDef)}
    assert names >= set(still_stubs(wanted)), "a function is lost: python exercises/stubs.py --force"
    for name, stub in still_stubs(found).items():
        assert stub == still_stubs(wanted)[name], "out of date: python exercises/stubs.py --force"


@pytest.mark.parametrize("file", sorted({item.file for item in REGISTRY.values()}))
def test_stubs_in_the_repository_say_what_the_solutions_say(file):
    """Only what is still a stub counts: a reader's answers must not fail `make test`."""
    wanted, found = load_file(FOLDER / "stubs.py").stub_files()[file], (FOLDER / file).read_text()
    try:
        ast.parse(found)
    except SyntaxError:  # a reader in the middle of an answer
        found = wanted
    compare_stubs(found, wanted)


def test_comparing_stubs_lets_answers_pass_and_sees_stale_and_lost_ones():
    wanted = load_file(FOLDER / "stubs.py").stub_files()["ch02.py"]
    raising = next(line for line in wanted.splitlines() if "2.9" in line and "raise" in line)
    compare_stubs("import os\n" + wanted.replace(raising, "    helper = 3\n    return helper"), wanted)
    for stale in (
        wanted.replace(raising, raising.replace("2.9", "2.8")),
        wanted.replace("def massive_activation(hidden: list)", "def massive_activation(hidden: dict)"),
        wanted.replace("def massive_activation(", "def another_name("),
        wanted.replace("# 2.9 Massive", "# 2.9 Small"),
    ):
        assert stale != wanted
        with pytest.raises(AssertionError, match="lost|out of date"):
            compare_stubs(stale, wanted)


def test_added_parameters_of_the_solution_are_the_papers_column():
    solution = load_file(FOLDER / "solutions" / "ch02.py").added_parameters
    shape = PAPER_SHAPE
    added = solution(shape.width, shape.heads, shape.kv_heads, shape.head_width, PAPER_LAYERS)
    printed = {name: VARIANTS[name].paper.added_millions for name in added}
    assert sum(value is not None for value in printed.values()) >= 8
    for name, millions in printed.items():
        if millions is not None:  # printed with one or two digits
            assert added[name] / 1e6 == pytest.approx(millions, rel=0.02), name


# --------------------------------------------------------------------------- pytest as readers see it
def test_pytest_fails_every_stub_with_its_number(stubs):
    result = run_pytest(stubs)
    assert result.returncode == 1
    assert f"{len(REGISTRY)} failed" in result.stdout and " passed" not in result.stdout
    for item in REGISTRY.values():
        assert re.search(rf"^{re.escape(item.id)} not done yet", result.stdout, flags=re.M), item.id
        assert f"test_exercise[{item.test_id}]" in result.stdout
    assert "Traceback" not in result.stdout


def test_pytest_passes_the_solutions():
    result = run_pytest(FOLDER / "solutions")
    assert result.returncode == 0, result.stdout
    assert f"{len(REGISTRY)} passed" in result.stdout


def test_pytest_selects_by_number_in_both_spellings_and_by_chapter():
    result = run_pytest(FOLDER / "solutions", "-k", "2_1 or 2.4 or ch01", "--collect-only")
    selected = re.findall(r"^exercises/test_exercises.py::test_exercise\[(\d_\d)_", result.stdout, flags=re.M)
    chapter_1 = [id.replace(".", "_") for id in REGISTRY if id.startswith("1.")]
    assert selected == [*chapter_1, "2_1", "2_4"]


def test_answers_are_the_readers_files_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("MINIGATED_EXERCISES", raising=False)
    assert answers_folder(FOLDER) == FOLDER
    monkeypatch.setenv("MINIGATED_EXERCISES", "elsewhere")
    assert answers_folder(FOLDER) == Path("elsewhere")


# --------------------------------------------------------------------------- answers that misbehave
def answer_file(folder: Path, body: str) -> Path:
    (folder / "ch01.py").write_text(f"import sys\n\ndef scaled_dot_product(q, k, v):\n    {body}\n")
    return folder


def test_an_error_is_reported_with_the_readers_line(tmp_path):
    result = grade(REGISTRY["1.1"], answer_file(tmp_path, "return q @ v @ k"))
    assert re.match(r"1\.1 your function raised RuntimeError: .* \(line 4: `return q @ v @ k`\)$", result.message)


def test_an_error_inside_torch_or_a_given_function_names_the_readers_line():
    def is_causal(attention):
        return attention(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 2))

    result = run(REGISTRY["1.8"], is_causal)
    assert not result.passed
    assert "`return attention(torch.ones(1, 1, 2, 2)" in result.message


def test_wrong_number_of_arguments():
    assert run(REGISTRY["1.1"], lambda q: q).message.endswith("(when it was called)")


def test_exit_and_syntax_errors_do_not_end_the_grader(tmp_path):
    assert "SystemExit" in grade(REGISTRY["1.1"], answer_file(tmp_path, "sys.exit(3)")).message
    message = grade(REGISTRY["1.1"], answer_file(tmp_path, "return ((")).message
    assert message.startswith("1.1 ch01.py cannot be read: SyntaxError") and "line 4" in message


@pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="the time limit needs POSIX alarms")
def test_an_endless_loop_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(grader, "SECONDS", 0.2)
    body = "try:\n        while True:\n            q = q * 1\n    except Exception:\n        return q"
    assert "1.1 stopped after 0.2 seconds" in grade(REGISTRY["1.1"], answer_file(tmp_path, body)).message


def test_not_a_function():
    assert run(REGISTRY["2.1"], 3).message == "2.1 expects a function, got int"


def test_global_state_of_torch_returns():
    def careless(q, k, v):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.manual_seed(5)
        return torch.rand(3)

    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    assert not run(REGISTRY["1.1"], careless).passed
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


# --------------------------------------------------------------------------- what checks are made of
def test_a_suspect_is_named_only_when_it_explains_every_case():
    cases = {"at zero": (torch.zeros(3),), "at random": (torch.tensor([1.0, -2.0, 3.0]),)}
    suspects = lambda x: {"it is zero": 0 * x, "it is doubled": 2 * x, "it is squared": x * x}
    expect_cases(torch.relu, torch.relu, cases, suspects)
    with pytest.raises(Refused, match="it is doubled"):
        expect_cases(lambda x: 2 * x, torch.relu, cases, suspects)
    with pytest.raises(Refused, match="at random"):
        expect_cases(lambda x: 3 * x, torch.relu, cases, suspects)


def test_a_property_must_accept_and_catch():
    right, wrong = {"one": lambda: 1, "two": lambda: 2}, {"minus": lambda: -1, "null": lambda: 0}
    expect_property(lambda f: f() > 0, right, wrong)
    with pytest.raises(Refused, match="turns down a right implementation: two"):
        expect_property(lambda f: f() == 1, right, wrong)
    with pytest.raises(Refused, match="catches 1 of 2 wrong implementations; one it lets through: null"):
        expect_property(lambda f: f() >= 0, right, wrong)


def test_precision_lost_in_bfloat16_is_seen():
    inputs = {"x": torch.linspace(1, 2, 9).double()}
    expect_dtypes(lambda x: (x.float() + 300 - 300).to(x.dtype), lambda x: x, inputs)
    with pytest.raises(Refused, match="not in torch.bfloat16"):
        expect_dtypes(lambda x: x + 300 - 300, lambda x: x, inputs)


# --------------------------------------------------------------------------- notebooks and pages
def test_check_prints_one_line(capsys, monkeypatch):
    monkeypatch.setenv("MINIGATED_EXERCISES", str(FOLDER / "solutions"))
    check("2.1")
    check(2.1, lambda y, x, w_gate, w_out: y.flatten(2) @ w_out.T)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "2.1 passed: Gate the head outputs (G1)"
    assert second.startswith("2.1 the gate is not applied")


def test_unknown_exercise_names_the_accepted_ones():
    with pytest.raises(InputError, match=r"unknown exercise '9\.9'; accepted: 1\.1, 1\.2"):
        check("9.9")
    with pytest.raises(InputError, match="unknown chapter or exercise '10'; accepted: 1, 2"):
        exercises_html("10")


@each_exercise
def test_page_folds_hint_pseudo_code_and_solution(item):
    page, hints = exercises_html(item.id), hints_markdown(item.id)
    assert hints in page and page.count("<section") == page.count("</section>") == 1
    assert re.findall(r"<summary>([\w-]+) for", hints) == ["Hint", "Pseudo-code", "Solution"]
    assert hints.count("<details>") == hints.count("</details>") == 3
    assert "\n\n" not in hints, "an empty line would end the HTML block in Markdown"
    body = ast.parse((FOLDER / "solutions" / item.file).read_text()).body
    last = ast.unparse(next(node for node in body if getattr(node, "name", "") == item.name).body[-1])
    line = last.splitlines()[0]
    open_part = page.split("<details>")[0]
    assert html.escape(line, quote=False)[:40] not in open_part
    assert statement(item.id).splitlines()[0].rstrip(".") in html.unescape(re.sub("</?code>", "`", open_part))
    assert f"-k {item.id.replace('.', '_')}" in open_part


def test_empty_lines_of_a_solution_survive_without_ending_the_html():
    hints = details_html(REGISTRY["1.1"], Source("", "", "", "    a = 1 < 2\n\n    return a"))
    assert "\n\n" not in hints
    assert "a = 1 < 2\n\nreturn a</code>" in html.unescape(hints)


def test_show_exercises_displays_a_chapter(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    show_exercises(2)
    assert re.findall(r"<h4>([\d.]+) ", shown[0].data) == [id for id in REGISTRY if id.startswith("2.")]
