"""Arrays whose headers claim more than there is."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from deploy import arrays
from deploy.arrays import array_from_npy, arrays_from_npz
from deploy.limits import check_zip_claims


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_arrays_come_back(shape):
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    for kept in (values, values.copy(order="F")):
        assert np.array_equal(array_from_npy(npy(kept)), values)


def test_a_header_that_claims_more_than_there_is_allocates_nothing():
    content = npy(np.zeros(1000, np.float32))
    with pytest.raises(ValueError, match="its header says"):
        array_from_npy(content.replace(b"(1000,)", b"(9999,)"))
    with pytest.raises(ValueError, match="no array"):
        array_from_npy(npy(np.array([{}], object)))
    with pytest.raises(ValueError, match="no array"):
        array_from_npy(b"\x93NUMPY\x09\x00")


def test_an_archive_that_grows_too_large_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.zeros(1 << 20), b=np.ones(2))
    assert list(arrays_from_npz(path)) == ["a", "b"]
    monkeypatch.setattr(arrays, "LARGEST_ARRAYS_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="unpacked it has 8 MiB, above 1 MiB"):
        arrays_from_npz(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"no \.npz archive"):
        arrays_from_npz(path)


def test_a_zip_that_claims_more_than_it_has(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", b"\0" * (1 << 20))
    with pytest.raises(ValueError, match="it claims 1,048,576 bytes"):
        check_zip_claims(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data/0", b"\0" * 1000)
    check_zip_claims(path)
    path.write_bytes(b"no zip")
    check_zip_claims(path)
