"""What flows through the house: rows become conversations, conversations become samples.

No torch here: these types are read by layers that must start without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100
"""Label of a token that is not supervised, as `torch.nn.functional.cross_entropy` has it."""

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


class TrainOn(StrEnum):
    """Which tokens of a conversation are supervised."""

    ASSISTANT = "assistant"
    """Every assistant message and the token that ends its turn."""
    LAST_ASSISTANT = "last_assistant"
    """The last assistant message only."""
    ALL = "all"
    """Every token but the first (which nothing predicts)."""


class Overflow(StrEnum):
    """What becomes of a conversation longer than the cutoff length."""

    CUT_AT_TURN = "cut_at_turn"
    """Keep the leading turns that fit whole, end token included."""
    DROP = "drop"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a row came from; prints as `file:line`."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant message calls.

    `arguments` is the JSON text of a map, so that a message is hashable; templates get the map.
    `id` ties a tool message to its call where the template writes it.
    """

    name: str
    arguments: str
    id: str | None = None

    def __str__(self) -> str:
        """Return `name({arguments})`, as a person is shown it."""
        return f"{self.name}({self.arguments})"

    def as_dict(self) -> dict[str, Any]:
        """Return the call as a chat template wants it."""
        call: dict[str, Any] = {
            "type": "function",
            "function": {"name": self.name, "arguments": json.loads(self.arguments)},
        }
        return call if self.id is None else call | {"id": self.id}


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `weight` 0 keeps an assistant message out of the loss.

    `tool_calls` are an assistant's; `name` and `tool_call_id` are a tool message's, where given.
    """

    role: Role
    content: str
    weight: int = 1
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the message as a chat template wants it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        extra = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in extra.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, an optional system message first."""

    messages: tuple[Message, ...]
    location: Location | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the messages as a chat template wants them."""
        return [message.as_dict() for message in self.messages]

    def turns(self) -> Iterator[int]:
        """Yield the index of each assistant message."""
        return (i for i, message in enumerate(self.messages) if message.role == "assistant")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it.

    `ids[t]` is token t; `mask[t]` says whether token t is supervised, i.e. whether the
    model's prediction of it, made at position t - 1, enters the loss. Equal lengths.
    """

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True, slots=True)
class Sample:
    """A rendered conversation, held compactly.

    ids_T: int32 token ids, mask_T: bool, True where supervised; T = number of tokens.
    """

    ids_T: NDArray[np.int32]
    mask_T: NDArray[np.bool_]
    location: Location | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""
        return len(self.ids_T)

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that enter the loss."""
        return int(self.mask_T.sum())


class Layout(StrEnum):
    """How samples lie in a micro-batch.

    Attributes:
        PADDED: they will be padded to one length; for models that cannot take them packed.
        PACKED: end to end.
        SHARED: end to end, what several begin with stored once.
    """

    PADDED = "padded"
    PACKED = "packed"
    SHARED = "shared"


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that follow each other in a sample and are stored once: rows `start` to `end` of a micro-batch.

    `parent` is the number of the segment before it, -1 where a sample begins. A segment that is the parent of
    several is a prefix that samples share.
    """

    start: int
    end: int
    parent: int = -1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that go through the model together, laid end to end without padding.

    ids_N, positions_N: int64, of each stored token, the position being the one in its sample;
    labels_N: token ids, shifted left by one so that row n holds the token predicted at n, IGNORE_INDEX where it is not
    supervised; segments: in the order of their rows, which they cover, depth first: those
    below a segment follow it without a gap;
    num_tokens: input tokens of the samples, shared prefixes counted for each.
    """

    ids_N: NDArray[np.int64]
    positions_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    segments: tuple[Segment, ...]
    num_tokens: int
    locations: tuple[Location | None, ...] = ()

    @property
    def num_rows(self) -> int:
        """Stored tokens: what the model computes."""
        return len(self.ids_N)

    @property
    def num_supervised_tokens(self) -> int:
        """Labelled rows."""
        return int((self.labels_N != IGNORE_INDEX).sum())


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The samples of one optimizer step, repacked into micro-batches."""

    micro_batches: tuple[MicroBatch, ...]
    num_samples: int
    num_tokens: int = field(init=False)
    num_rows: int = field(init=False)
    num_supervised_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tokens", sum(m.num_tokens for m in self.micro_batches))
        object.__setattr__(self, "num_rows", sum(m.num_rows for m in self.micro_batches))
        object.__setattr__(self, "num_supervised_tokens", sum(m.num_supervised_tokens for m in self.micro_batches))


def text_messages(pairs: Sequence[tuple[Role, str]]) -> tuple[Message, ...]:
    """Build messages from (role, content) pairs."""
    return tuple(Message(role, content) for role, content in pairs)
