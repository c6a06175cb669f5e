r"""Draws the pictures of the documentation from the folders of two runs, and from samples of one.

    pip install matplotlib
    python docs/make_figures.py --quickstart=runs/quickstart --overfit=runs/overfit \
        --samples=samples

The commands that make the two runs and the samples are in docs/what-to-expect.md. The pictures are
docs/img/*.svg: dark on a white card, so that they read on a light page and on a dark one, and in
colours that colour-blind readers can tell apart (Okabe and Ito 2008).
"""

import argparse
import collections
import json
import math
import re
from pathlib import Path

import matplotlib

matplotlib.use('svg')

import matplotlib.pyplot as plt
import numpy as np

from gpt2_jax import config
from gpt2_jax.data import load

BLUE, VERMILION, GREY = '#0072b2', '#d55e00', '#767676'
IMAGES = Path(__file__).parent / 'img'
TEMPERATURES = ('0.5', '0.8', '1.0', '1.2')
SMOOTHING = 0.1  # added to every count, so that no character has probability 0

plt.rcParams.update(
    {
        'svg.fonttype': 'none',  # text stays text: small files, and readable by screen readers
        'svg.hashsalt': 'gpt2_jax',
        'font.family': ['DejaVu Sans', 'sans-serif'],
        'font.size': 10,
        'axes.spines.top': False,
        'axes.spines.right': False,
    }
)


def records(run: Path, split: str) -> list[dict]:
    """The records of one split ('train' or 'val') in a run's metrics.jsonl."""
    lines = (run / 'metrics.jsonl').read_text('utf-8').splitlines()
    return [record for record in map(json.loads, lines) if record['split'] == split]


def curve(run: Path, split: str, key: str = 'loss') -> tuple[np.ndarray, np.ndarray]:
    """Steps and figures, each (number of records,)."""
    found = records(run, split)
    return np.array([r['step'] for r in found]), np.array([r[key] for r in found])


def smooth(losses: np.ndarray, reach: int = 8) -> np.ndarray:
    """The mean of each loss and of `reach` losses on either side; of fewer at the beginning."""
    around = [(i, min(i, reach)) for i in range(len(losses))]
    return np.array([losses[i - near : i + near + 1].mean() for i, near in around])


def samples(run: Path) -> dict[int, str]:
    """The text that a run wrote at each evaluation, from its samples.txt."""
    text = (run / 'samples.txt').read_text('utf-8')
    _, *parts = re.split(r'^=== step (\d+) ===\n', text, flags=re.MULTILINE)
    return dict(zip(map(int, parts[::2]), parts[1::2], strict=True))


def texts(run: Path) -> tuple[str, str]:
    """The training and the validation text of a run."""
    setting = config.from_json((run / 'config.json').read_text('utf-8'))
    dataset = load.load_dataset(**setting.data)
    splits = (dataset.train, dataset.val)
    train, val = (dataset.tokenizer.decode(split.read(0, len(split))) for split in splits)
    return train, val


def count_loss(train: str, val: str, n: int, vocab_size: int) -> float:
    """Nats a character of predicting by counts: the n-th character, given the n - 1 before it."""

    def count(length):
        grams = (train[i : i + length] for i in range(len(train) - length + 1))
        return collections.Counter(grams)

    grams, contexts = count(n), count(n - 1)
    nats = 0.0
    for end in range(n, len(val) + 1):
        gram = val[end - n : end]
        p = (grams[gram] + SMOOTHING) / (contexts[gram[:-1]] + SMOOTHING * vocab_size)
        nats -= math.log(p)
    return nats / (len(val) - n + 1)


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z']+", text.lower())


def share_of_known(text: str, known: set[str]) -> float:
    """The share of the words of a text that are in `known`."""
    found = words(text)
    return sum(word in known for word in found) / len(found)


def share_copied(text: str, source: str, length: int = 12) -> float:
    """The share of characters that are part of `length` or more copied from `source`."""
    copied = np.zeros(len(text), bool)
    for i in range(len(text) - length + 1):
        if text[i : i + length] in source:
            copied[i : i + length] = True
    return float(copied.mean())


def save(figure: plt.Figure, name: str) -> None:
    """Writes docs/img/NAME.svg, the same bytes for the same figures."""
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f'{name}.svg', metadata={'Date': None}, facecolor='white')
    plt.close(figure)
    print(f'wrote {IMAGES / name}.svg')


