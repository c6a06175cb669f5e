"""A first run on a laptop, in minutes: 4 layers of width 128 on the characters of TinyShakespeare.

    python scripts/train.py --config=configs/quickstart.py

Hardware: 2 CPU cores. Time: 78 to 97 s. Validation loss, over the whole split: 1.761 nats on one
machine, 1.768 on another.

If neither the corpus nor a network is available, it trains on the English help texts inside
Python, and says so.
"""

from gpt2_jax.config import default_config


def get_config():
    config = default_config()
    config.model.n_layer = 4
    config.model.n_head = 4
    config.model.n_embd = 128
    config.model.n_positions = 64
    # Less than two passes over the text: the model cannot overfit, so it needs no dropout.
    config.model.embd_pdrop = config.model.attn_pdrop = config.model.resid_pdrop = 0.0
    config.model.bias = False
    config.data.fallback = 'python-topics'
    config.train.steps = 2800
    config.train.batch_size = 8
    config.train.probe = 1400
    config.optim.learning_rate = 4e-3  # a small model on a short budget learns best at a high rate
    config.optim.end_learning_rate = 1e-4
    config.optim.beta2 = 0.99  # few tokens a step: average the second moment over more steps
    config.eval.every = 700
    return config
