"""The model of configs/shakespeare.py by fused GPU kernels, with a schedule that ends where the model is at its best.

    python scripts/train.py --config=configs/shakespeare_fast.py

Hardware: one NVIDIA GPU; on an H100 4.7 ms a step. Time and loss of the whole run: not measured yet. The published
schedule is laid out over 5,000 updates, and its model is at its best after 2,000 of them, at a learning rate that is
still high: here it falls to nearly nothing by then. To compare recipes without a look at the validation text:
--config.data.holdout=0.1.
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
    config.model.kernels = 'fused'
    config.train.steps = 2000
    config.train.batch_size = 64
    config.optim.implementation = 'fused'
    config.optim.learning_rate = 1.5e-3
    config.optim.end_learning_rate = 1e-5
    config.optim.weight_decay = 0.5
    config.optim.beta2 = 0.99
    config.eval.every = 200  # a save that takes longer than the steps between holds them up
    config.eval.sample_tokens = 0  # two more programs to compile, of no use to the loss
    return config
