"""What a server must have installed, with exact versions.

Those for a CPU are what the tests run with; those for a GPU should fit the same image, and were not run.
"""

from __future__ import annotations

from typing import Final

from adacorr_deploy.serving.config_text import Machine

SERVER_IMAGE: Final = "nvcr.io/nvidia/tritonserver:24.10-py3"  # Triton 2.51, Python 3.10

# NumPy 2 breaks the Python backend of this Triton: outputs arrive with another shape.
_COMMON: Final = (
    "numpy==1.26.4",
    "pillow==12.3.0",
    "pydantic==2.14.3",
    "tomli==2.5.0 ; python_version < '3.11'",
    "tritonclient[grpc]==2.51.0",  # of the health check
)
_ENGINES: Final = {
    Machine.CPU: (
        "onnxruntime==1.23.2 ; python_version < '3.11'",
        "onnxruntime==1.32.0 ; python_version >= '3.11'",
    ),
    Machine.GPU: (
        "onnxruntime-gpu==1.23.2 ; python_version < '3.11'",
        "onnxruntime-gpu==1.31.1 ; python_version >= '3.11'",
        "cuda-bindings==13.0.3",
        "cuda-core==1.2.2",
        "ml-dtypes==0.5.4",
        "nvidia-cuda-nvrtc==13.0.88",
        "safetensors==0.8.0",
    ),
}

# Only where OTEL_EXPORTER_OTLP_ENDPOINT names a collector. Later ones want a protobuf that tritonclient 2.51 refuses.
_TELEMETRY: Final = ("opentelemetry-sdk==1.27.0", "opentelemetry-exporter-otlp-proto-http==1.27.0")
_TEXT: Final = ("tokenizers==0.23.3",)


def requirements(machine: Machine, *, text: bool = True) -> str:
    """Return a requirements file of a server; `text` says whether it encodes prompts."""
    return "".join(f"{line}\n" for line in (*_COMMON, *_ENGINES[machine], *(_TEXT if text else ())))


def telemetry_requirements() -> str:
    """Return a requirements file of what sends spans, for servers that are to."""
    return "".join(f"{line}\n" for line in _TELEMETRY)
