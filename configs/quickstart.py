"""A first run on a laptop: 4 layers of width 128 on TinyShakespeare, character by character."""

from gpt2_jax.config import default_config


def get_config():
    config = default_config()
    config.model.n_layer = 4
    config.model.n_head = 4
    config.model.n_embd = 128
    config.model.n_positions = 64
    config.model.embd_pdrop = config.model.attn_pdrop = config.model.resid_pdrop = 0.0
    config.data.fallback = 'python-topics'
    config.train.steps = 2000
    config.train.batch_size = 12
    config.optim.learning_rate = 6e-3
    config.optim.end_learning_rate = 1e-4
    config.optim.beta2 = 0.99
    config.eval.every = 500
    return config