def draw_quickstart(run: Path) -> None:
    """The loss of the quickstart run beside the text that it wrote early and late."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout='constrained')
    train, val = texts(run)
    vocab_size = len(set(train + val))
    steps, losses = curve(run, 'train')
    left.plot(steps, losses, color=BLUE, linewidth=0.6, alpha=0.35)
    left.plot(steps, smooth(losses), color=BLUE, linewidth=1.8)
    left.annotate('training', (130, 2.72), color=BLUE)
    last, end = steps[-1], dict(color=GREY, size=8, ha='right')
    steps, losses = curve(run, 'val')
    left.plot(steps, losses, 'o', color=VERMILION, markersize=6)
    left.annotate('validation', (steps[0] + 40, losses[0] + 0.06), color=VERMILION)
    references = {0: f'all {vocab_size} characters alike'}
    references |= {n: f'counts of {n} characters' for n in (1, 2, 3, 4)}
    for n, name in references.items():
        loss = count_loss(train, val, n, vocab_size) if n else math.log(vocab_size)
        label = f'{name}: {loss:.2f}'.replace('1 characters', 'single characters')
        left.axhline(loss, color=GREY, linewidth=0.7, linestyle=':')
        # The curve reaches the line of 4 characters: its label stands clear, on the left.
        at = (last, loss + 0.03) if n < 4 else (1040, loss - 0.12)
        left.annotate(label, at, **end)
        print(label)
    left.set(xlabel='step', ylabel='loss, nats a character', xlim=(0, None), ylim=(1.4, 4.4))

    written = samples(run)
    right.axis('off')
    blocks = []
    for step in (min(written), max(written)):
        text = '\n'.join(line[:58] for line in written[step].strip().splitlines()[:9])
        blocks.append(f'step {step:,} writes\n\n{text}')
    for top, block in zip((1.0, 0.48), blocks, strict=True):
        head, _, body = block.partition('\n\n')
        right.text(0.04, top, head, va='top', color=BLUE, weight='bold', size=9)
        right.text(
            0.04, top - 0.065, body, va='top', size=7.5, family=['DejaVu Sans Mono', 'monospace']
        )
    save(figure, 'quickstart')


def draw_overfit(run: Path) -> None:
    """Training and validation loss that part, above the share of real words in the samples."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7, 5), layout='constrained', sharex=True, height_ratios=(2, 1)
    )
    steps, losses = curve(run, 'train')
    top.plot(steps, losses, color=BLUE, linewidth=0.6, alpha=0.35)
    top.plot(steps, smooth(losses), color=BLUE, linewidth=1.8)
    top.annotate('training', (1880, 1.0), color=BLUE)
    steps, losses = curve(run, 'val')
    top.plot(steps, losses, 'o-', color=VERMILION, linewidth=1.8, markersize=4)
    top.annotate('validation', (2020, 2.05), color=VERMILION)
    best = losses.argmin()
    for axes in (top, bottom):
        axes.axvline(steps[best], color=GREY, linewidth=0.8, linestyle=':')
    top.annotate(
        f'best checkpoint: step {steps[best]:,}, {losses[best]:.2f}',
        (steps[best] - 30, 3.2),
        color=GREY,
        ha='right',
    )
    top.annotate(f'last: {losses[-1]:.2f}', (steps[-1], losses[-1] + 0.13), color=GREY, ha='right')
    top.set(ylabel='loss, nats a character', xlim=(0, None), ylim=(0.7, 4.3))

    known = set(words(texts(run)[0]))
    written = samples(run)
    shares = [share_of_known(text, known) for text in written.values()]
    bottom.plot(list(written), shares, 's-', color='black', linewidth=1.2, markersize=4)
    bottom.set(
        xlabel='step',
        ylabel='known words',
        ylim=(0, 1),
        yticks=(0, 0.5, 1),
        yticklabels=('0 %', '50 %', '100 %'),
    )
    save(figure, 'overfit')


def draw_temperature(run: Path, folder: Path) -> None:
    """The share of real words by temperature, from FOLDER/quickstart-STEP-TEMPERATURE.txt."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout='constrained')
    train, val = texts(run)
    known = set(words(train))
    loss = dict(zip(*curve(run, 'val'), strict=True))
    temperatures = [float(t) for t in TEMPERATURES]
    steps = sorted({int(path.name.split('-')[1]) for path in folder.glob('quickstart-*-*.txt')})
    for step, color, mark in zip(steps, (VERMILION, BLUE), 'so', strict=True):
        shares = []
        for temperature in TEMPERATURES:
            text = (folder / f'quickstart-{step}-{temperature}.txt').read_text('utf-8')
            text = re.sub(r'^--- sample .* ---$', '', text, flags=re.MULTILINE)
            shares.append(share_of_known(text, known))
            print(f'step {step}, temperature {temperature}: {shares[-1]:.3f} known words')
        label = f'step {step:,}, validation loss {loss[step]:.2f}'
        axes.plot(temperatures, shares, f'{mark}-', color=color, label=label, linewidth=1.8)
    shakespeare = share_of_known(val, known)
    axes.axhline(shakespeare, color=GREY, linewidth=0.8, linestyle=':')
    axes.annotate('Shakespeare, validation text', (1.2, shakespeare + 0.01), ha='right', color=GREY)
    axes.set(xlabel='temperature', ylabel='known words', ylim=(0.45, 1), xticks=temperatures)
    axes.set(yticks=(0.5, 0.75, 1), yticklabels=('50 %', '75 %', '100 %'))
    axes.legend(frameon=False, loc='lower left')
    save(figure, 'temperature')


def print_copies(run: Path, folder: Path) -> None:
    """How much of FOLDER/overfit-STEP.txt is copied from the training text, and from another."""
    train, val = texts(run)
    for path in sorted(folder.glob('overfit-*.txt')):
        text = path.read_text('utf-8')
        copied = (share_copied(text, train), share_copied(text, val[: len(train)]))
        print(
            f'{path.name}: {share_of_known(text, set(words(train))):.3f} known words; copied from '
            f'training text {copied[0]:.3f}, from as much validation text {copied[1]:.3f}'
        )


def main() -> None:
    """All pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    for name in ('quickstart', 'overfit', 'samples'):
        parser.add_argument(f'--{name}', type=Path, required=True)
    flags = parser.parse_args()
    draw_quickstart(flags.quickstart)
    draw_overfit(flags.overfit)
    draw_temperature(flags.quickstart, flags.samples)
    print_copies(flags.overfit, flags.samples)


if __name__ == '__main__':
    main()
