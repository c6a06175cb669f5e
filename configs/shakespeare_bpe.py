"""TinyShakespeare in GPT-2's own tokens: 6 layers of width 384, context 256, vocabulary 50,257.

    python scripts/train.py --config=configs/shakespeare_bpe.py

Hardware: one GPU; 55 s on an H100, 17.5 ms a step. A token is 3.1 bytes here, so it is the bits per byte that compare
with a model of characters, not the loss: the best checkpoint, that of step 250, has 4.851 nats a token, 2.262 bits per
byte, and that of configs/shakespeare_fast.py 2.074. The text has only 301,966 training tokens, those of 18 steps: from
step 250 on the validation loss turns up, to 5.590 at the end, and the best checkpoint is the one to sample from.
"""

from gpt2_jax.config import default_config


def get_config():
    config = default_config()
    config.model.n_layer = 6
    config.model.n_head = 6
    config.model.n_embd = 384
    config.model.n_positions = 256
    config.model.embd_pdrop = config.model.attn_pdrop = config.model.resid_pdrop = 0.2
    config.model.dtype = 'bfloat16'
    config.data.tokenizer = 'gpt2'
    config.train.steps = 1000
    config.train.batch_size = 64
    config.optim.learning_rate = 1e-3
    config.optim.end_learning_rate = 1e-4
    config.optim.beta2 = 0.99
    config.eval.every = 50
    return config
