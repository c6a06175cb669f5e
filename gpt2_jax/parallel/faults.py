"""What running out of memory means for people: which settings to turn."""

import contextlib
import re

import jax

from gpt2_jax.errors import UserError
from gpt2_jax.parallel.devices import describe_device

ADVICE = {
    'train': 'lower --config.train.batch_size, raise --config.train.grad_accum_steps (the same gradient '
    'in less memory), lower --config.train.seq_len, set --config.model.remat=True, or take a smaller '
    'model.n_layer or model.n_embd',
    'score': 'lower --batch_size',
    'sample': 'lower --num_samples',
}


@contextlib.contextmanager
def memory_errors(work: str):
    """Turns running out of memory into a UserError with ADVICE[work]."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        # A GPU says the first, a CPU the second.
        if not isinstance(error, MemoryError) and not re.search(
            'RESOURCE_EXHAUSTED|Out of memory', str(error)
        ):
            raise
        amount = re.search(
            r'allocat\w+ (?:of )?([\d.]+) ?([KMGT]iB)?', str(error)
        )  # in bytes where no unit is named
        size = amount and (
            f'{amount[1]} {amount[2]}' if amount[2] else f'{float(amount[1]) / 2**30:,.1f} GiB'
        )
        raise UserError(
            f'out of memory{f" for an array of {size}" if size else ""} on '
            f'{describe_device(jax.devices()[0])}: {ADVICE[work]}'
        ) from None
