"""An adapter's own tokenizer files and generation defaults, by every way in, and its chat template in requests.

A real store, no engine.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux_adapters.artifact.format import (
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
    KNOWN_FILES,
    TOKENIZER_FILES,
    UPLOAD_PARTS,
    digest_of,
    read_config,
)
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.chat.tokenizer_files import TokenizerFiles
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.verify import Checked, check_adapter
from loramux_adapters.store.rebuild import rebuild_index
from loramux_adapters.store.store import AdapterStore
from loramux_server.api.app import create_app
from loramux_server.client import transfer
from loramux_server.publishing.backup import restore_backup, write_backup
from loramux_server.publishing.lora_path import LoraPathRoot
from loramux_server.publishing.preload import preload
from loramux_server.publishing.watch import DirectoryWatch
from support.adapter_files import TINY_LINEARS, write_adapter
from support.fakes_api import BASE_NAME, Server, make_server
from support.publishing import unproved
from support.tokenizer_families import CHATML, family

TOKENIZER = family("byte-level BPE")
BASE = BaseInfo("aa" * 32, TINY_LINEARS, own_text=TokenizerFiles(TOKENIZER).own_text)
OTHER = CHATML.replace("m.content", "m.content | trim")
ENDLESS = "{{ messages[-1].content }}\n{% for x in range(10**9) %}{% endfor %}"


def check(directory: Path, *, force: bool = False) -> Checked:
    return check_adapter(directory, BASE, 256, force=force)


class Scene:
    """A server with a real store behind it, and a directory with adapters in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = AdapterStore(root / "store", served_base_id=BASE.base_id)
        self.publisher = unproved(self.store, check)
        (root / "fake").mkdir()
        self.fake = make_server(root / "fake")
        lora_path = LoraPathRoot(self.publisher, root, limit=2**24)
        self.fake.app = create_app(
            replace(
                self.fake.deps,
                store=self.store,
                check=check,
                publish=self.publisher.publish,
                lora_path_root=lora_path,
            )
        )

    def adapter(self, name: str, **files: str) -> Path:
        """Files by the names of an upload's parts."""
        directory = write_adapter(self.root / "adapters" / name, TINY_LINEARS, targets=["q_proj"], rank=4)
        for part, text in files.items():
            (directory / UPLOAD_PARTS[part]).write_text(text)
        return directory

    def template(self, name: str) -> str | None:
        path = self.store.directory(self.store.record(name).version) / CHAT_TEMPLATE_FILE
        return path.read_text() if path.exists() else None

    async def put(self, name: str, files: dict[str, Any]) -> httpx.Response:
        async with self.fake.client() as client:
            return await client.put(f"/v1/adapters/{name}", files=files)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.store.close()


