"""A decoder of the LLaMA class: the mean over the tokens of its last layer, padding left out (f_LLaMA of Eq. 3).

The paper does not say which model or pooling; 4096 is the width of LLaMA-2-7B and LLaMA-3-8B. Runs in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from marsjax.features.hub import check_width, find_model, need_transformers, place
from marsjax.features.signature import Encoded, Encoder, Options

MAX_TOKENS = 512
BATCH = 64  # texts that are sorted by length together
ROWS = 8  # texts that run through the model together


def make_llama(options: Options, texts: Sequence[str]) -> Encoder:
    """Loads a decoder and its tokenizer from a folder or the hub; any that `AutoModel` knows and that has safetensors.

    Raises:
        ImportError: PyTorch or transformers is missing.
        ValueError: no model, weights that are not safetensors, or another width than expected.
    """
    torch, transformers = need_transformers("llama")
    found = find_model("llama", options.model, options.revision)
    device, dtype = place(torch)
    config = transformers.AutoConfig.from_pretrained(found.folder)
    check_width("llama", config.hidden_size, options.expected_width)
    model = transformers.AutoModel.from_pretrained(found.folder, dtype=dtype, use_safetensors=True).eval().to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.folder)
    tokenizer.padding_side = "right"
    length = min(options.max_tokens or MAX_TOKENS, config.max_position_embeddings)

    def encode(batch: Sequence[str]) -> Encoded:
        whole = tokenizer(list(batch), verbose=False)["input_ids"]
        ids = [tokens[:length] for tokens in whole]
        row_BF = np.full((len(batch), config.hidden_size), np.nan, np.float32)  # NaN: a text without a token
        order = sorted((row for row in range(len(batch)) if ids[row]), key=lambda row: len(ids[row]))
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            real_RL = torch.zeros((len(chosen), len(ids[chosen[-1]])), dtype=torch.long)
            token_RL = torch.zeros_like(real_RL)  # what stands where padding is has no influence
            for row, number in enumerate(chosen):
                token_RL[row, : len(ids[number])] = torch.tensor(ids[number])
                real_RL[row, : len(ids[number])] = 1
            with torch.inference_mode():
                hidden = model(input_ids=token_RL.to(device), attention_mask=real_RL.to(device)).last_hidden_state
                weight = real_RL.to(device)[..., None].float()
                mean_RF = (hidden.float() * weight).sum(1) / weight.sum(1)
            row_BF[chosen] = mean_RF.cpu().numpy()
        return Encoded(row_BF, np.array([len(tokens) > length for tokens in whole]))

    facts = {
        "encoder": "llama",
        "model": config.model_type,
        "revision": found.revision,
        "weights_sha256": found.sha256,
        "settings_sha256": found.settings_sha256,
        "pooling": "mean over the tokens of the last layer, padding left out",
        "normalisation": "none",
        "max_tokens": length,
        "computed_in": str(dtype).removeprefix("torch."),
    }
    return Encoder(config.hidden_size, options.batch or BATCH, facts, encode)
