"""Calls over gRPC that no honest client sends, as bytes on the wire, and how each is to be refused.

They are messages of the inference protocol, or what is to pass for one. The table serves the tests, which check every
text, and the soak, which mixes them with honest requests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"
INVALID: Final = "INVALID_ARGUMENT"
ANSWERED: Final = "OK"
LABELS: Final = "class_labels"
MANY: Final = 5_000  # parameters, outputs
IMAGES: Final = 1_000_000  # more than any model takes
Parameter = bool | int | str | float
_NO_FIELD: Final = "is no field of a request. See the repository's README for those."


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An input as it goes over the wire; what it says need not fit what it holds."""

    name: str
    datatype: str
    shape: Sequence[int]
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HostileCall:
    """A call over gRPC.

    Attributes:
        name: Of the case.
        message: A serialized `ModelInferRequest`, or what is to pass for one.
        code: That answers it; OK where a stranger's wish does no harm.
        text: That the refusal holds: the field, what was given, what is allowed.
        by_model: Whether the model itself refuses it, and so counts it; the server does the rest.
    """

    name: str
    message: bytes
    code: str = INVALID
    text: str = ""
    by_model: bool = False


def send(channel: grpc.Channel, message: bytes, *, seconds: float = 30.0) -> tuple[str, str]:
    """Send bytes as a call, and return the code and the text of the answer."""
    call = channel.unary_unary(METHOD, request_serializer=None, response_deserializer=None)
    try:
        call(message, timeout=seconds)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return ANSWERED, ""


