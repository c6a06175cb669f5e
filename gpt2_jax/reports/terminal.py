"""The essentials on a terminal: coloured tokens, the guess after each layer, a head as blocks.

Everything is printed through a rich Console: without colours (a pipe, NO_COLOR) the losses stand
beside the tokens, and weights are shown by the density of their characters.
"""

import numpy as np
from rich.console import Console
from rich.text import Text

from gpt2_jax.errors import UsageError
from gpt2_jax.foreign import escape
from gpt2_jax.lens.activations import capture
from gpt2_jax.lens.readings import default_targets, head_scores, logit_lens, repeated_half
from gpt2_jax.lens.subject import Subject, as_subject, as_tokens, token_text, token_texts
from gpt2_jax.terminal import counted

FULL_COLOUR = 5.0  # nats: a loss at which the colour no longer changes
TOP = 4
DENSITIES = ' .:-=+*#%@'
# From dark to light blue and from dark to light orange, in the 256 colours of terminals.
BLUES = (17, 18, 19, 25, 31, 38, 74, 117, 153, 195)
ORANGES = (None, 52, 94, 130, 166, 172, 208, 214)


class PipeConsole(Console):
    """A console that leaves a closed pipe to its caller: rich ends the process with code 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the BrokenPipeError."""
        raise


def show(
    source, text, console: Console, *, at: int = -1, head: tuple[int, int] | None = None
) -> None:
    """Prints a text with its losses, the guesses of each layer at one position, and one head.

    `at` is the position whose guess is followed, by default the last. `head` is (layer, head), by
    default the head that looks most at the token before. Raises as `capture`.
    """
    subject = as_subject(source)
    tokens_BT = as_tokens(subject, text, least=2)[:1]
    taken = capture(subject, tokens_BT, ['logits', 'pattern'])
    targets_T = default_targets(tokens_BT, taken['logits'])[0]
    logits_TV = taken['logits'][0]
    log_probs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    losses_T = -log_probs_TV[np.arange(len(targets_T)), targets_T]
    T = len(targets_T)
    if not -T <= at < T:
        raise UsageError(f'position {at}: the text has {T} tokens, counted from 0')
    L, H = subject.cfg.n_layer, subject.cfg.n_head
    if head is not None and not (0 <= head[0] < L and 0 <= head[1] < H):
        raise UsageError(
            f'there is no head h_{head[0]}.attn.{head[1]}: the model has {counted(L, "layers")} of '
            f'{counted(H, "heads")}, numbered from 0'
        )
    print_text(subject, tokens_BT[0], losses_T, console)
    print_layers(subject, tokens_BT, targets_T, at % T, console)
    head = print_scores(subject, head, console)
    if head is not None:
        print_head(taken[f'h_{head[0]}.pattern'][0, head[1]], head, console)


def in_colour(console: Console) -> bool:
    """Whether the console shows colours: a terminal, without NO_COLOR and TERM=dumb."""
    return console.color_system is not None and not console.no_color


def visible(text: str) -> str:
    """Text with ends of lines and tabs as signs."""
    return text.replace('\n', '⏎').replace('\t', '⇥').replace('\r', '␍')


def shown_token(subject: Subject, token) -> str:
    """A token in quotes."""
    return repr(visible(token_text(subject, int(token))))


def print_text(subject: Subject, tokens_T, losses_T, console: Console) -> None:
    """The text, each token on a background that tells its loss, and the largest losses."""
    line = Text()
    for t, shown in enumerate(token_texts(subject, tokens_T)):
        loss = losses_T[t - 1] if t else 0.0
        colour = ORANGES[min(int(loss / FULL_COLOUR * len(ORANGES)), len(ORANGES) - 1)]
        style = (
            '' if colour is None else f'{"black" if colour > 166 else "white"} on color({colour})'
        )
        line.append(escape(visible(shown)), style)
        if '\n' in shown:
            line.append('\n')
    console.print(line, soft_wrap=True)
    legend = Text('loss: ')
    if in_colour(console):
        legend = Text('loss 0 ')
        for colour in ORANGES[1:]:
            legend.append('  ', f'on color({colour})')
        legend.append(f' {FULL_COLOUR:.0f} nats; ')
    legend.append(f'mean {losses_T[:-1].mean():.3f}')
    console.print(legend)
    worst = np.argsort(-losses_T[:-1])[:5]
    surprising = ', '.join(
        f'{t + 1} {shown_token(subject, tokens_T[t + 1])} {losses_T[t]:.2f}' for t in worst
    )
    console.print(Text(f'largest losses: {surprising}'), soft_wrap=True)


