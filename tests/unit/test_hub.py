"""Finding a model: folders, the hub's cache, and a hub that is played by monkeypatched functions."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from safetensors import safe_open

from framework import hub
from framework.errors import SourceError
from framework.inventory import read_inventory

REPO = "Qwen/Qwen-Image"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def http_error(kind: type[Exception], status: int) -> Exception:
    """An error as the hub's client raises it after an answer."""
    response = SimpleNamespace(
        status_code=status, headers={}, request=None, url="https://hub/x", text="refused"
    )
    error = kind.__new__(kind)
    Exception.__init__(error, "the server said no")
    error.response = response  # type: ignore[attr-defined]
    return error


class FakeHub:
    """Serves a local folder as the repository `REPO`; records what is asked."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.snapshot = cache / "models--Qwen--Qwen-Image" / "snapshots" / COMMIT
        self.error: Exception | None = None
        self.calls: list[tuple[str, Any]] = []

    def _note(self, what: str, value: Any) -> None:
        self.calls.append((what, value))
        if self.error is not None:
            raise self.error

    def model_info(self, repo: str, *, revision: str, timeout: float) -> SimpleNamespace:
        self._note("model_info", (repo, revision))
        return SimpleNamespace(sha=COMMIT)

    def list_repo_files(self, repo: str, *, revision: str) -> list[str]:
        self._note("list_repo_files", revision)
        return [str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()]

    def parse_safetensors_file_metadata(self, repo: str, name: str, *, revision: str) -> Any:
        self._note("header", name)
        tensors, position = {}, 0
        with safe_open(self.folder / name, framework="np") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                size = 2
                for length in part.get_shape():
                    size *= length
                tensors[key] = SimpleNamespace(
                    dtype=part.get_dtype(),
                    shape=part.get_shape(),
                    data_offsets=(position, position + size),
                )
                position += size
        return SimpleNamespace(tensors=tensors)

    def hf_hub_download(self, repo: str, name: str, *, revision: str) -> str:
        self._note("hf_hub_download", name)
        return str(self.folder / name)

    def snapshot_download(self, repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        self._note("snapshot_download", (revision, allow_patterns))
        for file in self.folder.rglob("*"):
            relative = file.relative_to(self.folder)
            if file.is_file() and any(relative.match(pattern) for pattern in allow_patterns):
                (self.snapshot / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.snapshot / relative)
        return str(self.snapshot)

    def asked(self, what: str) -> list[Any]:
        return [value for name, value in self.calls if name == what]


@pytest.fixture
def fake(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    server = FakeHub(tiny_checkpoint, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: server)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", server.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", server.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return server


def test_headers_come_by_range_requests_and_no_weight_is_fetched(fake: FakeHub) -> None:
    for subfolder in ("transformer", "vae"):
        headers = hub.locate_headers(REPO, subfolder, revision="main")
        assert headers.place == f"hf://{REPO}@{COMMIT}/{subfolder}"
        assert headers.commit == COMMIT
        wanted = read_inventory(fake.folder / subfolder)
        assert {k: (t.shape, t.dtype) for k, t in headers.tensors.items()} == {
            k: (t.shape, t.dtype) for k, t in wanted.items()
        }
    assert len(fake.asked("header")) == 9
    assert not fake.asked("snapshot_download")


def test_fetching_is_pinned_and_takes_no_pickles(fake: FakeHub) -> None:
    found = hub.locate_component(REPO, "transformer", revision="main")
    assert found.commit == COMMIT
    assert found.folder == fake.snapshot / "transformer"
    [(revision, patterns)] = fake.asked("snapshot_download")
    assert revision == COMMIT
    assert all(p == "model_index.json" or p.startswith("transformer/*.") for p in patterns)
    assert {pattern.rpartition(".")[2] for pattern in patterns} == {
        "json", "txt", "jinja", "model", "safetensors",
    }  # fmt: skip
    assert read_inventory(found.folder).keys() == read_inventory(fake.folder / "transformer").keys()


def test_what_is_in_the_cache_is_not_fetched_again(fake: FakeHub) -> None:
    hub.locate_component(REPO, "transformer", revision="main")
    headers = hub.locate_headers(REPO, "transformer", revision="main")
    assert headers.place == str(fake.snapshot / "transformer")
    assert hub.locate_component(REPO, "transformer", revision="main").folder == Path(headers.place)
    assert len(fake.asked("snapshot_download")) == 1


def test_an_interrupted_download_goes_on(fake: FakeHub) -> None:
    folder = hub.locate_component(REPO, "transformer", revision="main").folder
    next(folder.glob("*00004-of*")).unlink()
    assert hub.locate_headers(REPO, "transformer", revision="main").place.startswith("hf://")
    hub.locate_component(REPO, "transformer", revision="main")
    assert len(fake.asked("snapshot_download")) == 2
    assert read_inventory(folder)


def test_a_planned_place_becomes_a_folder(fake: FakeHub, tmp_path: Path) -> None:
    place = hub.locate_headers(REPO, "vae", revision="main").place
    assert hub.fetch_place(place) == fake.snapshot / "vae"
    assert hub.fetch_place(str(tmp_path)) == tmp_path


def test_extras_come_without_weights(fake: FakeHub) -> None:
    folder = hub.locate_extra(REPO, "tokenizer", revision="main")
    assert (folder / "tokenizer.json").is_file()
    [(_, patterns)] = fake.asked("snapshot_download")
    assert not any("safetensors" in pattern for pattern in patterns)


def test_a_full_commit_is_not_looked_up(fake: FakeHub) -> None:
    assert hub.locate_headers(REPO, "vae", revision=COMMIT).commit == COMMIT
    assert not fake.asked("model_info")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.GatedRepoError, 403), r"(?s)gated.*accept it.*hf auth login"),
        (http_error(errors.RevisionNotFoundError, 404), r'(?s)no revision "main".*model\.revision'),
        (
            http_error(errors.RepositoryNotFoundError, 404),
            r"(?s)does not exist, or is private.*model\.source",
        ),
        (http_error(errors.HfHubHTTPError, 500), r"(?s)the hub refused.*server said no"),
        (
            errors.OfflineModeIsEnabled("offline"),
            r"(?s)can't be reached.*run the same command again",
        ),
        (errors.HTTPError("no route"), r"(?s)can't be reached.*HTTPError: no route"),
        (OSError(28, "No space left on device"), r"(?s)can't be written.*No space left.*make room"),
        (TimeoutError("slow"), r"(?s)can't be reached.*TimeoutError: slow"),
    ],
)
@pytest.mark.parametrize("locate", [hub.locate_headers, hub.locate_component])
def test_hub_errors_are_translated(
    fake: FakeHub, locate: Any, error: Exception, message: str
) -> None:
    fake.error = error
    with pytest.raises(SourceError, match=message) as caught:
        locate(REPO, "transformer", revision="main")
    assert caught.value.__cause__ is error
    assert REPO in str(caught.value)


def test_without_connection_the_known_commit_is_used_and_said(
    fake: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    folder = hub.locate_component(REPO, "vae", revision="main").folder
    refs = fake.snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    fake.error = errors.HTTPError("no route")
    with caplog.at_level(logging.WARNING):
        assert hub.locate_component(REPO, "vae", revision="main").folder == folder
    assert COMMIT in caplog.text


def test_offline_uses_the_cache_and_asks_nothing(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.locate_component(REPO, "vae", revision="main").folder
    refs = fake.snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake.calls.clear()
    assert hub.locate_headers(REPO, "vae", revision="main").place == str(folder)
    for locate in (hub.locate_headers, hub.locate_component):
        with pytest.raises(SourceError, match=r"HF_HUB_OFFLINE forbids"):
            locate(REPO, "transformer", revision="main")
    assert fake.calls == []


def test_offline_without_cache(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        SourceError, match=r"(?s)isn't on this machine.*unset HF_HUB_OFFLINE, or name a folder"
    ):
        hub.locate_component(REPO, "vae", revision="main")
    assert fake.calls == []


def test_a_repository_without_the_folder(fake: FakeHub) -> None:
    with pytest.raises(
        SourceError, match=r'(?s)no complete safetensors weights in "unet".*transformer'
    ):
        hub.locate_headers(REPO, "unet", revision="main")
    with pytest.raises(SourceError, match='no complete safetensors weights in "unet"'):
        hub.locate_component(REPO, "unet", revision="main")
    with pytest.raises(SourceError, match='no folder "unet"'):
        hub.locate_extra(REPO, "unet", revision="main")


def test_local_folder_is_found_from_anywhere(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    found = hub.locate_component(tiny_checkpoint.name, "vae", revision="main")
    assert found == hub.ComponentFiles(tiny_checkpoint / "vae", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.local, "REPOSITORY", tiny_checkpoint.parent)
    assert hub.locate_headers(tiny_checkpoint.name, "vae", revision="main").place == str(
        tiny_checkpoint / "vae"
    )


def test_a_component_folder_may_be_named_itself(tiny_checkpoint: Path) -> None:
    own = tiny_checkpoint / "vae"
    assert hub.locate_component(str(own), "vae", revision="main").folder == own


@pytest.mark.parametrize(
    "source", ["./tiny-qwen-imge", "a/b/c", "pocket", "/no/such/folder", "~/nowhere"]
)
def test_what_can_only_be_a_path_is_not_taken_to_the_hub(source: str, fake: FakeHub) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        hub.locate_component(source, "vae", revision="main")
    assert fake.calls == []


def test_missing_folder_names_its_neighbours(tiny_checkpoint: Path) -> None:
    with pytest.raises(
        SourceError, match=r"(?s)does not exist.*nearest folders in .*tiny-qwen-image"
    ):
        hub.locate_component(str(tiny_checkpoint.parent / "tiny-qwen-imge"), "vae", revision="main")


def test_folder_without_the_component(tiny_checkpoint: Path) -> None:
    with pytest.raises(SourceError, match=r'(?s)no folder "unet".*folders: .*transformer'):
        hub.locate_component(str(tiny_checkpoint), "unet", revision="main")


def test_local_models_load_neither_torch_nor_the_hub_client(tiny_checkpoint: Path) -> None:
    code = (
        "import sys; from framework import hub;"
        f"hub.locate_headers({str(tiny_checkpoint)!r}, 'vae', revision='main');"
        "assert not {'torch', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_slip_in_a_folder_name_is_seen_when_the_hub_does_not_answer(fake: FakeHub) -> None:
    Path("assets/pocket").mkdir(parents=True)
    fake.error = ConnectionError("no route")
    with pytest.raises(SourceError, match="hub can't be reached") as caught:
        hub.locate_component("assets/pockett", "vae", revision="main")
    assert "no route; nearest folders in" in caught.value.found
    assert caught.value.found.endswith(": pocket")


def test_a_components_config_is_read_wherever_it_lies(fake: FakeHub) -> None:
    local = hub.read_component_config(str(fake.folder / "vae"))
    assert local["_class_name"] == "AutoencoderKLQwenImage"
    assert hub.read_component_config(f"hf://{REPO}@{COMMIT}/vae") == local
    assert fake.asked("hf_hub_download") == ["vae/config.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is missing"), ("{", "can't be read"), ("[]", "isn't a JSON object")],
)
def test_a_config_that_is_none_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        hub.read_component_config(str(tmp_path))
    assert caught.value.where == str(tmp_path / "config.json")


def as_cache(checkpoint: Path, folder: Path) -> Path:
    """A repository as huggingface_hub keeps it."""
    repository = folder / "models--Qwen--Qwen-Image"
    shutil.copytree(checkpoint, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def test_a_repository_in_the_cache_may_be_named_as_a_folder(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    repository = as_cache(tiny_checkpoint, tmp_path)
    snapshot = repository / "snapshots" / COMMIT
    for revision in ("main", COMMIT):
        headers = hub.locate_headers(str(repository), "vae", revision=revision)
        assert (headers.place, headers.commit) == (str(snapshot / "vae"), COMMIT)
        assert hub.locate_extra(str(repository), "tokenizer", revision=revision) == (
            snapshot / "tokenizer"
        )
        found = hub.find_on_disk(str(repository), "vae", revision=revision)
        assert found == hub.ComponentFiles(snapshot / "vae", COMMIT)
    with pytest.raises(
        SourceError,
        match=rf'(?s)no snapshot of revision "v2".*revisions: main; commits: {COMMIT}.*hf download Qwen/Qwen-Image',
    ):
        hub.locate_headers(str(repository), "vae", revision="v2")


def single_file(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    [file] = (checkpoint / "vae").glob("*.safetensors")
    return Path(shutil.copyfile(file, folder / "some_vae.safetensors"))


def test_a_single_file_takes_its_config_from_the_model(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = single_file(tiny_checkpoint, tmp_path / "comfy")
    headers = hub.locate_headers(
        str(file), "vae", revision="main", config_source=str(tiny_checkpoint)
    )
    assert (headers.place, headers.file) == (str(tiny_checkpoint / "vae"), file)
    assert headers.commit is None
    assert {Path(tensor.file) for tensor in headers.tensors.values()} == {file}
    files = hub.find_on_disk(str(file), "vae", revision="main", config_source=str(tiny_checkpoint))
    assert files is not None
    assert hub.read_headers(files) == headers


def test_a_config_beside_a_single_file_comes_first(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = single_file(tiny_checkpoint, tmp_path / "own")
    shutil.copy(tiny_checkpoint / "vae" / "config.json", file.parent)
    headers = hub.locate_headers(
        str(file), "vae", revision="main", config_source=str(tiny_checkpoint)
    )
    assert headers.place == str(file.parent)


def test_the_config_of_a_single_file_is_fetched_without_weights(
    fake: FakeHub, tmp_path: Path
) -> None:
    file = single_file(fake.folder, tmp_path / "comfy")
    find = {"revision": COMMIT, "config_source": REPO}
    assert hub.find_on_disk(str(file), "vae", **find) is None
    headers = hub.locate_headers(str(file), "vae", **find)
    assert headers.place == str(fake.snapshot / "vae")
    assert not list(fake.snapshot.rglob("*.safetensors"))
    assert hub.find_on_disk(str(file), "vae", **find) is not None


def test_a_whole_checkpoint_has_its_extras_beside_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = single_file(tiny_checkpoint, tmp_path / "m")
    shutil.copytree(tiny_checkpoint / "tokenizer", tmp_path / "m" / "tokenizer")
    assert hub.locate_extra(str(file), "tokenizer", revision="main") == file.parent / "tokenizer"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "a.ckpt",
            r"(?s)pickled weights.*torch\.load\('a\.ckpt'.*weights_only=True.*'a\.safetensors'",
        ),
        ("a.gguf", r"(?s)isn't a safetensors file.*a \.gguf file"),
    ],
)
def test_files_that_are_never_read(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=message):
        hub.find_folder(str(tmp_path / name))


def test_a_file_of_a_repository_is_not_fetched_by_its_path(fake: FakeHub) -> None:
    source = "Comfy-Org/z_image/split_files/diffusion_models/z.safetensors"
    with pytest.raises(
        SourceError,
        match=r"hf download Comfy-Org/z_image split_files/diffusion_models/z\.safetensors",
    ):
        hub.find_folder(source)
    for absolute in ("/no/such.safetensors", "~/no/such.safetensors"):
        with pytest.raises(SourceError, match=r"does not exist") as caught:
            hub.find_folder(absolute)
        assert "hf download" not in caught.value.hint


@pytest.fixture
def variants(fake: FakeHub, tmp_path: Path) -> FakeHub:
    """A hub whose VAE is published plain and as fp16, and nothing else in variants."""
    folder = Path(shutil.copytree(fake.folder, tmp_path / "repository"))
    [file] = (folder / "vae").glob("*.safetensors")
    shutil.copyfile(file, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    fake.folder = folder
    return fake


def test_only_the_variant_is_fetched(variants: FakeHub) -> None:
    headers = hub.locate_headers(REPO, "vae", revision="main", variant="fp16")
    assert headers.place == f"hf://{REPO}@{COMMIT}/vae#fp16"
    assert headers.variant == "fp16"
    assert variants.asked("header") == ["vae/diffusion_pytorch_model.fp16.safetensors"]
    folder = hub.fetch_place(headers.place)
    assert [path.name for path in folder.glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    assert hub.locate_headers(REPO, "vae", revision="main", variant="fp16").place == str(folder)
    # The plain files are another matter, and aren't there.
    assert hub.locate_headers(REPO, "vae", revision="main").place.startswith("hf://")
    assert hub.find_on_disk(REPO, "vae", revision=COMMIT) is None
    assert hub.find_on_disk(REPO, "vae", revision=COMMIT, variant="fp16") is not None


def test_plain_files_are_fetched_without_variants(variants: FakeHub) -> None:
    folder = hub.locate_component(REPO, "vae", revision="main").folder
    assert [path.name for path in folder.glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]


def test_a_component_without_variants_is_taken_as_it_is(variants: FakeHub) -> None:
    headers = hub.locate_headers(REPO, "transformer", revision="main", variant="fp16")
    assert headers.place == f"hf://{REPO}@{COMMIT}/transformer"
    assert headers.variant is None
    hub.locate_component(REPO, "transformer", revision="main", variant="fp16")
    again = hub.locate_headers(REPO, "transformer", revision="main", variant="fp16")
    assert again.place == str(variants.snapshot / "transformer")
    assert again.variant is None


def test_a_variant_that_is_not_published_is_named(variants: FakeHub) -> None:
    with pytest.raises(SourceError, match=r'(?s)no variant "bf16".*variants: fp16'):
        hub.locate_headers(REPO, "vae", revision="main", variant="bf16")
