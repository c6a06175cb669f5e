"""TinyShakespeare in GPT-2's own tokens: 6 layers of width 384, context 256, vocabulary 50,257.

    python scripts/train.py --config=configs/shakespeare_bpe.py

Hardware: one GPU. Time: 9.4 ms a step on an H100. The best checkpoint, at step 250, has
4.851 nats a token. A token here is 3.1 bytes, so compare it with a character model in bits per
byte: 2.262, and 2.010 for configs/shakespeare_fast.py. The text has only 301,966 training tokens,
as many as 18 steps read: from step 250 on the validation loss rises, to 5.590 at the end. Sample
from the best checkpoint.
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
