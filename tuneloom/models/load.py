"""Load base models and tokenizers on transformers' native classes; remote code is never on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.errors import UserError
from tuneloom.models.chatglm.config import is_original
from tuneloom.models.quiet import quiet_transformers
from tuneloom.models.source import read_model_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device: cuda where there is one, else cpu; or the one named.

    Raises:
        UserError: there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch asserts where it was built without the device
        raise UserError(
            "the device cannot be used",
            where="device",
            got=f"{name}: {(str(error).splitlines() or ['?'])[0][:160]}",
            expected="auto, cpu, cuda, or cuda:0",
        ) from error
    return device


def load_base_model(folder: Path, dtype: torch.dtype, device: torch.device, quantization: str = "none") -> PreTrainedModel:
    """Load a causal LM in `dtype` on `device`, weights frozen, in evaluation mode.

    Args:
        folder: a checked Hugging Face folder (see `resolve_model`).
        dtype: of the weights; of the products where quantised.
        device: where to put it.
        quantization: none, 4bit (nf4) or 8bit, by bitsandbytes.

    Raises:
        UserError: torn or missing weights, tensors that do not fit, bitsandbytes not installed.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if is_original(read_model_config(folder)):
        from tuneloom.models.chatglm.load import load_original

        how = None if quantization == "none" else _bitsandbytes(quantization, dtype)
        return _settled(load_original(folder, dtype, device, how))
    extra: dict[str, Any] = {}
    if quantization != "none":
        extra = {"quantization_config": _bitsandbytes(quantization, dtype), "device_map": {"": device}}
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told by name below; transformers' error names none
                **extra,
            )
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            "the model does not load",
            where=str(folder),
            got=(str(error).strip().splitlines() or [type(error).__name__])[0][:240],
            mend="copy or download the folder again; a weight file may be torn or missing",
        ) from error
    _require_whole(info, folder)
    model.requires_grad_(False)
    return _settled(model.eval()) if extra else model.to(device).eval()


def load_skeleton(folder: Path) -> PreTrainedModel:
    """Build a folder's model from its config.json, with shapes and without weights.

    Raises:
        UserError: transformers cannot build it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GlmForCausalLM

    from tuneloom.models.chatglm.config import native_config

    read = read_model_config(folder)
    try:
        with quiet_transformers(), torch.device("meta"):
            if is_original(read):
                return GlmForCausalLM(native_config(read))
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "no model can be built from config.json",
            where=str(folder / "config.json"),
            got=(str(error).strip().splitlines() or [type(error).__name__])[0][:240],
            mend="copy or download the model's config.json again",
        ) from error


def load_tokenizer_folder(folder: Path) -> PreTrainedTokenizerBase:
    """Load the folder's fast tokenizer; that of a ChatGLM in the original layout is built from its tokenizer.model.

    Raises:
        UserError: no tokenizer, or one without the fast form that gives offsets.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from tuneloom.models.chatglm.tokenizer import build_tokenizer, needs_building, read_config

    original = is_original(read_config(folder))
    if original and needs_building(folder):
        return build_tokenizer(folder)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        raise UserError("the folder has no tokenizer", where=str(folder), mend="copy the model's tokenizer files there too")
    try:
        with quiet_transformers():
            # An original config.json names remote code, which AutoTokenizer would ask to run.
            kind = PreTrainedTokenizerFast if original else AutoTokenizer
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(
            "the tokenizer does not load",
            where=str(folder),
            got=(str(error).strip().splitlines() or [type(error).__name__])[0][:240],
            mend="copy the model's tokenizer.json and tokenizer_config.json again",
        ) from error
    if not tokenizer.is_fast:
        raise UserError("the model has no fast tokenizer", where=str(folder), expected="a tokenizer.json")
    return tokenizer


def _require_whole(info: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that left weights at random values."""
    missing = sorted(info.get("missing_keys") or ())
    mismatched = sorted(str(item[0]) for item in info.get("mismatched_keys") or ())
    if missing or mismatched:
        names = [*missing, *mismatched]
        raise UserError(
            "the weights do not fit the config",
            where=str(folder),
            got=f"{len(missing)} tensors missing, {len(mismatched)} of another shape, e.g. {names[0]}",
            mend="config.json and the weights must come from the same model",
        )


def _bitsandbytes(quantization: str, dtype: torch.dtype) -> Any:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "quantization needs bitsandbytes", where="base_model.quantization", mend="pip install 'tuneloom[quant]'"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # in every pass it warns of a cast that it always does
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _settled(model: PreTrainedModel) -> PreTrainedModel:
    """Have bitsandbytes' layers, where there are any, let gradients through on a CPU and keep their scales under PEFT's DoRA.

    Where the processor has avx512_bf16, a 4-bit layer's first pass without gradients would pack its weights, for products that
    are bf16, want widths of 64, and stop gradients ever after, in training too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state"):
            module.register_forward_pre_hook(_keep_scales)
    return model


def _keep_scales(layer: Any, _: Any) -> None:
    """Leave an 8-bit layer's state as it is where PEFT's DoRA has set its weights anew, without their scales."""
    if layer.weight.SCB is None:
        layer.weight.CB = None
