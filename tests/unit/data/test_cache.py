from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from framework.data import images
from framework.data.cache import (
    EncodedCache,
    control_key,
    encoder_identity,
    latents_key,
    text_key,
)
from framework.data.files import write_atomic
from framework.errors import RunError

KEY = "ab" + "0" * 62


@pytest.fixture
def cache(tmp_path: Path) -> EncodedCache:
    return EncodedCache(tmp_path / "cache")


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_gives_back_what_was_put(cache: EncodedCache, dtype: torch.dtype) -> None:
    value = tensor(4, 6, 5, dtype=dtype).transpose(0, 1)
    cache.put("latents", KEY, value)
    found = cache.get("latents", KEY)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, value)
    assert cache.get("text", KEY) is None


def test_lies_in_folders_by_the_first_digits(cache: EncodedCache) -> None:
    cache.put("latents", "c" + KEY, tensor(3, 4))
    assert set(load_file(cache.path("latents", "c" + KEY))) == {"value", "crc32"}
    cache.put("text", KEY, {"embeds": tensor(3, 4), "pooled": tensor(2)})
    assert cache.path("text", KEY) == cache.folder / "text" / "ab" / f"{KEY}.safetensors"
    assert set(load_file(cache.path("text", KEY))) == {"embeds", "pooled", "crc32"}
    assert [file.name for file in (cache.folder / "text" / "ab").iterdir()] == [
        f"{KEY}.safetensors"
    ]


def test_values_that_train_are_kept_without_their_graph(cache: EncodedCache) -> None:
    cache.put("latents", KEY, tensor(3, 4, dtype=torch.float32).requires_grad_() * 2)
    found = cache.get("latents", KEY)
    assert found is not None
    assert not found.requires_grad


class TestText:
    def test_named_tensors_of_several_dtypes_come_back(self, cache: EncodedCache) -> None:
        value = {
            "embeds": tensor(3, 4),
            "pooled": tensor(5, dtype=torch.float32),
            "tokens": torch.tensor([1, 2]),
        }
        cache.put("text", KEY, value)
        found = cache.get("text", KEY)
        assert found is not None
        assert found.keys() == value.keys()
        assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in value.items())
        assert cache.missing("text", [KEY]) == []

    def test_swapped_names_are_noticed(self, cache: EncodedCache) -> None:
        cache.put("text", KEY, {"embeds": tensor(2, 2), "a": tensor(2), "b": tensor(2) + 1})
        file = cache.path("text", KEY)
        content = load_file(file)
        content["a"], content["b"] = content["b"], content["a"]
        save_file(content, file)
        assert cache.get("text", KEY) is None

    @pytest.mark.parametrize("name", ["value", "crc32", "mask"])
    def test_names_that_mean_something_else(self, cache: EncodedCache, name: str) -> None:
        with pytest.raises(AssertionError, match=name):
            cache.put("text", KEY, {"embeds": tensor(2, 2), name: tensor(2)})

    def test_one_bad_number_in_any_tensor_is_refused(self, cache: EncodedCache) -> None:
        with pytest.raises(RunError, match="gave text that are not finite"):
            cache.put("text", KEY, {"embeds": tensor(2, 2), "pooled": torch.tensor([float("nan")])})


def test_missing_keeps_order_and_names_each_once(cache: EncodedCache) -> None:
    keys = [f"{number:064x}" for number in range(5)]
    cache.put("text", keys[1], {"embeds": tensor(1, 2)})
    assert cache.missing("text", [keys[3], keys[1], keys[0], keys[3]]) == [keys[3], keys[0]]
    assert cache.missing("latents", [keys[1]]) == [keys[1]]
    assert cache.missing("text", []) == []


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_cut_entry_counts_as_missing_and_is_replaced(cache: EncodedCache, kept: int) -> None:
    value = tensor(16, 8, 8)
    cache.put("latents", KEY, value)
    file = cache.path("latents", KEY)
    file.write_bytes(file.read_bytes()[:kept])
    assert cache.missing("latents", [KEY]) == [KEY]
    assert cache.get("latents", KEY) is None
    cache.put("latents", KEY, value)
    assert cache.missing("latents", [KEY]) == []
    assert torch.equal(cache.get("latents", KEY), value)  # type: ignore[arg-type]


def test_a_flipped_bit_is_noticed_when_read(cache: EncodedCache) -> None:
    cache.put("latents", KEY, tensor(16, 8, 8))
    file = cache.path("latents", KEY)
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    assert cache.missing("latents", [KEY]) == []
    assert cache.get("latents", KEY) is None
    assert cache.missing("latents", [KEY]) == [KEY]


