"""What the checks of the exercises are made of: expectations that name the likely mistake when they fail.

Every expectation returns nothing when it holds, and raises `Refused` with one hint for the reader otherwise.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class Refused(Exception):
    """The answer is wrong; the message tells the reader what it looks like."""


def refuse(message: str) -> None:
    """Ends a check with a hint."""
    raise Refused(message)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers that depend on `seed` and `shape` alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(function: Callable, *arguments):
    """Calls the reader's function on copies: an edit in place cannot spoil what is compared afterwards."""
    return function(*(_copy(a) for a in arguments))


def _copy(value):
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(_copy(v) for v in value) if isinstance(value, (list, tuple)) else value


def close(value: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Same shape, all finite, and equal within `tolerance` of the largest expected value (or of 1)."""
    if value.shape != expected.shape:
        return False
    value, expected = value.detach().double(), expected.detach().double()
    limit = tolerance * max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    return bool(torch.isfinite(value).all()) and bool(((value - expected).abs() <= limit).all())


# ---------------------------------------------------------------------------------------------- one value
def expect_tensor(value, shape: Sequence[int], what: str = "the result") -> None:
    """A tensor of this shape."""
    if value is None:
        refuse(f"{what} is None: is a `return` missing?")
    if not isinstance(value, Tensor):
        refuse(f"{what} is a {type(value).__name__}, not a tensor")
    if tuple(value.shape) != tuple(shape):
        refuse(f"{what} has the shape {list(value.shape)}, expected {list(shape)}")


def expect_close(
    value, expected: Tensor, hint: str, suspects: Mapping[str, Tensor] | None = None, tolerance: float = 1e-5
) -> None:
    """A tensor equal to `expected`; otherwise the message is that of the matching suspect, or `hint`.

    Args:
        value: what the reader's function returned.
        expected: the reference.
        hint: what to say when no suspect matches; the largest difference is added.
        suspects: results of known mistakes, message to tensor.
        tolerance: relative to the largest expected value, at least to 1.
    """
    expect_tensor(value, expected.shape)
    if close(value, expected, tolerance):
        return
    for message, wrong in (suspects or {}).items():
        if close(value, wrong, tolerance):
            refuse(message)
    if not torch.isfinite(value).all():
        refuse(f"{hint} (the result holds NaN or infinity)")
    worst = (value.detach().double() - expected.double()).abs().max()
    refuse(f"{hint} (largest difference {worst:.2g})")


def expect_number(value, expected: float, what: str, suspects: Mapping[str, float] | None = None) -> None:
    """A number equal to `expected` to six digits; counts are compared exactly."""
    if value is None:
        refuse(f"{what} is None: is a `return` missing?")
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(f"{what} is a {type(value).__name__}, not a number")
    if _same_number(value, expected):
        return
    for message, wrong in (suspects or {}).items():
        if _same_number(value, wrong):
            refuse(f"{what} is {_shown(value)}: {message}")
    refuse(f"{what} is {_shown(value)}, which is not what comes out here ({_ratio(value, expected)})")


def _same_number(value: float, expected: float) -> bool:
    if isinstance(expected, int):
        return value == expected
    return abs(value - expected) <= 1e-6 * max(1.0, abs(expected))


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _ratio(value: float, expected: float) -> str:
    # The factor helps the reader to find a missing term without giving the number away.
    return f"{value / expected:.4g} times the counted value" if expected else "expected zero"


# ---------------------------------------------------------------------------------------------- one function
def expect_cases(
    function: Callable,
    reference: Callable,
    cases: Mapping[str, tuple],
    suspects: Callable[..., Mapping[str, Tensor]],
) -> None:
    """Equal to `reference` in every case; a suspect is named only when it explains all cases.

    Args:
        function: the reader's.
        reference: called with the same arguments.
        cases: what to say when the case fails, to its arguments; telling cases first.
        suspects: called with the arguments of a case, returns results of known mistakes by message.
    """
    results = [call(function, *arguments) for arguments in cases.values()]
    expected = [reference(*arguments) for arguments in cases.values()]
    for value, wanted in zip(results, expected):
        expect_tensor(value, wanted.shape)
    if all(map(close, results, expected)):
        return
    tables = [suspects(*arguments) for arguments in cases.values()]
    for message in tables[0]:
        if all(close(value, table[message]) for value, table in zip(results, tables)):
            refuse(message)
    for hint, value, wanted in zip(cases, results, expected):
        expect_close(value, wanted, hint)


def expect_untouched(function: Callable, inputs: Mapping[str, Tensor], *more) -> None:
    """The function leaves its inputs as they were. `inputs` come first, by position, then `more`."""
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    function(*inputs.values(), *more)
    for name, tensor in inputs.items():
        if not torch.equal(tensor, before[name]):
            refuse(
                f"your function changes its input `{name}` in place (an operator like *= or a method ending "
                f"in _): the caller still needs it"
            )


def expect_gradient(function: Callable, reference: Callable, inputs: Mapping[str, Tensor], *more) -> None:
    """The gradient of a weighted sum of the result, for every input, equals that of `reference`."""

    def gradients(of: Callable) -> Sequence[Tensor | None]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        result = of(*(leaf.clone() for leaf in leaves), *more)  # copies: an edit in place has its own check
        if not result.requires_grad:
            refuse("no gradient flows through your function: look for .detach(), .item() or torch.no_grad()")
        total = (result * draw(*result.shape, seed=97)).sum()
        return torch.autograd.grad(total, leaves, allow_unused=True)

    for name, found, wanted in zip(inputs, gradients(function), gradients(reference)):
        if found is None:
            refuse(f"no gradient reaches `{name}`: part of your function detaches it")
        if not close(found, wanted, 1e-4):
            refuse(
                f"the gradient for `{name}` is wrong although the values are right: part of it is detached"
            )


def expect_dtypes(function: Callable, reference: Callable, inputs: Mapping[str, Tensor], *more) -> None:
    """In float32 and bfloat16 the result has the dtype of the first input and the values of `reference`."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        rounded = [tensor.to(dtype) for tensor in inputs.values()]
        value = call(function, *rounded, *more)
        expected = reference(*(tensor.double() for tensor in rounded), *more)
        expect_tensor(value, expected.shape)
        if value.dtype != dtype:
            refuse(f"{dtype} inputs give a {value.dtype} result: keep the dtype of the input")
        if not close(value, expected, tolerance):
            refuse(f"the values are right in float64 but not in {dtype}: something inside loses precision")


def expect_refusal(function: Callable, *arguments, about: str) -> None:
    """The function raises a ValueError for these arguments instead of guessing."""
    try:
        call(function, *arguments)
    except ValueError:
        return
    refuse(
        f"{about} must be refused with a ValueError that names the value; your function accepts it silently"
    )


def expect_good_manners(function: Callable, reference: Callable, inputs: Mapping[str, Tensor], *more) -> None:
    """What every tensor function owes its caller: gradients, untouched inputs, other dtypes."""
    expect_gradient(function, reference, inputs, *more)
    expect_untouched(function, inputs, *more)
    expect_dtypes(function, reference, inputs, *more)


# ---------------------------------------------------------------------------------------------- properties
def expect_property(holds: Callable, right: Mapping[str, Callable], wrong: Mapping[str, Callable]) -> None:
    """The reader's property is true of every right implementation and false of every wrong one.

    An AssertionError inside the property counts as false: it may be written with `assert` and `return True`.
    """
    verdicts = {
        label: _verdict(holds, implementation) for label, implementation in {**right, **wrong}.items()
    }
    for label in right:
        if not verdicts[label]:
            refuse(f"your property turns down a right implementation: {label}")
    missed = [label for label in wrong if verdicts[label]]
    if missed:
        caught = f"your property catches {len(wrong) - len(missed)} of {len(wrong)} wrong implementations"
        refuse(f"{caught}; one it lets through: {missed[0]}")


def _verdict(holds: Callable, implementation: Callable) -> bool:
    try:
        verdict = holds(implementation)
    except AssertionError:
        return False
    if isinstance(verdict, Tensor) and verdict.numel() == 1:
        verdict = bool(verdict)
    if not isinstance(verdict, bool):
        refuse(f"the property returns {type(verdict).__name__}; return True or False")
    return verdict
