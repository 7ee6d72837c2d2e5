"""A file is replaced by a whole one or stays."""

from __future__ import annotations

import pytest

from natgrad.whole_files import whole_file


def test_a_file_stays_where_writing_its_successor_fails(tmp_path):
    path = tmp_path / "file"
    with whole_file(str(path)) as partial:
        partial.write_bytes(b"first")
        assert not path.exists()
    with pytest.raises(RuntimeError, match="no ink"), whole_file(path) as partial:
        partial.write_bytes(b"sec")
        raise RuntimeError("no ink")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
