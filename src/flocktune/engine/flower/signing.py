"""How an owner's requests are signed: Flower's signature of the time, by the coordinator's clock as far as it is known.

Flower refuses a signature whose time is 5 s ahead, or 305 s behind; owners' clocks may be worse than that.
"""

from __future__ import annotations

import time
from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

CORRECTED_S = 300.0
"""A clock that is wrong by at most so much is made up for."""

_SAME_S = 3.0
"""A response says its time in whole seconds, and was on its way for a moment."""


@dataclass
class Signed:
    """Signs every request. ``ahead_s``: what is taken off this machine's clock; ``public``: the key as PEM."""

    private: ec.EllipticCurvePrivateKey
    public: bytes
    ahead_s: float = 0.0

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """What Flower's client calls for every request."""
        moment = datetime.fromtimestamp(time.time() - self.ahead_s, UTC).isoformat()
        signature = sign_message(self.private, moment.encode("ascii"))
        context.request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = b64encode(self.public).decode("ascii")
        context.request.headers[TIMESTAMP_HEADER] = moment
        context.request.headers[FLEET_HTTP_SIGNATURE_HEADER] = b64encode(signature).decode("ascii")
        return call_next(context)

    def corrected(self, ahead_s: float) -> bool:
        """Take another clock into account; whether that changes anything."""
        if abs(ahead_s - self.ahead_s) < _SAME_S or abs(ahead_s) > CORRECTED_S:
            return False
        self.ahead_s = ahead_s
        return True


def clock_ahead_s(response: httpx.Response) -> float:
    """By how much this clock is ahead of the one that a response's Date is from; 0 when it says none."""
    try:
        return time.time() - parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return 0.0
