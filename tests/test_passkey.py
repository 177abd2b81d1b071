"""The passkey task: what a window holds, that batches are functions of (seed, step), what the scores mean."""

import pytest
import torch
from torch import nn

from minigated.data import decode, load_text
from minigated.data.passkey import (
    AFTER,
    BEFORE,
    CHANCE,
    QUESTION,
    PasskeyBatches,
    passkey_accuracy,
    passkey_windows,
    room,
    write_passkeys,
)
from minigated.data.text import TextBatches
from minigated.errors import InputError

TEXT = load_text("shakespeare").validation
CUE = torch.tensor(list(BEFORE.encode()))


# ---------------------------------------------------------------------------------------------- windows
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_window_holds_the_key_once_and_its_question_at_the_end(depth):
    windows = passkey_windows(TEXT, 200, depth, count=4)
    assert windows.shape == (4, 201) and (windows[:, 0] == 0xFF).all()
    for window in windows:
        text = decode(window)
        key = text[-5:]
        assert key.isdigit() and text.endswith(f"{QUESTION}{key}")
        before = text[: -len(QUESTION) - 5]
        assert before.count(f"{BEFORE}{key}{AFTER}") == 1 and key not in before.replace(f"{BEFORE}{key}", "")
        assert before.index(BEFORE) == round(depth * (room(200) - 1))


def test_the_ends_of_the_depth_touch_bos_and_question():
    assert decode(passkey_windows(TEXT, 120, 0.0)[0]).startswith(BEFORE)
    assert f"{AFTER}{QUESTION}" in decode(passkey_windows(TEXT, 120, 1.0)[0])


def test_the_smallest_window_is_all_passkey():
    least = len(BEFORE) + len(AFTER) + len(QUESTION) + 10
    window = decode(passkey_windows(TEXT, least, 0.5)[0])
    assert room(least) == 1 and window == f"{BEFORE}{window[-5:]}{AFTER}{QUESTION}{window[-5:]}"


def test_texts_and_keys_are_the_same_at_every_depth():
    a, b = (passkey_windows(TEXT, 300, depth, count=8) for depth in (0.0, 1.0))
    assert torch.equal(a[:, -5:], b[:, -5:]) and len({tuple(row) for row in a[:, -5:].tolist()}) == 8
    shared = slice(100, 200)  # between both places of the sentence
    assert torch.equal(a[:, shared], b[:, shared])
    assert not torch.equal(a, passkey_windows(TEXT, 300, 0.0, count=8, seed=1))


