"""From our adapter section to PEFT layers on a base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from tuneloom.config import AdapterConfig
from tuneloom.errors import UserError, nearest
from tuneloom.models.quiet import quiet_peft

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ALIASES: dict[str, tuple[tuple[str, ...], ...]] = {
    "query_key_value": (("q_proj", "k_proj", "v_proj"),),
    "dense": (("o_proj",),),
    "dense_h_to_4h": (("gate_up_proj",), ("gate_proj", "up_proj")),
    "dense_4h_to_h": (("down_proj",),),
    "word_embeddings": (("embed_tokens",),),
}
"""ChatGLM's own module names -> the native names that stand for them; the first set that exists is taken."""


def attach_adapter(model: PreTrainedModel, config: AdapterConfig, seed: int, base_name: str) -> PeftModel:
    """Put fresh LoRA layers on a base model; the base stays frozen.

    Scaling is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732); DoRA adds a learned
    magnitude a row (arXiv:2402.09353). Adapter weights are fp32 whatever the base's precision.

    Args:
        model: the loaded base.
        config: the adapter section.
        seed: of the start values of A.
        base_name: written to adapter_config.json as the base's name or path.

    Raises:
        UserError: a target that matches nothing, naming what exists.
    """
    import torch
    from peft import get_peft_model

    from tuneloom.adapters.fused import with_fused_layers

    lora = with_fused_layers(lora_config(model, config))
    torch.manual_seed(seed)
    with quiet_peft():
        try:
            attached = get_peft_model(model, lora)
        except ValueError as error:
            raise UserError(
                "the adapter does not fit the model",
                where="adapter",
                got=(str(error).splitlines() or ["?"])[0][:240],
                mend="target_modules: all-linear fits every model",
            ) from error
    attached.peft_config["default"].base_model_name_or_path = base_name
    return attached


def lora_config(model: PreTrainedModel, config: AdapterConfig) -> LoraConfig:
    """Return PEFT's config for a model, target names resolved."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=resolve_targets(model, config.target_modules),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,
        modules_to_save=checked_modules_to_save(model, config.modules_to_save) or None,
        bias=config.bias,
    )


def resolve_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Return module names for `all-linear`, `all-layers` or a list.

    Raises:
        UserError: a name that matches no module.
    """
    linear, embedding = target_names(model)
    if targets == "all-linear":
        return linear
    if targets == "all-layers":
        return [*linear, embedding]
    found: list[str] = []
    for target in targets:
        if module_paths(model, [target]):
            found.append(target)
            continue
        native = next(
            (names for names in ALIASES.get(target, ()) if all(name in linear or name == embedding for name in names)), None
        )
        if native is None:
            near = nearest(target, [*linear, embedding])
            raise UserError(
                f"target module `{target}` matches nothing in the model",
                where="adapter.target_modules",
                expected=f"of {', '.join([*linear, embedding])}; or all-linear, all-layers",
                mend=f"did you mean `{near}`?" if near else "take names from this list",
            )
        found += native
    return list(dict.fromkeys(found))


def target_names(model: PreTrainedModel) -> tuple[list[str], str]:
    """Return the last names of the model's linear layers (the head left out), and the embedding's."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    linear: dict[str, None] = {}
    embedding_name = ""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if module is embedding:
            embedding_name = name
        elif isinstance(module, nn.Linear) and module is not head:
            linear[name] = None
    return list(linear), embedding_name


def module_paths(model: nn.Module, names: Sequence[str]) -> frozenset[str]:
    """Return the paths of the modules that a list of names means to PEFT: a path, or the end of one."""
    ends = tuple(f".{name}" for name in names)
    return frozenset(path for path, _ in model.named_modules() if path and (path in names or path.endswith(ends)))


def checked_modules_to_save(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Return the names as they are.

    Raises:
        UserError: one that matches no module.
    """
    for name in names:
        if not module_paths(model, [name]):
            raise UserError(
                f"module to save `{name}` is not in the model",
                where="adapter.modules_to_save",
                expected=f"for example {', '.join(target_names(model)[0][:4])}",
            )
    return list(names)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameter counts; 4-bit weights count by their unpacked number."""
    trainable = whole = 0
    for parameter in model.parameters():
        count = parameter.numel()
        state = getattr(parameter, "quant_state", None)
        whole += int(state.shape.numel()) if state is not None else count
        trainable += count if parameter.requires_grad else 0
    return trainable, whole
