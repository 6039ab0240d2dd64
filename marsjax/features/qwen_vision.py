"""The vision tower of Qwen2.5-VL: the mean over its merged patches (f_ViT of Eq. 3).

Bai et al., Qwen2.5-VL, 2025. The merger makes one vector of 2 x 2 patches, of width 3584 in the 7B model. Only the
tower is loaded, not the language model. Runs in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from marsjax.features.hub import check_width, find_model, need_transformers, place
from marsjax.features.signature import Encoded, Encoder, Options

BATCH = 8
MIN_PIXELS, MAX_PIXELS = (
    56 * 56,
    1280 * 28 * 28,
)  # images are resized to between; the model's own limit is 16 times more
# Names of the tower's weights in published checkpoints, of before and after transformers 4.52 -> in the tower alone.
PREFIXES = {r"^visual\.": "", r"^model\.visual\.": ""}


def make_qwen_vision(options: Options, images: Sequence[Any]) -> Encoder:
    """Loads the tower from a folder or the hub: of a whole Qwen2.5-VL, or saved on its own.

    Raises:
        ImportError: PyTorch or transformers is missing.
        ValueError: no model, another kind of model, weights that are missing, or another width than expected.
    """
    torch, transformers = need_transformers("qwen_vision")
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower

    found = find_model("qwen_vision", options.model, options.revision)
    device, dtype = place(torch)
    config = transformers.AutoConfig.from_pretrained(found.folder)
    config = getattr(config, "vision_config", config)
    if config.model_type not in ("qwen2_5_vl_vision", "qwen2_5_vl"):
        raise ValueError(f"{found.folder}: expected a Qwen2.5-VL or its vision tower, found a {config.model_type}")
    check_width("qwen_vision", config.out_hidden_size, options.expected_width)
    model, told = Tower.from_pretrained(
        found.folder, config=config, dtype=dtype, use_safetensors=True, key_mapping=PREFIXES, output_loading_info=True
    )
    if told["missing_keys"]:
        raise ValueError(
            f"{found.folder}: expected all weights of the vision tower, found none for "
            f"{', '.join(sorted(told['missing_keys'])[:3])}, ..."
        )
    model = model.eval().to(device)
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    )

    def encode(batch: Sequence[Any]) -> Encoded:
        row_BF = np.full((len(batch), config.out_hidden_size), np.nan, np.float32)
        for row, image in enumerate(batch):
            width, height = image.size
            if max(width, height) > 200 * min(width, height):  # what the processor refuses: stays NaN
                continue
            seen = processor(images=[image], return_tensors="pt")
            with torch.inference_mode():
                merged = model(seen["pixel_values"].to(device, dtype), grid_thw=seen["image_grid_thw"].to(device))
            row_BF[row] = merged.pooler_output.float().mean(dim=0).cpu().numpy()
        return Encoded(row_BF, np.zeros(len(batch), bool))

    facts = {
        "encoder": "qwen_vision",
        "revision": found.revision,
        "weights_sha256": found.sha256,
        "settings_sha256": found.settings_sha256,
        "pooling": f"mean over merged patches; images are resized to {MIN_PIXELS} to {MAX_PIXELS} pixels",
        "normalisation": "none",
        "computed_in": str(dtype).removeprefix("torch."),
    }
    return Encoder(config.out_hidden_size, options.batch or BATCH, facts, encode)
