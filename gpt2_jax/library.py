"""A trained model in two lines of Python: load it, and use it.

m = gpt2_jax.load('runs/quickstart')
m.generate('ROMEO:')
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax import files
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError
from gpt2_jax.inference.sampling import TO_READ, Sampling, is_whole
from gpt2_jax.inference.streaming import continue_text
from gpt2_jax.lens import activations, subject
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.params import count_params
from gpt2_jax.terminal import counted


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Loaded:
    """A trained model with all that belongs to it. `params` are on the device.

    It equals itself alone: arrays have no single truth value.
    """

    path: Path
    step: int
    model: GPT2
    params: Any
    tokenizer: Tokenizer
    config: Any

    def __repr__(self) -> str:
        cfg, tokenizer = self.model.cfg, self.tokenizer
        layers, heads = counted(cfg.n_layer, 'layers'), counted(cfg.n_head, 'heads')
        return (
            f'<GPT-2 of {count_params(self.params):,} parameters: {layers}, {heads}, width '
            f'{cfg.n_embd}; {tokenizer.vocab_size:,} {tokenizer.name} tokens; step {self.step:,} '
            f'of {self.path}>'
        )

    def generate(
        self,
        prompt: str = '',
        *,
        max_new_tokens: int = 200,
        temperature: float = TO_READ.temperature,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The prompt and what the model writes after it; the same seed gives the same text.

        temperature 0 always takes the likeliest token. Past the context, the text continues from
        its last half. Raises UserError for a character that the tokenizer does not know, and
        UsageError for an argument with a value that is not allowed.
        """
        for name, value, right, expected in (
            ('prompt', prompt, isinstance(prompt, str), 'one text'),
            ('max_new_tokens', max_new_tokens, is_whole(max_new_tokens), 'a whole number from 0'),
            ('seed', seed, is_whole(seed) and seed < 2**32, 'a whole number from 0 to 2^32 - 1'),
        ):
            if not right:
                raise UsageError(f'{name} = {value!r:.80} is not allowed; expected {expected}')
        written = continue_text(
            self.model,
            self.params,
            self.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            seed=seed,
            sampling=Sampling(temperature, top_k, top_p),
        )
        return prompt + ''.join(written)

    def logits(self, text) -> np.ndarray:
        """The logits of the next token at every position: text or tokens (B, T) -> (B, T, V).

        Raises UserError for tokens outside the vocabulary, or more of them than the context.
        """
        return activations.capture(self, text, 'logits')['logits']


def load(path: str | Path, step: str | int = 'best') -> Loaded:
    """The model in the folder of a run or of converted weights.

    `step` is 'best', 'latest' or a number.

    Raises UserError if there is no such checkpoint, or it is damaged.
    """
    restored = subject.load(path, str(step))
    return Loaded(
        files.user_path(path),
        restored.step,
        GPT2(restored.model.cfg),
        jax.device_put(restored.params),
        restored.tokenizer,
        restored.config,
    )
