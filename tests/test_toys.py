"""The bigram-backcopy task: its rules, its chances, and generators with planted bugs that must not pass."""

import math

import numpy as np
import pytest
import torch

from minigated.data.toys import IGNORED, BackcopyTask
from minigated.errors import InputError


@pytest.fixture(scope="module")
def task():
    return BackcopyTask()


def broken_rules(task: BackcopyTask, tokens: torch.Tensor) -> set[str]:
    """The rules of the task that these sequences break; empty for a right generator."""
    rows, broken = tokens.numpy(), set()
    earlier, last, now = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
    trigger = np.isin(last, [task.characters.index(c) for c in "tens"])
    copies = trigger & (earlier != task.bos)
    if (rows[:, 0] != task.bos).any() or (rows[:, 1:] == task.bos).any():
        broken.add("BOS at position 0 and nowhere else")
    if (now[copies] != earlier[copies]).any():
        broken.add("after a trigger the character before it is repeated")
    if far_off(np.bincount(rows[:, 1], minlength=task.bos), task.frequencies):
        broken.add("position 1 follows the frequencies")
    for name, chosen in (("drawn", ~trigger), ("drawn after BOS and a trigger", trigger & ~copies)):
        counts = np.zeros((task.vocabulary, task.vocabulary))
        np.add.at(counts, (last[chosen], now[chosen]), 1)
        if any(far_off(row, chances) for row, chances in zip(counts[: task.bos, : task.bos], task.bigrams)):
            broken.add(f"a character {name} follows the bigram table")
    return broken


def far_off(counts: np.ndarray, chances: np.ndarray) -> bool:
    """Chi-square far above what chance allows, or a character that cannot occur; few counts say nothing."""
    total, counts = counts.sum(), counts[: len(chances)]
    if total < 100:
        return False
    if counts[chances == 0].any():
        return True
    expected = total * chances
    large = expected >= 5
    # The rare ones go into one class, so that the approximation by a normal deviation holds.
    seen, due = np.append(counts[large], counts[~large].sum()), np.append(expected[large], expected[~large].sum())
    seen, due = seen[due > 0], due[due > 0]
    if len(due) < 2:
        return False
    chi_square, freedom = ((seen - due) ** 2 / due).sum(), len(due) - 1
    return chi_square > freedom + 6 * math.sqrt(2 * freedom) + 12


def written_plainly(task: BackcopyTask, count: int, bug: str | None = None, seed: int = 5) -> torch.Tensor:
    """The task once more, one character at a time, with a bug on request."""
    random = np.random.default_rng(seed)
    triggers = {task.characters.index(c) for c in ("TENS" if bug == "upper-case triggers" else "tens")}
    bigrams = task.bigrams
    if bug == "table read by columns":
        bigrams = bigrams.T / bigrams.T.sum(1, keepdims=True)
    frequencies = np.full(65, 1 / 65) if bug == "uniform start" else task.frequencies
    sums = [*bigrams.cumsum(1), frequencies.cumsum()]
    rows = []
    for _ in range(count):
        row = [task.bos, random.choice(65, p=frequencies)]
        while len(row) < task.length:
            previous, before = row[-1], row[-2]
            if bug == "bigram table alone" or previous not in triggers:
                copied = None
            elif before == task.bos:
                copied = {"copies BOS": before, "copies the trigger after BOS": previous}.get(bug)
            else:
                copied = previous if bug == "copies the trigger" else row[-3] if bug == "one too far" else before
            drawn = min(int(np.searchsorted(sums[previous], random.random(), side="right")), 64)
            row.append(drawn if copied is None else copied)
        rows.append(row)
    return torch.tensor(rows)


def test_the_generator_follows_the_rules(task):
    assert broken_rules(task, task.tokens) == set()
    assert broken_rules(task, task.fresh(2000, seed=3)) == set()


def test_the_plain_generator_passes_the_same_check(task):
    assert broken_rules(task, written_plainly(task, 2500)) == set()


@pytest.mark.parametrize(
    "bug, rule",
    [
        ("copies the trigger", "is repeated"),
        ("one too far", "is repeated"),
        ("bigram table alone", "is repeated"),
        ("upper-case triggers", "is repeated"),
        ("copies BOS", "BOS at position 0"),
        ("copies the trigger after BOS", "drawn after BOS and a trigger"),
        ("uniform start", "position 1"),
        ("table read by columns", "drawn follows"),
    ],
)
def test_a_planted_bug_is_found(task, bug, rule):
    found = broken_rules(task, written_plainly(task, 2500, bug))
    assert any(rule in name for name in found), found


