"""Words between ranks beside the data: what they agree on at the start, and who failed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fusedmoe.errors import OptionError, ParallelError, explain


def group_of(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup:
    """The process group of a mesh of one dimension, or of all ranks.

    Raises:
        OptionError: torch.distributed is not set up, the mesh has several dimensions, or it is something else.
    """
    if not dist.is_available() or not dist.is_initialized():
        do = "Call torch.distributed.init_process_group, or start with torchrun."
        raise OptionError(explain("torch.distributed", got="no process group", wanted="one", do=do))
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            do = "Take one dimension of it, mesh['ep'] for example."
            got = f"{group.ndim} dimensions {group.mesh_dim_names}"
            raise OptionError(explain("mesh", got=got, wanted="one dimension", do=do))
        return group.get_group()
    if group is None:
        whole = dist.group.WORLD
        assert whole is not None, "torch.distributed is initialised"
        return whole
    if not isinstance(group, ProcessGroup):
        wanted = "a ProcessGroup, a DeviceMesh of one dimension, or None for all ranks"
        raise OptionError(explain("group", got=type(group).__name__, wanted=wanted, do="Pass one."))
    return group


@contextlib.contextmanager
def said(doing: str) -> Iterator[None]:
    """What torch.distributed raises, a lost rank or a timeout, as an error of ours."""
    try:
        yield
    except ParallelError:
        raise
    except RuntimeError as cause:
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        wanted = "an answer of every rank within the timeout of the process group"
        do = "Look at the first rank that failed; the group cannot be used any more."
        raise ParallelError(explain(doing, got=first, wanted=wanted, do=do)) from cause


#: Groups of GPUs -> the gloo group of the same ranks; one for all layers.
_BESIDE: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup] = weakref.WeakKeyDictionary()


class Control:
    """Messages on the host, by the group itself where it takes tensors of the CPU, else by a gloo group beside it."""

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.group = group
        if "gloo" not in str(dist.get_backend_config(group)):
            if group not in _BESIDE:
                # It waits as long as the group itself would.
                options = getattr(group._get_backend(torch.device("cuda")), "options", None)
                timeout, members = getattr(options, "_timeout", None), dist.get_process_group_ranks(group)
                _BESIDE[group] = dist.new_group(members, timeout, "gloo", use_local_synchronization=True)
            self.group = _BESIDE[group]

    def gather(self, value: Any) -> list[Any]:
        """A value of every rank."""
        values: list[Any] = [None] * self.ranks
        with said("words between ranks"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, error: BaseException | None, doing: str) -> None:
        """Go on where no rank failed; a collective of a few bytes.

        Raises:
            ParallelError: another rank failed; the message has its own.
            The error itself, where this rank failed.
        """
        failed = torch.tensor([error is not None], dtype=torch.int32)
        with self.unless(error), said(doing):
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self.group)
        if failed.item():
            self.tell(error, doing)

    def tell(self, error: BaseException | None, doing: str) -> None:
        """Every rank knows that one failed: say which and why, and raise; a collective."""
        with self.unless(error):
            words = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        rank, word = next((rank, word) for rank, word in enumerate(words) if word is not None)
        wanted, do = "every rank to succeed", "Mend that rank; this one's part was not computed."
        raise ParallelError(explain(f"{doing} on rank {rank}", got=word, wanted=wanted, do=do))

    @contextlib.contextmanager
    def unless(self, error: BaseException | None) -> Iterator[None]:
        """An error of this rank's own comes before one of its messages."""
        try:
            yield
        except ParallelError:
            if error is not None:
                raise error from None
            raise
