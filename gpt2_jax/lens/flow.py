"""Shape flow: every operation of a step, in order: dimensions by name, bytes, parameters, FLOPs.

    flow = shape_flow(GPT2Config(vocab_size=65, n_layer=6), batch_size=8, seq_len=64)

The operations are read off the traced program (jaxpr.py), so they are what runs and cannot go
stale. Dimensions get their names from a second trace of the same step, in which every size is a
prime number of its own: 17 x 11 can only be T B. reports/flow.py prints a flow.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.architecture import GPT2Config, padded_vocab
from gpt2_jax.errors import UsageError
from gpt2_jax.lens.jaxpr import Operation, read_operations
from gpt2_jax.lens.subject import run
from gpt2_jax.model.params import param_shapes

# A step is traced with these sizes to name its dimensions. The vocabulary and whatever is derived
# from it stay on their side of 1,024, where model/ops.py begins to pad, and of 4,096, where
# training/programs.py begins to take the loss in chunks.
PRIMES = {'B': 11, 'T': 17, 'H': 5, 'K': 7, 'F': 41, 'P': 23, 'A': 29, 'V': 61}
LARGE_V, LARGER_V = 1031, 4099
# The letters, in the order in which those of a merged axis are written.
MEANINGS = {
    'B': 'rows of a (micro-)batch',
    'T': 'positions',
    'S': 'positions of keys',
    'D': 'model width',
    'H': 'heads',
    'K': 'head width',
    'F': 'feed-forward width',
    'V': 'vocabulary',
    'V+': 'vocabulary, padded',
    'P': 'n_positions',
    'A': 'micro-batches of a step',
}


class Flow(NamedTuple):
    """A traced step. `xla_flops` is XLA's own count: its flops and transcendentals."""

    operations: list[Operation]
    sizes: dict[str, int]
    xla_flops: float | None

    @property
    def flops(self) -> int:
        """Of all operations."""
        return sum(operation.flops for operation in self.operations)

    @property
    def n_params(self) -> int:
        """Of all operations, each parameter counted where it is first used."""
        return sum(operation.n_params for operation in self.operations)


class Sizes(NamedTuple):
    """What a step is traced for: an architecture, the rows and the positions of a batch."""

    cfg: GPT2Config
    batch_size: int
    seq_len: int
    grad_accum_steps: int = 1


# make_step(sizes) -> (function, arguments): the arguments are shapes, the parameters lie in the
# first one under the name 'params'.
MakeStep = Callable[[Sizes], tuple[Callable, tuple]]


def plain_step(sizes: Sizes) -> tuple[Callable, tuple]:
    """The loss of a batch and its gradient by the plain model, without optimizer and dropout."""

    def step(state, inputs_BT, targets_BT):
        def loss(params):
            logits_BTV = run(sizes.cfg, params, inputs_BT)
            log_probs_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
            return -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1).mean()

        return jax.value_and_grad(loss)(state['params'])

    params = param_shapes(sizes.cfg)
    tokens_BT = jax.ShapeDtypeStruct((sizes.batch_size, sizes.seq_len), jnp.int32)
    return step, ({'params': params}, tokens_BT, tokens_BT)


def shape_flow(
    cfg: GPT2Config,
    *,
    batch_size: int = 1,
    seq_len: int | None = None,
    grad_accum_steps: int = 1,
    make_step: MakeStep = plain_step,
) -> Flow:
    """Every operation of a step of the model `cfg`, in the order of the program.

    `make_step` builds the step for given sizes: by default loss and gradient of the plain model;
    scripts/lens.py passes the training step. Nothing is computed, only traced. Raises UsageError if
    the step has other operations at other sizes, so that its dimensions cannot be named.
    """
    sizes = Sizes(cfg, batch_size, seq_len or cfg.n_positions, grad_accum_steps)
    prime, symbols = _prime_sizes(sizes)
    traced, operations = _trace(sizes, make_step)
    _, named = _trace(prime, make_step)
    if _forms(named) != _forms(operations):
        raise UsageError('the step has other operations at other sizes: dimensions cannot be named')
    operations = [
        operation._replace(dims=_names(other.shape, operation.shape, symbols))
        for operation, other in zip(operations, named, strict=True)
    ]
    cost = traced.lower().cost_analysis() or {}
    counted = [cost[key] for key in ('flops', 'transcendentals') if key in cost]
    return Flow(operations, _by_letter(sizes), sum(counted) if counted else None)


def _trace(sizes: Sizes, make_step: MakeStep):
    function, arguments = make_step(sizes)
    traced = jax.jit(function).trace(*arguments)
    return traced, read_operations(traced, arguments)


def _forms(operations: list[Operation]) -> list[tuple[str, int]]:
    return [(operation.name, len(operation.shape)) for operation in operations]


def _by_letter(sizes: Sizes) -> dict[str, int]:
    cfg = sizes.cfg
    found = {
        'B': sizes.batch_size // sizes.grad_accum_steps,
        'T': sizes.seq_len,
        'S': sizes.seq_len,
        'D': cfg.n_embd,
        'H': cfg.n_head,
        'K': cfg.head_dim,
        'F': cfg.d_ff,
        'V': cfg.vocab_size,
        'V+': padded_vocab(cfg.vocab_size),
        'P': cfg.n_positions,
        'A': sizes.grad_accum_steps,
    }
    return {name: size for name, size in found.items() if name != 'A' or size > 1}


def _prime_sizes(real: Sizes) -> tuple[Sizes, dict[str, int]]:
    """The sizes as prime numbers, and each by the letter that it stands for."""
    sizes = _by_letter(real)
    # A size of 1 stays 1: JAX leaves out what it would have to do to that axis.
    primes = {letter: prime if sizes.get(letter, 1) > 1 else 1 for letter, prime in PRIMES.items()}
    if sizes['V'] > 1024:
        primes['V'] = LARGE_V if sizes['V'] < 4096 else LARGER_V
    cfg = dataclasses.replace(
        real.cfg,
        vocab_size=primes['V'],
        n_positions=primes['T'] if real.seq_len == real.cfg.n_positions else primes['P'],
        n_embd=primes['H'] * primes['K'],
        n_head=primes['H'],
        n_inner=primes['F'],
    )
    prime = Sizes(cfg, primes['B'] * primes['A'], primes['T'], primes['A'])
    symbols = _by_letter(prime)
    if cfg.n_positions == prime.seq_len:
        del symbols['P']
    return prime, symbols


def _names(
    shape: tuple[int, ...], real: tuple[int, ...], symbols: dict[str, int]
) -> tuple[str, ...]:
    names = [_name(n, size, symbols) for n, size in zip(shape, real, strict=True)]
    if names.count('T') == 2:
        names[len(names) - 1 - names[::-1].index('T')] = 'S'
    return tuple(names)


def _name(n: int, size: int, symbols: dict[str, int]) -> str:
    """A size as letters: 'T', 'B T' for a merged axis; or the number if it is a constant."""
    if n == size and n not in symbols.values():
        return str(size)
    letters, rest = [], n
    by_size = sorted(symbols.items(), key=lambda item: -item[1])  # D before H and K, T before S
    for letter, value in by_size:
        while value > 1 and rest % value == 0:
            letters.append(letter)
            rest //= value
    if not letters:
        return str(size)
    letters.sort(key=list(MEANINGS).index)
    return ' '.join(([str(rest)] if rest > 1 else []) + letters)
