"""Whether a saved tree of arrays is the one that is wanted; if not, what differs, leaf by leaf."""

import orbax.checkpoint as ocp
from etils import epath

from gpt2_jax.errors import UserError
from gpt2_jax.parallel.partition import named_leaves
from gpt2_jax.terminal import counted

MAX_LINES = 12  # of a report

Leaves = dict[str, str]  # {'h_0/attn/c_attn/bias': '(3, 2, 16) float32', ..}


def leaves(tree) -> Leaves:
    """The shape and dtype of each leaf, by its path."""
    named = named_leaves(tree).items()
    return {name: f'{tuple(leaf.shape)} {leaf.dtype}' for name, leaf in named}


def saved_leaves(item: epath.Path) -> Leaves:
    """As `leaves`, for an item of a checkpoint, from its metadata: no array is read."""
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return leaves(handler.metadata(item).tree)
    finally:
        handler.close()


def differences(saved: Leaves, wanted: Leaves) -> list[str]:
    """A line for each leaf, or whole branch, that is missing on one side or differs."""
    lines = [
        f'{name} is {saved[name]} there, {wanted[name]} here'
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    for side, ours, theirs in (('here', wanted, saved), ('there', saved, wanted)):
        branches = [_missing_branch(name, theirs) for name in ours if name not in theirs]
        for branch in dict.fromkeys(branches):
            size = ours.get(branch) or counted(branches.count(branch), 'arrays')
            lines.append(f'{branch} is only {side} ({size})')
    return lines


def check(checkpoint: str, items: dict[str, tuple[Leaves, Leaves]]) -> None:
    """Raises UserError, with the differences, unless every (saved, wanted) of the items is equal.

    `checkpoint` is the name of the checkpoint in the error.
    """
    lines = [f'{item}/{line}' for item, pair in items.items() for line in differences(*pair)]
    if lines:
        if len(lines) > MAX_LINES:
            lines[MAX_LINES:] = [f'and {len(lines) - MAX_LINES} more differences']
        raise UserError(
            f'{checkpoint} holds other arrays than this configuration needs, and none was '
            'loaded:\n' + ';\n'.join(f'  {line}' for line in lines)
        )


def _missing_branch(name: str, others: Leaves) -> str:
    """The shortest beginning of a path under which the others have no leaf."""
    parts = name.split('/')
    for n in range(1, len(parts)):
        branch = '/'.join(parts[:n])
        if not any(other.startswith(f'{branch}/') or other == branch for other in others):
            return branch
    return name
