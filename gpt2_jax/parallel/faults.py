"""Running out of memory, as an error for people: it names the settings to change."""

import contextlib
import re

import jax

from gpt2_jax.errors import UserError
from gpt2_jax.parallel.devices import describe_device

ADVICE = {
    'train': 'lower --config.train.batch_size, raise --config.train.grad_accum_steps (the same '
    'gradient in less memory), lower --config.train.seq_len, set --config.model.remat=True, or '
    'choose a smaller model.n_layer or model.n_embd',
    'score': 'lower --batch_size',
    'sample': 'lower --num_samples',
}


@contextlib.contextmanager
def memory_errors(work: str):
    """Turns an error of memory inside into a UserError with ADVICE[work]."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        # A GPU reports RESOURCE_EXHAUSTED, a CPU the words.
        if not isinstance(error, MemoryError) and not re.search(
            'RESOURCE_EXHAUSTED|Out of memory', str(error)
        ):
            raise
        # The amount is in bytes if no unit follows it.
        amount = re.search(r'allocat\w+ (?:of )?([\d.]+) ?([KMGT]iB)?', str(error))
        size = amount and (
            f'{amount[1]} {amount[2]}' if amount[2] else f'{float(amount[1]) / 2**30:,.1f} GiB'
        )
        array = f' for an array of {size}' if size else ''
        device = describe_device(jax.devices()[0])
        raise UserError(f'out of memory{array} on {device}: {ADVICE[work]}') from None
