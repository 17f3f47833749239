"""Whether products see the data copied for them, read from a kernel's PTX.

From Hopper on, tensor cores read shared memory through the asynchronous proxy, but cp.async writes
it through the generic one: after the wait for a copy PTX requires ``fence.proxy.async`` (PTX ISA,
"Async proxy"). A single run's result does not reveal such a race.
"""

import re
from collections.abc import Iterator

_WAIT = re.compile(r"\bcp\.async\.wait_(group|all)\b")
_FENCE = re.compile(r"\bfence\.proxy\.async\b")
_PRODUCT = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma)\b")
_LABEL = re.compile(r"(\$\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)")


def unfenced(ptx: str) -> int:
    """The number of products that read copies waited for after the last fence before them.

    Loops run twice, so that one iteration follows another; other branches are not taken.
    """
    lines = ptx.splitlines()
    found, waited = set(), False
    for number in _twice(range(len(lines)), _loops(lines)):
        line = lines[number]
        if _WAIT.search(line):
            waited = True
        elif _FENCE.search(line):
            waited = False
        elif waited and _PRODUCT.search(line):
            found.add(number)
    return len(found)


def _loops(lines: list[str]) -> dict[int, int]:
    """The last line of each loop by its first line."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line.strip()))}
    jumps = ((i, found[1]) for i, line in enumerate(lines) if (found := _BRANCH.search(line)))
    return {labels[label]: i for i, label in jumps if labels.get(label, i) < i}


def _twice(numbers: range, loops: dict[int, int]) -> Iterator[int]:
    """The lines' numbers with each loop repeated once, and likewise the loops within it."""
    number = numbers.start
    while number < numbers.stop:
        yield number
        last = loops.get(number, number)
        if number < last < numbers.stop:
            body = range(number + 1, last + 1)
            yield from _twice(body, loops)
            yield from _twice(body, loops)
            number = last
        number += 1
