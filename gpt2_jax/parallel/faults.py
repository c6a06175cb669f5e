"""Memory: an estimate before training, and an error for people if there is too little."""

import contextlib
import math
import re

import jax

from gpt2_jax.errors import UserError
from gpt2_jax.parallel.devices import describe_device, free_memory
from gpt2_jax.terminal import binary_size

ADVICE = {
    'train': 'lower --config.train.batch_size, raise --config.train.grad_accum_steps (the same '
    'gradient in less memory), lower --config.train.seq_len, set --config.model.remat=block, or '
    'choose a smaller model.n_layer or model.n_embd',
    'score': 'lower --batch_size',
    'sample': 'lower --num_samples',
}


def estimate_memory(shapes, layout, device: jax.Device, n_devices: int) -> list[str]:
    """Lines on the memory that training needs at least, with a warning if there is less.

    `shapes` and `layout` are TrainStates of shapes and of shardings. Training holds them, gradients
    of the parameters and, on a CPU, the copy that is being saved. Activations come on top: see
    `warn_about_program`.
    """
    state, params = _share(shapes, layout), _share(shapes.params, layout.params)
    needed = state + params
    if device.platform == 'cpu':  # its simulated devices share one memory
        needed = (needed + state) * n_devices
    free = free_memory(device)
    line = f'memory     {binary_size(needed)} for parameters, moments, gradients and saving'
    lines = [line + (f'; {binary_size(free)} are free' if free else '')]
    if free and needed > free:
        lines.append(f'warning: this may run out of memory: {ADVICE["train"]}')
    return lines


def warn_about_program(compiled, device: jax.Device) -> None:
    """Prints a warning if a compiled training step needs more memory than is free."""
    sizes, free = compiled.memory_analysis(), free_memory(device)
    if sizes and free and sizes.temp_size_in_bytes > free:
        print(
            f'warning: a step needs {binary_size(sizes.temp_size_in_bytes)} for activations, and '
            f'{binary_size(free)} are free: {ADVICE["train"]}',
            flush=True,
        )


def _share(shapes, layout) -> int:
    """Bytes of one device's share of a tree of arrays."""
    parts = jax.tree.map(
        lambda leaf, lies: math.prod(lies.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        shapes,
        layout,
    )
    return sum(jax.tree.leaves(parts))


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
