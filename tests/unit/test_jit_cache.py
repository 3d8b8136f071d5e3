"""Cubins on disk: what is found again, what is not trusted, and what two processes do to each other."""

import dataclasses
import errno
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenferry.jit import cache
from tokenferry.jit.cache import Cache
from tokenferry.jit.compiler import Built
from tokenferry.jit.source import Unit

UNIT = Unit("toy", "the text", {"toy/kernel.cuh": "the kernel", "device/a.cuh": "a header"}, ("-arch=sm_90a",))
LOG = """\
ptxas info    : Compiling entry function 'toy' for 'sm_90a'
ptxas info    : Function properties for toy
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
BUILT = Built(b"\x7fELF" + bytes(1000), LOG)
V = "13.0.88"


def kept(folder: Path) -> Path:
    """The one entry of a cache that keeps BUILT."""
    Cache(folder).keep(UNIT, V, BUILT)
    (entry,) = folder.iterdir()
    return entry


def test_what_was_kept_is_found(tmp_path):
    assert Cache(tmp_path / "new" / "folder").find(UNIT, V) is None
    kept(tmp_path / "new" / "folder")
    assert Cache(tmp_path / "new" / "folder").find(UNIT, V) == BUILT.image
    assert Cache(tmp_path / "new" / "folder").find(UNIT, "13.0.89") is None


def test_an_entry_explains_itself(tmp_path):
    entry = kept(tmp_path)
    assert (entry / "kernel.cu").read_text() == "the text"
    assert (entry / "device" / "a.cuh").read_text() == "a header"
    report = json.loads((entry / "build.json").read_text())
    assert (report["nvrtc"], report["options"]) == (V, ["-arch=sm_90a"])
    assert report["resources"]["toy"]["registers"] == 8
    assert report["log"] == LOG.splitlines()


def test_ptx_is_kept_under_its_own_name(tmp_path):
    unit = dataclasses.replace(UNIT, options=("-arch=compute_80",))
    Cache(tmp_path).keep(unit, V, Built(b"// PTX\0", ""))
    assert Cache(tmp_path).find(unit, V) == b"// PTX\0"
    assert [path.suffix for path in tmp_path.glob("*/kernel.*")].count(".ptx") == 1
    assert not list(tmp_path.glob("*/kernel.cubin"))


def damage_cubin(entry):
    data = bytearray((entry / "kernel.cubin").read_bytes())
    data[500] ^= 1
    (entry / "kernel.cubin").write_bytes(data)


DAMAGES = {
    "a bit of the cubin flipped": damage_cubin,
    "cubin cut short": lambda entry: (entry / "kernel.cubin").write_bytes(BUILT.image[:100]),
    "cubin empty": lambda entry: (entry / "kernel.cubin").write_bytes(b""),
    "cubin missing": lambda entry: (entry / "kernel.cubin").unlink(),
    "report missing": lambda entry: (entry / "build.json").unlink(),
    "report cut short": lambda entry: (entry / "build.json").write_text('{"sha'),
    "report of another kind": lambda entry: (entry / "build.json").write_text("[]"),
    "report without checksum": lambda entry: (entry / "build.json").write_text("{}"),
    "report is not text": lambda entry: (entry / "build.json").write_bytes(b"\xff\xfe\xfd"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_set_aside_and_made_anew(tmp_path, caplog, damage):
    entry = kept(tmp_path)
    damage(entry)
    with caplog.at_level(logging.WARNING, "tokenferry"):
        assert Cache(tmp_path).find(UNIT, V) is None
    assert f"{entry} is damaged" in caplog.text
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith(f"{entry.name}.corrupt-")
    Cache(tmp_path).keep(UNIT, V, BUILT)
    assert Cache(tmp_path).find(UNIT, V) == BUILT.image


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), PermissionError(13, "read-only")])
def test_a_damaged_entry_that_cannot_be_set_aside_is_still_not_used(tmp_path, caplog, monkeypatch, error):
    """Gone: another process was faster, which is no reason for a second warning."""
    damage_cubin(kept(tmp_path))

    def fail(self, target):
        raise error

    monkeypatch.setattr(Path, "rename", fail)
    with caplog.at_level(logging.WARNING, "tokenferry"):
        assert Cache(tmp_path).find(UNIT, V) is None
    assert ["cannot use" in record.getMessage() for record in caplog.records] == (
        [False] if isinstance(error, FileNotFoundError) else [False, True]
    )


def test_something_that_is_no_cubin_is_not_loaded_even_with_a_checksum(tmp_path):
    Cache(tmp_path).keep(UNIT, V, Built(b"not an ELF file", LOG))
    assert Cache(tmp_path).find(UNIT, V) is None


def test_the_first_entry_stays(tmp_path, caplog):
    entry = kept(tmp_path)
    Cache(tmp_path).keep(UNIT, V, Built(b"\x7fELF another", LOG))
    assert Cache(tmp_path).find(UNIT, V) == BUILT.image
    assert list(tmp_path.iterdir()) == [entry], "a scratch folder stayed"
    assert caplog.text == ""


def test_an_entry_that_appears_while_it_is_looked_for_is_not_taken_for_a_damaged_one(tmp_path, caplog, monkeypatch):
    """Between "there is no such file" and "is there such a folder?" another process may write it."""
    exists = Path.exists

    def written_meanwhile(self):
        monkeypatch.undo()
        kept(tmp_path)
        return exists(self)

    monkeypatch.setattr(Path, "exists", written_meanwhile)
    assert Cache(tmp_path).find(UNIT, V) == BUILT.image
    assert caplog.text == ""


def test_no_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = Cache(None)
    cache.keep(UNIT, V, BUILT)
    assert cache.find(UNIT, V) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING, "tokenferry"):
        for _ in range(2):
            assert cache.find(UNIT, V) is None
            cache.keep(UNIT, V, BUILT)
    assert len(caplog.records) == 1
    assert "set TOKENFERRY_CACHE_DIR to a folder that can be written" in caplog.text


def test_a_disk_that_fills_up_is_a_warning_and_leaves_nothing(tmp_path, caplog, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    with caplog.at_level(logging.WARNING, "tokenferry"):
        Cache(tmp_path).keep(UNIT, V, BUILT)
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_can_write_or_read_what_is_kept(tmp_path):
    before = os.umask(0)
    try:
        entry = kept(tmp_path / "cache")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "cache", entry, *entry.rglob("*"))}
    assert set(modes.values()) == {0o700, 0o600}
    assert {path for path, mode in modes.items() if mode == 0o700} == {path for path in modes if path.is_dir()}


STRANGER = 12345


def owned_by(monkeypatch, path, uid=STRANGER):
    """Let a path, link or not, belong to another user, without the rights that this takes."""
    number, fstat, lstat = path.lstat().st_ino, os.fstat, os.lstat

    def changed(found):
        return os.stat_result([*found[:4], uid, *found[5:]]) if found.st_ino == number else found

    monkeypatch.setattr(os, "fstat", lambda file: changed(fstat(file)))
    monkeypatch.setattr(os, "lstat", lambda name: changed(lstat(name)))


def linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


FOLDERS = {
    "all may write": (lambda path, monkeypatch: path.chmod(0o777), "has mode 0777: others than its owner may write"),
    "all may write, sticky": (lambda path, monkeypatch: path.chmod(0o1777), "has mode 1777"),
    "the group may write": (lambda path, monkeypatch: path.chmod(0o770), "has mode 0770"),
    "of another user": (lambda path, monkeypatch: owned_by(monkeypatch, path), "belongs to user 12345, this process"),
    "a link of another user": (
        lambda path, monkeypatch: (linked(path), owned_by(monkeypatch, path)),
        "belongs to user 12345",
    ),
}


@pytest.mark.parametrize(("change", "why"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_others_may_have_written_is_not_used(tmp_path, caplog, monkeypatch, change, why):
    folder = tmp_path / "cache"
    kept(folder)
    change(folder, monkeypatch)
    untrusted = Cache(folder)
    other = Unit("other", *(getattr(UNIT, name) for name in ("text", "headers", "options")))
    with caplog.at_level(logging.WARNING, "tokenferry"):
        for _ in range(2):
            assert untrusted.find(UNIT, V) is None
            untrusted.keep(other, V, BUILT)
    assert len(list(folder.iterdir())) == 1, "something was kept"
    [record] = caplog.records
    assert why in record.getMessage()
    assert "make the folder yours alone (chown, chmod go-w), or set TOKENFERRY_CACHE_DIR" in record.getMessage()
    assert why in cache.refusal(folder)


def compile_at_once(folder, started, compiled):
    """Another process of the host that wants the same kernel."""
    mine = Cache(folder)
    started.wait()
    with mine.one_at_a_time(UNIT, V):
        if mine.find(UNIT, V) is None:
            compiled.put(os.getpid())
            time.sleep(0.2)
            mine.keep(UNIT, V, BUILT)


def test_processes_of_a_host_compile_a_kernel_once(tmp_path):
    context = multiprocessing.get_context("fork")
    started, compiled = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=compile_at_once, args=(tmp_path / "c", started, compiled)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert compiled.get()
    assert compiled.empty(), "another one compiled it, too"
    assert len(list((tmp_path / "c").iterdir())) == 1, "a lock was left"


def test_a_lock_that_is_held_for_too_long_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WAIT_S", 0.05)
    with Cache(tmp_path).one_at_a_time(UNIT, V), Cache(tmp_path).one_at_a_time(UNIT, V):
        kept(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_where_there_are_no_locks_each_compiles_by_itself(tmp_path, monkeypatch):
    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with Cache(tmp_path).one_at_a_time(UNIT, V), Cache(tmp_path).one_at_a_time(UNIT, V):
        pass
    with Cache(None).one_at_a_time(UNIT, V):
        pass
    (tmp_path / "file").touch()
    with Cache(tmp_path / "file" / "cache").one_at_a_time(UNIT, V):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    assert cache.refusal(tmp_path / "not" / "yet") is None
    (tmp_path / "file").touch()
    assert "Not a directory" in cache.refusal(tmp_path / "file" / "cache")

    def read_only(path, data):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(cache, "_write", read_only)
    assert "Read-only file system" in cache.refusal(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"], "something was left"


TRUSTED = {
    "readable for all": lambda path, monkeypatch: path.chmod(0o755),
    "of root": lambda path, monkeypatch: owned_by(monkeypatch, path, 0),
    "a link of this user": lambda path, monkeypatch: linked(path),
    "in a folder like /tmp": lambda path, monkeypatch: path.parent.chmod(0o1777),
}


@pytest.mark.parametrize("change", TRUSTED.values(), ids=TRUSTED)
def test_folders_that_only_this_user_or_root_can_have_written(tmp_path, caplog, monkeypatch, change):
    kept(tmp_path / "cache")
    change(tmp_path / "cache", monkeypatch)
    assert Cache(tmp_path / "cache").find(UNIT, V) == BUILT.image
    assert cache.refusal(tmp_path / "cache") is None
    assert caplog.text == ""


ENTRIES = {
    "an entry of another user": lambda entry, monkeypatch: owned_by(monkeypatch, entry),
    "an entry that all may write to": lambda entry, monkeypatch: entry.chmod(0o777),
    "an entry that is a link": lambda entry, monkeypatch: linked(entry),
    "an entry that is a file": lambda entry, monkeypatch: (entry.rename(entry.parent / "old"), entry.touch()),
    "a cubin of another user": lambda entry, monkeypatch: owned_by(monkeypatch, entry / "kernel.cubin"),
    "a cubin that the group may write": lambda entry, monkeypatch: (entry / "kernel.cubin").chmod(0o660),
    "a cubin that is a link": lambda entry, monkeypatch: linked(entry / "kernel.cubin"),
    "a report of another user": lambda entry, monkeypatch: owned_by(monkeypatch, entry / "build.json"),
}


@pytest.mark.parametrize("change", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_that_others_may_have_written_is_set_aside(tmp_path, caplog, monkeypatch, change):
    """It may be left from a time when others could write to the folder."""
    entry = kept(tmp_path)
    change(entry, monkeypatch)
    with caplog.at_level(logging.WARNING, "tokenferry"):
        assert Cache(tmp_path).find(UNIT, V) is None
    assert f"{entry} is damaged" in caplog.text
    assert not entry.exists()
    Cache(tmp_path).keep(UNIT, V, BUILT)
    assert Cache(tmp_path).find(UNIT, V) == BUILT.image


def _keep_and_find(folder, start, answers):
    start.wait()
    for i in range(50):
        cache, unit = Cache(folder), Unit("toy", f"text {i}", UNIT.headers, UNIT.options)
        found = cache.find(unit, V)
        cache.keep(unit, V, Built(BUILT.image + bytes(str(i), "ascii"), LOG))
        again = cache.find(unit, V)
        expected = BUILT.image + bytes(str(i), "ascii")
        if found not in (None, expected) or again != expected:
            answers.put(f"{i}: {found!r} {again!r}")
            return
    answers.put("ok")


def test_processes_that_write_the_same_entries_at_once(tmp_path):
    """Each finds nothing or all of an entry, whoever wrote it; nothing but the entries stays."""
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_keep_and_find, args=(tmp_path, start, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=240) for _ in processes] == ["ok"] * 4
    for process in processes:
        process.join(60)
    assert len(list(tmp_path.iterdir())) == 50


HIT = """
import pickle
import sys
from pathlib import Path
from tokenferry.jit import compiler
from tokenferry.jit import cache
from tokenferry.jit.cache import Cache
cache = Cache(Path(sys.argv[1]))
unit, built = pickle.loads(bytes.fromhex(sys.argv[2]))
if sys.argv[3] == "keep":
    cache.keep(unit, compiler.version(), built)
assert cache.find(unit, compiler.version()) == built.image
assert "cuda.bindings.nvrtc" not in sys.modules
"""


def test_a_hit_loads_no_compiler(tmp_path):
    pytest.importorskip("cuda.bindings", reason="no NVRTC: its version cannot be asked for")
    for what in ("keep", "find"):
        command = [sys.executable, "-c", HIT, str(tmp_path), pickle.dumps((UNIT, BUILT)).hex(), what]
        assert subprocess.run(command, check=False, timeout=240).returncode == 0
