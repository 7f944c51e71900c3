"""Whether a model takes samples end to end, proved on the model itself before it is relied on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from tuneloom.data.plan import pack
from tuneloom.models.forward import PACKED, supervised_logits, use_attention
from tuneloom.types import MicroBatch, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX_TOKENS, _OWN_TOKENS = 20, 12


def takes_packed(model: PreTrainedModel, path: str = PACKED) -> bool:
    """Whether a model takes samples end to end on a path: tried on two that share a prefix, against each of them alone.

    Another second sample must leave the first one's loss as it is, bit for bit, and the losses must be those of
    the samples alone; what a family does between its tokens besides attention would show. The model is left as it was.
    """
    if not getattr(model, "_supports_attention_backend", False) or _drops_attention(model):
        return False
    before, training = str(model.config._attn_implementation), model.training
    prefix = _tokens(model, 0, _PREFIX_TOKENS)
    ends = [_tokens(model, _PREFIX_TOKENS + number * _OWN_TOKENS, _OWN_TOKENS) for number in range(3)]
    first, second, other = (_sample(prefix, end) for end in ends)
    model.eval()
    _as_in_training(model)
    try:
        with torch.inference_mode():
            alone = [_losses(model, pack([sample])) for sample in (first, second)]
            use_attention(model, path)
            packed = _losses(model, pack([first, second], share=True))
            changed = _losses(model, pack([first, other], share=True))
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.set_attn_implementation(before)
        model.train(training)
    own = len(alone[0])
    near = torch.allclose(packed, torch.cat(alone), rtol=0.05, atol=0.05)
    return near and torch.equal(packed[:own], changed[:own]) and not torch.equal(packed[own:], changed[own:])


def _drops_attention(model: PreTrainedModel) -> bool:
    """Whether attention has a dropout of its own in training, as modules of families note it."""
    noted = [getattr(module, name, 0) for module in model.modules() for name in ("attention_dropout", "attn_dropout")]
    return any((each.p if isinstance(each, nn.Dropout) else each) > 0 for each in noted)


def _as_in_training(model: PreTrainedModel) -> None:
    """Have 8-bit layers compute as in training: on a CPU their inputs are whole then, else rounded by what lies beside them."""
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            module.train()


def _tokens(model: PreTrainedModel, first: int, count: int) -> NDArray[np.int32]:
    """Return token ids spread over the vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids: NDArray[np.int32] = ((np.arange(first, first + count) * 7919 + 13) % vocabulary).astype(np.int32)
    return ids


def _sample(prefix: NDArray[np.int32], end: NDArray[np.int32]) -> Sample:
    return Sample(np.concatenate([prefix, end]), np.arange(len(prefix) + len(end)) > len(prefix))


def _losses(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Return the loss of each supervised token."""
    logits_RV, labels_R = supervised_logits(model, batch)
    return F.cross_entropy(logits_RV.float(), labels_R, reduction="none")
