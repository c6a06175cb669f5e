"""Names and addresses of activations: what can be looked at, and how it is written down.

An address is a name of model/gpt2.py's `tap` with up to two further parts:

    h_3.resid_pre        the residual stream that enters block 3, (B, T, D)
    h_3.attn.2           head 2 of block 3: its output z, (B, T, K), before the output projection
    h_3.pattern.2        the attention pattern of that head, (B, T, S)
    h_3.mlp.17           neuron 17 of block 3: after the activation function, (B, T)
    h_3.attn, h_3.mlp    what attention and the MLP of block 3 add to the residual stream, (B, T, D)
    h_3.resid_pre@5      at position 5; @4:8 at positions 4 to 7; @-1 at the last one

`*` stands for any layer, name, unit or position: `h_*.attn.*` is every head, `h_2.*` all of block
2. A name without its block means every block: `pattern` is `h_*.pattern`.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.errors import UsageError

# The activations of a block in the order of the forward pass, and the letters of their axes: B
# batch, T position (the query), S key position, D width, H heads, K head width, F feed-forward, V
# vocabulary.
BLOCK_AXES = {
    'resid_pre': 'BTD',
    'ln_1': 'BTD',
    'q': 'BTHK',
    'k': 'BTHK',
    'v': 'BTHK',
    'attn_scores': 'BHTS',
    'pattern': 'BHTS',
    'z': 'BTHK',
    'attn_out': 'BTD',
    'resid_mid': 'BTD',
    'ln_2': 'BTD',
    'mlp_pre': 'BTF',
    'mlp_post': 'BTF',
    'mlp_out': 'BTD',
    'resid_post': 'BTD',
}
FIRST_AXES = {'embed': 'BTD', 'pos_embed': 'TD'}
LAST_AXES = {'ln_f': 'BTD', 'logits': 'BTV'}
AXES = FIRST_AXES | BLOCK_AXES | LAST_AXES

# What 'attn' and 'mlp' mean in an address, without and with a unit.
PARTS = {'attn': ('attn_out', 'z'), 'mlp': ('mlp_out', 'mlp_post')}

_ADDRESS = re.compile(r'(?:(h_[\d*?]+)\.)?([\w*?]+)(?:\.(\d+|\*))?(?:@(\*|-?\d+|-?\d*:-?\d*))?')


class Site(NamedTuple):
    """One activation or a part of it. `unit` is a head, a neuron or a channel; `positions` a slice.

    A unit or a single position, an int, takes its axis away; a slice and None keep it.
    """

    address: str
    name: str
    unit: int | None = None
    positions: int | slice | None = None

    @property
    def axes(self) -> str:
        """The letters of the axes of the whole activation."""
        return axes_of(self.name)

    def index(self) -> tuple:
        """What to index the whole activation with."""
        chosen = {'T': self.positions, unit_axis(self.axes): self.unit}
        parts = [chosen.get(axis) for axis in self.axes]
        return tuple(slice(None) if part is None else part for part in parts)


def axes_of(name: str) -> str:
    """The letters of the axes of an activation: 'h_3.pattern' -> 'BHTS'."""
    return AXES[name.rpartition('.')[2]]


def unit_axis(axes: str) -> str:
    """The letter of the axis whose elements an address can name: H if there, else the last."""
    return 'H' if 'H' in axes else axes[-1]


def all_names(cfg: GPT2Config) -> list[str]:
    """Every activation of a model, in the order of the forward pass."""
    blocks = [f'h_{i}.{name}' for i in range(cfg.n_layer) for name in BLOCK_AXES]
    return [*FIRST_AXES, *blocks, *LAST_AXES]


def parse_head(address: str) -> tuple[int, int]:
    """'h_3.attn.2' -> (3, 2). Raises UsageError for anything else."""
    match = re.fullmatch(r'h_(\d+)\.attn\.(\d+)', address)
    if not match:
        raise UsageError(f'{address!r} is not a head: expected an address such as h_0.attn.2')
    return int(match[1]), int(match[2])


def axis_size(cfg: GPT2Config, axis: str, n_positions: int) -> int:
    """The length of the axis with that letter, for a text of `n_positions` tokens."""
    sizes = {'D': cfg.n_embd, 'H': cfg.n_head, 'K': cfg.head_dim, 'F': cfg.d_ff}
    sizes['V'] = cfg.vocab_size
    return sizes.get(axis, n_positions)


def as_patterns(names: str | Iterable[str]) -> list[str]:
    """One pattern or several as a list. Raises UsageError for anything but texts."""
    patterns = [names] if isinstance(names, str) or not isinstance(names, Iterable) else [*names]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UsageError(
                f'{pattern!r} is not the name of an activation: expected a text such as '
                'h_0.pattern, or a list of them'
            )
    return patterns


def expand(cfg: GPT2Config, patterns: str | Iterable[str], n_positions: int) -> list[Site]:
    """The sites that the patterns name, each once, in the order of the forward pass.

    Raises UsageError for a pattern that names nothing in this model or this text.
    """
    sites = {}
    for pattern in as_patterns(patterns):
        found = list(_expand(cfg, pattern, n_positions))
        if not found:
            raise UsageError(
                f'no activation is called {pattern!r}: expected a name such as '
                f'{", ".join(FIRST_AXES)}, {", ".join(LAST_AXES)} or h_0.resid_pre, a head such as '
                f'h_0.attn.0 or a pattern; blocks are h_0 to h_{cfg.n_layer - 1}, their names '
                f'{", ".join(BLOCK_AXES)}'
            )
        sites |= {site.address: site for site in found}
    return list(sites.values())


def names_of(sites: Iterable[Site]) -> tuple[str, ...]:
    """The activations that the sites are in, each once."""
    return tuple(sorted({site.name for site in sites}))


def _expand(cfg: GPT2Config, pattern: str, n_positions: int) -> Iterator[Site]:
    match = _ADDRESS.fullmatch(pattern)
    if not match:
        return
    layer, base, unit, positions = match.groups()
    if base in PARTS:
        layer, written, base = layer or 'h_*', base, PARTS[base][unit is not None]
    else:
        written = None
    for name in all_names(cfg):
        block, _, last = name.rpartition('.')
        if not fnmatch.fnmatchcase(last, base):
            continue
        if layer is not None and not (block and fnmatch.fnmatchcase(block, layer)):
            continue
        whole = f'{block}.{written}' if written else name
        axis = unit_axis(axes_of(name))
        units = _units(pattern, unit, axis, axis_size(cfg, axis, n_positions))
        for one_unit in units:
            for where, at in _positions(pattern, positions, n_positions):
                address = whole if one_unit is None else f'{whole}.{one_unit}'
                yield Site(address + where, name, one_unit, at)


def _units(pattern: str, unit: str | None, axis: str, size: int) -> Iterable[int | None]:
    if unit is None:
        return [None]
    if unit == '*':
        return range(size)
    if int(unit) >= size:
        what = {'H': 'head', 'F': 'neuron', 'V': 'token'}.get(axis, 'channel')
        raise UsageError(
            f'{pattern!r}: there is no {what} {unit} among {size:,}; they are counted from 0'
        )
    return [int(unit)]


def _positions(pattern: str, positions: str | None, n_positions: int) -> list[tuple[str, object]]:
    """The positions that were asked for, each with the end of its address."""
    if positions is None:
        return [('', None)]
    if positions == '*':
        return [(f'@{t}', t) for t in range(n_positions)]
    if ':' in positions:
        ends = [int(end) if end else None for end in positions.split(':')]
        start, stop, _ = slice(*ends).indices(n_positions)
        if start >= stop:
            raise UsageError(f'{pattern!r} is empty: the text has {n_positions} tokens')
        return [(f'@{start}:{stop}', slice(start, stop))]
    t = int(positions)
    if not -n_positions <= t < n_positions:
        raise UsageError(f'{pattern!r}: the text has {n_positions} tokens, counted from 0')
    return [(f'@{t % n_positions}', t % n_positions)]