def print_layers(subject: Subject, tokens_BT, targets_T, at: int, console: Console) -> None:
    """The likeliest tokens after each layer at one position, and the rank of the right one."""
    logits_LV = logit_lens(subject, tokens_BT[:, : at + 1])[:, 0, -1]
    target = targets_T[at]
    is_last = at == len(targets_T) - 1
    what = 'what comes next' if is_last else f'token {at + 1}'
    console.print(Text(f'\nguesses after each layer for {what}, {shown_token(subject, target)}:'))
    names = ['embed', *(f'h_{i}' for i in range(subject.cfg.n_layer))]
    for name, logits_V in zip(names, logits_LV, strict=True):
        probs_V = np.exp(logits_V - np.logaddexp.reduce(logits_V))
        line = Text(f'{name:>6}  ')
        for token in np.argsort(-probs_V)[:TOP]:
            shown = f'{shown_token(subject, token)} {probs_V[token]:.0%}'
            line.append(f'{shown:<14}', 'bold' if token == target else '')
        rank = int((probs_V > probs_V[target]).sum()) + 1
        line.append(f'rank {rank}')
        console.print(line, soft_wrap=True)


def print_scores(
    subject: Subject, head: tuple[int, int] | None, console: Console
) -> tuple[int, int] | None:
    """The strongest heads of each kind; returns the head to show."""
    cfg = subject.cfg
    if repeated_half(cfg) < 2:
        return None
    console.print(Text('\nheads, on random tokens repeated once:'))
    scores = head_scores(subject)
    for name, about in (
        ('previous', 'the token before'),
        ('duplicate', 'the same token, earlier'),
        ('induction', 'what followed the same token'),
    ):
        values_LH = getattr(scores, name)
        best = np.argsort(-values_LH, axis=None)[:3]
        line = ', '.join(
            f'h_{i // cfg.n_head}.attn.{i % cfg.n_head} {values_LH.flat[i]:.0%}' for i in best
        )
        console.print(Text(f'  look at {about + ":":<30}{line}'), soft_wrap=True)
    if head is None:
        return divmod(int(scores.previous.argmax()), cfg.n_head)
    return head


def print_head(pattern_TS, head: tuple[int, int], console: Console) -> None:
    """The pattern of a head: rows look, columns are looked at. Two rows share a line in colour."""
    step = -(-len(pattern_TS) // max(8, console.width - 4))
    T = -(-len(pattern_TS) // step)
    square = np.zeros((T * step, T * step))
    square[: len(pattern_TS), : len(pattern_TS)] = pattern_TS
    # The largest weight of each patch, so that a thin line stays.
    weights = square.reshape(T, step, T, step).max((1, 3))
    levels = np.sqrt(weights)
    each = '' if step == 1 else f', {step} x {step} positions a sign'
    signs = 'dark to light' if in_colour(console) else f'the signs "{DENSITIES}"'
    about = f'rows look at columns{each}; {signs}: weight 0 to 1, on a square-root scale'
    console.print(Text(f'\nh_{head[0]}.attn.{head[1]}: {about}'), soft_wrap=True)
    if not in_colour(console):
        for row in levels:
            signs = ''.join(
                DENSITIES[min(int(x * len(DENSITIES)), len(DENSITIES) - 1)] for x in row
            )
            console.print(Text(signs.rstrip()), soft_wrap=True)
        return
    colours = np.minimum((levels * len(BLUES)).astype(int), len(BLUES) - 1)
    for top in range(0, T, 2):
        line = Text()
        for column in range(T):
            upper = BLUES[colours[top, column]]
            lower = BLUES[colours[top + 1, column]] if top + 1 < T else 'default'
            below = lower if lower == 'default' else f'color({lower})'
            line.append('▀', f'color({upper}) on {below}')
        console.print(line, soft_wrap=True)
