"""A locust user of SigLIP Serve: `locust -f THIS_FILE --url URL`.

In the closed loop each user sends a request, waits for its answer, and sends the next. In the open loop
(`--rate-per-user`) each user sends at drawn times, however slow the answers are, and the latency counts from
the time at which the request was due. Each answer is checked.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from random import Random
from typing import Any, Protocol, cast

import gevent
import grpc  # type: ignore[import-untyped]
from gevent.pool import Pool
from geventhttpclient import HTTPClient
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import LocustError
from locust.user.task import LOCUST_STATE_STOPPING
from tritonclient.grpc import InferResult, service_pb2

from siglip_serve_client._operations.requests import Answer, Call
from siglip_serve_client._transports.endpoint import Endpoint
from siglip_serve_client._transports.http_messages import HttpAnswer, HttpRequest, infer_request
from siglip_serve_client._transports.status import check_status, error_of
from siglip_serve_client.commands.bench import BenchError
from siglip_serve_client.commands.bench.mix import parse_models, pictures, poisson_times
from siglip_serve_client.commands.bench.record import Recorder
from siglip_serve_client.commands.bench.requests import METHOD, Draw, check_answer, grpc_body
from siglip_serve_client.commands.embed.sources import SourcesError
from siglip_serve_client.commands.options import endpoint
from siglip_serve_client.errors import ClientError

__all__ = ["SiglipUser"]

_MOST_IN_FLIGHT = 256  # of one user of the open loop
_OVERDUE = 0.5  # seconds after its time at which a request that was not sent counts as failed

_recorders: list[Recorder] = []  # of this process: none, or one


class RequestError(LocustError):
    """A request that failed, or a wrong answer."""


def _add_options(parser: LocustArgumentParser) -> None:
    add: Any = parser.add_argument
    fixed = functools.partial(add, include_in_web_ui=False)
    fixed("--url", default="127.0.0.1:8001", help="host:port of gRPC, or a URL: grpc, grpcs, http, https")
    fixed("--ca-file", default="", metavar="FILE", help="PEM file of the certificates to trust")
    fixed("--record", default="", metavar="FOLDER", help="write each request's times into this folder")
    fixed("--images", nargs="*", default=[], metavar="IMAGE", help="send these files and folders instead")
    add("--model", default="embed_image", help="what is asked, for example embed_image:8,embed_text:1")
    add("--mix", default="500x375", help="sizes of the pictures, for example 64x128:2,500x375:6")
    rate = "requests/s per user in the open loop; 0, the default, is the closed loop"
    add("--rate-per-user", type=float, default=0.0, help=rate)
    add("--timeout", type=float, default=60.0, help="seconds for one request")


def _prepare(environment: Environment, **_: Any) -> None:
    # Not at import: locust forks its processes between the two, and gRPC must not have begun by then.
    import grpc.experimental.gevent as grpc_gevent  # type: ignore[import-untyped]

    grpc_gevent.init_gevent()
    try:
        _draw(environment.parsed_options)
    except (BenchError, SourcesError, OSError) as error:
        sys.exit(f"siglip-serve: {error}")
    # Its clock stopped while the pictures were made, and timers set now would end too early.
    gevent.get_hub().loop.update_now()


def _start(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    if options.record and not _recorders and not type(environment.runner).__name__.startswith("Master"):
        _recorders.append(Recorder(Path(options.record)))


def _stop(**_: Any) -> None:
    for recorder in _recorders:
        recorder.flush()


class _Sender(Protocol):
    def send(self, encoded: Any) -> Answer:
        """The answer, or a ClientError, OSError or HTTPException."""

    def close(self) -> None:
        """Close the connections."""


class _Grpc:
    """ModelInfer over a connection of its own."""

    def __init__(self, where: Endpoint, timeout: float) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        if where.tls:
            trusted = grpc.ssl_channel_credentials(where.ca_file.read_bytes() if where.ca_file else None)
            self._channel = grpc.secure_channel(where.address, trusted, options)
        else:
            self._channel = grpc.insecure_channel(where.address, options)
        read = service_pb2.ModelInferResponse.FromString
        self._infer = functools.partial(
            self._channel.unary_unary(METHOD, response_deserializer=read),
            timeout=timeout,
            metadata=list(where.headers.items()),
        )
        self._address = where.address

    def send(self, encoded: bytes) -> Answer:
        try:
            answer: Answer = InferResult(self._infer(encoded))
        except grpc.RpcError as error:
            raise error_of(error.code().name, error.details() or "", self._address) from error
        return answer

    def close(self) -> None:
        self._channel.close()


class _Http:
    """POST over connections that are kept open: one in the closed loop, more in the open loop."""

    def __init__(self, where: Endpoint, timeout: float) -> None:
        host, _, port = where.address.rpartition(":")
        self._address = where.address
        self._client = HTTPClient(
            host.strip("[]"),
            int(port),
            where.headers,
            connection_timeout=timeout,
            network_timeout=timeout,
            concurrency=_MOST_IN_FLIGHT,
            ssl=where.tls,
            # The library would pass its own certificates, which replace these.
            ssl_context_factory=lambda **_: where.context(),
        )

    def send(self, encoded: HttpRequest) -> Answer:
        answer = self._client.request("POST", encoded.path, encoded.body, encoded.headers)
        body = bytes(answer.read())
        check_status(answer.status_code, body, self._address)
        return HttpAnswer(body, cast(Any, answer))

    def close(self) -> None:
        self._client.close()


def _draw(options: Any) -> Callable[[], tuple[str, Any]]:
    http = endpoint(options.url, options.ca_file).http
    return _shared_draw(options.model, options.mix, tuple(options.images), http, options.timeout)


@functools.lru_cache(1)
def _shared_draw(
    model: str, mix: str, images: tuple[str, ...], http: bool, timeout: float
) -> Callable[[], tuple[str, Any]]:
    # One for all users of the process: encoded requests take memory.
    def encode(call: Call) -> HttpRequest | bytes:
        limited = replace(call, timeout=timeout)
        return infer_request(limited) if http else grpc_body(limited)

    return Draw(parse_models(model), pictures(mix, images), encode, Random())


class SiglipUser(User):
    """Sends and checks requests as the options say."""

    host = ""  # --url is the address

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        options: Any = environment.parsed_options
        where = endpoint(options.url, options.ca_file)
        self.transport = "http" if where.http else "grpc"
        self.sender: _Sender = (_Http if where.http else _Grpc)(where, options.timeout)
        self.draw = _draw(options)
        self.times = poisson_times(options.rate_per_user, Random()) if options.rate_per_user > 0 else None
        self.in_flight = Pool(_MOST_IN_FLIGHT)

    def on_start(self) -> None:
        self.begin = time.perf_counter()
        self.due = self.begin + next(self.times) if self.times else self.begin

    @task
    def ask(self) -> None:
        """Send a request and wait for its answer. In the open loop send what is due, without waiting."""
        if self.times is None:
            self._ask(time.perf_counter())
            return
        while self.due <= time.perf_counter() and self._state != LOCUST_STATE_STOPPING:
            due, self.due = self.due, self.begin + next(self.times)
            self.in_flight.spawn(self._ask, due)  # waits only while too many are in flight

    def wait_time(self) -> float:
        """Seconds until the next request."""
        return max(0.0, self.due - time.perf_counter()) if self.times else 0.0

    def on_stop(self) -> None:
        # Open loop: sent requests are still answered, and requests that are long overdue have failed.
        stopped = time.perf_counter()
        while self.times and self.due < stopped - _OVERDUE:
            self._report("request", (self.due, stopped, stopped), "UNSENT: too many were in flight")
            self.due = self.begin + next(self.times)
        self.in_flight.join(timeout=self.environment.parsed_options.timeout)
        self.sender.close()

    def _ask(self, due: float) -> None:
        model, encoded = self.draw()
        sent, fault = time.perf_counter(), ""
        try:
            check_answer(model, self.sender.send(encoded))
        except (ClientError, OSError, HTTPException) as error:
            fault = f"{type(error).__name__}: {error}"
        self._report(model, (due, sent, time.perf_counter()), fault)

    def _report(self, what: str, times: tuple[float, float, float], fault: str) -> None:
        due, sent, ended = times
        self.environment.events.request.fire(
            request_type=self.transport,
            name=what,
            response_time=(ended - due) * 1000,
            response_length=0,
            exception=RequestError(fault) if fault else None,
            context=self.context(),
        )
        for recorder in _recorders:
            recorder(due, sent, ended, fault)


for _event, _listener in (
    (events.init_command_line_parser, _add_options),
    (events.init, _prepare),
    (events.test_start, _start),
    (events.test_stop, _stop),
    (events.quit, _stop),
):
    cast(Any, _event).add_listener(_listener)
