"""Shape flow: every operation of a step, in order: dimensions by name, bytes, parameters, FLOPs.

    flow = shape_flow(GPT2Config(vocab_size=65, n_layer=6), batch_size=8, seq_len=64)
    print(to_markdown(flow))

The operations are read off the traced program (its jaxpr), so they are what runs and cannot go
stale. Dimensions get their names from a second trace of the same step, in which every size is a
prime number of its own: 17 x 11 can only be T B.
"""

import html
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.architecture import GPT2Config, padded_vocab
from gpt2_jax.errors import UsageError
from gpt2_jax.lens.subject import run
from gpt2_jax.model.params import init_params

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

# A step is traced with these sizes to name its dimensions. The vocabulary and whatever is derived
# from it stay on their side of 1,024, where model/ops.py begins to pad.
PRIMES = {'B': 11, 'T': 17, 'H': 5, 'K': 7, 'F': 41, 'P': 23, 'A': 29, 'V': 61}
LARGE_V = 1031
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


class Flow(NamedTuple):
    """A traced step. `xla_flops` is XLA's own count: its flops and transcendentals."""

    operations: list[Operation]
    sizes: dict[str, int]
    n_params: int
    xla_flops: float | None

    @property
    def flops(self) -> int:
        """Of all operations."""
        return sum(operation.flops for operation in self.operations)


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

    params = jax.eval_shape(lambda: init_params(sizes.cfg, 0))
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
    seq_len = seq_len or cfg.n_positions
    real = Sizes(cfg, batch_size, seq_len, grad_accum_steps)
    function, arguments = make_step(real)
    traced = jax.jit(function).trace(*arguments)
    operations = _listed(traced.jaxpr, arguments)
    named, symbols = _trace_with_primes(real, make_step)
    if _forms(named) != _forms(operations):
        raise UsageError('the step has other operations at other sizes: dimensions cannot be named')
    operations = [
        operation._replace(dims=_names(other.shape, operation.shape, symbols))
        for operation, other in zip(operations, named, strict=True)
    ]
    cost = traced.lower().cost_analysis() or {}
    counted = [cost[key] for key in ('flops', 'transcendentals') if key in cost]
    return Flow(
        operations,
        _sizes(real),
        sum(operation.n_params for operation in operations),
        sum(counted) if counted else None,
    )


def _forms(operations: list[Operation]) -> list[tuple[str, int]]:
    return [(operation.name, len(operation.shape)) for operation in operations]


def _sizes(sizes: Sizes) -> dict[str, int]:
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


def _trace_with_primes(real: Sizes, make_step: MakeStep) -> tuple[list[Operation], dict[str, int]]:
    """The operations at sizes that are prime numbers, and the sizes by their letter."""
    sizes = _sizes(real)
    # A size of 1 stays 1: JAX leaves out what it would have to do to that axis.
    primes = {letter: prime if sizes.get(letter, 1) > 1 else 1 for letter, prime in PRIMES.items()}
    if sizes['V'] > 1024:
        primes['V'] = LARGE_V
    accum = primes['A']
    cfg = GPT2Config(
        **{
            **{name: getattr(real.cfg, name) for name in real.cfg.__dataclass_fields__},
            'vocab_size': primes['V'],
            'n_positions': primes['T'] if real.seq_len == real.cfg.n_positions else primes['P'],
            'n_embd': primes['H'] * primes['K'],
            'n_head': primes['H'],
            'n_inner': primes['F'],
        }
    )
    sizes = Sizes(cfg, primes['B'] * accum, primes['T'], accum)
    function, arguments = make_step(sizes)
    jaxpr = jax.jit(function).trace(*arguments).jaxpr
    symbols = _sizes(sizes)
    if cfg.n_positions == sizes.seq_len:
        del symbols['P']
    return _listed(jaxpr, arguments), symbols


def _listed(closed, arguments) -> list[Operation]:
    """The operations of a traced program."""
    labels = zip(closed.jaxpr.invars, _parameters(arguments), strict=True)
    return list(
        _Walk(closed.jaxpr).operations(closed.jaxpr, {v: label for v, label in labels if label})
    )


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
    order = list(MEANINGS)
    letters = sorted(letters, key=order.index)
    return ' '.join(([str(rest)] if rest > 1 else []) + letters)


