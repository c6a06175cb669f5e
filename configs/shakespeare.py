"""The published character-level run on TinyShakespeare: 6 layers of width 384, context 256.

    python scripts/train.py --config=configs/shakespeare.py

Hardware: one GPU. Time: 4.0 ms a step on an H100, 43 s in all. Validation loss of the best
checkpoint, over the whole split: 1.449 and 1.457 nats on two H100s (seed 0), reached at step 2,000;
the remaining steps overfit, to 1.691 and 1.703.
"""

from gpt2_jax.config import default_config


def get_config():
    config = default_config()
    config.model.n_layer = 6
    config.model.n_head = 6
    config.model.n_embd = 384
    config.model.n_positions = 256
    config.model.embd_pdrop = config.model.attn_pdrop = config.model.resid_pdrop = 0.2
    config.model.bias = False
    config.model.dtype = 'bfloat16'
    config.train.steps = 5000
    config.train.batch_size = 64
    config.optim.learning_rate = 1e-3
    config.optim.end_learning_rate = 1e-4
    config.optim.beta2 = 0.99
    return config