def test_writing_leaves_its_input_alone():
    windows = TextBatches(TEXT, 150, 3).at(0)
    before = windows.clone()
    write_passkeys(windows, torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(windows, before)


# ---------------------------------------------------------------------------------------------- batches
def has_key(windows):
    return torch.tensor([decode(w)[: -len(QUESTION) - 5].count(BEFORE) == 1 for w in windows])


def test_a_batch_is_a_function_of_seed_and_step():
    batches = PasskeyBatches(TEXT, 150, 8, seed=3)
    assert torch.equal(batches.at(5), PasskeyBatches(TEXT, 150, 8, seed=3).at(5))
    assert not torch.equal(batches.at(5), batches.at(6))
    assert not torch.equal(batches.at(5), PasskeyBatches(TEXT, 150, 8, seed=4).at(5))


def test_the_parts_of_all_processes_are_the_batch():
    batches = PasskeyBatches(TEXT, 150, 8, seed=3)
    assert torch.equal(torch.cat([batches.at(2, rank, 4) for rank in range(4)]), batches.at(2))


def test_the_mixed_share_and_the_text_around_it():
    plain = TextBatches(TEXT, 150, 400, seed=1).at(0)
    for share, low, high in ((0.0, 0, 0), (0.25, 0.18, 0.32), (1.0, 1, 1)):
        windows = PasskeyBatches(TEXT, 150, 400, seed=1, mixed=share).at(0)
        found = has_key(windows)
        assert low <= found.float().mean() <= high
        assert torch.equal(windows[~found], plain[~found])  # and windows without a key are the text's own


def test_keys_and_depths_spread():
    batches = PasskeyBatches(TEXT, 150, 400)
    windows = torch.cat([w[has_key(w)] for w in (batches.at(0), batches.at(1))])  # half of 800
    starts = torch.tensor([decode(w).index(BEFORE) for w in windows]).float()
    assert starts.min() < 3 and starts.max() > room(150) - 4 and abs(starts.mean() / room(150) - 0.5) < 0.06
    counts = torch.bincount(windows[:, -5:].flatten() - ord("0"), minlength=10)
    assert counts.min() > 150 and counts.max() < 250 and len(counts) == 10
    assert abs(torch.corrcoef(torch.stack((starts, windows[:, -5].float())))[0, 1]) < 0.2  # keys do not tell depths
    assert not torch.equal(batches.at(0)[:, -5:], batches.at(1)[:, -5:])


# ---------------------------------------------------------------------------------------------- scores
class Reader(nn.Module):
    """Answers by looking the sentence up, `shift` bytes beside the right place, from the last `sight` tokens."""

    def __init__(self, shift=0, sight=10_000):
        super().__init__()
        self.shift, self.sight, self.weight = shift, sight, nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 256)
        places = tokens.unfold(1, len(CUE), 1).eq(CUE).all(-1)  # [B, T - cue + 1]
        for row, found in enumerate(places):
            start = int(found.nonzero()[0]) + len(CUE) + self.shift
            if tokens.shape[1] - start > self.sight:
                continue
            for digit in range(5):
                logits[row, tokens.shape[1] - 5 + digit, tokens[row, start + digit]] = 1.0
        return logits


def test_a_model_that_looks_it_up_is_right_everywhere():
    rows = passkey_accuracy(Reader(), TEXT, (100, 150), (0.0, 1.0), count=6, batch=4)
    assert [(r["length"], r["depth"]) for r in rows] == [(100, 0.0), (100, 1.0), (150, 0.0), (150, 1.0)]
    assert all(r["exact"] == r["digit"] == 1 and r["count"] == 6 for r in rows)


def test_a_model_that_looks_beside_it_is_not():
    rows = passkey_accuracy(Reader(shift=1), TEXT, (100,), (0.5,), count=64)
    assert rows[0]["exact"] == 0 and rows[0]["digit"] < 0.25


def test_a_short_sight_shows_in_the_depths():
    near, far = (passkey_accuracy(Reader(sight=120), TEXT, (300,), (d,), count=4)[0] for d in (1.0, 0.0))
    assert near["exact"] == 1 and far["digit"] == 0


def test_a_model_that_always_says_the_same_digit_is_at_chance():
    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, tokens):
            return nn.functional.one_hot(torch.full_like(tokens, ord("7")), 256).float()

    row = passkey_accuracy(Always(), TEXT, (100,), (0.5,), count=400, batch=400)[0]
    assert abs(row["digit"] - CHANCE) < 0.03 and row["exact"] == 0


def test_the_model_is_left_in_its_mode():
    model = Reader().train()
    passkey_accuracy(model, TEXT, (100,), (0.5,), count=2)
    assert model.training


# ---------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: PasskeyBatches(TEXT, 60), "a context of 60 cannot hold a passkey of 5 digits; accepted: 68 or more"),
        (lambda: PasskeyBatches(TEXT, 600, mixed=1.5), "share of windows with a passkey is 1.5; accepted: 0 to 1"),
        (lambda: passkey_windows(TEXT, 200, 1.5), "depths are 1.5 to 1.5; accepted: 0 to 1"),
        (lambda: room(200, 0), "a passkey of 0 digits"),
        (lambda: passkey_windows(TEXT[:100], 200, 0.5), "the text has 100 bytes"),
    ],
)
def test_wrong_input_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
