"""The published character-level run on TinyShakespeare: 6 layers of width 384, context 256."""

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
