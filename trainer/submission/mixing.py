"""Text from decisions, of which a model that learns on the way needs to be told only surprises.

Packer and packed script share it. A character is a path through a Huffman tree, one decision a
node. Nine contexts (the last characters, the word so far) each keep the last ten decisions at
every node; what such a history means is learnt, and so is how far to trust which context. Their
logistic mix gives the probability of the next decision, as in the PAQ programs, and an arithmetic
decoder makes text of it. Integers, IEEE sums and products alone decide, so that every machine
decodes what any other one encoded. The script takes some 10 s and 150 MB, once. The contexts and
rates below are those that made it smallest.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Generator
from decimal import Decimal

ONE = 1 << 16
"""A probability of one."""
LAST = 1, 2, 3, 4, 6, 9, 16
"""How many of the last characters are a context."""
CONTEXTS = len(LAST) + 2
STEPS, LIMIT = 64, 700
"""A logit is rounded to so many parts of one, and cut off at so many parts."""
HISTORIES = 1 << 11
"""A history is a number below this: a 1 and up to ten decisions after it."""


def leaves(groups: list[str]) -> dict[int, str]:
    """Characters by path from the root: a number of a 1 and the decisions after it.

    Args:
        groups: the characters to which none, one, two and more decisions lead.
    """
    path, found = 1, dict[int, str]()
    for characters in groups:
        for character in characters:
            found[path] = character
            path += 1
        path *= 2
    return found


def predictions(groups: list[str], count: int, text: list[str]) -> Generator[int, int]:
    """Yields the probability (of ONE) that the next decision is 1, and is sent the decision.

    Args:
        groups: as for `leaves`.
        count: length of the text.
        text: takes each character once it is decided.
    """
    characters = leaves(groups)
    # Decimal rounds correctly everywhere, which math.exp does not.
    squashed = [int(ONE / (1 + Decimal(-x / STEPS).exp())) for x in range(-LIMIT, LIMIT + 1)]
    first, half = [0.0, 0.0], HISTORIES // 2
    for history in range(2, HISTORIES):
        first.append(0.7 * first[history // 2] + (0.8 if history % 2 else -0.8))
    longer = [[2 * h + d if h < half else (2 * h + d) % half + half for h in range(HISTORIES)]
              for d in (0, 1)]  # fmt: skip
    meanings = [first[:] for _ in range(CONTEXTS)]
    weights = defaultdict[tuple[str, int], list[float]](lambda: [0.19] * CONTEXTS)
    seen = [defaultdict[str, dict[int, int]](dict) for _ in range(CONTEXTS)]
    tail, word, before = " " * LAST[-1], "", ""
    while len(text) < count:
        names = [*(tail[-length:] for length in LAST), word, f"{before} {word}"]
        contexts = [known[name] for known, name in zip(seen, names, strict=True)]
        path = 1
        while path not in characters:
            histories = [context.get(path, 1) for context in contexts]
            chosen = tail[-1], histories.count(1)
            mix, logit = weights[chosen], 0.0
            logits = [meaning[h] for meaning, h in zip(meanings, histories, strict=True)]
            for weight, part in zip(mix, logits, strict=True):
                logit += weight * part
            probability = squashed[min(max(int(logit * STEPS), -LIMIT), LIMIT) + LIMIT]
            decision = yield probability
            error = decision - probability / ONE
            weights[chosen] = [w + 0.004 * error * x for w, x in zip(mix, logits, strict=True)]
            for context, meaning, h in zip(contexts, meanings, histories, strict=True):
                meaning[h] += 0.03 * error
                context[path] = longer[decision][h]
            path = 2 * path + decision
        character = characters[path]
        text.append(character)
        tail = tail[1:] + character
        if character.isascii() and (character.isalnum() or character == "_"):
            word += character
        elif word:
            before, word = word, ""


def decode(data: bytes) -> str:
    """The text of which `trainer.submission.coding` made `data`."""
    head, _, coded = data.partition(b"\xff")
    groups, count = json.loads(head)
    text: list[str] = []
    model = predictions(groups, count, text)
    low, high, position = 0, (1 << 32) - 1, 4
    value = int.from_bytes(coded[:4].ljust(4, b"\0"), "big")
    with contextlib.suppress(StopIteration):
        probability = next(model)
        while True:
            middle = low + (high - low >> 16) * probability
            decision = int(value <= middle)
            low, high = (low, middle) if decision else (middle + 1, high)
            while low >> 24 == high >> 24:
                low, high = (low << 8) % (1 << 32), (high << 8) % (1 << 32) + 255
                value = (value << 8) % (1 << 32) + (coded[position] if position < len(coded) else 0)
                position += 1
            probability = model.send(decision)
    return "".join(text)
