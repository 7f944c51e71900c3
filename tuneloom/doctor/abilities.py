"""What works here and what does not, each with the reason and with what would change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuneloom.doctor.packages import how_to_install, installed_version

if TYPE_CHECKING:
    import torch

    from tuneloom.doctor.hub import Hub


@dataclass(frozen=True)
class Ability:
    """Something that works here, or does not.

    Attributes:
        what: in a word or two.
        works: whether it does.
        why: the reason.
        mend: what to do where it does not, None where nothing helps or nothing is wrong.
    """

    what: str
    works: bool
    why: str
    mend: str | None = None


def examine_abilities(hub: Hub, torch_fault: str | None) -> list[Ability]:
    """Try each of them for real where that takes no time.

    Args:
        hub: as `examine_hub` found it.
        torch_fault: why torch does not load, None where it does.
    """
    found = (
        [_needs_torch(what, torch_fault) for what in ("bf16 products", "4bit base", "8bit base")] if torch_fault else _engine()
    )
    return [
        *found,
        _parquet(),
        _hub_models(hub),
        _hub_sets(hub),
        _installed("ModelScope", "modelscope"),
    ]


def _engine() -> list[Ability]:
    from tuneloom.models.load import pick_device

    device = pick_device()
    return [_bf16(device), _quantised("4bit", device), _quantised("8bit", device)]


def _needs_torch(what: str, fault: str) -> Ability:
    return Ability(what, False, f"torch does not load: {fault}", how_to_install("torch"))


def _bf16(device: torch.device) -> Ability:
    """bf16 works where it is what `precision: auto` would choose."""
    from tuneloom.models.precision import choose_precision

    chosen = choose_precision("auto", device)
    mend = None if chosen.name == "bf16" else f"nothing to do: precision auto takes {chosen.name}"
    return Ability("bf16 products", chosen.name == "bf16", chosen.why, mend)


def _quantised(bits: str, device: torch.device) -> Ability:
    """Quantise a layer of 64 by 64 and put something through it."""
    what, install = f"{bits} base", how_to_install("bitsandbytes")
    version = installed_version("bitsandbytes")
    if version is None:
        return Ability(what, False, "bitsandbytes is not installed", install)
    import torch

    try:
        import bitsandbytes

        layer: Any = (
            bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
            if bits == "4bit"
            else bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        )
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        whole = bool(torch.isfinite(layer.to(device)(torch.ones(2, 64, dtype=dtype, device=device))).all())
    except Exception as error:  # whatever a broken or unsuited build raises is the answer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        return Ability(what, False, f"bitsandbytes {version} fails on {device.type}: {reason}", f"{install} --upgrade")
    return Ability(what, whole, f"bitsandbytes {version} {'did' if whole else 'did not do'} a product on {device.type}")


def _parquet() -> Ability:
    try:
        from tuneloom.data.read import SUFFIXES
    except ImportError as error:
        return Ability("parquet files", False, str(error), how_to_install("tuneloom"))
    if ".parquet" not in SUFFIXES:
        return Ability("parquet files", False, f"this version reads {', '.join(SUFFIXES)}", "save the rows as .jsonl")
    return _installed("parquet files", "pyarrow")


def _hub_models(hub: Hub) -> Ability:
    return _from_hub("hub models", hub, "the embedded model needs no hub")


def _hub_sets(hub: Hub) -> Ability:
    """Sets of the hub need their client, and the hub."""
    client = _installed("hub datasets", "datasets")
    return (
        client
        if not client.works
        else _from_hub(client.what, hub, "files and the built-in sets need no hub", f"{client.why}; ")
    )


def _from_hub(what: str, hub: Hub, without: str, before: str = "") -> Ability:
    if hub.offline:
        why = f"{before}{hub.offline} is set; what is downloaded already still loads"
        return Ability(what, False, why, f"unset {hub.offline}")
    if hub.reachable:
        return Ability(what, True, f"{before}{hub.endpoint} {hub.why}")
    mend = f"check the network, or set HF_ENDPOINT to a mirror; {without}"
    return Ability(what, False, f"{before}{hub.endpoint}: {hub.why}", mend)


def _installed(what: str, package: str) -> Ability:
    version = installed_version(package)
    if version is None:
        return Ability(what, False, f"{package} is not installed", how_to_install(package))
    return Ability(what, True, f"{package} {version}")
