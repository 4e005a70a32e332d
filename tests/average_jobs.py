"""Jobs of ranks that use the averaged weights of a session; see rank_jobs.py."""

import time
from typing import Any

import torch
from torch import is_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_eso.parallel.optimizer import whole_weights
from megatron_eso.parallel.parameters import gather_full, shards
from megatron_eso.train.session import Session
from megatron_eso.train.step import train_step
from tests import rank_jobs


def used_and_put_back(overrides: list[str], fails: bool) -> dict[str, Any]:
    """Train two steps, put the averaged weights in place and back, and train two more steps.

    Returns:
        The weights and this rank's masters before, during and after the averaged weights; the averages,
        whole and in the weights' format; the bytes held during them; and the losses of the steps that
        follow (none if the block ``fails``).
    """
    session = rank_jobs.make_session(overrides)
    for _ in range(2):
        train_step(session, rank_jobs.read_rows)
    found: dict[str, Any] = {"losses": []}
    with whole_weights(session.chunks):
        found["before"] = _held(session)
        assert session.average is not None
        try:
            with _NewMemory() as new, session.average.applied(session.chunks):
                found["bytes kept"], found["within"] = new.bytes_held(), _held(session)
                found["averages"] = _averages(session)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            found["after"] = _held(session)
            return found
        found["after"] = _held(session)
    found["losses"] = [train_step(session, rank_jobs.read_rows).loss for _ in range(2)]
    return found


def _held(session: Session) -> dict[str, list[Any]]:
    parameters = [p for chunk in session.chunks for p in chunk.parameters()]
    masters = [shard.master for shard in shards(session.optimizer).values()]
    return {
        "weights": [rank_jobs._array(p.detach().float()) for p in parameters],
        "masters": [rank_jobs._array(master) for master in masters],
    }


def _averages(session: Session) -> list[Any]:
    """Return the whole average of each parameter, summed over the ranks that hold parts of it."""
    ranges, found = shards(session.optimizer), []
    assert session.average is not None
    for parameter in (p for chunk in session.chunks for p in chunk.parameters()):
        start = ranges[parameter].start if parameter in ranges else 0
        part = session.average.parts.get(parameter)
        whole = gather_full(parameter, start, part, session.layout.weights_group)
        found.append(rank_jobs._array(whole.to(parameter.dtype).float()))
    return found


class _NewMemory(TorchDispatchMode):
    """Records the memory that operators create."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(x).data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for x in tree_leaves(out):
            if is_tensor(x) and _storage(x).data_ptr() not in given:
                storage = _storage(x)
                self._made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes_held(self) -> int:
        """Return the bytes of the memory that was created and still exists.

        A gloo thread releases what it has summed a moment later, so the smallest of several looks counts.
        """
        looks = []
        for _ in range(20):
            looks.append(sum(size for made, size in self._made.values() if not made.expired()))
            time.sleep(0.01)
        return min(looks)


def _storage(x: torch.Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()
