"""What is written is old or new when the writer is killed or meets others: save, export_peft and merge to a folder."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite.core import writing
from lora_lite.core.writing import new_folder
from lora_lite.testing import toy
from tests import ROOT
from tests.core.test_messages import refusal
from tests.oracles import killing


@pytest.fixture
def model():
    """With an adapter."""
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora", r=4, targets=("q_proj",))))
    return model


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def leftover(folder: Path, what: str) -> Path:
    """What a killed writer leaves: nobody holds its lock."""
    place = folder / f"{writing.BEGIN}0123456789abcdef{writing.END}"
    place.write_bytes(b"half") if what == "file" else place.mkdir()
    if what == "folder":
        (place / "half").write_bytes(b"half")
    return place


# --- what stands at the place -----------------------------------------------------------------------------------------------


def test_the_same_adapter_is_the_same_bytes(model, tmp_path):
    """Also from another process, where the order of a set of texts is another one."""
    ll.save(model, tmp_path / "a")
    ll.save(model, tmp_path / "b")
    fresh = toy.toy()
    ll.load(fresh, tmp_path / "a")
    ll.save(fresh, tmp_path / "c")
    program = (
        "import lora_lite as ll, sys; from lora_lite.testing import toy; m = toy.toy(); "
        "ll.load(m, sys.argv[1]); ll.save(m, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "a", tmp_path / "d"], check=True, cwd=ROOT)
    assert len({(tmp_path / name).read_bytes() for name in "abcd"}) == 1


def test_links_are_followed_and_mode_and_owner_are_kept(model, tmp_path):
    (tmp_path / "real").mkdir()
    file, link = tmp_path / "real" / "a", tmp_path / "link"
    link.symlink_to(file)
    ll.save(model, link)
    assert link.is_symlink()
    assert names(tmp_path / "real") == ["a"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~current_mask()
    file.chmod(0o640)
    if os.getuid() == 0:
        os.chown(file, 12345, 23456)
    before = file.stat()
    ll.save(model, link)
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino


def current_mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_is_no_regular_file_is_refused_and_stays(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for name in ("pipe", "s"):
            refusal(lambda name=name: ll.save(model, tmp_path / name), name, "no regular file")
            refusal(lambda name=name: ll.load(toy.toy(), tmp_path / name), name, "cannot be read")
    refusal(lambda: ll.save(model, "/dev/null"), "/dev/null is no regular file")
    refusal(lambda: ll.load(toy.toy(), "/dev/zero"), "/dev/zero cannot be read")
    refusal(lambda: ll.save(model, tmp_path / "a\0b"), "is no path")
    assert names(tmp_path) == ["pipe", "s"]


@pytest.mark.parametrize(("code", "words"), [("ENOSPC", "disk is full"), ("EROFS", "read-only"), ("EACCES", "not yours")])
@pytest.mark.parametrize("call", ["open", "fsync", "replace", "mkdir", "rename"])
def test_a_system_that_refuses_is_a_named_error_and_leaves_nothing(code, words, call, model, tmp_path, monkeypatch):
    import errno

    ll.save(model, tmp_path / "a")
    before, real = (tmp_path / "a").read_bytes(), getattr(os, call)

    def refuse(*arguments: Any, **options: Any) -> Any:
        if call == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments, **options)
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, call, refuse)
    if call in ("open", "fsync", "replace"):
        refusal(lambda: ll.save(model, tmp_path / "a"), words, str(tmp_path))
    if call in ("fsync", "mkdir", "rename"):
        refusal(lambda: ll.export_peft(model, tmp_path / "b"), words, str(tmp_path))
    monkeypatch.undo()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == before


def test_long_names(model, tmp_path):
    ll.save(model, tmp_path / ("a" * 255))
    refusal(lambda: ll.save(model, tmp_path / ("a" * 256)), "name is too long")
    refusal(lambda: ll.export_peft(model, tmp_path / ("b" * 256)), "name is too long")
    assert names(tmp_path) == ["a" * 255]


def test_file_and_folder_are_on_the_disk_when_the_call_returns(model, tmp_path, monkeypatch):
    synced: list[str] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    ll.save(model, tmp_path / "a")
    assert [name.startswith(writing.BEGIN) for name in synced] == [True, False]
    assert synced[-1] == tmp_path.name
    synced.clear()
    ll.export_peft(model, tmp_path / "b")
    assert {"adapter_config.json", "adapter_model.safetensors", tmp_path.name} <= set(synced)
    assert synced[-1] == tmp_path.name


# --- what others left, and others at the same time ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("write", [ll.save, ll.export_peft], ids=["save", "export"])
def test_what_killed_writers_left_is_taken_away_by_the_next(write, what, model, tmp_path):
    leftover(tmp_path, what)
    write(model, tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_what_a_living_writer_holds_stays(model, tmp_path):
    with new_folder(tmp_path / "slow") as place:
        (place / "half").write_text("half")
        ll.save(model, tmp_path / "a")
        ll.export_peft(model, tmp_path / "b")
        assert (place / "half").exists()
    assert names(tmp_path) == ["a", "b", "slow"]


def test_a_link_called_like_a_leftover_takes_nothing_along(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    (tmp_path / f"{writing.BEGIN}x{writing.END}").symlink_to(tmp_path / "mine")
    ll.save(model, tmp_path / "a")
    assert (tmp_path / "mine" / "notes").read_text() == "mine"


def test_of_several_exports_to_one_place_one_wins(model, tmp_path):
    def late() -> None:
        with new_folder(tmp_path / "a") as place:
            (place / "late").write_text("late")
            ll.export_peft(model, tmp_path / "a")

    refusal(late, "exists", str(tmp_path / "a"))
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_file_exchanged_while_it_is_loaded_is_the_one_or_the_other(model, tmp_path, monkeypatch):
    """Nothing is mapped: who cuts the file short meanwhile changes nothing of what was read."""
    from lora_lite.core import checkpoint

    ll.save(model, tmp_path / "a")
    real = checkpoint.tensors_of

    def cut(content: bytearray) -> Any:
        found = real(content)
        with open(tmp_path / "a", "r+b") as file:
            file.truncate(100)
        return found

    monkeypatch.setattr(checkpoint, "tensors_of", cut)
    fresh = toy.toy()
    ll.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(x := toy.inputs(2, 3, 24)), model(x))


def test_killed_at_every_call_of_the_system(tmp_path):
    """The name is exchanged in one step: before it the old content stands there, after it the new; nothing stays beside it."""
    found = killing.moments(tmp_path)
    assert found == {moment: ["new" if moment == "sync" else "old"] for moment in killing.MOMENTS}


# --- at random ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["save", "export"])
def test_killed_at_random(job, tmp_path):
    (tmp_path / job).mkdir()
    found = killing.kill(job, 5, tmp_path / job, seed=1)
    assert found["torn"] == found["left"] == 0, found


@pytest.mark.long
@pytest.mark.parametrize("job", killing.JOBS)
def test_killed_at_random_often(job, tmp_path):
    (tmp_path / job).mkdir()
    found = killing.kill(job, 100, tmp_path / job, seed=2)
    assert found["torn"] == found["left"] == 0, found
    assert found["old"] > 5, found
    assert found["new"] > 5, found


@pytest.mark.long
def test_several_processes_save_load_and_export_to_one_place(tmp_path):
    found = killing.crowd(tmp_path, processes=4, rounds=40)
    assert found["foreign"] == {}
    assert found["torn"] == found["left"] == 0
    assert found["won"] == found["places"], "of each folder one export wins"
