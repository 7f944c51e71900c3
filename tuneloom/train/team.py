"""The processes that train one run together: started by torchrun, one a device, each a rank; a training alone is a team of one.

The ranks do the same in the same order, each on its share of a step's samples. What one of them measures or reads and all go
by is the first rank's; the first rank alone writes. Processes are joined by accelerate; words, numbers and signals travel over
gloo, beside whatever the devices use for tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from tuneloom.errors import GuardError, TuneloomError, UserError

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

_PATIENCE = timedelta(hours=12)
"""For a rank that writes answers or reads data; one that has died is noticed at once, by its closed connections."""
_LAST_PATIENCE = timedelta(seconds=20)
"""For the others when a rank has come to its end."""
_GONE = ("connection closed", "connection reset", "connection refused", "broken pipe", "socket", "peer", "remote process")


class Team:
    """This process among those that train a run.

    Attributes:
        rank: of this process, from 0.
        num_ranks: processes.
        local_ranks, local_rank: those on this machine, and this one's number among them.
    """

    def __init__(self) -> None:
        from accelerate import PartialState
        from torch import cuda, distributed

        together = int(os.environ.get("WORLD_SIZE", "1")) > 1
        state = PartialState(cpu=not cuda.is_available(), **({"timeout": _PATIENCE} if together else {}))
        self.rank: int = state.process_index
        self.num_ranks: int = state.num_processes
        self.local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if together else 1
        self.local_rank: int = state.local_process_index
        self._talk: Any = None
        self._end: Any = None
        if not self.alone:
            self._talk = distributed.new_group(backend="gloo", timeout=_PATIENCE)
            self._end = distributed.new_group(backend="gloo", timeout=_LAST_PATIENCE)

    @property
    def alone(self) -> bool:
        return self.num_ranks == 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def agreed(self, make: Callable[[], _T]) -> _T:
        """Return what the first rank makes; the others make nothing.

        Raises:
            TuneloomError: the first rank's, on all.
        """
        if self.alone:
            return make()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = make()
            except TuneloomError as error:
                told[1] = _parts(error)
                self._broadcast(told)
                raise
        self._broadcast(told)
        if told[1] is not None:
            raise _heard(told[1])
        made: _T = told[0]
        return made

    def gathered(self, value: _T) -> list[_T]:
        """Return every rank's value, in their order."""
        if self.alone:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.num_ranks
        with _noticed():
            distributed.all_gather_object(found, value, group=self._talk)
        return found

    def largest(self, value: float) -> float:
        """Return the largest of the ranks' values."""
        if self.alone:
            return value
        import torch
        from torch import distributed

        number = torch.tensor(value, dtype=torch.float64)
        with _noticed():
            distributed.all_reduce(number, distributed.ReduceOp.MAX, group=self._talk)
        return float(number)

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make each tensor the sum of the ranks' tensors, in place, bit for bit the same on all.

        Those of one format and device go in one message.
        """
        if self.alone:
            return
        import torch
        from torch import distributed

        kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for alike in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            with _noticed():
                distributed.all_reduce(flat)
            for tensor, summed in zip(alike, torch.split(flat, [tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def take_over(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make each tensor the first rank's, in place."""
        from torch import distributed

        for tensor in () if self.alone else tensors:
            with _noticed():
                distributed.broadcast(tensor.detach(), 0)

    def require_same(self, value: object, what: str, mend: str) -> None:
        """Require all ranks to have found the same.

        Args:
            value: this rank's.
            what: it is, for the message.
            mend: how it can be mended.

        Raises:
            UserError: on all of them, naming the first rank that differs.
        """
        found = self.gathered(value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise _once(
                    UserError(f"the processes have found different things: {what}", where=f"process {rank}", mend=mend), self
                )

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the block on one rank of each machine after the other."""
        for turn in range(int(self.largest(self.local_ranks))):
            if turn == self.local_rank:
                yield
            self.wait()

    def wait(self) -> None:
        """Wait for all ranks."""
        if not self.alone:
            self.largest(0.0)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """After the block, however it ends, wait for the other ranks to come there: none is to be ended while it saves.

        Not where the block fails by what nobody expected, or without the others.
        """
        try:
            yield
        except TuneloomError as error:
            if not isinstance(error, PeerLost):
                self._last_wait()
            raise
        self._last_wait()

    def _last_wait(self) -> None:
        if self.alone:
            return
        from torch import distributed

        with suppress(RuntimeError):
            distributed.barrier(group=self._end)
            distributed.destroy_process_group()

    def _broadcast(self, told: list[Any]) -> None:
        from torch import distributed

        with _noticed():
            distributed.broadcast_object_list(told, 0, group=self._talk)


@cache
def team() -> Team:
    """Return this process's team, joined at the first call."""
    return Team()


class PeerLost(GuardError):
    """Another process of the training has ended."""


def lost(error: RuntimeError) -> bool:
    """Whether an error says that another process has gone."""
    from torch import distributed

    told = str(error).lower()
    return isinstance(error, distributed.DistError) or any(word in told for word in _GONE)


def peer_lost() -> PeerLost:
    """Return the error that says so."""
    return PeerLost(
        "another process of this training has ended\n  mend:     see its message; the same torchrun with --resume goes on"
    )


@contextmanager
def _noticed() -> Iterator[None]:
    """Turn what a broken connection raises into our error.

    Raises:
        PeerLost: another process has gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not lost(error):
            raise
        raise peer_lost() from error


def _parts(error: TuneloomError) -> dict[str, Any]:
    """Return an error's class and what it holds: it does not travel as it is, being made from other arguments."""
    return {"class": type(error), "args": error.args, "state": vars(error)}


def _heard(parts: dict[str, Any]) -> TuneloomError:
    error: TuneloomError = parts["class"].__new__(parts["class"])
    error.args = parts["args"]
    vars(error).update(parts["state"])
    error.told_elsewhere = True
    return error


def _once(error: UserError, team: Team) -> UserError:
    error.told_elsewhere = not team.is_first
    return error
