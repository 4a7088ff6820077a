"""Text as the surprises of a model: what `mixing.decode` undoes, for the packer."""

import contextlib
import heapq
import json
from collections import Counter

from trainer.submission import mixing


def encode(text: str) -> bytes:
    """Tree and length of `text` in JSON, a byte 0xFF (never in UTF-8) and its decisions."""
    groups = tree(text)
    paths = {character: f"{path:b}"[1:] for path, character in mixing.leaves(groups).items()}
    head = json.dumps([groups, len(text)], ensure_ascii=False, separators=(",", ":"))
    coded = bytearray()
    low, high = 0, (1 << 32) - 1
    model = mixing.predictions(groups, len(text), [])
    with contextlib.suppress(StopIteration):
        probability = next(model)
        for decision in (int(digit) for character in text for digit in paths[character]):
            middle = low + (high - low >> 16) * probability
            low, high = (low, middle) if decision else (middle + 1, high)
            while low >> 24 == high >> 24:
                coded.append(low >> 24)
                low, high = (low << 8) % (1 << 32), (high << 8) % (1 << 32) + 255
            probability = model.send(decision)
    coded.append(high >> 24)  # the decoder takes zeros for what follows: that is above `low`
    return head.encode() + b"\xff" + coded


def tree(text: str) -> list[str]:
    """The characters of `text` by the length of their paths through its Huffman tree."""
    waiting = [(count, character) for character, count in Counter(text).items()]
    depths = dict.fromkeys(text, 0)
    heapq.heapify(waiting)
    while len(waiting) > 1:
        (few, some), (more, others) = heapq.heappop(waiting), heapq.heappop(waiting)
        heapq.heappush(waiting, (few + more, some + others))
        for character in some + others:
            depths[character] += 1
    return [
        "".join(sorted(character for character in depths if depths[character] == depth))
        for depth in range(max(depths.values(), default=-1) + 1)
    ]
