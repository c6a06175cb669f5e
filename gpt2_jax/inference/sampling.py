"""The choice of the next token from its logits."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.errors import UsageError

# GPUs and CPUs may round smaller numbers to 0.
MIN_NORMAL = float(np.finfo(np.float32).tiny)


def is_whole(value) -> bool:
    """Whether this is a whole number from 0."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from logits.

    `temperature` divides the logits; 0 takes the likeliest token. `top_k` keeps the k likeliest
    tokens (Fan et al. 2018); 0 keeps all. `top_p` keeps the fewest tokens whose probability
    reaches p (Holtzman et al. 2020), at least one; 1 keeps all. On a tie, the first tokens are
    kept. Raises UsageError for a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, numbers.Real):
                raise UsageError(f'{name} = {value!r} is not allowed; expected a number')
        for name, right, expected in (
            ('temperature', 0 <= self.temperature < math.inf, '0 (greedy) or more, and finite'),
            ('top_k', is_whole(self.top_k), 'a whole number from 0 (all)'),
            ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1 (all)'),
        ):
            if not right:
                raise UsageError(
                    f'{name} = {getattr(self, name)} is not allowed; expected {expected}'
                )

    @property
    def divisor(self) -> float:
        """The temperature as logits can be divided by it in fp32; 0 if it is 0."""
        return max(self.temperature, MIN_NORMAL) if self.temperature else 0.0


# Draws from the distribution that the model predicts.
AS_PREDICTED = Sampling()
# For people to read: small models read better a little below the temperature of their training.
TO_READ = Sampling(temperature=0.8)


def sample_token(logits_BV, keys_B, sampling: Sampling):
    """One token for each row, drawn with the key of that row: (B, V), (B,) -> (B,)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = _keep(logits_BV, kth_B1, sampling.top_k)
    # Only differences of logits matter. Differences from the largest are at most 0, so a division
    # by a small temperature overflows to -inf, a token that is never drawn, and not to inf.
    logits_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    logits_BV = logits_BV / sampling.divisor
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # probability of all likelier tokens
        n_B1 = jnp.maximum((before_BV < sampling.top_p).sum(-1, keepdims=True), 1)
        logits_BV = _keep(logits_BV, jnp.take_along_axis(sorted_BV, n_B1 - 1, axis=-1), n_B1)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def _keep(logits_BV, nth_B1, n):
    """The n largest logits of each row, and -inf for the rest; `nth_B1` is the n-th largest.

    Of the logits that equal it, the first are kept.
    """
    above_BV, tied_BV = logits_BV > nth_B1, logits_BV == nth_B1
    n_tied_B1 = n - above_BV.sum(-1, keepdims=True)
    kept_BV = above_BV | (tied_BV & (jnp.cumsum(tied_BV, axis=-1) <= n_tied_B1))
    return jnp.where(kept_BV, logits_BV, -jnp.inf)
