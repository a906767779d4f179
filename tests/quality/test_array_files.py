"""An archive is read back only if it is exactly what was written; whatever else it holds is one kind of error."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from adacorr_deploy.quality.array_files import arrays_from_npz, npz_from_arrays

NAMES = ("a", "b")
WRITTEN = npz_from_arrays(a=np.arange(6.0).reshape(2, 3), b=np.array(4, np.float32))


def archive_of(header: bytes, *, compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name in NAMES:
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return content.getvalue()


def encrypted(content: bytes) -> bytes:
    marked = bytearray(content)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = marked.find(signature)
        while place != -1:
            marked[place + flags] |= 1
            place = marked.find(signature, place + 1)
    return bytes(marked)


def test_what_was_written_is_read_back() -> None:
    found = arrays_from_npz(WRITTEN, NAMES)
    np.testing.assert_array_equal(found["a"], np.arange(6.0).reshape(2, 3))
    assert found["b"] == np.float32(4)
    assert found["b"].dtype == np.float32


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(WRITTEN[:100], id="truncated"),
        pytest.param(encrypted(WRITTEN), id="encrypted"),
        pytest.param(npz_from_arrays(a=np.zeros(2)), id="a name too few"),
        pytest.param(npz_from_arrays(a=np.zeros(2), b=np.zeros(2), c=np.zeros(2)), id="a name too many"),
        pytest.param(archive_of(b"{'descr': '<f4', 'shape': (2,"), id="a header that ends too soon"),
        pytest.param(
            archive_of(b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000000,), }"), id="endless"
        ),
        pytest.param(archive_of(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), id="pickled"),
        pytest.param(archive_of(b"{}", compression=zipfile.ZIP_DEFLATED), id="compressed"),
    ],
)
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"no archive of a, b: "):
        arrays_from_npz(content, NAMES)
