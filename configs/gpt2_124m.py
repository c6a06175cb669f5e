r"""GPT-2 124M from random weights, on 10 billion tokens of web text that you bring.

    python scripts/train.py --config=configs/gpt2_124m.py --config.data.corpus='fineweb10B/*.bin'
    python scripts/train.py --config=configs/gpt2_124m.py --config.data.corpus=prepared/web \
        --config.mesh.data=8 --config.train.grad_accum_steps=5

The first command reads token files of llm.c or nanoGPT. The second reads, on 8 GPUs, a folder
made by scripts/prepare.py --tokenizer=gpt2. An update is 480 windows of 1,024 tokens (0.49
million), processed 12 windows at a time; if there is memory for more, lower
train.grad_accum_steps. On NVIDIA GPUs the fused kernels are taken.

Hardware: GPUs with 24 GiB or more. An H100 takes 23.5 ms for 12 windows (524,000 tokens/s) and
57.4 ms and 15 GB for 32 (571,000); two of them take 61.5 ms for 64 (1,066,000) with gradients
sent in bf16 (train.reduce_dtype).
Time and loss of the whole run: not measured. The schedule is the one of GPT-3's model of this size
(Brown et al. 2020, table 2.1 and appendix B).
"""

from gpt2_jax.config import default_config


def get_config():
    config = default_config()  # its model, beta2, weight decay and clipping are those of GPT-2 124M
    config.model.embd_pdrop = config.model.attn_pdrop = config.model.resid_pdrop = 0.0
    config.model.dtype = 'bfloat16'
    config.data.corpus = 'data/fineweb10B/*.bin'
    config.data.tokenizer = 'gpt2'
    config.train.steps = 20_000
    config.train.batch_size = 480
    config.train.grad_accum_steps = 40
    config.optim.learning_rate = 6e-4
    config.optim.end_learning_rate = 6e-5
    config.optim.warmup_steps = 700
    config.eval.every = 1000
    return config
