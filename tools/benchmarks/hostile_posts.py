"""Requests over HTTP that no honest client sends, as bytes on the wire, and how each is to be refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from hostile_calls import IMAGES, LABELS, MANY, whole_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class HostilePost:
    """A request over HTTP: a body for `path`, or bytes that are no request at all."""

    name: str
    path: str
    body: bytes
    code: int  # 0: the connection is closed without an answer
    text: str = ""
    headers: Mapping[str, str] | None = None  # beside, or in place of, those that an honest client sends

    def on_the_wire(self) -> bytes:
        headers = {
            "Host": "localhost",
            "Connection": "close",
            "Content-Type": "application/json",
            "Content-Length": str(len(self.body)),
            **(self.headers or {}),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value)
        return f"POST {self.path} HTTP/1.1\r\n{lines}\r\n".encode("latin1") + self.body


def hostile_posts(model: str) -> list[HostilePost]:
    """Return every case over HTTP."""
    return [*_bodies(model), *_framing(model)]


def _body(**fields: object) -> bytes:
    return json.dumps({LABELS: [1], "outputs": ["png_base64"], **fields}).encode()


def _bodies(model: str) -> list[HostilePost]:
    path = f"/v2/models/{model}/generate"
    unparsed = "failed to parse the request JSON buffer"
    many = {f"p{index}": index for index in range(MANY)}
    cases: list[tuple[str, bytes, int, str]] = [
        ("no JSON", b"hello", 500, unparsed),
        ("no body", b"", 500, unparsed),
        ("deep JSON", b"[" * 100_000, 500, unparsed),
        ("deep field", b'{"class_labels":' + b"[" * 100_000, 500, unparsed),
        ("number beyond all", b'{"class_labels":[1],"guidance":1e400}', 500, "Number too big to be stored in double"),
        ("NaN", b'{"class_labels":[1],"guidance":NaN}', 400, "guidance: Input should be a finite number, got nan."),
        ("a field twice", b'{"class_labels":[1],"class_labels":[2]}', 400, "'class_labels' already exists in request"),
        ("text for numbers", _body(class_labels="x"), 500, "Unable to parse 'data'"),
        ("fraction", _body(class_labels=[1.5]), 500, "Unable to parse 'data'"),
        ("null", _body(class_labels=None), 500, "Unable to parse 'data'"),
        ("seed beyond all", _body(seed=10**30), 500, "Unable to parse 'data'"),
        ("no UTF-8", b'{"class_labels":[1],"policy":"\xff\xfe"}', 400, "policy is not UTF-8 text"),
        ("half a character", b'{"class_labels":[1],"policy":"\\ud800"}', 500, "surrogate pair in string is invalid"),
        ("a list", b"[1]", 500, "attempt to get members for non-object"),
        ("more after the end", _body() + b"xx", 500, "must not be followed by other values"),
        ("thousands of fields", _body(**many), 400, "is no field of a request"),
        ("a million images", _body(class_labels=[0] * IMAGES), 400, "the number of class_labels is 1000000, allowed"),
        ("huge text", _body(policy="x" * 5_000_000), 400, "policy: String should have at most 80 characters"),
        (
            "the server's own key",
            _body(triton_trace="[" * 100_000),
            200,
            "png_base64",
        ),  # it has no meaning in a plain call
    ]
    return [HostilePost(name=name, path=path, body=body, code=code, text=text) for name, body, code, text in cases]


def _framing(model: str) -> list[HostilePost]:
    generate, infer = f"/v2/models/{model}/generate", f"/v2/models/{model}/infer"
    length = "Inference-Header-Content-Length"
    too_long, below = (
        json.dumps(
            {"inputs": [{"name": LABELS, "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": size}}]}
        ).encode()
        for size in (80, -8)
    )
    return [
        HostilePost(name="cut body", path=generate, body=_body()[:20], headers={"Content-Length": "200"}, code=0),
        HostilePost(name="length below 0", path=generate, body=_body(), headers={"Content-Length": "-5"}, code=0),
        HostilePost(
            name="no gzip",
            path=generate,
            body=_body(),
            headers={"Content-Encoding": "gzip"},
            code=400,
            text="Unsupported content-encoding",
        ),
        HostilePost(
            name="header length below 0",
            path=infer,
            body=_body(),
            headers={length: "-1"},
            code=400,
            text="inference header size should be in range",
        ),
        HostilePost(
            name="header length beyond all",
            path=infer,
            body=_body(),
            headers={length: "9" * 20},
            code=400,
            text="inference header size should be in range",
        ),
        HostilePost(
            name="fewer bytes than announced",
            path=infer,
            body=too_long + whole_numbers(1),
            headers={length: str(len(too_long))},
            code=400,
            text="unexpected size for input 'class_labels', expecting 72 additional bytes",
        ),
        HostilePost(
            name="bytes below 0",
            path=infer,
            body=below + whole_numbers(1),
            headers={length: str(len(below))},
            code=500,
            text="Unable to parse 'binary_data_size'",
        ),
        HostilePost(name="path", path=f"/v2/models/../../etc/{model}/infer", body=_body(), code=404),
    ]
