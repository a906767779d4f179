"""What others wrote can neither fill memory or a message, nor keep us waiting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, model_validator

from adacorr_deploy.core.untrusted import bounded_file, clipped, first_fault, value_from_json


class Pair(BaseModel, extra="forbid"):
    low: int = 0
    high: int = 9

    @model_validator(mode="after")
    def _ordered(self) -> Pair:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, allowed are 0 … {self.high}")
        return self


def fault_of(raw: object) -> str:
    with pytest.raises(ValidationError) as caught:
        Pair.model_validate(raw)
    return first_fault(caught.value)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert bounded_file(file, limit_bytes=5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        bounded_file(file, limit_bytes=4)


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        bounded_file(tmp_path / "pipe", limit_bytes=5)
    with pytest.raises(FileNotFoundError):
        bounded_file(tmp_path / "none", limit_bytes=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not"),
        ("[" * 10**5, "nested too deeply"),
        ("{", "Expecting"),
    ],
    ids=["nan", "infinity", "nested", "open"],
)
def test_text_that_is_no_json_is_a_value_error(text: str, message: str) -> None:
    """Python's own reader takes the first two, and ends with a RecursionError at the third."""
    with pytest.raises(ValueError, match=message):
        value_from_json(text)


values = st.recursive(
    st.none() | st.floats() | st.text() | st.binary() | st.integers(-(10**300), 10**300),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=values)
def test_a_clipped_value_is_one_short_line(value: object) -> None:
    text = clipped(value)
    assert 0 < len(text) <= 80
    assert text.isprintable()


@pytest.mark.parametrize(
    "value", ["x" * 10**7, [[0] * 1000] * 1000, 10**10_000, {"x" * 10**6: 1}], ids=["text", "lists", "number", "key"]
)
def test_a_huge_value_is_clipped_too(value: object) -> None:
    assert len(clipped(value)) <= 80


def test_short_values_are_shown_as_they_are() -> None:
    assert [clipped(value) for value in (1e308, "a b", [1, 2], None)] == ["1e+308", "'a b'", "[1, 2]", "None"]


def test_the_first_fault_says_where_what_and_how() -> None:
    assert fault_of({"low": "x"}).startswith("low: Input should be a valid integer")
    assert fault_of({"low": "x"}).endswith(", got 'x'")
    assert fault_of({"low": 10}) == "low is 10, allowed are 0 … 9"
    assert fault_of([]).startswith("top level: ")
    assert len(fault_of({"y" * 10**6: "z" * 10**6})) < 250
