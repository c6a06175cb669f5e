r"""GPT-2 from scratch in JAX and Flax linen: from raw text to sampled verse, open to view.

    import gpt2_jax
    from gpt2_jax import lens

    m = gpt2_jax.load('runs/quickstart')        # a trained run, or converted weights
    text = 'ROMEO:\nIs the day so young?'
    print(m)
    print(m.generate('ROMEO:', max_new_tokens=60))
    print(m.logits(text).shape)                                    # (1, T, V)
    print(lens.token_losses(m, text).mean().round(3))              # nats per token
    print(lens.capture(m, text, 'pattern')['h_0.pattern'].shape)   # (1, H, T, T)
    print(lens.head_scores(m).previous.round(2))                   # (L, H)
    without = lens.ablate(m, text, 'h_0.attn.*')                  # {head: losses (1, T - 1)}
    print({head: round(float(loss.mean()), 3) for head, loss in without.items()})

`m.model` is a Flax module and `m.params` are its parameters:
`m.model.apply({'params': m.params}, tokens_BT)` gives logits, and jax.grad, jvp, hessian and vmap
work on it. `help(gpt2_jax.lens)` lists what can be looked at. Importing gpt2_jax loads no JAX; each
name is loaded when it is first used.
"""

import importlib

__version__ = '0.1.0'

_HOMES = {
    'GPT2': 'gpt2_jax.model.gpt2',
    'GPT2Config': 'gpt2_jax.architecture',
    'load': 'gpt2_jax.library',
}
__all__ = [*_HOMES, 'lens']


def __getattr__(name: str):
    if name == 'lens':
        return importlib.import_module('gpt2_jax.lens')
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
