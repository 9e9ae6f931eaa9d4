"""Ask a busy server again, with pauses that grow."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace

from siglip_serve_client._operations.requests import Answer, Call, Transport
from siglip_serve_client.errors import DeadlineError, UnavailableError

__all__ = ["ask"]

# Seconds of the pauses after which a busy server is asked again; each pause is drawn from half of it to all.
_BACK_OFF = (0.2, 0.6, 2.0, 6.0)


async def ask(transport: Transport, call: Call) -> Answer:
    """The model's answer. A server that is too busy is asked again, within the call's timeout.

    Raises:
        ClientError: the server refused the request, failed, or did not answer.
    """
    deadline = time.monotonic() + call.timeout
    for longest in (*_BACK_OFF, None):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return await transport.infer(replace(call, timeout=left))
        except UnavailableError as error:
            # A server that was late may still be at work, and one that is not there cannot be asked again.
            if type(error) is not UnavailableError or longest is None:
                raise
        await asyncio.sleep(min(random.uniform(longest / 2, longest), max(deadline - time.monotonic(), 0)))
    raise DeadlineError(f"{call.model} did not answer within {call.timeout:g} s")
