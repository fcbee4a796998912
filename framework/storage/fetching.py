"""Brings offloaded weights to the device when they are used: forward, backward, sampling and caching alike.

One fetcher serves all components on a device. It holds the unit that is in use, the one that will be used next, and
as many others as it was told to keep. It knows nothing of models: units are asked for by the layers themselves, and
what comes next is what came next the last time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.storage.stores import Slot, Store, views
from framework.storage.use_order import UseOrder
from framework.storage.weights import StoredWeight


@dataclass(frozen=True)
class Parcel:
    """Bytes that are copied at once.   slots: layer name -> where its weight lies."""

    store: Store
    slots: Mapping[str, Slot]


class Unit:
    """Parcels that are fetched together.

    owner: name of the component.   ahead: whether it may be fetched before it is asked for.
    """

    def __init__(self, name: str, owner: str, parcels: Sequence[Parcel], *, ahead: bool) -> None:
        self.name = name
        self.owner = owner
        self.parcels = tuple(parcels)
        self.ahead = ahead
        self.num_bytes = sum(parcel.store.num_bytes for parcel in parcels)

    @property
    def reads_files(self) -> bool:
        """Whether fetching it waits for a disk."""
        return any(parcel.store.reads_files for parcel in self.parcels)


class LayerSource:
    """What a managed layer asks for its weight (`framework.storage.weights.OffloadedSource`)."""

    def __init__(self, fetcher: Fetcher, unit: Unit, layer: str) -> None:
        self.device = fetcher.device
        self._fetcher = fetcher
        self._unit = unit
        self._layer = layer

    def fetch(self) -> StoredWeight:
        """The weight on the device, with the rest of its unit."""
        return self._fetcher.fetch(self._unit)[self._layer]


@dataclass
class _Arrival:
    """A unit on its way.   wait: makes the current stream wait until it is there."""

    weights: dict[str, StoredWeight]
    wait: Callable[[], None]


class Fetcher:
    """Decides which units are on the device.

    Memory: the unit in use, the one fetched ahead, and at most `keep_bytes` of units that stay.
    fetched_bytes: copied to the device so far.
    """

    def __init__(
        self, device: torch.device, *, limit_bytes: int | None = None, rehearsal: bool = False
    ) -> None:
        """limit_bytes: of the device's memory; kept units are let go where all that is allocated would exceed it.

        rehearsal: allocate as always, but copy nothing and ask nothing of the device; for fake tensors.
        """
        self.device = device
        self._rehearsal = rehearsal
        self.keep_bytes = 0
        self.fetched_bytes = 0
        self._limit_bytes = limit_bytes
        self._order: UseOrder[Unit] = UseOrder()
        self._current: tuple[Unit, dict[str, StoredWeight]] | None = None
        self._next: tuple[Unit, _Arrival] | None = None
        self._kept: dict[Unit, dict[str, StoredWeight]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def fetch(self, unit: Unit) -> dict[str, StoredWeight]:
        """Layer name -> weight on the device. Another unit that isn't kept is let go."""
        if self._current is not None and self._current[0] is unit:
            return self._current[1]
        self._order.note(unit)
        self._current = None
        weights = self._kept.get(unit)
        if weights is None:
            weights = self._take(unit)
            if self._may_keep(unit):
                self._kept[unit] = weights
        self._current = (unit, weights)
        self._look_ahead()
        return weights

    def keep(self, num_bytes: int) -> None:
        """Let units that are used first stay on the device, up to so many bytes in all."""
        self.keep_bytes = num_bytes
        self._shrink()

    def release(self, owner: str | None = None) -> None:
        """Let go of what is on the device, of one component or of all."""
        if self._next is not None and owner in (None, self._next[0].owner):
            self._drop_next()
        if self._current is not None and owner in (None, self._current[0].owner):
            self._current = None
        for unit in [u for u in self._kept if owner in (None, u.owner)]:
            del self._kept[unit]

    def forget(self) -> None:
        """Forget the order of use, and with it the units of components that are gone."""
        self._order.restart()

    def close(self) -> None:
        """Let go of everything, and of the thread that reads files."""
        self.release()
        self.forget()
        if self._reader is not None:
            self._reader.shutdown()
            self._reader = None

    @property
    def held_bytes(self) -> int:
        """Bytes of weights that are on the device now, or on their way."""
        held = set(self._kept)
        held |= {pair[0] for pair in (self._current, self._next) if pair is not None}
        return sum(unit.num_bytes for unit in held)

    # ---- one unit --------------------------------------------------------------------------------

    def _take(self, unit: Unit) -> dict[str, StoredWeight]:
        """The unit that was fetched ahead if it is this one, else fetch it now."""
        if self._next is not None and self._next[0] is unit:
            arrival = self._next[1]
            self._next = None
        else:
            # A wrong guess goes first, so that two units are the most that is ever there.
            self._drop_next()
            arrival = self._begin(unit)
        arrival.wait()
        return arrival.weights

    def _drop_next(self) -> None:
        if self._next is not None:
            # Its memory may be given to others only once the copy is through.
            self._next[1].wait()
            self._next = None

    def _look_ahead(self) -> None:
        """Start fetching what will be used next, where that runs beside the arithmetic."""
        if self._next is not None:
            return
        unit = self._order.expected()
        if unit is None or not unit.ahead or unit in self._kept:
            return
        if self._current is not None and self._current[0] is unit:
            return
        if self.device.type == "cuda" or unit.reads_files:
            self._next = (unit, self._begin(unit))

    def _begin(self, unit: Unit) -> _Arrival:
        """Allocate on the current stream, so that the next user of the memory waits for it, and start copying."""
        self._make_room(unit)
        targets = [
            torch.empty(parcel.store.num_bytes, dtype=torch.uint8, device=self.device)
            for parcel in unit.parcels
        ]
        self.fetched_bytes += unit.num_bytes
        weights: dict[str, StoredWeight] = {}
        for parcel, target in zip(unit.parcels, targets, strict=True):
            weights |= views(target, parcel.slots)
        if self._rehearsal:
            return _Arrival(weights, _nothing)
        if unit.reads_files:
            return _Arrival(weights, self._read(unit, targets))
        if self.device.type == "cuda":
            return _Arrival(weights, self._copy_aside(unit, targets))
        for parcel, target in zip(unit.parcels, targets, strict=True):
            parcel.store.copy_to(target)
        return _Arrival(weights, _nothing)

    def _copy_aside(self, unit: Unit, targets: Sequence[Tensor]) -> Callable[[], None]:
        """Copy on a stream of its own; the returned function makes the then current stream wait for it."""
        stream = self._side_stream()
        # What was in this memory before must have been used.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for parcel, target in zip(unit.parcels, targets, strict=True):
                parcel.store.copy_to(target)
            done = torch.cuda.Event()
            done.record(stream)
        return lambda: torch.cuda.current_stream(self.device).wait_event(done)

    def _read(self, unit: Unit, targets: Sequence[Tensor]) -> Callable[[], None]:
        """Read files in another thread; the returned function waits for it and raises what it raised."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="octavo-reader")
        is_cuda = self.device.type == "cuda"
        stream = self._side_stream() if is_cuda else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))

        def work() -> None:
            # A view made under inference mode may be written in any thread only outside of autograd.
            with torch.inference_mode(targets[0].is_inference()), torch.no_grad():
                if stream is None:
                    _copy_all(unit, targets)
                    return
                with torch.cuda.stream(stream):
                    _copy_all(unit, targets)
                stream.synchronize()

        future: Future[None] = self._reader.submit(work)
        return future.result

    def _side_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    # ---- what stays ------------------------------------------------------------------------------

    def _may_keep(self, unit: Unit) -> bool:
        kept = sum(other.num_bytes for other in self._kept)
        return kept + unit.num_bytes <= self.keep_bytes

    def _make_room(self, unit: Unit) -> None:
        """Keep less where the device turns out to be fuller than the plan said."""
        if self._limit_bytes is None or self.device.type != "cuda" or self._rehearsal:
            return
        allocated = torch.cuda.memory_allocated(self.device)
        over = allocated + unit.num_bytes - self._limit_bytes
        if over > 0 and self._kept:
            kept = sum(other.num_bytes for other in self._kept)
            self.keep(max(0, kept - over))

    def _shrink(self) -> None:
        """Let go of those that came last: of weights used in turn, the first are as good to keep as any."""
        kept = sum(unit.num_bytes for unit in self._kept)
        for unit in reversed(list(self._kept)):
            if kept <= self.keep_bytes:
                return
            del self._kept[unit]
            kept -= unit.num_bytes


def _copy_all(unit: Unit, targets: Sequence[Tensor]) -> None:
    for parcel, target in zip(unit.parcels, targets, strict=True):
        parcel.store.copy_to(target)


def _nothing() -> None:
    """There is nothing to wait for."""