def tar_of(directory: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(directory, arcname="adapter")
    return packed.getvalue()


async def by_parts(scene: Scene, name: str) -> str:
    files = transfer.files_to_send(scene.root / "adapters" / name)
    reply = await scene.put(name, {part: path.read_bytes() for part, path in files.items()})
    return reply.text if reply.status_code >= 400 else ""


async def by_archive(scene: Scene, name: str) -> str:
    reply = await scene.put(name, {"archive": tar_of(scene.root / "adapters" / name)})
    return reply.text if reply.status_code >= 400 else ""


async def by_lora_path(scene: Scene, name: str) -> str:
    body = {"lora_name": name, "lora_path": f"adapters/{name}"}
    reply = await scene.fake.post("/v1/load_lora_adapter", body)
    return reply.text if reply.status_code >= 400 else ""


async def by_watch(scene: Scene, name: str) -> str:
    failed: list[None] = []
    watch = DirectoryWatch(
        scene.store, scene.publisher, scene.root / "adapters", limit=2**24, failed=lambda: failed.append(None)
    )
    watch.poll()
    watch.poll()
    return "not published" if failed else ""


async def by_preload(scene: Scene, name: str) -> str:
    notes: list[str] = []
    preload(scene.store, scene.publisher, scene.root / "adapters", notes.append)
    return "".join(note for note in notes if note.startswith("left out"))


WAYS = (by_parts, by_archive, by_lora_path, by_watch, by_preload)
Way = Callable[[Scene, str], Any]


def test_every_tokenizer_file_is_sent_and_taken() -> None:
    assert {*KNOWN_FILES, *TOKENIZER_FILES} == set(UPLOAD_PARTS.values())


@pytest.mark.anyio
@pytest.mark.parametrize("way", WAYS)
async def test_the_bases_own_files_are_accepted_and_change_nothing(scene: Scene, way: Way) -> None:
    plain = scene.adapter("a")
    expected = digest_of(read_config(plain), plain)
    TOKENIZER.save_pretrained(plain)
    assert await way(scene, "a") == ""
    assert scene.store.record("a").version == expected
    kept = {path.name for path in scene.store.directory(expected).iterdir()}
    assert not kept & set(TOKENIZER_FILES)
    scene.store.load(expected)


@pytest.mark.anyio
@pytest.mark.parametrize("way", WAYS)
async def test_another_chat_template_is_kept_and_makes_another_version(scene: Scene, way: Way) -> None:
    plain = scene.adapter("a", tokenizer_config=json.dumps({"chat_template": OTHER}))
    assert await way(scene, "a") == ""
    version = scene.store.record("a").version
    assert scene.template("a") == OTHER
    assert version != digest_of(read_config(plain), plain), "the same weights with the base's template"
    assert scene.store.load(version).version == version


@pytest.mark.anyio
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"added_tokens": '{"<new>": 9999}'}, "'<new>'"),
        ({"chat_template": ENDLESS}, "line 2"),
    ],
)
async def test_new_tokens_and_endless_templates_are_refused(
    scene: Scene, way: Way, files: dict[str, str], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    scene.adapter("a", **files)
    refused = await way(scene, "a")
    assert refused and says in refused + caplog.text
    assert scene.store.records() == []


@pytest.mark.anyio
async def test_a_refused_upload_is_the_callers_error_and_says_what_and_where(scene: Scene) -> None:
    files = scene.adapter("a", added_tokens='{"<new>": 9999}', chat_template=ENDLESS)
    with pytest.raises(AdapterRejected) as caught:
        check(files)
    reply = await scene.put("a", {"archive": tar_of(files)})
    assert reply.status_code == 422 and reply.json()["error"]["code"] == "adapter_rejected"
    assert caught.value.reasons == ["added_tokens.json adds tokens, which are not served: '<new>'"]


@pytest.mark.anyio
async def test_a_watched_adapter_with_the_bases_files_is_known_again_after_a_start(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    TOKENIZER.save_pretrained(scene.adapter("a"))
    await by_watch(scene, "a")
    await by_watch(scene, "a")
    assert "is a version that is kept already" in caplog.text


@pytest.mark.anyio
async def test_a_backup_and_a_download_carry_the_template(scene: Scene, tmp_path: Path) -> None:
    scene.adapter("a", chat_template=OTHER)
    await by_archive(scene, "a")
    version = scene.store.record("a").version
    write_backup(scene.store, tmp_path / "backup.tar.gz")
    other = AdapterStore(tmp_path / "other", served_base_id=BASE.base_id)
    try:
        assert restore_backup(other, tmp_path / "backup.tar.gz", replace=False).done == ["a"]
        assert other.load(version).version == version
        assert (other.directory(version) / CHAT_TEMPLATE_FILE).read_text() == OTHER
    finally:
        other.close()
    async with scene.fake.client() as client:
        archive = (await client.get("/v1/adapters/a/archive")).content
        shown = (await client.get("/v1/adapters/a")).json()
    transfer.extract(io.BytesIO(archive), tmp_path / "pulled")
    assert (tmp_path / "pulled" / CHAT_TEMPLATE_FILE).read_text() == OTHER
    assert digest_of(read_config(tmp_path / "pulled"), tmp_path / "pulled") == version
    assert shown["chat_template"] == "adapter"


@pytest.mark.anyio
@pytest.mark.parametrize("way", WAYS)
async def test_generation_defaults_come_in_by_every_way_and_are_kept_as_they_count(scene: Scene, way: Way) -> None:
    plain = scene.adapter("a")
    without = digest_of(read_config(plain), plain)
    scene.adapter("a", generation_config='{"top_k": 5,  "num_beams": 3, "eos_token_id": 1}')
    assert await way(scene, "a") == ""
    record = scene.store.record("a")
    assert (scene.store.directory(record.version) / GENERATION_FILE).read_bytes() == b'{\n "top_k": 5\n}'
    assert record.version != without and scene.store.load(record.version).version == record.version
    assert any("num_beams" in note for note in record.notes)


@pytest.mark.anyio
@pytest.mark.parametrize("way", WAYS)
async def test_a_generation_config_that_says_nothing_is_not_kept(scene: Scene, way: Way) -> None:
    plain = scene.adapter("a")
    without = digest_of(read_config(plain), plain)
    scene.adapter("a", generation_config='{"eos_token_id": 1}')
    assert await way(scene, "a") == ""
    assert scene.store.record("a").version == without
    assert not (scene.store.directory(without) / GENERATION_FILE).exists()


@pytest.mark.anyio
@pytest.mark.parametrize("way", WAYS)
async def test_generation_defaults_out_of_range_are_refused(
    scene: Scene, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    scene.adapter("a", generation_config='{"top_p": 7}')
    refused = await way(scene, "a")
    assert refused and "top_p in generation_config.json is not a number above 0 to 1" in refused + caplog.text
    assert scene.store.records() == []


@pytest.mark.anyio
async def test_backups_downloads_and_a_rebuilt_index_carry_generation_defaults(scene: Scene, tmp_path: Path) -> None:
    scene.adapter("a", generation_config='{"top_k": 5, "max_length": 64}')
    await by_archive(scene, "a")
    version = scene.store.record("a").version
    write_backup(scene.store, tmp_path / "backup.tar.gz")
    async with scene.fake.client() as client:
        archive = (await client.get("/v1/adapters/a/archive")).content
    transfer.extract(io.BytesIO(archive), tmp_path / "pulled")
    assert digest_of(read_config(tmp_path / "pulled"), tmp_path / "pulled") == version
    other = AdapterStore(tmp_path / "other", served_base_id=BASE.base_id)
    assert restore_backup(other, tmp_path / "backup.tar.gz", replace=False).done == ["a"]
    other.close()
    assert rebuild_index(tmp_path / "other").is_whole
    other = AdapterStore(tmp_path / "other", served_base_id=BASE.base_id)
    try:
        assert other.load(version).version == version
        assert json.loads((other.directory(version) / GENERATION_FILE).read_bytes()) == {"max_length": 64, "top_k": 5}
    finally:
        other.close()


def chat(model: str, *adapters: str) -> dict[str, Any]:
    listed = {"adapters": [{"name": name} for name in adapters]} if adapters else {}
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **listed}


@pytest.mark.anyio
async def test_a_request_uses_its_adapters_template_and_the_base_its_own(scene: Scene) -> None:
    for name, files in {"own": {"chat_template": OTHER}, "plain": {}}.items():
        scene.adapter(name, **files)
        assert await by_archive(scene, name) == ""
        scene.fake.engine.replies[name] = b"Arr"
    for model, template in {"own": OTHER, "plain": None, BASE_NAME: None}.items():
        assert (await scene.fake.post("/v1/chat/completions", chat(model))).status_code == 200
        assert scene.fake.tokenizer.templates.pop() == template


@pytest.mark.anyio
async def test_adapters_with_different_templates_do_not_chat_together(scene: Scene) -> None:
    for name, template in {"a": OTHER, "b": OTHER, "c": OTHER + "{# #}", "d": None}.items():
        scene.adapter(name, **({"chat_template": template} if template else {}))
        assert await by_archive(scene, name) == ""
    scene.fake.engine.replies |= {"a+b": b"Arr", "a+c": b"Arr"}
    assert (await scene.fake.post("/v1/chat/completions", chat(BASE_NAME, "a", "b"))).status_code == 200
    assert scene.fake.tokenizer.templates == [OTHER]
    for pair in (("a", "c"), ("a", "d"), ("d", "a")):
        reply = await scene.fake.post("/v1/chat/completions", chat(BASE_NAME, *pair))
        assert reply.status_code == 400
        assert f"the adapters {pair[0]} and {pair[1]} use different chat templates" in reply.json()["error"]["message"]
    completion = {"model": BASE_NAME, "prompt": "hi", "adapters": [{"name": "a"}, {"name": "c"}]}
    assert (await scene.fake.post("/v1/completions", completion)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("allowed", [True, False])
async def test_prompts_of_completions_have_a_switch_of_their_own(tmp_path: Path, allowed: bool) -> None:
    server: Server = make_server(tmp_path)
    server.app = create_app(replace(server.deps, special_in_prompts=allowed))
    await server.post("/v1/completions", {"model": BASE_NAME, "prompt": "<|im_end|>"})
    assert server.tokenizer.encoded == ["<|im_end|>"] and server.tokenizer.special is allowed
