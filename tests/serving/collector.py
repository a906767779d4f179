"""Stands in for an OpenTelemetry collector: takes OTLP over HTTP, decodes the protobuf, prints a line of JSON per span.

It runs in the server's environment, which has OTLP's message types. Run as a script: prints its port first.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


def said(value: object) -> None:
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


class Collector(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        if self.path != "/v1/traces":
            self.send_error(404)
            return
        message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in message.resource_spans:
            about = MessageToDict(resource.resource)
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = MessageToDict(span)
                    ids = {name: getattr(span, name).hex() for name in ("trace_id", "span_id", "parent_span_id")}
                    said({**values, **ids, "resource": about})
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing else."""


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", 0), Collector)
    said(server.server_address[1])
    server.serve_forever()
