"""Routes below `/_local/`, which no real Hub has: faults and the log, for tests and rehearsals."""

import json

from starlette.responses import Response
from starlette.routing import Route

from . import faults
from .calls import Call, reply, route
from .errors import bad_request
from .faults import Faults
from .log import Log


def control_routes(rules: Faults, log: Log) -> list[Route]:
    """GET, PUT (a list that replaces all) and DELETE of `/_local/faults`; GET of `/_local/log?since=n`."""

    def show(call: Call) -> Response:
        return reply(rules.as_json())

    def replace(call: Call) -> Response:
        try:
            found = json.loads(call.body)
            rules.replace([faults.from_json(item) for item in found] if isinstance(found, list) else [])
        except (ValueError, RecursionError) as error:
            raise bad_request(str(error)) from error
        return reply(rules.as_json())

    def clear(call: Call) -> Response:
        rules.replace([])
        return reply([])

    def read_log(call: Call) -> Response:
        since = call.query.get("since", "0")
        return reply(log.since(int(since) if since.isdecimal() else 0))

    return [
        Route("/_local/faults", route(show)),
        Route("/_local/faults", route(replace), methods=["PUT"]),
        Route("/_local/faults", route(clear), methods=["DELETE"]),
        Route("/_local/log", route(read_log)),
    ]
