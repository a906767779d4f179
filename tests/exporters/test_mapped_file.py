"""Invariant: pages of a mapped checkpoint are given back, and whoever reads them again gets the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adacorr_deploy.exporters.mapped_file import release_pages, tensors_from_safetensors


def resident_file_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system doesn't say what is resident")
    found = re.search(r"^RssFile:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_are_those_that_the_library_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "scalar": torch.randn(()), "empty": torch.zeros(0, 4), "b": torch.randn(7)}
    file = tmp_path / "x.safetensors"
    save_file({name: (100 * value).to(dtype) for name, value in tensors.items()}, file, metadata={"format": "pt"})
    read, expected = tensors_from_safetensors(file), load_file(file)
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(read[name], value)
        assert read[name].dtype == dtype


def test_pages_leave_memory_and_come_back_unchanged(tmp_path: Path) -> None:
    large = torch.randn(8 << 20)  # 32 MiB
    save_file({"large": large}, tmp_path / "x.safetensors")
    read = tensors_from_safetensors(tmp_path / "x.safetensors")["large"]
    before = resident_file_bytes()
    assert torch.equal(read, large)
    assert resident_file_bytes() - before > 30 << 20
    release_pages()
    assert resident_file_bytes() - before < 4 << 20
    assert torch.equal(read, large)
