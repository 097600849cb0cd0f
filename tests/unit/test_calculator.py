"""The calculator against Python's own arithmetic on expressions made by the test, and on text that is none."""

from __future__ import annotations

import operator
import random

import pytest

from retrodict.errors import InputError
from retrodict.tools.calculator import REACH, calculator

CALC, ALL = calculator(), calculator(operands=None)
OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@pytest.mark.parametrize(
    "text, answer",
    [
        ("6 - 0 =", " 6"),
        ("6 - 0 = 6, 6 - 4 = 2, 2 - 8 =", " -6"),
        ("5 - 9 = -4, -4 - 3 =", " -7"),  # as the annotated questions write a negative operand
        ("-4 - -3 =", " -1"),
        ("14-3=", " 11"),
        ("so it is 9 + 4 =", " 13"),
        ("6 - 0 = 6 6 - 4 =", " 2"),
        ("6 - 0 = 6 - 4 =", " 2"),
        ("0 + 0 =", " 0"),
        ("3 * 4 =", " 12"),
        ("07 + 1 =", " 8"),
    ],
)
def test_last_expression(text: str, answer: str) -> None:
    assert CALC(text) == ALL(text) == answer


@pytest.mark.parametrize(
    "text",
    ["", "=", "6 =", "-6 =", "6 - 0", "6 - 0 = ", "6 - =", "- 0 =", "x - 4 - 3 =", "x4 - 3 =", "1.5 + 2 =",
     "8 / 2 + 1 =", "2 ^ 3 + 1 =", "(1 + 2) * 3 =", "* 3 + 4 =", "six + 4 =", "6 - 0 ==", "6 – 4 =",
     "٣ + ٤ =", "6\n- 4\n=", "__import__('os') + 1 =", "9**9**9 =", "1e9 + 1 ="],
)  # fmt: skip
def test_nothing_to_compute(text: str) -> None:
    assert CALC(text) is None


def test_capability_is_the_last_two_operands() -> None:
    """Hu et al. cut the expression, and with it the operator before it: 1 - 4 - 3 becomes 4 - 3."""
    assert (CALC("1 + 2 + 3 ="), ALL("1 + 2 + 3 =")) == (" 5", " 6")
    assert (CALC("1 - 4 - 3 ="), ALL("1 - 4 - 3 =")) == (" 1", " -6")
    assert (CALC("1 - -4 - 3 ="), ALL("1 - -4 - 3 =")) == (" -7", " 2")
    assert calculator(operands=3)("9 + 1 - 4 - 3 =") == " -6"


def test_products_come_first() -> None:
    assert ALL("2 + 3 * 4 =") == " 14" and ALL("2 * 3 - 4 * 5 =") == " -14" and ALL("-2 * 3 * 4 - 1 =") == " -25"
    assert CALC("2 + 3 * 4 =") == " 12"


def test_numbers_are_bounded() -> None:
    assert CALC(f"{10**11} + 1 =") == f" {10**11 + 1}"
    assert CALC(f"{10**12} + 1 =") is None and CALC(f"{10**12 - 1} + 1 =") is None
    assert CALC("9" * 100_000 + " * " + "9" * 100_000 + " =") is None  # at once, and not by an error of int()
    assert ALL("9 * " * 10_000 + "9 =") is None


def test_what_is_read_ends_somewhere() -> None:
    """An expression that starts before the part that is read is no expression: its first operand may be cut."""
    long = " + ".join(["1"] * REACH)
    assert ALL(long + " =") is None and ALL("1 + " * 20 + "1 =") == " 21"
    assert ALL("a" * 10 * REACH + " 1 + 1 =") == " 2"


def test_agrees_with_python() -> None:
    rng = random.Random(0)
    for _ in range(500):
        numbers = [rng.randint(-99, 99) for _ in range(2)]
        op = rng.choice("+-*")
        space = rng.choice(["", " ", "  "])
        text = rng.choice(["", "= 3, ", "Answer: "]) + f"{numbers[0]}{space}{op}{space}{numbers[1]}{space}="
        assert CALC(text) == f" {OPS[op](*numbers)}", text


def test_never_raises() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choices("0123456789 +-*/=.,()ab\n²٣–\ud800\x00", k=rng.randint(0, 40))) + "="
        answer = CALC(text)
        assert answer is None or answer[0] == " " and str(int(answer)) == answer[1:]


@pytest.mark.parametrize("bad", [{"operands": 1}, {"operands": 0}, {"digits": 0}])
def test_bad_settings(bad: dict[str, int]) -> None:
    with pytest.raises(InputError):
        calculator(**bad)