def _parameters(arguments) -> list[tuple[str, int] | None]:
    """Name and size of each leaf of the arguments that is a parameter, None for the others."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        keys = [str(_key(part)) for part in path]
        is_parameter = keys[:2] == ['0', 'params']
        found.append(('/'.join(keys[2:]), math.prod(leaf.shape)) if is_parameter else None)
    return found


def _key(part):
    return next(getattr(part, name) for name in ('key', 'name', 'idx') if hasattr(part, name))


class _Walk:
    """Goes through a program in order, leaving out operations that no result depends on.

    It remembers which parameters were used, and whether the backward pass has begun.
    """

    def __init__(self, jaxpr):
        self.used = set()
        self.went_back = False
        self.live = set()
        self._mark_live(jaxpr, jaxpr.outvars)

    def _mark_live(self, jaxpr, results) -> None:
        """Marks the operations that the results depend on; XLA leaves the others out."""
        needed = {variable for variable in map(_variable, results) if variable is not None}
        for eqn in reversed(jaxpr.eqns):
            if not needed.intersection(eqn.outvars):
                continue
            self.live.add(id(eqn))
            needed.update(
                variable for variable in map(_variable, eqn.invars) if variable is not None
            )
            program = _inner_program(eqn)
            if program is None:
                continue
            inner = program.outvars
            if eqn.primitive.name != 'scan' and len(inner) == len(eqn.outvars):
                inner = [v for v, out in zip(inner, eqn.outvars, strict=True) if out in needed]
            self._mark_live(program, inner)

    def operations(
        self, jaxpr, labels: dict, outer: str = '', times: int = 1
    ) -> Iterator[Operation]:
        """The operations of a program, those of inner programs in their place.

        `labels` has the parameter, (name, size), that a variable holds or is a view of.
        """
        for eqn in jaxpr.eqns:
            if id(eqn) not in self.live:
                continue
            stack = '/'.join(filter(None, [outer, str(eqn.source_info.name_stack)]))
            given = [labels.get(v) if v in labels else None for v in map(_variable, eqn.invars)]
            program = _inner_program(eqn)
            if program is not None:
                offset = len(given) - len(program.invars)  # of a `cond`, which has an index first
                passed = zip(program.invars, given[max(offset, 0) :], strict=False)
                inner = {variable: label for variable, label in passed if label}
                loops = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
                yield from self.operations(program, inner, stack, times * loops)
                continue
            if eqn.primitive.name in VIEWS and given[0]:
                labels[eqn.outvars[0]] = given[0]
                given = []
            yield self._operation(eqn, stack, [label for label in given if label], times)

    def _operation(self, eqn, stack: str, given: list[tuple[str, int]], times: int) -> Operation:
        phase = self._phase(stack)
        labels, n_params = [], 0
        for name, size in given if phase == 'forward' else []:
            labels.append(f'{name} (tied)' if name in self.used else name)
            n_params += 0 if name in self.used else size
            self.used.add(name)
        result = eqn.outvars[0].aval
        return Operation(
            phase,
            _module(stack),
            _readable(eqn, stack),
            (),
            tuple(getattr(result, 'shape', ())),
            str(getattr(result, 'dtype', '')),
            times * sum(_bytes(variable.aval) for variable in eqn.outvars),
            ', '.join(labels),
            n_params,
            times * _flops(eqn),
            times,
        )

    def _phase(self, stack: str) -> str:
        """By JAX's marks: jvp(..) in the forward pass, transpose(..) in the backward pass."""
        if 'transpose(' in stack:
            self.went_back = True
            return 'backward'
        return 'update' if self.went_back and 'jvp(' not in stack else 'forward'


def _variable(x):
    """A variable of a program; None for a literal."""
    return None if hasattr(x, 'val') else x


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


# Showing a flow


# What the primitives of JAX are called elsewhere.
WORDS = {
    'add_any': 'add',
    'broadcast_in_dim': 'broadcast',
    'convert_element_type': 'cast',
    'dot_general': 'matmul',
    'integer_pow': 'power',
    'reduce_max': 'max',
    'reduce_sum': 'sum',
    'select_n': 'where',
}


