"""Runs a fuzz target: a function that makes an input, and one that checks it.

    python tests/fuzz/recipe.py --seconds 60 --seed 1
    python tests/fuzz/recipe.py --seed 1 --only 4711        that input alone, shown

Input i of a seed is always the same one. What is found is printed with its seed, its number and the input,
and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

LIMIT = 1.0  # seconds of processor time for one input

Input = TypeVar("Input")


class Found(Exception):
    """An input that does not hold. The message says what is needed to see it again."""


@dataclass(frozen=True)
class Target(Generic[Input]):
    """make: an input from the dice. check: whether it was accepted, or an exception. show: for people."""

    make: Callable[[random.Random], Input]
    check: Callable[[Input], bool]
    show: Callable[[Input], str] = repr


def run(target: Target[Input], seed: int, numbers: Iterable[int]) -> tuple[int, int, float]:
    """Check the inputs of those numbers. Gives how many there were, were accepted, and the slowest's time.

    Raises Found for the first that lets out an exception, warns, or takes longer than LIMIT.
    """
    count = accepted = 0
    slowest = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in numbers:
            made = target.make(random.Random(f"{seed}:{number}"))
            start = time.process_time()
            try:
                accepted += target.check(made)
            except Exception as error:
                raise Found(_report(target, seed, number, made, traceback.format_exc())) from error
            took = time.process_time() - start
            if took > LIMIT:
                raise Found(_report(target, seed, number, made, f"it took {took:.2f} seconds"))
            count, slowest = count + 1, max(slowest, took)
    return count, accepted, slowest


def _report(target: Target[Input], seed: int, number: int, made: Input, what: str) -> str:
    return f"--seed {seed} --only {number}\n{target.show(made)}\n{what}"


def main(target: Target[Input]) -> int:
    parser = argparse.ArgumentParser(description="Look for inputs that break what must hold.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", type=int, metavar="NUMBER", help="show and check this input alone")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    if options.only is not None:
        print(target.show(target.make(random.Random(f"{options.seed}:{options.only}"))))
    end = time.monotonic() + options.seconds
    numbers = itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())
    try:
        found = run(target, options.seed, numbers if options.only is None else [options.only])
    except Found as error:
        print(error)
        return 1
    print("{} inputs, {} accepted, the slowest took {:.3f} s".format(*found))
    return 0
