"""Units come to the device when they are asked for, and go when another one is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from framework.errors import SourceError
from framework.storage.fetching import Fetcher, LayerSource, Parcel, Unit
from framework.storage.fp8 import encode_e4m3
from framework.storage.managed import is_managed, offload_layer_
from framework.storage.stores import (
    DiskStore,
    EmptyStore,
    FileRange,
    Slot,
    fill_slot,
    host_stores,
)
from framework.storage.weights import StoredWeight

CPU = torch.device("cpu")
SHAPE = (4, 8)
NUM_BYTES = 256


def slot(*, dtype: torch.dtype = torch.float32) -> Slot:
    return Slot(shape=SHAPE, dtype=dtype, offset=0)


def host_units(count: int, *, ahead: bool = True, owner: str = "dit") -> list[Unit]:
    """Units of one layer each, filled with 0, 1, 2, ..."""
    units = []
    for index, store in enumerate(host_stores([NUM_BYTES] * count, pinned=False)):
        fill_slot(store, slot(), StoredWeight(torch.full(SHAPE, float(index))))
        units.append(Unit(str(index), owner, [Parcel(store, {"layer": slot()})], ahead=ahead))
    return units


def disk_units(folder: Path, count: int, *, owner: str = "dit") -> list[Unit]:
    file = folder / "weights.bin"
    values = [torch.full(SHAPE, float(index)) for index in range(count)]
    file.write_bytes(b"head" + b"".join(value.numpy().tobytes() for value in values))
    size = values[0].numel() * 4
    return [
        Unit(
            str(index),
            owner,
            [
                Parcel(
                    DiskStore(NUM_BYTES, [FileRange(str(file), 4 + index * size, size, 0)]),
                    {"layer": slot()},
                )
            ],
            ahead=True,
        )
        for index in range(count)
    ]


def values(fetcher: Fetcher, unit: Unit) -> float:
    weight = fetcher.fetch(unit)["layer"].values
    assert weight.shape == SHAPE
    assert float(weight.min()) == float(weight.max())
    return float(weight[0, 0])


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_each_unit_brings_its_own_content_in_any_order(kind: str, tmp_path: Path) -> None:
    units = host_units(5) if kind == "host" else disk_units(tmp_path, 5)
    fetcher = Fetcher(CPU)
    for index in [0, 1, 2, 3, 4, 3, 2, 1, 0] * 3 + [4, 0, 3, 3, 1]:
        assert values(fetcher, units[index]) == index
    fetcher.close()
    assert fetcher.held_bytes == 0
    assert values(fetcher, units[2]) == 2  # it can be used again
    fetcher.close()


def test_the_device_copy_is_fresh_memory() -> None:
    (unit,) = host_units(1)
    store = unit.parcels[0].store
    fetched = Fetcher(CPU).fetch(unit)["layer"].values
    assert (
        fetched.untyped_storage().data_ptr() != store.buffer.untyped_storage().data_ptr()  # type: ignore[attr-defined]
    )


def test_one_unit_is_held_and_files_are_read_ahead(tmp_path: Path) -> None:
    fetcher = Fetcher(CPU)
    for unit in host_units(4) * 2:
        fetcher.fetch(unit)
        assert fetcher.held_bytes == NUM_BYTES
    fetcher.close()
    units = disk_units(tmp_path, 4)
    for unit in units:
        fetcher.fetch(unit)
        assert fetcher.held_bytes == NUM_BYTES  # nothing is known yet
    before = fetcher.fetched_bytes
    for unit in units * 2:
        fetcher.fetch(unit)
        assert fetcher.held_bytes == 2 * NUM_BYTES
    # Each was read once for each use, and the one after the last is on its way.
    assert fetcher.fetched_bytes == before + (2 * len(units) + 1) * NUM_BYTES
    fetcher.close()


def test_a_wrong_guess_costs_a_copy_and_nothing_else(tmp_path: Path) -> None:
    units = disk_units(tmp_path, 4)
    fetcher = Fetcher(CPU)
    for index in (0, 1, 2, 0):
        fetcher.fetch(units[index])
    assert values(fetcher, units[3]) == 3  # 1 was expected
    assert fetcher.held_bytes == NUM_BYTES
    assert values(fetcher, units[1]) == 1
    fetcher.close()


def test_kept_units_are_the_first_and_are_copied_once() -> None:
    units = host_units(5)
    fetcher = Fetcher(CPU)
    fetcher.keep(2 * NUM_BYTES + 10)
    for unit in units * 3:
        fetcher.fetch(unit)
        assert fetcher.held_bytes <= 3 * NUM_BYTES
    assert fetcher.fetched_bytes == (2 + 3 * 3) * NUM_BYTES
    fetcher.keep(NUM_BYTES)
    fetcher.fetch(units[4])
    assert fetcher.held_bytes == 2 * NUM_BYTES
    assert values(fetcher, units[0]) == 0
    assert fetcher.fetched_bytes == (2 + 3 * 3) * NUM_BYTES  # the first stayed


def test_a_component_is_let_go_of_alone() -> None:
    fetcher = Fetcher(CPU)
    fetcher.keep(10 * NUM_BYTES)
    for unit in [*host_units(2, owner="dit"), *host_units(3, owner="vae")]:
        fetcher.fetch(unit)
    assert fetcher.held_bytes == 5 * NUM_BYTES
    fetcher.release("vae")
    assert fetcher.held_bytes == 2 * NUM_BYTES
    fetcher.release()
    assert fetcher.held_bytes == 0


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_file_that_changes_while_the_model_runs(damage: str, tmp_path: Path) -> None:
    units = disk_units(tmp_path, 2)
    fetcher = Fetcher(CPU)
    fetcher.fetch(units[0])
    file = tmp_path / "weights.bin"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SourceError, match="while the model runs"):
        fetcher.fetch(units[1])
    fetcher.close()


def test_ranges_that_follow_each_other_are_one_read(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(range(64)))
    name = str(file)
    store = DiskStore(
        64,
        [
            FileRange(name, 16, 16, 16),
            FileRange(name, 0, 16, 0),
            FileRange(name, 32, 8, 48),
            FileRange(name, 40, 0, 60),
        ],
    )
    assert [(part.start, part.num_bytes, part.offset) for part in store.ranges] == [
        (0, 32, 0),
        (32, 8, 48),
    ]
    target = torch.zeros(64, dtype=torch.uint8)
    store.copy_to(target)
    assert target[:32].tolist() == list(range(32))
    assert target[48:56].tolist() == list(range(32, 40))


def test_weights_fetched_under_inference_mode_serve_training(tmp_path: Path) -> None:
    """Sampling amid training may leave units on the device that the next step uses."""
    units = disk_units(tmp_path, 2)
    fetcher = Fetcher(CPU)
    fetcher.keep(10 * NUM_BYTES)
    layers = [nn.Linear(8, 4, bias=False).requires_grad_(False) for _ in units]
    for layer, unit in zip(layers, units, strict=True):
        offload_layer_(layer, LayerSource(fetcher, unit, "layer"))
        assert is_managed(layer)
        assert list(layer.parameters()) == []
        assert layer.state_dict() == {}
    x = torch.ones(2, 8)

    def run(x: Tensor) -> Tensor:
        return layers[0](x).sum() + layers[1](x).sum()

    with torch.inference_mode():
        assert float(run(x)) == 64
    x.requires_grad_()
    run(x).backward()
    assert x.grad is not None
    assert x.grad.unique().tolist() == [4.0]
    fetcher.close()


def test_the_weight_that_others_see_outlives_the_fetch() -> None:
    units = host_units(2)
    fetcher = Fetcher(CPU)
    layer = nn.Linear(8, 4).requires_grad_(False)
    managed = offload_layer_(layer, LayerSource(fetcher, units[1], "layer"))
    weight = managed.weight
    fetcher.fetch(units[0])
    fetcher.fetch(units[1])["layer"].values.zero_()
    assert weight.unique().tolist() == [1.0]


def test_scales_travel_with_their_codes() -> None:
    weight = torch.randn(6, 32)
    codes, scale = encode_e4m3(weight, "row")
    place = Slot(
        shape=(6, 32),
        dtype=torch.uint8,
        offset=0,
        scale_shape=(6,),
        scale_offset=256,
    )
    (store,) = host_stores([512], pinned=False)
    fill_slot(store, place, StoredWeight(codes, scale))
    unit = Unit("0", "dit", [Parcel(store, {"layer": place})], ahead=True)
    found = Fetcher(CPU).fetch(unit)["layer"]
    assert torch.equal(found.values, codes)
    assert scale is not None
    assert found.dequant_scale is not None
    assert torch.equal(found.dequant_scale, scale)


@pytest.mark.parametrize("reads_files", [False, True])
def test_a_rehearsal_allocates_and_copies_nothing(reads_files: bool) -> None:
    with FakeTensorMode():
        fetcher = Fetcher(torch.device("cuda"), rehearsal=True)
        units = [
            Unit(
                str(i),
                "dit",
                [Parcel(EmptyStore(NUM_BYTES, reads_files=reads_files), {"layer": slot()})],
                ahead=True,
            )
            for i in range(3)
        ]
        for unit in units * 2:
            weight = fetcher.fetch(unit)["layer"].values
            assert weight.device.type == "cuda"
        assert fetcher.held_bytes == 2 * NUM_BYTES
        fetcher.close()