class Section(NamedTuple):
    """Operations of one place in the model; `layers` consecutive blocks have the same ones."""

    phase: str
    title: str
    layers: int
    operations: list[Operation]

    def total(self, field: str) -> int:
        """The sum of 'flops', 'n_bytes' or 'n_params' over all layers."""
        return self.layers * sum(getattr(operation, field) for operation in self.operations)

    @property
    def heading(self) -> str:
        """'h_0 to h_3 (4 x 85 operations; sums of all 4)': what the totals are sums of."""
        n = len(self.operations)
        if self.layers > 1:
            return f'{self.title} ({self.layers} x {n} operations; sums of all {self.layers})'
        kinds = 'kinds of ' if self.phase == 'update' else ''
        return f'{self.title} ({n} {kinds}operation{"s" * (n > 1)})'


def sections(flow: Flow) -> list[Section]:
    """The operations by place, in order; blocks with the same operations become one section.

    The update is one section, with an operation for each kind in the place of the thousands it has.
    """
    found: list[tuple[str, str, list[Operation]]] = []
    for operation in flow.operations:
        if operation.phase == 'update':
            continue
        place = re.sub(r'^(h_\d+|[^.]+).*', r'\1', operation.module)
        if not found or found[-1][:2] != (operation.phase, place):
            found.append((operation.phase, place, []))
        found[-1][2].append(operation)
    folded: list[Section] = []
    first = last = ''
    for phase, place, operations in found:
        same = folded and place.startswith('h_') and folded[-1].phase == phase
        if same and _without_layer(operations) == _without_layer(folded[-1].operations):
            last, before = place, folded.pop()
            title = f'{first} to {last}'
            folded.append(before._replace(title=title, layers=before.layers + 1))
        else:
            first = place
            folded.append(Section(phase, place, 1, operations))
    update = [operation for operation in flow.operations if operation.phase == 'update']
    return folded + ([Section('update', 'optimizer', 1, _by_kind(update))] if update else [])


def _without_layer(operations: list[Operation]) -> list[Operation]:
    def strip(text: str) -> str:
        return re.sub(r'^h_\d+', '', text)

    return [
        operation._replace(module=strip(operation.module), parameter=strip(operation.parameter))
        for operation in operations
    ]


def _by_kind(operations: list[Operation]) -> list[Operation]:
    kinds: dict[str, list[Operation]] = {}
    for operation in operations:
        kinds.setdefault(operation.name, []).append(operation)
    return [
        Operation(
            'update',
            'step',
            f'{name} x {len(group)}',
            ('..',),
            (),
            group[0].dtype,
            sum(operation.n_bytes for operation in group),
            '',
            0,
            sum(operation.flops for operation in group),
            1,
        )
        for name, group in sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    ]


def to_json(flow: Flow) -> str:
    """Every operation, all layers, and the totals."""
    return json.dumps(
        {
            'sizes': flow.sizes,
            'parameters': flow.n_params,
            'flops': flow.flops,
            'xla_flops': flow.xla_flops,
            'operations': [operation._asdict() for operation in flow.operations],
        },
        indent=1,
    )


def short(n: float, unit: str = '') -> str:
    """'1.25 M', '804 k': three digits and a prefix."""
    for size, prefix in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if n >= size:
            return f'{n / size:.3g} {prefix}{unit}'
    return f'{n:.3g} {unit}'.strip()


def _share(n: int, total: int) -> str:
    return f'{n / total:.1%}' if n else ''


def _row(operation: Operation, flow: Flow) -> tuple[str, ...]:
    word, _, letters = operation.name.partition(' ')
    module = re.sub(r'^h_\d+\.?', '', operation.module)
    return (
        module,
        f'{WORDS.get(word, word)} {letters}'.strip(),
        f'({", ".join(operation.dims)})' if operation.dims else 'scalar',
        ' x '.join(map(str, operation.shape)),
        operation.dtype,
        short(operation.n_bytes, 'B') if operation.n_bytes else '',
        operation.parameter and f'{operation.parameter}: {operation.n_params:,}',
        short(operation.flops) if operation.flops else '',
        _share(operation.flops, flow.flops),
    )


COLUMNS = (
    'module',
    'operation',
    'result',
    'shape',
    'dtype',
    'bytes',
    'parameters',
    'FLOPs',
    'of FLOPs',
)