def test_statistics_are_those_of_the_text(task):
    from minigated.data import load_text

    corpus = load_text("shakespeare")
    text = bytes(torch.cat((corpus.train, corpus.validation, corpus.test)).tolist()).decode()
    assert task.characters == "".join(sorted(set(text))) and task.vocabulary == 66
    for a, b in ("th", "qu", "\nA", "e "):
        share = sum(text.startswith(a + b, i) for i in range(len(text))) / text[:-1].count(a)
        assert task.bigrams[task.characters.index(a), task.characters.index(b)] == pytest.approx(share)
    assert task.frequencies[task.characters.index("e")] == pytest.approx(text.count("e") / len(text))
    assert [task.characters[i] for i in task.triggers] == list("tens")


def test_shapes_and_repeatability(task):
    assert task.tokens.shape == (4096, 65) and task.tokens.dtype == torch.int64
    assert torch.equal(BackcopyTask().tokens, task.tokens)
    assert not torch.equal(BackcopyTask(seed=1).tokens, task.tokens)
    assert task.fresh(7, seed=1).shape == (7, 65)


def test_fresh_sequences_are_not_those_of_training(task):
    assert not torch.equal(task.fresh(len(task.tokens), seed=task.seed), task.tokens)


def test_batches_are_a_function_of_seed_and_step(task):
    batch = task.batch_at(12)
    assert batch.shape == (64, 65)
    assert torch.equal(batch, task.batch_at(12)) and not torch.equal(batch, task.batch_at(13))
    assert torch.equal(batch, torch.cat([task.batch_at(12, rank, 4) for rank in range(4)]))
    known = {tuple(row) for row in task.tokens.tolist()}
    assert all(tuple(row) in known for row in batch.tolist())


def test_batches_reach_all_sequences():
    small = BackcopyTask(sequences=40)
    small.tokens = torch.arange(40)[:, None].expand(-1, small.length)  # each sequence its own number
    assert torch.cat([small.batch_at(step)[:, 0] for step in range(20)]).unique().tolist() == list(range(40))


def test_targets_are_the_next_tokens_and_leave_out_position_0(task):
    inputs, targets = task.inputs(task.tokens), task.targets(task.tokens)
    assert inputs.shape == targets.shape == (4096, 64)
    assert (targets[:, 0] == IGNORED).all() and torch.equal(targets[:, 1:], task.tokens[:, 2:])
    assert torch.equal(targets[:, 1:-1], inputs[:, 2:])
    assert (task.tokens[:, 1] != IGNORED).all()  # the sequences themselves are left as they are


def test_is_trigger(task):
    row = torch.tensor([task.characters.index(c) for c in "The Ten nets"])
    assert "".join("^" if x else "." for x in task.is_trigger(row)) == "..^..^^.^^^^"
    assert not task.is_trigger(torch.tensor([task.bos])).any()


def test_entropy_is_what_the_true_chances_reach_on_fresh_sequences(task):
    fresh = task.fresh(4000, seed=9)
    earlier, last, now = fresh[:, :-2], fresh[:, 1:-1], fresh[:, 2:]
    trigger = task.is_trigger(last)
    drawn = ~trigger | (earlier == task.bos)
    nats = torch.where(drawn, -torch.from_numpy(task.bigrams)[last, now].log(), 0.0)
    for kind, chosen in (("all", torch.ones_like(trigger)), ("trigger", trigger), ("other", ~trigger)):
        assert task.entropy(kind) == pytest.approx(nats[chosen].mean().item(), rel=0.02)
    bigrams_alone = -torch.from_numpy(task.bigrams)[last, now].clamp(min=1e-12).log().mean().item()
    assert bigrams_alone > task.entropy() + 0.1  # a model that never copies stays clearly above


def test_triggers_cost_nothing_once_the_sequence_has_begun(task):
    assert task.entropy("trigger", first=2) == 0.0
    assert task.entropy("trigger", first=1) > 0.0


def test_decode_shows_bos(task):
    assert task.decode(torch.tensor([task.bos, *(task.characters.index(c) for c in "a\nZ")])) == "^a\nZ"


@pytest.mark.parametrize("arguments", [{"sequences": 0}, {"length": 2}, {"batch": 0}, {"seed": -1}])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(InputError, match=str(*arguments.values())):
        BackcopyTask(**arguments)


def test_impossible_questions_are_refused(task):
    with pytest.raises(InputError, match="64.*1 to 63"):
        task.entropy(first=64)
    with pytest.raises(InputError, match="'copies'.*all, trigger, other"):
        task.entropy("copies")
    with pytest.raises(InputError, match="5 processes.*64"):
        task.batch_at(0, 0, 5)
