"""Load the original layout into a native GlmForCausalLM, a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.models.chatglm.config import PAD_ID, check_original, native_config
from tuneloom.models.chatglm.tokenizer import chat_stop_ids
from tuneloom.models.chatglm.weights import native_tensors
from tuneloom.models.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_original(folder: Path, dtype: torch.dtype, device: torch.device, quantization: Any = None) -> PreTrainedModel:
    """Load a ChatGLM2 or ChatGLM3 in its original layout.

    Memory at its highest is the weights in `dtype` and a few tensors; where they are quantised, the file's
    pages besides.

    Args:
        folder: a checked folder.
        dtype: of the weights; of the products where quantised.
        device: where to put it.
        quantization: transformers' quantisation config, None for none.

    Raises:
        UserError: torn or missing weights, tensors that do not fit the config.
    """
    from transformers import GenerationConfig, GlmForCausalLM

    file = folder / "config.json"
    original = json.loads(file.read_text(encoding="utf-8"))
    check_original(original, file)
    config = native_config(original)
    config.name_or_path = str(folder)
    if quantization is None:
        model = _streamed(folder, original, config, dtype, device)
    else:
        state = dict(native_tensors(folder, original))
        with quiet_transformers():
            model = GlmForCausalLM.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, quantization_config=quantization, device_map={"": device}
            )
    model.generation_config = GenerationConfig(eos_token_id=chat_stop_ids(folder), pad_token_id=PAD_ID)
    return model.requires_grad_(False).eval()


def _streamed(folder: Path, original: dict[str, Any], config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build the model without weights and give it one after another."""
    import torch
    from torch import nn
    from transformers import GlmForCausalLM

    config.dtype = dtype
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are computed, not stored
    for name, view in native_tensors(folder, original):
        module, _, kind = name.rpartition(".")
        weight = torch.empty(view.shape, dtype=dtype, device=device).copy_(view)
        setattr(model.get_submodule(module), kind, nn.Parameter(weight, requires_grad=False))
    return model