def _summary(flow: Flow) -> list[tuple[str, ...]]:
    rows = []
    for section in sections(flow):
        parameters, flops = section.total('n_params'), section.total('flops')
        rows.append(
            (
                section.phase,
                section.heading,
                f'{parameters:,}' if parameters else '',
                _share(parameters, flow.n_params),
                short(section.total('n_bytes'), 'B'),
                short(flops),
                _share(flops, flow.flops),
            )
        )
    return rows


SUMMARY_COLUMNS = (
    'phase',
    'place',
    'parameters',
    'of parameters',
    'bytes written',
    'FLOPs',
    'of FLOPs',
)
# Before the operations of a section of several layers.
ONE_LAYER = 'Each row is an operation of one layer, with the numbers of that layer alone.'


def heading(flow: Flow) -> str:
    """The totals in a sentence each."""
    phases = [
        f'{phase} {_share(flops, flow.flops)}'
        for phase in PHASES
        if (flops := sum(o.flops for o in flow.operations if o.phase == phase))
    ]
    text = (
        f'{flow.n_params:,} parameters; {short(flow.flops, "FLOPs")} a step ({", ".join(phases)}), '
        f'{len(flow.operations):,} operations.'
    )
    once = sum(operation.flops / operation.times for operation in flow.operations)
    if flow.xla_flops:
        text += f" XLA's own count is {short(flow.xla_flops, 'FLOPs')}"
        text += ', a loop counted once' if once < flow.flops else ''
        text += f'; this one differs from it by {once / flow.xla_flops - 1:+.2%}.'
    return text


def letters(flow: Flow) -> str:
    """'B = 8 rows of a (micro-)batch, ..'."""
    used = {
        part for operation in flow.operations for dim in operation.dims for part in dim.split(' ')
    }
    return ', '.join(
        f'{letter} = {size:,} {MEANINGS[letter]}'
        for letter, size in flow.sizes.items()
        if letter in used
    )


def to_markdown(flow: Flow) -> str:
    """Totals, a table of the places, and a table of the operations of each."""

    def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
        lines = ['| ' + ' | '.join(columns) + ' |', '|' + ' --- |' * len(tuple(columns))]
        return [*lines, *('| ' + ' | '.join(row) + ' |' for row in rows), '']

    lines = ['# Shape flow', '', heading(flow), '', letters(flow) + '.', '']
    lines += table(SUMMARY_COLUMNS, _summary(flow))
    for section in sections(flow):
        lines += [f'## {section.phase}: {section.heading}', '']
        lines += [ONE_LAYER, ''] if section.layers > 1 else []
        lines += table(COLUMNS, [_row(operation, flow) for operation in section.operations])
    return '\n'.join(lines)


def to_html(flow: Flow) -> str:
    """The same as a piece of HTML, the operations of each place folded away."""

    def cells(row: Iterable[str], tag: str) -> str:
        return ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)

    def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
        body = ''.join(f'<tr>{cells(row, "td")}</tr>' for row in rows)
        head = f'<thead><tr>{cells(columns, "th")}</tr></thead>'
        return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'

    parts = [f'<p>{heading(flow)}</p><p>{letters(flow)}.</p>']
    parts.append(table(SUMMARY_COLUMNS, _summary(flow)))
    for section in sections(flow):
        rows = [_row(operation, flow) for operation in section.operations]
        flops = section.total('flops')
        parts.append(
            f'<details><summary>{section.phase}: {section.heading} <small>'
            f'{short(flops, "FLOPs")}, {_share(flops, flow.flops) or "0%"}</small></summary>'
            f'{f"<p>{ONE_LAYER}</p>" if section.layers > 1 else ""}{table(COLUMNS, rows)}</details>'
        )
    return '\n'.join(parts)


def to_page(flow: Flow) -> str:
    """`to_html` as a file of its own."""
    style = (
        'body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}'
        'table{border-collapse:collapse;font-size:.9em}td,th{padding:3px 9px;text-align:left;'
        'border-bottom:1px solid #8884}.wide{overflow-x:auto}:root{color-scheme:light dark}'
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Shape flow</title>'
        f'<style>{style}</style><h1>Shape flow</h1>{to_html(flow)}</html>'
    )
