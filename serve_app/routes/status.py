"""What orchestrators and monitoring ask: `/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS

from serve_app.routes.answers import AnsweringRoute, service_of

router = APIRouter(tags=["status"], route_class=AnsweringRoute)

#: Reachable without a key, for whoever restarts the server and knows no secrets.
OPEN_PATHS = ("/healthz", "/readyz")

FORMER_SETTINGS = (
    "The last user_config cannot be used; the settings before it hold. The server's log says why."
)


@router.get("/healthz", summary="The process is up")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="A worker has its model", responses={503: {"description": "Not yet; why."}})
async def readyz(request: Request) -> JSONResponse:
    readiness = await service_of(request).readiness()
    # Without the values, for whoever asks has no key.
    told: dict[str, Any] = {"settings": FORMER_SETTINGS} if readiness.former_settings else {}
    if readiness.ready:
        return JSONResponse({"status": "ready", **told})
    if readiness.loading_part is not None:
        told["progress"] = round(readiness.loading_part, 3)
    return JSONResponse(
        {"status": "not ready", "reason": readiness.reason, **told},
        status_code=503,
        headers={"Retry-After": "2"},
    )


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> PlainTextResponse:
    """Prometheus' text for everybody; OpenMetrics, which has exemplars, for whoever asks for it by name."""
    _, chosen = choose_encoder(request.headers.get("accept", ""))
    with_exemplars = chosen.startswith("application/openmetrics-text")
    text = await service_of(request).metrics_text(with_exemplars)
    return PlainTextResponse(text, media_type=OPENMETRICS if with_exemplars else CONTENT_TYPE_LATEST)