def whole_numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def text(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def labels(*values: int) -> Tensor:
    return Tensor(name=LABELS, datatype="INT64", shape=[len(values)], raw=whole_numbers(*values))


def single(name: str, datatype: str, raw: bytes) -> Tensor:
    return Tensor(name=name, datatype=datatype, shape=[1], raw=raw)


def message(
    model: str,
    *tensors: Tensor,
    outputs: Sequence[str] = ("rho",),
    edit: Callable[[service_pb2.ModelInferRequest], object] = lambda request: None,
) -> bytes:
    """Return a call's bytes; `edit` does to the message what has no argument here."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for tensor in tensors:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        request.raw_input_contents.append(tensor.raw)
    for output in outputs:
        request.outputs.add(name=output)
    edit(request)
    serialized: bytes = request.SerializeToString()
    return serialized


def hostile_calls(model: str) -> list[HostileCall]:
    """Return every case over gRPC, for a model of fewer than `IMAGES` classes and images."""
    return [*_shapes(model), *_texts(model), *_values(model), *_parameters(model), *_messages(model), *_harmless(model)]


def _shapes(model: str) -> list[HostileCall]:
    def case(name: str, tensor: Tensor, text: str) -> HostileCall:
        return HostileCall(name=name, message=message(model, tensor), text=text)

    one = whole_numbers(1)
    square = Tensor(name=LABELS, datatype="INT64", shape=[1, 1], raw=one)
    short = Tensor(name=LABELS, datatype="INT64", shape=[2], raw=one)
    below = Tensor(name=LABELS, datatype="INT64", shape=[-1], raw=one)
    beyond = Tensor(name=LABELS, datatype="INT64", shape=[2**62], raw=one)
    floats = single(LABELS, "FP32", b"\0\0\0\0")
    return [
        case("rank", square, "unexpected shape for input 'class_labels' for model"),
        case("fewer bytes than the shape says", short, "Expected 16, got 8"),
        case("negative axis", below, "All input dimensions should be specified for input 'class_labels'"),
        case("axis beyond memory", beyond, "input byte size mismatch for input 'class_labels'"),
        case("datatype", floats, "'class_labels' data-type is 'FP32'"),
        case("no datatype", single(LABELS, "FOO", one), "data-type is '<invalid>'"),
        case("unknown input", single("sede", "INT64", one), "unexpected inference input 'sede'"),
        HostileCall(
            name="no images",
            message=message(model, labels()),
            text="class_labels: List should have at least 1 item after validation, not 0, got []",
            by_model=True,
        ),
        HostileCall(
            name="a million images",
            message=message(model, labels(*[0] * IMAGES)),
            text="the number of class_labels is 1000000, allowed are whole numbers from 1 to ",
            by_model=True,
        ),
    ]


def _texts(model: str) -> list[HostileCall]:
    def case(name: str, raw: bytes, text: str, *, by_model: bool = False) -> HostileCall:
        call = message(model, labels(1), single("policy", "BYTES", raw))
        return HostileCall(name=name, message=call, text=text, by_model=by_model)

    cut = "incomplete string length indicator for inference input 'policy'"
    return [
        case("cut length", b"\x01", cut),
        case("length beyond the bytes", struct.pack("<I", 2**32 - 1) + b"none", "incomplete string data for inference"),
        case("bytes beyond the length", text(b"none") + b"xx", cut),
        case("huge text", text(b"x" * 10_000_000), "policy: String should have at most 80 characters", by_model=True),
        case("no UTF-8", text(b"\xff\xfe"), "policy is not UTF-8 text (invalid start byte", by_model=True),
        case("NUL", text(b"no\0ne"), "policy is 'no\\x00ne', allowed are none, ", by_model=True),
        case("line end", text(b"none\n"), "policy is 'none\\n', allowed are none, ", by_model=True),
        case("path", text(b"../../etc/passwd"), "policy is '../../etc/passwd', allowed are none, ", by_model=True),
        case("empty text", text(b""), "policy: String should have at least 1 character", by_model=True),
    ]


def _values(model: str) -> list[HostileCall]:
    def case(name: str, tensor: Tensor, text: str) -> HostileCall:
        return HostileCall(name=name, message=message(model, labels(1), tensor), text=text, by_model=True)

    def latents(value: float, *shape: int) -> Tensor:
        raw = np.full(shape, value, dtype=np.float32).tobytes()
        return Tensor(name="latents", datatype="FP32", shape=shape, raw=raw)

    formats = Tensor(name="outputs", datatype="BYTES", shape=[MANY], raw=text(b"png") * MANY)
    return [
        case("least steps", single("steps", "INT64", whole_numbers(-(2**63))), "steps: Input should be greater"),
        case("most steps", single("steps", "INT64", whole_numbers(2**63 - 1)), "is 9223372036854775807, allowed are"),
        case(
            "guidance", single("guidance", "FP64", struct.pack("<d", float("nan"))), "guidance: Input should be a fin"
        ),
        case("eta", single("eta", "FP64", struct.pack("<d", float("-inf"))), "eta: Input should be a finite number"),
        case("timeout", single("timeout_ms", "INT64", whole_numbers(2**63 - 1)), "timeout_ms: Input should be less"),
        case("latents of NaN", latents(np.nan, 1, 1, 12, 12), "latents holds 144 values that are NaN or infinite."),
        case("latents' shape", latents(0, 1, 1, 12, 13), "latents has shape (1, 1, 12, 13), this model and 1 images"),
        case("no latents", latents(0, 0, 1, 12, 12), "latents has shape (0, 1, 12, 12), this model and 1 images"),
        case("outputs", single("outputs", "BYTES", text(b"jpeg")), "outputs holds 'jpeg', allowed are png"),
        case("many outputs", formats, "outputs: List should have at most 4 items after validation, not 5000"),
        case(
            "command", single("command", "BYTES", text(b"quit")), "command is 'quit', allowed are sample, submit, next"
        ),
        case("stray field", single("after_step", "INT64", whole_numbers(5)), "after_step belongs to the commands next"),
        HostileCall(
            name="another's stream",
            message=message(
                model,
                single("command", "BYTES", text(b"next")),
                single("stream", "BYTES", text(b"x" * 1_000_000)),
                outputs=["event"],
            ),
            text="which is none that is open: it ended, or was not read.",
            by_model=True,
        ),
    ]


def _parameters(model: str) -> list[HostileCall]:
    def case(
        name: str, text: str, values: Mapping[str, Parameter], *, by_model: bool = False, code: str = INVALID
    ) -> HostileCall:
        def edit(request: service_pb2.ModelInferRequest) -> None:
            for key, value in values.items():
                kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
                setattr(request.parameters[key], kind, value)

        return HostileCall(
            name=name, message=message(model, labels(1), edit=edit), code=code, text=text, by_model=by_model
        )

    many = {f"p{index}": index for index in range(MANY)}
    reserved = "parameter keys starting with 'triton_' are reserved for Triton usage"
    return [
        case("misspelt field", f"'sede' {_NO_FIELD}", {"sede": 7}, by_model=True),
        case("thousands of parameters", _NO_FIELD, many, by_model=True),
        case("parameter of NaN", f"'p' {_NO_FIELD}", {"p": float("nan")}, by_model=True),
        case("parameter that breaks JSON", _NO_FIELD, {'a"\\\n': '"\\\n\x01'}, by_model=True),
        case("priority below 0", "invalid value for 'priority', expected value >= 0", {"priority": -1}),
        case("priority as text", "invalid value type for 'priority' parameter", {"priority": "high"}),
        case("timeout as number", "invalid value type for 'timeout' parameter", {"timeout": 0.5}),
        case("sequence as flag", "invalid value type for 'sequence_id' parameter", {"sequence_id": True}),
        case(
            "long sequence",
            "string correlation ID cannot be longer than 128 characters",
            {"sequence_id": "x" * 1000},
            code="UNIMPLEMENTED",
        ),
        case("the server's own key", reserved, {"triton_trace": "[" * 100_000}),
    ]


def _messages(model: str) -> list[HostileCall]:
    fine, one = message(model, labels(1)), labels(1)

    def both(request: service_pb2.ModelInferRequest) -> None:
        request.inputs[0].contents.int64_contents.append(1)

    def shared(request: service_pb2.ModelInferRequest) -> None:
        del request.raw_input_contents[:]
        request.inputs[0].parameters["shared_memory_region"].string_param = "nobody's"
        request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 8

    def without_contents(request: service_pb2.ModelInferRequest) -> None:
        del request.raw_input_contents[:]

    def version(request: service_pb2.ModelInferRequest) -> None:
        request.model_version = "x/../1"

    def unparsed(name: str, sent: bytes) -> HostileCall:
        return HostileCall(name=name, message=sent, code="INTERNAL", text="Unable to parse request")

    def unknown(name: str, sent: bytes) -> HostileCall:
        return HostileCall(name=name, message=sent, code="NOT_FOUND", text="Request for unknown model: ")

    return [
        unparsed("garbage", b"\xff" * 64),
        unparsed("cut message", fine[:-3]),
        unparsed("name that is no UTF-8", b"\x0a\x02\xff\xfe"),
        unknown("empty message", b""),
        unknown("path as model", message("../../etc", one)),
        HostileCall(name="path as version", message=message(model, one, edit=version), text="an integral value > 0"),
        HostileCall(name="no fields", message=message(model), text="class_labels: Field required", by_model=True),
        HostileCall(
            name="a field twice",
            message=message(model, one, one),
            text="input 'class_labels' already exists in request",
        ),
        HostileCall(name="contents twice", message=message(model, one, edit=both), text="must not be specified when"),
        HostileCall(
            name="no contents", message=message(model, one, edit=without_contents), text="unable to find data for input"
        ),
        HostileCall(
            name="unknown output",
            message=message(model, one, outputs=["sharks"]),
            text="unexpected inference output 'sharks'",
        ),
        HostileCall(
            name="shared memory",
            message=message(model, one, edit=shared),
            code="NOT_FOUND",
            text="Unable to find shared memory region: 'nobody's'",
        ),
    ]


def _harmless(model: str) -> list[HostileCall]:
    """Return what is answered: it asks for more than it gets, or means nothing here."""

    def named(request: service_pb2.ModelInferRequest) -> None:
        request.id = 'x"\n\x00\x01' * 100_000  # its line in the log must stay one line, and short

    def sequence(request: service_pb2.ModelInferRequest) -> None:
        request.parameters["sequence_id"].int64_param = 5
        request.parameters["priority"].uint64_param = 2**63
        request.parameters["timeout"].int64_param = 1

    return [
        HostileCall(name="long id", message=message(model, labels(1), edit=named), code=ANSWERED),
        HostileCall(name="sequence and priority", message=message(model, labels(1), edit=sequence), code=ANSWERED),
        HostileCall(
            name="an output many times", message=message(model, labels(1), outputs=["rho"] * MANY), code=ANSWERED
        ),
    ]


# --- What ends Triton 24.10 itself ---------------------------------------------------------------------------------


def lethal_calls(model: str) -> dict[str, bytes]:
    """Return calls that Triton 24.10 does not survive, before the model sees them; see the repository's README."""

    def classified(request: service_pb2.ModelInferRequest) -> None:
        request.outputs[0].parameters["classification"].int64_param = 1

    wrapped = Tensor(name=LABELS, datatype="INT64", shape=[2**61 + 1], raw=whole_numbers(1))  # 8 bytes, modulo 2⁶⁴
    return {
        "classification of text": message(model, labels(1), outputs=["png"], edit=classified),
        "shape whose bytes wrap": message(model, wrapped),
    }
