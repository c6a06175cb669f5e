"""The operations of a traced step, in order: module, shape, bytes, FLOPs, and parameters used.

They are read off the jaxpr, JAX's own form of a traced program, without what no result depends on.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.interpreters import partial_eval

from gpt2_jax.parallel.partition import named_leaves

PHASES = ('forward', 'backward', 'update')

# Operations that a parameter passes through on its way to the first one that uses it.
VIEWS = {
    'broadcast_in_dim',
    'convert_element_type',
    'copy',
    'reshape',
    'sharding_constraint',
    'squeeze',
    'transpose',
}
# Operations that rearrange, copy or draw random bits, and count no FLOPs.
NO_FLOPS = VIEWS | {
    'concatenate',
    'dynamic_slice',
    'dynamic_update_slice',
    'gather',
    'iota',
    'optimization_barrier',
    'pad',
    'random_bits',
    'random_fold_in',
    'random_seed',
    'random_unwrap',
    'random_wrap',
    'rev',
    'slice',
    'split',
    'stop_gradient',
}
# Kernels of their own: a whole program in one operation, whose FLOPs the trace does not show.
OPAQUE = {'custom_call', 'ffi_call', 'pallas_call'}

Label = tuple[str, int]  # of a parameter: its name and its size


class Operation(NamedTuple):
    """One operation: `dims` names the axes of its result, `parameter` what it is first to use.

    `flops` counts multiplications and additions apart, a transcendental function as one; `times` is
    how often a loop runs the operation, and is contained in `flops` and `n_bytes`. `module` is the
    path in the parameter tree, with dots.
    """

    phase: str
    module: str
    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    parameter: str
    n_params: int
    flops: int
    times: int


def read_operations(traced, arguments) -> list[Operation]:
    """The operations of `jax.jit(step).trace(*arguments)`, whose dimensions have no names yet.

    The parameters lie in the first argument under the name 'params'. JAX marks what it
    differentiates: jvp(..) is the forward pass, transpose(..) the backward pass.
    """
    whole = traced.jaxpr.jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars), instantiate=True)
    labels = zip(jaxpr.invars, _parameters(arguments), strict=True)
    found, used, went_back = [], set(), False
    for eqn, stack, given, times in _flat(jaxpr, {v: label for v, label in labels if label}):
        is_backward = 'transpose(' in stack
        went_back = went_back or is_backward
        is_forward = not went_back or (not is_backward and 'jvp(' in stack)
        names, n_params = [], 0
        for name, size in given if is_forward else []:
            names.append(f'{name} (tied)' if name in used else name)
            n_params += 0 if name in used else size
            used.add(name)
        result = eqn.outvars[0].aval
        found.append(
            Operation(
                PHASES[0 if is_forward else 1 if is_backward else 2],
                _module(stack),
                _readable(eqn, stack),
                (),
                tuple(getattr(result, 'shape', ())),
                str(getattr(result, 'dtype', '')),
                times * sum(_bytes(variable.aval) for variable in eqn.outvars),
                ', '.join(names),
                n_params,
                times * _flops(eqn),
                times,
            )
        )
    return found


def _parameters(arguments) -> list[Label | None]:
    """The label of each leaf of the arguments that is a parameter, None for the others."""
    found = []
    for name, leaf in named_leaves(arguments).items():
        is_parameter = name.startswith('0/params/')
        label = name.removeprefix('0/params/'), math.prod(leaf.shape)
        found.append(label if is_parameter else None)
    return found


def _flat(
    jaxpr, labels: dict, outer: str = '', times: int = 1
) -> Iterator[tuple[Any, str, list[Label], int]]:
    """(operation, names of its place, parameters that it uses, how often it runs), in order.

    The operations of inner programs come in the place of the program. `labels` has the label of
    each variable that holds a parameter or a view of one.
    """
    for eqn in jaxpr.eqns:
        stack = '/'.join(filter(None, [outer, str(eqn.source_info.name_stack)]))
        given = [None if hasattr(v, 'val') else labels.get(v) for v in eqn.invars]
        program = _inner_program(eqn)
        if program is not None:
            offset = len(given) - len(program.invars)  # of a `cond`, which has an index first
            passed = zip(program.invars, given[max(offset, 0) :], strict=False)
            inner = {variable: label for variable, label in passed if label}
            loops = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
            yield from _flat(program, inner, stack, times * loops)
            continue
        if eqn.primitive.name in VIEWS and given[0]:
            labels[eqn.outvars[0]] = given[0]
            given = []
        yield eqn, stack, [label for label in given if label], times


def _inner_program(eqn):
    """The program that an operation runs; of alternatives the last one. None for all others."""
    if eqn.primitive.name in OPAQUE:
        return None
    for value in eqn.params.values():
        last = value[-1] if isinstance(value, tuple | list) and value else value
        program = getattr(last, 'jaxpr', last)
        if hasattr(program, 'eqns'):
            return program
    return None


def _module(stack: str) -> str:
    """'transpose(jvp(GPT2))/GPT2.features/h_0/attn/c_attn' -> 'h_0.attn.c_attn'.

    'loss' is differentiated and belongs to no module; 'step' is not: dropout keys and the
    optimizer.
    """
    parts = re.sub(r'(transpose|jvp|vmap|jit)\(|\)', '', stack).split('/')
    path = [part for part in parts if re.fullmatch(r'h_\d+|ln_\w+|attn|mlp|c_\w+', part)]
    if path:
        return '.'.join(path)
    if 'GPT2.head' in parts:
        return 'logits'
    if 'GPT2.features' in parts:
        return 'embed'
    return 'loss' if 'jvp(' in stack else 'step'


def _readable(eqn, stack: str) -> str:
    """The primitive's name; for a product the letters of its axes if einsum was given them."""
    name = eqn.primitive.name
    letters = re.search(r'[A-Z.]+,[A-Z.]+->[A-Z.]+', stack.rpartition('/')[2])
    return f'{name} {letters[0]}' if letters and name == 'dot_general' else name


def _bytes(aval) -> int:
    dtype = getattr(aval, 'dtype', None)
    return math.prod(getattr(aval, 'shape', ())) * (getattr(dtype, 'itemsize', 0) or 0)


def _flops(eqn) -> int:
    """As XLA counts: 2 for each multiply-add of a product, 1 for each element of the others."""
    name = eqn.primitive.name
    out = math.prod(getattr(eqn.outvars[0].aval, 'shape', ()))
    if name == 'dot_general':
        (contracted, _), _ = eqn.params['dimension_numbers']
        left = eqn.invars[0].aval.shape
        return 2 * out * math.prod(left[axis] for axis in contracted)
    if name in NO_FLOPS or name in OPAQUE:
        return 0
    if name.startswith(('reduce_', 'arg')):
        return math.prod(eqn.invars[0].aval.shape) - out
    if name.startswith('scatter'):
        return math.prod(eqn.invars[2].aval.shape)
    if name == 'integer_pow':
        return out * max(1, abs(eqn.params['y']).bit_length() - 1 + (eqn.params['y'] < 0))
    return out
