"""Fine-tunes a published GPT-2 on TinyShakespeare in 24 updates of 32 x 1,024 tokens.

    python scripts/convert.py --from_hf=downloads/gpt2 --ckpt_dir=runs/gpt2
    python scripts/train.py --config=configs/finetune_shakespeare.py

The learning rate is small and constant. --config=configs/finetune_shakespeare.py:gpt2-medium starts
from runs/gpt2-medium; the other published sizes work in the same way. A shorter context,
--config.model.n_positions=512, crops the positions.

Hardware: one GPU. Time and loss: not measured.
"""

from gpt2_jax.architecture import PRESETS
from gpt2_jax.config import default_config


def get_config(size='gpt2'):
    config = default_config()
    config.model.update(PRESETS[size])
    config.model.dtype = 'bfloat16'
    config.data.tokenizer = 'gpt2'
    config.train.init_from = f'runs/{size}'
    config.train.steps = 24
    config.train.batch_size = 32
    config.train.grad_accum_steps = 8
    config.optim.learning_rate = config.optim.end_learning_rate = 3e-5
    config.optim.warmup_steps = 0
    config.eval.every = 6
    return config
