"""files/output.py: an output appears whole under its final name, or not at all."""

import errno

import pytest

from quantlab.files.output import replacing


def test_a_whole_output_gets_its_name(tmp_path):
    with replacing(tmp_path / "a.bin") as part:
        part.write_bytes(b"whole")
        assert not (tmp_path / "a.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"whole"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failed_output_leaves_what_was_there(tmp_path, error):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(error), replacing(tmp_path / "a.bin", overwrite=True) as part:
        part.write_bytes(b"half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(OSError, match="a.bin: No space left on device. Free some space"), replacing(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_bad_outputs_are_refused_before_any_work(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="a.bin: exists already"), replacing(tmp_path / "a.bin"):
        raise AssertionError("the block was entered")
    with pytest.raises(FileNotFoundError, match="folder .*no does not exist"), replacing(tmp_path / "no" / "a.bin"):
        raise AssertionError("the block was entered")
    with pytest.raises(IsADirectoryError, match="is a folder"), replacing(tmp_path):
        raise AssertionError("the block was entered")
