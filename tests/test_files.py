"""Files are whole or not there, whatever the disk does."""

import os
import resource

import pytest

from ferret_flwr.files import write_atomic

OLD, NEW = b"old content", bytes(range(256)) * 64


def _names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_writes_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (OLD, NEW, b""):
        write_atomic(path, content)
        assert path.read_bytes() == content
        assert _names(path.parent) == ["file"]


def test_the_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(OLD)
    write_atomic(tmp_path / "atomic", OLD)
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, existed, function, error):
    path = tmp_path / "file"
    if existed:
        path.write_bytes(OLD)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(os, function, fail)
        write_atomic(path, NEW)
    assert _names(tmp_path) == (["file"] if existed else [])
    assert not existed or path.read_bytes() == OLD
    write_atomic(path, NEW)
    assert path.read_bytes() == NEW


def test_a_disk_that_takes_only_half(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(path, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == OLD
    assert _names(tmp_path) == ["file"]


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(OSError, match=path.name if path.is_dir() else "file"):
            write_atomic(path, NEW)
    assert (tmp_path / "file").read_bytes() == OLD
    assert _names(tmp_path) == ["file", "folder"]
