"""The baseline: an interpolated modified Kneser-Ney trigram over the same tokens (Chen and Goodman, 1998).

Counts are sorted arrays of integer keys: training is a sort, scoring a binary search.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """One order of the model: discounted counts of n-grams, and the mass each context leaves to the lower order."""

    gram_keys: np.ndarray  # int64 [grams], sorted
    gram_probs: np.ndarray  # float32 [grams], the discounted share
    context_keys: np.ndarray  # int64 [contexts], sorted
    backoff: np.ndarray  # float32 [contexts], the mass for the lower order


def lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, default: float) -> np.ndarray:
    """`values` at the `wanted` keys; `default` for keys that do not occur."""
    if not len(keys):
        return np.full(len(wanted), default, dtype=np.float32)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], np.float32(default))


def make_order(gram_keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> Order:
    """Discount the counts of n-grams by 1, 2, 3 and more occurrences; `key // vocab_size` is an n-gram's context."""
    n1, n2, n3, n4 = (max(1, int((counts == times).sum())) for times in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    estimated = [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    discounts = np.clip(
        estimated, [0, 0.05, 0.05, 0.05], [0, 0.95, 1.95, 2.95]
    )  # tiny samples give estimates out of range
    discount = discounts[np.minimum(counts, 3)]
    contexts = gram_keys // vocab_size
    context_keys, first = np.unique(contexts, return_index=True)
    totals = np.add.reduceat(counts, first)
    taken = np.add.reduceat(discount, first)
    per_gram = np.repeat(totals, np.diff(np.append(first, len(gram_keys))))
    return Order(
        gram_keys,
        ((counts - discount) / per_gram).astype(np.float32),
        context_keys,
        (taken / totals).astype(np.float32),
    )


class Trigram:
    """p(w | u, v), trained on one stream of token ids."""

    def __init__(self, stream: np.ndarray, vocab_size: int) -> None:
        """Count `stream`, integers [N] below `vocab_size`."""
        ids = stream.astype(np.int64)
        self.vocab_size = V = vocab_size
        trigrams, counts = np.unique((ids[:-2] * V + ids[1:-1]) * V + ids[2:], return_counts=True)
        self.three = make_order(trigrams, counts, V)
        # Below the highest order, a gram counts once for each distinct token before it.
        bigrams, continuations = np.unique(trigrams % (V * V), return_counts=True)
        self.two = make_order(bigrams, continuations, V)
        unigrams, continuations = np.unique(bigrams % V, return_counts=True)
        one = make_order(unigrams, continuations, V)
        self.unigram = np.full(V, float(one.backoff[0]) / V, dtype=np.float32)
        self.unigram[unigrams] += one.gram_probs

    def probabilities(self, stream: np.ndarray) -> np.ndarray:
        """float32 [N - 2]: the probability of each token from the third on, given the two before it."""
        ids, V = stream.astype(np.int64), self.vocab_size
        u, v, w = ids[:-2], ids[1:-1], ids[2:]
        probs = self.unigram[w]
        probs = lookup(self.two.gram_keys, self.two.gram_probs, v * V + w, 0.0) + (
            lookup(self.two.context_keys, self.two.backoff, v, 1.0) * probs
        )
        contexts = u * V + v
        return lookup(self.three.gram_keys, self.three.gram_probs, contexts * V + w, 0.0) + (
            lookup(self.three.context_keys, self.three.backoff, contexts, 1.0) * probs
        )


def best_mixture_loss(own: np.ndarray, pooled: np.ndarray) -> tuple[float, float]:
    """The lowest mean loss in nats of any mixture of two models on these tokens, and the share of `own` in it."""
    losses = {
        share: float(-np.log(share * own + (1 - share) * pooled).mean())
        for share in np.linspace(0, 1, 11).round(1).tolist()
    }
    share = min(losses, key=losses.__getitem__)
    return losses[share], share