def test_a_foreign_file_counts_as_missing(cache: EncodedCache) -> None:
    file = cache.path("latents", KEY)
    file.parent.mkdir(parents=True)
    for content in ({"value": tensor(2, 2)}, {"other": tensor(2, 2)}):
        save_file(content, file)
        assert cache.missing("latents", [KEY]) == [KEY]
        assert cache.get("latents", KEY) is None
    file.mkdir()
    assert cache.missing("latents", [KEY]) == [KEY]
    assert cache.get("latents", KEY) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(cache: EncodedCache, bad: float) -> None:
    with pytest.raises(RunError, match="gave latents that are not finite"):
        cache.put("latents", KEY, torch.tensor([[1.0, bad]]))
    assert cache.missing("latents", [KEY]) == [KEY]


def test_a_disk_that_refuses(cache: EncodedCache) -> None:
    cache.folder.write_text("a file in the way")
    with pytest.raises(RunError, match=r"can't be written to the cache(.|\n)*data\.cache_dir"):
        cache.put("latents", KEY, tensor(2, 2))


class TestKeys:
    def test_everything_that_made_an_entry_is_in_its_key(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = [
            latents_key("a", size=(64, 64), encoder="e"),
            latents_key("b", size=(64, 64), encoder="e"),
            latents_key("a", size=(64, 80), encoder="e"),
            latents_key("a", size=(80, 64), encoder="e"),
            latents_key("a", size=(64, 64), encoder="f"),
            text_key("a", encoder="e"),
            text_key("", encoder="e"),
            text_key("a", encoder="f"),
            text_key('a", "e', encoder=""),
            text_key("a", encoder="e", control_keys=["c"]),
            text_key("a", encoder="e", control_keys=["c", "d"]),
            text_key("a", encoder="e", control_keys=["d", "c"]),
            latents_key("a", size=(64, 64, 5), encoder="e"),
            latents_key("a", size=(64, 64, 5), encoder="e", fps=16.0),
            latents_key("a", size=(64, 64, 5), encoder="e", fps=24.0),
            control_key("a", size=(64, 64), encoder="e"),
            control_key("a", size=(64, 32), encoder="e"),
        ]
        for version in ("IMAGE_TRANSFORM_VERSION", "CACHE_VERSION"):
            monkeypatch.setattr(f"framework.data.cache.{version}", 1000)
            keys.append(latents_key("a", size=(64, 64), encoder="e"))
        assert len(set(keys)) == len(keys)
        assert all(len(key) == 64 for key in keys)

    def test_keys_do_not_change_by_accident(self) -> None:
        assert images.IMAGE_TRANSFORM_VERSION == 1
        assert text_key("käse", encoder="e")[:16] == "af545fa17697ea82"
        assert latents_key("a", size=(64, 48), encoder="e")[:16] == "43dbf970dd8ec068"

    def test_identity_shows_every_part(self) -> None:
        parts = {"weights": "w", "storage": "bf16", "compute_dtype": "bf16"}
        identities = {encoder_identity("vae", code_version=1, **parts)}
        identities.add(encoder_identity("vae", code_version=2, **parts))
        identities.add(encoder_identity("text_encoder", code_version=1, **parts))
        for name in parts:
            identities.add(encoder_identity("vae", code_version=1, **{**parts, name: "x"}))
        assert len(identities) == 6


class TestAtomicWrite:
    def test_an_interrupted_write_leaves_the_old_file_and_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_atomic(tmp_path / "a", b"old")

        def interrupt(self: Path, target: Path) -> None:
            raise KeyboardInterrupt("stop")

        monkeypatch.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt, match="stop"):
            write_atomic(tmp_path / "a", b"new")
        assert (tmp_path / "a").read_bytes() == b"old"
        assert [file.name for file in tmp_path.iterdir()] == ["a"]

    def test_a_killed_writer_leaves_whole_entries_only(self, cache: EncodedCache) -> None:
        context = multiprocessing.get_context("fork")
        values = [torch.full((500_000,), float(number)) for number in range(2)]
        for _ in range(3):
            writer = context.Process(target=_rewrite_forever, args=(cache, values), daemon=True)
            writer.start()
            assert writer.pid is not None
            try:
                deadline = time.monotonic() + 10
                while cache.missing("latents", [KEY]) and time.monotonic() < deadline:
                    time.sleep(0.001)
                found = [cache.get("latents", KEY) for _ in range(50)]
            finally:
                os.kill(writer.pid, signal.SIGKILL)
                writer.join()
            for entry in (*found, cache.get("latents", KEY)):
                assert entry is not None
                assert any(torch.equal(entry, value) for value in values)


def _rewrite_forever(cache: EncodedCache, values: list[torch.Tensor]) -> None:
    torch.set_num_threads(1)  # as DataLoader does: OpenMP's threads don't survive a fork
    while True:
        for value in values:
            cache.put("latents", KEY, value)
