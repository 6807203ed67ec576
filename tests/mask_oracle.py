"""The mask sampler once more, from the text of ijepa_fast/masks/sampling.py alone: Python ints, one patch at a time.

Slow and obvious. It shares no code with the package, and is what every faster sampler must equal bit for bit.
"""

import math
from fractions import Fraction

MASK_SIZE, MASK_CONTEXT_SIZE, MASK_POSITION, MASK_CONTEXT_POSITION, MASK_SUBSET = range(5)
WORD = 2**32


def philox(counter, key):
    """Salmon et al. 2011, figure 2: ten rounds of two multiplications and a crossing of the halves."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        high_0, low_0 = divmod(counter[0] * 0xD2511F53, WORD)
        high_1, low_1 = divmod(counter[2] * 0xCD9E8D57, WORD)
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B9) % WORD, (key[1] + 0xBB67AE85) % WORD]
    return counter


def below(word, n):
    return word * n // WORD


class Oracle:
    """Masks of one configuration (any object with the fields of MaskConfig) on one grid."""

    def __init__(self, config, grid):
        self.config = config
        self.height, self.width = grid
        self.patches = self.height * self.width
        self.extent = grid if config.draw_last_row_col else (self.height - 1, self.width - 1)
        self.fixed_count = round((1 - config.mask_ratio) * self.patches)

    def sample(self, batch_size, seed, step, first_image=0):
        """Sequences of contexts [B * K * C] and of targets [B * K * M], lists of token indices b * N + n, b from 0."""
        self.key = (seed % WORD, seed // WORD % WORD)
        self.step = step
        of_mask = []
        for mask in range(self.config.per_image):
            self.mask = mask
            of_mask.append([self.image(first_image + b) for b in range(batch_size)])
            if self.config.context == "batch_min":
                self.truncate(of_mask[-1])
        tokens = [[], []]
        for b in range(batch_size):
            for drawn in of_mask:
                for kind in range(2):
                    tokens[kind] += [[b * self.patches + n for n in sequence] for sequence in drawn[b][kind]]
        return tokens

    def truncate(self, drawn):
        group_size = self.config.group_size
        for first in range(0, len(drawn), group_size):
            group = drawn[first : first + group_size]
            shortest = min(len(context) for contexts, _ in group for context in contexts)
            for contexts, _ in group:
                contexts[:] = [context[:shortest] for context in contexts]

    def words(self, stream, index, draw):
        return philox((draw, index, self.step, self.mask * 2**8 + stream), self.key)

    def image(self, b):
        """Sorted patch numbers of every context block and of every target block of one image."""
        config = self.config
        if config.strategy == "rasterized":
            quadrants = self.quadrants()
            contexts = [quadrants.pop(below(self.words(MASK_CONTEXT_POSITION, b, 0)[0], 4))]
            targets = quadrants
        elif config.strategy == "random":
            targets = [self.scattered(b, m) for m in range(config.num_targets)]
        else:
            targets = [self.target_block(b, m) for m in range(config.num_targets)]
        if config.strategy in ("block", "random"):
            contexts = [set(range(self.patches)).difference(*targets)]
        elif config.strategy == "multiblock":
            contexts = [self.context_block(b, c, targets) for c in range(config.num_contexts)]
        if config.context == "fixed":
            contexts = [self.fixed_subset(b, c, seen, targets) for c, seen in enumerate(contexts)]
        return [sorted(context) for context in contexts], [sorted(target) for target in targets]

    def size_words(self, stream, b, j):
        if self.config.size_per == "step":  # the same for all masks
            return philox((0, 0, self.step, stream), self.key)
        return self.words(stream, b, j if self.config.size_per == "block" else 0)

    def area(self, word, scale):
        low, high = (math.ceil(Fraction(bound) * 2**24) for bound in scale)
        return self.patches * (low + below(word, high - low + 1)) // 2**24

    def sides(self, words, scale, aspect):
        area = self.area(words[0], scale)
        low, high = (math.ceil(Fraction(bound) * 2**24) for bound in aspect)
        ratio = low + below(words[0 if self.config.shared_scale_aspect else 1], high - low + 1)
        height = (math.isqrt(4 * area * ratio // 2**24) + 1) // 2
        width = (math.isqrt(4 * area * 2**24 // ratio) + 1) // 2
        return min(height, self.extent[0]), min(width, self.extent[1])

    def block(self, words, height, width):
        top = below(words[0], self.extent[0] - height + 1)
        left = below(words[1], self.extent[1] - width + 1)
        return self.rectangle(top, left, top + height, left + width)

    def rectangle(self, top, left, bottom, right):
        return {row * self.width + column for row in range(top, bottom) for column in range(left, right)}

    def target_block(self, b, m):
        config = self.config
        sides = self.sides(self.size_words(MASK_SIZE, b, m), config.target_scale, config.target_aspect)
        return self.block(self.words(MASK_POSITION, b, m), *sides)

    def context_block(self, b, c, targets):
        """Patches seen by the first acceptable attempt."""
        config = self.config
        sides = self.sides(self.size_words(MASK_CONTEXT_SIZE, b, c), config.context_scale, config.context_aspect)
        best = None
        for attempt in range(20 if config.context == "fixed" else 20 * len(targets) + 1):
            block = self.block(self.words(MASK_CONTEXT_POSITION, b, c * 2**16 + attempt), *sides)
            counting = [] if config.allow_overlap else targets[: len(targets) - attempt // 20]
            seen = block.difference(*counting)
            if config.context == "fixed":
                if len(seen) >= max(config.min_keep + 1, self.fixed_count):
                    return seen
                if best is None or len(seen) > len(best):
                    best = seen
            elif len(seen) > config.min_keep:
                return seen
        assert best is not None, "no attempt was acceptable, not even without targets"
        return best

    def patch_keys(self, stream, b, block):
        return [self.words(stream, b, block * 2**16 + n // 4)[n % 4] for n in range(self.patches)]

    def scattered(self, b, m):
        keys = self.patch_keys(MASK_POSITION, b, m)
        count = self.area(self.size_words(MASK_SIZE, b, m)[0], self.config.target_scale)
        return set(sorted(range(self.patches), key=lambda n: (keys[n], n))[:count])

    def quadrants(self):
        row, column = self.height // 2, self.width // 2
        upper_left = self.rectangle(0, 0, row, column)
        upper_right = self.rectangle(0, column, row, self.width)
        lower_left = self.rectangle(row, 0, self.height, column)
        return [upper_left, upper_right, lower_left, self.rectangle(row, column, self.height, self.width)]

    def fixed_subset(self, b, c, seen, targets):
        keys = self.patch_keys(MASK_SUBSET, b, c)
        hidden = set() if self.config.allow_overlap else set().union(*targets)

        def order(n):
            return 0 if n in seen else 2 if n in hidden else 1, keys[n], n

        return set(sorted(range(self.patches), key=order)[: self.fixed_count])
