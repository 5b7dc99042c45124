"""Routes that clients poll: FastAPI's parameters and response models cost more than their answers."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel


class PolledRoute(APIRoute):
    """Calls its endpoint with the request and the path's parameters, which are text, and sends the `Response` as it is.

    The endpoint has no other parameters and no dependencies. Its signature and `response_model` are only documented.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What FastAPI calls for a request. See https://fastapi.tiangolo.com/how-to/custom-request-and-route/."""
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            response: Response = await endpoint(request=request, **request.path_params)
            return response

        return handle


def json_response(answer: BaseModel) -> Response:
    """The model as JSON, without a second validation."""
    return Response(answer.model_dump_json(), media_type="application/json")
