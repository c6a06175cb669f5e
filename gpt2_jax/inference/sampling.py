"""The choice of the next token from its logits."""

import dataclasses

import jax
import jax.numpy as jnp

from gpt2_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from logits.

    `temperature` divides the logits; 0 takes the most likely token. `top_k` keeps the k most
    likely tokens (Fan et al. 2018); 0 keeps all. `top_p` keeps the fewest tokens whose
    probability reaches p (Holtzman et al. 2020); 1 keeps all. Raises UsageError for a value
    outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        for name, wrong, expected in (
            ('temperature', not self.temperature >= 0, '0 (greedy) or more'),
            ('top_k', self.top_k < 0, '0 (all) or more'),
            ('top_p', not 0 < self.top_p <= 1, 'above 0 and at most 1 (all)'),
        ):
            if wrong:
                raise UsageError(
                    f'{name} = {getattr(self, name)} is not allowed; expected {expected}'
                )


# Draws from the distribution that the model predicts.
AS_PREDICTED = Sampling()


def sample_token(logits_BV, keys_B, sampling: Sampling):
    """One token for each row, drawn with the key of that row: (B, V), (B,) -> (B,)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # probability of all likelier tokens
        least_B1 = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV)
