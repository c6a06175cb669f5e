"""Makes tests/fixtures/tiny_gpt2: random weights as published, and transformers' results from them.

    pip install -e '.[parity]' && python tests/make_fixture.py

The folder has the layout of the published GPT-2: names without `transformer.`, causal masks as
buffers, no lm_head. `golden.safetensors` holds tokens (B, T), logits (B, T, V), the mean loss of
the next tokens, and its gradient by the name of each parameter.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import GPT2Config, GPT2LMHeadModel

FOLDER = Path(__file__).parent / 'fixtures' / 'tiny_gpt2'
SIZES = dict(n_layer=2, n_head=3, n_embd=24, n_positions=32, vocab_size=64)


def rough_gpt2(seed: int = 0, std: float = 0.1, **config) -> GPT2LMHeadModel:
    """A GPT-2 in which every weight matters: no bias is 0, no scale is 1.

    numpy draws the weights, so that they do not depend on a version of torch. The position
    embeddings are larger, so that generated text does not settle on one token.
    """
    model = GPT2LMHeadModel(
        GPT2Config(**{'bos_token_id': None, 'eos_token_id': None} | config)
    ).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale, wider = 'ln_' in name and name.endswith('weight'), 4 if 'wpe' in name else 1
            parameter.copy_(
                torch.from_numpy(np.float32(is_scale + rng.normal(0, wider * std, parameter.shape)))
            )
    return model


def logits_and_gradients(model: GPT2LMHeadModel, tokens_BT: np.ndarray):
    """Logits (B, T, V), the mean loss of tokens 1 to T - 1, and {name: its gradient}, in numpy."""
    tokens_BT = torch.from_numpy(np.int64(tokens_BT))
    model.zero_grad()
    logits_BTV = model(tokens_BT).logits
    loss = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()
    )
    loss.backward()
    gradients = {
        name.removeprefix('transformer.'): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
    }
    return logits_BTV.detach().numpy(), loss.detach().numpy(), gradients


def make(folder: Path) -> None:
    """Writes the fixture."""
    model = rough_gpt2(**SIZES)
    tokens_BT = np.random.default_rng(1).integers(0, SIZES['vocab_size'], (2, 20), np.int32)
    logits_BTV, loss, gradients = logits_and_gradients(model, tokens_BT)
    n = SIZES['n_positions']
    masks = {
        f'h.{i}.attn.bias': np.tril(np.ones((1, 1, n, n), np.float32))
        for i in range(SIZES['n_layer'])
    }
    weights = {
        name.removeprefix('transformer.'): parameter.detach().numpy()
        for name, parameter in model.named_parameters()
    }
    config = {
        'activation_function': 'gelu_new',
        'architectures': ['GPT2LMHeadModel'],
        'attn_pdrop': 0.1,
        'bos_token_id': 0,
        'embd_pdrop': 0.1,
        'eos_token_id': 0,
        'initializer_range': 0.02,
        'layer_norm_epsilon': 1e-05,
        'model_type': 'gpt2',
        'n_ctx': n,
        **SIZES,
        'resid_pdrop': 0.1,
        'summary_activation': None,
        'summary_first_dropout': 0.1,
        'summary_proj_to_labels': True,
        'summary_type': 'cls_index',
        'summary_use_proj': True,
        'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    save_file(weights | masks, folder / 'model.safetensors', metadata={'format': 'pt'})
    save_file(
        {'tokens': tokens_BT, 'logits': logits_BTV, 'loss': loss}
        | {
            f'gradient.{name}': np.ascontiguousarray(gradient)
            for name, gradient in gradients.items()
        },
        folder / 'golden.safetensors',
    )


if __name__ == '__main__':
    make(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
